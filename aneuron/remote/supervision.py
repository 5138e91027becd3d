"""The engines of a pool, as those see them that use them, keep them, and start them.

Lives here: the protocols, what is known of an engine. Must not be here: what is done about it (supervisor.py,
shared.py, processes.py).
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aneuron.backends import Backend
from aneuron.backends.neuron.cores import has_started
from aneuron.backends.traits import traits_of
from aneuron.errors import DeviceError
from aneuron.remote.control import Channel, Handler
from aneuron.remote.division import Share, divide
from aneuron.remote.sources import Source
from aneuron.remote.starting import of_program, packed_one

STARTING, READY, DRAINING, RESTARTING, FAILED = "starting", "ready", "draining", "restarting", "failed"


@dataclass(frozen=True, slots=True)
class EngineState:
    """What is known of an engine; a new one after each change."""

    index: int
    pid: int | None
    incarnation: int
    """How often it was started: another number means that whatever the last one had is lost."""
    state: str  # "starting" | "ready" | "draining" | "restarting" | "failed"
    cores: tuple[int, ...]
    """The numbers of its cores that serve, as far as it has said."""
    error: str | None = None
    """Why it does not serve."""


class Supervision(Protocol):
    """The engines of a pool, to a process that calls them. On that one's loop."""

    shared: bool
    """Whether other processes use them too: sources need fingerprints then."""

    @property
    def engines(self) -> Sequence[EngineState]:
        """What is known of each."""

    async def start(self) -> None:
        """Start them; raises if one cannot be."""

    async def load(
        self, key: int, source: Source, given: Mapping[str, Any], min_cores: int | None = None
    ) -> dict[int, Any]:
        """Load a model on every engine. Raises what a start of it raises; no engine has it then."""

    async def swap(self, key: int, source: Source) -> dict[int, Any]:
        """Serve another model in its place, on all engines; if that fails, the old one serves on all."""

    async def change(self, key: int | None, **settings: Any) -> None:
        """Serve with other settings; of the pool, where no model is named."""

    async def unload(self, key: int) -> None:
        """Close a model; also one that is not there."""

    async def connect(self, engine: int) -> Any:
        """One end of a socket pair, whose other end the engine has. Raises `CoreFailed` if it is not ready."""

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have a function called after each change of `engines`; returns what ends that."""

    async def aclose(self, drain: bool = True) -> None:
        """End the engines, when they have finished what they have accepted, or at once. If cancelled, at once."""

    def abandon(self) -> None:
        """End them at once, without a loop; from any thread."""


class Spawned(Protocol):
    """An engine that was started."""

    pid: int | None
    channel: Channel
    ended: "asyncio.Future[str]"
    """How it has ended, in words; only then nothing of it is left."""

    def connect(self) -> tuple[Any, Any]:
        """The two ends of a link to it: a client's, and what it is to be sent."""

    def kill(self) -> None:
        """End it at once; from any thread, also if it has ended."""


class Spawner(Protocol):
    """What starts engines: processes (`Processes`), or whatever stands for them."""

    def spawn(
        self, index: int, share: Share, handlers: Mapping[str, Handler], on_lost: Callable[[Exception], None]
    ) -> Spawned:
        """Start one, on the running loop; returns at once."""


@dataclass(frozen=True)
class Plan:
    """What a pool's engines are."""

    shares: tuple[Share, ...]
    backend: Any  # pickled; the object itself where engines are in this process
    num_workers: int | None = None
    program: Mapping[str, Any] | None = None  # None: this one

    @classmethod
    def of(cls, backend: Backend, ids: Sequence[int], processes: int, num_workers: int | None) -> "Plan":
        """For cores of a backend, as they are counted here. May block.

        Raises `DeviceError` for fewer cores than engines, and for NeuronCores that this process has taken itself;
        `TypeError` for a backend that cannot be pickled.
        """
        traits = traits_of(backend)
        if backend.name == "neuron" and has_started():
            raise DeviceError(
                "the Neuron runtime has started in this process, which holds its cores until it ends: engines cannot "
                "have them. Load no model here; where only the runtime can count the cores, say NEURON_RT_VISIBLE_CORES"
            )
        shares = divide(
            ids, processes, os.environ, backend=backend.name, cores_per_device=traits.cores_per_device,
            global_id=traits.global_id,
        )  # fmt: skip
        return cls(shares, packed_one("backend", backend, of_program()), num_workers)
