"""Rows are copied natively and by torch: the same cases on both, with torch's own operations as the oracle."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
import time
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aneuron.sched.call import Call
from aneuron.tensors import copying

NATIVE = copying.native
WAYS = [pytest.param("torch"), pytest.param("native", marks=pytest.mark.skipif(NATIVE is None, reason="not built"))]
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(copying, "native", NATIVE if request.param == "native" else None)
    return request.param


def filled(shape, dtype=torch.float32, seed=0):
    """A tensor whose bytes are all different things, as far as its numbers allow."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 120, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def bits(tensor):
    """A tensor as bytes: NaN equals itself."""
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return tuple(plain.shape), plain.dtype, plain.reshape(-1).view(torch.uint8).tolist() if plain.numel() else []


def same(one, other):
    return bits(one) == bits(other)


def call(rows, version=0):
    made = Call(rows, None)
    made.version = version
    return made


def check_own(tensor, *others):
    """It is an ordinary tensor in memory of its own, no more than it needs."""
    assert type(tensor) is torch.Tensor
    assert not tensor.requires_grad
    assert tensor.is_leaf
    assert not tensor.is_inference()
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    storage = tensor.untyped_storage()
    assert storage.nbytes() == tensor.numel() * tensor.element_size()
    if tensor.numel():
        assert tensor.data_ptr() % 64 == 0
        assert storage.data_ptr() == tensor.data_ptr()
    for other in others:
        first = other.untyped_storage()
        assert (
            not tensor.numel()
            or not first.nbytes()
            or (
                tensor.data_ptr() + storage.nbytes() <= first.data_ptr()
                or first.data_ptr() + first.nbytes() <= tensor.data_ptr()
            )
        )


# How a tensor may lie in memory.
LAYOUTS = {
    "as made": lambda x: x,
    "within a larger one": lambda x: torch.cat([x, x, x])[len(x) : 2 * len(x)],
    "from an odd address": lambda x: torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].reshape(x.shape),
    "every other row": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "every other column": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
    "to be differentiated": lambda x: x.requires_grad_() if x.is_floating_point() and x.itemsize > 1 else x,
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
}


@st.composite
def columns(draw):
    """Chunks, the calls' tensors, and how many rows the batch is to have."""
    dtype = draw(st.sampled_from(DTYPES))
    row = draw(st.lists(st.integers(0, 3), max_size=3))
    chunks, inputs = [], []
    for seed in range(draw(st.integers(1, 5))):
        rows = draw(st.integers(1, 6))
        start = draw(st.integers(0, rows - 1))
        stop = draw(st.integers(start + 1, rows))
        layout = draw(st.sampled_from([name for name in LAYOUTS if (row and 0 not in row) or "odd" not in name]))
        chunks.append((call(rows), start, stop))
        inputs.append((None, LAYOUTS[layout](filled((rows, *row), dtype, seed))))
    return chunks, inputs, sum(stop - start for _, start, stop in chunks) + draw(st.integers(0, 3))


@pytest.mark.parametrize("native", WAYS)
@settings(deadline=None, max_examples=50)
@given(columns(), st.booleans())
def test_rows_are_joined_and_the_last_one_is_repeated(native, case, last_dim):
    chunks, inputs, size = case
    dim = -1 if last_dim else 0
    if last_dim:
        inputs = [(None, x.movedim(0, -1)) for _, x in inputs]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(copying, "native", NATIVE if native == "native" else None)
        whole = copying.join(chunks, inputs, 1, size, dim)
    pieces = [x.detach().movedim(dim, 0)[start:stop] for (_, x), (_, start, stop) in zip(inputs, chunks, strict=True)]
    expected = torch.stack([row for piece in pieces for row in piece])
    expected = torch.cat([expected, expected[-1:].repeat(size - len(expected), *[1] * (expected.ndim - 1))])
    assert same(whole, expected.movedim(0, dim))
    check_own(whole, *[x for _, x in inputs])


