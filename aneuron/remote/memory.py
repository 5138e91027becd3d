"""Shared memory of one direction of a link: blocks for what is large, room for them, and who frees.

Lives here: segments, which the sender makes and the receiver maps, and blocks in them. A segment has no name in any
file system: it is gone with the last process that has it. Must not be here: what is written into blocks (packing.py).

The sender takes a block, writes into it, and sends where it is; the receiver's tensors lie in it; when the last of them
is gone, wherever that is, the receiver says so with FREE, and the sender may use it anew.
"""

import asyncio
import mmap
import os
import struct
import tempfile
import weakref
from bisect import insort
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from aneuron.remote.frames import HAS_FD, Frame, Kind, encode
from aneuron.remote.link import Link

LIMIT = 256 << 20  # bytes of segments
STEP = 32 << 20  # of one segment, unless a block needs more
IDLE = 5.0  # seconds after which a segment without blocks is given back
_PAGE = 4096  # blocks are whole pages
_PLACE = struct.Struct("<QQQQ")

InThread = Callable[[Callable[[], Any]], "asyncio.Future[Any]"]


class Block(NamedTuple):
    """A part of a segment. `memory` is the sender's; the rest says to the receiver where it is."""

    id: int
    segment: int
    offset: int
    size: int
    memory: memoryview

    def place(self) -> bytes:
        """Where it is, for `Receiver.lease`; 32 bytes."""
        return _PLACE.pack(*self[:4])


PLACE = _PLACE.size


class _Segment:
    """A mapped segment, and what is free of it: offsets and sizes, by offset."""

    def __init__(self, number: int, size: int, memory: memoryview, own: bool) -> None:
        self.number = number
        self.size = size
        self.memory = memory
        self.own = own  # of one block, which is larger than the limit
        self.free = [(0, size)]
        self.since = 0.0  # when its last block was freed

    @property
    def idle(self) -> bool:
        return self.free == [(0, self.size)]

    def take(self, size: int) -> int | None:
        for index, (offset, room) in enumerate(self.free):
            if room >= size:
                self.free[index : index + 1] = [(offset + size, room - size)] if room > size else []
                return offset
        return None

    def give(self, offset: int, size: int) -> None:
        insort(self.free, (offset, size))
        joined = self.free[:1]
        for start, room in self.free[1:]:
            before, length = joined[-1]
            if before + length == start:
                joined[-1] = (before, length + room)
            else:
                joined.append((start, room))
        self.free = joined


