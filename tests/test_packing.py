"""Values between processes: they arrive as they were, nothing stale, nothing twice, and what cannot go says so."""

import asyncio
import ctypes
import dataclasses
import enum
import fractions
import gc
import math
import operator
import re
import threading
import types
from collections import OrderedDict, UserDict, defaultdict, namedtuple

import ml_dtypes
import numpy as np
import pytest
import torch

from aneuron import Rows, Shared
from aneuron.remote import packing
from aneuron.remote.frames import Kind, Parser, encode
from aneuron.remote.link import connect, ends
from aneuron.remote.memory import Receiver, Sender
from aneuron.remote.packing import Packer, Unpacker
from aneuron.tensors.quantized import QUANTIZED
from aneuron.testing import run


class Way:
    """From a packer to an unpacker, by bytes."""

    def __init__(self, what="input", memory=None):
        self.sent = []  # templates and objects, and what is not to be kept any longer
        self.unpacker = Unpacker(memory)
        self.packer = Packer(self.send, what)

    def send(self, *buffers):
        (frame,) = Parser().feed(bytearray().join(buffers))
        assert frame.kind == Kind.TEMPLATE
        self.sent.append((frame.id, len(frame.body)))
        self.unpacker.on_template(frame)

    def body(self, packed):
        (frame,) = Parser().feed(bytearray().join(encode(Kind.CALL, 1, *packed.inline())))
        return frame.body

    def __call__(self, value, own=False):
        packed = self.packer.pack(value)
        body = self.body(packed)
        assert self.unpacker.open(body).nbytes <= -(-packed.nbytes // 64) * 64
        return self.unpacker.unpack(body, own=own)

    @property
    def known(self):
        return len(self.unpacker._templates) + len(self.unpacker._objects)


def same(one, other):
    """Equal in all: what it is, and every bit of every number."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.shape, one.dtype, one.layout) == (other.shape, other.dtype, other.layout)
        assert bits(one) == bits(other)
    elif isinstance(one, np.ndarray):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.dtype.hasobject or one.tobytes() == other.tobytes()
    elif isinstance(one, Rows):
        same(one.objects, other.objects)
    elif isinstance(one, Shared):
        same(one.value, other.value)
    elif isinstance(one, (tuple, list)):
        assert len(one) == len(other)
        for each, its in zip(one, other, strict=True):
            same(each, its)
    elif isinstance(one, (dict, UserDict)):
        assert list(one) == list(other)
        same(list(one.values()), list(other.values()))
    elif isinstance(one, float):
        assert one.hex() == other.hex()
    elif hasattr(one, "__dict__") and not isinstance(one, (enum.Enum, type, types.FunctionType)):
        same(vars(one), vars(other))
    else:
        assert one == other


def bits(x):
    x = x.detach().resolve_conj().resolve_neg().contiguous()
    return ctypes.string_at(x.data_ptr(), x.nbytes) if x.numel() and x.data_ptr() else bytes(x.nbytes)


def numbers(dtype, shape):
    """A tensor of any dtype, of random bits."""
    size = math.prod(shape) * dtype.itemsize
    memory = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
    return memory.view(dtype).view(shape) if size else memory.view(0).new_empty(shape, dtype=dtype)


DTYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)} - QUANTIZED, key=str)
WAYS = pytest.mark.parametrize("own", [False, True])


class Sub(torch.Tensor):
    pass


# Tensors and arrays.


@WAYS
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype, own):
    way = Way()
    for shape in [(2, 3), (), (1,), (0, 4), (3, 0), (5, 1, 2, 1)]:
        x = numbers(dtype, shape)
        for value in (x, ((x,), {}), {"a": x, "b": [x, torch.ones(3)]}):
            same(way(value, own), value)
    assert way.known == 1  # the third: dtypes and shapes are no part of a template


C = torch.randn(4, 6, dtype=torch.complex64)
VIEWS = {
    "transposed": torch.arange(12).reshape(3, 4).T,
    "every second": torch.arange(12)[::2],
    "a slice": torch.arange(12).reshape(3, 4)[1:, 1:3],
    "expanded": torch.tensor([[1.5], [2.5]]).expand(2, 5),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "conjugate": C.conj(),
    "conjugate, one number": C[:1, :1].conj(),
    "negative": C.conj().imag,
    "negative, one number": C.conj().imag[:1, :1],
    "conjugate, transposed": C.conj().T,
    "of an offset": torch.arange(100)[7:9],
    "large, transposed": torch.randn(300, 300).T,
    "large, conjugate": torch.randn(300, 300, dtype=torch.complex64).conj(),
    "sixteen dims": torch.arange(4).reshape(*(1,) * 14, 2, 2),
    "thirty dims": torch.arange(4).reshape(*(1,) * 28, 2, 2),
    "of zeros": torch._efficientzerotensor((2, 3)),
}


@WAYS
@pytest.mark.parametrize("name", VIEWS)
def test_views_arrive_as_what_they_show(name, own):
    x, way = VIEWS[name], Way()
    for value in (x, ((x,), {}), ((x,), {"a": x[0]})):
        same(way(value, own), value)


@WAYS
def test_tensors_that_know_of_gradients_or_of_inference(own):
    way = Way()
    x = torch.ones(2, 3, requires_grad=True)
    with torch.inference_mode():
        inference = torch.ones(2)
    for each in (x, x * 2, inference):
        made = way(each, own)
        same(made, each.detach().clone())
        assert not made.requires_grad
        assert not made.is_inference()
    same(way([torch.nn.Parameter(torch.ones(2))], own), [torch.nn.Parameter(torch.ones(2))])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_is_no_plain_tensor_is_pickled_as_torch_does():
    way = Way()
    quantized = torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 3, torch.quint8)
    got = way((quantized, torch.eye(3).to_sparse(), torch.empty(2, device="meta")))
    assert torch.equal(got[0].int_repr(), quantized.int_repr())
    assert (got[0].q_scale(), got[0].q_zero_point()) == (0.1, 3)
    assert torch.equal(got[1].to_dense(), torch.eye(3))
    assert got[2].is_meta

    for each in (quantized, torch.eye(3).to_sparse(), torch.empty(2, device="meta")):
        assert way(each).layout is way(((each,), {}))[0][0].layout is each.layout
    assert type(way(Sub(torch.ones(2)))) is Sub
    assert type(way([Sub(torch.ones(2))])[0]) is Sub


ARRAYS = {
    "plain": np.arange(6.0).reshape(2, 3),
    "read only": np.broadcast_to(np.float32(3), (2, 3)),
    "Fortran's order": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "backwards": np.arange(6)[::-1],
    "no dims": np.array(3),
    "empty": np.empty((0, 3), dtype=np.uint16),
    "bool": np.array([True, False]),
    "half": np.ones(3, dtype=np.float16),
    "complex": np.ones(3, dtype=np.complex64),
    "another machine's order": np.arange(3, dtype=">i4"),
    "long double": np.ones(2, dtype=np.longdouble),
    "texts": np.array(["a", "bc"]),
    "objects": np.array([None, "a"], dtype=object),
    "dates": np.array(["2026-01-01"], dtype="datetime64[D]"),
    "fields": np.zeros(2, dtype=[("a", "f4"), ("b", "i2")]),
    "float8": np.ones(3, dtype=ml_dtypes.float8_e4m3fn),
    "bfloat16": np.ones(3, dtype=ml_dtypes.bfloat16),
    "masked": np.ma.masked_array([1, 2], mask=[True, False]),
    "large": np.random.default_rng(0).random((300, 300)).T,
}


@WAYS
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_arrive_as_arrays(name, own):
    array, way = ARRAYS[name], Way()
    for value in (array, ((array,), {}), {"a": array, "b": torch.ones(2)}):
        got = way(value, own)
        same(got, value)
    assert got["a"].flags.writeable


# Structures.

Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Box:
    corner: object
    scale: float = 1.0


class Encoding(UserDict):
    """As Hugging Face's: the text is kept in private."""

    def __init__(self, data=None, encodings=None):
        super().__init__(data or {})
        self._encodings = encodings


class Color(enum.Enum):
    RED = 1


def a_function():
    pass


T = torch.arange(6.0).reshape(2, 3)
VALUES = {
    "nothing": ((), {}),
    "None": None,
    "two": ((T, T + 1), {}),
    "names": ((), {"b": T, "a": T + 1}),
    "constants": (
        (T, 1, True, 1.0, "text", b"bytes", None, 2j),
        {"dtype": torch.float16, "device": torch.device("cpu")},
    ),
    "odd numbers": ((T, math.nan, -0.0, math.inf, 2**70), {}),
    "nested": [{"a": [T, (T + 1, [])], 3: {}}, [[[T]]]],
    "named tuple": Point(T, [1, T]),
    "dataclass": Box({"a": T}),
    "namespace": types.SimpleNamespace(a=T, b=[T + 1]),
    "ordered": OrderedDict(b=T, a=T + 1),
    "UserDict": UserDict(a=T),
    "sizes": (T, torch.Size([2, 3]), slice(1, 2), range(3), {4}, frozenset("a"), ...),
    "enum": (T, Color.RED),
    "functions": (T, a_function, len, operator.itemgetter, torch.relu, math),
    "classes": (T, Box, int, torch.Tensor),
    "numpy's numbers": (T, np.float32(1.5), np.int64(3), np.dtype("f4")),
    "rows": (Rows(["a", "bc"]), T),
    "rows of tensors": Rows([T, T[:1], {"box": T + 1, "label": "cat"}, np.ones(2), Sub(T)]),
    "shared": (T, Shared(T)),
    "shared structure": (T, Shared({"table": T, "k": 3, "array": np.ones(2)})),
    "shared text": (T, Shared("text")),
    "rows of rows": {"a": Rows([1, 2]), "b": Rows([[T], None])},
}


@WAYS
@pytest.mark.parametrize("name", VALUES)
def test_structures_arrive_as_they_were(name, own):
    value, way = VALUES[name], Way()
    for _ in range(3):  # what was passed before goes another way
        same(way(value, own), value)
    same(Way()(value, own), value)


def test_a_default_factory_stays():
    got = Way()(defaultdict(list, a=T))
    assert got["new"] == []


def test_what_an_encoding_keeps_in_private_stays_where_it_is():
    way = Way()
    first = way(Encoding({"a": T}, encodings=["a long text"]))
    assert type(first) is Encoding
    assert first._encodings is None
    same(first["a"], T)
    way(Encoding({"a": T}, encodings=["another text"]))
    assert way.known == 1


def test_named_tuples_of_torchscript_whose_class_is_nowhere():
    class Pair(torch.nn.Module):
        def forward(self, x):
            return Point(x, x + 1)

    made = torch.jit.script(Pair())(T)
    assert type(made) is not Point
    way = Way("output")
    got, again = way(made, own=True), way(made, own=True)
    assert got._fields == ("x", "y")
    assert type(got) is type(again)
    same(tuple(got), (T, T + 1))


def test_what_stands_twice_is_sent_once_and_stands_twice():
    way = Way()
    x = torch.randn(1000)
    packed = way.packer.pack(((x, x), {"a": [x], "rows": Rows([x])}))
    assert packed.nbytes < 2 * x.nbytes
    (one, other), kwargs = way(((x, x), {"a": [x]}))
    assert one is other is kwargs["a"][0]


def test_a_structure_may_contain_itself():
    value = [T]
    value.append(value)
    got = Way()(value)
    assert got[1] is got
    same(got[0], T)


# Storage.


def test_own_tensors_have_storage_of_their_own_and_others_lie_in_what_came():
    way = Way()
    for value in ([T], [T, T.T, np.ones(6)]):
        body = way.body(way.packer.pack(value))
        chunk = body.obj
        before = bytes(chunk)
        for each in leaves(way.unpacker.unpack(body, own=True)):
            each[:] = 7
        assert bytes(chunk) == before
        for each in leaves(way.unpacker.unpack(body, own=False)):
            each[:] = 7
        assert bytes(chunk) != before


def leaves(value):
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("size", [10, 100_000])
def test_no_two_results_share_memory(size):
    way = Way()
    x = torch.randn(size)
    one, other = way(x, own=True), way(x, own=True)
    one += 1
    same(other, x)
    assert one._version == 1


@WAYS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.complex128], ids=str)
def test_numbers_lie_where_processors_can_read_them(dtype, own):
    way = Way()
    for size in (1, 3, 1000, 100_001):
        for value in (torch.ones(size, dtype=dtype), torch.ones(1, size, dtype=dtype)):
            for each in (way(value, own), *way([T[0], value, value + 1], own)):
                assert not each.data_ptr() % each.itemsize


