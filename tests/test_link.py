"""Links: what was sent arrives, whole and in order, and who waits for more is told when there will be none."""

import asyncio
import gc
import os
import socket

import pytest

from aneuron.remote.frames import HAS_FD, Kind, ProtocolError, encode
from aneuron.remote.link import MemoryLink, connect, ends

try:
    import uvloop
except ImportError:  # where there are no wheels of it
    uvloop = None


def run(main):
    """On asyncio and on uvloop."""
    asyncio.run(main())
    if uvloop is not None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())


class Side:
    """One end of a link, and what has come to it."""

    def __init__(self, end, on_frames=None):
        self.frames = []
        self.reads = 0
        self.lost = asyncio.get_running_loop().create_future()
        self.came = asyncio.Event()
        self.link = connect(end, asyncio.get_running_loop(), on_frames or self.on_frames, self.on_lost)

    def on_frames(self, frames):
        self.reads += 1
        self.frames += [(kind, id, bytes(body)) for kind, _, id, body, _ in frames]
        self.fds = [frame.fd for frame in frames if frame.fd >= 0]
        self.came.set()

    def on_lost(self, error):
        self.lost.set_result(error)  # a second time would raise

    def send(self, id, body=b"", kind=Kind.CALL):
        self.link.send(*encode(kind, id, body))

    async def until(self, number):
        while len(self.frames) < number:
            self.came.clear()
            await self.came.wait()
        return self.frames


def sockets():
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


PAIRS = pytest.mark.parametrize("pair", [sockets, ends])


@PAIRS
def test_what_is_sent_arrives_in_order(pair):
    async def main():
        here, there = map(Side, pair())
        sizes = [0, 1, 7, 8, 300, 70_000, 1_000_000]
        for id, size in enumerate(sizes):
            here.send(id, os.urandom(1) * size)
            there.send(id, b"b" * size)
        for side in (here, there):
            frames = await side.until(len(sizes))
            assert [(id, len(body)) for _, id, body in frames] == list(enumerate(sizes))
            assert not side.link.queued
        here.link.close()
        assert await there.lost is None

    run(main)


@PAIRS
def test_the_frames_of_an_iteration_arrive_together(pair):
    async def main():
        here, there = map(Side, pair())
        for id in range(32):
            here.send(id, bytes(300))
        await there.until(32)
        assert there.reads == 1
        here.link.close()
        there.link.close()

    run(main)


@PAIRS
def test_ten_thousand_frames_at_once(pair):
    async def main():
        here, there = map(Side, pair())
        for id in range(10_000):
            here.send(id, b"x" * (id % 600))
        frames = await there.until(10_000)
        assert [id for _, id, _ in frames] == list(range(10_000))
        assert all(len(body) == id % 600 for _, id, body in frames)
        here.link.close()
        there.link.close()

    run(main)


def test_flush_does_not_wait_for_the_iteration():
    async def main():
        raw, end = sockets()
        side = Side(end)
        side.send(1)
        side.send(2)
        side.link.flush()
        assert len(raw.recv(100, socket.MSG_DONTWAIT)) == 32
        side.link.flush()
        raw.close()
        side.link.close()

    run(main)


@PAIRS
def test_a_peer_that_does_not_read_costs_no_more_than_is_queued(pair):
    async def main():
        here, there = map(Side, pair())
        there.link.pause()
        body = bytes(100_000)
        for id in range(50):
            here.send(id, body)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert 4_000_000 < here.link.queued <= 50 * (100_000 + 16)
        assert not there.frames
        there.link.resume()
        await there.until(50)
        assert not here.link.queued
        here.link.close()
        there.link.close()

    run(main)


@PAIRS
def test_close_writes_what_was_sent_and_tells_only_the_other(pair):
    async def main():
        here, there = map(Side, pair())
        here.send(1, b"last words")
        here.link.close()
        here.link.close()
        here.send(2)
        here.link.flush()
        assert await there.lost is None
        assert there.frames == [(Kind.CALL, 1, b"last words")]
        await asyncio.sleep(0)
        assert not here.lost.done()
        there.send(3)  # nobody is there, and nobody is told again
        there.link.close()
        await asyncio.sleep(0)

    run(main)


@PAIRS
def test_what_the_reader_raises_ends_the_link(pair):
    async def main():
        def fails(frames):
            raise ZeroDivisionError(len(frames))

        one, other = pair()
        here, there = Side(one), Side(other, fails)
        here.send(1)
        assert isinstance(await there.lost, ZeroDivisionError)
        assert await here.lost is None

    run(main)