class Sender:
    """The blocks of this side: at most `limit` bytes of segments, but for a single block that is larger.

    Used on the loop's thread. `on_room` is called after blocks have been freed, or a segment has been made.
    `in_thread` runs what takes long, which making a segment does.
    """

    def __init__(
        self,
        link: Link,
        loop: asyncio.AbstractEventLoop,
        on_room: Callable[[], None],
        *,
        limit: int = LIMIT,
        in_thread: InThread | None = None,
    ) -> None:
        self.limit = limit
        self.used = 0  # bytes of blocks
        self._link = link
        self._loop = loop
        self._on_room = on_room
        self._in_thread: InThread = in_thread or (lambda work: loop.run_in_executor(None, work))
        self._segments: dict[int, _Segment] = {}
        self._blocks: dict[int, Block] = {}
        self._numbers = 0
        self._growing = 0  # bytes of the segment that is being made
        self._failed: OSError | None = None  # why the last one could not be
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def take(self, nbytes: int) -> Block | None:
        """A block of at least so many bytes; None if there is none now, and `on_room` will tell when to ask again.

        One larger than the limit is there when no other is. Raises OSError if the machine has no memory for it.
        """
        size = max(-(-nbytes // _PAGE), 1) * _PAGE
        for segment in self._segments.values():
            if not segment.own and (offset := segment.take(size)) is not None:
                return self._block(segment, offset, size)
        for segment in self._segments.values():
            if segment.own and segment.size == size and segment.idle:
                segment.take(size)
                return self._block(segment, 0, size)
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise OSError(failed.errno, f"no shared memory for {size} bytes: {failed.strerror}") from failed
        if not self._growing:
            self._grow(size)
        return None

    def on_free(self, frame: Frame) -> None:
        """A FREE frame has come: the receiver needs these blocks no more."""
        for (number,) in struct.iter_unpack("<Q", frame.body):
            self._free(number)
        self._on_room()

    def free(self, block: Block) -> None:
        """A block that was taken, and will not be sent, is not needed."""
        self._free(block.id)
        self._loop.call_soon(self._on_room)

    def close(self) -> None:
        """The link is no more: let go of everything."""
        self._closed = True
        self._segments.clear()
        self._blocks.clear()
        self.used = 0
        if self._timer is not None:
            self._timer.cancel()

    @property
    def reserved(self) -> int:
        """Bytes of all segments."""
        return sum(segment.size for segment in self._segments.values()) + self._growing

    def _block(self, segment: _Segment, offset: int, size: int) -> Block:
        self._numbers += 1
        self.used += size
        block = Block(self._numbers, segment.number, offset, size, segment.memory[offset : offset + size])
        self._blocks[block.id] = block
        return block

    def _free(self, number: int) -> None:
        block = self._blocks.pop(number, None)
        if block is None:
            return
        self.used -= block.size
        segment = self._segments[block.segment]
        segment.give(block.offset, block.size)
        if segment.own:
            self._drop(segment)
        elif segment.idle:
            self._rest(segment)

    def _rest(self, segment: _Segment) -> None:
        """There is no block in a segment."""
        segment.since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(IDLE, self._trim)

    def _trim(self) -> None:
        """Give back the segments that nobody has needed for a while."""
        self._timer = None
        idle = [segment for segment in self._segments.values() if segment.idle]
        for segment in idle:
            if segment.since + IDLE <= self._loop.time() + 1e-3:
                self._drop(segment)
        if left := [segment.since for segment in idle if segment.number in self._segments]:
            self._timer = self._loop.call_at(min(left) + IDLE, self._trim)

    def _drop(self, segment: _Segment) -> None:
        del self._segments[segment.number]
        self._link.send(*encode(Kind.SEGMENT, segment.number))

    def _grow(self, size: int) -> None:
        """Have a segment made, if there may be one: for more than the limit if there is no other block."""
        own = size > self.limit
        if own and self.used:
            return
        if own or self.reserved + size > self.limit:
            for segment in [each for each in self._segments.values() if each.idle]:
                self._drop(segment)
        room = self.limit - self.reserved
        if not own and room < size:
            return
        self._growing = wanted = size if own else max(size, min(STEP, room))
        future = self._in_thread(lambda: _made(wanted))
        future.add_done_callback(lambda done: self._grown(done, own))

    def _grown(self, done: "asyncio.Future[tuple[int, memoryview]]", own: bool) -> None:
        size, self._growing = self._growing, 0
        if done.cancelled():
            return
        if (error := done.exception()) is not None:
            self._failed = error if isinstance(error, OSError) else OSError(0, str(error))
        else:
            fd, memory = done.result()
            if not self._closed:
                self._numbers += 1
                segment = self._segments[self._numbers] = _Segment(self._numbers, size, memory, own)
                self._rest(segment)
                self._link.send_fd(fd, *encode(Kind.SEGMENT, segment.number, struct.pack("<Q", size), flags=HAS_FD))
            os.close(fd)
        if not self._closed:
            self._on_room()


def _made(size: int) -> tuple[int, memoryview]:
    """A new segment: its descriptor, and its memory, all of which is there. Raises OSError."""
    fd = nameless("blocks")
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)  # or what is full would be seen by whoever writes, as a signal
        else:
            for _ in range(0, size, STEP):
                os.write(fd, bytes(STEP))
            os.ftruncate(fd, size)
        return fd, memoryview(mmap.mmap(fd, size))
    except BaseException:
        os.close(fd)
        raise


def nameless(what: str) -> int:
    """A file that nobody finds, gone with the last process that has it open; `what` is for who looks at a process."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"aneuron-{what}", os.MFD_CLOEXEC)
    fd, path = tempfile.mkstemp(prefix="aneuron-")
    os.unlink(path)
    return fd


class _Lease(weakref.ref[memoryview]):
    """What tells that the memory of a block is not used any more."""

    __slots__ = ("block",)
    block: int


class Receiver:
    """The other side's segments, as they are mapped here. Used on the loop's thread."""

    def __init__(self, link: Link, loop: asyncio.AbstractEventLoop) -> None:
        self._link = link
        self._loop = loop
        self._segments: dict[int, memoryview] = {}
        self._leases: dict[int, _Lease] = {}
        self._released: deque[int] = deque()  # whose memory is used no more: by whatever thread has seen it
        self._told = False  # the loop is to look there

    @property
    def leased(self) -> int:
        """How many blocks are in use here."""
        return len(self._leases)

    def on_segment(self, frame: Frame) -> None:
        """A SEGMENT frame has come: a segment is there, or is not to be kept any longer. Raises OSError."""
        if frame.fd < 0:
            self._segments.pop(frame.id, None)
            return
        try:
            (size,) = struct.unpack("<Q", frame.body)
            self._segments[frame.id] = memoryview(mmap.mmap(frame.fd, size))
        finally:
            os.close(frame.fd)

    def lease(self, place: memoryview) -> memoryview:
        """The memory of a block; it is freed when nothing lies over it any more, tensors and views of them included."""
        number, segment, offset, size = _PLACE.unpack(place)
        memory = self._segments[segment][offset : offset + size]
        lease = _Lease(memory, self._release)
        lease.block = number
        self._leases[number] = lease
        return memory

    def close(self) -> None:
        """The link is no more. What lies in blocks stays until it is gone."""
        self._leases.clear()
        self._segments.clear()

    def _release(self, lease: weakref.ref[memoryview]) -> None:
        """In whatever thread, within whatever it is doing."""
        self._released.append(lease.block)  # type: ignore[attr-defined]
        if not self._told:
            self._told = True
            with suppress(RuntimeError):  # the loop is closed, and the link with it
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._told = False
        numbers = [self._released.popleft() for _ in range(len(self._released))]
        for number in numbers:
            self._leases.pop(number, None)
        if numbers:
            self._link.send(*encode(Kind.FREE, 0, struct.pack(f"<{len(numbers)}Q", *numbers)))