def test_a_tensor_whose_memory_was_taken_away_is_an_error():
    x = torch.ones(3)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no memory"):
        Way()(x)


# Templates.


def test_a_template_is_sent_once():
    way = Way()
    for rows in range(1, 20):
        way(((torch.ones(rows, 3), torch.ones(rows)), {"mask": torch.ones(rows, dtype=torch.bool), "k": 3}))
    assert len(way.sent) == 1
    way(T)
    way(((T,), {}))
    assert len(way.sent) == 1  # these two need none
    way(((T, T), {"k": 3}))
    assert len(way.sent) == 2


def test_texts_of_rows_are_no_part_of_a_template():
    way = Way()
    for index in range(10):
        assert way(((Rows([str(index), "b"]),), {}))[0][0].objects == [str(index), "b"]
    assert len(way.sent) == 1


EQUAL = [1, True, 1.0, 1 + 0j, -0.0, 0.0, "1", b"1", (1,), [1], {1: 1}, {1}, frozenset([1])]


def test_constants_that_are_equal_but_not_the_same_are_told_apart():
    way = Way()
    for _ in range(2):
        for constant in EQUAL:
            same(way((T, constant)), (T, constant))


def test_a_constant_that_was_changed_is_never_stale():
    way = Way()
    constant, box = {"a": [1]}, Box(1)
    for index in range(4):
        constant["a"].append(index)
        box.scale = index
        got = way((T, constant, box))
        assert got[1] == constant
        assert got[2] == box


