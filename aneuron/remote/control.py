"""Requests and answers between two processes of one user, over a Unix socket.

Lives here: how requests, answers and file descriptors cross, and that both sides are of the same versions. Must not be
here: what is asked for (engine.py, keeper.py), the calls of models and their tensors (link.py).

What crosses is pickled: each side can make the other run anything. Both are processes of the same user, which spawned
one another, or looked whose the socket is.
"""

import asyncio
import functools
import inspect
import io
import json
import os
import pickle
import platform
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any
from weakref import WeakSet

from aneuron.remote.failures import pickled, restored

Handler = Callable[..., Any]  # what answers a request: its result, or that of the awaitable that it returns
Message = tuple[str, int, Any, Any]  # what it is, its number, what is asked for or None, arguments or answer

_HEADER = struct.Struct("<QQ")  # bytes of the body, file descriptors that came with it
_MOST_FDS = 253  # of one message, the kernel's bound
_READ = 1 << 18


class ChannelLost(ConnectionError):
    """The other side has gone, or the channel was closed here."""


class VersionsDiffer(RuntimeError):
    """The other side runs another version of aneuron, PyTorch or Python."""


class Unread(RuntimeError):
    """An error of the other side that cannot be unpickled here; it goes on as it came."""

    def __init__(self, data: bytes, why: str) -> None:
        super().__init__(f"the other side has raised what cannot be read here ({why})")
        self.data = data


class Fd:
    """A file descriptor, closed when nobody holds it any more. It may be anywhere in what a channel carries: the other
    side gets one of its own of the same file.
    """

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        """Its number, while this is held."""
        return self._number

    def detach(self) -> int:
        """Its number, for who closes it from now on."""
        number, self._number = self._number, -1
        return number

    def close(self) -> None:
        """Close it now."""
        if (number := self.detach()) >= 0:
            os.close(number)

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Fd({self._number})"


class Channel:
    """Asks the other side, and answers it: what a socket has and a pair in memory.

    `handlers`: what answers requests, by name. A handler is cancelled when who asked is, or has gone. `on_lost` is
    called once, with the reason, when the other side has gone; not after `close()`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        handlers: Mapping[str, Handler],
        on_lost: Callable[[Exception], None] | None = None,
    ) -> None:
        self.lost: Exception | None = None  # why nothing can be asked any more
        self._loop, self._handlers, self._on_lost = loop, handlers, on_lost
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._serving: dict[int, asyncio.Task[None]] = {}
        self._number = 0

    async def request(self, name: str, *args: Any) -> Any:
        """The answer of the other side. Raises what its handler raised, and `ChannelLost`; if cancelled, so is it."""
        if self.lost is not None:
            raise self._gone()
        self._number += 1
        number, answer = self._number, self._loop.create_future()
        self._send(("request", number, name, args))
        self._asked[number] = answer
        try:
            return await answer
        except asyncio.CancelledError:
            if number in self._asked and self.lost is None:
                self._send(("cancel", number, None, None))
            raise
        finally:
            self._asked.pop(number, None)
            del answer  # an exception's traceback holds this frame

    def tell(self, name: str, *args: Any) -> None:
        """Have the other side's handler called; nothing comes back, and nothing happens if it has gone."""
        if self.lost is None:
            self._send(("tell", 0, name, args))

    def close(self) -> None:
        """End it; who still waits for an answer gets `ChannelLost`."""
        self._end(ChannelLost("the channel was closed"))

    def close_with_loop(self) -> bool:
        """End it if its loop is closed, with which nobody waits any more; whether that is so. From any thread."""
        if self._loop.is_closed() and self.lost is None:
            self.lost = ChannelLost("its event loop was closed")
            self._release()
        return self._loop.is_closed()

    # What comes.

    def _take(self, message: Message) -> None:
        kind, number, what, value = message
        if kind in ("request", "tell"):
            task = self._loop.create_task(self._serve(number, what, value), name=f"aneuron {what}")
            key = number or -id(task)
            self._serving[key] = task
            task.add_done_callback(lambda _: self._serving.pop(key, None))
        elif kind == "cancel":
            if number in self._serving:
                self._serving[number].cancel()
        elif (answer := self._asked.pop(number, None)) is not None and not answer.done():
            if kind == "answer":
                answer.set_result(value)
            else:
                answer.set_exception(_restored(value))

    async def _serve(self, number: int, name: str, args: tuple[Any, ...]) -> None:
        try:
            answer = self._handlers[name](*args)
            if inspect.isawaitable(answer):
                answer = await answer
            said: Message = ("answer", number, None, answer)
        except Exception as error:
            said = ("error", number, None, _pickled(error))
        if number == 0 or self.lost is not None:
            if said[0] == "error":
                self._loop.call_exception_handler({"message": f"{name!r} was told, and failed: {_restored(said[3])!r}"})
            return
        try:
            self._send(said)
        except Exception as error:  # it cannot be pickled
            self._send(("error", number, None, pickled(error)))

    def _send(self, message: Message) -> None:
        raise NotImplementedError

    # Its end.

    def _gone(self) -> Exception:
        assert self.lost is not None
        return type(self.lost)(*self.lost.args)  # raised for several, each with a traceback of its own

    def _end(self, why: Exception) -> bool:
        """Whether it has ended just now."""
        if self.lost is not None:
            return False
        self.lost = why
        asked, self._asked = self._asked, {}
        for answer in asked.values():
            if not answer.done():
                answer.set_exception(self._gone())
        for task in list(self._serving.values()):
            task.cancel()
        return True

    def _release(self) -> None:
        """Close what it has open."""

    def _lose(self, why: Exception) -> None:
        if self._end(why) and self._on_lost is not None:
            self._on_lost(why)


