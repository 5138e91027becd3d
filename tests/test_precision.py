"""Computing in another dtype than the model's own: what is cast, what comes back, how far it is from full precision."""

import asyncio
import logging
import math
import pickle
import threading
import warnings

import pytest
import torch
from fake_cuda import FakeCuda
from test_own_modules import MODULES, NAMES, ran_elsewhere
from torch import nn

import aneuron
from aneuron import AsyncDataParallel, Buckets, CpuBackend, CudaBackend, Fault, OutputError
from aneuron.backends import cpu, precision
from aneuron.backends.copies import own
from aneuron.backends.precision import Precision, is_native, precision_of
from aneuron.backends.traits import traits_of
from aneuron.engine import comparing
from aneuron.tensors.likeness import likeness
from aneuron.testing import check_backend

HALF = torch.bfloat16, torch.float16
X = torch.linspace(-1, 1, 24).reshape(3, 8)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()


class Embedder(nn.Module):
    """A small transformer: ids and a mask to a unit vector a row."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(100, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids, mask):
        vectors = self.encoder(self.words(ids), src_key_padding_mask=mask == 0)
        weights = mask.unsqueeze(-1).to(vectors.dtype)
        return nn.functional.normalize((vectors * weights).sum(1) / weights.sum(1), dim=1)


def embedder():
    torch.manual_seed(1)
    return Embedder().eval()


class MakesFloat32(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return self.layer(x * torch.ones(8))


class LacksKernel(nn.Module):
    def forward(self, x):
        return torch.linalg.inv(x[:, :4, None] * torch.eye(4, dtype=x.dtype) + 3 * torch.eye(4, dtype=x.dtype))


class Overflows(nn.Module):
    def forward(self, x):
        return (x + 1) * 1e6


async def ask(model, *calls, **settings):
    async with AsyncDataParallel(model, **settings) as served:
        return await asyncio.gather(*(served(*call) if isinstance(call, tuple) else served(call) for call in calls))


# The judgement.

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("full", "other", "cosine", "deviation", "share"),
    [
        ([3.0, 4.0], [3.0, 4.0], 1.0, 0.0, 0.0),
        ([3.0, 4.0], [4.0, 3.0], 24 / 25, 1.0, 0.25),
        ([0.0, 2.0], [0.0, -2.0], -1.0, 4.0, 2.0),
        ([0.0, 0.0], [0.0, 0.0], 1.0, 0.0, 0.0),
        ([0.0, 0.0], [0.0, 1.0], 0.0, 1.0, INF),
        ([-INF, 1.0], [-INF, 1.0], 1.0, 0.0, 0.0),
        ([NAN, 1.0], [NAN, 1.5], 1.0, 0.5, 0.5),
        ([1e5, 1.0], [INF, 1.0], NAN, INF, INF),
        ([1.0, 1.0], [NAN, 1.0], NAN, INF, INF),
    ],
)
def test_likeness(full, other, cosine, deviation, share):
    for dtype in (torch.float32, torch.complex64):
        found = likeness(torch.tensor(full, dtype=dtype), torch.tensor(other, dtype=dtype))
        assert found[2:4] == pytest.approx((deviation, share))
        assert found.cosine == pytest.approx(cosine, nan_ok=True)


def test_of_several_outputs_the_worst_of_each_kind_is_told():
    full = {"a": torch.ones(2), "b": torch.tensor([0.0, 3.0]), "ids": torch.tensor([1, 2, 3]), "name": "x"}
    other = full | {"a": torch.tensor([1.0, 1.5]), "b": torch.tensor([1.0, 3.0]), "ids": torch.tensor([1, 2, 4])}
    found = likeness(full, other)
    assert (found.where, found.deviation, found.share) == ("output['b']", 1.0, 0.5)
    assert (found.differ, found.entries) == (1, 3)
    for worst in ({"a": torch.full((2,), INF)}, {"b": torch.full((2,), NAN)}):
        assert math.isnan(likeness(full, other | worst).cosine)
    assert likeness([torch.tensor([True])], [torch.tensor([True])]).cosine is None
    with pytest.raises(ValueError, match=r"shapes \[\(3,\)\], and \[\(2,\)\] in full"):
        likeness(torch.ones(2), torch.ones(3))


# Arguments.


@pytest.mark.parametrize("backend", [CpuBackend, CudaBackend])
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"dtype": torch.int8}, "dtype=torch.int8: expected one of torch.bfloat16, torch.float16, torch.float32"),
        ({"dtype": torch.float8_e4m3fn}, "dtype=torch.float8_e4m3fn: expected"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16': expected one of torch.bfloat16"),
        ({"dtype": torch.bfloat16, "min_cosine": 1.5}, "min_cosine=1.5: expected a number up to 1"),
        ({"dtype": torch.bfloat16, "min_cosine": NAN}, "min_cosine=nan: expected"),
        ({"dtype": torch.bfloat16, "outputs": "float32"}, "outputs='float32': expected 'as called' or 'as computed'"),
        ({"min_cosine": 0.9}, "are about dtype="),
        ({"outputs": "as computed"}, "are about dtype="),
    ],
)
def test_wrong_arguments_say_what_is_expected(backend, wrong, text):
    with pytest.raises(ValueError, match=text.replace(".", r"\.")):
        backend(**wrong)


@pytest.mark.parametrize("kind", [CpuBackend, CudaBackend])
def test_a_backend_shows_and_pickles_what_it_computes_in(kind):
    backend = kind(2, dtype=torch.bfloat16, outputs="as computed", min_cosine=0.99)
    assert repr(backend).endswith(", dtype=torch.bfloat16, outputs='as computed', min_cosine=0.99)")
    for again in (backend, pickle.loads(pickle.dumps(backend))):
        assert traits_of(again).computes_in == backend.computes_in
    assert "dtype" not in repr(kind(2))
    assert traits_of(kind(2)).computes_in is None


def test_a_backend_of_ones_own_says_it_by_the_type():
    backend = CpuBackend(1)
    backend.computes_in = torch.bfloat16
    with pytest.raises(ValueError, match=r"cpu backend has computes_in=torch.bfloat16: expected an aneuron\.backends"):
        traits_of(backend)


@pytest.mark.parametrize(
    ("has", "bfloat16", "float16"),
    [(("amx_bf16", "amx_tile"), True, False), (("avx512_fp16",), False, True), (("avx512_f", "avx2"), False, False),
     (("bf16", "fp16_arith"), True, True)],
)  # fmt: skip
def test_what_a_cpu_computes_natively(monkeypatch, has, bfloat16, float16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True), raising=False)
    assert (is_native(torch.bfloat16), is_native(torch.float16), is_native(torch.float64)) == (bfloat16, float16, True)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert (is_native(torch.bfloat16), is_native(torch.float32)) == (None, True)


# Weights.


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, of copying an exported program's module
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_cast_once_for_all_cores_and_the_one_given_stays(name, request):
    if ran_elsewhere(request):
        return
    make, x = MODULES[name]
    given = make() if name == "exported" else make().eval()
    before = {key: (value.data_ptr(), value.dtype) for key, value in given.state_dict().items()}
    with torch.inference_mode():
        expected = given(x)
    for dtype in HALF:
        copies = [own(given, dtype) for _ in range(3)]
        pointers = [{parameter.data_ptr() for parameter in each.parameters()} for each in copies]
        assert pointers[0] == pointers[1] == pointers[2]
        assert {
            each.dtype for each in (*copies[0].parameters(), *copies[0].buffers()) if each.dtype.is_floating_point
        } == {dtype}
        with torch.inference_mode():
            found = precision_of(dtype, "as called", None).call(copies[2], torch.float32, (x,), {})
        assert likeness(expected, found).cosine > 0.999
        assert likeness(expected, found).deviation < 0.1
    assert before == {key: (value.data_ptr(), value.dtype) for key, value in given.state_dict().items()}


def test_weights_that_were_written_to_since_are_cast_anew_also_by_a_write_to_data():
    given = net()
    one = own(given, torch.bfloat16)
    given[0].weight.data.fill_(7.0)
    two = own(given, torch.bfloat16)
    assert bool((two[0].weight == 7).all())
    assert not bool((one[0].weight == 7).any())
    assert two[0].weight is own(given, torch.bfloat16)[0].weight
    assert two[2].weight is one[2].weight


def test_integers_complex_numbers_and_what_is_in_the_dtype_already_stay():
    given = nn.Module()
    given.lower = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    given.waves = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    given.register_buffer("ids", torch.arange(3))
    made = own(given, torch.bfloat16)
    assert made.lower is given.lower
    assert (made.waves.dtype, made.ids.dtype) == (torch.complex64, torch.int64)


class Locked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.lock = nn.Linear(8, 4), threading.Lock()

    def forward(self, x):
        return self.layer(x)


async def test_what_cannot_be_copied_is_not_cast():
    with pytest.raises(
        ValueError, match=r"Locked cannot be copied \(TypeError.*\), and so not be cast to torch.bfloat16"
    ):
        await ask(Locked().eval(), X, backend=CpuBackend(2, dtype=torch.bfloat16))


# What comes back.


@pytest.mark.parametrize(
    ("inputs", "as_called", "as_computed"),
    [
        ((X,), torch.float32, torch.bfloat16),
        ((X.double(),), torch.float64, torch.bfloat16),
        ((X.bfloat16(),), torch.bfloat16, torch.bfloat16),
        ((X.half(), X), torch.float32, torch.bfloat16),
        ((torch.ones(3, 8, dtype=torch.long),), torch.float32, torch.bfloat16),
    ],
    ids=["float32", "float64", "bfloat16", "both", "ids"],
)
async def test_results_are_in_the_callers_type_or_as_they_are_computed(inputs, as_called, as_computed):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x, y=None):
            z = self.layer(x.to(self.layer.weight.dtype))
            assert x.dtype in (torch.long, torch.bfloat16)
            return {"z": z, "best": z.argmax(1), "sure": z.double()}

    for outputs, dtype in (("as called", as_called), ("as computed", as_computed)):
        backend = CpuBackend(2, dtype=torch.bfloat16, outputs=outputs)
        [found] = await ask(Both().eval(), inputs, backend=backend)
        assert [found[name].dtype for name in ("z", "best", "sure")] == [dtype, torch.int64, torch.float64]


async def test_a_plain_function_is_given_what_was_cast():
    seen = set()

    def double(x, *, scale):
        seen.add((x.dtype, scale.dtype))
        return x * scale

    async with AsyncDataParallel(double, backend=CpuBackend(1, dtype=torch.float16)) as served:
        assert torch.equal(await served(torch.ones(2, 1), scale=torch.full((2, 1), 2.0)), torch.full((2, 1), 2.0))
    assert seen == {(torch.float16, torch.float16)}


async def test_what_cannot_be_opened_is_an_output_error_as_ever():
    with pytest.raises(OutputError, match="the model returned"):
        await ask(lambda x: {1: x}.values(), X, backend=CpuBackend(1, dtype=torch.bfloat16))


def test_the_contract_holds_in_half_precision():
    check_backend(CpuBackend(2, dtype=torch.bfloat16))


# Comparing.


def said(caplog, level=logging.INFO):
    return [record.message for record in caplog.records if record.levelno >= level]


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, "aneuron")
    return caplog


@pytest.mark.parametrize("dtype", HALF)
async def test_the_log_says_how_far_it_is_from_full_precision_once(logged, dtype):
    name = str(dtype)[6:]
    await ask(net(), X, backend=CpuBackend(3, dtype=dtype, min_cosine=0.99), example_inputs=X)
    lines = [line for line in said(logged) if line.startswith(f"{name} beside full precision, on example_inputs")]
    assert len(lines) == 1
    assert "cosine 0.99" in lines[0] or "cosine 1.00" in lines[0]
    assert "largest deviation 0.00" in lines[0]


async def test_each_of_several_models_is_compared_and_a_length_more_is_not(logged):
    models = {1: net(), 4: net()}
    backend = CpuBackend(2, dtype=torch.bfloat16)
    await ask(models, X, backend=backend, example_inputs=X)
    assert len([line for line in said(logged) if "beside full precision" in line]) == 2
    logged.clear()
    ids = torch.ones(2, 8, dtype=torch.long)
    await ask(
        embedder(), (ids, ids), backend=backend, example_inputs=(ids, ids), buckets=Buckets(dim=1, sizes=(8, 16), pad=0)
    )
    assert len([line for line in said(logged) if "beside full precision" in line]) == 1


async def test_results_below_min_cosine_end_the_start():
    flips = net()
    flips.register_forward_hook(_negated_in_half)
    with pytest.raises(
        ValueError, match=r"cosine -0\.99\d+ \(output\).*below min_cosine=0.9\. Try another dtype"
    ) as caught:
        await ask(flips, X, backend=CpuBackend(2, dtype=torch.bfloat16, min_cosine=0.9), example_inputs=X)
    assert any("while loading core 0 of the cpu backend" in note for note in caught.value.__notes__)
    await ask(flips, X, backend=CpuBackend(2, dtype=torch.bfloat16), example_inputs=X)


def _negated_in_half(module, args, output):
    return -output if output.dtype is torch.bfloat16 else output


async def test_what_overflows_is_told_and_never_like_enough(logged):
    with pytest.raises(
        ValueError, match="output has infinities or NaN where full precision has none; its range ends at"
    ):
        await ask(Overflows().eval(), X, backend=CpuBackend(1, dtype=torch.float16, min_cosine=-1), example_inputs=X)
    await ask(Overflows().eval(), X, backend=CpuBackend(1, dtype=torch.float16), example_inputs=X)
    assert any("has infinities or NaN" in line for line in said(logged, logging.WARNING))


async def test_without_a_floating_output_the_entries_that_differ_are_told(logged):
    class Best(nn.Module):
        def forward(self, x):
            return x.argmax(1)

    with pytest.raises(ValueError, match=r"min_cosine=0.9: the model returns no floating tensor"):
        await ask(Best().eval(), X, backend=CpuBackend(1, dtype=torch.bfloat16, min_cosine=0.9), example_inputs=X)
    await ask(Best().eval(), X, backend=CpuBackend(1, dtype=torch.bfloat16), example_inputs=X)
    assert any("0 of 3 entries differ" in line for line in said(logged))


async def test_without_an_example_nothing_can_be_compared(logged):
    with pytest.raises(ValueError, match=r"min_cosine=0.9 compares .* example_inputs, and there are none; pass some"):
        await ask(net(), X, backend=CpuBackend(1, dtype=torch.bfloat16, min_cosine=0.9))
    logged.clear()
    await ask(net(), X, backend=CpuBackend(1, dtype=torch.bfloat16))
    assert any("there are no example_inputs to compare" in line for line in said(logged, logging.WARNING))


@pytest.mark.parametrize(
    ("native", "times", "warned"),
    [
        (False, (0.003, 0.009), "no instructions for it"),
        (False, (0.009, 0.003), "no instructions for it"),
        (True, (0.009, 0.003), "it saves no time"),
        (None, (0.009, 0.003), "it saves no time"),
        (True, (0.003, 0.009), None),
        (None, (0.003, 0.009), None),
    ],
)
def test_a_cpu_that_gains_nothing_by_it_is_told_with_the_measured_times(logged, native, times, warned):
    half, full = times
    asked = Precision(torch.bfloat16, native=native)
    outcomes = (lambda: (torch.ones(1), half)), (lambda: (torch.ones(1), full))
    comparing.compare(asked, *outcomes, CpuBackend(1).classify)
    warnings_ = said(logged, logging.WARNING)
    assert len(warnings_) == (warned is not None)
    if warned:
        assert warned in warnings_[0]
        assert ("Leave dtype= out" in warnings_[0]) == (half >= full)
        assert f"bfloat16 takes {1e3 * half:.3g} ms for example_inputs, full precision {1e3 * full:.3g}" in warnings_[0]


@pytest.mark.parametrize("way", ["half", "full"])
@pytest.mark.parametrize("min_cosine", [None, 0.9])
def test_what_the_core_is_to_blame_for_is_not_blamed_on_the_dtype(way, min_cosine):
    class Fails(Exception):
        pass

    def fails():
        raise Fails

    outcomes = {name: fails if name == way else lambda: (torch.ones(1), 0.1) for name in ("half", "full")}
    with pytest.raises(Fails):
        comparing.compare(
            Precision(torch.float16, min_cosine=min_cosine),
            outcomes["half"],
            outcomes["full"],
            lambda error: Fault.CORE,
        )


async def test_this_cpu_is_asked(logged, monkeypatch):
    monkeypatch.setattr(cpu, "is_native", lambda dtype: False)
    await ask(net(), X, backend=CpuBackend(1, dtype=torch.bfloat16))
    assert "this CPU has no instructions for it" in said(logged, logging.WARNING)[0]


async def test_what_cannot_be_compared_is_told_or_refused(logged):
    half = net().to(torch.bfloat16)  # which does not take float32
    await ask(half, X, backend=CpuBackend(1, dtype=torch.bfloat16), example_inputs=X)
    assert any("cannot be compared with full precision (RuntimeError" in line for line in said(logged, logging.WARNING))
    with pytest.raises(ValueError, match=r"cannot be compared .*min_cosine=0.9 asks for it"):
        await ask(half, X, backend=CpuBackend(1, dtype=torch.bfloat16, min_cosine=0.9), example_inputs=X)


async def test_the_context_is_around_both(logged):
    inside = []

    class Seen(nn.Module):
        def forward(self, x):
            inside.append(torch.is_autocast_enabled("cpu"))
            return x

    def context():
        return torch.autocast("cpu", torch.bfloat16)

    await ask(Seen().eval(), X, backend=CpuBackend(1, dtype=torch.bfloat16), example_inputs=X, context=context)
    assert all(inside)
    assert any("beside full precision" in line for line in said(logged))


# What a model cannot run.


@pytest.mark.parametrize(
    ("make", "dtype"), [(MakesFloat32, torch.bfloat16), (MakesFloat32, torch.float16), (LacksKernel, torch.bfloat16)]
)
async def test_a_dtype_that_the_model_cannot_run_ends_the_start(make, dtype):
    name = str(dtype)[6:]
    with pytest.raises(
        ValueError, match=f"the model cannot run in {name}.*its own dtype.*dtype=x.dtype.*autocast"
    ) as caught:
        await ask(make().eval(), X, backend=CpuBackend(2, dtype=dtype), example_inputs=X)
    assert isinstance(caught.value.__cause__, (RuntimeError, NotImplementedError))


async def test_what_cannot_run_at_all_says_so_as_ever():
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        await ask(net(), X, backend=CpuBackend(2, dtype=torch.bfloat16), example_inputs=torch.ones(3, 5))
    assert "own dtype" not in str(caught.value)


async def test_without_an_example_the_call_gets_the_models_error_and_the_cores_go_on():
    async with AsyncDataParallel(MakesFloat32().eval(), backend=CpuBackend(2, dtype=torch.bfloat16)) as served:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="dtype") as caught:
                await served(X)
        assert any("computed in bfloat16, as dtype= of the backend says" in note for note in caught.value.__notes__)
        assert {core.state for core in served.statistics().cores} == {"ready"}


# Swapping.


async def test_a_swap_compares_anew_and_what_is_too_far_leaves_the_old_one():
    backend = CpuBackend(2, dtype=torch.bfloat16, min_cosine=0.9)
    first, second = net(), net()
    with torch.no_grad():
        second[2].bias.add_(1.0)
    flips = net()
    flips.register_forward_hook(_negated_in_half)
    async with AsyncDataParallel(first, backend=backend, example_inputs=X) as served:
        for wrong, text in (
            (flips, "below min_cosine"),
            (nn.Sequential(MakesFloat32()).eval(), "cannot run in bfloat16"),
        ):
            with pytest.raises(ValueError, match=text):
                await served.swap(wrong)
        torch.testing.assert_close(await served(X), first(X).detach(), rtol=0.05, atol=0.02)
        await served.swap(second)
        torch.testing.assert_close(await served(X), second(X).detach(), rtol=0.05, atol=0.02)
        with torch.no_grad():
            second[2].bias.add_(1.0)  # of the one given: what serves is a cast copy
        torch.testing.assert_close(await served(X), second(X).detach() - 1, rtol=0.05, atol=0.02)
        await served.swap(second)
        torch.testing.assert_close(await served(X), second(X).detach(), rtol=0.05, atol=0.02)


# Files.


async def test_a_file_is_cast_too(tmp_path, logged):
    path = tmp_path / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net(), X).save(path)
    [found] = await ask(path, X, backend=CpuBackend(2, dtype=torch.bfloat16, min_cosine=0.99), example_inputs=X)
    torch.testing.assert_close(found, net()(X).detach(), rtol=0.05, atol=0.02)
    assert not torch.equal(found, net()(X))
    assert any("beside full precision" in line for line in said(logged))


async def test_a_graph_that_makes_float32_is_told_apart(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(MakesFloat32().eval(), X).save(tmp_path / "net.pt")
    with pytest.raises(ValueError, match="the model cannot run in bfloat16"):
        await ask(tmp_path / "net.pt", X, backend=CpuBackend(2, dtype=torch.bfloat16), example_inputs=X)


# A transformer, and what a caller may rely on.


def texts(count, longest=24):
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(3, longest, (count,), generator=generator).tolist()
    return [(torch.randint(1, 100, (1, n), generator=generator), torch.ones(1, n, dtype=torch.long)) for n in lengths]


async def test_a_transformer_in_half_precision_serves_texts_of_any_length(logged):
    given, calls = embedder(), texts(20)
    settings = {"example_inputs": calls[0], "buckets": Buckets(dim=1, sizes=(8, 16, 24), pad=0), "batch_size": 4}
    found = await ask(given, *calls, backend=CpuBackend(2, dtype=torch.bfloat16, min_cosine=0.99), **settings)
    with torch.inference_mode():
        expected = torch.cat([given(*call) for call in calls])
    assert {each.dtype for each in found} == {torch.float32}
    assert float(nn.functional.cosine_similarity(torch.cat(found), expected).min()) > 0.99
    assert not any("influence" in line for line in said(logged)), "rounding is no influence"


class Noisy(nn.Module):
    """Rounds as bfloat16 may, by the place in the batch."""

    def forward(self, x):
        return x * (1 + torch.arange(len(x), dtype=x.dtype)[:, None] / 128)


@pytest.mark.parametrize("batch_size", [4, None])
async def test_rounding_of_the_dtype_is_not_taken_for_rows_that_influence_one_another(logged, batch_size):
    settings = {"example_inputs": X + 2, "batch_size": batch_size}
    await ask(Noisy().eval(), X, X, backend=CpuBackend(1, dtype=torch.bfloat16), **settings)
    assert not any("influence" in line for line in said(logged))


async def test_a_row_has_the_same_bits_in_any_company_in_float32_at_one_length_and_is_alike_in_bfloat16():
    given, calls = embedder(), texts(16)
    mine, others = calls[0], calls[1:]
    buckets = Buckets(dim=1, sizes=(24,), pad=0)
    for dtype, tolerance in ((None, 0.0), (torch.bfloat16, 0.05)):
        async with AsyncDataParallel(
            given, backend=CpuBackend(1, 1, dtype=dtype), batch_size=8, buckets=buckets
        ) as served:
            alone = await served(*mine)
            for company in (others[:3], others[3:10], others):
                found, *_ = await asyncio.gather(served(*mine), *(served(*each) for each in company))
                torch.testing.assert_close(found, alone, rtol=0, atol=tolerance)


# CUDA, on its double.


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch, devices=2)


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x):
        seen = self.layer(x)
        assert seen.dtype is self.shift.dtype
        return seen + self.shift


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("submits", [True, False])
async def test_cuda_computes_in_half_precision_and_compares(cuda, logged, dtype, submits):
    torch.manual_seed(0)
    given = Shifted().eval()
    backend = CudaBackend(2, submits=submits, dtype=dtype, min_cosine=0.99)
    found = await ask(given, X, X[:1], backend=backend, example_inputs=X)
    torch.testing.assert_close(torch.cat(found), given(torch.cat([X, X[:1]])).detach(), rtol=0.05, atol=0.02)
    assert not torch.equal(found[0], given(X))
    assert given.layer.weight.dtype is torch.float32
    assert len([line for line in said(logged) if "beside full precision" in line]) == 1
    [computed] = await ask(given, X, backend=CudaBackend(dtype=dtype, outputs="as computed"), example_inputs=X)
    assert computed.dtype is dtype


def test_cuda_holds_weights_once_a_device_for_each_dtype(cuda):
    given = Shifted().eval()
    backend = CudaBackend(2, dtype=torch.float16)
    first, second, elsewhere = (backend.load(given, core, None) for core in (0, 1, 2))
    assert first._copy is second._copy is not elsewhere._copy
    full = first.full()
    assert full._copy is not first._copy
    assert full._copy is CudaBackend().load(given, 0, None)._copy
    assert first._copy.module.layer.weight.dtype is torch.float16
    assert full._copy.module.layer.weight.dtype is torch.float32


async def test_cuda_refuses_what_the_model_cannot_run(cuda):
    class OnHost(MakesFloat32):
        def forward(self, x):
            return self.layer(x.float())

    with pytest.raises(ValueError, match="the model cannot run in float16"):
        await ask(OnHost().eval(), X, backend=CudaBackend(dtype=torch.float16), example_inputs=X)


async def test_cuda_casts_a_file(cuda, tmp_path):
    path = tmp_path / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net(), X).save(path)
    backend = CudaBackend(dtype=torch.float16, min_cosine=0.99)
    [found] = await ask(path, X, backend=backend, example_inputs=X)
    torch.testing.assert_close(found, net()(X).detach(), rtol=0.01, atol=0.01)


def test_everything_that_users_name_is_there():
    assert precision.OUTPUTS == ("as called", "as computed")
    assert aneuron.backends.ReducedCore
