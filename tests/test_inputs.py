"""Nested inputs and outputs: whatever structure of tensors and arrays goes in, the answer is the plain model's."""

import asyncio
import enum
import math
import sys
import time
import warnings
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque, namedtuple
from contextlib import nullcontext
from dataclasses import InitVar, dataclass, field, fields, is_dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from puppets import named
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.testing._internal.two_tensor import TwoTensor

from aneuron import AsyncDataParallel, Buckets, CpuBackend, OutputError, ShapeError
from aneuron.tensors import signature
from aneuron.testing import PuppetBackend, run

Plain = namedtuple("Plain", ["x", "y"])


class Typed(NamedTuple):
    x: Any
    y: Any = None


@dataclass
class Sample:
    x: Any
    y: Any = None


@dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any = None


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Any
    y: Any = None


@dataclass(kw_only=True)
class Derived(Sample):
    z: Any = None
    made: list = field(default_factory=list, init=False)


class Rows(list):
    """A list with a name of its own."""


class Table(OrderedDict):
    """A dict with a name of its own."""


CONTAINERS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"x": x, "y": y},
    "dict with keys of any kind": lambda x, y: {0: x, ("a", 1): y},
    "OrderedDict": lambda x, y: OrderedDict(y=y, x=x),
    "defaultdict": lambda x, y: defaultdict(list, x=x, y=y),
    "UserDict": lambda x, y: UserDict(x=x, y=y),
    "subclass of list": lambda x, y: Rows([x, y]),
    "subclass of OrderedDict": lambda x, y: Table(x=x, y=y),
    "namedtuple": Plain,
    "NamedTuple": Typed,
    "dataclass": Sample,
    "frozen dataclass": Frozen,
    "frozen dataclass with slots": Slotted,
    "derived dataclass": lambda x, y: Derived(x, z=y),
    "namespace": lambda x, y: SimpleNamespace(x=x, y=y),
    "deep": lambda x, y: {"a": [(Typed(x, None), {"b": Sample(y)}), ()], "c": Frozen({}, [])},
}


def transformed(value, change, other=lambda constant: constant):
    """The structure with its tensors and arrays changed; written for these tests, apart from what the package does."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return change(value)
    if isinstance(value, (UserDict, dict)):
        made = type(value)(list) if isinstance(value, defaultdict) else type(value)()
        for key in value:
            made[key] = transformed(value[key], change, other)
        return made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[transformed(child, change, other) for child in value])
    if isinstance(value, (tuple, list)):
        return type(value)([transformed(child, change, other) for child in value])
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**{name: transformed(each, change, other) for name, each in vars(value).items()})
    if is_dataclass(value) and not isinstance(value, type):
        made = object.__new__(type(value))
        for each in fields(value):
            object.__setattr__(made, each.name, transformed(getattr(value, each.name), change, other))
        return made
    return other(value)


def assert_same(ours, theirs):
    """Equal in structure, types, dtypes and to the bit."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)
    elif isinstance(ours, (dict, UserDict)):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, (tuple, list)):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    elif isinstance(ours, SimpleNamespace):
        assert_same(vars(ours), vars(theirs))
    elif is_dataclass(ours):
        for each in fields(ours):
            assert_same(getattr(ours, each.name), getattr(theirs, each.name))
    else:
        assert repr(ours) == repr(theirs)


def bumped(x):
    """Something that every row can be told by."""
    assert isinstance(x, torch.Tensor), f"the model saw a {type(x)}"
    return ~x if x.dtype == torch.bool else x + 1


def bump(*args, **kwargs):
    """A model: every tensor plus one, in the structure that it came in; constants become None."""
    changed = transformed((args, kwargs), bumped, lambda constant: None)
    return changed[0][0] if len(args) == 1 and not kwargs else changed


def as_tensors(value):
    def tensor(x):
        return torch.tensor(np.array(x.tolist(), x.dtype.newbyteorder("="))) if isinstance(x, np.ndarray) else x

    return transformed(value, tensor)


def answers(net, *calls, cores=2, **settings):
    """The results of calls made at once, each an (args, kwargs), and the puppets' executions."""

    async def main():
        backend = PuppetBackend(cores=cores, service_time=0.01)
        async with AsyncDataParallel(net, backend=backend, **settings) as model:
            results = await asyncio.gather(*(model(*args, **kwargs) for args, kwargs in calls), return_exceptions=True)
        return results, [batch for core in backend.loaded.values() for batch in core.executed]

    results, executed = run(main())
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results, executed


def answer(net, *args, **settings):
    return answers(net, (args, {}), **settings)[0][0]


def column(rows, start=0.0, width=3):
    return torch.arange(rows * width, dtype=torch.float32).reshape(rows, width) + start


# Containers.


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize(
    "settings", [{}, {"batch_size": 4}, {"split_size": 2}, {"set_dynamic_batching": False}], ids=named
)
def test_a_structure_goes_in_and_comes_out_as_it_is(kind, settings):
    make = CONTAINERS[kind]
    structures = [make(column(rows, rows), torch.arange(rows)) for rows in (1, 2, 6)]
    warns = "split_size" in settings or "set_dynamic_batching" in settings  # one row cannot use both cores
    with pytest.warns(UserWarning, match="not fully used") if warns else nullcontext():
        results, _ = answers(bump, *(((structure,), {}) for structure in structures), **settings)
    for structure, result in zip(structures, results, strict=True):
        assert_same(result, bump(structure))


@pytest.mark.parametrize("kind", CONTAINERS)
def test_the_model_sees_the_very_structure_with_the_rows_of_the_batch(kind):
    make = CONTAINERS[kind]
    calls = [((make(column(1, start), torch.arange(1)),), {}) for start in (0, 10, 20)]
    _, executed = answers(bump, *calls, cores=1, batch_size=4)
    ((args, kwargs),) = executed
    whole = torch.cat([column(1, 0), column(1, 10), column(1, 20), column(1, 20)])
    assert_same(args, (make(whole, torch.zeros(4, dtype=torch.int64)),))
    assert kwargs == {}


def test_what_comes_out_of_one_call_is_not_the_container_of_another():
    results, _ = answers(lambda x: {"a": [x]}, ((column(1),), {}), ((column(1),), {}), cores=1)
    results[0]["a"].append("mine")
    results[0]["b"] = "mine"
    assert_same(results[1], {"a": [column(1)]})