def test_calls_do_not_share_what_a_model_may_write_to():
    way = Way()
    one, other = way((T, {"a": [1]})), way((T, {"a": [1]}))
    one[1]["a"].append(2)
    assert other[1] == {"a": [1]}
    assert way((T, {"a": [1]}))[1] == {"a": [1]}


def test_the_templates_used_least_recently_make_room():
    way = Way()
    for index in range(300):
        way((T, index))
        assert way((T, "always")) is not None
    way([T])  # what was dropped is told with the next value that needs a template
    assert way.known <= 258
    before = len(way.sent)
    way((T, "always"))
    way((T, 299))
    assert not [size for _, size in way.sent[before:] if size]
    same(way((T, 3)), (T, 3))


def test_templates_are_bounded_in_bytes(monkeypatch):
    way = Way()
    way.packer._templates = packing._Recent(256, 1000)
    for index in range(10):
        way((T, "x" * 400 + str(index)))
    way([T])
    assert way.known <= 4
    same(way((T, "x" * 5000)), (T, "x" * 5000))
    same(way((T, "y" * 5000)), (T, "y" * 5000))


def test_a_value_that_waits_keeps_its_template():
    way = Way()
    waits = way.packer.pack((T, "waits"))
    for index in range(600):
        way((T, index))
    same(way.unpacker.unpack(way.body(waits), own=False), (T, "waits"))
    known = way.known
    del waits
    gc.collect()
    way([T])
    assert way.known < known


