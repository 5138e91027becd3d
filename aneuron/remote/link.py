"""A link between two processes: frames out together, frames in, and descriptors; and a pair of links in memory.

Lives here: non-blocking Unix sockets on an event loop, when to write, who is told of the end. Must not be here: what
frames mean (client.py, server.py), how they are parsed (frames.py).
"""

import array
import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol
from weakref import WeakSet

from aneuron.remote.frames import Buffer, Frame, Parser, ProtocolError

OnFrames = Callable[[list[Frame]], None]
OnLost = Callable[[Exception | None], None]

_READ = 1 << 18  # bytes read at once: a little more than the kernel keeps for a Unix socket
_FDS = 64  # that may come with one read
_SPACE = socket.CMSG_SPACE(_FDS * array.array("i").itemsize) if hasattr(socket, "CMSG_SPACE") else 0
_CLOSED_BY_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Link(Protocol):
    """One end of a link. Its methods are called on the loop's thread, and none of them blocks.

    `on_frames` gets all frames of one read together. `on_lost` is called once, after the last of them, when the other
    side has closed (None) or the link has broken (the error), but not after `close`. What `on_frames` raises closes the
    link, and is what `on_lost` gets.
    """

    @property
    def queued(self) -> int:
        """Bytes that were to be written and are not taken yet, as of the last flush."""

    def send(self, *buffers: Buffer) -> None:
        """Send a frame that `encode` has made: with the others of this iteration of the loop, by one system call.

        The buffers must not change any more. What is sent once the link is lost or closed goes nowhere.
        """

    def add(self, *buffers: Buffer) -> None:
        """The same for who calls `flush` in this iteration, which spares the loop another one."""

    def send_fd(self, fd: int, *buffers: Buffer) -> None:
        """`send` a frame with `HAS_FD` among its flags and a descriptor, which stays the caller's to close."""

    def flush(self) -> None:
        """Write now what was sent, and do not wait for the rest of the iteration."""

    def pause(self) -> None:
        """Read no more until `resume`. The end of the link is not seen meanwhile, unless by writing."""

    def resume(self) -> None:
        """Read again."""

    def close(self) -> None:
        """Write what is taken at once, then close. Idempotent."""