def test_a_caller_s_own_containers_are_left_alone():
    structure = {"a": [column(2)], "b": Sample(column(2), "text")}
    before = transformed(structure, torch.clone)
    answers(bump, ((structure,), {}), ((structure,), {}), batch_size=8)
    assert_same(structure, before)


def test_a_sequence_given_as_one_argument_is_one_argument():
    seen = []

    def net(pair):
        seen.append(type(pair))
        return pair[0] + pair[1]

    assert torch.equal(answer(net, (column(2), column(2))), column(2) * 2)
    assert torch.equal(answer(net, [column(2), column(2)]), column(2) * 2)
    assert torch.equal(answer(net, Typed(column(2), column(2))), column(2) * 2)
    assert set(seen) == {tuple, list, Typed}


def test_keyword_inputs_reach_the_model_by_name_whatever_their_order():
    def net(a, *, b, c=2.0):
        return a - b * c

    x, y = column(3), column(3, 5.0)
    calls = [((x,), {"b": y, "c": 3.0}), ((x,), {"c": 3.0, "b": y}), ((), {"b": y, "a": x, "c": 3.0}), ((x,), {"b": y})]
    results, executed = answers(net, *calls, cores=1)
    for (args, kwargs), result in zip(calls, results, strict=True):
        assert torch.equal(result, net(*args, **kwargs))
    assert len(executed) == 3  # the first two share a batch


def test_several_outputs_of_different_width_keep_their_shapes():
    def net(x):
        return x.sum(1), x[:, None, :], {"empty": x[:, :0], "wide": x.repeat(1, 5)}

    for rows in (1, 3, 9):
        assert_same(answer(net, column(rows), batch_size=4), net(column(rows)))


def test_one_tensor_in_two_places_comes_back_in_both():
    x = column(3)
    result = answer(lambda d: {"a": d["p"], "b": [d["q"], d["p"]]}, {"p": x, "q": x})
    assert_same(result, {"a": x, "b": [x, x]})


def test_none_stays_none_at_any_depth():
    assert_same(
        answer(lambda x: (None, {"a": None, "b": [x, None]}), column(2)), (None, {"a": None, "b": [column(2), None]})
    )


def test_empty_containers_stay_empty():
    assert_same(answer(lambda x: (x, (), [], {}), column(2)), (column(2), (), [], {}))


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_torch_s_return_types_come_back_as_they_are(rows):
    x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows))
    for net in (lambda t: torch.max(t, dim=1), lambda t: torch.sort(t, dim=1), lambda t: torch.topk(t, 2)):
        assert_same(answer(net, x, batch_size=4), net(x))


def test_torch_s_return_types_are_inputs_too():
    pair = torch.max(column(5), dim=1)
    assert torch.equal(answer(lambda p: p.values + p.indices, pair, batch_size=2), pair.values + pair.indices)


def test_a_tuple_with_a_constructor_of_its_own_comes_back_as_it_is():
    class Pair(tuple):
        def __new__(cls, first, second):
            return super().__new__(cls, (first, second))

    class Bag(tuple):
        def __new__(cls, *items):
            return super().__new__(cls, items)

    for made in (Pair, Bag):
        result = answer(lambda x, made=made: made(x, x + 1), column(2))
        assert type(result) is made
        assert len(result) == 2
        assert torch.equal(result[1], column(2) + 1)


def test_a_scripted_model_s_named_tuples_and_dicts_come_back():
    class Out(NamedTuple):
        mean: torch.Tensor
        high: torch.Tensor

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"mean": x.mean(1), "high": x.amax(1)}

    class Net2(torch.nn.Module):
        def forward(self, x: torch.Tensor):
            return Out(x.mean(1), x.amax(1))

    for net in (Net().eval(), Net2().eval()):
        scripted = torch.jit.script(net)
        ours, theirs = answer(scripted, column(5), batch_size=2), scripted(column(5))
        assert type(ours) is type(theirs) or ours._fields == theirs._fields
        torch.testing.assert_close(ours, theirs)


def test_a_dataclass_is_not_constructed_again():
    made = []

    @dataclass(frozen=True)
    class Once:
        x: torch.Tensor

        def __post_init__(self):
            made.append(self)

    results, _ = answers(lambda once: once, *[((Once(column(1)),), {})] * 3, cores=1)
    assert len(made) == 1
    assert all(torch.equal(result.x, column(1)) for result in results)


def test_fields_that_the_constructor_does_not_take_are_cut_like_the_others():
    @dataclass
    class Doubled:
        x: torch.Tensor
        twice: torch.Tensor = field(init=False)

        def __post_init__(self):
            self.twice = self.x * 2

    result = answer(lambda d: Doubled(d.twice - d.x), Doubled(column(5)), batch_size=2)
    assert torch.equal(result.x, column(5))
    assert torch.equal(result.twice, column(5) * 2)


def test_a_field_that_was_never_set_stays_unset():
    @dataclass
    class Partly:
        x: torch.Tensor
        later: torch.Tensor = field(init=False)

    result = answer(lambda d: Partly(d.x + 1), Partly(column(5)), batch_size=2)
    assert torch.equal(result.x, column(5) + 1)
    assert not hasattr(result, "later")


@pytest.mark.parametrize("kind", ["namedtuple", "tuple", "list", "dict"])
def test_attributes_beside_the_items_do_not_put_other_tensors_in_the_wrong_place(kind):
    base = {"namedtuple": Plain, "tuple": tuple, "list": list, "dict": dict}[kind]
    marked = type("Marked", (base,), {})  # with room for attributes

    def mark(x):
        made = marked(x, x) if kind == "namedtuple" else marked({"x": x} if kind == "dict" else [x])
        made.extra = x * 10
        return made

    def first(value):
        return value["x"] if kind == "dict" else value[0]

    for rows in (1, 3, 9):
        x = column(rows)
        result = answer(lambda x: {"a": mark(x), "b": x * 100}, x, batch_size=4)
        assert torch.equal(first(result["a"]), x)
        assert torch.equal(result["b"], x * 100)
        result = answer(lambda d: first(d["a"]) + d["b"], {"a": mark(x), "b": x * 100}, batch_size=4)
        assert torch.equal(result, x * 101)


