"""OpenVINO and ONNX Runtime: files that say what they take, modules that are converted, what is wrong with either."""

import asyncio
import copy
import dataclasses
import gc
import logging
import pickle
import platform
import sys
import threading
import weakref

import pytest
import torch

from aneuron import AsyncDataParallel, Buckets, OnnxBackend, OpenVinoBackend, ShapeError
from aneuron.backends import Fault
from aneuron.testing import check_backend

onnx_format = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
runtime = pytest.importorskip("openvino")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - it may not be there

BACKENDS = {"onnx": OnnxBackend, "openvino": OpenVinoBackend}
both = pytest.mark.parametrize("name", BACKENDS)
X = torch.arange(24.0).reshape(3, 8) / 10

TYPES = {
    torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE, torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16, torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32,
    torch.uint8: TensorProto.UINT8, torch.bool: TensorProto.BOOL,
}  # fmt: skip


def graph(nodes, inputs, outputs, weights=(), domains=("",)):
    """An ONNX model of nodes; inputs and outputs by name, each a dtype and a shape."""
    values = [
        [helper.make_tensor_value_info(name, TYPES.get(dtype, dtype), shape) for name, (dtype, shape) in of.items()]
        for of in (inputs, outputs)
    ]
    weights = [numpy_helper.from_array(value.numpy(), name) for name, value in dict(weights).items()]
    opsets = [helper.make_opsetid(domain, 3 if domain else 17) for domain in domains]
    return helper.make_model(helper.make_graph(nodes, "g", *values, weights), opset_imports=opsets, ir_version=8)


def linear(rows="rows", inputs=8, outputs=4, operator="MatMul"):
    torch.manual_seed(0)
    node = helper.make_node(operator, ["x", "w"], ["y"])
    weight = torch.randn(inputs, outputs)
    shapes = {"x": (torch.float32, [rows, inputs])}, {"y": (torch.float32, [rows, outputs])}
    return graph([node], *shapes, {"w": weight}), weight


def saved(folder, model, name="model.onnx", **settings):
    path = str(folder / name)
    onnx_format.save(model, path, **settings)
    return path


@pytest.fixture
def path(tmp_path):
    return saved(tmp_path, linear()[0])


@pytest.fixture
def xml(path, tmp_path):
    runtime.save_model(runtime.Core().read_model(path), tmp_path / "model.xml", compress_to_fp16=False)
    return str(tmp_path / "model.xml")


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)).eval()


def served(model, backend, *calls, **settings):
    """What a model answers, call after call; an exception is an answer. Calls are tuples, or dicts of keywords."""

    async def main():
        async with AsyncDataParallel(model, backend=backend, **settings) as serving:
            answers = []
            for call in calls:
                args, kwargs = ((), call) if isinstance(call, dict) else (call, {})
                try:
                    answers.append(await serving(*args, **kwargs))
                except Exception as error:
                    answers.append(error)
            return answers

    return asyncio.run(main())


# The contract, and what is shared.


@pytest.mark.parametrize(("cores", "threads"), [(2, 1), (1, 2)])
@both
def test_files_keep_the_contract(name, cores, threads, path):
    backend = BACKENDS[name](cores, threads)
    assert backend.name == name
    check_backend(backend, path, (X,))
    assert backend.classify(MemoryError()) is Fault.INPUT


def test_openvino_s_own_files_and_modules_keep_the_contract(xml):
    check_backend(OpenVinoBackend(cores=2), xml, (X,))
    check_backend(OpenVinoBackend(cores=2), net(), (X,))


@both
def test_a_file_is_served_by_name_by_object_and_by_auto(name, path, xml):
    weight = linear()[1]
    for model, backend in ((path, name), (path, BACKENDS[name](cores=1)), (path, "auto"), (xml, "auto")):
        (answer,) = served(model, backend, (X,))
        torch.testing.assert_close(answer, X @ weight)


