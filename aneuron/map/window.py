"""`map`: a source of elements in, their results out, one call an element.

Lives here: how many elements are outstanding, which result is next, when all of it ends. Must not be here: how a
source is read (sources.py), what a call does, a task group or a cancel scope (it would be held across the yields).

    source --elements--> a task for each call --results--> the consumer
       ^                                                       |
       +--------------- room, as results are taken ------------+

Room is what bounds everything: `limit` places, each of them free, or with an element that is asked for, called, or
whose result waits to be taken.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from aneuron.engine.failures import carried
from aneuron.errors import Closed, InputModified
from aneuron.map.sources import check_source, close_unread, open_source
from aneuron.tensors.nested import is_leaf
from aneuron.tensors.rows import MODIFIED, version_in

T = TypeVar("T")

Call = Callable[..., Awaitable[Any]]
Limit = int | Callable[[], Awaitable[int]]  # or who knows it, asked once, before the source is touched


class Map(AsyncIterator[T]):
    """The results of one call for each element of a source: an async iterator, to be used once.

    An element is a tensor or array, a tuple or list of positional inputs, or a mapping of keyword inputs, each with its
    batch dimension. Results come in the order of the source; with ``ordered=False`` as they are finished, as
    ``(index, result)``.

    At most `limit` elements are read, called, or finished and not yet taken: an endless source runs in bounded memory,
    and a consumer that is slow slows the source down. An asynchronous source is advanced in a task, a synchronous one
    in a thread of its own, the same for all elements, with gradients off; an element is called as soon as it is there.
    Elements are read ahead, and their numbers when their batch is formed: a source that writes to one buffer again and
    again yields copies (`buffer.clone()`, or `limit=1`). With tensors the elements that it has changed are
    `InputModified`; writes to NumPy arrays nobody can see.

    A call's exception is raised in its element's place, with a note of the index; what is left is cancelled then.
    With ``return_exceptions=True`` it is the result instead (cancellation and exits are raised all the same). What the
    source itself raises is raised after the results of all elements before it.

    Leaving early cancels what has not finished and closes the source, if it is a generator. ``async with`` and
    `aclose()` wait for the calls and an asynchronous source to end; a synchronous source that is at work on an element
    is not waited for, it is closed in its thread afterwards. A plain ``break`` does the same without waiting, as soon
    as nobody holds the map. A consumer that is cancelled while it waits may go on later: no result is lost.

    Raises, from the constructor, `TypeError` for what is no source and `ValueError` for a `limit` that is not an int
    of at least 1; from the iteration, besides the above, `TypeError` in place of an element that is none, `Closed`
    after the map was closed or has raised, `RuntimeError` when a second consumer waits.

        >>> import asyncio, torch
        >>> async def double(x):
        ...     return 2 * x
        >>> async def main():
        ...     async with Map(double, (torch.full((1, 1), n) for n in range(3)), limit=2) as results:
        ...         return [y.item() async for y in results]
        >>> asyncio.run(main())
        [0, 2, 4]
    """

    def __init__(
        self, call: Call, source: Any, *, limit: Limit, ordered: bool = True, return_exceptions: bool = False
    ) -> None:
        self._window: _Window | None = None
        self._closed = False
        if not callable(limit) and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ValueError(f"limit={limit!r}: expected an int of at least 1, the calls that may be outstanding")
        check_source(source)
        self._call, self._source, self._limit = call, source, limit
        self._ordered, self._return_exceptions = ordered, return_exceptions

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        """The next result; see the class."""
        if self._closed:
            raise Closed("the map is closed: it was left, or has raised; a map is used once: make a new one")
        window = self._window or await self._open()
        while not window.ready:
            if window.over:
                if window.error is None:
                    raise StopAsyncIteration
                await self._fail(window.error)
            await window.wait()
            if self._closed:
                raise Closed("the map was closed while its next result was waited for")
        index, task = window.take()
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            result = task.result()
        elif self._return_exceptions and isinstance(error, Exception):
            result = error
        else:
            error.add_note(f"raised for element {index} of the map")
            await self._fail(error)
        return result if self._ordered else (index, result)  # type: ignore[return-value]  # T follows `ordered`

    async def _open(self) -> "_Window":
        try:
            limit = self._limit if isinstance(self._limit, int) else await self._limit()
        except Exception as error:
            await self._fail(error)
        if self._closed:
            raise Closed("the map was closed while its model was started")
        if self._window is None:
            self._window = _Window(self._call, self._source, limit, self._ordered)
        return self._window

    async def _fail(self, error: BaseException) -> NoReturn:
        await self.aclose()
        if isinstance(error, StopAsyncIteration):
            raise RuntimeError("the map met a StopAsyncIteration, which would have looked like its end") from error
        raise error

    async def aclose(self) -> None:
        """Cancel what has not finished, close the source, and wait for both to end; see the class. Idempotent."""
        self._closed = True
        if self._window is not None:
            await self._window.aclose()
        else:
            await close_unread(self._source)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        window = self._window
        if window is not None and not window.closed:
            try:
                window.loop.call_soon_threadsafe(window.close)
            except RuntimeError:  # the loop is closed, and its tasks are gone
                window.source.close()


async def _one(call: Call, index: int, element: Any, version: int) -> Any:
    """The call of one element. It had this version when it was read: the source may have gone on with its tensors."""
    if version != version_in(element):
        raise InputModified(MODIFIED)
    if is_leaf(element):
        return await call(element)
    if isinstance(element, tuple) or type(element) is list:  # as a DataLoader's collate makes
        return await call(*element)
    if isinstance(element, Mapping):
        return await call(**element)
    raise TypeError(
        f"element {index} of the source is a {type(element).__name__}: expected a tensor, a tuple or list of "
        "positional inputs, or a dict of keyword inputs, each with its batch dimension"
    )


class _Window:
    """What is between the source and the consumer. Loop thread only; it does not know the map, which may be dropped."""

    def __init__(self, call: Call, source: Any, limit: int, ordered: bool) -> None:
        self.loop = asyncio.get_running_loop()
        self.error: BaseException | None = None  # the source's
        self.closed = False
        self._call, self._ordered = call, ordered
        self._line: deque[tuple[int, asyncio.Task[Any]]] = deque()  # ordered: every call; else the finished ones
        self._running: dict[asyncio.Task[Any], int] = {}
        self._count = 0  # elements so far
        self._exhausted = self._broken = False
        self._room = 0  # places that became free in this iteration of the loop
        self._waiter: asyncio.Future[None] | None = None
        self.source = open_source(source, self._start, self._end)
        self.source.fill(limit)

    @property
    def ready(self) -> bool:
        """Whether there is a result to take."""
        return bool(self._line) and self._line[0][1].done()

    @property
    def over(self) -> bool:
        """Whether there will never be another."""
        return self._broken or (self._exhausted and not self._line and not self._running)

    def take(self) -> tuple[int, asyncio.Task[Any]]:
        """The next result, and room for another element."""
        if not self._room:  # once an iteration: the places of a batch's results are asked for together
            self.loop.call_soon(self._guard, self._refill)
        self._room += 1
        return self._line.popleft()

    def _refill(self) -> None:
        room, self._room = self._room, 0
        self.source.fill(room)

    async def wait(self) -> None:
        """Wait until it may be ready, over or closed."""
        if self.loop is not asyncio.get_running_loop():
            raise RuntimeError("the map was begun on another event loop, and ends there")
        if self._waiter is not None:
            raise RuntimeError("another consumer waits for the next result already; a map has one at a time")
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done() and (self.ready or self.over or self.closed):
            self._waiter.set_result(None)

    # The source's side.

    def _start(self, element: Any, version: int) -> None:
        """Call the next element."""
        index, self._count = self._count, self._count + 1
        task = self.loop.create_task(_one(self._call, index, element, version))
        self._running[task] = index
        if self._ordered:
            self._line.append((index, task))
        task.add_done_callback(partial(self._guard, self._finished))

    def _finished(self, task: asyncio.Task[Any]) -> None:
        index = self._running.pop(task)
        if not task.cancelled():
            task.exception()  # seen, whether or not somebody takes it
        if not self._ordered:
            self._line.append((index, task))
        self._wake()

    def _end(self, error: BaseException | None) -> None:
        """There are no more elements: the source has ended, or raised `error`."""
        self._exhausted = True
        self.error = error
        self._wake()

    def _guard(self, callback: Callable[..., None], *args: Any) -> None:
        """What the loop calls: what it raises is for the consumer, who would wait in vain."""
        try:
            callback(*args)
        except BaseException as error:
            self._broken = True
            self._end(carried(error))

    # Leaving.

    def close(self) -> None:
        """Cancel what has not finished, and let the source end."""
        if self.closed:
            return
        self.closed = True
        for task in self._running:
            task.cancel()
        self._line.clear()
        self.source.close()
        self._wake()

    async def aclose(self) -> None:
        """Close, and wait for what can be waited for."""
        self.close()
        tasks = [*self._running, *self.source.tasks]
        if tasks:
            await asyncio.wait(tasks)