def test_a_class_of_dataclasses_is_no_structure():
    seen = []

    def net(x, kind):
        seen.append(kind)
        return x

    answer(net, column(2), Sample)
    assert set(seen) == {Sample}


# What is no structure of tensors, and what is one that cannot be taken apart.


class Fixed(dict):
    """A dict that nobody can write to, as third parties have them: a copy is the dict itself."""

    def __setitem__(self, key, value):
        raise TypeError("fixed")

    def __copy__(self):
        return self


class Solid(list):
    """A list that nobody can write to."""

    def __setitem__(self, key, value):
        raise TypeError("solid")


class Dims(tuple):
    """A tuple with a constructor of its own."""

    def __new__(cls, *dims):
        return super().__new__(cls, dims)


UNTOUCHED = {
    "torch.Size": lambda: torch.Size([2, 3]),
    "an empty torch.Size": lambda: torch.Size([]),
    "fx's list": lambda: immutable_list([1, immutable_list([2])]),
    "fx's dict": lambda: immutable_dict(a=1, b=immutable_list([2, 3])),
    "a frozen dict": lambda: Fixed(a=1),
    "a frozen dict around a list": lambda: Fixed(a=[1, 2]),
    "a frozen list": lambda: Solid([1, 2]),
    "a mapping proxy": lambda: MappingProxyType({"a": 1}),
    "a tuple class": lambda: Dims(1, 2),
    "a tuple class in a tuple": lambda: (Dims(1, 2), torch.Size([1])),
    "a named tuple": lambda: Plain(1, "a"),
    "a set": lambda: frozenset({1, 2}),
    "a deque": lambda: deque([1, 2]),
    "the interpreter's version": lambda: sys.version_info,
    "a time": lambda: time.gmtime(0),
}


@pytest.mark.parametrize("kind", UNTOUCHED)
@pytest.mark.parametrize("settings", [{}, {"batch_size": 4}, {"example": True, "batch_size": 2}], ids=named)
def test_what_has_no_tensor_inside_is_passed_on_untouched(kind, settings):
    settings = dict(settings)
    value, seen = UNTOUCHED[kind](), []

    def net(x, extra, *, option):
        seen.append((extra["deep"][0], option))
        return x + 1

    if settings.pop("example", False):
        settings["example_inputs"] = (column(1), {"deep": [value]})
        (result,), _ = answers(
            lambda x, extra: net(x, extra, option=value), ((column(5), {"deep": [value]}), {}), **settings
        )
    else:
        (result,), _ = answers(net, ((column(5), {"deep": [value]}), {"option": value}), **settings)
    assert torch.equal(result, column(5) + 1)
    assert all(each is value for pair in seen for each in pair)


@pytest.mark.parametrize("kind", [kind for kind in UNTOUCHED if kind not in ("a mapping proxy", "a set", "a deque")])
def test_calls_with_equal_ones_share_a_batch(kind):
    calls = [((column(1, start), UNTOUCHED[kind]()), {}) for start in (0.0, 5.0)]
    results, executed = answers(lambda x, extra: x, *calls, cores=1)
    assert len(executed) == 1
    assert torch.equal(results[1], column(1, 5.0))


@pytest.mark.parametrize("make", [lambda: torch.Size([]), immutable_list, immutable_dict, Fixed, Solid], ids=named)
def test_an_empty_one_in_an_output_comes_back(make):
    results, _ = answers(lambda x: {"x": x, "nothing": make()}, ((column(1),), {}), ((column(5),), {}), batch_size=4)
    for result in results:
        assert type(result["nothing"]) is type(make())
        assert not result["nothing"]


def test_a_plain_container_without_tensors_is_still_the_model_s_own():
    extra = {"scale": 2.0, "more": [1]}

    def net(x, extra):
        extra["more"].append(2)
        return x * extra.pop("scale")

    assert torch.equal(answer(net, column(7), extra, batch_size=2), column(7) * 2)
    assert extra == {"scale": 2.0, "more": [1]}


def packed():
    return torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2), torch.ones(1, 2)])


