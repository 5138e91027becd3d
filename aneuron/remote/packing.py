"""Values on their way to another process: structures of tensors as a template that is sent once, dims, and bytes.

Lives here: what of a value is a template, what a leaf, what an object that is kept on the other side; and the way back.
Must not be here: sockets, who copies large values in which thread, what calls may share (tensors/signature.py).

The template of a value is its pickle with a number in place of each leaf: a tensor, an array, `Rows`. It is sent when
it is first met, then found again by its bytes: a constant that has changed makes another one. In a body stand the
template's number, what the leaves are, and their memory. A lone tensor, as a value or as the only argument of a call,
has a template that all know.

What the model may be given as the same object by several calls (unknown constants, `Shared`) is sent by itself once its
sender has passed it twice, and is then one object on the other side, whoever sends an equal one: so that calls can
share batches there as they would here. Until then each call has a copy of its own.
"""

import ctypes
import enum
import hashlib
import importlib
import io
import pickle
import struct
import sys
import threading
import types
import weakref
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, frombuffer, strided

from aneuron.backends.unwarned import unwarned
from aneuron.remote.frames import Buffer, Frame, Kind, encode
from aneuron.remote.memory import PLACE, Block, Receiver
from aneuron.tensors import copying
from aneuron.tensors.marked import Rows, Shared
from aneuron.tensors.nested import Sealed, children, is_array, walk
from aneuron.tensors.quantized import QUANTIZED

INLINE = 1 << 16  # bytes up to which a value travels in its frame

# What a leaf is: the number of its dtype, with ARRAY if it is NumPy's; or Rows, pickled.
_DTYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)} - QUANTIZED, key=str)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_native: Any = copying.native if sys.byteorder == "little" else None
_natively: dict[torch.dtype, int] = {}  # the codes of those dtypes that it knows
if _native is not None:
    for _dtype, _code in _CODES.items():
        if _dtype is not torch.complex32 and _native.number(torch.empty(1, dtype=_dtype, device="cpu"), _code):
            _natively[_dtype] = _code  # torch would warn of the one that is left out
_ARRAY = 0x80
_ROWS = 0xFF

_LONE, _CALL = 0, 1  # the templates that all know: `x`, and `((x,), {})`
_START = struct.Struct("<QII")  # template, leaves, and where: 0 after the head, 1 in a block
_LONE_HEADS = [struct.Struct(f"<QIIBB6x{ndim}q") for ndim in range(16)]
_DIMS = [struct.Struct(f"<{ndim}q") for ndim in range(65)]
_COUNT = struct.Struct("<4xI")  # of the objects that a template needs, after the first byte
_read_bytes = ctypes.string_at

# What TEMPLATE frames begin with.
_TEMPLATE, _OBJECT, _SHARED = b"t", b"o", b"s"

Leaf = Any  # Tensor, numpy.ndarray, or the bytes of a pickle


