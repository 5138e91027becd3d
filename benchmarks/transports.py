"""What carries frames between two processes at what cost: `python -m benchmarks.transports`.

Frames of 256 bytes in batches of 32, each answered by one as long; a lone frame and its answer; a payload of 1 MiB,
answered by 16 bytes.
The contenders: our link (`aneuron.remote`; payloads through its shared memory), an asyncio protocol with the same
frames, pyzmq's asyncio sockets, iceoryx2. pyzmq is left out where it is not installed, iceoryx2 unless it is asked for
(`--ways`): three runs of five with it stood still. They take turns; a figure is the median of the rounds.

Lives here: both processes. Must not be here: what is sent in earnest.
"""

import argparse
import asyncio
import ctypes
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count
from statistics import median
from typing import Any

from aneuron.remote.frames import Frame, Kind, Parser, encode
from aneuron.remote.link import connect
from aneuron.remote.memory import Receiver, Sender

SMALL, BATCH, LARGE = 256, 32, 1 << 20
OnMessages = Callable[[list[tuple[int, Any]]], None]  # ids and bodies
ASKS = 1 << 32  # an id from here on: answer with 16 bytes


class Own:
    """Our link, over a socket pair; large payloads through shared memory."""

    def __init__(self, where: Any, first: bool, on_messages: OnMessages) -> None:
        loop = asyncio.get_running_loop()
        self.on_messages = on_messages
        self.room = asyncio.Event()
        self.link = connect(where, loop, self.on_frames, lambda error: None)
        self.sender = Sender(self.link, loop, self.room.set)
        self.receiver = Receiver(self.link, loop)

    def on_frames(self, frames: list[Frame]) -> None:
        found: list[tuple[int, Any]] = []
        for frame in frames:
            if frame.kind == Kind.SEGMENT:
                self.receiver.on_segment(frame)
            elif frame.kind == Kind.FREE:
                self.sender.on_free(frame)
            elif frame.flags:
                found.append((frame.id, self.receiver.lease(frame.body)))
            else:
                found.append((frame.id, frame.body))
        if found:
            self.on_messages(found)

    async def send(self, messages: list[tuple[int, bytes]]) -> None:
        for id, body in messages:
            if len(body) < 1 << 16:
                self.link.add(*encode(Kind.CALL, id, body))
                continue
            while (block := self.sender.take(len(body))) is None:
                self.room.clear()
                await self.room.wait()
            block.memory[: len(body)] = body
            self.link.add(*encode(Kind.CALL, id, block.place(), flags=1))
        self.link.flush()  # these are all: as the others write at once

    async def close(self) -> None:
        for each in (self.sender, self.receiver, self.link):
            each.close()


class Protocol(asyncio.Protocol):
    """asyncio's own transport, with the same frames; those of an iteration written together."""

    def __init__(self, where: Any, first: bool, on_messages: OnMessages) -> None:
        self.where, self.on_messages = where, on_messages
        self.parser = Parser()
        self.transport: Any = None

    def data_received(self, data: bytes) -> None:
        frames = self.parser.feed(bytearray(data))
        if frames:
            self.on_messages([(frame.id, frame.body) for frame in frames])

    async def send(self, messages: list[tuple[int, bytes]]) -> None:
        if self.transport is None:
            await self.open()
        self.transport.write(b"".join(each for id, body in messages for each in encode(Kind.CALL, id, body)))

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self.transport, _ = await loop.create_unix_connection(lambda: self, sock=self.where)

    async def close(self) -> None:
        self.transport.abort()