SEALED = {
    "a frozen dict": (lambda x: Fixed(x=x), ["Fixed", "use a dict"]),
    "a frozen list": (lambda x: [Solid([x])], ["Solid", "solid"]),
    "fx's list": (lambda x: immutable_list([x]), ["immutable_list"]),
    "fx's dict": (lambda x: {"a": immutable_dict(x=x)}, ["immutable_dict"]),
    "a mapping proxy": (lambda x: MappingProxyType({"x": x}), ["mappingproxy", "use a dict"]),
    "a deque": (lambda x: deque([x, x]), ["deque", "list"]),
    "a set": (lambda x: {x}, ["set", "list"]),
    "the values of a dict": (lambda x: {"x": x}.values(), ["dict_values"]),
    "a chain of dicts": (lambda x: ChainMap({"x": x}), ["ChainMap"]),
    "an array in a deque": (lambda x: deque([x.numpy()]), ["deque"]),
    "a generator": (lambda x: (each for each in [x]), ["generator", "list"]),
    "a map": (lambda x: map(torch.neg, [x]), ["map", "list"]),
    "a zip": (lambda x: zip([x], [x], strict=True), ["zip", "list"]),
    "a PackedSequence": (lambda x: packed(), ["PackedSequence", "pad_packed_sequence", "Rows"]),
    "a PackedSequence in a dict": (lambda x: {"a": [packed()]}, ["PackedSequence"]),
    "a packed sequence whose parts have equal rows": (
        lambda x: torch.nn.utils.rnn.pack_padded_sequence(torch.ones(3, 1, 2), torch.tensor([3])), ["PackedSequence"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SEALED)
@pytest.mark.parametrize("lone", [True, False])
def test_tensors_in_what_cannot_be_taken_apart_are_refused_and_nobody_else_harmed(kind, lone):
    make, words = SEALED[kind]
    args = (make(column(3)),) if lone else (column(3), make(column(3)))

    async def main():
        backend = PuppetBackend(cores=1, service_time=0.01)
        async with AsyncDataParallel(lambda *args: args[0], backend=backend, batch_size=8) as model:
            calls = [model(column(3)), model(*args), model({"deep": args})]
            good, *bad = await asyncio.gather(*calls, return_exceptions=True)
            assert len(backend[0].executed) == 1
            return good, bad

    good, bad = run(main())
    assert torch.equal(good, column(3))
    for error in bad:
        assert type(error) is ShapeError
        assert all(word in str(error) for word in words), error
    with pytest.raises(ShapeError, match=r"^example_inputs: among the inputs is an? "):
        AsyncDataParallel(torch.neg, example_inputs=(make(column(3)), column(3)))


@pytest.mark.parametrize("kind", SEALED)
def test_so_are_they_in_outputs(kind):
    make, words = SEALED[kind]

    async def main():
        backend = PuppetBackend(cores=2, service_time=0.01)
        async with AsyncDataParallel(lambda x: (x, make(x)), backend=backend, batch_size=4) as model:
            return await asyncio.gather(*(model(column(rows)) for rows in (1, 2, 9)), return_exceptions=True)

    for error in run(main()):
        assert type(error) is OutputError
        assert all(word in str(error) for word in words if word not in ("list", "use a dict")), error


def test_a_class_of_one_s_own_is_tried_once():
    copies = []

    class Noted(dict):
        def __copy__(self):
            copies.append(self)
            return Noted(self)

    for _ in range(3):
        assert torch.equal(answer(lambda d: d["x"], Noted(x=column(1))), column(1))
    assert len(copies) == 4  # and once a batch


# Hugging Face.


def test_hugging_face_outputs_come_back_whole():
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def net(input_ids, attention_mask):
        hidden = input_ids[..., None] * attention_mask[..., None].float()
        return outputs.BaseModelOutputWithPooling(
            last_hidden_state=hidden, pooler_output=hidden[:, 0], hidden_states=(hidden, hidden * 2)
        )

    calls = [
        ((), {"input_ids": torch.arange(n * 4).reshape(n, 4), "attention_mask": torch.ones(n, 4)}) for n in (1, 2, 9)
    ]
    results, _ = answers(net, *calls, batch_size=4)
    for (_, kwargs), result in zip(calls, results, strict=True):
        plain = net(**kwargs)
        assert type(result) is type(plain)
        assert list(result) == list(plain)
        assert result.attentions is None
        for name in plain:
            assert_same(result[name], plain[name])
            assert result[name] is getattr(result, name)  # attributes and items are the same thing
        assert_same(result.to_tuple(), plain.to_tuple())


def test_hugging_face_outputs_are_inputs_too():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    state = outputs.BaseModelOutput(last_hidden_state=column(5), hidden_states=(column(5), column(5, 1.0)))

    def net(state, scale):
        assert type(state) is outputs.BaseModelOutput
        return state.last_hidden_state * scale + state.hidden_states[1] + state["hidden_states"][0]

    assert torch.equal(answer(net, state, 2.0, batch_size=2), net(state, 2.0))


def test_what_a_tokenizer_returns_is_an_input():
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding(
        {"input_ids": torch.arange(12).reshape(3, 4), "attention_mask": torch.ones(3, 4)}
    )

    def net(encoded):
        assert type(encoded) is transformers.BatchEncoding
        return encoded.input_ids * encoded["attention_mask"]

    assert torch.equal(answer(net, batch, batch_size=2), net(batch))
    kwargs_call = answers(
        lambda input_ids, attention_mask: input_ids * attention_mask, ((), dict(**batch)), batch_size=2
    )
    assert torch.equal(kwargs_call[0][0], net(batch))


# NumPy.


def structured_field():
    """An array whose strides are no multiple of its items: every second value of a packed record."""
    return np.array([(1, 1.5), (2, -2.5), (3, 0.0), (4, 8.0), (5, 1e9)], dtype=[("id", "i1"), ("x", "f4")])["x"]


def odd_bytes(numbers):
    return b"x" + np.arange(numbers, dtype="f4").tobytes()


def read_only(array):
    array.flags.writeable = False
    return array


ARRAYS = {
    "float32": lambda: np.arange(15, dtype="f4").reshape(5, 3),
    "float64": lambda: np.arange(15, dtype="f8").reshape(5, 3),
    "float16": lambda: np.arange(15, dtype="f2").reshape(5, 3),
    "int8": lambda: np.arange(-7, 8, dtype="i1").reshape(5, 3),
    "uint16": lambda: np.arange(5, dtype="u2"),
    "int64": lambda: np.arange(15).reshape(5, 3),
    "bool": lambda: np.array([True, False, True, True, False]),
    "complex64": lambda: np.arange(5, dtype="c8") * 1j,
    "read-only": lambda: read_only(np.arange(15, dtype="f4").reshape(5, 3)),
    "over bytes": lambda: np.frombuffer(np.arange(15, dtype="f4").tobytes(), "f4").reshape(5, 3),
    "over bytes, odd offset": lambda: np.frombuffer(odd_bytes(15), "f4", offset=1).reshape(5, 3),
    "unaligned and writeable": lambda: np.frombuffer(bytearray(odd_bytes(10)), "f4", offset=1).reshape(5, 2),
    "negative strides": lambda: np.arange(15, dtype="f4").reshape(5, 3)[::-1, ::-1],
    "every other row": lambda: np.arange(30, dtype="f4").reshape(10, 3)[::2],
    "Fortran order": lambda: np.asfortranarray(np.arange(15, dtype="f4").reshape(5, 3)),
    "big-endian": lambda: np.arange(15, dtype=">f4").reshape(5, 3),
    "big-endian ints, read-only": lambda: read_only(np.arange(15, dtype=">i8").reshape(5, 3)),
    "broadcast": lambda: np.broadcast_to(np.arange(3, dtype="f4"), (5, 3)),
    "field of a record array": structured_field,
    "no columns": lambda: np.zeros((5, 0), "f4"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("batch_size", [None, 2, 5, 8])
def test_any_numeric_array_is_as_good_as_a_tensor(kind, batch_size):
    array = ARRAYS[kind]()
    expected = bump(as_tensors(array)) if array.dtype != np.uint16 else as_tensors(array)
    net = bump if array.dtype != np.uint16 else torch.clone
    assert_same(answer(net, array, batch_size=batch_size), expected)
    assert_same(answer(lambda d: net(d["x"][0]), {"x": [array]}, batch_size=batch_size), expected)


@pytest.mark.parametrize(
    "array",
    [
        np.array([object(), None]),
        np.array([[1.0], "two"], dtype=object),
        np.array(["one", "two"]),
        np.array([b"one", b"two"]),
        np.array(["2026-01-01", "2026-01-02"], dtype="M8[D]"),
        np.zeros(2, dtype=[("id", "i1"), ("x", "f4")]),
        np.zeros(2, dtype="g"),
    ],
    ids=lambda array: str(array.dtype),
)
def test_an_array_that_no_tensor_can_hold_is_refused_before_it_reaches_a_batch(array):
    async def main():
        backend = PuppetBackend(cores=1, service_time=0.01)
        async with AsyncDataParallel(bump, backend=backend, batch_size=4) as model:
            calls = [model(torch.zeros(2)), model(array), model({"x": array})]
            good, *bad = await asyncio.gather(*calls, return_exceptions=True)
            assert len(backend[0].executed) == 1
            return good, bad

    good, bad = run(main())
    assert torch.equal(good, torch.ones(2))
    for error in bad:
        assert type(error) is ShapeError
        assert str(array.dtype) in str(error)
        assert "astype" in str(error)


def test_arrays_and_tensors_share_a_batch():
    calls = [((column(1),), {}), ((column(1).numpy(),), {}), ((read_only(column(1).numpy()),), {})]
    calls.append(((column(1).numpy().astype(">f4"),), {}))
    results, executed = answers(bump, *calls, cores=1)
    assert len(executed) == 1
    assert all(torch.equal(result, column(1) + 1) for result in results)


def test_a_read_only_array_is_not_written_to_by_a_model_that_writes():
    array = read_only(np.zeros((4, 3), "f4"))
    assert torch.equal(answer(lambda x: x.add_(1), array, batch_size=4), torch.ones(4, 3))
    assert not array.any()


def test_arrays_that_the_model_returns_become_tensors():
    def net(x):
        return {"text": None, "score": x.numpy().sum(1), "back": x.numpy()[:, ::-1]}

    results, _ = answers(net, ((column(1),), {}), ((column(2),), {}), ((column(9),), {}), batch_size=4)
    for rows, result in zip((1, 2, 9), results, strict=True):
        assert_same(result, {"text": None, "score": column(rows).sum(1), "back": column(rows).flip(1)})


@pytest.mark.parametrize("packing", [True, False])
def test_an_array_of_objects_that_the_model_returns_is_an_output_error(packing):
    with pytest.raises(OutputError, match="object"):
        answer(lambda x: np.array(["a"] * len(x), dtype=object), column(2), set_dynamic_batching=packing)


# Leaves that are no tensors.


def test_leaves_that_are_no_tensors_reach_every_piece():
    class Colour(enum.Enum):
        RED = 1

    thing = object()
    others = (
        None,
        1,
        True,
        2.5,
        math.nan,
        "text",
        b"bytes",
        1j,
        Colour.RED,
        thing,
        torch.float16,
        slice(2),
        {1, 2},
        bump,
    )
    seen = []

    def net(x, extras, *, flag, nested):
        seen.append((extras, flag, nested))
        return x

    call = ((column(7), others), {"flag": thing, "nested": {"deep": [("text", 3)]}})
    (result,), executed = answers(net, call, cores=3)
    assert torch.equal(result, column(7))
    assert len(executed) == len(seen) == 3
    for extras, flag, nested in seen:
        assert all(mine is other for mine, other in zip(extras, others, strict=True))
        assert flag is thing
        assert nested == {"deep": [("text", 3)]}


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        (1, 1, True),
        (1, 2, False),
        (1, True, False),
        (1, 1.0, False),
        (0.0, -0.0, False),
        (math.nan, float("nan"), True),
        ("a", "a", True),
        (None, None, True),
        (None, False, False),
        ([1, 2], [1, 2], True),
        ([1, 2], (1, 2), False),
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1}, {"b": 1}, False),
        (np.float32(1), np.float32(1), True),
        (np.float32(1), np.float64(1), False),
        (torch.float16, torch.float32, False),
        (object(), object(), False),
        (Sample(1, "a"), Sample(1, "a"), True),
        (Sample(1, "a"), Frozen(1, "a"), False),
        ((), None, False),
        ({1: "a"}, {True: "a"}, False),
        ({1: "a"}, {1.0: "a"}, False),
        ({0.0: "a"}, {-0.0: "a"}, False),
        ({("a", 1): "a"}, {("a", True): "a"}, False),
        ({("a", (1, 2)): "a"}, {("a", (1, 2)): "a"}, True),
        ({None: 1.5}, {None: 1.5}, True),
        (defaultdict(list), defaultdict(int), False),
        (defaultdict(list), defaultdict(list), True),
        (SimpleNamespace(a=1), SimpleNamespace(a=1), True),
        (SimpleNamespace(a=1), SimpleNamespace(a=2), False),
    ],
    ids=named,
)
def test_only_calls_with_the_same_other_arguments_share_a_batch(one, other, together):
    def net(x, extra):
        seen.append(extra)
        return x

    seen = []
    results, executed = answers(net, ((column(1), one), {}), ((column(1, 5.0), other), {}), cores=1)
    assert torch.equal(results[0], column(1))
    assert torch.equal(results[1], column(1, 5.0))
    assert len(executed) == (1 if together else 2)
    if not together:
        assert [repr(value) for value in seen] == [repr(one), repr(other)]