@PAIRS
def test_a_reader_may_close_its_link(pair):
    async def main():
        def closes(frames):
            there.link.close()

        one, other = pair()
        here, there = Side(one), Side(other, closes)
        here.send(1)
        assert await here.lost is None
        await asyncio.sleep(0)
        assert not there.lost.done()

    run(main)


def test_garbage_ends_the_link():
    async def main():
        raw, end = sockets()
        side = Side(end)
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert isinstance(await side.lost, ProtocolError)
        assert raw.recv(1) == b""
        raw.close()

    run(main)


def test_half_a_frame_and_then_the_end():
    async def main():
        raw, end = sockets()
        side = Side(end)
        raw.sendall(b"".join(encode(Kind.RESULT, 1, b"whole")) + b"".join(encode(Kind.RESULT, 2, b"cut off"))[:20])
        raw.close()
        assert await side.lost is None
        assert side.frames == [(Kind.RESULT, 1, b"whole")]

    run(main)


def test_what_was_written_before_a_death_is_read_though_writing_fails():
    async def main():
        raw, end = sockets()
        side = Side(end)
        raw.sendall(b"".join(encode(Kind.RESULT, 1, b"result")))
        raw.close()
        side.send(2)
        side.link.flush()  # fails: nobody is there
        await side.lost
        assert side.frames == [(Kind.RESULT, 1, b"result")]
        assert not side.link.queued

    run(main)


def test_a_peer_that_dies_while_nothing_is_read_from_it_is_seen_by_writing():
    async def main():
        raw, end = sockets()
        side = Side(end)
        side.link.pause()
        side.send(1, bytes(2_000_000))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert side.link.queued
        raw.close()
        assert isinstance(await side.lost, OSError)
        assert not side.link.queued

    run(main)


@PAIRS
def test_descriptors_arrive_with_their_frames(pair):
    async def main():
        here, there = map(Side, pair())
        found = {}

        def on_frames(frames):
            for _, _, id, body, fd in frames:
                if fd >= 0:
                    assert not os.get_inheritable(fd)
                    found[id] = os.read(fd, 10)
                    os.close(fd)
                there.frames.append((id, len(body)))
            there.came.set()

        there.link._on_frames = on_frames
        sizes = [0, 300_000, 5, 100, 400_000, 0]
        for id, size in enumerate(sizes):
            if id % 2:
                here.send(id, bytes(size))
                continue
            reader, writer = os.pipe()
            os.write(writer, b"%d" % id)
            here.link.send_fd(reader, *encode(Kind.SEGMENT, id, bytes(size), flags=HAS_FD))
            os.close(reader)
            os.close(writer)
        assert await there.until(len(sizes)) == list(enumerate(sizes))
        assert found == {0: b"0", 2: b"2", 4: b"4"}
        here.link.close()
        there.link.close()

    run(main)


def descriptors():
    gc.collect()
    return sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else []


@PAIRS
def test_no_descriptor_is_left_whoever_ends_when(pair):
    async def main():
        before = descriptors()
        for end in range(4):
            here, there = map(Side, pair())
            there.link.pause()
            null = os.open(os.devnull, os.O_RDONLY)
            for _ in range(3):
                here.link.send_fd(null, *encode(Kind.SEGMENT, 1, bytes(200_000), flags=HAS_FD))
            os.close(null)
            if end > 1:
                here.link.flush()
            first, second = (here, there) if end % 2 else (there, here)
            first.link.close()
            second.link.close()
        assert descriptors() == before

    run(main)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # with threads: the child runs nothing but this
def test_a_forked_child_keeps_no_link_open():
    async def main():
        here, there = map(Side, sockets())
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.read(reader, 1)  # lives on
            os._exit(0)
        try:
            here.link.close()
            assert await there.lost is None
            assert not there.frames
        finally:
            os.write(writer, b"x")
            os.waitpid(child, 0)
            os.close(reader)
            os.close(writer)

    asyncio.run(main())


def test_a_cut_ends_both_sides_once_they_have_read_what_was_written():
    async def main():
        here, there = map(Side, ends())
        assert isinstance(here.link, MemoryLink)
        there.send(1, b"result")
        there.link.flush()
        here.link.cut()
        here.send(2)
        assert await here.lost is None
        assert await there.lost is None
        assert here.frames == [(Kind.CALL, 1, b"result")]
        assert not there.frames

    asyncio.run(main())


def test_what_was_sent_before_the_other_end_had_a_link_is_there():
    async def main():
        one, other = ends()
        here = Side(one)
        here.send(1, b"early")
        here.link.flush()
        there = Side(other)
        assert await there.until(1) == [(Kind.CALL, 1, b"early")]

    asyncio.run(main())
