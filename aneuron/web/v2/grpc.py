"""The protocol over gRPC.

Lives here: a server of it (grpc.aio), messages in and out. Must not be here: what a request means (requests.py,
models.py), how messages are built (messages.py).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from aneuron import AsyncDataParallel, Signature
from aneuron.web.checks import time_allowed
from aneuron.web.v2.datatypes import TABLE, in_bytes
from aneuron.web.v2.errors import Refused, told
from aneuron.web.v2.http import MAX_BODY, MUCH, aside, check_max_body, weight
from aneuron.web.v2.messages import SERVICE, message
from aneuron.web.v2.models import VERSION, Load, Models, Result
from aneuron.web.v2.requests import NO_SHARED_MEMORY, Inference, read_message

_STREAMED = 256  # requests of one stream whose answers have not been sent; then no more of them are read
_FOR_EVER = 10.0**9  # s
INFINITY = float("inf")
_FINAL = "triton_enable_empty_final_response"
_UNSUPPORTED = {
    **{
        f"{kind}SharedMemory{what}": NO_SHARED_MEMORY
        for kind in ("System", "Cuda")
        for what in ("Status", "Register", "Unregister")
    },
    "TraceSetting": "trace settings are unsupported",
    "LogSettings": "log settings are unsupported",
}


class GrpcServer:
    """A server of the Open Inference Protocol over gRPC; models are started by whoever serves them.

    signatures, load: as for `aneuron.web.v2.starlette.routes`. max_body: bytes that a message may have. max_timeout:
    seconds that a request may have, also one that has no deadline; None: no bound.
    options: of the gRPC server, `[("grpc.max_connection_age_ms", 60_000)]`, say. interceptors: of it, too.

    A client's deadline is the call's, as is its `timeout` parameter; who leaves cancels the call. The answers of a
    stream come in the order in which they are ready, with the ids of their requests; what fails says so in its place.
    `timeout` and deadlines bound what waits, and refuse at once what cannot be in time, with DEADLINE_EXCEEDED;
    a full queue is RESOURCE_EXHAUSTED. Raises at once what `routes` raises.

        async with GrpcServer(net=model) as server:
            port = await server.listen("127.0.0.1:8001")
    """

    def __init__(
        self,
        *,
        signatures: Mapping[str, Signature] | None = None,
        max_body: int = MAX_BODY,
        max_timeout: float | None = None,
        load: Load | None = None,
        options: list[tuple[str, Any]] | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        **models: AsyncDataParallel,
    ) -> None:
        check_max_body(max_body)
        time_allowed("max_timeout", max_timeout)
        self._most = INFINITY if max_timeout is None else max_timeout
        self._models = Models(GrpcServer, models, signatures, load)
        self._options = [
            ("grpc.max_receive_message_length", min(max_body, 2**31 - 1)),  # an int of C
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # a port in use is an error, not shared without a word
            *(options or ()),
        ]
        self._interceptors = list(interceptors)
        self._server: Any = None

    async def listen(self, address: str, credentials: "grpc.ServerCredentials | None" = None) -> int:
        """Serve on `host:port` (port 0: any; `unix:path`), with TLS if there are credentials; the port.

        Raises OSError where the address cannot be had, RuntimeError where it listens already.
        """
        if self._server is not None:
            raise RuntimeError("it listens already; another address needs another GrpcServer")
        server = grpc.aio.server(options=self._options, interceptors=self._interceptors)
        server.add_generic_rpc_handlers((_Handlers(self._models, self._most),))
        try:
            port = (
                server.add_insecure_port(address)
                if credentials is None
                else server.add_secure_port(address, credentials)
            )
        except RuntimeError as error:
            raise OSError(f"gRPC cannot listen on {address}: {error}") from None
        await server.start()
        self._server = server
        return int(port)

    def drain(self) -> None:
        """Have ServerReady and ModelReady say no, for good: no new requests, please. Those that come are served."""
        self._models.draining = True

    async def aclose(self, grace: float | None = None) -> None:
        """Take no more requests, and wait for those in progress; after `grace` seconds they are cancelled.

        None: they have all the time that they need.
        """
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(_FOR_EVER if grace is None else grace)  # gRPC's own None is at once

    async def __aenter__(self) -> "GrpcServer":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The methods of the service, by their names."""

    def __init__(self, models: Models, most: float = INFINITY) -> None:
        self._models, self._most = models, most
        self._infer = message("ModelInferRequest")
        self._response = message("ModelInferResponse")
        self._streamed = message("ModelStreamInferResponse")
        unary = {
            "ServerLive": lambda _: {"live": True},
            "ServerReady": lambda _: {"ready": models.ready},
            "ModelReady": lambda asked: {"ready": models.is_ready(asked.name, asked.version)},
            "ServerMetadata": lambda _: models.metadata(),
            "ModelMetadata": lambda asked: models.find(asked.name, asked.version).metadata(),
            "ModelConfig": lambda asked: {"config": _config(models.find(asked.name, asked.version).config())},
            "ModelStatistics": lambda asked: _statistics(models.statistics(asked.name, asked.version)),
            "RepositoryIndex": lambda asked: {"models": models.index(asked.ready)},
            "RepositoryModelUnload": lambda asked: models.unload(asked.model_name),
        }
        # Requests come as bytes: of what it cannot read gRPC says things of its own, and ends all others of a stream.
        self._methods = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self._one, None, self._response.SerializeToString),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
                self._stream, None, self._streamed.SerializeToString
            ),
            "RepositoryModelLoad": self._unary("RepositoryModelLoad", self._load),
        }
        for name, answer in unary.items():
            self._methods[name] = self._unary(name, _later(answer))
        for name, why in _UNSUPPORTED.items():
            self._methods[name] = grpc.unary_unary_rpc_method_handler(_refusing(why), None, None)

    def service(self, details: Any) -> Any:
        """The handler of a method; None where there is none, which gRPC answers with UNIMPLEMENTED."""
        service, _, method = details.method.strip("/").rpartition("/")
        return self._methods.get(method) if service == SERVICE else None

    def _unary(self, name: str, answer: Callable[[Any], Awaitable[dict[str, Any] | None]]) -> Any:
        """The handler of a method whose answer is made of plain values."""
        request, response = message(f"{name}Request"), message(f"{name}Response")

        async def handler(asked: bytes, context: Any) -> Any:
            try:
                return response(**(await answer(_read(request, asked)) or {}))
            except Exception as error:  # whatever it is, the client is told
                await _abort(context, error)

        return grpc.unary_unary_rpc_method_handler(handler, None, response.SerializeToString)

    async def _load(self, asked: Any) -> None:
        await self._models.load(asked.model_name)

    async def _one(self, data: bytes, context: Any) -> Any:
        """One inference."""
        try:
            request = await self._request(data)
            return await self._answer(request, len(data), context.time_remaining())
        except Exception as error:  # whatever it is, the client is told
            await _abort(context, error)

    async def _stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Inferences as they come; answers as they are ready."""
        ready: asyncio.Queue[Any] = asyncio.Queue()
        room = asyncio.Semaphore(_STREAMED)
        running: set[asyncio.Task[None]] = set()

        async def one(data: bytes) -> None:
            ready.put_nowait(await self._streamed_answer(data, context.time_remaining()))

        async def read() -> None:
            async for data in requests:
                await room.acquire()
                task = asyncio.ensure_future(one(data))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.gather(*running)

        reading = asyncio.ensure_future(read())
        reading.add_done_callback(lambda _: ready.put_nowait(None))
        try:
            while (answer := await ready.get()) is not None:
                yield answer
                room.release()  # not before it has been sent: a client that reads nothing is read no more of
            reading.result()
        finally:
            for task in (reading, *running):
                task.cancel()

    async def _streamed_answer(self, data: bytes, left: float | None) -> Any:
        request = self._infer()
        try:
            request = await self._request(data)
            answer = await self._answer(request, len(data), left)
            if _FINAL in request.parameters:
                answer.parameters["triton_final_response"].bool_param = True
            return self._streamed(infer_response=answer)
        except Exception as error:  # whatever it is, the client is told
            empty = self._response(model_name=request.model_name, id=request.id)
            return self._streamed(error_message=told(error).text, infer_response=empty)

    async def _request(self, data: bytes) -> Any:
        """The message of one inference. Raises `Refused`."""
        return await aside(lambda: _read(self._infer, data)) if len(data) > MUCH else _read(self._infer, data)

    async def _answer(self, request: Any, size: int, left: float | None) -> Any:
        """The answer to one request, which had so many bytes, and whose client waits for so many seconds more."""
        served = self._models.find(request.model_name, request.model_version)
        signature = served.signature
        if size > MUCH:
            inference = await aside(lambda: read_message(request, signature))
        else:
            inference = read_message(request, signature, served.remembered)
        left = self._most if left is None else min(left, self._most)
        if left < INFINITY:
            own = inference.terms.timeout
            bound = max(0.0, left if own is None else min(own, left))
            inference = inference._replace(terms=inference.terms._replace(timeout=bound))
        results = await served.infer(inference, served.model)
        if weight(results) > MUCH:
            return await aside(lambda: self._written(served.name, inference, results))
        return self._written(served.name, inference, results)

    def _written(self, name: str, inference: Inference, results: list[Result]) -> Any:
        answer = self._response(model_name=name, model_version=VERSION, id=inference.id)
        for result in results:
            answer.outputs.add(name=result.name, datatype=result.datatype.name, shape=result.shape)
            answer.raw_output_contents.append(bytes(in_bytes(result.value)))
        return answer


def _read(kind: Any, data: bytes) -> Any:
    """The message that bytes are. Raises `Refused`."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise Refused(400, f"the request is no {kind.DESCRIPTOR.name}: {error}") from None


