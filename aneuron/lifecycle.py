"""The life of a model: started, swapped, drained, aborted.

Lives here: which run serves, who waits for a start, what a close means for them. Must not be here: what is loaded
(program.py), lanes and threads (pool.py, engine/), calls (parallel.py).
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from aneuron._native import why_pure_once
from aneuron.engine.comparing import without_example
from aneuron.engine.dispatcher import FORKED, Dispatcher, in_a_thread
from aneuron.engine.evidence import Evidence
from aneuron.engine.loading import Load
from aneuron.engine.run import Run
from aneuron.errors import Closed, CoreFailed, DeadlineExceeded, DeviceError, ShapeError
from aneuron.pool import Pool
from aneuron.program import Program, Settings
from aneuron.sched.call import Limit, Rest
from aneuron.sched.scheduler import Rules
from aneuron.sched.sizes import ANY
from aneuron.signature import Signature, TensorSpec, inputs_of
from aneuron.stats import Counters, Statistics
from aneuron.tensors.outputs import Unpad

logger = logging.getLogger("aneuron")

CLOSED = "the model is closed; start() opens it again"


class _Start:
    """A start in progress, and how many wait for it."""

    def __init__(self) -> None:
        self.task: asyncio.Task[Run] | None = None
        self.waiters = 0

    @property
    def over(self) -> bool:
        """Whether there is nothing to wait for: a task that is cancelled before its first step cannot say so itself."""
        return self.task is None or self.task.done()


class Lifecycle:
    """Of one model on a pool: there is no run, one that starts, one that serves, or one that is being closed.

    On the pool's loop. `closed` says that only `start` opens the model, not the next call.
    """

    def __init__(self, program: Program, settings: Settings, pool: Pool) -> None:
        self.run: Run | None = None  # that serves, or is being closed
        self.retired: dict[Run, asyncio.Task[None]] = {}  # of models that were swapped, with calls left
        self.program = program
        self.settings = settings
        self.pool = pool
        self.closed = False
        self.counters = Counters()
        self._why_closed = CLOSED
        self._starting: _Start | None = None
        self._closings = 0  # how often it has been closed
        self._swapping = False
        self.key = pool.add(self)

    @property
    def state(self) -> str:
        """In a word."""
        if self.ready:
            return "ready"
        return "closed" if self.closed else "starting" if self._starting else "not started"

    @property
    def ready(self) -> bool:
        """Whether calls are served, by as many cores as were asked for."""
        run = self.run
        if run is None or not run.serving or run.loop.is_closed():
            return False
        return run.recovery.in_service >= (self.settings.min_cores or 1)

    def signature(self) -> Signature:
        """What the example says of the inputs, and the cores that serve of the outputs."""
        said = inputs_of(self.settings.example)
        return said if self.run is None else replace(said, outputs=self._outputs(self.run))

    def _outputs(self, run: Any) -> tuple[TensorSpec, ...] | None:
        """What a run has found out of them."""
        return next((loaded.outputs for loaded in run.loaded if loaded.outputs is not None), None)

    def statistics(self) -> Statistics:
        """The frozen snapshot of now, from any thread."""
        run = self.run
        return self.counters.snapshot(0, 0) if run is None else run.statistics(list(self.retired))

    def change(self, **settings: Any) -> None:
        """Serve with other settings from now on, by their names; checked. First they are set, then it is looked who
        serves: either whoever sets them finds the run, or who starts it finds them.
        """
        for name, value in settings.items():
            setattr(self.settings, name, value)
        run = self.run
        if run is not None:
            run.follow(self.settings)

    # Starting.

    async def start(self) -> None:
        """Open, also after a close."""
        run = self.run
        if run is not None and not run.serving and not run.loop.is_closed():
            raise Closed(run.why_closed)
        self.pool.check_open()
        self.closed = False
        await self.started()

    async def started(self) -> Run:
        """The run that serves on this loop, started if need be."""
        closings = self._closings
        while True:
            self.check_loop()
            if self.run is not None:
                return self.run
            if self.closed or self._closings != closings:
                raise Closed(self._why_closed)
            start = self._starting
            if start is None or start.over:
                start = self._starting = _Start()
                start.task = asyncio.create_task(self._start(start), name="aneuron start")
            task = start.task
            assert task is not None
            start.waiters += 1
            try:
                await asyncio.wait({task})
            except BaseException:
                if start.waiters == 1 and not task.cancel():  # it has just ended
                    self._let_go(task)
                raise
            finally:
                start.waiters -= 1
            if not task.cancelled():
                try:
                    return task.result()
                finally:
                    del task, start  # an exception's traceback holds this frame
            # By a close, or because all who waited had left when we came.

    def _let_go(self, task: "asyncio.Task[Run]") -> None:
        """A start has succeeded, and nobody wants it any more."""
        if not task.cancelled() and task.exception() is None and not task.result().futures.calls:
            task.result().abort()
            self.run = None

    async def started_within(self, timeout: Limit) -> tuple[Run, Limit]:
        """The run that serves, and what is left of the time."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(timeout) as scope:
                run = await self.started()
        except TimeoutError:
            if not scope.expired():
                raise  # the model's own, from loading
            raise DeadlineExceeded(
                f"{timeout!s} has passed while the model was being loaded; start() it before it serves"
            ) from None
        return run, Rest.of(timeout, gone=loop.time() - began)

    def check_loop(self) -> None:
        """An instance belongs to the loop that started it, until it is closed or that loop is; and to its process."""
        run, start = self.run, self._starting
        if run is not None and run.dispatcher.forked:
            raise RuntimeError(FORKED)
        loop = run.loop if run is not None else None
        if loop is None and start is not None and start.task is not None and not start.over:
            loop = start.task.get_loop()
        if loop is None or loop is asyncio.get_running_loop():
            return
        if not loop.is_closed():
            raise RuntimeError(OTHER_LOOP)
        if run is not None:
            run.stop()  # its loop has gone without closing it
        self.run = self._starting = None

    async def _start(self, start: _Start) -> Run:
        began = time.monotonic()
        try:
            async with self.pool.lanes(self.program.given) as dispatcher:
                run = await self._load(dispatcher)
                self._serve(run, self.program)
            self._say_started("started", run, began)
            return run
        finally:
            if self._starting is start:
                self._starting = None
            del start  # whose task has the exception whose traceback holds this frame

    async def _load(self, dispatcher: Dispatcher) -> Run:
        if self.settings.example is None and dispatcher.traits.cuts_batches:
            logger.warning(
                "there are no example_inputs: the cores cannot be warmed up before the model is ready; pass what "
                "it was traced with"
            )
        if self.settings.example is None and dispatcher.traits.computes_in is not None:
            without_example(dispatcher.traits.computes_in)
        opened = await self._ask(dispatcher, self.program)
        ids, min_cores = dispatcher.core_ids, self.settings.min_cores
        if min_cores is not None and min_cores > len(ids):
            raise DeviceError(f"min_cores={min_cores}, and there are {len(ids)} cores to start on: {list(ids)}")
        run = self._make_run(dispatcher, self.program)
        await run.start(min_cores or len(ids))
        del opened
        return run

    async def _ask(self, dispatcher: Dispatcher, program: Program) -> list[Any]:
        """Have the backend say what it knows of a program; raises if it cannot run it. See `Program.ask`."""
        example, backend, traits = self.settings.example, dispatcher.backend, dispatcher.traits
        rows = example.rows if example is not None else None
        return await in_a_thread(lambda: program.ask(backend, traits, rows), traits.workers)

    def _make_run(self, dispatcher: Dispatcher, program: Program, beside: bool = False) -> Run:
        settings, traits = self.settings, dispatcher.traits
        # Cores that cut batches themselves are not given those of several calls while nobody knows to how many rows.
        packing = settings.packing and (program.batch_size is not None or not traits.cuts_batches)
        rules = Rules(
            cores=len(dispatcher.core_ids),
            batch_size=program.batch_size,
            preferred=program.takes.clip(traits.preferred_rows),
            split_size=settings.split_size,
            packing=packing,
            max_pending=settings.room,
            max_delay=settings.max_delay,
            by_positions=settings.by_positions,
            most=program.takes.most,
        )
        load = Load(
            program.by_shape(settings.dim),
            program.warm(settings.dim, settings.example),
            settings.buckets is not None and settings.buckets.free,
            settings.dim,
            settings.example,
            packing,
            settings.packing,
            Evidence(
                settings.dim,
                settings.outputs,
                settings.check_rows and traits.probes,
                None if traits.computes_in is None else traits.computes_in.dtype,
            ),
            traits.cuts_batches,
            traits.wants_example,
            Unpad(settings.buckets) if settings.buckets is not None else None,
            settings.context,
            traits.computes_in,
            ANY if program.batch_size is not None else program.takes,
        )
        sizes = program.sizes(settings.dim) or (program.steps(rules.preferred) if packing else {})
        return Run(
            dispatcher, rules, load, sizes, self.counters, program.times, settings.exec_timeout, beside,
            settings.weight,
        )  # fmt: skip

    def _serve(self, run: Run, program: Program) -> None:
        """Serve with a run that is loaded, from the next call on."""
        try:
            run.serve()
        except BaseException:  # no threads to be had
            run.stop()
            raise
        self.program, self.run = program, run
        run.follow(self.settings)  # what was set while it loaded; who changes them from now on has it follow them, too

    def _say_started(self, what: str, run: Run, began: float) -> None:
        """One line for the log, and one for the first model if the core is not compiled."""
        if why := why_pure_once():
            logger.info("the core runs as Python, more slowly: %s", why)
        ids = [loaded.core_id for loaded in run.loaded if run.recovery.health[loaded.index].serves]
        shapes = [
            ("1 row" if rows == 1 else f"{rows or 'any number of'} rows") + (f" of length {bucket}" if bucket else "")
            for rows, bucket in self.program.by_shape(self.settings.dim)
        ]
        if self.settings.buckets is not None and self.settings.buckets.free:
            shapes = [shapes[-1].replace("of length", "of any length up to")]
        logger.info(
            "%s on %d core%s of the %s backend (%s): %s; %.2f s%s",
            what, len(ids), "s" * (len(ids) != 1), run.dispatcher.backend.name, ", ".join(map(str, ids)),
            ", ".join(shapes), time.monotonic() - began,
            f"; the process has {memory}" if (memory := _resident()) else "",
        )  # fmt: skip

    # Swapping.

    async def swap(self, model: Any, go: Callable[[], Awaitable[None]] | None = None) -> None:
        """Serve with another model; see `AsyncDataParallel.swap`. When it is loaded, `go` is waited for before it
        serves; what that raises leaves the old one.
        """
        if self._swapping:
            raise RuntimeError("another swap is in progress; await it first")
        began = time.monotonic()
        program = self.program.like(model)
        self._swapping = True
        try:
            if self.run is None and self._starting is None:
                self.program = program
                return
            old = await self.started()
            new = await self._load_other(old, program, go)
        finally:
            self._swapping = False
        await self._replace(old, new, program, began)

    async def _load_other(self, old: Run, program: Program, go: Callable[[], Awaitable[None]] | None) -> Any:
        """Load what is to serve in place of a run."""
        new = await self._load_beside(old, program)
        if go is not None:
            try:
                await go()
            except BaseException:
                new.abort()
                raise
        return new

    async def _replace(self, old: Run, new: Any, program: Program, began: float) -> None:
        """Serve with it, and wait for the calls of the other."""
        if self.run is not old or not old.serving:
            new.abort()
            raise Closed("the model was closed while it was being swapped")
        drain = asyncio.get_running_loop().create_task(old.drain(), name="aneuron swap")
        self.retired[old] = drain  # before it is replaced: a thread that reads statistics must find it somewhere
        try:
            self._serve(new, program)
        except BaseException:
            drain.cancel()  # it has not begun
            del self.retired[old]
            raise
        drain.add_done_callback(lambda _: self._forget(old))
        new.take_over()
        self._say_started("swapped", new, began)
        await asyncio.shield(drain)

    def _forget(self, old: Run) -> None:
        """A run that was swapped has been drained."""
        self.retired.pop(old, None)
        old.abort()  # there is nothing left to, unless what drained it has died

    async def _load_beside(self, old: Run, program: Program) -> Run:
        """A run of another program on the same cores; raises if a core that serves has not loaded it."""
        opened = await self._ask(old.dispatcher, program)
        dim = self.settings.dim
        if set(program.by_shape(dim)) != set(self.program.by_shape(dim)):
            raise ShapeError(
                f"the new model is compiled for {sorted(program.by_shape(dim), key=str)} (rows, bucket), the one that "
                f"serves for {sorted(self.program.by_shape(dim), key=str)}; they must be the same"
            )
        new = old.context.copy().run(self._make_run, old.dispatcher, program, beside=True)
        try:
            await new.start(max(1, old.recovery.in_service))
            del opened
        except Exception as error:
            if any(loaded.warming for loaded in new.loaded):
                raise ShapeError(f"the new model does not take example_inputs as the old one does: {error}") from error
            raise
        if differing := _difference(new, old):
            new.abort()
            raise differing
        return new

    # Closing.

    async def aclose(self, why: str | None = None) -> None:
        """Drain; see `AsyncDataParallel.aclose`."""
        self.check_loop()
        self.close_door(why)
        run = self.run
        if run is None:
            return
        try:
            await run.drain()
            while self.retired:  # by a swap
                await asyncio.wait(list(self.retired.values()))
        except BaseException:
            self._abort_all(run)
            raise
        finally:
            if self.run is run:
                self.run = None

    def abort(self, why: str | None = None) -> None:
        """End what has not begun; see `AsyncDataParallel.abort`."""
        self.check_loop()
        self.close_door(why)
        run, self.run = self.run, None
        if run is not None:
            self._abort_all(run)

    def _abort_all(self, run: Run) -> None:
        for each in (run, *self.retired):
            each.abort()

    def close_door(self, why: str | None) -> None:
        """Accept no more calls; they are told why."""
        self.closed, self._why_closed = True, why or CLOSED
        if self.run is not None:
            self.run.refuse(why)
        self._closings += 1
        if self._starting is not None and self._starting.task is not None:
            self._starting.task.cancel()

    def let_go(self) -> bool:
        """Nobody holds the model any more: end its threads; whether there were any."""
        run = self.run
        if run is None or run.dispatcher.forked:
            return False
        for each in (run, *self.retired):
            if each.loop.is_running():  # others may be served there; and whoever collects garbage may hold the lock
                each.dispatcher.call_loop(each.stop)
            else:
                each.stop()
        return True


