"""What a request of the Open Inference Protocol asks for: inputs in the order of the model, outputs, terms.

Lives here: the protocol's rules for an inference request, by HTTP and by gRPC, as data. Must not be here: sockets,
waiting for the model (models.py), how an element lies in bytes (datatypes.py).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import msgspec

from aneuron import Signature, TensorSpec
from aneuron.web.v2.datatypes import BYTES, TABLE, Datatype, Reader, datatype_of, objects, reader, tensor_of
from aneuron.web.v2.errors import Refused

Parameters = Mapping[str, Any]

_MOST = 2**63 - 1
_SHARED_MEMORY = "shared_memory_region"
_NO_STATE = ("sequence_id", "sequence_start", "sequence_end")
NO_SHARED_MEMORY = "shared memory is unsupported: send the data with the request, in binary"


class Input(msgspec.Struct):
    """One input, as JSON has it."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = None  # clients send null beside binary data


class Output(msgspec.Struct):
    """One output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class Body(msgspec.Struct):
    """The JSON of an inference request."""

    inputs: list[Input]
    outputs: list[Output] = []
    id: str = ""
    parameters: dict[str, Any] = {}


class Wanted(NamedTuple):
    """An output that is asked for, and whether in binary."""

    name: str
    binary: bool


class Terms(NamedTuple):
    """On what terms the model is called."""

    timeout: float | None = None  # s
    priority: float = 0.0
    tenant: str | None = None


class Inference(NamedTuple):
    """What a request asks for."""

    id: str
    values: list[Any]  # a tensor or a list for each of the model's inputs
    empty: bool  # whether it has no rows
    outputs: list[Wanted] | None  # None: all
    binary: bool  # whether outputs are binary that say nothing else
    terms: Terms


# A request, and what reads each of its inputs that are in the binary data.
Read = tuple[Inference, dict[str, Reader]]


class Seen(NamedTuple):
    """What a request means that says the same, with other data."""

    readers: list[Reader]  # in the order of the model's inputs
    inference: Inference  # without its values

    def again(self, binary: bytearray) -> Inference:
        """What it means with this data."""
        _, _, empty, outputs, in_binary, terms = self.inference
        return Inference("", [read(binary) for read in self.readers], empty, outputs, in_binary, terms)


class Remembered:
    """Of one model: what requests meant whose inputs are all in the binary data. Clients say the same again and again.

    Of one door: JSON and messages are not kept together.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[object, ...], Seen] = {}

    def read(
        self, words: bytes, sizes: Sequence[int], binary: bytearray, signature: Signature, afresh: Callable[[], Read]
    ) -> Inference:
        """What a request means, by its words and how much binary data there is; read `afresh` if nobody said it yet."""
        if len(words) > _LONGEST:
            return afresh()[0]
        said = words, *sizes
        if (seen := self._seen.get(said)) is not None:
            return seen.again(binary)
        inference, readers = afresh()
        if not inference.id and len(readers) == len(signature.inputs):
            if len(self._seen) >= _KEPT:
                self._seen.clear()
            ordered = [readers[spec.name] for spec in signature.inputs]
            self._seen[said] = Seen(ordered, inference._replace(values=[]))
        return inference

    def clear(self) -> None:
        """Know nothing any more."""
        self._seen.clear()


_decoder = msgspec.json.Decoder(Body)
_KEPT, _LONGEST = 128, 1 << 11  # requests that are remembered of a model, and bytes of the words of one


def read_json(
    head: bytes, binary: bytearray | None, signature: Signature, remembered: Remembered | None = None
) -> Inference:
    """The request that a JSON object makes, and the bytes that follow it. Raises `Refused`.

    `remembered` is of the same signature.
    """
    if remembered is None or binary is None:
        return _read(head, binary, signature)[0]
    return remembered.read(head, (len(binary),), binary, signature, lambda: _read(head, binary, signature))


