"""Requests, answers and file descriptors between two ends of a channel."""

import asyncio
import gc
import os
import select
import socket
import threading
import warnings

import pytest

from aneuron.remote import control
from aneuron.remote.control import ChannelLost, Fd, SocketChannel, VersionsDiffer, pair_in_memory
from aneuron.testing import run, settle


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(one)
        self.lock = threading.Lock()


class Ends:
    """Two ends; the second one answers."""

    def __init__(self, kind, handlers=None, ours=None):
        loop = asyncio.get_running_loop()
        self.lost = []
        self.cancelled = asyncio.Event()
        handlers = {
            "add": lambda a, b: a + b,
            "later": self.later,
            "fail": self.fail,
            "forever": self.forever,
            "thing": lambda: threading.Lock(),
        } | (handlers or {})
        if kind == "socket":
            one, other = socket.socketpair()
            self.ours = SocketChannel(one, loop, ours or {}, self.lost.append)
            self.theirs = SocketChannel(other, loop, handlers, self.lost.append)
        else:
            self.ours, self.theirs = pair_in_memory(loop, (ours or {}, handlers), (self.lost.append,) * 2)

    async def later(self, value):
        await asyncio.sleep(0)
        return value

    async def fail(self, kind):
        raise Unpicklable("of its own", 2) if kind == "odd" else ValueError("no such thing")

    async def forever(self):
        try:
            await asyncio.sleep(3600)
        finally:
            self.cancelled.set()

    def close(self):
        self.ours.close()
        self.theirs.close()


@pytest.fixture(params=["socket", "memory"])
async def ends(request):
    ends = Ends(request.param)
    yield ends
    ends.close()


async def test_requests_have_their_answers(ends):
    assert await ends.ours.request("add", 1, 2) == 3
    answers = await asyncio.gather(*[ends.ours.request("later", n) for n in range(100)])
    assert answers == list(range(100))


async def test_what_a_handler_raises_is_raised(ends):
    with pytest.raises(ValueError, match="no such thing") as info:
        await ends.ours.request("fail", "usual")
    assert "in fail" in "".join(info.value.__notes__)
    with pytest.raises(RuntimeError, match="of its own"):
        await ends.ours.request("fail", "odd")
    with pytest.raises(KeyError, match="nothing"):
        await ends.ours.request("nothing")
    assert await ends.ours.request("add", 1, 1) == 2  # it goes on


async def test_a_request_that_is_cancelled_is_cancelled_there(ends):
    task = asyncio.ensure_future(ends.ours.request("forever"))
    await ends.ours.request("add", 0, 0)  # that one has begun by then
    task.cancel()
    await ends.cancelled.wait()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("who", ["ours", "theirs"])
async def test_whoever_closes_nobody_waits_for_ever(ends, who):
    task = asyncio.ensure_future(ends.ours.request("forever"))
    await ends.ours.request("add", 0, 0)
    getattr(ends, who).close()
    getattr(ends, who).close()
    with pytest.raises(ChannelLost):
        await task
    await ends.cancelled.wait()
    while not ends.lost:
        await asyncio.sleep(0)
    assert len(ends.lost) == 1  # of the other side
    with pytest.raises(ChannelLost):
        await ends.ours.request("add", 1, 2)
    ends.ours.tell("add", 1, 2)  # which nobody hears


def test_a_pair_in_memory_needs_no_time():
    async def main():
        heard = []
        ends = Ends("memory", {"hear": heard.append})
        ends.ours.tell("hear", 1)
        ends.ours.tell("hear", 2)
        await settle()
        task = asyncio.ensure_future(ends.ours.request("forever"))
        await asyncio.sleep(1800)
        assert not task.done()
        ends.close()
        return heard, (await asyncio.gather(task, return_exceptions=True))[0]

    heard, error = run(main())
    assert heard == [1, 2]
    assert isinstance(error, ChannelLost)


# Sockets.


async def test_large_messages_and_many_small_ones():
    ends = Ends("socket")
    large = os.urandom(1 << 24)
    answers = [asyncio.ensure_future(ends.ours.request("later", large)) for _ in range(3)]
    small = [asyncio.ensure_future(ends.ours.request("add", n, 1)) for n in range(1000)]
    assert all(answer == large for answer in await asyncio.gather(*answers))
    assert await asyncio.gather(*small) == list(range(1, 1001))
    ends.close()