class Zmq:
    """pyzmq: a pair of sockets over ipc."""

    def __init__(self, where: Any, first: bool, on_messages: OnMessages) -> None:
        import zmq
        import zmq.asyncio

        self.on_messages = on_messages
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, 0)
        (self.socket.bind if first else self.socket.connect)(f"ipc://{where}/socket")
        self.task = asyncio.create_task(self.receive())

    async def receive(self) -> None:
        while True:
            data = memoryview(await self.socket.recv())
            self.on_messages([(int.from_bytes(data[:8], "little"), data[8:])])

    async def send(self, messages: list[tuple[int, bytes]]) -> None:
        for id, body in messages:
            await self.socket.send(id.to_bytes(8, "little") + body)

    async def close(self) -> None:
        self.task.cancel()
        self.context.destroy(0)


class Iceoryx:
    """iceoryx2: samples in shared memory, and an event for those of a batch, for which a thread waits.

    Its Python package gives out no descriptor that a loop could watch.
    """

    def __init__(self, where: Any, first: bool, on_messages: OnMessages) -> None:
        import iceoryx2 as iox

        iox.set_log_level(iox.LogLevel.Error)
        self.iox, self.on_messages = iox, on_messages
        self.loop = asyncio.get_running_loop()
        self.node = iox.NodeBuilder.new().create(iox.ServiceType.Ipc)
        ways = [f"aneuron/{where}/{way}" for way in ("there", "back")]
        there, back = ways if first else ways[::-1]
        slices = iox.Slice[ctypes.c_uint8]
        out, come = (
            self.node.service_builder(iox.ServiceName.new(name))
            .publish_subscribe(slices)
            .subscriber_max_buffer_size(256)
            .enable_safe_overflow(False)
            .open_or_create()
            for name in (there, back)
        )
        self.publisher = (
            out.publisher_builder()
            .initial_max_slice_len(LARGE + 8)
            .max_loaned_samples(2)
            .backpressure_strategy(iox.BackpressureStrategy.RetryUntilDelivered)
            .create()
        )
        self.subscriber = come.subscriber_builder().create()
        told, tell = (
            self.node.service_builder(iox.ServiceName.new(name + "/event")).event().open_or_create()
            for name in (back, there)
        )
        self.listener, self.notifier = told.listener_builder().create(), tell.notifier_builder().create()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.wait, daemon=True)
        self.thread.start()

    def wait(self) -> None:
        while not self.over.is_set():
            self.listener.timed_wait(self.iox.Duration.from_millis(100))
            self.loop.call_soon_threadsafe(self.take)

    def take(self) -> None:
        found: list[tuple[int, Any]] = []
        while (sample := self.subscriber.receive()) is not None:
            pointer, size = sample.payload_ptr, sample.payload().len()
            id = int.from_bytes(ctypes.string_at(pointer, 8), "little")
            found.append((id, sample if size > 1 << 16 else ctypes.string_at(pointer + 8, size - 8)))
            del sample
        if found:
            self.on_messages(found)

    async def send(self, messages: list[tuple[int, bytes]]) -> None:
        for id, body in messages:
            sample = self.publisher.loan_slice_uninit(8 + len(body))
            ctypes.memmove(sample.payload_ptr, id.to_bytes(8, "little"), 8)
            ctypes.memmove(sample.payload_ptr + 8, body, len(body))
            sample.assume_init().send()
        self.notifier.notify()

    async def close(self) -> None:
        self.over.set()
        self.thread.join()


WAYS: dict[str, Any] = {"own link": Own, "asyncio protocol": Protocol, "pyzmq": Zmq, "iceoryx2": Iceoryx}
NEEDS = {"pyzmq": "zmq", "iceoryx2": "iceoryx2", "uvloop": "uvloop"}


def over_sockets(way: str) -> bool:
    return WAYS[way] in (Own, Protocol)


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop  # type: ignore[no-any-return]


