"""Calls and batches as OpenTelemetry spans.

Lives here: what spans say, and what they are linked to. Must not be here: a web framework, an exporter; only
OpenTelemetry's API, which does nothing until the application sets up its SDK.

    instrument(net=model)
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Link, Span, Tracer, TracerProvider, get_tracer

from aneuron import AsyncDataParallel, Timing
from aneuron.web.checks import check_models


def instrument(tracer_provider: TracerProvider | None = None, /, **models: AsyncDataParallel) -> None:
    """Make spans of the calls of models, and of the batches that they are run in; from the next call on.

    Every call is a span "call NAME" under the caller's current span, that of the request say. Attributes:
    `aneuron.model`, and of a call with a result what its `Timing` says: `aneuron.queue_seconds`,
    `aneuron.device_seconds`, `aneuron.core`, `aneuron.batch_rows`, `aneuron.padded_rows`, `aneuron.why`. An exception
    is recorded with its text, and has `error.type`; a call that was cancelled has `aneuron.cancelled`, and no error.

    Every execution is a span "batch NAME", the root of a trace of its own, since it belongs to many: it is linked to
    each of its calls, with `aneuron.rows`, how many of the call's rows are in it. A call over several batches is linked
    by each. It is current in the thread that executes: spans that the model makes are below it.

    A batch none of whose calls is sampled has no span. Others are sampled anew, as any root: where few requests are
    sampled, let the provider's sampler take roots that have links, all of which are to sampled calls. The SDK keeps 128
    links of a span unless told otherwise (OTEL_SPAN_LINK_COUNT_LIMIT): a batch of more calls has the others' links on
    spans "batch NAME links" below it.

    tracer_provider: None: the global one, which may be set later.
    models: by the names that they have in spans. `model.observe(None)` takes it back.

        >>> import asyncio, torch, aneuron
        >>> async def main():
        ...     async with aneuron.AsyncDataParallel(torch.neg) as model:
        ...         instrument(net=model)
        ...         return await model(torch.ones(1, 1))
        >>> asyncio.run(main())
        tensor([[-1.]])
    """
    check_models(instrument, models)
    tracer = get_tracer("aneuron", tracer_provider=tracer_provider)
    for name, model in models.items():
        model.observe(_Spans(tracer, name))


class _Spans:
    """The observer of one model."""

    def __init__(self, tracer: Tracer, name: str) -> None:
        self._tracer, self._call, self._batch = tracer, f"call {name}", f"batch {name}"
        self._attributes = {"aneuron.model": name}

    @contextmanager
    def call(self, timing: Callable[[], Timing]) -> Iterator[Span]:
        with self._tracer.start_as_current_span(self._call, attributes=self._attributes) as span:
            try:
                yield span
            except asyncio.CancelledError:
                span.set_attribute("aneuron.cancelled", True)
                raise
            except Exception as error:
                span.set_attribute("error.type", _name(error))
                raise
            if span.is_recording():
                ran = timing()
                span.set_attributes(
                    {
                        "aneuron.queue_seconds": ran.queued,
                        "aneuron.device_seconds": ran.device,
                        **_where(ran.core, ran.batch_rows, ran.padded_rows, ran.why),
                    }
                )

    def batch(
        self, calls: Sequence[tuple[Span, int]], *, core: int, rows: int, padded_rows: int, why: str
    ) -> AbstractContextManager[object]:
        contexts = [(span.get_span_context(), count) for span, count in calls]
        links = [Link(context, {"aneuron.rows": count}) for context, count in contexts if context.trace_flags.sampled]
        return self._execution(links, _where(core, rows, padded_rows, why)) if links else nullcontext()

    @contextmanager
    def _execution(self, links: list[Link], where: dict[str, str | int]) -> Iterator[None]:
        # The thread's own context is that of whoever started the model: no parent, and its baggage is no caller's.
        token = attach(Context())
        try:
            with self._span(links, where):
                yield
        finally:
            detach(token)

    @contextmanager
    def _span(self, links: list[Link], where: dict[str, str | int]) -> Iterator[None]:
        span = self._tracer.start_as_current_span(self._batch, attributes={**self._attributes, **where}, links=links)
        with span as current:
            self._link_the_rest(links, getattr(current, "links", links))
            try:
                yield
            except Exception as error:
                current.set_attribute("error.type", _name(error))
                raise

    def _link_the_rest(self, links: list[Link], kept: Sequence[Link]) -> None:
        """Further spans, below the current one, for the links that the SDK has dropped; none where it keeps none."""
        step = len(kept)
        if not 0 < step < len(links):
            return
        dropped = links[: len(links) - step]  # it keeps the last
        for start in range(0, len(dropped), step):
            self._tracer.start_span(
                f"{self._batch} links", attributes=self._attributes, links=dropped[start:][:step]
            ).end()


def _where(core: int, rows: int, padded_rows: int, why: str) -> dict[str, str | int]:
    """The attributes of a batch."""
    return {
        "aneuron.core": core,
        "aneuron.batch_rows": rows,
        "aneuron.padded_rows": padded_rows,
        "aneuron.why": why,
    }


def _name(error: Exception) -> str:
    """The type of an exception, as OpenTelemetry's conventions have it."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
