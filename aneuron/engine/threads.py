"""A core's threads, and what they do with a batch.

Lives here: the only threads of the package, and the locks between them. Must not be here: asyncio, the caller's
futures, decisions. A worker is handed an `Execution`, takes it through its steps, and posts it back.
"""

import atexit
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

from aneuron.backends import Backend, Core, Fault
from aneuron.engine.evidence import Evidence, Trials, identities, snapshot, varies
from aneuron.engine.modes import Modes
from aneuron.sched.call import Chunk
from aneuron.sched.filling import Batch
from aneuron.tensors import rows
from aneuron.tensors.outputs import Carried, Output, Unpad
from aneuron.tensors.rows import Call, Finished
from aneuron.tensors.signature import Compiled
from aneuron.tensors.verdicts import Seen

logger = logging.getLogger("aneuron")

P = ParamSpec("P")
T = TypeVar("T")

NOTABLE = 5e-5  # seconds: no less than it takes to copy half a megabyte


def carried(error: BaseException) -> Exception:
    """An exception as a future can carry it to a caller.

    A future cannot carry StopIteration; CancelledError, SystemExit and KeyboardInterrupt would be taken for the
    caller's own cancellation, or end its loop.
    """
    if isinstance(error, Exception) and not isinstance(error, (StopIteration, CancelledError)):
        return error
    wrapped = RuntimeError(f"the model raised {text(error)}")
    wrapped.__cause__ = error
    return wrapped


