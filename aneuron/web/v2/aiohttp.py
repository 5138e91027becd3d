"""The protocol in an aiohttp application.

Lives here: what is aiohttp's. Must not be here: what a request means (http.py and what it uses).

    app = web.Application()
    setup(app, net=model)
    app.add_routes(routes(net=model))
    web.run_app(app, handler_cancellation=True)
"""

from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict

from aneuron import AsyncDataParallel, Signature
from aneuron.web.aiohttp import is_draining, of_request
from aneuron.web.v2.errors import Refused
from aneuron.web.v2.http import (
    MAX_BODY,
    Answer,
    Incoming,
    answer_of,
    check_max_body,
    check_room,
    find,
    read_head,
    refusal,
    report,
)
from aneuron.web.v2.models import Load, Models


def routes(
    *,
    signatures: Mapping[str, Signature] | None = None,
    max_body: int = MAX_BODY,
    load: Load | None = None,
    **models: AsyncDataParallel,
) -> list[web.RouteDef]:
    """Routes that serve models by the Open Inference Protocol: `app.add_routes(routes(net=model))`.

    The same as `aneuron.web.v2.starlette.routes`, for `setup` of `aneuron.web.aiohttp`. Bodies are read as they come:
    `client_max_size` of the application does not bound them, `max_body` does. A client that leaves cancels its call
    where the server is told to notice: `web.run_app(app, handler_cancellation=True)`.
    """
    check_max_body(max_body)
    served = Models(routes, models, signatures, load)
    protocol = V2(served, max_body)

    async def handler(request: web.Request) -> web.StreamResponse:
        rest = request.match_info.get("rest", "")  # of the path below an application that this one is in
        if not rest.endswith("/infer"):  # it may be about readiness
            served.draining |= is_draining(request)
        return await protocol.answer(request, f"/v2/{rest}" if rest else "/v2")

    return [web.route("*", "/v2", handler), web.route("*", "/v2/{rest:.*}", handler)]


class V2:
    """The protocol as a handler of requests whose paths begin with /v2: for `web.Server`, which has no router."""

    def __init__(self, models: Models, max_body: int = MAX_BODY) -> None:
        self._models, self._max_body = models, max_body

    def __call__(self, request: web.BaseRequest) -> Coroutine[Any, Any, web.StreamResponse]:
        """Answer one request. To be awaited."""
        return self.answer(request, request.path)

    async def answer(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        """Answer one request, taken for one of this path."""
        models = self._models
        try:
            asked = find(request.method, path)
            if asked.what != "infer":
                return _sent(await report(models, asked, lambda: self._read(request)))
            served = models.find(asked.name, asked.version)
            head = read_head(request.headers.get, self._max_body)
            if head.coding:  # aiohttp has decompressed it
                head = head._replace(coding="")
            check_room(served, head)
            incoming = await self._read(request)
            return _sent(await answer_of(served, head, incoming, of_request(request, asked.name, served.model)))
        except Exception as error:  # whatever it is, the client is told
            if isinstance(error, ConnectionError) and (request.transport is None or request.transport.is_closing()):
                raise  # it left while it sent
            response = _sent(refusal(error))
            if request.content.exception() is not None:  # nobody knows where the next request begins
                response.force_close()
            return response

    async def _read(self, request: web.BaseRequest) -> Incoming:
        """The body of a request. Raises `Refused`."""
        incoming = Incoming(self._max_body)
        try:
            if request.content.is_eof():  # it has come whole, with the head
                incoming.add(request.content.read_nowait())
            else:
                async for chunk in request.content.iter_any():
                    incoming.add(chunk)
        except (ClientPayloadError, HttpProcessingError, web.RequestPayloadError) as error:
            request.content.feed_eof()  # or aiohttp reads on, meets the same, and closes before the answer is out
            raise Refused(400, f"the body cannot be read: {error}") from None
        return incoming


def _sent(answer: Answer) -> web.StreamResponse:
    headers = CIMultiDict(answer.headers)
    if len(answer.body) == 1 and isinstance(answer.body[0], bytes):
        return web.Response(status=answer.status, headers=headers, body=answer.body[0])
    return web.Response(status=answer.status, headers=headers, body=_parts(answer))


async def _parts(answer: Answer) -> AsyncIterator[bytes | memoryview]:
    for part in answer.body:
        yield part
