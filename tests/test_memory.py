"""Shared memory: blocks are there when they are asked for, bounded, never used twice at a time, and left by nobody."""

import asyncio
import errno
import gc
import itertools
import os
import threading

import pytest
import torch

from aneuron.remote import memory
from aneuron.remote.frames import HAS_FD, Kind, Parser, encode
from aneuron.remote.link import connect, ends
from aneuron.remote.memory import Block, Receiver, Sender
from aneuron.testing import run

MB = 1 << 20


def at_once(work):
    """In place of a thread."""
    future = asyncio.get_running_loop().create_future()
    try:
        future.set_result(work())
    except OSError as error:
        future.set_exception(error)
    return future


class Sides:
    """A sender and its receiver, with a link in memory between them."""

    def __init__(self, limit=4 * MB):
        loop = asyncio.get_running_loop()
        one, other = ends()
        self.rooms = 0
        self.links = [
            connect(one, loop, self.to_sender, lambda error: None),
            connect(other, loop, self.to_receiver, lambda error: None),
        ]
        self.sender = Sender(self.links[0], loop, self.on_room, limit=limit, in_thread=at_once)
        self.receiver = Receiver(self.links[1], loop)

    def on_room(self):
        self.rooms += 1

    def to_sender(self, frames):
        for frame in frames:
            assert frame.kind == Kind.FREE
            self.sender.on_free(frame)

    def to_receiver(self, frames):
        for frame in frames:
            assert frame.kind == Kind.SEGMENT
            self.receiver.on_segment(frame)

    async def take(self, size):
        """A block, asked for again whenever there may be room; None if there is none."""
        for _ in range(3):
            block = self.sender.take(size)
            if block is not None:
                return block
            await settle()
        return None

    def close(self):
        for each in (self.sender, self.receiver, *self.links):
            each.close()


async def settle():
    for _ in range(8):
        await asyncio.sleep(0)


def with_sides(test, **settings):
    async def main():
        sides = Sides(**settings)
        try:
            await test(sides)
        finally:
            sides.close()

    run(main())


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(memory, "STEP", MB)


def test_what_is_written_into_a_block_is_read_from_it_and_comes_back_when_the_last_view_is_gone():
    async def test(sides):
        block = await sides.take(4096)
        block.memory[:8] = b"12345678"
        await settle()
        lease = sides.receiver.lease(memoryview(block.place()))
        tensor = torch.frombuffer(lease, dtype=torch.uint8, offset=2, count=4)
        other = torch.frombuffer(lease, dtype=torch.uint8, offset=4, count=4)
        assert tensor.tolist() == list(b"3456")
        view = tensor.view(2, 2)[1:]
        del tensor, lease
        await settle()
        assert sides.sender.used == 4096
        del other
        await settle()
        assert sides.sender.used == 4096
        assert view.tolist() == [list(b"56")]
        del view
        await settle()
        assert (sides.sender.used, sides.receiver.leased) == (0, 0)
        assert sides.rooms == 2  # a segment, a block

    with_sides(test)


def test_the_last_view_may_go_in_any_thread():
    async def test(sides):
        block = await sides.take(1)
        await settle()
        kept = [torch.frombuffer(sides.receiver.lease(memoryview(block.place())), dtype=torch.uint8)]
        thread = threading.Thread(target=kept.clear)
        thread.start()
        thread.join()
        await settle()
        assert not sides.sender.used

    with_sides(test)


def test_blocks_never_overlap_and_all_room_comes_back():
    async def test(sides):
        generator = torch.Generator().manual_seed(3)
        held = []
        for turn in range(300):
            size = int(torch.randint(1, 300_000, (), generator=generator))
            block = sides.sender.take(size)
            if block is None:
                await settle()
                block = sides.sender.take(size)
            if block is not None:
                assert len(block.memory) >= size
                held.append(block)
            if block is None or turn % 3 == 0:
                sides.sender.free(held.pop(int(torch.randint(len(held), (), generator=generator))))
            places = sorted((each.segment, each.offset, each.offset + each.size) for each in held)
            for (segment, _, end), (other, start, _) in itertools.pairwise(places):
                assert segment != other or end <= start
            assert sides.sender.used == sum(each.size for each in held)
            assert sides.sender.reserved <= 4 * MB
        for block in held:
            sides.sender.free(block)
        assert all(segment.idle for segment in sides.sender._segments.values())

    with_sides(test)


def test_what_does_not_fit_waits_for_room():
    async def test(sides):
        blocks = [await sides.take(MB) for _ in range(4)]
        assert all(blocks)
        assert sides.sender.take(1) is None
        before = sides.rooms
        sides.sender.free(blocks[2])
        await settle()
        assert sides.rooms == before + 1
        assert sides.sender.take(MB)

    with_sides(test)


def test_segments_that_are_too_small_make_room_for_one_that_is_not():
    async def test(sides):
        blocks = [await sides.take(MB) for _ in range(4)]
        for block in blocks:
            sides.sender.free(block)
        assert await sides.take(3 * MB)
        assert sides.sender.reserved <= 4 * MB

    with_sides(test)