def test_calls_of_different_shape_dtype_or_structure_do_not_share_a_batch():
    x = column(1)
    inputs = [x, x.double(), x[0], x[:, :2], (x,), [x], {"x": x}, {"y": x}, Sample(x), Frozen(x)]
    results, executed = answers(bump, *(((value,), {}) for value in inputs), cores=1)
    assert len(executed) == len(inputs)
    for value, result in zip(inputs, results, strict=True):
        assert_same(result, bump(value))


# Compiled structures.


def test_a_dict_in_another_order_is_what_the_model_was_compiled_for():
    def net(features):
        return features["a"] - features["b"]

    example = ({"a": column(1), "b": column(1)},)
    result = answer(net, {"b": column(2), "a": column(2, 5.0)}, batch_size=4, example_inputs=example)
    assert torch.equal(result, torch.full((2, 3), 5.0))


def test_keyword_inputs_in_another_order_are_what_the_model_was_compiled_for():
    (result,), _ = answers(
        lambda a, b: a - b,
        ((), {"b": column(2), "a": column(2, 5.0)}),
        batch_size=4,
        example_inputs={"a": column(1), "b": column(1)},
    )
    assert torch.equal(result, torch.full((2, 3), 5.0))


# Other dimensions.


@pytest.mark.parametrize("dim", [1, 2, -1, -2])
def test_nested_inputs_are_cut_along_any_dimension(dim):
    shapes = [[4, 5, 6], [3, 5, 6]] if dim in (1, 2, -2) else [[4, 6], [2, 3, 6]]
    x, y = (torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) for shape in shapes)
    result = answer(bump, {"x": x, "y": [y.numpy()], "z": 3}, dim=dim)
    assert_same(result, {"x": x + 1, "y": [y + 1], "z": None})


