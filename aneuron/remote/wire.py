"""One end of a link: values of any size out and in.

Lives here: which values travel in the frame and which in shared memory, and who copies them. Must not be here: what
they mean (server.py, client.py), how a structure becomes bytes (packing.py).
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from aneuron.remote import link
from aneuron.remote.frames import HAS_FD, Frame, Kind, encode
from aneuron.remote.memory import Block, Receiver, Sender
from aneuron.remote.messages import SHARED
from aneuron.remote.packing import INLINE, Opened, Packed, Packer, Unpacker

BARE = 16  # bytes of a value without tensors

Failed = Callable[[BaseException], None]
Source = memoryview | Opened  # a value that has come


class Large(NamedTuple):
    """A frame whose value is too large to travel in it."""

    kind: Kind
    number: int
    flags: int
    head: bytes
    packed: Packed
    terms: Packed | None  # what the head refers to is kept on the other side for as long as this is there


def copiers() -> Executor:
    """Threads that copy large tensors between this process and others; they start when they are needed."""
    return ThreadPoolExecutor(2, "aneuron-copies")


class Wire:
    """A link, and what was agreed on it: templates, shared memory. On its loop.

    what: the values that are sent are, for messages: "input" or "output".
    threads: what copies large tensors; None: they are copied here and now.
    """

    def __init__(
        self,
        end: Any,
        loop: asyncio.AbstractEventLoop,
        on_frames: Callable[[list[Frame]], None],
        on_lost: Callable[[Exception | None], None],
        what: str,
        threads: Executor | None = None,
    ) -> None:
        self._loop, self._threads = loop, threads
        self._on_frames = on_frames
        self._closed = False
        self._large: deque[Callable[[], bool]] = deque()  # that wait for room, in order
        self._link = link.connect(end, loop, self._frames, on_lost)
        self._receiver = Receiver(self._link, loop)
        self._packer, self._unpacker = Packer(self._link.send, what), Unpacker(self._receiver)
        self._sender = Sender(self._link, loop, self._send_large, in_thread=self._in_thread)

    @property
    def queued(self) -> int:
        """Bytes that the other side has not taken."""
        return self._link.queued

    def pause(self) -> None:
        """Read no more for now."""
        self._link.pause()

    def resume(self) -> None:
        """Read again."""
        self._link.resume()

    # Out.

    def send_bytes(self, kind: Kind, flags: int, body: bytes, number: int = 0) -> None:
        """Send a frame."""
        self._link.send(*encode(kind, number, body, flags=flags))

    def send_fd(self, kind: Kind, fd: int, flags: int) -> None:
        """Send a file descriptor."""
        self._link.send_fd(fd, *encode(kind, 0, flags=HAS_FD | flags))

    def send(
        self,
        kind: Kind,
        number: int,
        flags: int,
        head: bytes,
        value: Any,
        terms: tuple[Any, ...] | None = None,
        soon: bool = True,
    ) -> Large | None:
        """Send a value, after `head` and the terms, which have no tensors. Raises `TypeError` for what cannot be
        pickled.

        What is large is not sent, but returned, for `send_large`. Not `soon`: whoever calls `flush` in this iteration
        spares the loop another.
        """
        bare = None
        if terms is not None:
            bare = self._packer.pack(terms)
            head = b"".join((head, *bare.inline()))
        packed = self._packer.pack(value)
        if packed.nbytes >= INLINE:
            return Large(kind, number, flags, head, packed, bare)
        frame = encode(kind, number, head, *packed.inline(), flags=flags)
        if soon:
            self._link.send(*frame)
        else:
            self._link.add(*frame)
        return None

    def flush(self) -> None:
        """Write what was sent."""
        self._link.flush()

    def send_large(self, large: Large, failed: Failed, check: Callable[[], None] | None = None) -> None:
        """Send what is copied to shared memory by a thread: it must stay as it is until then. `check` is called on the
        loop when it is copied; what it raises, and what else goes wrong until it is sent, is what `failed` is called
        with.
        """
        self._large.append(partial(self._try_large, large, failed, check))
        self._send_large()

    def _send_large(self) -> None:
        while self._large and self._large[0]():
            self._large.popleft()

    def _try_large(self, large: Large, failed: Failed, check: Callable[[], None] | None) -> bool:
        """Begin to send something large; False if there is no room for it yet."""
        packed = large.packed
        try:
            block = self._sender.take(packed.nbytes)
        except OSError as error:  # no memory to share: it goes by the socket, if it may
            if not self._checked(check, failed):
                return True
            try:
                frame = encode(large.kind, large.number, large.head, *packed.inline(), flags=large.flags)
                self._link.send(*frame)
            except ValueError:
                failed(error)
            return True
        if block is None:
            return False
        self.elsewhere(partial(packed.write, block), partial(self._copied, large, block, failed, check))
        return True

    def _copied(
        self,
        large: Large,
        block: Block,
        failed: Failed,
        check: Callable[[], None] | None,
        _: Any,
        error: BaseException | None,
    ) -> None:
        if error is not None:
            failed(error)
        elif self._checked(check, failed):
            placed = large.packed.placed(block)
            self._link.send(*encode(large.kind, large.number, large.head, *placed, flags=large.flags | SHARED))
            return
        self._sender.free(block)

    @staticmethod
    def _checked(check: Callable[[], None] | None, failed: Failed) -> bool:
        try:
            if check is not None:
                check()
        except BaseException as error:
            failed(error)
            return False
        return True

    def elsewhere(self, work: Callable[[], Any], then: Callable[[Any, BaseException | None], None]) -> None:
        """Do something in a thread, and go on on the loop with what has come of it."""
        if self._threads is None:
            then(*_outcome(work))
            return
        future = self._loop.run_in_executor(self._threads, _outcome, work)
        future.add_done_callback(lambda done: None if done.cancelled() else then(*done.result()))

    def _in_thread(self, work: Callable[[], Any]) -> "asyncio.Future[Any]":
        if self._threads is not None:
            return self._loop.run_in_executor(self._threads, work)
        future: asyncio.Future[Any] = self._loop.create_future()
        value, error = _outcome(work)
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)
        return future

    # In.

    def _frames(self, frames: list[Frame]) -> None:
        theirs: list[Frame] = []
        for frame in frames:
            if frame.kind in _OURS and not (frame.kind == Kind.SEGMENT and frame.flags & BOARD):
                if theirs:  # in order: a template may replace one that they are to be read with
                    self._on_frames(theirs)
                    theirs = []
                self._ours(frame)
            else:
                theirs.append(frame)
        if theirs:
            self._on_frames(theirs)

    def _ours(self, frame: Frame) -> None:
        if frame.kind == Kind.TEMPLATE:
            self._unpacker.on_template(frame)
        elif frame.kind == Kind.FREE:
            self._sender.on_free(frame)
        else:
            self._receiver.on_segment(frame)

    def bare(self, body: memoryview) -> Any:
        """A value without tensors, which takes the first `BARE` bytes of a body."""
        return self._unpacker.unpack(body[:BARE], own=False)

    def source(self, body: memoryview, flags: int) -> Source:
        """A value that takes the rest of a body, or (`SHARED`) lies in shared memory, which is freed with this."""
        return self._unpacker.open(body) if flags & SHARED else body

    def value(self, source: Source, own: bool) -> Any:
        """The value of a source: its tensors have storage of their own, or (False) lie where they came in, which they
        keep. To be called once, in any thread if it is `Opened`.
        """
        if isinstance(source, Opened):
            return source.value(own=own)
        return self._unpacker.unpack(source, own=own)

    def close(self) -> None:
        """Let go of everything; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._large.clear()
        with suppress(RuntimeError):  # the loop is closed
            self._link.close()
        self._sender.close()
        self._receiver.close()


def _outcome(work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return work(), None
    except BaseException as error:
        return None, error


_OURS = frozenset((Kind.TEMPLATE, Kind.FREE, Kind.SEGMENT))
BOARD = 1  # a flag of a SEGMENT: it is no memory for blocks, but the board (messages.py)
