"""The protocol over HTTP: which path asks for what, what a body holds, what an answer is made of.

Lives here: HTTP as data, whatever server or framework carries it. Must not be here: one of them (starlette.py,
aiohttp.py), the rules of a request (requests.py).
"""

import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import msgspec
from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

from aneuron import AsyncDataParallel, View
from aneuron.web.checks import check_body
from aneuron.web.v2.datatypes import dumps, finite, in_bytes, in_json
from aneuron.web.v2.errors import Refused, told
from aneuron.web.v2.models import VERSION, Models, Result, Served
from aneuron.web.v2.requests import NO_SHARED_MEMORY, Inference, read_json, read_raw

T = TypeVar("T")
Headers = list[tuple[str, str]]
Get = Callable[[str], str | None]  # a header of the request, by its name in small letters

MAX_BODY = 64 << 20
MUCH = 1 << 18  # bytes from which on work is a thread's: the loop has others to serve
_MEMBERS = 16
_SMALL = 1 << 10  # bytes up to which compression is not worth its headers
_WINDOW = {"gzip": 31, "deflate": 15}  # of zlib; what HTTP calls deflate is zlib's format
_CODINGS = ("", "identity", *_WINDOW)
_JSON, _BINARY = "application/json", "application/octet-stream"


def check_max_body(max_body: int) -> None:
    """Raise for what is no number of bytes: strangers' bodies have a bound."""
    if max_body is None:
        raise ValueError(f"max_body=None: expected an int of bytes, {MAX_BODY} is usual")
    check_body(max_body)


class Answer(NamedTuple):
    """Status, headers and body; the parts of a body one after the other."""

    status: int
    headers: Headers
    body: list[bytes | memoryview]


class Head(NamedTuple):
    """What the headers of an inference request say of its body."""

    length: int | None  # of it; None: nobody knows
    json: int | None  # of the JSON at its beginning; None: all of it
    coding: str  # how it is compressed, if it is
    accepts: str  # how the answer is to be


class Asked(NamedTuple):
    """What a path asks for."""

    what: str
    name: str = ""
    version: str = ""


# Paths.

_METHODS = {
    "infer": "POST",
    "index": "POST",
    "load": "POST",
    "unload": "POST",
}
_OF_MODEL = {"": "metadata", "ready": "ready", "infer": "infer", "config": "config", "stats": "stats"}
_OF_SERVER = {
    (): "server",
    ("health", "live"): "live",
    ("health", "ready"): "server ready",
    ("models", "stats"): "stats",
    ("repository", "index"): "index",
}
_SHARED_MEMORY = ("systemsharedmemory", "cudasharedmemory")


@lru_cache(256)
def find(method: str, path: str) -> Asked:
    """What is asked for by a path that begins with /v2. Raises `Refused`."""
    parts = tuple(path.strip("/").split("/"))[1:]
    asked = _find(parts)
    if asked is None:
        if parts[0] in _SHARED_MEMORY:
            raise Refused(501, NO_SHARED_MEMORY)
        if parts[:1] == ("logging",) or parts[-2:] == ("trace", "setting"):
            raise Refused(501, "trace and log settings are unsupported")
        raise Refused(404, f"there is nothing at {path!r:.200}")
    expected = _METHODS.get(asked.what, "GET")
    if method != expected and (method, expected) != ("HEAD", "GET"):
        raise Refused(405, f"{path!r:.200} is asked for by {expected}")
    return asked


def _find(parts: tuple[str, ...]) -> Asked | None:
    if parts in _OF_SERVER:
        return Asked(_OF_SERVER[parts])
    if parts[:2] == ("repository", "models") and len(parts) == 4 and parts[3] in ("load", "unload"):
        return Asked(parts[3], parts[2])
    if parts[0] != "models" or len(parts) < 2:
        return None
    _, name, *rest = parts
    version = ""
    if rest[:1] == ["versions"] and len(rest) >= 2:
        version, rest = rest[1], rest[2:]
    what = _OF_MODEL.get(rest[0] if rest else "") if len(rest) <= 1 else None
    return None if what is None else Asked(what, name, version)


# Bodies.


def read_head(get: Get, max_body: int) -> Head:
    """What the headers say. Raises `Refused` before anything of the body is read."""
    coding, accepts = _named(get("content-encoding")), _named(get("accept-encoding"))
    if coding not in _CODINGS:
        raise Refused(415, f"Content-Encoding: {coding!r:.40}; expected gzip or deflate")
    # Libraries accept several by themselves, whatever is sent, and tensors hardly shrink: who names one means it.
    accepts = accepts if accepts in _WINDOW else ""
    return _head(get("content-length"), get("inference-header-content-length"), coding, accepts, max_body)