# Objects that are the same on the other side.


class Config:
    def __init__(self, **values):
        self.__dict__.update(values)

    def __eq__(self, other):
        return type(self) is type(other) and vars(self) == vars(other)


def test_an_object_that_is_passed_again_is_one_object_there_whoever_passes_an_equal_one():
    ways = [Way(), Way()]
    for way in ways:
        config = Config(k=3, table=torch.ones(3))
        got = [way((T, config))[1] for _ in range(4)]
        way.kept = got[2]
        assert got[1] is got[2] is got[3]
        assert got[0] is not got[1]
        same(got[1], config)
    assert ways[0].kept is ways[1].kept


def test_objects_that_are_made_for_each_call_are_never_shared():
    way = Way()
    got = [way((T, Config(cache=[])))[1] for _ in range(4)]
    got[0].cache.append(1)
    assert len({id(each) for each in got}) == 4
    assert not got[3].cache
    assert way((T, Config(cache=[])))[1].cache == []


def test_objects_of_rows_are_each_call_s_own():
    way = Way()
    config = Config(k=1)
    for index in range(4):
        got = way((Rows([config, {"a": config}, index][index % 2 :]), T))[0]
        assert got.objects[-1] == index
        assert got.objects[0] == (config if index % 2 == 0 else {"a": config})
    assert way.known == 1


def test_an_object_that_was_changed_here_is_another_one_there():
    way = Way()
    config = Config(k=1)
    got = [way((T, config))[1] for _ in range(3)]
    config.k = 2
    changed = [way((T, config))[1] for _ in range(2)]
    assert [each.k for each in got + changed] == [1, 1, 1, 2, 2]


