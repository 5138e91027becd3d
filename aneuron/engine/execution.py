"""One batch on its way through a core: collate, execute, scatter.

Lives here: an execution as data, its steps, and what of it is found out once. Must not be here: asyncio, callers'
futures, threads and locks (threads.py, board.py), decisions.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch

from aneuron.backends import Backend, Core, Fault
from aneuron.engine.evidence import Evidence, Trials, snapshot
from aneuron.engine.loading import Loaded
from aneuron.engine.modes import OwnContext, execute_in_own, put_back
from aneuron.ownership import Owned
from aneuron.sched.call import Chunk
from aneuron.sched.filling import Batch
from aneuron.sched.sizes import ANY, Range
from aneuron.tensors import rows
from aneuron.tensors.outputs import Carried, Output, Unpad
from aneuron.tensors.rows import Finished
from aneuron.tensors.varied import identities, varies
from aneuron.tensors.verdicts import Seen

logger = logging.getLogger("aneuron")

INPUT = Fault.INPUT  # looked up for each execution
NOTABLE = 5e-5  # seconds: no less than it takes to copy half a megabyte
LARGE = 1 << 18  # bytes of a batch from which on its copies are not made on the loop: they would take some 50 us


class Submission(Protocol):
    """An execution in a device's hands (onloop.py). The device ends it or somebody gives it up, whoever is first."""

    def done(self, output: Any, error: BaseException | None) -> None:
        """What the device says; without effect once it was given up."""

    def drop(self) -> bool:
        """Give it up; False if it is done."""


class Common:
    """What all executions of a run of a model have in common. Written to before it serves, by nobody later."""

    __slots__ = (
        "backend", "begins", "context", "dim", "evidence", "guard", "least", "post", "sizes", "trials", "unpad",
    )  # fmt: skip

    def __init__(
        self,
        backend: Backend,
        dim: int,
        unpad: Unpad | None,
        evidence: Evidence,
        sizes: Mapping[int, Sequence[int]],
        guard: AbstractContextManager[Any],
        post: "Callable[[Execution], None]",
        context: OwnContext | None = None,
        takes: Range = ANY,
    ) -> None:
        self.backend = backend
        self.dim = dim
        self.unpad = unpad  # what of the outputs is to be cut back to each call's length
        self.evidence = evidence  # what of them has rows
        self.sizes = sizes  # the compiled ones, by bucket; none where any number will do
        self.guard = guard  # held while two workers agree about one call
        self.post = post  # to the loop
        self.context = context  # to execute in, where it is not that of the threads
        self.least = takes.least  # rows, where it is not compiled for so many: fewer are padded
        self.trials = takes.trials()
        self.begins: Callable[[Sequence[Chunk]], None] | None = None  # is told of chunks that begin to execute