def _difference(new: Run, old: Run) -> Exception | None:
    """Why a run cannot take the place of another on the same cores; None if it can."""
    for loaded, other, health, before in zip(
        new.loaded, old.loaded, new.recovery.health, old.recovery.health, strict=True
    ):
        if before.serves and not health.serves:
            return CoreFailed(f"core {loaded.core_id} has not loaded the new model, see the log", loaded.core_id)
        for shape, kind in other.kinds.items() if health.serves else ():
            if loaded.kinds.get(shape) != kind:
                return ShapeError(
                    f"a row of example_inputs gives {loaded.kinds.get(shape)} with the new model (structure, "
                    f"shapes and dtypes), and {kind} with the one that serves"
                )
    return None


OTHER_LOOP = (
    "this model runs on another event loop, and belongs to it until aclose(). From a thread that this loop has started "
    "(a handler without async) call anyio.from_thread.run(model, x), from any other, Flask's say, portal.call(model, "
    "x) of one anyio.from_thread.start_blocking_portal() in which the model runs (docs/guides/web.md); or close it "
    "there first, or make one instance for each loop"
)


def _resident() -> str:
    """The memory that the process has, in words; nothing where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return f"{int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20:.0f} MiB of memory"
    except (OSError, ValueError, IndexError, AttributeError):
        return ""