@pytest.mark.parametrize("native", WAYS)
@settings(deadline=None, max_examples=50)
@given(columns(), st.sampled_from([0, -1]))
def test_each_chunk_gets_rows_of_its_own_where_it_is_all_of_its_call(native, case, dim):
    chunks, inputs, size = case
    x = inputs[0][1].detach()
    dtype, row = x.dtype, x.shape[1:]
    leaf = filled((size, *row), dtype, 9).movedim(0, dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "native", NATIVE if native == "native" else None)
        copies = copying.split(leaf, chunks, size, dim)
    end = 0
    for (owner, at, stop), copied in zip(chunks, copies, strict=True):
        start, end = end, end + stop - at
        if stop - at != owner.rows:
            assert copied is None
            continue
        assert same(copied, leaf.narrow(dim, start, end - start))
        check_own(copied, leaf, *[other for other in copies if other is not None and other is not copied])


@pytest.mark.parametrize("native", WAYS)
@settings(deadline=None, max_examples=50)
@given(columns(), st.sampled_from([0, -1]), st.sampled_from(list(LAYOUTS)))
def test_rows_are_put_in_their_place_and_nowhere_else(native, case, dim, layout):
    chunks, inputs, _ = case
    x = inputs[0][1].detach()
    dtype, row = x.dtype, x.shape[1:]
    if "odd" in layout and (not row or 0 in row):
        layout = "as made"
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(copying, "native", NATIVE if native == "native" else None)
        like = filled((1, *row), dtype).movedim(0, dim)
        whole = copying.room(like, 9, dim)
        check_own(whole, like)
        assert whole.shape[dim] == 9
        assert copying.kind(whole, dim) == copying.kind(like, dim)
        whole.copy_(before := filled((9, *row), dtype, 7).movedim(0, dim))
        expected = before.clone()
        for place, (owner, start, stop) in enumerate(chunks):
            leaf = LAYOUTS[layout](filled((owner.rows, *row), dtype, place)).detach().movedim(0, dim)
            at = min(place, 9 - (stop - start))
            assert copying.place(whole, at, leaf, start, stop, dim)
            expected.narrow(dim, at, stop - start).copy_(leaf.narrow(dim, start, stop - start))
            assert same(whole, expected)


def test_rows_of_another_kind_are_not_put_anywhere(way):
    whole = torch.zeros(4, 6)
    for other in (
        torch.ones(4, 3), torch.ones(4, 6, 1), torch.ones(4, 2, 3), torch.ones(4), torch.ones(4, 6).double(),
        torch.ones(4, 6).int(), torch.ones(4, 6).half(), torch.ones(4, 6).bool(),
    ):  # fmt: skip
        assert not copying.place(whole, 0, other, 0, 2, 0)
    assert not whole.any()


