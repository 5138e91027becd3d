"""What clients and engines send each other: frames, and how a stream of bytes becomes frames again.

Lives here: the header, the kinds, padding, parsing. Must not be here: sockets (link.py), what is in a body (packing.py
for values; client.py and server.py for the rest).

A frame is `<I length of all of it, a multiple of 8><B kind><B flags><H bytes of padding at its end><Q id>`, and a body.
"""

import struct
from collections import deque
from enum import IntEnum
from typing import NamedTuple

Buffer = bytes | bytearray | memoryview  # of bytes: `len` is their number


class Kind(IntEnum):
    """What a frame is about. What its id and body are is said where it is sent."""

    HELLO = 1
    TEMPLATE = 2  # the id is the slot: packing.py
    CALL = 3
    CANCEL = 4
    RESULT = 5
    ERROR = 6
    REPORT = 7
    BEGIN = 8
    END = 9
    SEGMENT = 10  # memory.py; with HAS_FD a descriptor comes along
    FREE = 11
    BYE = 12


HAS_FD = 0x80  # among the flags: a descriptor comes with the frame
LARGEST = 1 << 30  # bytes of a frame
HEADER = struct.Struct("<IBBHQ")
_LAST = max(Kind)
_PADDING = [bytes(size) for size in range(8)]
_pack = HEADER.pack
_unpack = HEADER.unpack_from
_new = tuple.__new__  # half of what a named tuple's own takes


class ProtocolError(Exception):
    """What came is no frame: the other side is broken, or is not aneuron. Nothing after it can be read."""


class Frame(NamedTuple):
    """One frame. The body is writable, begins at a multiple of 8 bytes of what it came in, and keeps that alive.

    `fd` is the descriptor that came along, the reader's to close; -1 for none.
    """

    kind: int  # a `Kind`, as a plain number: whose making costs as much as parsing the rest
    flags: int
    id: int
    body: memoryview
    fd: int = -1


def encode(kind: int, id: int, *buffers: Buffer, flags: int = 0) -> list[Buffer]:
    """One frame, as the buffers that are to be sent one after the other. Raises ValueError beyond `LARGEST` bytes."""
    size = 16
    for each in buffers:
        size += len(each)
    padding = -size & 7
    if size > LARGEST:
        raise ValueError(f"a frame of {size} bytes; {LARGEST} are the most that one may have")
    return [_pack(size + padding, kind, flags, padding, id), *buffers, _PADDING[padding]]


class Parser:
    """Frames from a stream of bytes that comes in pieces."""

    def __init__(self) -> None:
        self.fds: deque[int] = deque()  # that have come, in order, and whose frames have not been parsed yet
        self._pieces: list[bytearray] = []  # the beginning of a frame
        self._have = 0
        self._need = 0

    def feed(self, chunk: bytearray) -> list[Frame]:
        """The frames that are complete with this piece; their bodies lie in it, and it is not to be written to again.

        Raises `ProtocolError`; nothing can be read after that.
        """
        if self._pieces:
            self._pieces.append(chunk)
            self._have += len(chunk)
            if self._have < self._need:
                return []
            chunk = bytearray().join(self._pieces)
            self._pieces.clear()
        frames: list[Frame] = []
        view, at, end = memoryview(chunk), 0, len(chunk)
        while end - at >= 16:
            length, kind, flags, padding, id = _unpack(chunk, at)
            if not 16 + padding <= length <= LARGEST or length & 7 or padding > 7 or not 0 < kind <= _LAST:
                raise ProtocolError(f"no frame: {length} bytes of kind {kind}, {padding} of them padding")
            if at + length > end:
                self._need = length
                break
            fd = -1
            if flags & HAS_FD:
                if not self.fds:
                    raise ProtocolError("a frame came without its descriptor")
                fd = self.fds.popleft()
            frames.append(_new(Frame, (kind, flags, id, view[at + 16 : at + length - padding], fd)))
            at += length
        else:
            self._need = 16
        if at < end:
            self._pieces.append(chunk[at:] if at else chunk)
            self._have = end - at
        return frames
