"""One core: the queue of batches bound to it that have not begun, its loaded shapes, what is known of its speed.

Must not be here: callers' futures (futures.py), decisions (sched/scheduler.py), how a thread works (threads.py).
"""

import asyncio
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from aneuron.backends import Backend, Core
from aneuron.engine.evidence import Evidence, Trials, identities
from aneuron.engine.threads import Execution, Take, Within, Workers, in_own_modes, warm_up
from aneuron.program import Shape
from aneuron.sched.filling import Batch
from aneuron.sched.scheduler import rounded
from aneuron.stats import CoreCounters, Recent, ServiceTimes
from aneuron.tensors.outputs import Output, Unpad, kind
from aneuron.tensors.rows import Call
from aneuron.tensors.signature import Compiled
from aneuron.tensors.verdicts import Seen

logger = logging.getLogger("aneuron")

COPYING_PAYS = 1 << 20  # bytes of a batch to copy, in and out, from which on a lane has a second thread
TICK = 0.001  # seconds: event loops' timers are no finer


@dataclass(frozen=True, slots=True)
class Load:
    """What every lane loads, and how the batches for it are laid out."""

    models: Mapping[Shape, Any]
    dim: int
    compiled: Compiled | None  # the example to warm up with
    packing: bool  # whether calls share batches
    dynamic: bool  # whether cores may cut batches, where that is what they do
    evidence: Evidence  # what of the outputs has rows
    unpad: Unpad | None = None  # which outputs carry the length of their bucket
    context: Callable[[], AbstractContextManager[Any]] | None = None  # around each execution