def text(error: BaseException) -> str:
    """An exception in words, whatever its `__str__` does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


class Staged(Protocol):
    """A claim to an execution that is prepared while another one runs: others may take it over meanwhile."""

    def park(self) -> bool:
        """It is prepared: whether it is still there."""

    def claim(self) -> bool:
        """The core is free: whether it is still there."""


Take = Callable[["Execution | None"], "Execution | None"]  # the one that has ended, to the one that comes next


@dataclass(frozen=True, slots=True)
class Common:
    """What all executions of a run of a model have in common."""

    backend: Backend
    dim: int
    unpad: Unpad | None  # what of the outputs is to be cut back to each call's length
    evidence: Evidence  # what of them has rows
    sizes: Mapping[int, Sequence[int]]  # the compiled ones, by bucket; none where any number will do
    guard: AbstractContextManager[Any]  # held while two workers agree about one call
    post: "Callable[[Execution], None]"  # to the loop


class Execution:
    """One batch on its way through a core: `prepare`, `begin`, `execute`, `finish`, in this order, on one thread.

    `error` or `finished` is the outcome; `begun` tells the loop that the batch can no longer be revoked.
    """

    __slots__ = (
        "_cut", "_inputs", "_template", "abandoned", "batch", "begun", "chunks", "common", "copied", "core", "ended",
        "error", "failed", "fault", "finished", "lane", "other", "output", "over", "posted", "prepared", "preparing",
        "rows", "since", "size", "staged", "started", "watch",
    )  # fmt: skip

    def __init__(self, batch: Batch[Call], size: int | None, core: Core, lane: Any, common: Common) -> None:
        self.batch = batch
        self.chunks: Sequence[Chunk[Call]] = batch.chunks
        self.rows = batch.rows  # that callers sent
        self.size = size  # rows to pad to; None = as many as there are
        self.core, self.common = core, common
        self.lane = lane  # a Lane, of which nothing is known here
        self.other: tuple[Core, int] | None = None  # another bucket's, where it must be learnt what has the length
        self.prepared: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.output: Any = None
        self.begun = self.over = self.failed = False
        self.abandoned = False  # given up as hung: whatever comes of it is too late
        self.staged: Staged | None = None  # if it was bound while another was executing
        self.watch: Callable[[Execution], AbstractContextManager[Any]] | None = None  # around it, if calls are observed
        self.started = self.ended = self.posted = 0.0
        self.since = 0.0  # when the core began with what it runs now: this, or what its output has to be compared with
        self.preparing = 0.0  # seconds
        self.copied = 0  # bytes that were collated and scattered, seen at a glance, where that took a notable time
        self.error: BaseException | None = None
        self.fault = Fault.INPUT
        self.finished: Sequence[Finished] = ()
        self._cut: Carried | None = None
        self._inputs: Sequence[Sequence[Any]] = ()  # the callers' tensors, and what they stand in
        self._template: Any = None

    def prepare(self, clock: Callable[[], float]) -> None:
        """Collate the rows of the callers that are still there."""
        if self.prepared is not None or self.failed:  # on a lane that another has taken it over from
            return
        begin = clock()
        try:
            self.prepared = self._collate()
        except BaseException as error:
            self._fail(error)
            self._inputs = ()
        self.preparing = clock() - begin

    def _collate(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.chunks, self._inputs, self._template = rows.gather(self.chunks)
        if not self._inputs:
            return None
        self.rows = sum([stop - start for _, start, stop in self.chunks])
        size, dim = self.size or self.rows, self.common.dim
        try:
            return rows.collate(self.chunks, self._inputs, self._template, size, dim, self.batch.bucket)
        finally:  # an input that has another shape by now cannot even be collated
            rows.check_unmodified(self.chunks, self._inputs, self._template)

    def begin(self, clock: Callable[[], float]) -> bool:
        """With the core's turn in hand: whether there is still something to execute."""
        if self.prepared is not None:
            for call, _, _ in self.chunks:
                if call.settled:
                    self.prepared = None
                    self.prepare(clock)
                    break
        self.started = clock()
        self.begun = self.prepared is not None
        return self.begun

    def execute(self, clock: Callable[[], float]) -> None:
        """Run the model."""
        assert self.prepared is not None
        args, kwargs = self.prepared
        self.prepared = None
        try:
            if self.preparing > NOTABLE:
                self.copied = _bytes(args) + _bytes(kwargs)
            if self.watch is None:
                self._run(args, kwargs, clock)
            else:
                with self.watch(self):
                    self._run(args, kwargs, clock)
        except BaseException as error:
            args, kwargs = (), {}  # a traceback holds this frame
            self.output = None
            self._fail(error)
        self.ended = self.ended or clock()
        self._inputs, self._template = (), None
        self.over = True

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], clock: Callable[[], float]) -> None:
        """Execute, and see what of the output is whose; if nobody knows, further executions tell."""
        self.output = value = self.core.execute(args, kwargs)
        self.ended = clock()  # what else is executed, to know what the output means, counts for nobody
        common, call = self.common, self.chunks[0][0]
        if self.batch.bucket and common.unpad is not None:
            self.output = self._evidenced(call, clock)
            self.output.asked = call.base
            self._cut = self._carried(common.unpad, self.output)
        elif (
            type(value) is not torch.Tensor
            or (call.cut.shared, call.structure, value.ndim) not in common.evidence.plain
        ):
            self.output = self._evidenced(call, clock)

    def _evidenced(self, call: Call, clock: Callable[[], float]) -> Output:
        put_modes_back()
        common, size = self.common, self.size or self.rows
        if not call.cut.shared and call.cut.count(call.rows) == 1:
            return Output(self.output, None, common.dim, call.base)  # all of it is the call's
        lone = self.rows == 1 and not varies(self._inputs[0])
        first = partial(self._as_evidence, clock)
        return common.evidence.look(self.output, call.structure, size, call.cut.shared, lone, first)

    def _as_evidence(self, clock: Callable[[], float]) -> tuple[Seen, Trials]:
        """What was executed, and what else can be."""
        common, bucket, sizes = self.common, self.batch.bucket, self.common.sizes.get(self.batch.bucket)
        size = self.size or self.rows
        inputs = rows.columns(self.chunks, self._inputs, self.rows, common.dim, bucket)
        rows.check_unmodified(self.chunks, self._inputs, self._template)
        numbers = identities(inputs, common.dim)
        again = self._inputs, self._template

        def execute(columns: list[Any], count: int) -> Any:
            core = self.core if sizes is None or count == size else self.lane.core(count, bucket)
            return in_own_modes(core, *rows.arguments(again[1], columns))

        def go_on() -> None:
            self.since = clock()

        seen = Seen((*numbers, *numbers[-1:] * (size - self.rows)), snapshot(self.output))
        return seen, Trials(inputs, common.dim, sizes, execute, go_on, lambda: self.abandoned)

    def _carried(self, unpad: Unpad, output: Output) -> Carried:
        """What of the output is to be cut back; if nobody knows, one more run in another bucket tells."""
        dim, bucket, call = self.common.dim, self.batch.bucket, self.chunks[0][0]
        size, packing = self.size or self.rows, call.cut.shared
        carried = unpad.known(output, bucket)
        if carried is not None:
            return carried
        if self.other is None:
            return unpad.learn(output, bucket)
        core, other = self.other
        args, kwargs = rows.collate(self.chunks, self._inputs, self._template, size, dim, other)
        value = in_own_modes(core, args, kwargs)
        return unpad.learn(output, bucket, self.common.evidence.marked(value, call.structure, size, packing), other)

    def finish(self, clock: Callable[[], float]) -> None:
        """Give each call its rows, and post the outcome to the loop."""
        if self.error is None and self.begun and not self.abandoned:
            try:
                size, common = self.size or self.rows, self.common
                self.finished = rows.scatter(self.output, self.chunks, size, common.dim, common.guard, self._cut)
                if self.copied:
                    self.copied += _bytes(self.output)
            except BaseException as error:
                self._fail(error)
        self.output = None
        self.posted = clock()
        self.common.post(self)

    def _fail(self, error: BaseException) -> None:
        self.error, self.failed = error, True  # the loop takes the error away, in time
        try:
            self.fault = self.common.backend.classify(error) if self.begun else Fault.INPUT
        except BaseException:
            logger.exception("the %s backend could not classify an error", self.common.backend.name)