async def test_what_cannot_be_pickled_fails_alone():
    ends = Ends("socket")
    with pytest.raises(TypeError, match="pickle"):
        await ends.ours.request("add", threading.Lock(), 1)
    with pytest.raises(TypeError, match="pickle"):
        await ends.ours.request("thing")
    assert await ends.ours.request("add", 1, 1) == 2
    ends.close()


async def test_file_descriptors_go_along_in_order():
    received = []
    ends = Ends("socket", {"take": received.append, "give": lambda: [Fd(os.open(os.devnull, os.O_RDONLY))]})
    pipes = [os.pipe() for _ in range(40)]
    for n, (_, write) in enumerate(pipes):
        os.write(pipes[n][1], bytes([n]))
        ends.ours.tell("take", {"number": n, "pipe": Fd(pipes[n][0])})  # held by nobody else: closed once sent
        os.close(write)
    (given,) = await ends.ours.request("give")
    assert os.fstat(given.fileno())
    assert not os.get_inheritable(given.fileno())
    for each in received:
        assert os.read(each["pipe"].fileno(), 10) == bytes([each["number"]])
    assert [each["number"] for each in received] == list(range(40))
    ends.close()


async def test_no_file_descriptor_stays_open():
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    ends = Ends("socket")
    fds = [Fd(os.open(os.devnull, os.O_RDONLY)) for _ in range(20)]
    for fd in fds:
        ends.ours.tell("later", b"x" * 100_000)  # fills the socket
        ends.ours.tell("later", fd)
    ends.close()
    ends.theirs.close()
    del fds, fd
    await asyncio.sleep(0)
    gc.collect()
    assert not before or len(os.listdir("/proc/self/fd")) <= before


async def test_other_versions_are_named_on_both_sides(monkeypatch):
    one, other = socket.socketpair()
    loop = asyncio.get_running_loop()
    lost = [loop.create_future(), loop.create_future()]
    ours = SocketChannel(one, loop, {}, lost[0].set_result)
    ask = asyncio.ensure_future(ours.request("add", 1, 2))
    monkeypatch.setattr(control, "versions", lambda: {"aneuron": "9.9", "torch": "2.0", "python": "3.11.0"})
    SocketChannel(other, loop, {}, lost[1].set_result)
    with pytest.raises(VersionsDiffer, match=r"aneuron .* here and .* there"):
        await ask
    assert isinstance(await lost[0], VersionsDiffer)
    await lost[1]
    ours.close()


async def test_rubbish_ends_the_channel():
    one, other = socket.socketpair()
    lost = asyncio.get_running_loop().create_future()
    SocketChannel(one, asyncio.get_running_loop(), {}, lost.set_result)
    other.send(b"GET / HTTP/1.1\r\n\r\n" + b"\0" * 64)
    other.close()
    assert isinstance(await lost, ChannelLost)


async def test_a_child_that_was_forked_does_not_keep_the_other_side_waiting():
    one, other = socket.socketpair()
    channel = SocketChannel(one, asyncio.get_running_loop(), {})
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are threads, which the child does without
        child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)  # until all is seen
        os._exit(0)
    channel.close()
    while other.recv(1000):
        pass
    os.close(write)
    os.close(read)
    os.waitpid(child, 0)
    other.close()


def test_the_watchdog_s_poll_sees_a_hang_up_only():
    one, other = socket.socketpair()
    poll = select.poll()
    poll.register(one, 0)
    other.send(b"x")
    assert poll.poll(0) == []
    other.close()
    assert poll.poll(0)
    one.close()


def test_a_channel_whose_loop_was_closed_is_closed_without_it():
    loop = asyncio.new_event_loop()
    one, other = socket.socketpair()

    async def make():
        return SocketChannel(one, loop, {})

    channel = loop.run_until_complete(make())
    assert not channel.close_with_loop()
    loop.close()
    assert channel.close_with_loop()
    assert channel.close_with_loop()
    while other.recv(1000):
        pass
    other.close()