@both
def test_weights_are_there_once_for_all_cores_and_gone_with_the_last(name, path):
    backend = BACKENDS[name](cores=2, threads_per_core=1)
    first, second = (backend.load(path, core, None) for core in (0, 1))
    assert first._held is second._held
    held = weakref.ref(first._held)
    first.close()
    torch.testing.assert_close(second.execute((X,), {}), X @ linear()[1])
    second.close()
    gc.collect()
    assert held() is None


@both
def test_a_core_that_loads_again_does_not_get_what_an_older_start_has(name, tmp_path):
    path = saved(tmp_path, linear()[0])
    doubled, weight = linear()
    doubled.graph.initializer[0].CopyFrom(numpy_helper.from_array(2 * weight.numpy(), "w"))

    async def main():
        async with AsyncDataParallel(path, backend=BACKENDS[name](cores=2)) as model:
            before = await model(X)
            saved(tmp_path, doubled, "new.onnx")
            (tmp_path / "new.onnx").replace(path)
            await model.swap(path)
            return before, await model(X)

    before, after = asyncio.run(main())
    assert torch.equal(2 * before, after)


def test_cpus_are_divided_among_cores(path):
    session = OnnxBackend(cores=2, threads_per_core=1).load(path, 0, None)._held.graph
    assert session.get_session_options().intra_op_num_threads == 1
    threads = [OnnxBackend(cores=2, threads_per_core=2).load(path, core, None)._held for core in (0, 1)]
    assert threads[0] is not threads[1]  # a session's threads are lent to whoever calls it
    compiled = OpenVinoBackend(cores=1, threads_per_core=1).load(path, 0, None)._held.graph.compiled
    assert compiled.get_property("NUM_STREAMS") == compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert not compiled.get_property("ENABLE_CPU_PINNING")


@both
def test_a_backend_can_be_pickled(name):
    backend = BACKENDS[name](cores=3)
    assert repr(pickle.loads(pickle.dumps(backend))) == repr(backend)
    assert list(pickle.loads(pickle.dumps(backend)).cores()) == [0, 1, 2]


def test_both_release_the_gil_while_they_run(tmp_path):
    """With no forced switches another thread gets the interpreter only when it is let go."""
    size = 1024
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    shapes = {"x": (torch.float32, [size, size])}, {"y": (torch.float32, [size, size])}
    path, x = saved(tmp_path, graph([node], *shapes, {"w": torch.ones(size, size)})), torch.ones(size, size).numpy()
    session = OnnxBackend(cores=1).load(path, 0, None)._held.graph
    request = OpenVinoBackend(cores=1).load(path, 0, None)._held.graph.compiled.create_infer_request()
    request.set_input_tensor(0, runtime.Tensor(x))
    feed = {"x": x}
    for run in (lambda: session.run(None, feed), lambda: request.infer(share_outputs=True)):
        run()
        order, bell = [], threading.Lock()
        bell.acquire()
        other = threading.Thread(target=lambda bell=bell, order=order: (bell.acquire(), order.append("other")))
        other.start()
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1000.0)
        try:
            bell.release()
            run()
            order.append("this")
        finally:
            sys.setswitchinterval(interval)
        other.join()
        assert order == ["other", "this"]


# Inputs.