def _bytes(value: Any) -> int:
    """What the tensors at the top of an argument or output take."""
    if type(value) is torch.Tensor:
        return value.nbytes
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return sum([each.nbytes for each in values if isinstance(each, torch.Tensor)])


def warm_up(
    core: Core, compiled: Compiled, size: int | None, bucket: int, clock: Callable[[], float], keep: bool
) -> tuple[Any, Any, float]:
    """Run the example twice, padded to `size` rows and to `bucket`: throughput climbs over the first runs, and a fault
    of a compiled model can show in the second. Both outputs, in memory of their own if they are to be kept, and the
    seconds that the second run took.
    """
    own = snapshot if keep else _as_it_is
    args, kwargs = compiled.example(size, bucket)
    first = own(in_own_modes(core, args, kwargs))
    begin = clock()
    output = in_own_modes(core, args, kwargs)
    seconds = clock() - begin
    return first, own(output), seconds


def _as_it_is(output: Any) -> Any:
    return output


_local = threading.local()  # a worker thread's modes


def put_modes_back() -> None:
    """Put the calling thread's modes back, where it has any: a model may have left them changed."""
    modes: Modes | None = getattr(_local, "modes", None)
    if modes is not None:
        modes.restore()


def in_own_modes(core: Core, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Execute, and put the thread's modes back."""
    modes: Modes | None = getattr(_local, "modes", None)  # puppets have none
    if modes is None:
        return core.execute(args, kwargs)
    modes.note()
    try:
        return core.execute(args, kwargs)
    finally:
        modes.restore()


class Within:
    """A core each of whose executions is in a context that the user makes."""

    def __init__(self, core: Core, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self.concurrent = core.concurrent
        self.close = core.close
        self._core, self._context = core, context

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model in the context. What entering and leaving it raise is like an error of the model."""
        with self._context():
            return self._core.execute(args, kwargs)
        raise RuntimeError("what context= has made suppressed an exception of the model: there is no result")


class Workers(Executor):
    """Daemon threads of one core behind the interface of an executor, and a short way in for executions.

    The standard pool never lets the process end behind a hung run. Daemon threads that are inside torch when the
    interpreter ends would abort it: at exit they are told to stop and joined for a second at most.

    Each thread starts in a copy of `context`, None: that of the caller.
    """

    clock = staticmethod(time.monotonic)

    def __init__(self, name: str, context: Context | None = None) -> None:
        self._name = name
        self._context = context or copy_context()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._take: Take | None = None
        self._job: Callable[[], None] | None = None
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._alive = 0
        self._stopping = False
        self._last_words: Callable[[], None] | None = None
        self.on_death: Callable[[BaseException], None] | None = None  # a thread has ended that was not told to
        self._turn: AbstractContextManager[Any] = threading.Lock()
        _all.add(self)

    def let_in_together(self) -> None:
        """From now on, threads need not take turns to execute: the core is concurrent."""
        self._turn = nullcontext()

    def grow(self, threads: int) -> None:
        """Have `threads` threads at least."""
        while self._alive < threads and not self._stopping:
            # A copy for each: two threads cannot be in one context.
            run, name = self._context.copy().run, f"{self._name}/{self._alive + 1}"
            thread = threading.Thread(target=run, args=(self._work,), name=name, daemon=True)
            thread.start()  # may fail, and then nothing has changed
            self._alive += 1
            self._threads.append(thread)

    def wake(self, take: Take) -> None:
        """Have a thread take executions until there is none; each posts itself back."""
        if take is not self._take:
            self._take, self._job = take, partial(self._serve, take)
        self._inbox.put(self._job)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function in one of the threads."""
        if self._stopping:
            raise RuntimeError("the workers are stopped")
        future: Future[T] = Future()
        self._inbox.put(partial(_run, future, partial(fn, *args, **kwargs)))
        return future

    def stop(self, last_words: Callable[[], None] | None = None) -> None:
        """Let the threads end after what they were given; the last one says `last_words`. Not waited for."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            self._last_words = last_words
            alive = self._alive
        for _ in range(alive):
            self._inbox.put(None)
        if not alive and last_words is not None:
            last_words()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """The executor's way to say `stop`, and to wait for it."""
        self.stop()
        if wait:
            self.join(None)

    def join(self, timeout: float | None) -> None:
        """Wait for the threads to end."""
        for thread in self._threads:
            thread.join(timeout)

    def forget(self) -> None:
        """Be in a process that was forked: the threads are the parent's, and may hold the lock."""
        self._threads, self._alive, self._stopping, self._lock = [], 0, True, threading.Lock()

    def _work(self) -> None:
        try:
            _local.modes = Modes()
            while (job := self._inbox.get()) is not None:
                job()
                del job
        except BaseException as error:  # none is expected: a job of ours ends with its own
            if self.on_death is not None:
                self.on_death(error)
        finally:
            with self._lock:
                self._alive -= 1
                last = self._alive == 0 and self._stopping
            if last and self._last_words is not None:
                self._last_words()

    def _serve(self, take: Take) -> None:
        clock, modes = self.clock, _local.modes
        execution = take(None)
        while execution is not None:
            execution.prepare(clock)
            staged = execution.staged
            if staged is not None and not staged.park():
                execution = take(None)
                continue
            with self._turn:
                mine = staged is None or staged.claim()
                if mine and execution.begin(clock):
                    modes.note()
                    execution.execute(clock)
                    modes.restore()
            if mine:
                execution.finish(clock)
            execution = take(execution if mine else None)


def _run(future: "Future[T]", fn: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(fn())
    except BaseException as error:
        future.set_exception(carried(error))
    finally:
        del future  # an exception's traceback holds this frame


_all: "weakref.WeakSet[Workers]" = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    deadline = time.monotonic() + 1.0
    workers = list(_all)
    for each in workers:
        each.stop()
    for each in workers:
        each.join(max(0.0, deadline - time.monotonic()))


def _forget_all() -> None:
    for each in list(_all):
        each.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