@st.composite
def lengths(draw):
    """Rows of several lengths along a dimension, and what they are padded to."""
    dtype = draw(st.sampled_from(DTYPES))
    row = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    at = draw(st.integers(1, len(row)))
    chunks, inputs = [], []
    for seed in range(draw(st.integers(1, 4))):
        rows = draw(st.integers(1, 3))
        length = draw(st.integers(1, 6))
        start = draw(st.integers(0, rows - 1))
        call = Call(rows, None, bucket=6)
        call.pads = SimpleNamespace(length=length, left=False)
        chunks.append((call, start, rows))
        inputs.append((filled((rows, *row[: at - 1], length, *row[at:]), dtype, seed),))
    size = sum(stop - start for _, start, stop in chunks) + draw(st.integers(0, 2))
    pad = draw(st.sampled_from([0, 1] + [-1.5, float("-inf")] * dtype.is_floating_point))
    return chunks, inputs, size, at, 0 if dtype in FLOAT8 else pad


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("native", WAYS)
@settings(deadline=None, max_examples=50)
@given(lengths(), st.booleans(), st.integers(4, 7))
def test_rows_are_padded_to_a_length_and_cut_back_to_it(native, case, from_behind, bucket):
    chunks, inputs, size, at, pad = case
    dim = at - inputs[0][0].ndim if from_behind else at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "native", NATIVE if native == "native" else None)
        to = copying.Length(dim, bucket, pad)
        try:
            whole = copying.join(chunks, inputs, 0, size, 0, to)
        except NotImplementedError:  # torch's own padding, of some dtypes
            return
        fit = all(owner.pads.length <= bucket for owner, _, _ in chunks)
        copies = copying.split(whole, chunks, size, 0, (at,)) if fit else [None] * len(chunks)
    assert whole.shape[at] == bucket
    assert len(whole) == size
    check_own(whole, *[x for (x,) in inputs])
    end = 0
    for (owner, start, stop), (x,), copied in zip(chunks, inputs, copies, strict=True):
        begin, end = end, end + stop - start
        had = min(owner.pads.length, bucket)
        part = whole[begin:end]
        assert same(part.narrow(at, 0, had), x[start:stop].narrow(at, 0, had))
        if had < bucket:
            rest = part.narrow(at, had, bucket - had)
            assert same(rest, torch.full(rest.shape, pad, dtype=rest.dtype))
        assert (copied is None) == (not fit or stop - start != owner.rows)
        if copied is not None:
            assert same(copied, x)
            check_own(copied, whole, x)
    for row in range(end, size):
        assert same(whole[row], whole[end - 1])


# What is not plain has its numbers elsewhere than where they seem to lie, or means something else by them.


def negative(x):
    """The same numbers, which lie in memory with the other sign."""
    view = torch._neg_view(-x)
    assert view.is_neg()
    return view


def one_negative(x):
    """The same, as it comes about: each of them is contiguous."""
    z = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert z.is_neg()
    return z


def in_inference_mode(x):
    with torch.inference_mode():
        return x.clone()


class Special(torch.Tensor):
    pass


STRANGE = {
    "negative": lambda x: negative(x),
    "one negative number": lambda x: one_negative(x[:, :1]),
    "conjugate": lambda x: torch.complex(x, x).conj(),
    "with a history": lambda x: x.clone().requires_grad_() * 2,
    "made in inference mode": in_inference_mode,
    "of a subclass": lambda x: x.as_subclass(Special),
    "nothing but zeros": lambda x: torch._efficientzerotensor(x.shape),
    "half complex": lambda x: torch.complex(x, x).to(torch.complex32),
    "copied when written": lambda x: torch._lazy_clone(x),
    "channels last": lambda x: x[:, :, None, None].expand(-1, -1, 2, 2).contiguous(memory_format=torch.channels_last),
    "of many dimensions": lambda x: x.reshape(len(x), *[1] * 20, -1),
    "large": lambda x: x.repeat(1, 5000),
}


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_not_plain_is_copied_like_all_else(way, kind, rows):
    with torch.no_grad():
        x = STRANGE[kind](filled((rows, 16)).abs() + 1.0)
        plain = x.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().clone()
        whole = copying.join([(call(rows), 0, rows)] * 2, [(x,), (x,)], 0, 2 * rows + 1, 0)
        expected = torch.cat([plain, plain, plain[-1:]])
        assert same(whole, expected)
        if kind != "nothing but zeros":  # which has no memory
            assert whole.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        if kind == "of a subclass":  # of an output it is seen before
            return
        (copied,) = copying.split(x, [(call(rows), 0, rows)], rows, 0)
        assert same(copied, plain)
        target = plain * 0
        assert copying.place(target, 0, x, 0, rows, 0)
        assert same(target, plain)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_rows_keep_their_grid(way):
    x = torch._make_per_tensor_quantized_tensor(filled((4, 3), torch.int8), 0.5, 2)
    whole = copying.join([(call(4), 1, 3)], [(x,)], 0, 3, 0)
    assert whole.q_scale() == 0.5
    assert torch.equal(whole.int_repr(), x.int_repr()[[1, 2, 2]])
    target = copying.room(x, 4, 0)
    assert copying.place(target, 0, x, 0, 4, 0)
    assert torch.equal(target.int_repr(), x.int_repr())
    (copied,) = copying.split(x, [(call(4), 0, 4)], 4, 0)
    assert torch.equal(copied.int_repr(), x.int_repr())