@pytest.fixture
def pair(tmp_path):
    """Two inputs of different types and two outputs."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["f"], to=TensorProto.FLOAT), helper.make_node("Mul", ["f", "scale"], ["b"]),
        helper.make_node("Sub", ["f", "mask"], ["a"]),
    ]  # fmt: skip
    inputs = {"ids": (torch.int64, ["n", "l"]), "mask": (torch.float32, ["n", "l"]), "scale": (torch.float32, [1])}
    outputs = {"b": (torch.float32, ["n", "l"]), "a": (torch.float32, ["n", "l"])}
    return saved(tmp_path, graph(nodes, inputs, outputs), "pair.onnx")


@both
def test_inputs_go_by_position_and_by_name_and_outputs_by_name(name, pair):
    ids, mask = torch.arange(6).reshape(2, 3), torch.ones(2, 3)
    calls = [(ids, mask, 2), {"mask": mask, "ids": ids, "scale": 2.0}, (ids[:, :1], mask[:, :1], 2)]
    answers = served(pair, BACKENDS[name](cores=1), *calls)
    for answer, cut in zip(answers, (3, 3, 1), strict=True):
        assert list(answer) == ["b", "a"]
        assert torch.equal(answer["b"], 2.0 * ids[:, :cut])
        assert torch.equal(answer["a"], (ids - mask)[:, :cut])


@both
def test_outputs_have_the_names_of_the_file_whatever_they_were_before(name, tmp_path):
    nodes = [
        helper.make_node("Add", ["x", "x"], ["a"]), helper.make_node("Identity", ["a"], ["z"]),
        helper.make_node("Identity", ["a"], ["y"]), helper.make_node("Identity", ["x"], ["w"]),
    ]  # fmt: skip
    shape = torch.float32, ["n", 8]
    path = saved(tmp_path, graph(nodes, {"x": shape}, {"z": shape, "y": shape, "w": shape, "a": shape}))
    (answer,) = served(path, name, {"x": X})
    assert list(answer) == ["z", "y", "w", "a"]
    assert torch.equal(answer["w"], X)
    assert all(torch.equal(answer[name], 2 * X) for name in "zya")


@both
def test_inputs_that_do_not_fit_are_an_error_that_lists_the_model_s(name, pair):
    ids, mask = torch.arange(6).reshape(2, 3), torch.ones(2, 3)
    wrong = {
        r"takes 3 inputs \('ids': torch.int64 \(any, any\); 'mask': .*\); this call gives 2 by position": (ids, mask),
        "gives 4 by position": (ids, mask, 2, 3),
        "gives 'ids', 'mask', 'scales'": {"ids": ids, "mask": mask, "scales": 2.0},
        r"dtype torch.int32 is given for 'ids': torch.int64 .*; pass x.to\(torch.int64\)": (
            ids.int(),
            mask,
            2,
        ),
        "dtype torch.float64 is given for 'mask'": (ids, mask.double(), 2),
        r"shape \(2, 3, 1\) is given for 'mask'": (ids, mask[..., None], 2),
        "True is given for 'scale'": (ids, mask, True),
        "'2' is given for 'scale'": (ids, mask, "2"),
    }
    answers = served(pair, BACKENDS[name](cores=1), *wrong.values(), (ids, mask, 2))
    for words, error in zip(wrong, answers, strict=False):
        assert isinstance(error, ShapeError), error
        with pytest.raises(ShapeError, match=words):
            raise error
    assert torch.equal(answers[-1]["b"], 2.0 * ids)


@both
def test_a_wrong_row_fails_alone(name, path):
    async def main():
        async with AsyncDataParallel(path, backend=BACKENDS[name](cores=1)) as model:
            calls = [model(X), model(X.double()), model(X[:, :5]), model(X[1:])]
            return await asyncio.gather(*calls, return_exceptions=True)

    first, second, third, last = asyncio.run(main())
    assert isinstance(second, ShapeError)
    assert isinstance(third, ShapeError)
    assert torch.equal(first[1:], last)


@pytest.mark.parametrize("dtype", TYPES)
@both
def test_every_dtype_comes_and_goes_as_it_is(name, dtype, tmp_path):
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Reshape", ["x", "s"], ["z"])]
    shapes = {"x": (dtype, ["n", 4])}, {"y": (dtype, ["n", 4]), "z": (dtype, ["n", 2, 2])}
    path = saved(tmp_path, graph(nodes, *shapes, {"s": torch.tensor([-1, 2, 2])}))
    x = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]).to(dtype)
    core = BACKENDS[name](cores=1).load(path, 0, None)
    for given in (x, x.t().contiguous().t(), x[:1], x[::2]):
        answer = core.execute((given,), {})
        assert torch.equal(answer["y"], given)
        assert torch.equal(answer["z"], given.reshape(-1, 2, 2))


def test_integers_that_openvino_would_cut_are_refused(tmp_path):
    shapes = {"x": (torch.int64, ["n", 2])}, {"y": (torch.int64, ["n", 2])}
    path = saved(tmp_path, graph([helper.make_node("Add", ["x", "x"], ["y"])], *shapes))
    calls = [(torch.tensor([[1, value]]),) for value in (2**31, -(2**31) - 1, 2**30 - 1)]
    high, low, fits = served(path, OpenVinoBackend(cores=1), *calls)
    with pytest.raises(ShapeError, match=r"2147483648 is given for 'x': torch.int64 .*in 32 bits"):
        raise high
    assert isinstance(low, ShapeError)
    assert torch.equal(fits, torch.tensor([[2, 2**31 - 2]]))
    for (x,), answer in zip(calls, served(path, OnnxBackend(cores=1), *calls), strict=True):
        assert torch.equal(answer, 2 * x)


@both
def test_a_result_is_the_caller_s_whatever_runs_next(name, path):
    calls = [(X + n,) for n in range(5)] + [(X[:1],)]
    answers = served(path, BACKENDS[name](cores=1), *calls)
    for (x,), answer in zip(calls, answers, strict=True):
        torch.testing.assert_close(answer, x @ linear()[1])
    assert len({answer.untyped_storage().data_ptr() for answer in answers}) == len(answers)
    answers[0].zero_()  # writable
    assert X[0, 1] == 0.1


def test_strings_come_as_lists(tmp_path):
    node = helper.make_node(
        "LabelEncoder", ["x"], ["y"], domain="ai.onnx.ml", keys_int64s=[0, 1], values_strings=["no", "yes"]
    )
    shapes = {"x": (torch.int64, ["n"])}, {"y": (TensorProto.STRING, ["n"])}
    path = saved(tmp_path, graph([node], *shapes, domains=("", "ai.onnx.ml")))
    assert served(path, OnnxBackend(cores=1), (torch.tensor([1, 0]),)) == [["yes", "no"]]


@both
def test_rows_that_the_file_fixes_are_kept_to(name, tmp_path):
    path = saved(tmp_path, linear(rows=4)[0])
    backend = BACKENDS[name](cores=2)
    assert backend.compiled_rows(path) == 4
    assert backend.compiled_rows(saved(tmp_path, linear()[0], "free.onnx")) is None
    x = torch.randn(11, 8)
    answers = served(path, backend, (x,), (x[:1],), (x[:4],))
    for answer, rows in zip(answers, (11, 1, 4), strict=True):
        torch.testing.assert_close(answer, (x @ linear()[1])[:rows])


def attention(size):
    """A layer of a transformer, of sizes that are no multiples of a vector's."""
    sizes = {"up": (size, 131), "down": (131, size)}
    weights = {name: torch.randn(*sizes.get(name, (size, size))) / 7 for name in ("q", "k", "v", "o", *sizes)}
    weights |= {"g": torch.randn(size), "one": torch.tensor(1.0), "root": torch.tensor(2.0).sqrt()}
    steps = [
        ("MatMul", "x q", "q_"), ("MatMul", "x k", "k_"), ("MatMul", "x v", "v_"), ("MatMul", "q_ kt", "s"),
        ("Softmax", "s", "p"), ("MatMul", "p v_", "a"), ("MatMul", "a o", "b"), ("Add", "b x", "c"),
        ("LayerNormalization", "c g", "n_"), ("MatMul", "n_ up", "d"), ("Div", "d root", "e"), ("Erf", "e", "f"),
        ("Add", "f one", "h"), ("Mul", "d h", "i"), ("MatMul", "i down", "y"),
    ]  # fmt: skip
    nodes = [helper.make_node(operator, inputs.split(), [output]) for operator, inputs, output in steps]
    nodes.insert(3, helper.make_node("Transpose", ["k_"], ["kt"], perm=[0, 2, 1]))
    shape = torch.float32, ["n", "l", size]
    return graph(nodes, {"x": shape}, {"y": shape}, weights)