def _named(coding: str | None) -> str:
    return coding.strip().lower() if coding else ""


@lru_cache(256)  # of what is short: what strangers may write as they like comes in no further than `read_head`
def _head(said_length: str | None, said_json: str | None, coding: str, accepts: str, most: int) -> Head:
    length = _number("content-length", said_length)
    json = _number("inference-header-content-length", said_json)
    if length is not None and length > most:
        raise Refused(413, f"the body has {length} bytes; at most {most} are taken")
    if length is not None and json is not None and json > length and not coding:
        raise Refused(400, f"Inference-Header-Content-Length is {json}; the body has {length} bytes")
    return Head(length, json, coding if coding in _WINDOW else "", accepts)


def _number(name: str, value: str | None) -> int | None:
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) < 19):
        raise Refused(400, f"{name}: {value!r:.40}; expected a number of bytes")
    return int(value)


def check_room(served: Served, head: Head) -> None:
    """Raise what a call would be refused with, where reading its body first would be for nothing, and much.

    Asked is for a row of usual priority: what a body asks for is not known yet.
    """
    if head.length is None or head.length > MUCH:
        served.model.check_admission()


class Incoming:
    """The body of a request, as it comes."""

    __slots__ = ("_chunks", "_max", "size")

    def __init__(self, max_body: int) -> None:
        self._max, self.size = max_body, 0
        self._chunks: list[bytes] = []

    def add(self, chunk: bytes) -> None:
        """The next bytes. Raises `Refused` if they are too many."""
        self.size += len(chunk)
        if self.size > self._max:
            raise Refused(413, f"the body has more than {self._max} bytes")
        self._chunks.append(chunk)

    def all(self, coding: str = "") -> bytes:
        """Its bytes, decompressed. Raises `Refused`."""
        data = b"".join(self._chunks)
        return decompress(data, coding, self._max) if coding else data


def _cut(data: bytes, json: int | None) -> tuple[bytes, bytearray | None]:
    if json is None:
        return data, None
    if json > len(data):
        raise Refused(400, f"Inference-Header-Content-Length is {json}; the body has {len(data)} bytes")
    return data[:json], bytearray(memoryview(data)[json:])


def decompress(data: bytes, coding: str, most: int) -> bytes:
    """What was compressed. Raises `Refused` for what was not, and for more bytes than `most`, or members."""
    parts, left = [], most
    for _ in range(_MEMBERS):
        one = zlib.decompressobj(_WINDOW[coding])
        try:
            parts.append(one.decompress(data, left + 1))
        except zlib.error as error:
            raise Refused(400, f"the body is not {coding}: {error}") from None
        left -= len(parts[-1])
        if left < 0:
            raise Refused(413, f"the body has more than {most} bytes when it is decompressed")
        if not one.eof:
            raise Refused(400, f"the body ends in the middle of {coding}")
        data = one.unused_data  # a copy, and so there is a bound
        if not data:
            return b"".join(parts)
    raise Refused(400, f"the body is {coding} of more than {_MEMBERS} members; send one")


def compress(data: bytes, coding: str) -> bytes:
    """Compressed fast rather than well."""
    one = zlib.compressobj(1, zlib.DEFLATED, _WINDOW[coding])
    return one.compress(data) + one.flush()


# Of each loop. Of its own: what an application's handlers do in threads does not wait for what strangers send.
_threads: RunVar[CapacityLimiter] = RunVar("aneuron.v2.threads")


async def aside(function: Callable[[], T]) -> T:
    """What a function returns that may take a while: in a thread."""
    try:
        limiter = _threads.get()
    except LookupError:
        _threads.set(limiter := CapacityLimiter(4))
    return await to_thread.run_sync(function, limiter=limiter)


# Answers.


async def answer_of(served: Served, head: Head, incoming: Incoming, view: View | AsyncDataParallel) -> Answer:
    """The answer to an inference request whose body has come. Raises what the call raises, and `Refused`."""
    signature = served.signature
    much = incoming.size > (_SMALL if head.coding else MUCH)  # what is compressed may become anything
    remembered = None if much else served.remembered  # the loop's alone

    def read() -> Inference:
        json, binary = _cut(incoming.all(head.coding), head.json)
        if head.json == 0:
            return read_raw(binary or bytearray(), signature)
        return read_json(json, binary, signature, remembered)

    inference = await aside(read) if much else read()
    results = await served.infer(inference, view)
    if weight(results) > MUCH:
        return await aside(lambda: written(served.name, inference, results, head.accepts))
    return written(served.name, inference, results, head.accepts)