async def serve(way: str, where: str) -> None:
    """The other process: answer, until nobody listens."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    there: Any = socket.socket(fileno=int(where)) if over_sockets(way) else where
    answers = asyncio.Queue[list[tuple[int, bytes]]]()

    def on_messages(messages: list[tuple[int, Any]]) -> None:
        answers.put_nowait([(id, bytes(16) if id >= ASKS else bytes(body)) for id, body in messages])

    side = WAYS[way](there, False, on_messages)
    if way == "asyncio protocol":
        await side.open()
    while True:
        await side.send(await answers.get())


class Client:
    """Who asks, here, and the process that answers."""

    def __init__(self, way: str, loop: str, folder: str) -> None:
        self.way = way
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self.ids = count(1)
        here: Any = folder
        where, fds = folder, []
        if over_sockets(way):
            here, there = socket.socketpair()
            fds, where = [there.fileno()], str(there.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.transports", "--serve", way, "--loop", loop, "--where", where],
            pass_fds=fds,
            stdin=subprocess.PIPE,
        )
        if fds:
            there.close()
        self.side = WAYS[way](here, True, self.on_messages)

    def on_messages(self, messages: list[tuple[int, Any]]) -> None:
        for id, body in messages:
            self.waiting.pop(id).set_result(body)

    async def ask(self, body: bytes, times: int = 1) -> float:
        """Seconds until so many are answered that are sent together."""
        loop = asyncio.get_running_loop()
        ids = [next(self.ids) + ASKS * (len(body) == LARGE) for _ in range(times)]
        begin = time.perf_counter()
        futures = [loop.create_future() for _ in ids]
        self.waiting.update(zip(ids, futures, strict=True))
        await self.side.send([(id, body) for id in ids])
        for future in futures:
            await future
        return time.perf_counter() - begin

    async def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        await self.side.close()


async def measure(loop: str, ways: list[str], rounds: int) -> dict[str, list[float]]:
    """Medians for each way: us a frame in batches, us for a lone one, us for a payload."""
    found: dict[str, list[list[float]]] = {way: [[], [], []] for way in ways}
    small, large = os.urandom(SMALL), os.urandom(LARGE)
    with tempfile.TemporaryDirectory() as folder:
        clients = []
        try:
            for index, way in enumerate(ways):
                os.mkdir(f"{folder}/{index}")
                clients.append(Client(way, loop, f"{folder}/{index}"))
                await asyncio.sleep(4)  # the other process is there: messages to nobody are lost with iceoryx2
            for turn in range(rounds + 1):
                for client in clients:
                    batches = [await client.ask(small, BATCH) / BATCH for _ in range(100)]
                    lone = [await client.ask(small) for _ in range(100)]
                    payloads = [await client.ask(large) for _ in range(30)]
                    if turn:  # the first is to warm up
                        for all, each in zip(found[client.way], (batches, lone, payloads), strict=True):
                            all.append(median(each) * 1e6)
        finally:
            for client in clients:
                await client.close()
    return {way: [median(each) for each in figures] for way, figures in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ways", nargs="*", default=[way for way in WAYS if way != "iceoryx2"], choices=WAYS)
    parser.add_argument("--serve", choices=WAYS)
    parser.add_argument("--loop", default="asyncio")
    parser.add_argument("--where")
    asked = parser.parse_args()
    if asked.serve:
        with asyncio.Runner(loop_factory=loop_factory(asked.loop)) as runner:
            runner.run(serve(asked.serve, asked.where))
    there = [name for name in (*asked.ways, "uvloop") if name not in NEEDS or find_spec(NEEDS[name])]
    print(f"{'':26}{f'us a frame of {BATCH}':>20}{'us a lone one':>20}{'us for 1 MiB':>20}")
    for loop in ("asyncio", "uvloop"):
        if loop == "asyncio" or loop in there:
            with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
                figures = runner.run(measure(loop, [way for way in WAYS if way in there], asked.rounds))
            ours = figures[next(iter(figures))]
            for way, each in figures.items():
                print(
                    f"{loop:8}{way:18}", *(f"{us:11.1f} {us / own:5.2f}x" for us, own in zip(each, ours, strict=True))
                )


if __name__ == "__main__":
    main()