def test_an_object_that_a_model_has_written_to_is_given_to_no_other_call():
    way = Way()
    config = Config(cache=[])
    for _ in range(5):
        got = way((T, config))[1]
        assert got.cache == []
        got.cache.append(1)


def test_objects_that_cannot_be_referred_to_weakly():
    way = Way()
    constant = fractions.Fraction(1, 3)
    got = [way((T, constant))[1] for _ in range(3)]
    assert got == [constant] * 3
    assert got[1] is got[2]


def test_objects_are_not_kept_alive_for_having_been_passed():
    import weakref

    way = Way()
    config = Config(k=1)
    gone = weakref.ref(config)
    way((T, config))
    way((T, config))
    del config
    gc.collect()
    assert gone() is None


def test_shared_tensors_are_sent_twice_then_never_until_they_change():
    way = Way()
    table = torch.randn(500, 100)
    got = [way(((T, Shared(table)), {}))[0][1].value for _ in range(5)]
    for each in got:
        same(each, table)
    assert got[1] is got[2] is got[4]
    assert sum(size > table.nbytes for _, size in way.sent) == 1
    assert way.packer.pack(((T, Shared(table)), {})).nbytes < table.nbytes
    table[3] = 7
    for _ in range(3):
        same(way(((T, Shared(table)), {}))[0][1].value, table)
    assert sum(size > table.nbytes for _, size in way.sent) == 2


def test_shared_tensors_of_two_clients_are_one():
    values = []
    for way in (Way(), Way()):
        table = torch.arange(5000.0)
        values += [way((T, Shared({"a": table, "k": 3})))[1].value["a"] for _ in range(2)]
        values.append(way)  # alive
    assert values[1] is values[4]


def test_shared_values_of_whose_changes_nobody_knows_are_sent_each_time():
    way = Way()
    array, config = np.zeros(1000), Config(k=1)
    with torch.inference_mode():
        inference = torch.zeros(1000)
    for index in range(4):
        array[:] = config.k = index
        with torch.inference_mode():
            inference += 1
        same(way((T, Shared(array)))[1].value, array)
        same(way((T, Shared({"a": torch.ones(2), "c": config})))[1].value["c"], config)
        same(way((T, Shared(inference)))[1].value, inference.clone())


def test_what_is_kept_there_goes_with_the_last_that_needs_it():
    way = Way()
    gc.collect()
    before = len(packing._kept)
    table = torch.randn(100)
    for _ in range(2):
        got = way((T, Shared(table)))
    assert len(packing._kept) == before + 1
    way.packer._templates = packing._Recent(256, 1000)
    way.packer._objects = packing._Recent(256, 1000)
    way([T])
    way([T, 1])
    del got
    gc.collect()
    assert way.known == 2
    assert len(packing._kept) == before


# What cannot go.


class Lock:
    def __init__(self):
        self.lock = threading.Lock()


class Fails:
    def __reduce__(self):
        raise ZeroDivisionError("of its own")


