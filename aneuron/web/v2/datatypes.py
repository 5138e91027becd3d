"""The datatypes of the Open Inference Protocol, and how their elements lie in bytes and in JSON.

Lives here: the one table of datatypes, reading and writing the elements of a tensor. Must not be here: requests,
answers, a web framework, gRPC.

Protocol: https://github.com/kserve/open-inference-protocol; binary data:
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_binary_data.html
"""

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from aneuron import TensorSpec
from aneuron.web.v2.errors import Refused


class Datatype(NamedTuple):
    """One of the protocol's. `contents`: its field in gRPC's InferTensorContents, where it has one."""

    name: str
    dtype: torch.dtype | None  # None: BYTES
    contents: str | None
    config: str  # its name in Triton's model configuration

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize if self.dtype is not None else 0


BYTES = Datatype("BYTES", None, "bytes_contents", "TYPE_STRING")
TABLE = {  # in the order of the numbers that they have in Triton's configuration, from 1 on
    each.name: each
    for each in (
        Datatype("BOOL", torch.bool, "bool_contents", "TYPE_BOOL"),
        Datatype("UINT8", torch.uint8, "uint_contents", "TYPE_UINT8"),
        Datatype("UINT16", torch.uint16, "uint_contents", "TYPE_UINT16"),
        Datatype("UINT32", torch.uint32, "uint_contents", "TYPE_UINT32"),
        Datatype("UINT64", torch.uint64, "uint64_contents", "TYPE_UINT64"),
        Datatype("INT8", torch.int8, "int_contents", "TYPE_INT8"),
        Datatype("INT16", torch.int16, "int_contents", "TYPE_INT16"),
        Datatype("INT32", torch.int32, "int_contents", "TYPE_INT32"),
        Datatype("INT64", torch.int64, "int64_contents", "TYPE_INT64"),
        Datatype("FP16", torch.float16, None, "TYPE_FP16"),
        Datatype("FP32", torch.float32, "fp32_contents", "TYPE_FP32"),
        Datatype("FP64", torch.float64, "fp64_contents", "TYPE_FP64"),
        BYTES,
        Datatype("BF16", torch.bfloat16, None, "TYPE_BF16"),
    )
}
_OF_DTYPE: dict[Any, Datatype] = {each.dtype: each for each in TABLE.values()} | {str: BYTES, bytes: BYTES}
_SMALL = 1 << 16  # bytes that are copied faster than they are wrapped
_LENGTH = struct.Struct("<I")  # before each element of BYTES


def datatype_of(spec: TensorSpec) -> Datatype:
    """The datatype of an input or output. Raises `ValueError` for what the protocol has no word for."""
    return datatype(spec.name, spec.dtype)


def datatype(name: str, dtype: torch.dtype | type) -> Datatype:
    """The same for what has this name and dtype."""
    found = _OF_DTYPE.get(dtype)
    if found is None:
        raise ValueError(
            f"{name!r} is of {dtype}, which the Open Inference Protocol has no datatype for; it has {', '.join(TABLE)}"
        )
    return found


# Bytes.


Reader = Callable[[bytearray], Any]


def reader(at: int, size: int, spec: TensorSpec, datatype: Datatype, shape: Sequence[int]) -> Reader:
    """What makes the tensor, or the list, whose elements lie in `size` bytes from `at` on, of the bytes.

    It lies where they lie, unless they stand where no element of its dtype may begin. Raises `Refused`.
    """
    count, dtype, end = prod(shape), datatype.dtype, at + size
    if dtype is None:
        return lambda data: _texts(memoryview(data)[at:end], count, spec)
    if size != count * dtype.itemsize:
        raise Refused(
            400,
            f"input {spec.name!r} has {size} bytes; {datatype.name} of shape {list(shape)} has "
            f"{count * dtype.itemsize}",
        )
    shape = tuple(shape)
    if not count:
        return lambda _: torch.empty(shape, dtype=dtype)
    if at % dtype.itemsize:
        aligned = reader(0, size, spec, datatype, shape)
        return lambda data: aligned(data[at:end])
    # By NumPy: each operation of torch's gives the interpreter up, and waits for it again where other threads are busy.
    from_numpy, array, elements = torch.from_numpy, np.ndarray, _numpy(dtype)
    if dtype is torch.bool:  # any other byte but 0 and 1 is no bool of torch's
        return lambda data: from_numpy(np.asarray(array(shape, elements, data, at) != 0))
    if dtype is torch.bfloat16:
        return lambda data: from_numpy(array(shape, elements, data, at)).view(dtype)
    return lambda data: from_numpy(array(shape, elements, data, at))


def _numpy(dtype: torch.dtype) -> Any:
    """What NumPy has of the same size."""
    return _OF_NUMPY.get(dtype) or str(dtype).partition(".")[2]


