"""How many calls a replica is to have, what it asks Ray for, and what its autoscaler is told.

Lives here: numbers. Must not be here: Ray, a clock, the model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aneuron import Statistics

ROWS = 64  # of a batch, that are provided for where nobody has said anything
LEAST = 256  # calls, whatever the cores are

Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Resources:
    """What each replica has of its machine: whole NeuronCores, GPUs (a part of one is fine), CPUs; None: not said."""

    neuron_cores: int | None = None
    num_gpus: float | None = None
    num_cpus: float | None = None

    @property
    def cores(self) -> int:
        """The cores that a model finds there, if each GPU is one.

        >>> Resources(neuron_cores=2, num_cpus=4).cores, Resources(num_gpus=0.5).cores, Resources().cores
        (2, 1, 1)
        """
        return max(1, math.ceil(self.neuron_cores or self.num_gpus or self.num_cpus or 1))

    def actor_options(self, given: Mapping[str, Any] | None) -> Options:
        """Ray's options of a replica, with these in them.

        >>> Resources(neuron_cores=2, num_cpus=4).actor_options({"memory": 2**30})
        {'memory': 1073741824, 'num_cpus': 4, 'resources': {'neuron_cores': 2}}
        """
        options: Options = dict(given or {})
        own: Options = dict(options.get("resources") or {})
        places = (("num_gpus", self.num_gpus, options), ("num_cpus", self.num_cpus, options))
        for name, value, place in (*places, ("neuron_cores", self.neuron_cores, own)):
            if value is None:
                continue
            whole = name == "neuron_cores"
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r:.80}: expected a number, 0 or more; None leaves it to Ray")
            if whole and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: expected an int of at least 1; NeuronCores are given out whole")
            if place.get(name, value) != value:
                raise ValueError(f"{name}={value!r}, and ray_actor_options say {place[name]!r}; say it once")
            place[name] = value
        return options | ({"resources": own} if own else {})


def ongoing(cores: int) -> int:
    """Calls that a replica takes at a time, by the number of its cores, if nobody says otherwise.

    Enough of one row for two batches of 64 in flight on each core, and a third that is being filled. Not many more:
    what waits in a replica dies with it, and cannot go to another that has less to do.

    >>> ongoing(1), ongoing(24)
    (256, 4608)
    """
    return max(LEAST, 3 * ROWS * cores)


def needed(in_flight: int, cores: int, batch_size: int) -> int:
    """One-row calls without which batches are not full: those in flight, and one for each core that is being filled.

    >>> needed(in_flight=48, cores=24, batch_size=8)
    576
    """
    return (in_flight + cores) * batch_size


def scaling(given: Any, num_replicas: Any, most: int) -> Any:
    """The autoscaling configuration of a deployment: Serve's own target, two calls a replica, is for models that run
    one at a time.

    >>> scaling({"max_replicas": 4}, None, most=256)
    {'target_ongoing_requests': 85, 'max_replicas': 4}
    """
    if isinstance(given, Mapping) or (given is None and num_replicas == "auto"):
        return {"target_ongoing_requests": max(1, most // 3), **(given or {})}
    return given


def figures(now: Statistics, before: Statistics | None, seconds: float) -> dict[str, float]:
    """What an autoscaling policy may go by: see `deployment`. `before` is the snapshot of so many seconds ago."""
    cores = [core for core in now.cores if core.state in ("ready", "suspect")]
    busy = sum(core.busy_seconds for core in now.cores)
    waits, waited = sum(now.queue_seconds.counts), now.queue_seconds.sum
    if before is not None:
        busy -= sum(core.busy_seconds for core in before.cores)
        waits -= sum(before.queue_seconds.counts)
        waited -= before.queue_seconds.sum
    share = busy / (seconds * len(cores)) if before is not None and cores and seconds > 0 else 0.0
    return {
        "calls": float(now.calls.waiting + now.calls.running),
        "waiting_rows": float(now.waiting_rows),
        "waiting_work": float(now.waiting_work),
        "busy": min(1.0, max(0.0, share)),
        "queue_seconds": max(0.0, waited / waits) if before is not None and waits > 0 else 0.0,
        "cores": float(len(cores)),
    }
