"""The protocol in an aiohttp application.

Lives here: what is aiohttp's. Must not be here: what a request means (http.py and what it uses).

    app = web.Application()
    setup(app, net=model)
    app.add_routes(routes(net=model))
    web.run_app(app, handler_cancellation=True)
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from aiohttp import web

from aneuron import AsyncDataParallel, Signature
from aneuron.web.aiohttp import of_request
from aneuron.web.checks import check_body
from aneuron.web.v2.errors import Refused
from aneuron.web.v2.http import MAX_BODY, Answer, Incoming, answer_of, find, read_head, refusal, report
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
    check_body(max_body)
    handler = _handler(Models(routes, models, signatures, load), max_body)
    return [web.route("*", "/v2", handler), web.route("*", "/v2/{rest:.*}", handler)]


def _handler(models: Models, max_body: int) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handler(request: web.Request) -> web.StreamResponse:
        try:
            path = "/v2" + (f"/{rest}" if (rest := request.match_info.get("rest")) else "")
            asked = find(request.method, path)
            if asked.what != "infer":
                answer = await report(models, asked, lambda: _body(request, max_body))
            else:
                served = models.find(asked.name, asked.version)
                head = read_head(request.headers.get, max_body)._replace(coding="")  # aiohttp has decompressed it
                incoming = Incoming(head, max_body)
                async for chunk in request.content.iter_any():
                    incoming.add(chunk)
                answer = await answer_of(served, head, incoming, of_request(request, asked.name, served.model))
        except ConnectionError:
            raise  # the client left while it sent
        except Exception as error:
            answer = refusal(error)
        return await _sent(answer, request)

    return handler


async def _body(request: web.Request, most: int) -> bytes:
    chunks: list[bytes] = []
    async for chunk in request.content.iter_any():
        chunks.append(chunk)
        if sum(map(len, chunks)) > most:
            raise Refused(413, f"the body has more than {most} bytes")
    return b"".join(chunks)


async def _sent(answer: Answer, request: web.Request) -> web.StreamResponse:
    headers = dict(answer.headers)
    if len(answer.body) == 1 and isinstance(answer.body[0], bytes):
        return web.Response(status=answer.status, headers=headers, body=answer.body[0])
    return web.Response(status=answer.status, headers=headers, body=_parts(answer))


async def _parts(answer: Answer) -> AsyncIterator[bytes | memoryview]:
    for part in answer.body:
        yield part
