"""The life of a model in the engines of a pool: loaded there, swapped there.

Lives here: what differs from the life of one in this process. Must not be here: the rest of it (lifecycle.py), calls
(client.py), processes (supervisor.py).
"""

import logging
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from aneuron.engine.dispatcher import in_a_thread
from aneuron.errors import Closed, DeviceError
from aneuron.lifecycle import Lifecycle
from aneuron.pool import Pool
from aneuron.program import Program, Settings
from aneuron.remote.client import RemoteRun
from aneuron.remote.engines import Engines
from aneuron.remote.sources import Source
from aneuron.sched.scheduler import Rules
from aneuron.signature import TensorSpec
from aneuron.stats import Statistics

logger = logging.getLogger("aneuron")

_OF_THE_POOL = ("pool", "device_ids", "backend", "num_workers")


class RemoteLifecycle(Lifecycle):
    """Of one model on a pool in processes."""

    def __init__(self, program: Program, settings: Settings, pool: Pool, given: Mapping[str, Any]) -> None:
        super().__init__(program, settings, pool)
        self._last: RemoteRun | None = None  # whose numbers outlive it
        self._described: tuple[TensorSpec, ...] | None = None  # its outputs, by the first engine
        self._given = {name: value for name, value in given.items() if name not in _OF_THE_POOL}

    async def _load(self, engines: Any) -> Any:
        assert isinstance(engines, Engines)
        settings, supervision = self.settings, engines.supervision
        given = self._given | {
            "split_size": settings.split_size,
            "max_pending": settings.max_pending,
            "set_dynamic_batching": settings.packing,
            "weight": settings.weight,
        }
        cores = len(engines.core_ids)
        if settings.min_cores is not None and settings.min_cores > cores:
            raise DeviceError(f"min_cores={settings.min_cores}, and there are {cores} cores to start on")
        source = await self._source(engines, self.program)
        if self._last is not None and self._last.dispatcher is engines:
            await self._last.left()
        loaded = await supervision.load(self.key, source, given, settings.min_cores)
        try:
            found = list(loaded.values())
            facts = found[0]
            self.program.batch_size = facts.batch_size
            rules = Rules(
                cores=sum(each.loaded for each in found),
                batch_size=facts.batch_size,
                preferred=facts.preferred,
                split_size=settings.split_size,
                packing=facts.packing,
                max_pending=settings.room,
                max_delay=settings.max_delay,
                by_positions=settings.by_positions,
                most=facts.most,
            )
            sizes = {bucket: SimpleNamespace(sizes=list(each)) for bucket, each in facts.sizes.items()}
            run = RemoteRun(engines, self.key, rules, sizes, settings.dim, self.counters, settings)
            run.settled_with(settings)
            await engines.connected()
            await engines.refresh()  # who starts it may ask for its statistics
            self._last, self._described = run, facts.outputs
        except BaseException:
            engines.later(supervision.unload(self.key), "a model was not closed in its engines")
            raise
        return run

    async def _source(self, engines: Engines, program: Program) -> Source:
        """The model, as engines can open it."""
        fingerprint = engines.supervision.shared
        make = engines.traits.workers
        return await in_a_thread(lambda: Source.of(program.source, fingerprint=fingerprint), make)

    def _outputs(self, run: Any) -> tuple[TensorSpec, ...] | None:
        return self._described

    def statistics(self) -> Statistics:
        """The frozen snapshot of now; of engines that were left, what they had said last."""
        run: Any = self.run
        if run is None:
            return self.counters.snapshot(0, 0) if self._last is None else self._last.closed()
        return run.statistics()  # type: ignore[no-any-return]

    def _say_started(self, what: str, run: Any, began: float) -> None:
        states = run.dispatcher.supervision.engines
        logger.info(
            "%s in %d engine%s with %d cores (pids %s); %.2f s",
            what, len(states), "s" * (len(states) != 1), run.rules.cores,
            ", ".join(str(state.pid) for state in states), time.monotonic() - began,
        )  # fmt: skip

    async def _load_other(self, old: Any, program: Program, go: Any) -> None:
        """Have all engines serve it: they replace the other together."""
        await old.dispatcher.supervision.swap(self.key, await self._source(old.dispatcher, program))

    async def _replace(self, old: Any, new: None, program: Program, began: float) -> None:
        current: Any = self.run
        if current is not old or not current.serving:
            raise Closed("the model was closed while it was being swapped")
        program.batch_size = self.program.batch_size
        self.program = program
        self._say_started("swapped", old, began)
