"""A deployment as its callers see it: called like the model.

Lives here: deadlines, what is asked again, errors as they were raised. Must not be here: Ray; the handle and its errors
are arguments.
"""

import asyncio
from typing import Any

from aneuron import AneuronError, Closed, CoreFailed, DeadlineExceeded, NoHealthyCores, QueueFull, Timing, View
from aneuron.options import Options
from aneuron.ray.arrays import owned
from aneuron.sched.call import Limit, Rest, Terms

OUTSTANDING = 256  # elements of a map, if it is not said how many
SHORTEST, LONGEST = 0.02, 1.0  # seconds until an element of a map asks for room again, twice as many each time

Errors = tuple[type[Exception], ...]


class HandleView(View):
    """A deployment of `aneuron.ray`, to be called like the model in it; see `view`."""

    __slots__ = ()
    _model: "Remote"

    async def timed(self, *inputs: Any, **kwargs: Any) -> tuple[Any, Timing]:
        """The same, and how the call was run in its replica: the way there and back is not in it."""
        result: tuple[Any, Timing] = await self._model.call(inputs, kwargs, self._terms, self._limit(), timed=True)
        return result


class Remote:
    """What a view is of: a handle."""

    def __init__(self, handle: Any, lost: Errors, full: Errors, gone: Errors, tensors: bool) -> None:
        self._handle = handle
        self._remote: Any = None  # made by the first call: a handle may belong to the loop that it is first used on
        self._lost = lost  # what is raised where a replica is no more
        self._full, self._gone = full, gone  # what is raised before a replica is asked: no room, no deployment
        self._tensors = tensors  # whether those of results may lie in memory that is not this process's

    async def _call(
        self,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        terms: Terms | None = None,
        limit: Limit | None = None,
        trace: Any = None,
    ) -> Any:
        return await self.call(inputs, kwargs, terms, limit)

    async def _outstanding(self) -> int:
        return OUTSTANDING

    async def call(
        self,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        terms: Terms | None,
        limit: Limit | None,
        timed: bool = False,
    ) -> Any:
        """One call, to its end. It is asked once more where a replica died over it, or could not take it; an element of
        a map also as often as there is no room.
        """
        loop = asyncio.get_running_loop()
        began, rest, again, pause = loop.time(), limit, True, SHORTEST
        try:
            async with asyncio.timeout(limit) as scope:
                while True:
                    try:
                        return await self._ask(inputs, kwargs, terms, rest, timed)
                    except self._lost as error:
                        if not again:
                            raise CoreFailed("two replicas died over the call; it was not tried on a third") from error
                        again = False
                    except (Closed, NoHealthyCores):
                        if not again:
                            raise
                        again = False
                    except QueueFull as error:
                        if terms is None or not terms.yields:
                            raise
                        await asyncio.sleep(max(pause, error.retry_after or 0.0))
                        again, pause = True, min(2 * pause, LONGEST)
                    rest = None if limit is None else Rest.of(limit, loop.time() - began)
        except TimeoutError as error:
            if not scope.expired() or isinstance(error, AneuronError):
                raise
            raise DeadlineExceeded(f"{limit!s} has passed") from None

    async def _ask(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any], terms: Terms | None, limit: Limit | None, timed: bool
    ) -> Any:
        if self._remote is None:
            self._remote = self._handle.options(method_name="answer").remote
        how = (terms, None if limit is None else float(limit), timed)  # together: Ray packs each argument by itself
        response = self._remote(how, *inputs, **kwargs)
        try:
            result = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:  # whatever the model has raised there, or Ray on the way
            cause = original(error)
            if isinstance(error, self._full) and not isinstance(error, QueueFull):
                cause = QueueFull(str(error), getattr(error, "retry_after_s", None))
            if isinstance(error, self._gone):
                cause = Closed(f"{self!r} is not served: it was deleted, or has failed to start; see serve.status()")
            if cause is error:
                raise
            raise cause from error  # whose text is the replica's traceback
        return owned(result, tensors=True) if self._tensors else result

    def __repr__(self) -> str:
        return f"view({getattr(self._handle, 'deployment_name', self._handle)!r})"


def original(error: Exception) -> Exception:
    """What was raised in a replica, of what Ray raises for it here: an error that is both, with a traceback as text."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception) and isinstance(error, type(cause)) and type(error) is not type(cause):
        return cause
    return error


def view_of(handle: Any, lost: Errors = (), full: Errors = (), gone: Errors = (), tensors: bool = False) -> HandleView:
    """The view of a handle."""
    return HandleView(Remote(handle, lost, full, gone, tensors), Options())