def _read(head: bytes, binary: bytearray | None, signature: Signature) -> Read:
    """The request, and what reads each of its inputs that are in the binary data."""
    try:
        body = _decoder.decode(head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        body = _lenient(head, error)
    at = 0
    given: dict[str, Any] = {}
    readers: dict[str, Reader] = {}
    for each in body.inputs:
        spec, datatype = _described(each.name, each.datatype, each.shape, signature, given)
        size = each.parameters.get("binary_data_size") if each.parameters else None
        if size is None:
            if each.data is None:
                _check_region(each.name, each.parameters)
                raise Refused(400, f"input {each.name!r} has no data: give it data, or binary_data_size")
            given[each.name] = tensor_of(each.data, spec, datatype, each.shape)
            continue
        if each.data is not None:
            raise Refused(400, f"input {each.name!r} has both data and binary_data_size")
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise Refused(400, f"input {each.name!r}: binary_data_size is {size!r:.40}; expected a number of bytes")
        if binary is None and not size:  # nothing, and clients say so without the header
            given[each.name] = reader(0, 0, spec, datatype, each.shape)(bytearray())
            continue
        if binary is None:
            raise Refused(
                400,
                f"input {each.name!r} has binary_data_size, and the header Inference-Header-Content-Length, which says "
                "where binary data begins, is missing",
            )
        if at + size > len(binary):
            raise Refused(400, f"input {each.name!r} has {size} bytes of binary data; {len(binary) - at} are left")
        readers[each.name] = read = reader(at, size, spec, datatype, each.shape)
        given[each.name] = read(binary)
        at += size
    if binary is not None and at != len(binary):
        raise Refused(400, f"{len(binary) - at} bytes of binary data belong to no input")
    everything = _flag(body.parameters, "binary_data_output", False)
    outputs = []
    for output in body.outputs:
        _check_output(output.name, output.parameters)
        binary_data = _flag(output.parameters, "binary_data", everything, f"output {output.name!r}")
        outputs.append(Wanted(output.name, binary_data))
    return _made(body.id, given, signature, outputs, everything, body.parameters), readers


def _lenient(head: bytes, error: Exception) -> Body:
    """JSON with NaN and Infinity in it, as Python's clients send them."""
    if isinstance(error, msgspec.ValidationError):
        raise Refused(400, f"the request is not as the protocol has it: {error}") from None
    try:
        said = json.loads(head)
        json.dumps(said, ensure_ascii=False).encode()  # half a character, as JSON can escape it, is no text
        return msgspec.convert(said, Body)
    except (ValueError, RecursionError):
        raise Refused(400, f"the request is no JSON: {error}") from None


def read_raw(data: bytearray, signature: Signature) -> Inference:
    """A request that is nothing but the elements of the model's only input, of one row. Raises `Refused`."""
    if len(signature.inputs) != 1:
        raise Refused(
            400,
            f"a raw binary request has one input, and the model has {len(signature.inputs)}: send JSON, and its length "
            "as Inference-Header-Content-Length",
        )
    spec = signature.inputs[0]
    datatype = datatype_of(spec)
    if datatype is BYTES:
        value = objects([bytes(data)], 1, spec)
    else:
        value = reader(0, len(data), spec, datatype, _raw_shape(len(data), spec, datatype))(data)
    return Inference("", [value], False, None, True, Terms())


def _raw_shape(size: int, spec: TensorSpec, datatype: Datatype) -> list[int]:
    rows = rows_at(spec)
    shape = [1 if at == rows else size_ for at, size_ in enumerate(spec.shape)]
    known = prod([each for each in shape if each != -1])
    if shape.count(-1) > 1 or (shape.count(-1) and size % (known * datatype.size)):
        raise Refused(
            400, f"input {spec.name!r} has shape {list(spec.shape)}, which {size} bytes do not say; send JSON with it"
        )
    return [size // (known * datatype.size) if each == -1 else each for each in shape]


def read_message(message: Any, signature: Signature, remembered: Remembered | None = None) -> Inference:
    """The request that a ModelInferRequest makes, which is without its raw contents then. Raises `Refused`.

    `remembered` is of the same signature.
    """
    raw = list(message.raw_input_contents)
    binary, sizes = bytearray().join(raw) if raw else None, list(map(len, raw))
    del message.raw_input_contents[:]
    if remembered is None or binary is None:
        return _read_message(message, binary, sizes, signature)[0]
    words = message.SerializeToString()
    return remembered.read(words, sizes, binary, signature, lambda: _read_message(message, binary, sizes, signature))


def _read_message(message: Any, binary: bytearray | None, sizes: Sequence[int], signature: Signature) -> Read:
    """The request, and what reads each of its inputs that are in the binary data."""
    given: dict[str, Any] = {}
    readers: dict[str, Reader] = {}
    if binary is not None and len(sizes) != len(message.inputs):
        raise Refused(400, f"there are {len(message.inputs)} inputs and {len(sizes)} raw_input_contents; one for each")
    at = 0
    for index, each in enumerate(message.inputs):
        shape = list(each.shape)
        spec, datatype = _described(each.name, each.datatype, shape, signature, given)
        if binary is None:
            _check_region(each.name, each.parameters)
            given[each.name] = _typed(each, spec, datatype, shape)
            continue
        if each.HasField("contents"):
            raise Refused(
                400, f"input {each.name!r} has contents, and the request raw_input_contents; only one of both"
            )
        readers[each.name] = read = reader(at, sizes[index], spec, datatype, shape)
        given[each.name] = read(binary)
        at += sizes[index]
    outputs = [Wanted(each.name, True) for each in message.outputs]
    for each in message.outputs:
        _check_output(each.name, parameters_of(each.parameters))
    return _made(message.id, given, signature, outputs, True, parameters_of(message.parameters)), readers


def _typed(each: Any, spec: TensorSpec, datatype: Datatype, shape: Sequence[int]) -> Any:
    """The tensor of typed contents."""
    if datatype.contents is None:
        raise Refused(400, f"input {spec.name!r}: {datatype.name} has no typed contents; send raw_input_contents")
    others = [name.name for name, _ in each.contents.ListFields() if name.name != datatype.contents]
    if others:
        raise Refused(400, f"input {spec.name!r} is {datatype.name}: expected {datatype.contents}, not {others[0]}")
    found = list(getattr(each.contents, datatype.contents))
    if datatype is BYTES:
        return objects(found, prod(shape), spec)
    return tensor_of(found, spec, datatype, shape)


def parameters_of(parameters: Any) -> dict[str, Any]:
    """A map of InferParameter as plain values."""
    found = {}
    for name, value in parameters.items():
        choice = value.WhichOneof("parameter_choice")
        found[name] = getattr(value, choice) if choice else None
    return found


# The rules of both.


def _described(
    name: str, datatype: str, shape: Sequence[int], signature: Signature, given: Mapping[str, Any]
) -> tuple[TensorSpec, Datatype]:
    """What the model says of an input that a request has. Raises `Refused` unless it fits."""
    spec = next((each for each in signature.inputs if each.name == name), None)
    if spec is None:
        raise Refused(400, f"the model has no input {name!r}; it has {_listed(signature.inputs)}")
    if name in given:
        raise Refused(400, f"input {name!r} is there twice")
    expected = datatype_of(spec)
    if datatype != expected.name:
        known = "" if datatype in TABLE else ", which is no datatype of the protocol"
        raise Refused(400, f"input {name!r} has datatype {datatype!r:.40}{known}; the model takes {expected.name}")
    wanted = spec.shape
    if len(shape) != len(wanted) or not all(
        size >= 0 and want in (size, -1) for size, want in zip(shape, wanted, strict=True)
    ):
        raise Refused(400, f"input {name!r} has shape {list(shape)}; the model takes {list(wanted)}, -1 for any size")
    if prod([size or 1 for size in shape]) > _MOST:
        raise Refused(400, f"input {name!r} has shape {list(shape)}: more than there can be")
    return spec, expected


def _made(
    request_id: str,
    given: Mapping[str, Any],
    signature: Signature,
    outputs: list[Wanted],
    binary: bool,
    parameters: Parameters,
) -> Inference:
    if len(given) != len(signature.inputs):
        missing = [spec.name for spec in signature.inputs if spec.name not in given]
        raise Refused(
            400, f"the request lacks {', '.join(map(repr, missing))}; the model has {_listed(signature.inputs)}"
        )
    values = [given[spec.name] for spec in signature.inputs]
    if signature.outputs is not None:
        names = [spec.name for spec in signature.outputs]
        for wanted in outputs:
            if wanted.name not in names:
                raise Refused(400, f"the model has no output {wanted.name!r}; it has {_listed(signature.outputs)}")
    names = [wanted.name for wanted in outputs]
    if len(set(names)) != len(names):
        raise Refused(400, f"an output is asked for twice: {names}")
    terms = _terms(parameters) if parameters else Terms()
    return Inference(request_id, values, _is_empty(values, signature), outputs or None, binary, terms)


def _is_empty(values: Sequence[Any], signature: Signature) -> bool:
    """Whether there are no rows. Raises `Refused` where only some of the inputs have none."""
    rows = {}
    for value, spec in zip(values, signature.inputs, strict=True):
        if (at := rows_at(spec)) is not None:
            rows[spec.name] = len(value) if isinstance(value, list) else value.shape[at]
    if 0 in rows.values() and any(rows.values()):
        raise Refused(400, f"the inputs have unequal rows: {rows}")
    return 0 in rows.values()


def rows_at(spec: TensorSpec) -> int | None:
    """The dimension that counts rows: as the example says, else the first that is not fixed."""
    if spec.whole:
        return None
    return spec.rows if spec.rows is not None else spec.shape.index(-1) if -1 in spec.shape else None


def _terms(parameters: Parameters) -> Terms:
    """The terms of the call. `timeout` is in microseconds; of `priority` the lower value comes first, 0 is usual."""
    for name in _NO_STATE:
        if parameters.get(name):
            raise Refused(501, f"{name} is unsupported: the model keeps nothing between requests")
    timeout, priority, tenant = (parameters.get(name) for name in ("timeout", "priority", "tenant"))
    if isinstance(timeout, str) and timeout.isascii() and timeout.isdecimal() and len(timeout) < 20:
        timeout = int(timeout)
    if timeout is not None and not (_is_whole(timeout) and timeout >= 0):
        raise Refused(400, f"timeout is {_shown(timeout)}; expected microseconds, a whole number of 0 or more")
    if priority is not None and not _is_whole(priority):
        raise Refused(400, f"priority is {_shown(priority)}; expected a whole number, of which the lower comes first")
    if tenant is not None and not isinstance(tenant, str):
        raise Refused(400, f"tenant is {tenant!r:.40}; expected a string")
    return Terms(timeout / 1e6 if timeout else None, -float(priority or 0), tenant or None)


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number, and none that only Python has."""
    return type(value) is int and abs(value) <= _MOST


def _shown(value: Any) -> str:
    return "a number without end" if type(value) is int and abs(value) > _MOST else f"{value!r:.40}"


def _flag(parameters: Parameters, name: str, default: bool, where: str = "the request") -> bool:
    value = parameters.get(name, default) if parameters else default
    if not isinstance(value, bool):
        raise Refused(400, f"{where}: {name} is {value!r:.40}; expected true or false")
    return value


def _check_output(name: str, parameters: Parameters) -> None:
    _check_region(name, parameters)
    if parameters and parameters.get("classification"):
        raise Refused(501, f"output {name!r}: classification is unsupported; ask for the output itself")


def _check_region(name: str, parameters: Any) -> None:
    if parameters and _SHARED_MEMORY in parameters:
        raise Refused(501, f"{name!r}: {NO_SHARED_MEMORY}")


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(repr(spec.name) for spec in specs)