# Every dtype.


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
        torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2,
    ],
    ids=named,
)  # fmt: skip
def test_every_dtype_travels_to_the_bit(dtype):
    def bits(tensor):
        return tensor.contiguous().view(torch.uint8)

    calls = [((torch.randint(0, 2, (rows, 4)).to(dtype),), {}) for rows in (1, 2, 7)]
    results, _ = answers(lambda x: x, *calls, batch_size=4)
    for ((x,), _), result in zip(calls, results, strict=True):
        assert result.dtype == dtype
        assert torch.equal(bits(result), bits(x))


# Quantized tensors: integers with a scale and a zero point, of the whole tensor or of each channel.

QUANTIZED = {
    "uint8": lambda x: torch.quantize_per_tensor(x, 0.5, 3, torch.quint8),
    "int8": lambda x: torch.quantize_per_tensor(x, 0.25, 0, torch.qint8),
    "int32 beyond what a float32 holds": lambda x: torch._make_per_tensor_quantized_tensor(
        2**30 + 1 + x.to(torch.int32), 0.5, 0
    ),
    "by channel": lambda x: torch.quantize_per_channel(
        x, torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0, 1, 2]), 1, torch.qint8
    ),
    "not contiguous": lambda x: torch.quantize_per_tensor(x.t().contiguous(), 0.5, 3, torch.quint8).t(),
}


def assert_same_grid(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.qscheme() == theirs.qscheme()
    assert torch.equal(ours.int_repr(), theirs.int_repr())
    if ours.qscheme() == torch.per_tensor_affine:
        assert (ours.q_scale(), ours.q_zero_point()) == (theirs.q_scale(), theirs.q_zero_point())
    else:
        assert torch.equal(ours.q_per_channel_scales(), theirs.q_per_channel_scales())
        assert torch.equal(ours.q_per_channel_zero_points(), theirs.q_per_channel_zero_points())
        assert ours.q_per_channel_axis() == theirs.q_per_channel_axis()


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("settings", [{}, {"batch_size": 4}, {"set_dynamic_batching": False}], ids=named)
def test_quantized_tensors_travel_to_the_last_integer(kind, nested, settings):
    inputs = [QUANTIZED[kind](column(rows, rows)) for rows in (1, 2, 7)]
    calls = [(({"x": x, "y": column(len(x))} if nested else x,), {}) for x in inputs]
    warns = "set_dynamic_batching" in settings
    with pytest.warns(UserWarning, match="not fully used") if warns else nullcontext():
        results, executed = answers(lambda x: x, *calls, **settings)
    for x, result in zip(inputs, results, strict=True):
        assert_same_grid(result["x"] if nested else result, x)
    assert all(len(args[0]["y"] if nested else args[0]) == 4 for args, _ in executed) or "batch_size" not in settings


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_only_quantized_tensors_of_the_same_scale_zero_point_and_axis_share_a_batch():
    x = column(2)
    ones, zeros = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    inputs = [
        torch.quantize_per_tensor(x, 1.0, 0, torch.quint8),
        torch.quantize_per_tensor(x, 1.0, 0, torch.quint8),
        torch.quantize_per_tensor(x, 0.5, 0, torch.quint8),
        torch.quantize_per_tensor(x, 1.0, 1, torch.quint8),
        torch.quantize_per_tensor(x, 1.0, 0, torch.qint8),
        torch.quantize_per_channel(x, ones, zeros, 1, torch.quint8),
        torch.quantize_per_channel(x, ones * 2, zeros, 1, torch.quint8),
        torch.quantize_per_channel(x, ones, zeros + 1, 1, torch.quint8),
        torch.quantize_per_channel(x[:, :, None].expand(2, 3, 3), ones, zeros, 1, torch.quint8),
        torch.quantize_per_channel(x[:, :, None].expand(2, 3, 3), ones, zeros, 2, torch.quint8),
        x,
    ]
    results, executed = answers(lambda x: x.dequantize(), *(((each,), {}) for each in inputs), batch_size=16, cores=1)
    for each, result in zip(inputs, results, strict=True):
        assert torch.equal(result, each.dequantize())
    assert len(executed) == len(inputs) - 1  # the first two share one


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.quantize_per_channel(x, torch.ones(len(x)), torch.arange(len(x)), 0, torch.qint8),
        lambda x: torch.quantize_per_channel(x, torch.ones(len(x)), torch.zeros(len(x)), 0, torch.quint4x2),
    ],
    ids=["a scale for each row", "two in a byte"],
)
def test_quantized_tensors_that_cannot_be_cut_are_refused_in_and_out(make):
    with pytest.raises(ShapeError, match=r"quantized .*dequantize\(\)"):
        answer(bump, make(column(4)))
    for packing in (True, False):
        with pytest.raises(OutputError, match=r"quantized .*dequantize\(\)"):
            answer(make, column(4), set_dynamic_batching=packing)


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"set_dynamic_batching": False}], ids=named)
def test_parts_of_one_call_with_scales_of_their_own_are_not_joined(settings):
    def net(x):  # as dynamic quantization has it
        return torch.quantize_per_tensor(x, x.max().item() / 100, 0, torch.quint8)

    with pytest.raises(OutputError, match="cannot be joined"):
        answer(net, column(8, 1.0), **settings)
    results, _ = answers(lambda x: torch.quantize_per_tensor(x, 0.5, 7, torch.quint8), ((column(9),), {}), **settings)
    assert_same_grid(results[0], torch.quantize_per_tensor(column(9), 0.5, 7, torch.quint8))


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_quantized_tensors_are_not_padded_to_buckets():
    x = torch.quantize_per_tensor(column(2), 0.5, 3, torch.quint8)
    with pytest.raises(ShapeError, match=r"quantized.*bucket"):
        answer(bump, x, buckets=Buckets(dim=1, sizes=(3, 4), pad=0))
    with pytest.raises(ShapeError, match=r"quantized.*bucket"):
        answer(bump, {"x": x, "ids": column(2)}, buckets=Buckets(dim=1, sizes=(3, 4), pad=0))


