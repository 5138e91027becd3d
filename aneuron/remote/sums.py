"""The numbers of several engines as those of one pool.

Lives here: pure additions. Must not be here: who counts what.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import add
from types import MappingProxyType

from aneuron.stats import CoreStatistics, Histogram, ShareStatistics, Statistics


def added(calls: Statistics, now: Sequence[Statistics], past: Iterable[Statistics]) -> Statistics:
    """A model's statistics: the calls of `calls`, and what the engines have done, those that have died included."""
    every = [*now, *past]
    cores: dict[int, CoreStatistics] = {core.id: core for each in now for core in each.cores}
    for each in past:
        for core in each.cores:
            found = cores.get(core.id)
            cores[core.id] = replace(core, state="failed", in_flight=0) if found is None else _plus(found, core)
    reasons = dict(calls.closed_because)
    for each in every:
        for reason, count in each.closed_because.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return replace(
        calls,
        waiting_rows=sum(each.waiting_rows for each in now),
        waiting_work=sum(each.waiting_work for each in now),
        cores=tuple(core for _, core in sorted(cores.items())),
        closed_because=MappingProxyType(reasons),
        batch_rows=_sum([calls.batch_rows, *(each.batch_rows for each in every)]),
        queue_seconds=_sum([calls.queue_seconds, *(each.queue_seconds for each in every)]),
        device_seconds=_sum([calls.device_seconds, *(each.device_seconds for each in every)]),
        loop_lag_seconds=_sum([calls.loop_lag_seconds, *(each.loop_lag_seconds for each in every)]),
    )


def _plus(core: CoreStatistics, before: CoreStatistics) -> CoreStatistics:
    """What a core does, and what it has done in an engine that died."""
    return replace(
        core,
        batches=core.batches + before.batches,
        rows=core.rows + before.rows,
        padded_rows=core.padded_rows + before.padded_rows,
        busy_seconds=core.busy_seconds + before.busy_seconds,
        errors=core.errors + before.errors,
    )


def _sum(of: Sequence[Histogram]) -> Histogram:
    """Observations of several histograms with the same bounds.

    >>> _sum([Histogram((1.0,), (1, 2), 5.0), Histogram((1.0,), (0, 1), 4.0)])
    Histogram(bounds=(1.0,), counts=(1, 3), sum=9.0)
    """
    first = of[0]
    counts = first.counts
    for each in of[1:]:
        counts = tuple(map(add, counts, each.counts))
    return Histogram(first.bounds, counts, sum(each.sum for each in of))


def share(of: Sequence[ShareStatistics]) -> ShareStatistics:
    """What one model has of all engines."""
    return ShareStatistics(
        of[0].weight,
        sum(each.in_flight for each in of),
        sum(each.waiting_rows for each in of),
        sum(each.busy_seconds for each in of),
    )
