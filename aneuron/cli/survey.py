"""Ways to serve a model, side by side: how fast they are, and how far their answers are from the model's own.

Lives here: which ways are measured after which, comparing answers, which way is good enough and best. Must not be here:
which ways there are (ways.py), measuring one (trials.py), printing.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aneuron
from aneuron.cli import calls as calls_
from aneuron.cli.trials import Design, Make, Result, Say, best, call, heats, one_line
from aneuron.cli.ways import Untried, Way
from aneuron.tensors.likeness import Likeness, likeness

COMPARED = 16  # calls whose answers are compared
Axis = Callable[[Way], tuple[list[Way], Untried]]


@dataclass(frozen=True)
class Survey:
    """All that was measured of ways. `alike`: how far answers are from the plain model's, of calls one at a time; None
    where that does not run. `why` says why it does not, `failed` why a way does not, `untried` why it was not tried.
    """

    results: list[Result] = field(default_factory=list)
    alike: dict[Way, Likeness | None] = field(default_factory=dict)
    failed: dict[Way, str] = field(default_factory=dict)
    untried: Untried = field(default_factory=dict)
    why: str = ""


async def survey(
    make: Callable[[Way], Awaitable[Any]],
    plain: Make,
    axes: Sequence[Axis],
    start: Way,
    callers: int,
    calls: Sequence[Any],
    seconds: float,
    choose: Callable[[Survey], Result | None],
    say: Say,
) -> Survey:
    """Measure ways, an axis after the other: each gives those that differ from the best so far in one respect."""
    say("the model alone")
    compared = _spread(calls, COMPARED)
    expected, why = await _answers(plain, compared)
    found, way = Survey(why=why), start

    async def look(way: Way, model: Any) -> None:
        answers = await asyncio.gather(*(call(model, each) for each in compared))
        found.alike[way] = None if expected is None else alike(expected, answers)

    for axis in axes:
        tried, untried = axis(way)
        found.untried.update(untried)
        if tried == [way] and way in found.alike:
            continue
        makers = {each: partial(make, each) for each in tried if each not in found.failed}
        names = {each: f"{each.backend}, {each.dtype or 'own dtype'}, lengths {each.lengths}" for each in makers}

        def designs(models: Mapping[Way, Any]) -> Iterator[tuple[Way, Design]]:
            for each, model in models.items():
                yield each, Design(None, 2 * len(model.statistics().cores), None, callers, each)

        results, failed = await heats(makers, names, designs, calls, seconds, say, look)
        found.failed.update(failed)
        latest = {result.design.way for result in results} | set(failed)
        found.results[:] = [each for each in found.results if each.design.way not in latest] + results
        best_so_far = choose(found)
        way = (best_so_far and best_so_far.design.way) or way
    return found


async def _answers(plain: Make, calls: Sequence[Any]) -> tuple[list[Any] | None, str]:
    """What the plain model answers to calls that it gets one at a time, or why it does not."""
    try:
        async with await plain() as model:
            return [await call(model, each) for each in calls], ""
    except aneuron.DeviceError:
        raise
    except Exception as error:
        return None, one_line(error)


def _spread(calls: Sequence[Any], number: int) -> list[Any]:
    """Some of the calls, from the one with the fewest numbers to that with the most."""
    ordered = sorted(calls, key=lambda each: sum(tensor.numel() for tensor in calls_.tensors(each)))
    last = len(ordered) - 1
    return [ordered[place] for place in sorted({round(step * last / (number - 1)) for step in range(number)})]


def alike(expected: Sequence[Any], answers: Sequence[Any]) -> Likeness:
    """The smallest cosine and the largest deviation of answers. Raises `ValueError` for those of other shapes."""
    seen = [likeness(one, other) for one, other in zip(expected, answers, strict=True)]
    cosines = [each.cosine for each in seen if each.cosine is not None]
    unlike = any(cosine != cosine for cosine in cosines)
    return Likeness(
        math.nan if unlike else min(cosines, default=None),
        deviation=max(each.deviation for each in seen),
        share=max(each.share for each in seen),
        differ=sum(each.differ for each in seen),
        entries=sum(each.entries for each in seen),
    )


def is_alike(seen: Likeness | None, least: float) -> bool:
    """Whether answers are good enough: their cosine, and of ids and flags the share that is equal."""
    if seen is None:  # nothing to compare with
        return True
    equal = 1 - seen.differ / seen.entries if seen.entries else 1.0
    return (seen.cosine is None or seen.cosine >= least) and equal >= least


def chosen(survey: Survey, bound: float | None, least: float) -> Result | None:
    """The best of the ways whose answers are good enough; where none keeps the bound the one that is nearest to it."""
    fit = [each for each in survey.results if each.design.way and is_alike(survey.alike[each.design.way], least)]
    return best(fit, bound) or min(fit, key=lambda result: result.p99, default=None)
