"""Random callers, each of which knows what it may get, and what must hold whatever happens to them.

Shared by the schedules on virtual time (virtual.py) and on real threads (threads.py).
"""

import asyncio
import gc
import time
import weakref

import anyio
import torch

from aneuron import Closed, CoreFailed, NoHealthyCores, QueueFull, ShapeError
from aneuron.backends.simulated import SimulatedFault
from aneuron.errors import DeadlineExceeded
from aneuron.sched.fair_queue import FEW

WIDTH = 64  # rows of the largest call: a row's value is WIDTH * number of its call + its own number
SERVING = ("ready", "suspect")


class BadRowError(Exception):
    """What the model raises for a row that says so."""


class SickCoreError(Exception):
    """What a core raises, whoever's rows it is given; it looks like an input fault."""


def model_of(x):
    """The answer names the rows; a negative row is one that the model refuses."""
    if (x < 0).any():
        raise BadRowError("a negative row")
    return x * 2 + 1


class Version:
    """The same as `model_of`, with answers that say which version gave them."""

    def __init__(self, number):
        self.number = number

    def __call__(self, x):
        return model_of(x) + (self.number - 1)


def version(lanes):
    """The number of the version that lanes serve."""
    return getattr(next(iter(lanes._load.models.values())), "number", 1)