def _later(answer: Callable[[Any], dict[str, Any] | None]) -> Callable[[Any], Awaitable[dict[str, Any] | None]]:
    async def handler(asked: Any) -> dict[str, Any] | None:
        return answer(asked)

    return handler


def _refusing(why: str) -> Callable[[bytes, Any], Awaitable[None]]:
    async def handler(_: bytes, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, why)

    return handler


async def _abort(context: Any, error: Exception) -> None:
    """End a request with what its client is told."""
    said = told(error)
    more = [("retry-after", str(said.retry_after))] if said.retry_after is not None else []
    await context.abort(grpc.StatusCode[said.code], said.text, tuple(more))


_NUMBERS = {datatype.config: number for number, datatype in enumerate(TABLE.values(), 1)}


def _config(said: dict[str, Any]) -> dict[str, Any]:
    """A configuration as the message has it: datatypes are numbers."""
    said = {name: value for name, value in said.items() if name != "dynamic_batching"}
    for side in ("input", "output"):
        said[side] = [each | {"data_type": _NUMBERS[each["data_type"]]} for each in said[side]]
    return said


def _statistics(said: dict[str, Any]) -> dict[str, Any]:
    """Statistics without what the message lacks."""
    absent = ("batch_stats", "memory_usage", "response_stats")
    return {"model_stats": [{key: each[key] for key in each if key not in absent} for each in said["model_stats"]]}