# Kinds of tensors and arrays that are more than their numbers.


def views(x):
    """Tensors whose numbers are not those in memory."""
    flipped = torch._neg_view(-x)
    conjugate = torch.complex(x, -x).conj()
    return {"neg": flipped, "conj": conjugate, "imag": conjugate.imag, "expanded": x[:, :1].expand(len(x), 4)}


@pytest.mark.parametrize("settings", [{}, {"batch_size": 4}, {"set_dynamic_batching": False}], ids=named)
def test_lazy_views_are_what_they_stand_for(settings):
    for kind in views(column(1)):
        inputs = [views(column(rows, rows))[kind] for rows in (2, 6)]
        results, _ = answers(lambda x: x * 2, *(((x,), {}) for x in inputs), **settings)
        for x, result in zip(inputs, results, strict=True):
            assert torch.equal(result, x * 2)


class Boxes(torch.Tensor):
    """A tensor of a class of its own, with something to say beside its numbers."""

    @classmethod
    def of(cls, x, scale):
        made = x.as_subclass(cls)
        made.scale = scale
        return made


def test_a_tensor_with_attributes_is_refused_and_one_without_becomes_a_plain_one():
    seen = []

    def net(x):
        seen.append(type(x))
        return x * getattr(x, "scale", 1.0)

    for value in (Boxes.of(column(3), 2.0), {"x": Boxes.of(column(3), 2.0)}):
        with pytest.raises(ShapeError, match=r"Boxes with attributes \(scale\).*as_subclass"):
            answer(net, value)
    assert torch.equal(answer(net, column(3).as_subclass(Boxes)), column(3))
    assert set(seen) == {torch.Tensor}


def fake():
    with FakeTensorMode():
        return torch.ones(2, 3)


def masked():
    with warnings.catch_warnings(action="ignore"):
        return torch.masked.masked_tensor(torch.ones(2, 3), torch.ones(2, 3) > 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (fake, ["FakeTensor", "plain tensors"]),
        (masked, ["MaskedTensor", "plain tensors"]),
        (lambda: TwoTensor(torch.ones(2, 3), torch.zeros(2, 3)), ["TwoTensor", "plain tensors"]),
        (lambda: torch.ones(2, 3).to_mkldnn(), ["_mkldnn", "to_dense"]),
        (lambda: np.ma.masked_array(np.ones((2, 3), "f4"), np.eye(2, 3)), ["masked array", "filled"]),
        (lambda: np.ma.masked_array(np.ones((2, 3), "f4")), ["masked array", "filled"]),
    ],
    ids=named,
)
def test_what_is_more_than_its_numbers_is_refused_in_and_out(make, words):
    async def main():
        backend = PuppetBackend(cores=1, service_time=0.01)
        async with AsyncDataParallel(bump, backend=backend, batch_size=8) as model:
            calls = [model(column(2)), model(make()), model({"x": [make()]})]
            good, *bad = await asyncio.gather(*calls, return_exceptions=True)
            assert len(backend[0].executed) == 1
            return good, bad

    good, bad = run(main())
    assert torch.equal(good, column(2) + 1)
    for error in bad:
        assert type(error) is ShapeError
        assert all(word in str(error) for word in words), error
    for packing in (True, False):
        with pytest.raises(OutputError, match=words[0]):
            answer(lambda x: (x, make()), column(2), set_dynamic_batching=packing, cores=1)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_matrix_a_memmap_and_a_parameter_are_what_is_in_them(tmp_path):
    mapped = np.memmap(tmp_path / "rows", "f4", "w+", shape=(5, 3))
    mapped[:] = column(5).numpy()
    for value in (np.asmatrix(column(5).numpy()), mapped, torch.nn.Parameter(column(5)), torch.nn.Buffer(column(5))):
        results, _ = answers(bump, ((value,), {}), ((value[:2],), {}), batch_size=4)
        assert torch.equal(results[0], column(5) + 1)
        assert torch.equal(results[1], column(2) + 1)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e5m2", "float8_e4m3fn", "int4", "uint4", "float8_e4m3b11fnuz"])