class SocketChannel(Channel):
    """A channel over a connected Unix socket, which is its own from now on."""

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        handlers: Mapping[str, Handler],
        on_lost: Callable[[Exception], None] | None = None,
    ) -> None:
        super().__init__(loop, handlers, on_lost)
        sock.setblocking(False)
        self._sock = sock
        self._in = bytearray()
        self._fds: deque[int] = deque()
        self._out: deque[tuple[memoryview, list[int]]] = deque()  # what the kernel has not taken
        self._greeted, self._versions = False, versions()
        _open.add(self)
        loop.add_reader(sock.fileno(), self._read)
        self._write(json.dumps(self._versions).encode(), [])

    def _send(self, message: Message) -> None:
        body, fds = _dumps(message)
        if len(fds) > _MOST_FDS:
            raise ValueError(f"{len(fds)} file descriptors in one message: at most {_MOST_FDS} can go")
        self._write(body, fds)

    def _write(self, body: bytes, fds: list[int]) -> None:
        data = memoryview(_HEADER.pack(len(body), len(fds)) + body)
        self._out.append((data, [os.dup(fd) for fd in fds]))
        if len(self._out) == 1:
            self._flush()

    def _flush(self) -> None:
        """Write what the kernel takes."""
        while self._out:
            data, fds = self._out[0]
            try:
                sent = socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._sock.fileno(), self._flush)
                return
            except OSError:  # it has gone; what it had said before is still to be read
                self._drop_unsent()
                return
            for fd in fds:
                os.close(fd)
            if sent < len(data):
                self._out[0] = data[sent:], []
            else:
                self._out.popleft()
        if self.lost is None:
            self._loop.remove_writer(self._sock.fileno())

    def _read(self) -> None:
        try:
            data, fds = _receive(self._sock)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(ChannelLost(f"the other side has gone ({error})"))
            return
        if not data:
            self._lose(ChannelLost("the other side has gone"))
            return
        self._in += data
        self._fds += fds
        try:
            self._parse()
        except VersionsDiffer as error:
            self._lose(error)
        except Exception as error:
            self._lose(ChannelLost(f"what came cannot be read ({type(error).__name__}: {error})"))

    def _parse(self) -> None:
        start, data = 0, self._in
        while self.lost is None and len(data) - start >= _HEADER.size:
            length, count = _HEADER.unpack_from(data, start)
            stop = start + _HEADER.size + length
            if len(data) < stop:
                break
            body = bytes(data[start + _HEADER.size : stop])
            fds = [Fd(self._fds.popleft()) for _ in range(count)]
            start = stop
            if self._greeted:
                self._take(_loads(body, fds))
            else:
                check_versions(self._versions, json.loads(body))
                self._greeted = True
        if start:
            del data[:start]

    def _end(self, why: Exception) -> bool:
        if not super()._end(why):
            return False
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        while self._out:
            before = len(self._out)
            self._flush_last()
            if len(self._out) == before:
                break
        self._release()
        return True

    def _flush_last(self) -> None:
        data, fds = self._out[0]
        try:
            sent = socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
        except OSError:
            return
        if sent == len(data):
            self._out.popleft()
            for fd in fds:
                os.close(fd)

    def _release(self) -> None:
        self._drop_unsent()
        while self._fds:
            os.close(self._fds.popleft())
        self._sock.close()
        _open.discard(self)

    def _drop_unsent(self) -> None:
        while self._out:
            for fd in self._out.popleft()[1]:
                os.close(fd)


