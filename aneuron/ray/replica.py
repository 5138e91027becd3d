"""What a replica does with its model: starts it, answers calls, follows its configuration, says how it is.

Lives here: all of a replica that needs no Ray. Must not be here: Ray, how a deployment is asked for (serving.py).
"""

import asyncio
import inspect
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from aneuron import AsyncDataParallel, Statistics, Timing
from aneuron.ray.arrays import LARGE, foreign, owned
from aneuron.ray.sizing import figures, needed
from aneuron.remote.sources import digest
from aneuron.sched.call import Terms

logger = logging.getLogger("aneuron.ray")

Factory = Callable[..., Any]  # makes an AsyncDataParallel, or is awaited for one
How = tuple[Terms | None, float | None, bool]  # a call's terms, its timeout, and whether its `Timing` is asked for
PLAINLY: How = (None, None, False)

_MAY_CHANGE = ("model", "max_pending", "num_workers", "split_size")


class Replica:
    """A model that a factory makes, from its start to its end, on one event loop."""

    model: AsyncDataParallel

    def __init__(self, factory: Factory, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: bool) -> None:
        self._factory, self._args, self._kwargs = factory, args, kwargs
        self._tensors = tensors  # whether tensors, too, may lie in memory that is not this process's
        self._config: Mapping[str, Any] = {}
        self._seen: tuple[float, Statistics] | None = None  # when figures were asked for, and from what they were
        self._changing = asyncio.Lock()

    async def start(self, config: Mapping[str, Any] | None = None, most: int | None = None) -> None:
        """Make the model and start it. `most` is the number of calls that Serve sends at a time."""
        self._config = checked(config)
        self.model = await self._make(self._config)
        await self.model.start()
        self._check_room(most)

    async def _make(self, config: Mapping[str, Any]) -> AsyncDataParallel:
        """What the factory makes; in a thread, since it may read weights."""
        arguments = {**self._kwargs, **config}
        if inspect.iscoroutinefunction(self._factory):
            made = await self._factory(*self._args, **arguments)
        else:
            made = await asyncio.to_thread(self._factory, *self._args, **arguments)
        if not isinstance(made, AsyncDataParallel):
            raise TypeError(
                f"{named(self._factory)} returned {made!r:.80}; the factory of a deployment returns an "
                "aneuron.AsyncDataParallel, which the replica starts"
            )
        return made

    def _check_room(self, most: int | None) -> None:
        rows, cores = self.model.batch_size, len(self.model.statistics().cores)
        want = needed(self.model.num_workers or 2 * cores, cores, rows) if rows else 0
        if most is not None and most < want:
            logger.warning(
                "max_ongoing_requests=%d: with calls of one row the batches of this model do not fill; it has %d cores "
                "and batch_size=%d, pass max_ongoing_requests=%d to deployment()",
                most, cores, rows, want,
            )  # fmt: skip

    # Calls.

    async def answer(self, how: How, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any | tuple[Any, Timing]:
        """One call, on its terms; with its `Timing`, if asked."""
        terms, timeout, timed = how
        inputs, kwargs = await self._owned(inputs), await self._owned(kwargs)
        terms = terms or Terms()
        view = self.model.options(timeout=timeout, priority=terms.priority, tenant=terms.tenant)
        return await (view.timed(*inputs, **kwargs) if timed else view(*inputs, **kwargs))

    async def _owned(self, value: Any) -> Any:
        try:
            size = foreign(value, self._tensors)
        except TypeError:  # what cannot be opened: the call will say so
            return value
        if not size:
            return value
        if size <= LARGE:
            return owned(value, self._tensors)
        return await asyncio.to_thread(owned, value, self._tensors)

    # What Serve asks for.

    async def reconfigure(self, config: Mapping[str, Any] | None) -> None:
        """Become what the factory makes of another configuration, without losing a call."""
        async with self._changing:
            config = checked(config)
            if config == self._config:
                return
            await become(self.model, await self._make(config))
            self._config = config

    def check_health(self) -> None:
        """Raise if the model is not ready."""
        if not self.model.ready:
            states = ", ".join(f"{core.id} {core.state}" for core in self.model.statistics().cores)
            raise RuntimeError(f"{self.model!r} is not ready; its cores: {states or 'none'}")

    def figures(self) -> dict[str, float]:
        """What an autoscaling policy may go by, since it was asked for last."""
        now, statistics = time.monotonic(), self.model.statistics()
        then, before = self._seen or (now, None)
        self._seen = now, statistics
        return figures(statistics, before, now - then)

    async def close(self) -> None:
        """Finish what was accepted, and free the cores."""
        await self.model.aclose()


async def become(model: AsyncDataParallel, other: AsyncDataParallel) -> None:
    """Serve as another model would, which is not started: with what it was given as a model, by `swap`, and its
    `max_pending`, `num_workers` and `split_size`.

    Raises `ValueError` if they differ otherwise, and what `swap` raises; then nothing has changed.
    """
    now, wanted = model.configuration, other.configuration
    others = [name for name in wanted if name not in _MAY_CHANGE]
    differing = [name for name in others if not await asyncio.to_thread(alike, now[name], wanted[name])]
    if differing:
        said = ", ".join(f"{name}={wanted[name]!r:.60} (it was {now[name]!r:.60})" for name in differing)
        raise ValueError(
            f"{said}: what may change while a replica serves is {', '.join(_MAY_CHANGE)}; for anything else deploy "
            "anew, with other arguments of bind()"
        )
    model.max_pending = wanted["max_pending"]  # first: it is refused where it counts something else
    try:
        if not await asyncio.to_thread(alike, now["model"], wanted["model"], sure=True):
            await model.swap(wanted["model"])
    except BaseException:
        model.max_pending = now["max_pending"]
        raise
    model.split_size = wanted["split_size"]
    if wanted["num_workers"] != now["num_workers"]:
        model.num_workers = wanted["num_workers"] or 2 * len(model.statistics().cores)  # as None means


def alike(one: Any, other: Any, sure: bool = False) -> bool:
    """Whether two arguments mean the same: by what they hold or, unless that is not `sure` enough, by their text, since
    backends hold locks and caches of their own.

    >>> alike({"a": [1]}, {"a": [1]}), alike(8, 16), alike(print, print, sure=True)
    (True, False, True)
    """
    if one is other:
        return True
    try:
        same = digest(one) == digest(other)
    except Exception:  # whatever a type of somebody's own raises
        same = False
    return same or (not sure and type(one) is type(other) and _text(one) == _text(other))


def _text(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def checked(config: Any) -> Mapping[str, Any]:
    """A `user_config`: arguments of the factory, by name."""
    if config is None:
        return {}
    if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in config):
        raise TypeError(f"user_config={config!r:.80}: expected a mapping of the factory's keyword arguments, or None")
    return config


def named(factory: Factory) -> str:
    """A factory, for an error.

    >>> named(len)
    'len'
    """
    return getattr(factory, "__qualname__", None) or f"{factory!r:.80}"
