"""Models' statistics for Prometheus.

Lives here: names, labels and types of the metrics. Must not be here: counting (`statistics()` tells what models count),
a web framework (prometheus-client brings the pages itself).

    REGISTRY.register(Collector(net=model))
    app.mount("/metrics", make_asgi_app())  # FastAPI, Starlette
    app.router.add_get("/metrics", make_aiohttp_handler())  # aiohttp; it is in prometheus_client.aiohttp
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector as _Collector

from aneuron import AsyncDataParallel, EngineStatistics, Statistics
from aneuron.web.checks import check_models

_COMMON = ("model", "pid")  # labels of every sample
_OUTCOMES = ("completed", "failed", "cancelled", "refused")
_STATES = ("loading", "ready", "suspect", "quarantined", "failed", "closed")

Samples = Iterable[tuple[tuple[str, ...], float]]  # the values of further labels, and the value
Metrics = Sequence[tuple[str, str, tuple[str, ...], Callable[[Statistics], Samples]]]  # name, text, further labels


def _by_core(field: str) -> Callable[[Statistics], Samples]:
    """A number of each core, if it is known."""
    return lambda s: [((str(core.id),), value) for core in s.cores if (value := getattr(core, field)) is not None]


def _states(s: Statistics) -> Samples:
    for core in s.cores:
        for state in dict.fromkeys((*_STATES, core.state)):
            yield (str(core.id), state), float(core.state == state)


_COUNTERS: Metrics = (
    (
        "aneuron_requests",
        "Calls that have ended, and those refused because the queue was full.",
        ("outcome",),
        lambda s: [((outcome,), getattr(s.calls, outcome)) for outcome in _OUTCOMES],
    ),
    (
        "aneuron_batch_close",
        "Batches, by the reason that they were not made larger.",
        ("why",),
        lambda s: [((why,), count) for why, count in s.closed_because.items()],
    ),
    ("aneuron_batches", "Executions, re-runs included.", ("core",), _by_core("batches")),
    ("aneuron_rows", "Rows of calls that were executed.", ("core",), _by_core("rows")),
    ("aneuron_batch_padding_rows", "Rows added to fill compiled sizes.", ("core",), _by_core("padded_rows")),
    ("aneuron_core_busy_seconds", "Time in which a core executed.", ("core",), _by_core("busy_seconds")),
    ("aneuron_core_errors", "Executions and loads that failed.", ("core",), _by_core("errors")),
)

_GAUGES: Metrics = (
    ("aneuron_queue_items", "Calls of which no row is in a batch yet.", (), lambda s: [((), s.calls.waiting)]),
    ("aneuron_queue_rows", "Rows that wait.", (), lambda s: [((), s.waiting_rows)]),
    ("aneuron_queue_work", "Rows that wait, or their positions with Work.", (), lambda s: [((), s.waiting_work)]),
    ("aneuron_inflight_requests", "Calls of which a row is in a batch.", (), lambda s: [((), s.calls.running)]),
    ("aneuron_inflight_batches", "Batches that a core has, begun or not.", ("core",), _by_core("in_flight")),
    ("aneuron_core_state", "1 for the state that a core is in.", ("core", "state"), _states),
    ("aneuron_core_global_id", "The core's number within the machine.", ("core",), _by_core("global_id")),
    (
        "aneuron_core_service_seconds",
        "Median time of the last executions, of the shape that was executed last.",
        ("core",),
        _by_core("service_seconds"),
    ),
)

_HISTOGRAMS = (
    ("aneuron_queue_seconds", "From when a call is accepted to its first execution.", "queue_seconds"),
    ("aneuron_device_seconds", "From an execution's beginning to its end.", "device_seconds"),
    ("aneuron_request_seconds", "From when a call is accepted to its result or error.", "total_seconds"),
    ("aneuron_batch_rows", "Rows of calls in a batch.", "batch_rows"),
    ("aneuron_event_loop_lag_seconds", "From when a batch has ended to the event loop's turn.", "loop_lag_seconds"),
)


# Of models that share a pool, by its name too; the type, the name, the text, the value.
_OF_POOLS: Sequence[tuple[Any, str, str, Callable[[AsyncDataParallel, Statistics], float]]] = (
    (
        GaugeMetricFamily,
        "aneuron_pool_weight",
        "A model's share of the cores' time while others of its pool have rows waiting, beside their weights.",
        lambda model, s: model.weight,
    ),
    (
        GaugeMetricFamily,
        "aneuron_pool_inflight_batches",
        "Batches that the cores of the pool have of a model, begun or not.",
        lambda model, s: sum(core.in_flight for core in s.cores),
    ),
    (
        GaugeMetricFamily,
        "aneuron_pool_queue_rows",
        "Rows of a model that wait for the cores of the pool.",
        lambda model, s: s.waiting_rows,
    ),
    (
        CounterMetricFamily,
        "aneuron_pool_busy_seconds",
        "Time in which the cores of the pool executed a model.",
        lambda model, s: sum(core.busy_seconds for core in s.cores),
    ),
)

# Of the engines of a pool in processes.
_OF_ENGINES: Sequence[tuple[Any, str, str, Callable[[EngineStatistics], float]]] = (
    (GaugeMetricFamily, "aneuron_engine_ready", "1 where an engine serves.", lambda e: float(e.state == "ready")),
    (CounterMetricFamily, "aneuron_engine_restarts", "How often an engine was started anew.", lambda e: e.restarts),
    (GaugeMetricFamily, "aneuron_engine_rows", "Rows that an engine has of this process.", lambda e: e.rows),
)


class Collector(_Collector):
    """The statistics of models, for a registry of prometheus-client; one collector for all models of a registry.

    Every sample has the labels `model`, the name given here, and `pid`: a process tells of its own calls only. Where
    several workers share a port, each scrape meets one of them; give each a port of its own for metrics
    (`prometheus_client.start_http_server`). prometheus-client's multi-process mode does not know collectors.

    Models that share a pool have `aneuron_pool_*` besides, with the label `pool`: the names of its models that are
    given here, in order, as "encoder+reranker". Who has which part of its cores: `sum by (pool, model)
    (rate(aneuron_pool_busy_seconds_total[1m]))`, to be compared with `aneuron_pool_weight`.

    Those of a pool in processes have `aneuron_engine_*`, with the label `engine`. What cores and batches count is the
    engines', the same from each process that shares them: take it from one, not the sum.

    Calls pay nothing for it: a scrape reads one snapshot of each model, from whichever thread. Models need not be
    started.

        >>> import torch, aneuron
        >>> from prometheus_client import CollectorRegistry
        >>> registry = CollectorRegistry()
        >>> registry.register(Collector(net=aneuron.AsyncDataParallel(torch.neg)))
        >>> registry.get_sample_value("aneuron_ready", {"model": "net", "pid": str(os.getpid())})
        0.0
    """

    def __init__(self, **models: AsyncDataParallel) -> None:
        check_models(Collector, models)
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """All metrics as of now."""
        pid = str(os.getpid())  # not before: servers fork
        ready = GaugeMetricFamily("aneuron_ready", "1 where calls are served.", labels=_COMMON)
        for name, model in self._models.items():
            ready.add_metric((name, pid), float(model.ready))
        yield ready
        snapshots = {(name, pid): model.statistics() for name, model in self._models.items()}
        for kind, metrics in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
            for title, says, labels, samples in metrics:
                family: Any = kind(title, says, labels=(*_COMMON, *labels), unit=_unit(title))
                for common, statistics in snapshots.items():
                    for values, value in samples(statistics):
                        family.add_metric((*common, *values), value)
                yield family
        for title, says, field in _HISTOGRAMS:
            family = HistogramMetricFamily(title, says, labels=_COMMON, unit=_unit(title))
            for common, statistics in snapshots.items():
                histogram = getattr(statistics, field)
                bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
                family.add_metric(common, list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.sum)
            yield family
        pools = self._pools()
        for kind, title, says, number in _OF_POOLS if pools else ():
            family = kind(title, says, labels=(*_COMMON, "pool"), unit=_unit(title))
            for (name, _), statistics in snapshots.items():
                if name in pools:
                    family.add_metric((name, pid, pools[name]), number(self._models[name], statistics))
            yield family
        yield from self._engines(pid)

    def _engines(self, pid: str) -> Iterator[Metric]:
        """Of models whose pool has its cores in processes."""
        found = {name: engines for name, model in self._models.items() if (engines := model.pool.statistics().engines)}
        for kind, title, says, number in _OF_ENGINES if found else ():
            family = kind(title, says, labels=(*_COMMON, "engine"))
            for name, engines in found.items():
                for engine in engines:
                    family.add_metric((name, pid, str(engine.index)), number(engine))
            yield family

    def _pools(self) -> dict[str, str]:
        """The name of the pool of each model that shares one, now: others may come to a model's own."""
        shared = {name: model.pool for name, model in self._models.items() if len(model.pool.models) > 1}
        return {name: "+".join(other for other, its in shared.items() if its is pool) for name, pool in shared.items()}


def _unit(title: str) -> str:
    return "seconds" if title.endswith("_seconds") else ""
