"""What mypy makes of calls: they are coroutines, which tasks and task groups want. Not run; `make lint` reads it."""

import asyncio
from collections.abc import Coroutine
from typing import Any, assert_type

from torch import Tensor

from aneuron import AsyncDataParallel, Map, Timing, View
from aneuron.web.views import RequestView


async def calls(model: AsyncDataParallel, net: RequestView, x: Tensor) -> None:
    """Each way to call."""
    _ = assert_type(model(x), Coroutine[Any, Any, Any])
    _ = assert_type(net(x), Coroutine[Any, Any, Any])
    view = assert_type(model.options(tenant="acme"), View)
    _ = assert_type(view(x), Coroutine[Any, Any, Any])
    assert_type(view.options(priority=-1), View)
    assert_type(net.options(timeout=None), RequestView)
    assert_type(net.map([x]), Map[Any])
    assert_type(await net.timed(x), tuple[Any, Timing])
    assert_type(asyncio.create_task(net(x)), asyncio.Task[Any])
    async with asyncio.TaskGroup() as group:
        group.create_task(model(x))
        group.create_task(net(x))
        group.create_task(view(x))