def test_arrays_are_joined_with_tensors(way):
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    whole = copying.join([(call(4), 1, 3), (call(1), 0, 1)], [(array,), (torch.ones(1, 3),)], 0, 4, 0)
    assert torch.equal(whole, torch.cat([torch.from_numpy(array)[1:3], torch.ones(2, 3)]))


def test_what_has_another_shape_by_now_is_not_read_beyond_its_end(way):
    """Its version tells afterwards that it was modified; its memory must not be read as if it were not."""
    x = torch.ones(4, 3)
    for other in (torch.ones(2, 3), torch.ones(4, 2), torch.ones(4, 3).double(), torch.ones(()), torch.ones(0, 3)):
        x = torch.ones(4, 3)
        x.data = other.to(x.dtype) if other.dtype is x.dtype else other
        chunks = [(call(1), 0, 1), (call(4), 0, 4)]
        try:
            whole = copying.join(chunks, [(torch.zeros(1, 3),), (x,)], 0, 8, 0)
        except (RuntimeError, IndexError):
            continue
        # What torch makes of two kinds; or what no model's output will have as many rows as.
        assert whole.dtype is torch.float64 or len(whole) != 8


def test_writing_is_noticed(way):
    x, y = torch.ones(1, 3), torch.ones(1, 3)
    y.add_(1)
    chunks = [(call(1, 0), 0, 1), (call(1, 1), 0, 1)]
    assert copying.unmodified(chunks, [(x,), (y,)])
    x.add_(1)
    assert not copying.unmodified(chunks, [(x,), (y,)])
    for unknown in (np.ones((1, 3)), in_inference_mode(x)):
        assert not copying.unmodified(chunks[:1], [(unknown,)])


# What is made here is a tensor like any other.


def makers():
    x = filled((4, 3))
    yield "joined", copying.join([(call(4), 0, 4)], [(x,)], 0, 4, 0)
    yield "split", copying.split(x, [(call(4), 0, 4)], 4, 0)[0]
    room = copying.room(x, 4, 0)
    assert copying.place(room, 0, x, 0, 4, 0)
    yield "room", room


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    assert len(file.getvalue()) < 3000
    file.seek(0)
    return torch.load(file)


def in_place(x):
    x.mul_(2)
    x /= 2
    return x


USES = {
    "pickled": lambda x: pickle.loads(pickle.dumps(x)),
    "saved": saved,
    "deep copy": copy.deepcopy,
    "as an array": lambda x: torch.from_numpy(x.numpy()),
    "handed on by DLPack": torch.from_dlpack,
    "written to": in_place,
    "shared": lambda x: x.share_memory_(),
    "reshaped": lambda x: x.t().reshape(-1).view(3, 4).t().contiguous(),
    "resized in its place": lambda x: x.resize_(6, 2).resize_(4, 3),
    "of another storage": lambda x: x.clone().set_(x),
    "written with out=": lambda x: torch.add(x, 0, out=x),
}


@pytest.mark.parametrize("use", USES)
def test_it_can_be_used_like_any_other(way, use):
    for name, made in makers():
        expected = filled((4, 3))
        found = USES[use](made)
        assert torch.equal(found, expected), name


def test_it_can_be_sent_to_another_process(way):
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")  # no thread that serves descriptors
    try:
        for name, made in makers():
            received = pickle.loads(ForkingPickler.dumps(made))
            assert made.is_shared()
            received += 1
            assert torch.equal(made, filled((4, 3)) + 1), name
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