def test_a_block_larger_than_the_limit_waits_until_it_is_alone_and_is_given_back_at_once():
    async def test(sides):
        small = await sides.take(1)
        assert await sides.take(5 * MB) is None
        sides.sender.free(small)
        large = await sides.take(5 * MB)
        assert len(large.memory) == 5 * MB
        assert await sides.take(1) is None
        await settle()
        del large  # the sender's own view of it
        large = next(iter(sides.sender._blocks.values()))
        sides.sender.free(large)
        assert not sides.sender.reserved
        assert await sides.take(1)

    with_sides(test)


def test_a_taker_that_went_away_leaves_room_to_others():
    async def test(sides):
        assert sides.sender.take(5 * MB) is None
        await settle()
        assert sides.sender.reserved == 5 * MB
        assert await sides.take(1)
        assert sides.sender.reserved == MB

    with_sides(test)


def test_a_segment_that_comes_after_the_end_is_given_back():
    async def test(sides):
        future = asyncio.get_running_loop().create_future()
        sides.sender._in_thread = lambda work: future
        assert sides.sender.take(1) is None
        sides.sender.close()
        reader, writer = os.pipe()
        future.set_result((reader, memoryview(b"")))
        await settle()
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"x")
        os.close(writer)
        assert not sides.rooms

    with_sides(test)


def test_what_nobody_needs_for_a_while_is_given_back():
    async def test(sides):
        blocks = [await sides.take(MB) for _ in range(3)]
        await settle()
        assert len(sides.receiver._segments) == 3
        sides.sender.free(blocks[0])
        await asyncio.sleep(memory.IDLE / 2)
        sides.sender.free(blocks[1])
        await asyncio.sleep(memory.IDLE * 0.6)
        assert sides.sender.reserved == 2 * MB
        await asyncio.sleep(memory.IDLE)
        assert sides.sender.reserved == MB
        assert len(sides.receiver._segments) == 1
        sides.sender.free(blocks[2])
        assert await sides.take(MB)
        await asyncio.sleep(memory.IDLE * 2)
        assert sides.sender.reserved == MB
        assert sides.sender.take(2 * MB) is None  # and whoever asked does not come again
        await settle()
        assert sides.sender.reserved == 3 * MB
        await asyncio.sleep(memory.IDLE * 2)
        assert sides.sender.reserved == MB

    with_sides(test)


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_memory_is_an_error_of_the_call_that_asks_and_the_next_tries_again(monkeypatch):
    async def test(sides):
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate" if hasattr(os, "posix_fallocate") else "write", full)
            for _ in range(2):
                assert sides.sender.take(MB) is None
                await settle()
                with pytest.raises(OSError, match="no shared memory for 1048576 bytes: No space left"):
                    sides.sender.take(MB)
        assert sides.rooms == 2
        assert not sides.sender.reserved
        if before:
            assert len(os.listdir("/proc/self/fd")) == before
        assert await sides.take(MB)

    with_sides(test)


def test_where_there_is_no_memfd_an_unlinked_file_does(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def test(sides):
        block = await sides.take(3 * MB)
        block.memory[-3:] = b"end"
        await settle()
        assert bytes(sides.receiver.lease(memoryview(block.place()))[3 * MB - 3 :]) == b"end"
        assert not list(tmp_path.iterdir())

    with_sides(test)


def test_no_descriptor_is_left():
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))

    async def test(sides):
        for _ in range(4):
            assert await sides.take(MB)
        await settle()

    with_sides(test)
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_tensors_outlive_their_link():
    async def test(sides):
        block = await sides.take(4096)
        block.memory[:1] = b"x"
        await settle()
        kept.append(torch.frombuffer(sides.receiver.lease(memoryview(block.place())), dtype=torch.uint8))

    kept = []
    with_sides(test)
    gc.collect()
    assert kept[0][0] == ord("x")
    kept.clear()


def test_a_free_of_what_is_not_there_harms_nobody():
    async def test(sides):
        block = await sides.take(1)
        for number in (block.id, block.id, 12345):
            sides.sender.free(Block(number, 1, 0, 4096, memoryview(b"")))
        assert not sides.sender.used

    with_sides(test)


def test_a_segment_that_is_announced_larger_than_it_is_is_refused():
    async def test(sides):
        fd = memory.nameless("blocks")
        os.ftruncate(fd, 4096)
        parser = Parser()
        parser.fds.append(fd)
        (frame,) = parser.feed(bytearray().join(encode(Kind.SEGMENT, 1, (8192).to_bytes(8, "little"), flags=HAS_FD)))
        with pytest.raises(ValueError, match="greater than file size"):
            sides.receiver.on_segment(frame)

    with_sides(test)


def test_a_thread_makes_segments_unless_told_otherwise():
    async def main():
        loop = asyncio.get_running_loop()
        one, other = ends()
        links = [connect(end, loop, lambda frames: None, lambda error: None) for end in (one, other)]
        room = asyncio.Event()
        sender = Sender(links[0], loop, room.set)
        assert sender.take(1) is None
        await room.wait()
        assert sender.take(1)
        sender.close()
        for link in links:
            link.close()

    asyncio.run(main())
