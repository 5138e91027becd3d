"""The protocol in a Starlette or FastAPI application, or as an ASGI application of its own.

Lives here: ASGI. Must not be here: what a request means (http.py and what it uses).

    app = FastAPI(lifespan=lifespan(net=model))
    app.router.routes += routes(net=model)
"""

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route
from starlette.types import Message, Receive, Scope, Send

from aneuron import AsyncDataParallel, Signature
from aneuron.web.starlette import is_draining, of_request, while_there
from aneuron.web.v2.http import (
    MAX_BODY,
    Answer,
    Asked,
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

_PART = 1 << 20  # bytes that are handed to the server at once


def routes(
    *,
    signatures: Mapping[str, Signature] | None = None,
    max_body: int = MAX_BODY,
    load: Load | None = None,
    **models: AsyncDataParallel,
) -> list[BaseRoute]:
    """Routes that serve models by the Open Inference Protocol: `Starlette(routes=[*routes(net=model), ...])`.

    signatures: by name, what models take and return, in other words than their `example_inputs` say, or where there
        are none.
    max_body: bytes that the body of a request may have, also when it is decompressed; longer ones get 413, before they
        are read if their length is known.
    load: what a POST to `/v2/repository/models/NAME/load` awaits, which is given the name; None refuses it.

    The models are started by who serves them: `lifespan(net=model)` of `aneuron.web.starlette`; else by their first
    call, and until then `/v2/health/ready` is 503. With `install` of the same module requests have its deadlines, and
    `Server-Timing`. A client that leaves cancels its call. Raises at once TypeError and ValueError for what is no
    model, for models of which nobody has said what they take, and for dtypes that the protocol has no word for.

        >>> import aneuron, torch
        >>> from starlette.applications import Starlette
        >>> from starlette.testclient import TestClient
        >>> from aneuron.web.starlette import lifespan
        >>> from aneuron.web.v2.starlette import routes
        >>> net = aneuron.AsyncDataParallel(torch.nn.ReLU().eval(), example_inputs=torch.zeros(1, 2))
        >>> app = Starlette(routes=routes(net=net), lifespan=lifespan(net=net))
        >>> request = {"inputs": [{"name": "input0", "shape": [1, 2], "datatype": "FP32", "data": [-1.0, 2.0]}]}
        >>> with TestClient(app) as client:
        ...     client.post("/v2/models/net/infer", json=request).json()["outputs"]
        [{'name': 'output0', 'datatype': 'FP32', 'shape': [1, 2], 'data': [0.0, 2.0]}]
    """
    check_max_body(max_body)
    served = V2(Models(routes, models, signatures, load), max_body)
    return [Route("/v2", served), Route("/v2/{rest:path}", served)]


class V2:
    """The protocol as an ASGI application, whose paths begin with /v2. `aneuron serve` uses it without a router."""

    def __init__(self, models: Models, max_body: int = MAX_BODY) -> None:
        self._models, self._max_body = models, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            answer = await self._answer(find(scope["method"], path), scope, receive)
        except ClientDisconnect:
            return
        except Exception as error:  # whatever it is, the client is told
            answer = refusal(error)
        await _send(answer, scope, send)

    async def _answer(self, asked: Asked, scope: Scope, receive: Receive) -> Answer:
        if asked.what != "infer":
            self._models.draining |= is_draining(scope)
            return await report(self._models, asked, lambda: self._read(receive))
        served = self._models.find(asked.name, asked.version)
        head = read_head(Headers(scope=scope).get, self._max_body)
        check_room(served, head)
        incoming = await self._read(receive)
        view = of_request(scope, asked.name, served.model)
        return await while_there(receive, answer_of(served, head, incoming, view))

    async def _read(self, receive: Receive) -> Incoming:
        """The body of a request. Raises `Refused`, and `ClientDisconnect`."""
        incoming, more = Incoming(self._max_body), True
        while more:
            message: Message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            if chunk := message.get("body", b""):
                incoming.add(chunk)
            more = message.get("more_body", False)
        return incoming


async def _send(answer: Answer, scope: Scope, send: Send) -> None:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    body = answer.body if scope["method"] != "HEAD" else []
    if len(body) == 1 and isinstance(body[0], bytes):
        await send({"type": "http.response.body", "body": body[0]})
        return
    for part in body:
        for at in range(0, len(part), _PART):  # servers take bytes: a copy, but not of all of it at once
            await send({"type": "http.response.body", "body": bytes(part[at : at + _PART]), "more_body": True})
    await send({"type": "http.response.body", "body": b""})