class Lane:
    """One core and its threads. Its queue and what is in flight are guarded by the lock of `Lanes`."""

    def __init__(
        self, index: int, core_id: int, backend: Backend, workers: Workers, counters: CoreCounters, times: ServiceTimes
    ) -> None:
        self.index = index
        self.core_id = core_id
        self.queue: asyncio.Queue[Batch[Call]] = asyncio.Queue()  # bound by the loop, not taken by a thread yet
        self.in_flight: list[Execution] = []
        self.staged: list[Execution] = []  # those that are prepared and wait for the core
        self.counters = counters
        self.times = times  # of this run's model
        self.workers = workers
        self.concurrent = False
        self.out = False  # of service, for good: what serves later on this core is another lane
        self.hung = False  # a thread of it does not come back
        self.run: object = None  # of the model, that it belongs to
        self.warming = False  # loaded, and not warmed up
        self.kinds: dict[Shape, Hashable] = {}  # of the outputs that the example gave
        self.take: Take  # how a thread gets its next execution; set by `Lanes`
        self.ended = 0.0  # when the last execution did
        self.since = 0.0  # when the oldest one in flight came to be the oldest
        self._backend = backend
        self._cores: dict[Shape, Core] = {}
        self._preparing = Recent()  # seconds
        self._slots = 1
        self._staging = False  # whether a second thread prepares the next batch meanwhile

    def load(self, load: Load) -> None:
        """Load every shape and run the example twice on each. Blocking, in a worker thread."""
        loaded: dict[tuple[int, int | None], Core] = {}
        for (size, bucket), model in load.models.items():
            with _naming(size, bucket, len(load.models)):
                key = (id(model), size)
                core = loaded.get(key) or self._load_one(model, size, load)
                loaded[key] = self._cores[size, bucket] = core
        self.concurrent = all(core.concurrent for core in loaded.values())
        if self.concurrent:
            self.workers.let_in_together()
        if load.compiled is not None:
            self.warming = True
            self._warm_up(load, load.compiled)
            self.warming = False

    def own(self) -> None:
        """Show what this run makes of the core from now on, and no other run of the model."""
        self.counters.owner, self.counters.times = self.run, self.times

    def show(self, state: str) -> None:
        """Its state, for the statistics: of two runs of a model on a core, the one that owns it shows its own."""
        if self.counters.owner is self.run:
            self.counters.state = state

    def _load_one(self, model: Any, size: int | None, load: Load) -> Core:
        cuts = {"dynamic_batching": load.dynamic} if getattr(self._backend, "cuts_batches", False) else {}
        core = self._backend.load(model, self.core_id, size, **cuts)
        return core if load.context is None else Within(core, load.context)

    def _warm_up(self, load: Load, compiled: Compiled) -> None:
        clock, asked = self.workers.clock, compiled.structure
        values: dict[Shape, Any] = {}
        seen: list[Seen] = []  # the executions in the first bucket
        wanted = load.packing and load.evidence.wants(asked)
        _, bucket = next(iter(load.models))
        numbers = identities(compiled.columns(bucket), load.dim) if wanted else []
        for shape in load.models:
            with _naming(*shape, len(load.models)):
                first, value, seconds = warm_up(self._cores[shape], compiled, *shape, clock, wanted)
                rows = shape[0] or compiled.rows
                self.times.learn((shape[0] or rounded(rows), shape[1]), seconds, clock())
                values[shape] = value
                if wanted and shape[1] == bucket:
                    order = tuple(numbers[row % compiled.rows] for row in range(rows))
                    seen += [Seen(order, first), Seen(order, value)]
        if wanted:
            load.evidence.take(seen, asked, True, self._trials(load, compiled, bucket))
        self._learn(load, compiled, values)

    def _trials(self, load: Load, compiled: Compiled, bucket: int) -> Trials:
        """What else of the example can be executed."""
        compiled_sizes = [size for size, of in load.models if of == bucket and size is not None]

        def execute(columns: list[Any], count: int) -> Any:
            core = self._cores[count if compiled_sizes else None, bucket]
            return in_own_modes(core, *compiled.arguments(columns))

        return Trials(compiled.columns(bucket), load.dim, compiled_sizes or None, execute)

    def _learn(self, load: Load, compiled: Compiled, values: Mapping[Shape, Any]) -> None:
        """Note what the outputs are like, and what in them carries the length."""
        outputs: dict[int | None, tuple[Output, int]] = {}  # by size, that of the first bucket
        for (size, bucket), value in values.items():
            with _naming(size, bucket, len(load.models)):
                output = load.evidence.marked(value, compiled.structure, size or compiled.rows, load.packing)
                output.asked = compiled.base
                self.kinds[size, bucket] = kind(output)
                if not load.packing:
                    continue
                one, of = outputs.setdefault(size, (output, bucket))
                if load.unpad is not None and load.unpad.known(output, bucket) is None:
                    if one is not output:
                        load.unpad.learn(output, bucket, one, of)
                    elif len({bucket for _, bucket in load.models}) == 1:
                        load.unpad.learn(output, bucket)

    def other(self, size: int | None, bucket: int) -> tuple[Core, int] | None:
        """Another bucket, and the core to execute it."""
        return next(((core, b) for (s, b), core in self._cores.items() if s == size and b != bucket), None)

    def core(self, size: int | None, bucket: int) -> Core:
        """The core loaded with the shape of a batch."""
        return self._cores[size, bucket]

    def widen(self, slots: int, crowded: bool) -> float | None:
        """Serve `slots` slots; the lead with which the loop may bind batches while the lane executes.

        A concurrent core has a thread for each slot, which are kept busy. Another has one thread, which takes its
        next batch when the last has ended; where copying takes long a second prepares the next batch meanwhile. So it
        is where all cores together are faster than Python: there more threads only wait for one another.
        """
        self._slots = slots
        if self.concurrent and not crowded:
            self.workers.grow(max(1, slots))
            return float("inf")
        self.workers.grow(1)
        return self.lead if slots > 1 and self._staging else None

    @property
    def pace(self) -> float:
        """Executions a second, of the shape that takes longest; 0 while that is not known."""
        slowest = max(self.times.medians().values(), default=0.0)
        return 1 / slowest if slowest else 0.0

    @property
    def lead(self) -> float:
        """Twice the time to prepare a batch."""
        return 2 * self._preparing.median + TICK

    def copied(self, size: int, preparing: float, now: float) -> bool:
        """Note how many bytes of a batch were copied, and the seconds to prepare it; whether `lead` has changed.

        With small rows the handing over of the interpreter between two threads costs more than it saves. Bytes tell,
        not seconds: on a busy machine most of these are waiting for the interpreter, which a second one makes worse.
        """
        if not self._staging and (size < COPYING_PAYS or self.concurrent or self._slots < 2):
            return False
        self._preparing.add(preparing, now)
        if not self._staging:
            self._staging = True
            with suppress(RuntimeError):  # no more threads to be had: then the one does both
                self.workers.grow(2)
        return True

    def stop(self, closed: Callable[[], None]) -> None:
        """Let the threads end; the last one closes the core and says `closed`."""
        self.workers.stop(lambda: self._close(closed))

    def _close(self, closed: Callable[[], None]) -> None:
        cores = {id(core): core for core in self._cores.values()}
        self._cores = {}
        try:
            for core in cores.values():
                try:
                    core.close()
                except BaseException:
                    logger.warning("core %d did not close", self.core_id, exc_info=True)
        finally:
            closed()


@contextmanager
def _naming(size: int | None, bucket: int, of: int) -> Iterator[None]:
    """Say in an error which of several models it came from."""
    try:
        yield
    except Exception as error:
        if of > 1:
            rows = "any number of" if size is None else size
            error.add_note(f"aneuron: with the model for {rows} rows" + (f", bucket {bucket}" if bucket else ""))
        raise