def convolution(size):
    weights = {"w": torch.randn(7, 9, 3) / 5, "z": torch.randn(7 * (size - 2), 33) / 9, "b": torch.randn(33)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]), helper.make_node("Gemm", ["f", "z", "b"], ["y"]),
    ]  # fmt: skip
    return graph(nodes, {"x": (torch.float32, ["n", 9, size])}, {"y": (torch.float32, ["n", 33])}, weights)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="measured on x86 only")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("make", [attention, convolution])
def test_a_row_has_the_same_bits_in_any_company_with_onnx_runtime(make, threads, tmp_path):
    """What holds for these operators; sums over positions, Log and Softplus are documented not to."""
    torch.manual_seed(1)
    size, rows = 45, 37
    path, x = saved(tmp_path, make(size)), torch.randn(rows, 9, size)

    async def main():
        async with AsyncDataParallel(path, backend=OnnxBackend(cores=1, threads_per_core=threads)) as model:
            alone = torch.cat([await model(x[i : i + 1]) for i in range(rows)])
            together = await asyncio.gather(*(model(x[i : i + 1]) for i in range(rows)))
            return alone, torch.cat(together), [await model(x[:company]) for company in (2, 3, 5, 8, 17, rows)]

    alone, together, companies = asyncio.run(main())
    assert torch.equal(together, alone)
    for answer in companies:
        assert torch.equal(answer, alone[: len(answer)])