@pytest.mark.skipif(NATIVE is None, reason="not built")
def test_it_does_not_grow_in_place_as_tensors_over_arrays_do_not():
    """All that tells it from what torch has made; its clones grow."""
    for made in (NATIVE.room(filled((4, 3)), 4), torch.from_numpy(np.ones((4, 3)))):
        with pytest.raises(RuntimeError, match="not resizable"):
            made.resize_(100, 3)
        assert made.clone().resize_(100, 3).shape == (100, 3)


def test_it_takes_part_in_gradients(way):
    for _, made in makers():
        assert not made.requires_grad
        weight = torch.ones(3, requires_grad=True)
        (made * weight).sum().backward()
        assert torch.equal(weight.grad, made.sum(0))
        made.requires_grad_()
        (made * 2).sum().backward()
        assert torch.equal(made.grad, torch.full((4, 3), 2.0))


def test_writing_to_it_is_counted(way):
    for _, made in makers():
        before = made._version
        made.add_(1)
        assert made._version == before + 1


def test_memory_does_not_grow(way):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    if not sys.platform.startswith("linux"):
        pytest.skip("no /proc")
    x, chunks = filled((8, 16)), [(call(1), 0, 1)] * 8
    inputs = [(x[:1],)] * 8

    def go(batches):
        for _ in range(batches):
            copying.split(x, chunks, 8, 0)
            copying.join(chunks, inputs, 0, 16, 0)
            room = copying.room(x, 64, 0)
            copying.place(room, 8, x, 0, 8, 0)

    go(1000)
    before = resident()
    go(20_000)  # 160,000 rows; each that was forgotten would leave 64 bytes and more
    assert resident() - before < 5e6


def test_it_may_be_freed_in_any_thread(way):
    made = [each for _ in range(100) for _, each in makers()]
    thread = threading.Thread(target=made.clear)
    thread.start()
    thread.join()
    gc.collect()
    assert not made


@pytest.mark.parametrize("pure", ["", "1"])
def test_it_may_be_alive_when_the_interpreter_ends(pure):
    code = """
import threading, torch
from aneuron.sched.call import Call
from aneuron.sched.call import Call
from aneuron.tensors import copying
kept = [copying.split(torch.ones(8, 4), [(Call(1, None), 0, 1)] * 8, 8, 0) for _ in range(100)]
torch.kept = kept
threading.kept = copying.join([(Call(1, None), 0, 1)], [(torch.ones(1, 4),)], 0, 1, 0)
print(copying.native is None)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ANEURON_PURE": pure}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "True" or not pure


@pytest.mark.skipif(NATIVE is None, reason="not built")
@pytest.mark.skipif(not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="there is no lock to give up")
def test_small_rows_are_copied_without_giving_the_interpreter_up():
    x, chunks = filled((8, 16)), [(call(1), 0, 1)] * 8
    inputs = [(x[:1],)] * 8
    room = NATIVE.room(x, 64)
    turns, over = [0], threading.Event()

    def other():
        while not over.is_set():
            turns[0] += 1
            time.sleep(0)  # gives it up, for whoever wants it

    interval = sys.getswitchinterval()
    sys.setswitchinterval(600)  # nobody takes it who is not given it
    thread = threading.Thread(target=other)
    try:
        thread.start()
        kept = []  # to free a tensor gives it up, in torch itself
        before = turns[0]
        for _ in range(1000):
            kept.append(NATIVE.join(chunks, inputs, 0, 16))
            kept.append(NATIVE.split(x, chunks, 8))
            kept.append(NATIVE.place(room, 8, x, 0, 8))
            kept.append(NATIVE.room(x, 8))
            kept.append(NATIVE.unmodified(chunks, inputs))
        after = turns[0]
    finally:
        sys.setswitchinterval(interval)
        over.set()
        thread.join()
    assert None not in kept[::5]
    assert after == before