class _Link:
    """What both kinds of links do alike."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_frames: OnFrames, on_lost: OnLost) -> None:
        self._loop = loop
        self._on_frames = on_frames
        self._on_lost = on_lost
        self._parser = Parser()
        self._fresh: list[Buffer] = []  # sent since the last flush
        self._out: deque[tuple[Buffer, int]] = deque()  # to be written, and copies of descriptors to go with it, or -1
        self._size = 0  # bytes of that
        self._flushing = False  # a flush is due
        self._paused = False
        self._closed = False
        self._broken: Exception | None = None  # writing has failed; there may still be something to read

    @property
    def queued(self) -> int:
        """See `Link`."""
        return self._size

    def send(self, *buffers: Buffer) -> None:
        """See `Link`."""
        if not self._closed and self._broken is None:
            self._fresh += buffers
            if not self._flushing:
                self._flushing = True
                self._loop.call_soon(self._flush_due)

    def add(self, *buffers: Buffer) -> None:
        """See `Link`."""
        if not self._closed and self._broken is None:
            self._fresh += buffers

    def send_fd(self, fd: int, *buffers: Buffer) -> None:
        """See `Link`."""
        if not self._closed and self._broken is None:
            self._join()
            self._push(b"".join(buffers), os.dup(fd))
            self.send()

    def flush(self) -> None:
        """See `Link`."""
        self._join()
        if self._out:
            self._write()

    def _flush_due(self) -> None:
        self._flushing = False
        self.flush()

    def _join(self) -> None:
        if self._fresh:
            self._push(b"".join(self._fresh))
            self._fresh.clear()

    def _push(self, data: bytes, fd: int = -1) -> None:
        self._out.append((data, fd))
        self._size += len(data)

    def close(self) -> None:
        """See `Link`."""
        if not self._closed:
            self.flush()
            self._release()

    def _write(self) -> None:
        raise NotImplementedError

    def _feed(self, chunk: bytearray) -> None:
        """Hand on what has come. What goes wrong with it ends the link: nobody waits for the rest."""
        try:
            frames = self._parser.feed(chunk)
            if frames:
                self._on_frames(frames)
        except Exception as error:
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        if not self._closed:
            self._release()
            self._on_lost(error)

    def _release(self) -> None:
        self._closed = True
        self._drop()
        while self._parser.fds:
            os.close(self._parser.fds.popleft())

    def _drop(self) -> None:
        """Forget what was to be written."""
        self._fresh.clear()
        self._size = 0
        while self._out:
            if (fd := self._out.popleft()[1]) >= 0:
                os.close(fd)


class SocketLink(_Link):
    """A link over a connected Unix stream socket, which it takes over."""

    def __init__(
        self, sock: socket.socket, loop: asyncio.AbstractEventLoop, on_frames: OnFrames, on_lost: OnLost
    ) -> None:
        super().__init__(loop, on_frames, on_lost)
        sock.setblocking(False)
        self._sock = sock
        self._space = bytearray(_READ)
        self._view = memoryview(self._space)
        self._waiting = False  # until the kernel takes more
        _open.add(self)
        loop.add_reader(sock.fileno(), self._read)

    def pause(self) -> None:
        """See `Link`."""
        if not self._paused and not self._closed:
            self._paused = True
            self._loop.remove_reader(self._sock.fileno())

    def resume(self) -> None:
        """See `Link`."""
        if self._paused and not self._closed:
            self._paused = False
            self._loop.add_reader(self._sock.fileno(), self._read)

    def flush(self) -> None:
        """See `Link`."""
        self._join()
        if self._out and not self._waiting:
            self._write()

    def _write(self) -> None:
        """Write until the kernel takes no more."""
        try:
            while self._out:
                data, fd = self._out[0]
                if fd >= 0:
                    fds = array.array("i", [fd])
                    sent = self._sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
                    os.close(fd)
                else:
                    sent = self._sock.send(data)
                self._size -= sent
                if sent < len(data):
                    self._out[0] = (memoryview(data)[sent:], -1)
                else:
                    self._out.popleft()
        except (BlockingIOError, InterruptedError):
            if not self._waiting:
                self._waiting = True
                self._loop.add_writer(self._sock.fileno(), self._write)
        except OSError as error:
            self._break(error)
        else:
            self._wait_no_more()

    def _wait_no_more(self) -> None:
        if self._waiting:
            self._waiting = False
            self._loop.remove_writer(self._sock.fileno())

    def _break(self, error: Exception) -> None:
        """Nothing can be written any more: read what is still there, results perhaps, then say so."""
        self._drop()
        self._wait_no_more()
        self._broken = error
        self._loop.call_soon(self._read_rest)

    def _read_rest(self) -> None:
        for _ in range(16):  # the kernel keeps no more than the first has
            if self._closed or not self._read():
                break
        self._end(self._broken)

    def _read(self) -> bool:
        """Read once; whether anything was there."""
        try:
            size, ancillary, flags, _ = self._sock.recvmsg_into([self._space], _SPACE, _CLOSED_BY_EXEC)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._end(error)
            return False
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._parser.fds.extend(fds)
        if flags & socket.MSG_CTRUNC:
            self._end(ProtocolError("more descriptors came than are ever sent"))
        elif size:
            self._feed(bytearray(self._view[:size]))
        else:
            self._end(None)
        return size > 0

    def _release(self) -> None:
        super()._release()
        with suppress(RuntimeError):  # the loop is closed
            self._loop.remove_reader(self._sock.fileno())
            self._wait_no_more()
        _open.discard(self)
        self._sock.close()


_open: WeakSet[SocketLink] = WeakSet()


def _close_copies() -> None:
    """In a forked child: its copies would keep the other sides from seeing the end of their links."""
    for link in list(_open):
        link._sock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_copies)


class End:
    """One end of a pair in memory, for which a link is still to be made: what a connected socket is elsewhere."""

    def __init__(self) -> None:
        self.other: End
        self.link: MemoryLink | None = None
        self.inbox: deque[tuple[bytearray, list[int]] | None] = deque()  # None: the end
        self.size = 0

    def put(self, chunk: bytearray, fds: list[int]) -> None:
        """Something has been sent to this end."""
        if self.link is not None and self.link._closed:
            for fd in fds:
                os.close(fd)
            return
        self.inbox.append((chunk, fds))
        self.size += len(chunk)
        self._tell()

    def close(self) -> None:
        """The other side sends no more."""
        self.inbox.append(None)
        self._tell()

    def cut(self) -> None:
        """Both sides lose the link, once they have read what was written."""
        self.close()
        self.other.close()

    def _tell(self) -> None:
        if self.link is not None:
            self.link._arrived()


def ends() -> tuple[End, End]:
    """The two ends of a pair in memory."""
    one, other = End(), End()
    one.other, other.other = other, one
    return one, other


class MemoryLink(_Link):
    """A link to another one of this process: what was sent arrives in the next iteration of the loop."""

    def __init__(self, end: End, loop: asyncio.AbstractEventLoop, on_frames: OnFrames, on_lost: OnLost) -> None:
        super().__init__(loop, on_frames, on_lost)
        self._handing = False  # is due
        self._there = end
        end.link = self
        if end.inbox:
            self._arrived()

    @property
    def queued(self) -> int:
        """See `Link`."""
        return self._size + self._there.other.size

    def pause(self) -> None:
        """See `Link`."""
        self._paused = True

    def resume(self) -> None:
        """See `Link`."""
        self._paused = False
        self._arrived()

    def cut(self) -> None:
        """Both sides lose the link, once they have read what was written."""
        self._there.cut()

    def _write(self) -> None:
        fds = [fd for _, fd in self._out if fd >= 0]
        data = bytearray().join([data for data, _ in self._out])
        self._out.clear()
        self._size = 0
        self._there.other.put(data, fds)

    def _arrived(self) -> None:
        if not self._handing and not self._closed and not self._paused:
            self._handing = True
            self._loop.call_soon(self._hand)

    def _hand(self) -> None:
        self._handing = False
        if self._closed or self._paused or not self._there.inbox:
            return
        came = self._there.inbox.popleft()
        if came is None:
            self._end(None)
            return
        chunk, fds = came
        self._there.size -= len(chunk)
        self._parser.fds.extend(fds)
        self._feed(chunk)
        if self._there.inbox:
            self._arrived()

    def _release(self) -> None:
        super()._release()
        self._there.other.close()
        for came in self._there.inbox:
            for fd in came[1] if came else ():
                os.close(fd)
        self._there.inbox.clear()
        self._there.size = 0


def connect(
    end: socket.socket | End, loop: asyncio.AbstractEventLoop, on_frames: OnFrames, on_lost: OnLost
) -> SocketLink | MemoryLink:
    """A link over one end of a connection, whichever kind it is."""
    kind: Any = MemoryLink if isinstance(end, End) else SocketLink
    link: SocketLink | MemoryLink = kind(end, loop, on_frames, on_lost)
    return link