# Modules.


@dataclasses.dataclass
class Answer:
    vectors: torch.Tensor
    parts: dict
    nothing: None = None


class Texts(torch.nn.Module):
    """Keyword inputs that carry the length, in and out of structures."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask, scale=1.0):
        hidden = self.layer(self.embedding(input_ids)) * scale
        mean = (hidden * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True)
        return Answer(mean, {"hidden": hidden, "same": mean})


def texts(rows, length):
    return {"input_ids": torch.randint(0, 50, (rows, length)), "attention_mask": torch.ones(rows, length)}


def test_a_module_keeps_its_structure_its_rows_and_its_lengths(caplog):
    torch.manual_seed(0)
    module = Texts().eval()
    calls = [texts(rows, length) for rows, length in ((2, 5), (9, 3), (1, 1), (40, 17))]
    with caplog.at_level(logging.INFO, "aneuron"):
        answers = served(module, OpenVinoBackend(cores=2), *calls, example_inputs=texts(3, 4))
    for call, answer in zip(calls, answers, strict=True):
        assert isinstance(answer, Answer)
        assert answer.nothing is None
        expected = module(**call)
        torch.testing.assert_close(answer.vectors, expected.vectors)
        torch.testing.assert_close(answer.parts, expected.parts)
    assert "Texts is converted for OpenVINO, precision f32: its answer deviates by" in caplog.text


def test_a_call_unlike_the_example_is_an_error(xml):
    example = texts(3, 4)
    calls = [
        {**example, "scale": 2.0}, (example["input_ids"], example["attention_mask"]),
        {**example, "input_ids": example["input_ids"].int()}, example,
    ]  # fmt: skip
    *errors, answer = served(Texts().eval(), OpenVinoBackend(cores=1), *calls, example_inputs=example)
    for error, words in zip(errors, ("other arguments beside", "stand in example_inputs", "torch.int32"), strict=True):
        with pytest.raises(ShapeError, match=words):
            raise error
    assert isinstance(answer, Answer)


def test_a_module_is_padded_to_buckets():
    module = Texts().eval()
    example, call = texts(2, 8), texts(3, 5)
    buckets = Buckets(dim=1, sizes=(4, 8), pad={"input_ids": 0, "attention_mask": 0})
    (answer,) = served(module, OpenVinoBackend(cores=1), call, example_inputs=example, buckets=buckets)
    torch.testing.assert_close(answer.vectors, module(**call).vectors)
    assert answer.parts["hidden"].shape == (3, 5, 16)


def test_weights_are_those_of_the_start_until_a_swap():
    module = net()
    before = module(X).detach()

    async def main():
        async with AsyncDataParallel(module, backend=OpenVinoBackend(cores=2), example_inputs=X) as model:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.data.mul_(2)  # leaves no trace
            first = await model(X)
            await model.swap(module)
            return first, await model(X)

    first, after = asyncio.run(main())
    torch.testing.assert_close(first, before)
    torch.testing.assert_close(after, module(X).detach())
    assert not torch.allclose(first, after)


def test_another_start_sees_what_was_written_to_a_module_that_still_serves():
    module, backend = net(), OpenVinoBackend(cores=2, threads_per_core=1)
    first = backend.load(module, 0, None, example=((X,), {}))
    assert backend.load(module, 1, None, example=((X,), {}))._held is first._held
    with torch.no_grad():
        module[0].weight.mul_(2)
    later = backend.load(module, 1, None, example=((X,), {}))
    assert later._held is not first._held
    torch.testing.assert_close(later.execute((X,), {}), module(X).detach())
    assert backend.load(module, 0, 3, example=((X,), {}))._held is not later._held  # may fix what depends on rows


@pytest.mark.filterwarnings("ignore:the model is in training mode")
def test_a_module_is_converted_in_eval_and_left_as_it_was():
    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Dropout(0.9)).train()
    (answer,) = served(module, OpenVinoBackend(cores=1), (X,), example_inputs=X)
    assert all(part.training for part in module.modules())
    torch.testing.assert_close(answer, copy.deepcopy(module).eval()(X))


class Deciding(torch.nn.Module):
    def forward(self, x):
        return x * 2 if len(x) < 4 else x * 3


class Counting(torch.nn.Module):
    def forward(self, x):
        return x, len(x)


@pytest.mark.filterwarnings("ignore:Using len")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python")
@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Deciding(), "does not answer as in PyTorch: with .6, 8. the deviation"),
        (Counting(), "Counting returns"),
    ],
)
def test_what_python_decides_is_not_quietly_fixed(module, words):
    with pytest.raises(ValueError, match=words):
        served(module.eval(), OpenVinoBackend(cores=1), (X,), example_inputs=X)


@pytest.mark.filterwarnings("ignore:Using len")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python")
def test_with_fixed_rows_what_they_decide_may_be_fixed():
    answers = served(Deciding().eval(), OpenVinoBackend(cores=1), (X,), (X[:1],), example_inputs=X, batch_size=3)
    assert torch.equal(answers[0], X * 2)
    assert torch.equal(answers[1], X[:1] * 2)


@pytest.mark.parametrize(("mode", "padding", "refused"), [("mean", 0.0, True), ("sum", 5.0, True), ("sum", 0.0, False)])
def test_padding_that_openvino_would_count_is_refused(mode, padding, refused):
    """The example has none, and would not show it."""
    bag = torch.nn.EmbeddingBag(9, 4, mode=mode, padding_idx=0).eval().requires_grad_(False)
    bag.weight[0] = padding
    module = torch.nn.Sequential(bag).eval()
    full, padded = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 0, 0]])
    if refused:
        with pytest.raises(ValueError, match="Sequential has an EmbeddingBag with padding_idx"):
            served(module, OpenVinoBackend(cores=1), (padded,), example_inputs=full)
    else:
        (answer,) = served(module, OpenVinoBackend(cores=1), (padded,), example_inputs=full)
        torch.testing.assert_close(answer, bag(padded))


def test_a_module_needs_an_example():
    with pytest.raises(ValueError, match="model=Sequential: OpenVINO converts a module by tracing it; pass example_in"):
        served(net(), OpenVinoBackend(cores=2))


def test_what_is_no_graph_is_said_so():
    for model, backend in ((net(), "onnx"), (torch.neg, "onnx"), (torch.neg, "openvino")):
        with pytest.raises(ValueError, match=f"backend='{backend}' takes .*path of an"):
            served(model, backend)


# Precision.


def test_precision_is_what_was_asked_for(path, caplog):
    core = OpenVinoBackend(cores=1).load(path, 0, None)
    assert core._held.graph.compiled.get_property("INFERENCE_PRECISION_HINT") == runtime.Type.f32
    assert not caplog.records
    core = OpenVinoBackend(cores=1, precision="bf16").load(path, 0, None)
    if core._held.graph.compiled.get_property("INFERENCE_PRECISION_HINT") == runtime.Type.bf16:
        assert not caplog.records
    else:
        assert "precision='bf16': OpenVINO computes in f32, which is all that this CPU has" in caplog.text
    torch.testing.assert_close(core.execute((X,), {}), X @ linear()[1], rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="precision='f8': expected 'f32' or 'bf16'"):
        OpenVinoBackend(precision="f8")
    with pytest.raises(ValueError, match="cores=0"):
        OpenVinoBackend(cores=0)


# Files that cannot be loaded.


def external(folder, data):
    """A model whose weights lie in a file of their own, which has so many bytes."""
    path = saved(folder, linear()[0], save_as_external_data=True, location="w.bin", size_threshold=0)
    whole = (folder / "w.bin").read_bytes()
    (folder / "w.bin").unlink()
    if data:
        (folder / "w.bin").write_bytes(whole[:data])
    return path


def part(folder, number, name="model.onnx"):
    (folder / name).write_bytes(linear()[0].SerializeToString()[:number])
    return folder / name


def written(folder, data, name="model.onnx"):
    (folder / name).write_bytes(data)
    return folder / name


BAD = {
    "an unknown operator": (lambda folder: saved(folder, linear(operator="Frobnicate")[0]), "(?s)load it.*Frobn"),
    "weights that are missing": (lambda folder: external(folder, 0), r"weights lie in a file of their own"),
    "half of the weights": (lambda folder: external(folder, 64), r"weights lie in a file of their own"),
    "half a file": (lambda folder: part(folder, 100), "damaged or incomplete"),
    "three bytes": (lambda folder: part(folder, 3), "cannot load it|damaged"),
    "nothing": (lambda folder: part(folder, 0), "is an empty file"),
    "a directory": (lambda folder: (folder / "d.onnx").mkdir() or folder / "d.onnx", "is a directory"),
    "a pointer to a file": (
        lambda folder: written(folder, b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"
    ),
    "a script": (lambda folder: torch.jit.trace(net(), X).save(folder / "s.onnx") or folder / "s.onnx", "another kind"),
    "an XML file": (lambda folder: written(folder, b"<?xml version='1.0'?>\n<html/>", "m.xml"), "XML file|load it"),
    "text": (lambda folder: written(folder, b"hello", "m.onnx"), "cannot load it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
@both
def test_a_bad_file_is_said_what_is_wrong_with_it(name, kind, tmp_path):
    write, words = BAD[kind]
    path = write(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        served(path, BACKENDS[name](cores=2))
    assert repr(str(path)) in str(caught.value)


@both
def test_no_file_is_said_as_python_does(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        served(tmp_path / "none.onnx", BACKENDS[name](cores=1))


@both
def test_no_part_of_a_file_is_taken_for_the_whole(name, tmp_path):
    whole = len(linear()[0].SerializeToString())
    for number in {*range(0, whole, 9), whole - 1, whole - 4}:
        with pytest.raises(ValueError, match="model="):
            BACKENDS[name](cores=1).load(part(tmp_path, number), 0, None)


def test_parts_of_openvino_s_files(xml, tmp_path):
    text, weights = (tmp_path / "model.xml").read_bytes(), (tmp_path / "model.bin").read_bytes()
    backend = OpenVinoBackend(cores=1)
    for number in (0, 30, 200, len(text) // 2, len(text) - 10):
        (tmp_path / "cut.xml").write_bytes(text[:number])
        (tmp_path / "cut.bin").write_bytes(weights)
        with pytest.raises(ValueError, match=r"cut.xml'.*(damaged or incomplete|empty file|XML file)"):
            backend.load(tmp_path / "cut.xml", 0, None)
    (tmp_path / "cut.xml").write_bytes(text)
    for number in (0, 64, len(weights) - 1, None):
        (tmp_path / "cut.bin").unlink() if number is None else (tmp_path / "cut.bin").write_bytes(weights[:number])
        with pytest.raises(ValueError, match="its weights lie in a file of their own"):
            backend.load(tmp_path / "cut.xml", 0, None)