def weight(results: Iterable[Result]) -> int:
    """How much there is to do to write outputs, in bytes: of numbers in JSON, and of texts, each costs more."""
    return sum([_weight(result.value, result.binary) for result in results])


def _weight(value: Any, binary: bool) -> int:
    if isinstance(value, (list, tuple)):
        return sum(map(len, value)) + 64 * len(value)
    return value.nbytes * (1 if binary else 8)  # type: ignore[no-any-return]


@lru_cache(512)
def _usual(name: str, outputs: tuple[tuple[str, str, tuple[int, ...], int], ...]) -> bytes:
    """The JSON of an answer that is all in binary: it is the same for requests that are alike."""
    described = [
        {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
        for name, datatype, shape, size in outputs
    ]
    return _encoder.encode({"model_name": name, "model_version": VERSION, "outputs": described})


def written(name: str, inference: Inference, results: Sequence[Result], coding: str = "") -> Answer:
    """The answer that has these outputs."""
    if not inference.id and all(result.binary for result in results):
        parts = [in_bytes(result.value) for result in results]
        said = [
            (result.name, result.datatype.name, result.shape, len(part))
            for result, part in zip(results, parts, strict=True)
        ]
        json = _usual(name, tuple(said))
        return _finished(200, _binary_headers(json), [json, *parts], coding)
    described: list[dict[str, Any]] = []
    parts = []
    for result in results:
        one: dict[str, Any] = {"name": result.name, "datatype": result.datatype.name, "shape": result.shape}
        if result.binary:
            parts.append(in_bytes(result.value))
            one["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            one["data"] = in_json(result.name, result.value)
        described.append(one)
    body: dict[str, Any] = {"model_name": name, "model_version": VERSION, "outputs": described}
    if inference.id:
        body["id"] = inference.id
    in_words = [result.value for result in results if not result.binary]
    json = _encoder.encode(body) if not in_words or finite(in_words) else dumps(body)
    headers = _binary_headers(json) if parts else [("content-type", _JSON)]
    return _finished(200, headers, [json, *parts], coding)


def _binary_headers(json: bytes) -> Headers:
    return [("content-type", _BINARY), ("inference-header-content-length", str(len(json)))]


_encoder = msgspec.json.Encoder()


def _finished(status: int, headers: Headers, parts: list[bytes | memoryview], coding: str = "") -> Answer:
    """The parts as bytes; those that are small, or compressed, in one."""
    size = sum(map(len, parts))
    if coding and size > _SMALL:
        parts = [compress(b"".join(parts), coding)]
        headers += [("content-encoding", coding), ("vary", "accept-encoding")]
        size = len(parts[0])
    elif size <= MUCH:
        parts = [b"".join(parts)]
    headers.append(("content-length", str(size)))
    return Answer(status, headers, parts)


def refusal(error: Exception) -> Answer:
    """The answer to a request that is not served, in the protocol's words."""
    status, text, _, retry_after = told(error)
    headers = [("content-type", _JSON)]
    if retry_after is not None:
        headers.append(("retry-after", str(retry_after)))
    return _finished(status, headers, [_encoder.encode({"error": text})])


async def report(models: Models, asked: Asked, read: Callable[[], Awaitable[Incoming]]) -> Answer:
    """The answer to all but inference. Raises `Refused`."""
    what, name, version = asked
    value: Any
    status = 200
    if what == "index":
        value = models.index(_ready_only((await read()).all()))
    elif what == "load":
        await models.load(name)
        value = {}
    elif what == "unload":
        models.unload(name)
        value = {}
    elif what == "stats":
        value = models.statistics(name, version)
    elif what == "server":
        value = models.metadata()
    elif what == "live":
        value = {"live": True}
    elif what == "server ready":
        value, status = {"ready": models.ready}, 200 if models.ready else 503
    else:
        served = models.find(name, version)
        ready = models.is_ready(name, version)
        if what == "ready":
            value, status = {"name": name, "ready": ready}, 200 if ready else 503
        else:
            value = served.metadata() if what == "metadata" else served.config()
    return _finished(status, [("content-type", _JSON)], [_encoder.encode(value)])


def _ready_only(body: bytes) -> bool:
    if not body.strip():
        return False
    try:
        said = msgspec.json.decode(body, type=Mapping[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, f"the request is no JSON object: {error}") from None
    return said.get("ready") is True