class Turns:
    """Whose turn each batch was, of a model with compiled batches whose callers all come on the usual terms."""

    def __init__(self, model):
        self.model = model
        self.slots = 0  # batches that may have been in flight
        self.seen = ""  # of those that have begun: "s" with rows of small or medium calls, "l" of large ones only
        self.waiting: dict[int, int] = {}  # the calls of one row by their numbers: what had begun when they came

    def begun(self, execution):
        """A batch begins; large calls have had their turns before it, and no more. Reruns are nobody's turn."""
        if execution.batch.reason == "rerun":
            return
        for value in execution.prepared[0][0][:, 0].tolist():
            before = self.waiting.pop(value // WIDTH, None)
            seen = self.seen[before:] if before is not None else ""
            self.slots = max(self.slots, self.model.num_workers or 0)
            assert seen.count("l") <= seen.count("s") + self.slots, f"a small call has waited for the batches {seen}"
        limit = FEW * self.model._life.program.batch_size
        self.seen += "s" if any(call.rows <= limit for call, _, _ in execution.batch.chunks) else "l"


class Callers:
    """The callers of one schedule. `fates` counts what became of them."""

    def __init__(self, pick, model, turns=None):
        self.random, self.model, self.turns = pick, model, turns
        self.tasks: list[asyncio.Task[None]] = []
        self.fates: dict[str, int] = {}
        self.left = 0  # how many were cancelled
        self.elements = 0  # of maps that were answered
        self.maps = False  # whether there were any
        self.closings = 0  # how often the model has been closed
        self.versions = None  # those that may answer, where that is not the one that serves when a call comes
        self.sick = False  # whether cores raise what looks like an input fault
        self.inputs: list[weakref.ref[torch.Tensor]] = []

    def add(self):
        self.tasks.append(asyncio.ensure_future(self._one(len(self.tasks))))

    def add_map(self):
        """A map beside the callers, of elements of its own, which is left early at times."""
        if self.turns is None:
            self.maps = True
            self.tasks.append(asyncio.ensure_future(self._map(len(self.tasks))))

    async def _map(self, number):
        pick, given = self.random, []

        async def source():
            for _ in range(pick.randrange(1, 30)):
                rows = pick.choice([1, 1, 2, 9])
                values = WIDTH * number + (torch.arange(rows) + sum(len(x) for x in given)) / 256
                given.append(values[:, None].repeat(1, 2))
                self.inputs.append(weakref.ref(given[-1]))
                if pick.random() < 0.2:
                    await asyncio.sleep(0.001)
                yield given[-1]
            if pick.random() < 0.2:
                raise OSError("the disk is gone")

        leaves = pick.choice([None, None, 0, 3])
        view = self._terms(1)
        try:
            async with view.map(source(), limit=pick.choice([None, 1, 5, 50]), return_exceptions=True) as results:
                index = 0
                async for y in results:
                    assert not isinstance(y, QueueFull), "an element of a map was refused"
                    if isinstance(y, torch.Tensor):
                        assert (y - given[index] * 2).min() >= 1, "somebody else's rows, or out of order"
                        assert y.shape == given[index].shape
                        self.elements += 1
                    index += 1
                    if index == leaves:
                        return
        except (OSError, Closed, CoreFailed):
            pass
        finally:
            given.clear()

    def cancel_one(self):
        waiting = [task for task in self.tasks if not task.done()]
        if waiting:
            self.random.choice(waiting).cancel()

    async def finish(self):
        """Everybody has been answered: nothing happens any more that could answer them."""
        if self.maps:
            await asyncio.sleep(1.0)  # their sources have an end
        late = [task for task in self.tasks if not task.done()]
        assert not late, f"{len(late)} calls are lost"
        for task in self.tasks:
            if not task.cancelled():
                task.result()
        self.left = sum(task.cancelled() for task in self.tasks)
        self.tasks.clear()  # the traceback of a cancellation holds the caller's frame

    async def _one(self, number):
        fate = await self._call(number)
        self.fates[fate] = self.fates.get(fate, 0) + 1

    async def _call(self, number):
        pick, closings, lanes = self.random, self.closings, self.model._life.run
        was_open = lanes is not None and lanes.serving
        serves = version(lanes) if was_open and self.versions is None else 1
        rows, width = pick.choice([1, 1, 1, 2, 3, 8, 9, 30, 60]), pick.choice([2, 2, 2, 3])
        x = (torch.arange(rows) + WIDTH * number).float()[:, None].repeat(1, width)
        bad = pick.random() < 0.1
        if bad:
            x[pick.randrange(rows)] = -1
        self.inputs.append(weakref.ref(x))
        patience = None if self.turns else pick.choice([None, None, None, 0.0, 0.001, 0.01])
        model = self._terms(rows)
        if self.turns and rows == 1 and not bad:
            self.turns.waiting[number] = len(self.turns.seen)
        try:
            if patience is None:
                y = await model(x)
            else:
                with anyio.move_on_after(patience) as scope:
                    y = await model(x)
                if scope.cancelled_caught:
                    return "scope"
        except BadRowError:
            assert bad, "somebody else's error"
            return "bad"
        except SickCoreError:
            assert self.sick, "an error that nobody raised"
            return "sick"
        except QueueFull as error:
            return "gave way" if "has given its room" in str(error) else "refused"  # the first was accepted, and failed
        except DeadlineExceeded:
            return "late"
        except Closed as error:
            if "internal error" in str(error) or (was_open and self.closings == closings):
                raise AssertionError("closed, and nobody has closed it") from error
            return "closed"
        except NoHealthyCores as error:
            return "none" if error.retry_after is None or error.retry_after >= 0 else "a wrong retry_after"
        except (
            CoreFailed,
            OSError,
            SystemError,
            SimulatedFault,
        ):  # or the device's own, where two cores failed with it
            return "core"
        except ShapeError:
            return "shape"  # dynamic batching is off, and the rows are not those of all cores together
        assert not bad, "a row that the model refuses was answered"
        if self.versions is not None and y.numel():
            serves = int((y - x * 2)[0, 0])
            assert serves in self.versions(), f"version {serves} answers"
        assert torch.equal(y, x * 2 + serves), "somebody else's rows, or another version's"
        return "answer"

    def _terms(self, rows):
        """The model on terms that a call may have."""
        pick = self.random
        if self.turns or pick.random() < 0.4:
            return self.model
        timeout = pick.choice([None, None, 0, 0.0005, 0.003, 10])
        return self.model.options(timeout, pick.choice([0, 0, 1, -1.5]), pick.choice([None, "a", "b"]))


def check_now(model, min_cores):
    """At any moment: the sum rule of the statistics, and `ready` says what the cores' states and the door say."""
    stats = model.statistics()
    calls = stats.calls
    assert calls.accepted == calls.completed + calls.failed + calls.cancelled + calls.waiting + calls.running, calls
    assert min(calls.waiting, calls.running) >= 0, calls
    serve = sum(core.state in SERVING for core in stats.cores)
    is_open = model._life.run is not None and model._life.run.serving
    assert model.ready == (is_open and serve >= (min_cores or 1)), f"ready={model.ready}, {serve} cores serve"


def check_nothing_left(model, lanes, callers):
    """After a close: everybody ended, and was counted once."""
    check_counted(model, callers)
    for run in lanes:
        assert not run.futures.calls
        with run.dispatcher.board.lock:
            assert all(call.settled for call in run.scheduler.calls())
        bound = [batch for lane in run.dispatcher.board.lanes for batch in lane.queue._queue]
        own = [batch for batch in bound if batch.scheduler is run.scheduler]  # others on its pool may go on
        assert all(call.settled for batch in own for call, _, _ in batch.chunks)


def check_counted(model, callers):
    """After a close: everybody was counted once."""
    stats, fates = model.statistics(), callers.fates
    calls = stats.calls
    assert calls.accepted == calls.completed + calls.failed + calls.cancelled, calls
    assert (calls.waiting, calls.running, stats.waiting_rows) == (0, 0, 0)
    left = callers.left + fates.get("scope", 0)
    answers = fates.get("answer", 0) + callers.elements
    assert answers <= calls.completed, f"{calls}, {fates}"
    assert callers.maps or calls.completed <= answers + left, f"{calls}, {fates}"  # maps that are left drop results
    refused = calls.refused - fates.get("refused", 0)
    if callers.versions is None:
        assert refused == 0, f"{calls}, {fates}"
    else:  # an engine's refusal takes time, in which the caller may leave; elements of a map go again
        assert refused >= 0, f"{calls}, {fates}"
        assert refused <= left or callers.maps, f"{calls}, {fates}"


def check_freed(callers):
    """Nothing holds what callers sent."""
    for _ in range(50):  # a thread that has said its last words may be slow to end
        gc.collect()
        held = [ref for each in callers for ref in each.inputs if ref() is not None]
        if not held:
            return
        time.sleep(0.02)
    assert not held, f"{len(held)} inputs are held, by {[type(by) for by in gc.get_referrers(held[0]())]}"