def test_arrays_of_dtypes_that_are_not_numpy_s_own_are_refused(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.ones((2, 3), getattr(ml_dtypes, name))
    for value in (array, {"x": array}):
        with pytest.raises(ShapeError, match=rf"dtype {name} .*astype"):
            answer(bump, value)
    assert torch.equal(answer(bump, array.astype("float32")), torch.full((2, 3), 2.0))


class Foreign:
    """NumPy's description of a registered dtype: its name is one of torch's, its kind that of floats."""

    kind, name, isbuiltin = "f", "float8_e5m2", 2


def test_so_they_are_where_their_kind_is_that_of_floats():
    with pytest.raises(ShapeError, match="cannot become a tensor"):
        signature.dtype_of(Foreign)


# Any of it, nested at random.

TRAILING = st.sampled_from([(), (1,), (3,), (2, 2), (0,)])
DTYPES = st.sampled_from(["float32", "int64", "bool", "float16"])
LEAVES = st.tuples(st.sampled_from(["tensor", "strided", "array", "read-only"]), TRAILING, DTYPES)
CONSTANTS = st.sampled_from([None, 0, 1, True, "text", 1.5, math.nan])
SEQUENCES, MAPPINGS = st.sampled_from(["tuple", "list", "rows"]), st.sampled_from(["dict", "ordered", "user"])
RECORDS = st.sampled_from([Plain, Typed, Sample, Frozen, Slotted])
NODES = st.recursive(
    LEAVES | st.tuples(st.just("constant"), CONSTANTS),
    lambda children: (
        st.tuples(SEQUENCES, st.lists(children, max_size=3))
        | st.tuples(MAPPINGS, st.dictionaries(st.sampled_from("abc"), children, max_size=3))
        | st.tuples(RECORDS, st.tuples(children, children))
    ),
    max_leaves=8,
)
MAKERS = {"tuple": tuple, "list": list, "rows": Rows, "dict": dict, "ordered": OrderedDict, "user": UserDict}


def build(node, rows, numbers):
    """The structure that a node describes, its tensors of `rows` rows filled with new numbers."""
    kind, *what = node
    if kind == "constant":
        return what[0]
    if kind in ("tensor", "strided", "array", "read-only"):
        trailing, dtype = what
        shape = (rows * (2 if kind == "strided" else 1), *trailing)
        first = next(numbers)
        array = (np.arange(math.prod(shape)) + first).reshape(shape)
        array = array % 2 == 0 if dtype == "bool" else array.astype(dtype)
        if kind == "array":
            return array
        return read_only(array) if kind == "read-only" else torch.tensor(array)[:: 2 if kind == "strided" else 1]
    if isinstance(what[0], dict):
        return MAKERS[kind]({key: build(child, rows, numbers) for key, child in what[0].items()})
    children = [build(child, rows, numbers) for child in what[0]]
    return kind(*children) if isinstance(kind, type) else MAKERS[kind](children)


@settings(max_examples=120, deadline=None, database=None, derandomize=True)
@given(
    positional=st.lists(NODES, max_size=3),
    keyword=st.dictionaries(st.sampled_from(["p", "q"]), NODES, max_size=2),
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    cores=st.integers(1, 3),
    batch_size=st.sampled_from([None, 1, 4, 8]),
    warm=st.booleans(),
)
def test_the_result_of_any_nested_input_is_the_plain_model_s(positional, keyword, rows, cores, batch_size, warm):
    numbers = iter(range(0, 10_000, 7))
    calls = []
    for count in (1, *rows):  # the first is the example
        args = tuple(build(node, count, numbers) for node in positional)
        calls.append((args, {name: build(node, count, numbers) for name, node in keyword.items()}))
    constants = repr(transformed(calls[0], lambda x: "tensor"))

    def net(*args, **kwargs):
        assert repr(transformed((args, dict(sorted(kwargs.items()))), lambda x: "tensor")) == sorted_constants
        return transformed((args, kwargs), bumped, lambda constant: None)

    sorted_constants = repr(transformed((calls[0][0], dict(sorted(calls[0][1].items()))), lambda x: "tensor"))
    settings = {"cores": cores, "batch_size": batch_size}
    if "tensor" not in constants:
        with pytest.raises(ShapeError, match="no tensor among its inputs"):
            answers(net, calls[0], **settings)
        return
    if warm:
        settings["example_inputs"] = calls[0][0] if not keyword else calls[0][1] if not positional else None
    results, _ = answers(net, *calls[1:], **settings)
    for (args, kwargs), result in zip(calls[1:], results, strict=True):
        assert_same(result[0], transformed(as_tensors(args), bumped, lambda constant: None))
        assert result[1].keys() == kwargs.keys()
        for name, value in kwargs.items():
            assert_same(result[1][name], transformed(as_tensors(value), bumped, lambda constant: None))


@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(
    node=NODES.filter(lambda node: "tensor" in repr(node)), rows=st.lists(st.integers(1, 20), min_size=1, max_size=6)
)
def test_so_it_is_on_real_threads(node, rows):
    calls = [build(node, count, iter(range(100))) for count in rows]

    async def main():
        async with AsyncDataParallel(bump, backend=CpuBackend(cores=2), batch_size=8) as model:
            return await asyncio.gather(*(model(call) for call in calls))

    for call, result in zip(calls, asyncio.run(main()), strict=True):
        assert_same(result, bump(as_tensors(call)))


# What tells one call from another.


def test_calls_that_differ_in_an_attribute_only_do_not_share_a_batch():
    class Scaled(dict):
        pass

    class Slotted(list):
        __slots__ = ("scale",)

    @dataclass
    class Record:
        x: torch.Tensor
        start: InitVar[float] = 1.0

        def __post_init__(self, start):
            self.scale = start  # no field

    def scaled(factor):
        made = Scaled(x=column(1, 1.0))
        made.scale = factor
        return made

    def slotted(factor):
        made = Slotted([column(1, 1.0)])
        made.scale = factor
        return made

    for make, tensor in (
        (scaled, lambda value: value["x"]),
        (slotted, lambda value: value[0]),
        (lambda factor: Record(column(1, 1.0), factor), lambda value: value.x),
    ):
        results, _ = answers(
            lambda value, tensor=tensor: tensor(value) * value.scale,
            ((make(2.0),), {}),
            ((make(3.0),), {}),
            batch_size=8,
        )
        assert [result[0, 0].item() for result in results] == [2.0, 3.0]


def test_named_tuples_of_different_classes_do_not_share_a_batch():
    Twice = namedtuple("Pair", ["x"])
    Thrice = namedtuple("Pair", ["x"])
    results, _ = answers(
        lambda pair: pair.x * (2 if type(pair) is Twice else 3),
        ((Twice(column(1, 1.0)),), {}),
        ((Thrice(column(1, 1.0)),), {}),
        batch_size=8,
    )
    assert [result[0, 0].item() for result in results] == [2.0, 3.0]


def test_attributes_nested_deeply_are_looked_through_once():
    class Deep(dict):
        pass

    value = Deep(x=column(1))
    for _ in range(40):  # doubling with each level, this would never end
        outer = Deep()
        outer.inner = value
        value = outer
    assert answer(lambda v: torch.zeros(1, 1), value).shape == (1, 1)


@pytest.mark.parametrize("rows", [1000, 4000])
def test_only_the_rows_of_a_chunk_are_copied_from_a_read_only_array(rows, monkeypatch):
    copied = []
    real = np.array
    monkeypatch.setattr(np, "array", lambda array, **how: copied.append(len(array)) or real(array, **how))
    array = np.ones((rows, 2), "f4")
    array.flags.writeable = False
    answered = answer(lambda x: x * 2, array, batch_size=8, outputs={"output": "rows"})
    assert torch.equal(answered, torch.full((rows, 2), 2.0))
    assert rows <= sum(copied) <= rows + 8  # the first batch is looked at once more