BAD = {
    "input 1": ((T, (each for each in "ab")), {}),
    "input 'f'": ((T,), {"f": lambda: 0}),
    "input 0['a'][1]": (({"a": [T, Lock()]},), {}),
    "input 1[1]": ((T, Rows(["a", Fails()])), {}),
    "input 0['b']": ((Shared({"b": Fails()}),), {}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_pickled_is_named_and_harms_no_other(name):
    way = Way()
    for _ in range(3):
        with pytest.raises(TypeError, match=f"^{re.escape(name)} is a .* which cannot be sent to another process"):
            way(BAD[name])
    same(way((T, 1)), (T, 1))


def test_an_output_is_called_one():
    class Local:
        pass

    with pytest.raises(TypeError, match=r"^output\[1\] is a Local, which cannot be sent to another process"):
        Way("output")([T, Local()])


def test_what_is_nested_too_deeply_is_refused():
    value = [T]
    for _ in range(100_000):
        value = [value]
    with pytest.raises(TypeError, match="nested too deeply"):
        Way()(value)


def test_a_failed_value_leaves_nothing_that_the_other_side_does_not_know():
    way = Way()
    config = Config(k=1)
    for _ in range(3):
        with pytest.raises(TypeError):
            way((T, config, lambda: 0))
    assert way((T, config))[1] == config


class OnlyHere:
    pass


def test_what_cannot_be_made_there_fails_in_its_call_alone(monkeypatch):
    way = Way()
    bad = way.packer.pack((T, OnlyHere()))
    kept = OnlyHere()
    for _ in range(2):
        again = way.packer.pack((T, kept))
    with monkeypatch.context() as patch:
        patch.delattr("test_packing.OnlyHere" if __name__ == "test_packing" else f"{__name__}.OnlyHere")
        for each in (bad, again):
            with pytest.raises(AttributeError, match="OnlyHere"):
                way.unpacker.unpack(way.body(each), own=False)
    assert type(way.unpacker.unpack(way.body(again), own=False)[1]) is OnlyHere
    same(way((T, 1)), (T, 1))


# Blocks.


class Sides:
    def __init__(self):
        loop = asyncio.get_running_loop()
        one, other = ends()
        self.links = [
            connect(one, loop, self.to_sender, lambda error: None),
            connect(other, loop, self.to_receiver, lambda error: None),
        ]
        self.sender = Sender(self.links[0], loop, lambda: None, in_thread=self.at_once)
        self.receiver = Receiver(self.links[1], loop)

    def at_once(self, work):
        future = asyncio.get_running_loop().create_future()
        future.set_result(work())
        return future

    def to_sender(self, frames):
        for frame in frames:
            self.sender.on_free(frame)

    def to_receiver(self, frames):
        for frame in frames:
            self.receiver.on_segment(frame)

    async def take(self, size):
        while (block := self.sender.take(size)) is None:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return block


async def through_a_block(sides, way, value, own):
    packed = way.packer.pack(value)
    block = await sides.take(packed.nbytes)
    packed.write(block)
    (frame,) = Parser().feed(bytearray().join(encode(Kind.CALL, 1, *packed.placed(block))))
    assert len(frame.body) < 2000
    return way.unpacker.open(frame.body)


@WAYS
def test_everything_goes_through_blocks_too(own):
    async def main():
        sides = Sides()
        way = Way(memory=sides.receiver)
        values = [*VIEWS.values(), *ARRAYS.values(), *VALUES.values(), *VALUES.values()]
        values += [numbers(dtype, (3, 5)) for dtype in DTYPES if dtype is not torch.complex32]
        for value in values:
            for each in (value, [value, T]):
                opened = await through_a_block(sides, way, each, own)
                got = opened.value(own=own)
                del opened
                same(got, each)
                del got
        for _ in range(6):
            await asyncio.sleep(0)
        gc.collect()
        for _ in range(6):
            await asyncio.sleep(0)
        assert not sides.sender.used
        for each in (sides.sender, sides.receiver, *sides.links):
            each.close()

    run(main())


def test_a_block_is_free_once_its_value_is_copied_or_its_last_tensor_is_gone():
    async def main():
        sides = Sides()
        way = Way(memory=sides.receiver)
        value = {"a": torch.randn(300, 300), "b": np.ones(3), "c": Rows(["a"])}
        for own in (True, False):
            opened = await through_a_block(sides, way, value, own)
            got = opened.value(own=own)
            assert sides.receiver.leased == 1
            del opened
            for part in ("a", "b"):
                for _ in range(6):
                    await asyncio.sleep(0)
                assert bool(sides.sender.used) != own
                last = got.pop(part)
            view = last[1:]
            del last
            for _ in range(6):
                await asyncio.sleep(0)
            assert bool(sides.sender.used) != own
            del view
            for _ in range(6):
                await asyncio.sleep(0)
            assert not sides.sender.used
        for each in (sides.sender, sides.receiver, *sides.links):
            each.close()

    run(main())


def test_values_are_made_in_any_thread_whatever_is_dropped_meanwhile():
    way = Way()
    config = Config(k=1)
    for _ in range(2):
        way((T, config, Shared(T)))
    opened = way.unpacker.open(way.body(way.packer.pack((T, config, Shared(T)))))
    way.packer._templates = packing._Recent(256, 1000)
    way.packer._objects = packing._Recent(256, 1000)
    way([T])
    found = []
    thread = threading.Thread(target=lambda: found.append(opened.value(own=True)))
    thread.start()
    thread.join()
    same(found[0][0], T)
    assert found[0][1] == config