class _InMemory(Channel):
    other: "_InMemory"

    def _send(self, message: Message) -> None:
        self._loop.call_soon(self.other._arrives, message)

    def _arrives(self, message: Message) -> None:
        if self.lost is None:
            self._take(message)

    def _end(self, why: Exception) -> bool:
        if not super()._end(why):
            return False
        if self.other.lost is None:
            self._loop.call_soon(self.other._lose, ChannelLost("the other side has gone"))
        return True


def pair_in_memory(
    loop: asyncio.AbstractEventLoop,
    handlers: tuple[Mapping[str, Handler], Mapping[str, Handler]],
    on_lost: tuple[Callable[[Exception], None] | None, Callable[[Exception], None] | None] = (None, None),
) -> tuple[Channel, Channel]:
    """Two ends on one loop, for virtual time: what is sent arrives in the next iteration, as it is."""
    one, other = _InMemory(loop, handlers[0], on_lost[0]), _InMemory(loop, handlers[1], on_lost[1])
    one.other, other.other = other, one
    return one, other


# Versions.


@functools.cache
def versions() -> dict[str, str]:
    """Of what must be the same on both sides."""
    found = {"python": platform.python_version()}
    for name in ("aneuron", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from its source
            found[name] = "unknown"
    return found


def check_versions(ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Raise `VersionsDiffer` for a side that runs others than this one."""
    if differing := sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)):
        text = ", ".join(f"{name} {ours.get(name)} here and {theirs.get(name)} there" for name in differing)
        raise VersionsDiffer(
            f"processes that share engines must run the same versions: {text}; end those of the old version, or say "
            "another name in share="
        )


# Bytes.


def _pickled(error: Exception) -> bytes:
    return error.data if isinstance(error, Unread) else pickled(error)


def _restored(data: bytes) -> BaseException:
    try:
        return restored(data)
    except Exception as error:
        return Unread(data, f"{type(error).__name__}: {error}")


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, fds: list[int]) -> None:
        super().__init__(file, protocol=5)
        self._found = fds

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Fd):
            return None
        self._found.append(obj.fileno())
        return len(self._found) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, fds: list[Fd]) -> None:
        super().__init__(file)
        self._fds = fds

    def persistent_load(self, index: int) -> Fd:
        return self._fds[index]


def _dumps(message: Message) -> tuple[bytes, list[int]]:
    file, fds = io.BytesIO(), list[int]()
    _Pickler(file, fds).dump(message)
    return file.getvalue(), fds


def _loads(body: bytes, fds: list[Fd]) -> Message:
    return _Unpickler(io.BytesIO(body), fds).load()  # type: ignore[no-any-return]


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """As `socket.recv_fds`, which does not heed its flags."""
    flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    data, ancillary, _, _ = sock.recvmsg(_READ, socket.CMSG_LEN(_MOST_FDS * struct.calcsize("i")), flags)
    fds: list[int] = []
    for level, kind, raw in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += [number for (number,) in struct.iter_unpack("i", raw[: len(raw) - len(raw) % struct.calcsize("i")])]
    if not flags:
        for fd in fds:
            os.set_inheritable(fd, False)
    return data, fds


# Forks.

_open: WeakSet[SocketChannel] = WeakSet()


def _close_copies() -> None:
    """In a child that was forked: its copies of sockets would keep the other side from seeing that this one has gone.

    The loop is the parent's, and is not touched.
    """
    for channel in list(_open):
        channel.lost = channel.lost or ChannelLost("the process was forked")
        channel._sock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_copies)
