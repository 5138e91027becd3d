"""The yardsticks: the least that a Python runtime must do to serve calls in batches.

`Floor` is one deque, one thread a core that takes what is there when its core is free, and completions posted to the
loop in groups. `FairFloor` is the same, but pieces of large calls take turns with small calls. Neither has limits,
cancellation, deadlines, statistics, signatures or isolation of errors: they are not products.

Lives here: the floors, and the simulated core that they and the peers run on. Must not be here: products.
"""

import asyncio
import threading
import time
from collections import deque
from typing import Any

import torch

FEATURES = 16


def model(x: torch.Tensor) -> torch.Tensor:
    """What every contender computes."""
    return x * 2 + 1


class Core:
    """One simulated core of fixed shape. Like aneuron's, it sleeps for what is left of the service time, and begins
    with what it was given meanwhile when that has ended.
    """

    def __init__(self, seconds: float, batch: int, features: int = FEATURES) -> None:
        self.seconds = seconds
        self.batch = batch
        self.features = features
        self._lock = threading.Lock()
        self._free = 0.0  # when it will have done all that it was given
        self.executions = 0
        self.rows = 0

    def run(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        if n > self.batch or n < 1 or x.shape[1] != self.features:
            raise ValueError(f"fixed shape [{self.batch}, {self.features}], got {tuple(x.shape)}")
        if n < self.batch:
            padded = torch.zeros(self.batch, self.features)
            padded[:n] = x
        else:
            padded = x
        with self._lock:
            begin = max(self._free, time.monotonic())
            y = padded * 2 + 1
            self._free = end = max(begin + self.seconds, time.monotonic())
            self.executions += 1
            self.rows += n
        if self.seconds > 0 and (rest := end - time.monotonic()) > 0:
            time.sleep(rest)
        return y[:n] if n < self.batch else y


class _Large:
    """A call of more rows than a batch: the pieces that are left, its result, its future."""

    __slots__ = ("future", "left", "out")

    def __init__(self, left: int, out: torch.Tensor, future: "asyncio.Future[torch.Tensor]") -> None:
        self.left, self.out, self.future = left, out, future


_Item = tuple[torch.Tensor, int, Any, int]  # a piece, its rows, its future or _Large, its place in the result


class Floor:
    """One deque for all."""

    async def start(self, cores: int, seconds: float, batch: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.batch = batch
        self.cores = [Core(seconds, batch) for _ in range(cores)]
        self.queue: Any = self._queue()
        self.lock = threading.Lock()
        self.idle: deque[threading.Lock] = deque()  # of the workers that wait, what they wait for
        self.done: deque[tuple[list[_Item], Any]] = deque()
        self.done_scheduled = self.kick_scheduled = self.closing = False
        self.want = 0
        self.threads = [threading.Thread(target=self._worker, args=(core,), daemon=True) for core in self.cores]
        for thread in self.threads:
            thread.start()

    def executed(self) -> int:
        """Callers' rows that the cores have executed."""
        return sum(core.rows for core in self.cores)

    def _queue(self) -> Any:
        return deque()

    async def call(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        future = self.loop.create_future()
        if n <= self.batch:
            self.queue.append((x, n, future, 0))
        else:
            pieces = self._pieces(x, future)
            self.want += len(pieces)  # each full piece can wake a core of its own
            for piece in pieces:
                self.queue.append(piece)
        if self.idle and not self.kick_scheduled:
            self.kick_scheduled = True
            self.loop.call_soon(self._kick)
        return await future

    def _pieces(self, x: torch.Tensor, future: "asyncio.Future[torch.Tensor]") -> list[_Item]:
        parts = x.split(self.batch)
        large = _Large(len(parts), torch.empty_like(x), future)
        return [(part, part.shape[0], large, index * self.batch) for index, part in enumerate(parts)]

    def _kick(self) -> None:
        self.kick_scheduled = False
        need = max(-(-len(self.queue) // self.batch), self.want)
        self.want = 0
        while need > 0:
            try:
                lock = self.idle.popleft()
            except IndexError:
                return
            lock.release()
            need -= 1

    def _take(self) -> list[_Item]:
        items, rows, batch, queue = [], 0, self.batch, self.queue
        with self.lock:
            while queue and rows < batch:
                n = queue[0][1]
                if rows + n > batch:
                    break
                items.append(queue.popleft())
                rows += n
        return items

    def _worker(self, core: Core) -> None:
        lock = threading.Lock()
        lock.acquire()
        while not self.closing:
            items = self._take()
            if not items:
                self.idle.append(lock)
                if self.queue or self.closing:  # look again: no wake-up may be lost
                    try:
                        self.idle.remove(lock)
                        continue
                    except ValueError:
                        pass
                lock.acquire()
                continue
            outs: Any
            try:
                x = items[0][0] if len(items) == 1 else torch.cat([item[0] for item in items])
                y = core.run(x)
                outs = (y,) if len(items) == 1 else y.split([item[1] for item in items])
                for (_, n, target, offset), out in zip(items, outs):  # noqa: B905 - strict costs time
                    if type(target) is _Large:
                        target.out[offset : offset + n] = out
            except BaseException as error:  # delivered to the callers
                outs = error
            self.done.append((items, outs))
            if not self.done_scheduled:
                self.done_scheduled = True
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self.done_scheduled = False
        done = self.done
        while done:
            items, outs = done.popleft()
            if isinstance(outs, BaseException):
                for _, _, target, _ in items:
                    future = target.future if type(target) is _Large else target
                    if not future.done():
                        future.set_exception(outs)
                continue
            for (_, _, target, _), out in zip(items, outs):  # noqa: B905 - strict costs time
                if type(target) is _Large:
                    target.left -= 1
                    if not target.left and not target.future.done():
                        target.future.set_result(target.out)
                elif not target.done():
                    target.set_result(out)

    async def stop(self) -> None:
        self.closing = True
        for thread in self.threads:
            while thread.is_alive():
                while self.idle:
                    self.idle.popleft().release()
                await asyncio.sleep(0.002)


class _TwoLines:
    """Small calls, and one deque of pieces for each large call."""

    def __init__(self) -> None:
        self.small: deque[_Item] = deque()
        self.ring: deque[deque[_Item]] = deque()
        self.turn = False

    def append(self, item: _Item) -> None:
        self.small.append(item)

    def __len__(self) -> int:  # as rows: a turn of the ring is a full batch
        return len(self.small) + 8 * len(self.ring)


class FairFloor(Floor):
    """Every second batch starts with a piece of a large call, if there is one; large calls take turns."""

    def _queue(self) -> Any:
        return _TwoLines()

    async def call(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] <= self.batch:
            return await super().call(x)
        future = self.loop.create_future()
        pieces = deque(self._pieces(x, future))
        with self.lock:
            self.queue.ring.append(pieces)
        for _ in range(len(pieces)):
            try:
                self.idle.popleft().release()
            except IndexError:
                break
        return await future

    def _take(self) -> list[_Item]:
        queue, batch, items, rows = self.queue, self.batch, [], 0
        with self.lock:
            use_ring = queue.ring and (queue.turn or not queue.small)
            queue.turn = not queue.turn
            if use_ring:
                pieces = queue.ring.popleft()
                item = pieces.popleft()
                items.append(item)
                rows = item[1]
                if pieces:
                    queue.ring.append(pieces)
            while queue.small and rows + queue.small[0][1] <= batch:
                item = queue.small.popleft()
                items.append(item)
                rows += item[1]
        return items