class Packed:
    """A value that is ready to be sent. Large tensors are copied when it is told to, by `inline` or `write`."""

    __slots__ = ("_body", "_codes", "_template", "leaves", "nbytes")

    def __init__(
        self, template: "_Sent | int", codes: bytes, leaves: Sequence[Leaf], nbytes: int, body: bytes | None = None
    ) -> None:
        self._template = template  # kept on the other side for as long as this is there
        self._codes = codes
        self.leaves = leaves
        self.nbytes = nbytes  # of memory, more than which it does not need in a block
        self._body = body  # where it is copied already: it is small

    def inline(self) -> list[Buffer]:
        """The body of a frame with the memory in it: a copy."""
        if self._body is not None:
            return [self._body]
        leaves, template = self.leaves, self._template
        if type(template) is int:
            (x,) = leaves
            shape = x.shape
            ndim = len(shape)
            return [_LONE_HEADS[ndim].pack(template, 1, 0, self._codes[0], ndim, *shape), _bytes(x)]
        body: list[Buffer] = [self._head(0)]
        for leaf in leaves:
            data = _bytes(leaf)
            body.append(data)
            if more := -len(data) & 7:
                body.append(bytes(more))
        return body

    def placed(self, block: Block) -> list[Buffer]:
        """The body of a frame that says that the memory is in a block."""
        return [self._head(1), block.place()]

    def write(self, block: Block) -> None:
        """Copy the memory into a block. Any thread, for as long as nobody changes the tensors."""
        at = 0
        for leaf in self.leaves:
            size = _size(leaf)
            if size:
                _write(leaf, block.memory[at : at + size])
            at += -(-size // 64) * 64

    def _head(self, where: int) -> bytes:
        number = self._template if isinstance(self._template, int) else self._template.number
        dims = [size for leaf in self.leaves for size in (leaf.shape if type(leaf) is not bytes else (len(leaf),))]
        codes = bytes(
            each
            for code, leaf in zip(self._codes, self.leaves, strict=True)
            for each in (code, len(leaf.shape) if type(leaf) is not bytes else 1)
        )
        return b"".join(
            (
                _START.pack(number, len(self.leaves), where),
                codes,
                bytes(-len(codes) & 7),
                struct.pack(f"<{len(dims)}q", *dims),
            )
        )


class _Sent:
    """A template or an object that the other side has, until this is gone."""

    __slots__ = ("dropped", "needs", "number", "size")

    def __init__(self, number: int, size: int, needs: "list[_Sent]", dropped: deque[int]) -> None:
        self.number = number
        self.size = size
        self.needs = needs
        self.dropped = dropped

    def __del__(self) -> None:
        self.dropped.append(self.number)  # in whatever thread


class _Recent:
    """What was sent, by what it is found again: the latest, of so many in number and bytes."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._known: OrderedDict[Any, _Sent] = OrderedDict()
        self._size = 0

    def get(self, key: Any) -> _Sent | None:
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
        return found

    def add(self, key: Any, sent: _Sent) -> None:
        self._known[key] = sent
        self._size += sent.size
        while len(self._known) > self._most or (self._size > self._most_bytes and len(self._known) > 1):
            self._size -= self._known.popitem(last=False)[1].size


class Packer:
    """Values on their way out over one link. Used on the loop's thread.

    `send` sends a frame; templates and objects go by it, before the value that needs them is returned. `what` the
    values are, messages say: "input" for `(args, kwargs)`, or "output".
    """

    def __init__(self, send: Callable[..., None], what: str = "input") -> None:
        self._send = send
        self._what = what
        self._numbers = _CALL
        self._dropped: deque[int] = deque()
        self._templates = _Recent(256, 64 << 20)
        self._objects = _Recent(256, 64 << 20)
        self._passed: OrderedDict[Any, Callable[[], Any]] = OrderedDict()  # objects that have been passed, weakly

    def pack(self, value: Any) -> Packed:
        """A value, ready to be sent. Raises TypeError for what cannot be pickled, saying where it stands."""
        template = _LONE
        x = value
        if type(x) is tuple and len(x) == 2:
            args, kwargs = x
            if type(args) is tuple and len(args) == 1 and type(kwargs) is dict and not kwargs:
                template, x = _CALL, args[0]
        if type(x) is Tensor:
            known = _natively.get(x.dtype, -1)
            if known >= 0 and (made := _native.packed(x, template, known, INLINE)) is not None:
                return Packed(template, made[16:17], (x,), len(made), made)
            if (code := _plain(x)) >= 0 and x.ndim < 16:
                return Packed(template, bytes((code,)), (x,), x.nbytes)
        while self._dropped:
            self._send(*encode(Kind.TEMPLATE, self._dropped.popleft()))
        dump = _Dump(self)
        try:
            body = dump.pickled(value)
        except RecursionError:
            raise TypeError(f"the {self._what} is nested too deeply to be sent to another process") from None
        except Exception as error:
            raise self._unpicklable(value, error) from error
        sent = self._templates.get(body)
        if sent is None:
            needs = list(dump.needs)
            before = b"t\0\0\0" + struct.pack(f"<I{len(needs)}Q", len(needs), *needs)
            sent = self._announce(before + body, list(dump.needs.values()))
            self._templates.add(body, sent)
        size = sum([-(-_size(leaf) // 64) * 64 for leaf in dump.leaves])
        return Packed(sent, bytes(dump.codes), dump.leaves, size)

    def _announce(self, body: bytes, needs: list[_Sent]) -> _Sent:
        """Send a template or an object, under a number that has never been used."""
        self._numbers += 1
        self._send(*encode(Kind.TEMPLATE, self._numbers, body))
        return _Sent(self._numbers, len(body), needs, self._dropped)

    def kept(self, value: Any) -> _Sent | None:
        """An object of unknown type, if it was passed before and is now on the other side."""
        if not self._again(id(value), (value,)):
            return None
        body = _OBJECT + _whole(value)  # anew each time: it may have changed
        sent = self._objects.get(body)
        if sent is None:
            sent = self._announce(body, [])
            self._objects.add(body, sent)
        return sent

    def kept_shared(self, value: Any) -> _Sent | None:
        """The same of a shared value: while nobody has written to its tensors, as far as torch counts that."""
        leaves: list[Any] = []
        structure: list[Any] = []
        constants: list[Any] = []
        try:
            walk(value, leaves, structure, constants)
        except Sealed:
            return None
        if not leaves or any(type(each) not in _IMMUTABLE for each in constants):
            return None
        if any(type(each) is not Tensor or each.is_inference() for each in leaves):
            return None
        key = (*structure, *[(id(leaf), leaf._version) for leaf in leaves])
        if not self._again(key, leaves):
            return None
        sent = self._objects.get(key)
        if sent is None:
            sent = self._announce(_SHARED + _whole(value), [])
            self._objects.add(key, sent)
        return sent

    def _again(self, key: Any, values: Sequence[Any]) -> bool:
        """Whether the same objects have been passed before under this key; they have now."""
        known = self._passed.get(key)
        if known is not None and (there := known()) is not None and all(map(_is, there, values)):
            self._passed.move_to_end(key)
            return True
        self._passed[key] = _weakly(values)
        self._passed.move_to_end(key)
        if len(self._passed) > 256:
            self._passed.popitem(last=False)
        return False

    def _unpicklable(self, value: Any, error: Exception) -> TypeError:
        steps, found = _culprit(value, ())
        if self._what == "input" and len(steps) > 1:
            name, steps = f"input {steps[1]!r}", steps[2:]
        else:
            name = self._what
        name += "".join(f"[{step!r}]" for step in steps)
        return TypeError(
            f"{name} is a {type(found).__name__}, which cannot be sent to another process ({type(error).__name__}: "
            f"{error!s:.200}); pass tensors, or what pickle can take: classes and functions at the top of a module"
        )


def _is(one: Any, other: Any) -> bool:
    return one is other


def _weakly(values: Sequence[Any]) -> Callable[[], Any]:
    """What gives these again while all are there; what cannot be referred to weakly is kept."""
    try:
        references = [weakref.ref(each) for each in values]
    except TypeError:
        kept = tuple(values)
        return lambda: kept
    return lambda: [reference() for reference in references]


def _culprit(value: Any, steps: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """The innermost part of a structure that cannot be pickled, and the steps to it."""
    inside = value.value if type(value) is Shared else value.objects if type(value) is Rows else value
    try:
        found = children(inside)
    except Exception:
        found = []
    for step, child in found:
        try:
            _whole(child)
        except Exception:
            return _culprit(child, (*steps, step))
    return steps, value


_IMMUTABLE = frozenset(
    (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout)
)
_PLAIN = _IMMUTABLE | {tuple, list, dict, set, frozenset, slice, range, types.ModuleType}
_PLAIN |= {types.FunctionType, types.BuiltinFunctionType, types.MethodType, type(Ellipsis), type(NotImplemented)}
_PLAIN |= {type(_weakly)}  # a function that was compiled
_by_type: dict[type, bool] = {}


def _is_constant(kind: type) -> bool:
    """Whether objects of a class are single things to a model, of which nobody knows what is in them."""
    known = _by_type.get(kind)
    if known is None:
        opened = issubclass(kind, (tuple, list, dict, UserDict, types.SimpleNamespace)) or is_dataclass(kind)
        numpy = sys.modules.get("numpy")
        scalar = numpy is not None and issubclass(kind, (numpy.generic, numpy.ndarray, numpy.dtype))
        known = not (opened or scalar or issubclass(kind, (type, enum.Enum, Tensor)))
        if len(_by_type) < 1000:
            _by_type[kind] = known
    return known


class _Dump:
    """A value being taken apart."""

    def __init__(self, packer: Packer) -> None:
        self.leaves: list[Leaf] = []
        self.codes: list[int] = []
        self.needs: dict[int, _Sent] = {}
        self._packer = packer
        self._in_rows = False
        self._numbers: dict[int, int] = {}  # of leaves, by id: what is there twice is sent once

    def pickled(self, value: Any) -> bytes:
        file = io.BytesIO()
        _HolesPickler(file, self).dump(value)
        return file.getvalue()

    def number(self, value: Any) -> int | None:
        """The number of a leaf, -1 and below for an object that is kept; None for what is pickled where it stands."""
        kind = type(value)
        if kind in _PLAIN:
            return None
        if kind is Tensor:
            return self._leaf(value, _plain(value))
        if kind is Rows:
            number = self._leaf(value, _ROWS)
            if number is not None and self.leaves[number] is value:
                self._in_rows = True  # an object of one row is nobody else's, and the template says nothing of it
                self.leaves[number] = self.pickled(value.objects)
                self._in_rows = False
            return number
        if self._in_rows and not is_array(value):
            return None
        if kind is Shared:
            return self._kept(self._packer.kept_shared(value.value))
        if is_array(value):
            return self._leaf(value, _array_code(value))
        return self._kept(self._packer.kept(value)) if _is_constant(kind) else None

    def _leaf(self, value: Any, code: int) -> int | None:
        if code < 0:
            return None
        number = self._numbers.setdefault(id(value), len(self.leaves))
        if number == len(self.leaves):
            self.leaves.append(value)
            self.codes.append(code)
        return number

    def _kept(self, sent: _Sent | None) -> int | None:
        if sent is None:
            return None
        self.needs.setdefault(sent.number, sent)
        return -sent.number


class _HolesPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, dump: _Dump) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._number = dump.number

    def persistent_id(self, value: Any) -> int | None:
        return self._number(value)

    def reducer_override(self, value: Any) -> Any:
        return _reduced(value)


class _WholePickler(pickle.Pickler):
    """Pickles an object with all that is in it: plain tensors by their memory."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and (code := _plain(value)) >= 0:
            return _remade, (code, tuple(value.shape), bytearray(_bytes(value)))
        return _reduced(value)


def _whole(value: Any) -> bytes:
    file = io.BytesIO()
    _WholePickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _reduced(value: Any) -> Any:
    """How objects are made again that pickle alone would not make, or with more than their tensors."""
    if isinstance(value, tuple) and hasattr(type(value), "_fields") and not _is_found(type(value)):
        kind: Any = type(value)  # TorchScript makes the class anew for each value
        return _named, (kind.__name__, tuple(kind._fields), tuple(value))
    if isinstance(value, UserDict) and type(value) is not UserDict:
        return _user_dict, (type(value), dict(value))
    if isinstance(value, types.ModuleType):
        return importlib.import_module, (value.__name__,)
    if isinstance(value, Tensor):
        if value.device.type not in ("cpu", "meta"):
            raise TypeError(f"a tensor on {value.device}; only host tensors are sent to another process: pass x.cpu()")
        with unwarned():
            return _by_torch, (pickle.dumps(value, pickle.HIGHEST_PROTOCOL),)
    return NotImplemented


def _by_torch(pickled: bytes) -> Tensor:
    with unwarned():
        tensor: Tensor = pickle.loads(pickled)
    return tensor


def _is_found(kind: type) -> bool:
    """Whether a class is where its name says."""
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


_classes: dict[tuple[str, tuple[str, ...]], Any] = {}


def _named(name: str, fields: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    kind = _classes.get((name, fields))
    if kind is None:
        kind = _classes.setdefault((name, fields), namedtuple(name, fields))
    return kind._make(values)


def _user_dict(kind: Any, items: dict[Any, Any]) -> Any:
    """Hugging Face's encodings: with what is in them, without the text that they keep in private."""
    try:
        return kind(items)
    except Exception:
        made = kind.__new__(kind)
        made.data = items
        return made


def _remade(code: int, shape: tuple[int, ...], memory: bytearray) -> Tensor:
    return _over(memoryview(memory), 0, _DTYPES[code], shape)


# Memory.


def _plain(x: Tensor) -> int:
    """The code of a tensor whose memory says all of it; -1 for others, which are pickled by torch."""
    if x.layout is not strided or not x.is_cpu or x.is_nested:
        return -1
    return _CODES.get(x.dtype, -1)


def _array_code(array: Any) -> int:
    """The same of a NumPy array: of plain numbers, in this machine's order of bytes."""
    dtype = array.dtype
    if type(array) is not sys.modules["numpy"].ndarray or dtype.kind not in "biufc" or not dtype.isnative:
        return -1
    if dtype.isbuiltin != 1:
        return -1
    code = _CODES.get(getattr(torch, dtype.name, torch.qint8), -1)
    return code | _ARRAY if code >= 0 else -1


def _size(leaf: Leaf) -> int:
    return len(leaf) if type(leaf) is bytes else leaf.nbytes


def _bytes(leaf: Leaf) -> bytes:
    """The memory of a leaf, row by row: a copy."""
    if type(leaf) is Tensor:
        if not leaf.is_contiguous() or leaf.is_neg() or leaf.is_conj():
            leaf = _settled(leaf)
        size = leaf.nbytes
        if not size:
            return b""
        pointer = leaf.data_ptr()
        return _read_bytes(pointer, size) if pointer else _zeros(leaf)
    return leaf if type(leaf) is bytes else leaf.tobytes()


def _zeros(x: Tensor) -> bytes:
    """The memory of a tensor that has none: it stands for zeros, or somebody has taken its memory away."""
    if not x._is_zerotensor():
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no memory: its storage was resized")
    return bytes(x.nbytes)


def _settled(x: Tensor) -> Tensor:
    return x.detach().resolve_conj().resolve_neg().contiguous()


def _write(leaf: Leaf, memory: memoryview) -> None:
    """Copy the memory of a leaf to where it is to be."""
    if type(leaf) is Tensor:
        target = _over(memory, 0, leaf.dtype, tuple(leaf.shape))
        if not leaf.data_ptr():
            memory[:] = _zeros(leaf)
        elif leaf.is_contiguous() and not leaf.is_neg() and not leaf.is_conj():
            ctypes.memmove(target.data_ptr(), leaf.data_ptr(), len(memory))  # which lets others have the interpreter
        else:
            target.copy_(leaf.detach())
    elif type(leaf) is bytes:
        memory[:] = leaf
    else:
        numpy = sys.modules["numpy"]
        numpy.copyto(numpy.ndarray(leaf.shape, leaf.dtype, memory), leaf)


def _over(memory: memoryview, at: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor over memory, which it keeps."""
    count = prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    flat = frombuffer(memory, dtype=dtype, offset=at, count=count)
    return flat if len(shape) == 1 else flat.view(tuple(shape))


def _lent(memory: memoryview, at: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The same where it is enough that a caller does not write to it; frames are aligned for numbers of eight bytes."""
    return (_over if dtype.itemsize <= 8 else _own)(memory, at, dtype, shape)


def _own(memory: memoryview, at: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor with a copy of memory."""
    size = prod(shape) * dtype.itemsize
    if size < INLINE:
        return _over(memoryview(bytearray(memory[at : at + size])), 0, dtype, shape)
    made = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    source = _over(memory, at, dtype, shape)
    ctypes.memmove(made.data_ptr(), source.data_ptr(), size)  # which lets others have the interpreter
    return made


# The way back.


class _Kept:
    """An object that several calls are given. Any thread."""

    __slots__ = ("__weakref__", "_body", "_form", "_loaded", "_lock", "_shared", "_value")

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._shared = body[:1] == _SHARED
        self._form = b""
        self._value: Any = None
        self._loaded = False
        self._lock = threading.Lock()

    def given(self) -> Any:
        """What a call gets. Raises whatever unpickling raises."""
        with self._lock:
            if not self._loaded or (not self._shared and _whole(self._value) != self._form):
                # Or a model has written to it: its sender, who has sent it as it was, has not.
                self._value = pickle.loads(memoryview(self._body)[1:])
                self._form = b"" if self._shared else _whole(self._value)
                self._loaded = True
                if self._shared:
                    self._body = b""
        return Shared(self._value) if self._shared else self._value


_kept: weakref.WeakValueDictionary[bytes, _Kept] = weakref.WeakValueDictionary()  # of all links, by digest


class _Template(NamedTuple):
    pickled: bytes
    kept: dict[int, _Kept]


class Unpacker:
    """Values on their way in over one link. Used on the loop's thread."""

    def __init__(self, memory: Receiver | None = None) -> None:
        self._memory = memory
        self._templates: dict[int, _Template] = {}
        self._objects: dict[int, _Kept] = {}

    def on_template(self, frame: Frame) -> None:
        """A TEMPLATE frame has come. Nothing is unpickled here: what fails, fails in the calls that need it."""
        body = bytes(frame.body)
        if not body:
            self._templates.pop(frame.id, None)
            self._objects.pop(frame.id, None)
        elif body[:1] == _TEMPLATE:
            (count,) = _COUNT.unpack_from(body)
            needs = struct.unpack_from(f"<{count}Q", body, 8)
            self._templates[frame.id] = _Template(body[8 + 8 * count :], {each: self._objects[each] for each in needs})
        else:
            digest = hashlib.blake2b(body).digest()
            kept = _kept.get(digest)
            if kept is None:
                kept = _kept[digest] = _Kept(body)
            self._objects[frame.id] = kept

    def unpack(self, body: memoryview, *, own: bool) -> Any:
        """The value whose body this is.

        With `own` each tensor is in storage of its own, writable; without, it may lie in the body or in a block, which
        it keeps, and is not to be written to. Raises whatever unpickling raises.
        """
        number, _, where = _START.unpack_from(body)
        if number <= _CALL and not where:  # the short way, same results
            if _native is not None and (x := _native.unpacked(body)) is not None:
                return x if number == _LONE else ((x,), {})
            ndim = body[17]
            make = _own if own else _lent
            x = make(body, 24 + 8 * ndim, _DTYPES[body[16]], _DIMS[ndim].unpack_from(body, 24))
            return x if number == _LONE else ((x,), {})
        return self.open(body).value(own=own)

    def open(self, body: memoryview) -> "Opened":
        """The same in two steps: look at it here, make the value in any thread."""
        number, count, where = _START.unpack_from(body)
        codes = bytes(body[16 : 16 + 2 * count])
        at = 16 + -(-len(codes) // 8) * 8
        total = sum(codes[1::2])
        dims = struct.unpack_from(f"<{total}q", body, at)
        at += 8 * total
        template = self._templates[number] if number > _CALL else number
        if not where:
            return Opened(template, codes, dims, body, at, 8)
        assert self._memory is not None, "a value in a block, on a link without"
        return Opened(template, codes, dims, self._memory.lease(body[at : at + PLACE]), 0, 64)


class Opened:
    """A value whose frame has come, and which is still to be made."""

    __slots__ = ("_found", "_made", "_memory", "_own", "_template", "nbytes")

    def __init__(
        self, template: "_Template | int", codes: bytes, dims: Sequence[int], memory: memoryview, at: int, align: int
    ) -> None:
        self._template = template
        self._memory = memory
        self._found: list[tuple[int, tuple[int, ...], int]] = []  # of each leaf: code, shape, and where it is
        self._made: dict[int, Any] = {}
        self._own = True
        used, start = 0, at
        for code, ndim in zip(codes[::2], codes[1::2], strict=True):
            shape = tuple(dims[used : used + ndim])
            used += ndim
            self._found.append((code, shape, at))
            size = prod(shape) * (1 if code == _ROWS else _DTYPES[code & ~_ARRAY].itemsize)
            at += -(-size // align) * align
        self.nbytes = at - start

    def value(self, *, own: bool) -> Any:
        """Make it, once. Any thread. See `Unpacker.unpack`."""
        self._own = own
        if isinstance(self._template, int):
            x = self.leaf(0)
            return x if self._template == _LONE else ((x,), {})
        return self._loaded(self._template.pickled)

    def leaf(self, number: int) -> Any:
        """A leaf, or an object that is kept."""
        if number < 0:
            assert isinstance(self._template, _Template)
            return self._template.kept[-number].given()
        if number not in self._made:
            self._made[number] = self._leaf(*self._found[number])
        return self._made[number]

    def _leaf(self, code: int, shape: tuple[int, ...], at: int) -> Any:
        if code == _ROWS:
            rows = Rows.__new__(Rows)
            rows.objects = self._loaded(self._memory[at : at + shape[0]])
            return rows
        x = (_own if self._own else _lent)(self._memory, at, _DTYPES[code & ~_ARRAY], shape)
        return x.numpy() if code & _ARRAY else x  # NumPy alone would not keep the memory of a block

    def _loaded(self, pickled: Buffer) -> Any:
        return _HolesUnpickler(io.BytesIO(pickled), self).load()


class _HolesUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, opened: Opened) -> None:
        super().__init__(file)
        self._leaf = opened.leaf

    def persistent_load(self, number: int) -> Any:
        return self._leaf(number)