_OF_NUMPY = {torch.bool: np.uint8, torch.bfloat16: np.int16}


def _texts(data: memoryview, count: int, spec: TensorSpec) -> list[Any]:
    found: list[bytes] = []
    at = 0
    while at < len(data):
        end = at + _LENGTH.size
        if end <= len(data):
            at, end = end, end + _LENGTH.unpack_from(data, at)[0]
        if end > len(data):
            raise Refused(400, f"input {spec.name!r}: its element {len(found)} ends beyond its {len(data)} bytes")
        found.append(bytes(data[at:end]))
        at = end
    return objects(found, count, spec)


def objects(found: Sequence[bytes], count: int, spec: TensorSpec) -> list[Any]:
    """Elements of BYTES as the model takes them. Raises `Refused`."""
    if len(found) != count:
        raise Refused(400, f"input {spec.name!r} has {len(found)} elements; its shape says {count}")
    if spec.dtype is not str:
        return list(found)
    try:
        return [each.decode() for each in found]
    except UnicodeDecodeError as error:
        raise Refused(400, f"input {spec.name!r}: the model takes texts, and an element is no UTF-8: {error}") from None


def in_bytes(value: Any) -> memoryview | bytes:
    """The elements of an output, one after the other; of a tensor where they lie."""
    if type(value) is torch.Tensor:
        if value.dtype is torch.bfloat16:
            value = value.view(torch.int16)
        array: Any = value.numpy()
        if array.nbytes <= _SMALL:
            copied: bytes = array.tobytes()
            return copied
        array = np.ascontiguousarray(array)
        return memoryview(array).cast("B")
    return b"".join(chain.from_iterable((_LENGTH.pack(len(each)), each) for each in map(_encoded, value)))


def _encoded(each: str | bytes) -> bytes:
    return each.encode() if isinstance(each, str) else each


# JSON.


def tensor_of(data: Any, spec: TensorSpec, datatype: Datatype, shape: Sequence[int]) -> Any:
    """The tensor, or the list, of what stood in JSON, flat or nested. Raises `Refused` for what is not exactly that."""
    count, flat = prod(shape), _flat(data, spec)
    if datatype is BYTES:
        if any(type(each) is not str for each in flat):
            raise Refused(400, f"input {spec.name!r} is BYTES: expected a string for each element")
        return objects([each.encode() for each in flat], count, spec)
    if len(flat) != count:
        raise Refused(400, f"input {spec.name!r} has {len(flat)} elements; its shape {list(shape)} says {count}")
    assert datatype.dtype is not None
    kinds = set(map(type, flat))
    floats = datatype.dtype.is_floating_point
    allowed = {bool} if datatype.dtype is torch.bool else {int, float} if floats else {int}
    if not kinds <= allowed:
        names = ", ".join(sorted(kind.__name__ for kind in kinds - allowed))
        raise Refused(400, f"input {spec.name!r} is {datatype.name}, and there is {names} among its elements")
    try:
        array = np.array(flat, dtype=np.float64 if floats else _numpy(datatype.dtype))
    except OverflowError:
        raise Refused(400, f"input {spec.name!r}: an element is too large for {datatype.name}") from None
    tensor = torch.from_numpy(array).to(datatype.dtype)
    if floats and not torch.isfinite(tensor).all() and int(torch.isinf(tensor).sum()) != sum(map(_infinite, flat)):
        raise Refused(400, f"input {spec.name!r}: an element is too large for {datatype.name}")
    return tensor.view(tuple(shape))


def _infinite(number: float) -> bool:
    return number in (float("inf"), float("-inf"))


def _flat(data: Any, spec: TensorSpec) -> list[Any]:
    if not isinstance(data, list):
        raise Refused(400, f"input {spec.name!r}: its data is no array")
    flat: list[Any] = data
    while flat and type(flat[0]) is list:
        if any(type(each) is not list or len(each) != len(flat[0]) for each in flat):
            raise Refused(400, f"input {spec.name!r}: its data is nested to different depths, or of unequal lengths")
        flat = list(chain.from_iterable(flat))
    return flat


def in_json(name: str, value: Any) -> Any:
    """The elements of an output, flat, as JSON has them. Raises `Refused` for texts that it cannot hold."""
    if isinstance(value, torch.Tensor):
        return value.reshape(-1).tolist()
    try:
        return [each if isinstance(each, str) else each.decode() for each in value]
    except UnicodeDecodeError:
        raise Refused(
            400, f"output {name!r} is no UTF-8, which JSON asks for: ask for it with the parameter binary_data"
        ) from None


def dumps(value: Any) -> bytes:
    """JSON, with NaN and Infinity as Python's and Triton's have them: numbers that JSON itself lacks."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def finite(values: Iterable[Any]) -> bool:
    """Whether JSON has all of these numbers."""
    return all(
        not isinstance(value, torch.Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())
        for value in values
    )