class Execution:
    """One batch on its way through a core: `prepare`, `begin`, `execute`, `finish`, in this order.

    Between two steps it belongs to one thread: that which has taken it from the board, then the loop, to which it is
    posted. `error` or `finished` is the outcome; `begun` tells the loop that the batch can no longer be revoked. Who
    has it in hand, and for what, changes with the board's lock.
    """

    owned = Owned(
        set_with_lock=("abandoned", "lane", "loaded", "may_be_stolen"),
        free=(
            "chunks", "rows", "prepared", "output", "begun", "over", "failed", "watch", "started", "ended", "posted",
            "since", "preparing", "copied", "error", "fault", "finished", "submission", "size", "_cut", "_inputs",
            "_template",
        ),
        via="batch.scheduler",
    )  # fmt: skip

    __slots__ = (
        "_cut", "_inputs", "_template", "abandoned", "batch", "begun", "chunks", "common", "copied", "ended", "error",
        "failed", "fault", "finished", "lane", "loaded", "may_be_stolen", "output", "over", "posted", "prepared",
        "preparing", "rows", "since", "size", "started", "submission", "watch",
    )  # fmt: skip

    def __init__(self, batch: Batch, loaded: Loaded, common: Common) -> None:
        self.batch = batch
        self.chunks: Sequence[Chunk] = batch.chunks
        self.rows = batch.rows  # that callers sent
        self.size = batch.size if batch.chunks[0][0].cut.shared else None  # rows to pad to; None = as many as there are
        self.loaded, self.common = loaded, common
        self.prepared: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.output: Any = None
        self.begun = self.over = self.failed = False
        self.abandoned = False  # given up as hung: whatever comes of it is too late
        self.lane: Any = None  # whose thread has it in hand; nothing of it is known here
        self.may_be_stolen = False  # by another lane: it waits behind another execution
        self.submission: Submission | None = None  # while it is in the device's hands: no thread waits for it
        self.watch: Callable[[Execution], AbstractContextManager[Any]] | None = None  # around it, if calls are observed
        self.started = self.ended = self.posted = 0.0
        self.since = 0.0  # when the core began with what it runs now: this, or what its output has to be compared with
        self.preparing = 0.0  # seconds
        self.copied = 0  # bytes that were collated and scattered, seen at a glance, where that took a notable time
        self.error: BaseException | None = None
        self.fault = INPUT
        self.finished: Sequence[Finished] = ()
        self._cut: Carried | None = None
        self._inputs: Sequence[Sequence[Any]] = ()  # the callers' tensors, and what they stand in
        self._template: Any = None

    @property
    def takes_much(self) -> bool:
        """Whether its inputs are too large to be collated on the loop."""
        call = self.chunks[0][0]
        leaves = call.leaves or ()
        return sum([leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor)]) * self.rows > LARGE * call.rows

    @property
    def gives_much(self) -> bool:
        """Whether its output is too large to be scattered on the loop."""
        output = self.output
        return _bytes(output.leaves if isinstance(output, Output) else output) > LARGE

    @property
    def core(self) -> Core:
        """What is to execute it."""
        return self.loaded.core(self.batch.size, self.batch.bucket)

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
        if self.rows < self.common.least and self.size is None and self.chunks[0][0].cut.shared:
            self.size = self.common.least
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
        if self.begun and self.common.begins is not None:
            self.common.begins(self.chunks)
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
            self._fail(error)
        self._end(clock)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], clock: Callable[[], float]) -> None:
        self.output = self.core.execute(args, kwargs)
        self.ended = clock()  # what else is executed, to know what the output means, counts for nobody
        if not self._is_plain():
            self._understand(clock)

    def submit(self, submission: Submission) -> None:
        """Hand it to the core, in place of `execute`; `take_result` is to follow when that has said that it is done."""
        assert self.prepared is not None
        args, kwargs = self.prepared
        self.prepared, self.submission = None, submission
        self.core.submit(args, kwargs, submission.done)  # type: ignore[attr-defined]

    def take_result(self, output: Any, error: BaseException | None, clock: Callable[[], float]) -> bool:
        """What a submission has ended with; False if nobody knows yet what that means: `understand` is to follow."""
        self.submission = None
        if error is not None:
            self._fail(error)
        else:
            self.output, self.ended = output, clock()
            try:
                if not self._is_plain() and not self._understand(clock, may_execute=False):
                    return False
            except BaseException as failure:
                self._fail(failure)
        self._end(clock)
        return True

    def understand(self, clock: Callable[[], float]) -> None:
        """Find out what of the output is whose, in a thread of the core: it may take further executions."""
        try:
            self._understand(clock)
        except BaseException as error:
            self._fail(error)
        self._end(clock)

    def let_go(self, clock: Callable[[], float]) -> None:
        """It was given up before its next step: keep nothing of it, whoever keeps this."""
        self.prepared = self.output = None
        self._end(clock)

    def _end(self, clock: Callable[[], float]) -> None:
        self.ended = self.ended or clock()
        self._inputs, self._template = (), None
        self.over = True

    def _is_plain(self) -> bool:
        """Whether the output is known to be a tensor with a row for each row."""
        common, call, value = self.common, self.chunks[0][0], self.output
        return (
            type(value) is torch.Tensor
            and not (self.batch.bucket and common.unpad is not None)
            and (call.cut.shared, call.structure, value.ndim) in common.evidence.plain
        )

    def _understand(self, clock: Callable[[], float], may_execute: bool = True) -> bool:
        """Find out what of the output is whose; False if that takes executions, and there may be none."""
        put_back()
        common, call, bucket = self.common, self.chunks[0][0], self.batch.bucket
        size, packing = self.size or self.rows, call.cut.shared
        if not packing and call.cut.count(call.rows) == 1:
            output = Output(self.output, None, common.dim, rows.base_of(call))  # all of it is the call's
        elif may_execute:
            lone = self.rows == 1 and not varies(self._inputs[0])
            first = partial(self._as_evidence, clock)
            output = common.evidence.look(self.output, call.structure, size, packing, lone, first)
        elif (known := common.evidence.known(self.output, call.structure, size, packing)) is not None:
            output = known
        else:
            return False
        if bucket and common.unpad is not None:
            output.asked = rows.base_of(call)
            self._cut = common.unpad.known(output, bucket)
            if self._cut is None:
                if not may_execute:
                    return False
                self._cut = self._carried(common.unpad, output)
        self.output = output
        return True

    def _as_evidence(self, clock: Callable[[], float]) -> tuple[Seen, Trials]:
        """What was executed, and what else can be."""
        common, bucket, sizes = self.common, self.batch.bucket, self.common.sizes.get(self.batch.bucket)
        size = self.size or self.rows
        inputs = rows.columns(self.chunks, self._inputs, self.rows, common.dim, bucket)
        rows.check_unmodified(self.chunks, self._inputs, self._template)
        numbers = identities(inputs, common.dim)
        again = self._inputs, self._template

        def execute(columns: list[Any], count: int) -> Any:
            core = self.core if sizes is None or count == size else self.loaded.core(count, bucket)
            return execute_in_own(core, *rows.arguments(again[1], columns))

        def go_on() -> None:
            self.since = clock()

        seen = Seen((*numbers, *numbers[-1:] * (size - self.rows)), snapshot(self.output))
        return seen, Trials(inputs, common.dim, sizes or common.trials, execute, go_on, lambda: self.abandoned)

    def _carried(self, unpad: Unpad, output: Output) -> Carried:
        """What of the output is to be cut back, which nobody knows: one more run in another bucket tells."""
        dim, bucket, call = self.common.dim, self.batch.bucket, self.chunks[0][0]
        size, packing = self.size or self.rows, call.cut.shared
        found = self.loaded.other(self.batch.size, bucket)
        if found is None:
            return unpad.learn(output, bucket)
        core, other = found
        args, kwargs = rows.collate(self.chunks, self._inputs, self._template, size, dim, other)
        value = execute_in_own(core, args, kwargs)
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
        self.output = None
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
