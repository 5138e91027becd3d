"""Where the elements of a map come from: a synchronous iterable or an asynchronous one, read as far as there is room.

Lives here: advancing a source, and closing it. Must not be here: calls and results (window.py), a thread other than a
worker (engine/threads.py).

A source gets two functions, which it calls on the loop: `start(element, version)` for each element, with the version
that its tensors had when it was read, then `end(error)` once, with what the source raised or None; after `close()`
neither.
"""

import asyncio
import contextvars
import logging
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import aclosing, nullcontext
from itertools import islice
from typing import Any

import torch

from aneuron.engine.threads import Workers
from aneuron.tensors.nested import is_array
from aneuron.tensors.rows import version_in

Start = Callable[[Any, int], None]
End = Callable[[BaseException | None], None]

logger = logging.getLogger("aneuron")


def check_source(source: Any) -> None:
    """Raise `TypeError` for what cannot be iterated over, and for what can but is itself one element."""
    if isinstance(source, (torch.Tensor, str, bytes, Mapping)) or is_array(source):
        raise TypeError(
            f"the source is a {type(source).__name__}, which map does not iterate over: expected an iterable of "
            "elements, each with its batch dimension. For one element pass [element]; for the rows of a tensor "
            "x.split(1)"
        )
    if not any(hasattr(type(source), name) for name in ("__aiter__", "__iter__", "__getitem__")):
        hint = f"; call it: {source.__name__}()" if callable(source) and hasattr(source, "__name__") else ""
        raise TypeError(
            f"the source is a {type(source).__name__}: expected an iterable or asynchronous iterable of elements{hint}"
        )


def open_source(source: Any, start: Start, end: End) -> "LoopSource | ThreadSource":
    """Begin to read; asynchronously where a source can be read both ways. Needs a running loop."""
    return (LoopSource if hasattr(type(source), "__aiter__") else ThreadSource)(source, start, end)


async def close_unread(source: Any) -> None:
    """Close a generator of which nothing was read."""
    if isinstance(source, AsyncGenerator):
        await source.aclose()
    elif isinstance(source, Generator):
        source.close()


class LoopSource:
    """An asynchronous source: a task that waits for room."""

    def __init__(self, source: Any, start: Start, end: End) -> None:
        self._start, self._end = start, end
        self._room = 0
        self._more = asyncio.Event()
        self._closed = False
        task = asyncio.get_running_loop().create_task(self._read(source))
        task.add_done_callback(self._ended)
        self.tasks = [task]  # to be waited for after `close()`

    def fill(self, room: int) -> None:
        """Read up to `room` further elements."""
        self._room += room
        self._more.set()

    async def _read(self, source: Any) -> None:
        elements = aiter(source)
        closes = isinstance(elements, AsyncGenerator) or (elements is not source and hasattr(elements, "aclose"))
        async with aclosing(elements) if closes else nullcontext():
            while True:
                if not self._room:
                    self._more.clear()
                    await self._more.wait()
                try:
                    element = await anext(elements)
                except StopAsyncIteration:
                    return
                if self._closed:
                    return  # the source has swallowed its cancellation
                self._room -= 1
                self._start(element, version_in(element))

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        (_unheard if self._closed else self._end)(error)

    def close(self) -> None:
        """Read no more, and close the iterator if it is ours or a generator, within the task."""
        self._closed = True
        self.tasks[0].cancel()


class ThreadSource:
    """A synchronous source: a thread that reads as far as there is room, and wakes the loop as rarely as it can.

    One thread for all elements: a source may hold what belongs to a thread, a database connection say; a generator
    that is at work cannot be closed from another one; and it must not keep the interpreter from exiting, as a thread
    of anyio's or of a standard pool would.
    """

    _END = object()

    def __init__(self, source: Any, start: Start, end: End) -> None:
        self._source, self._start, self._end = source, start, end
        self._elements: Any = None
        self._arrived: deque[Any] = deque()  # filled by the thread, emptied by the loop
        self._posted = False  # a wake-up is under way
        self._closed = False
        self._error: BaseException | None = None
        self._over = False  # it has ended, or raised: it is not asked again
        self._loop = asyncio.get_running_loop()
        # The caller's, once for each side: a context is entered by one thread at a time.
        self._context, self._loops_context = contextvars.copy_context(), contextvars.copy_context()
        self._workers = Workers("aneuron-map")
        self._workers.on_death = self._die
        self._workers.grow(1)
        self.tasks: list[asyncio.Task[None]] = []  # nobody waits for a thread

    def fill(self, room: int) -> None:
        """Read up to `room` further elements, after those asked for before."""
        if not self._closed:
            self._workers.submit(self._context.run, self._read, room)

    def _read(self, room: int) -> None:
        """In the thread."""
        if self._closed or self._over:
            return
        read = 0
        try:
            if self._elements is None:
                self._elements = iter(self._source)
            for element in islice(self._elements, room):
                read += 1
                self._arrive((element, version_in(element)))
                if self._closed:
                    return
        except BaseException as error:  # or a closed loop's, which nobody will see
            self._error = error
        if read < room:
            self._over = True
            self._arrive(self._END)

    def _die(self, error: BaseException) -> None:
        """The thread ends, and was not told to."""
        self._error = error
        self._arrive(self._END)

    def _arrive(self, element: Any) -> None:
        self._arrived.append(element)
        if not self._posted:
            self._posted = True
            self._loop.call_soon_threadsafe(self._hand_over, context=self._loops_context)

    def _hand_over(self) -> None:
        """On the loop."""
        self._posted = False  # before the elements: what comes after them posts again
        try:
            while self._arrived and not self._closed:
                element = self._arrived.popleft()
                if element is not self._END:
                    self._start(*element)
                else:
                    error = self._error
                    self.close()
                    self._end(error)
        except Exception as error:  # nobody else would tell the consumer
            self.close()
            self._end(error)

    def close(self) -> None:
        """Read no more, and let the source go: in the thread, after the element that it is at work on."""
        if not self._closed:
            self._closed = True
            self._workers.submit(self._context.run, self._close)
            self._workers.stop()

    def _close(self) -> None:
        """Close the iterator if it is ours or a generator, and drop it here, where it was made.

        A DataLoader's has worker processes, which it ends when nothing refers to it any more; so might the frames of
        what it has raised, for as long as somebody keeps the error.
        """
        source, elements, error = self._source, self._elements, self._error
        self._source = self._elements = self._error = None
        ours = elements is not None and elements is not source
        try:
            if isinstance(elements, Generator) or (ours and callable(getattr(elements, "close", None))):
                elements.close()
        except BaseException as raised:
            _unheard(raised)
        if ours and error is not None:
            traceback.clear_frames(error.__traceback__)


def _unheard(error: BaseException | None) -> None:
    """Say what there is nobody left to be raised to."""
    if isinstance(error, Exception):
        logger.warning("the source of a map raised while it was being closed", exc_info=error)
