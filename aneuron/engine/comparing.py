"""What computing in another dtype costs, found out with the example: how far results are from full precision's.

Lives here: the two executions, and what is said of them, in the log or as an error that ends the start. Must not be
here: the judgement (tensors/likeness.py), casting (backends/precision.py).
"""

import logging
from collections.abc import Callable
from typing import Any

from aneuron.backends import Fault
from aneuron.backends.precision import Precision
from aneuron.tensors.likeness import Likeness, likeness

logger = logging.getLogger("aneuron")

Executed = tuple[Any, float]  # the output, in memory of its own, and the seconds that it took


def compare(
    precision: Precision,
    reduced: Callable[[], Executed],
    full: Callable[[], Executed],
    classify: Callable[[BaseException], Fault],
) -> None:
    """Execute the example both ways, and say how far apart they are and what each takes.

    Raises `ValueError` for a model that cannot run in the dtype, and for results below `min_cosine`; what the core is
    to blame for as it is. Where the model runs neither way nothing is said: the warm-up will.
    """
    expected, failed = _attempt(full)
    found, refused = _attempt(reduced)
    for error in (failed, refused):
        if error is not None and classify(error) is not Fault.INPUT:
            raise error
    if refused is not None:
        if failed is None:
            raise ValueError(_CANNOT_RUN.format(precision.name, _text(refused))) from refused
        return
    if failed is None:
        assert expected is not None, "it has an outcome"
        assert found is not None, "it has an outcome"
        try:
            seen = likeness(expected[0], found[0])
        except (ValueError, RuntimeError) as error:
            failed = error
        else:
            _judge(precision, seen)
            _say(precision, seen, found[1], expected[1])
            return
    missing = f"the results in {precision.name} cannot be compared with full precision ({_text(failed)})"
    if precision.min_cosine is not None:
        raise ValueError(
            f"{missing}, and min_cosine={precision.min_cosine:g} asks for it; pass example_inputs that the model takes "
            "in its own dtype, or leave min_cosine= out"
        ) from failed
    logger.warning(missing)


def without_example(precision: Precision) -> None:
    """Say that nothing can be compared. Raises `ValueError` where that was asked for."""
    if precision.min_cosine is not None:
        raise ValueError(
            f"min_cosine={precision.min_cosine:g} compares results in {precision.name} with full precision on "
            "example_inputs, and there are none; pass some, real ones if possible, or leave min_cosine= out"
        )
    slow = "this CPU has no instructions for it, so that it may be slower, and " if precision.native is False else ""
    logger.warning(
        "the model is computed in %s: %sthere are no example_inputs to compare it with full precision on",
        precision.name,
        slow,
    )


def _attempt(execute: Callable[[], Executed]) -> tuple[Executed | None, Exception | None]:
    try:
        return execute(), None
    except Exception as error:
        return None, error


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


_CANNOT_RUN = (
    "the model cannot run in {0}, as dtype= asks, but in its own dtype: {1}. Where its forward makes tensors, give "
    "them the dtype of an input or a weight (torch.zeros(..., dtype=x.dtype)); register what it keeps as buffers; cast "
    "around what has no kernel for {0} (x.float()). Or leave dtype= out and pass context=lambda: torch.autocast('cpu', "
    "torch.{0}) ('cuda' on GPUs), which casts operation by operation"
)


def _judge(precision: Precision, seen: Likeness) -> None:
    least = precision.min_cosine
    if least is None:
        return
    if seen.cosine is None:
        raise ValueError(
            f"min_cosine={least:g}: the model returns no floating tensor to compare; have it return scores besides, or "
            "leave min_cosine= out"
        )
    if not seen.cosine >= least:
        raise ValueError(
            f"{_words(precision, seen)}; that is below min_cosine={least:g}. Try another dtype, keep sensitive parts "
            "in float32 within forward, leave dtype= out for this model, or lower min_cosine= if that is good enough"
        )


def _words(precision: Precision, seen: Likeness) -> str:
    words = f"{precision.name} beside full precision, on example_inputs: "
    if seen.cosine is None:
        return words + f"{seen.differ} of {seen.entries} entries differ"
    if seen.cosine != seen.cosine:
        range_ = "; its range ends at 65,504" if precision.name == "float16" else ""
        return words + f"{seen.where} has infinities or NaN where full precision has none{range_}"
    words += f"cosine {seen.cosine:.6f} ({seen.where}), largest deviation {seen.deviation:.2g}, "
    words += f"{100 * seen.share:.2g} % of the largest value"
    return words + (f"; {seen.differ} of {seen.entries} other entries differ" if seen.differ else "")


def _say(precision: Precision, seen: Likeness, took: float, full: float) -> None:
    overflown = seen.cosine is not None and seen.cosine != seen.cosine
    logger.log(
        logging.WARNING if overflown else logging.INFO,
        "%s; %.3g ms an execution, %.3g in full precision", _words(precision, seen), 1e3 * took, 1e3 * full,
    )  # fmt: skip
    if precision.native is False or took >= full:
        why = "this CPU has no instructions for it" if precision.native is False else "it saves no time"
        advice = ". Leave dtype= out unless it is for memory" if took >= full else ""
        logger.warning(
            "%s takes %.3g ms for example_inputs, full precision %.3g: %s%s",
            precision.name, 1e3 * took, 1e3 * full, why, advice,
        )  # fmt: skip
