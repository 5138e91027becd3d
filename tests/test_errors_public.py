"""The front door: what it exports, the tree of errors, who may import whom."""

import ast
import copy
import inspect
import pathlib
import pickle
import subprocess
import sys
import textwrap

import pytest

import aneuron
from aneuron import (
    AneuronError,
    AsyncDataParallel,
    Closed,
    CoreFailed,
    DeadlineExceeded,
    DeviceError,
    InputModified,
    OutputError,
    QueueFull,
    ShapeError,
)

PACKAGE = pathlib.Path(aneuron.__file__).parent

# Design § 9.
ERRORS = {
    ShapeError: (AneuronError, ValueError),
    DeviceError: (AneuronError, ValueError),
    OutputError: (AneuronError, RuntimeError),
    InputModified: (AneuronError, RuntimeError),
    QueueFull: (AneuronError, Exception),
    DeadlineExceeded: (AneuronError, TimeoutError),
    Closed: (AneuronError, RuntimeError),
    CoreFailed: (AneuronError, RuntimeError),
}

# Design § 13: a file may import those above it.
ORDER = [
    "_native.sources", "_native", "ownership", "errors", "names", "arguments", "sched", "sched.call", "sched.flows",
    "sched.fair_queue", "sched.room", "sched.filling", "sched.slots", "sched.batch_delay", "sched.sizes",
    "sched.grouping", "sched.scheduler", "sched.shares", "engine.health", "engine.failures", "tensors",
    "tensors.buckets",
    "tensors.marked", "tensors.nested", "tensors.quantized", "tensors.lengths", "tensors.copying",
    "tensors.outputs", "tensors.varied", "tensors.verdicts", "tensors.likeness", "engine.evidence", "tensors.rows",
    "tensors.signature", "backends.precision", "backends.traits", "backends.unwarned", "backends.exported",
    "backends", "engine.comparing", "engine.modes", "backends.timer", "backends.files", "backends.aoti",
    "backends.torchscript", "backends.cpus", "backends.copies", "backends.cpu", "backends.simulated",
    "backends.neuron.faults", "backends.neuron.machine", "backends.neuron.cores", "backends.neuron.placement",
    "backends.neuron.native", "backends.neuron", "backends.cuda", "backends.graphs", "backends.onnx",
    "backends.converting",
    "backends.openvino", "stats", "signature", "program", "observing", "engine", "engine.loading", "engine.execution",
    "engine.threads", "engine.board", "engine.lane", "engine.onloop", "engine.dispatcher", "engine.futures",
    "engine.recovery", "engine.admission", "engine.settling", "engine.cores", "engine.run", "map", "map.sources",
    "map.window", "options", "remote", "remote.failures", "remote.frames", "remote.link", "remote.memory",
    "remote.packing", "remote.together", "remote.control", "remote.division", "remote.starting", "remote.sources",
    "remote.meeting", "remote.supervision", "remote.processes", "remote.supervisor", "remote.messages",
    "remote.routing", "remote.sums", "remote.wire", "remote.engines", "remote.client", "remote.keeper",
    "remote.shared", "pool", "lifecycle", "remote.model", "calls", "parallel", "remote.server", "remote.engine",
    "remote.virtual", "testing", "web", "ray", "cli.reading", "serve", "cli", "__main__",
]  # fmt: skip

# What uses the front door, and what else it may import: web requests and handles of Ray have views of their own, a
# service is a web application.
OUTSIDE = {
    "web": {"", "arguments", "options", "sched.call"},
    "serve": {"", "web", "cli.reading"},
    "cli": {"", "tensors.likeness", "serve"},
    "ray": {"", "options", "sched.call", "tensors.nested", "remote.sources", "backends.cpus", "web.problems"},
}

# Design § 3, all of it; a parameter arrives with the issue that makes it work, not before.
PARAMETERS = {
    "model": inspect.Parameter.empty,
    "device_ids": None,
    "dim": 0,
    "set_dynamic_batching": True,
    "backend": "auto",
    "batch_size": None,
    "example_inputs": None,
    "num_workers": None,
    "split_size": None,
    "max_pending": None,
    "max_delay": 0.0,
    "buckets": None,
    "exec_timeout": None,
    "min_cores": None,
    "outputs": None,
    "check_rows": True,
    "context": None,
    "pool": None,
    "weight": 1.0,
}
FROM_THE_FIRST = list(PARAMETERS)[:10]


# Names.


def test_the_exported_names_are_sorted_and_there():
    assert aneuron.__all__ == sorted(aneuron.__all__)
    assert len(set(aneuron.__all__)) == len(aneuron.__all__)
    for name in aneuron.__all__:
        assert getattr(aneuron, name).__name__ == name


def test_what_the_design_promises_is_exported():
    promised = {
        "AsyncDataParallel", "Backend", "Core", "CpuBackend", "Fault", "SimulatedBackend", "Statistics",
        "AneuronError", *(error.__name__ for error in ERRORS),
    }  # fmt: skip
    later = {"Buckets", "CudaBackend", "NeuronBackend", "Observer", "Timing", "DeadlineExceeded", "NoHealthyCores"}
    later |= {
        "CallStatistics",
        "CoreStatistics",
        "EngineStatistics",
        "Histogram",
        "Signature",
        "TensorSpec",
        "Map",
        "OnnxBackend",
        "OpenVinoBackend",
        "Pool",
        "PoolStatistics",
        "Rows",
        "ShareStatistics",
        "Shared",
        "View",
        "Work",
    }
    assert promised <= set(aneuron.__all__) <= promised | later


def test_every_exported_name_says_that_it_is_aneuron_s():
    for name in aneuron.__all__:
        assert getattr(aneuron, name).__module__ == "aneuron"


def test_every_exported_name_is_explained():
    for name in aneuron.__all__:
        assert inspect.getdoc(getattr(aneuron, name))


def test_a_star_import_brings_the_exported_names_and_no_others():
    names = {}
    exec("from aneuron import *", names)
    assert set(names) - {"__builtins__"} == set(aneuron.__all__)


def test_exported_classes_can_be_pickled_by_their_public_name():
    for name in aneuron.__all__:
        thing = getattr(aneuron, name)
        assert pickle.loads(pickle.dumps(thing)) is thing
    assert pickle.loads(pickle.dumps(aneuron.Fault.CORE)) is aneuron.Fault.CORE


# Errors.


def test_the_tree_of_errors_is_the_one_of_the_design():
    assert AneuronError.__bases__ == (Exception,)
    for error, bases in ERRORS.items():
        assert all(issubclass(error, base) for base in bases)
        others = {ValueError, RuntimeError, TimeoutError, OSError, LookupError, TypeError}
        others -= {base for direct in bases for base in direct.__mro__}
        assert not any(issubclass(error, other) for other in others)


def test_every_exported_error_is_of_the_family():
    things = (getattr(aneuron, name) for name in aneuron.__all__)
    errors = {thing for thing in things if isinstance(thing, type) and issubclass(thing, BaseException)}
    assert set(ERRORS) | {AneuronError} <= errors
    assert all(issubclass(error, AneuronError) for error in errors)


@pytest.mark.parametrize("error", [*ERRORS, AneuronError])
def test_an_error_survives_copying_and_pickling(error):
    original = error("what happened")
    original.add_note("where")
    for twin in (copy.copy(original), pickle.loads(pickle.dumps(original))):
        assert type(twin) is error
        assert str(twin) == "what happened"
        assert vars(twin) == vars(original)


def test_queue_full_says_when_to_come_back():
    assert QueueFull("full").retry_after is None
    full = pickle.loads(pickle.dumps(QueueFull("full", 0.25)))
    assert full.retry_after == 0.25
    assert str(full) == "full"
    assert QueueFull("full", retry_after=1.5).retry_after == 1.5


def test_core_failed_says_which_core():
    assert CoreFailed("failed").core is None
    failed = pickle.loads(pickle.dumps(CoreFailed("failed", core=3)))
    assert failed.core == 3
    assert str(failed) == "failed"


# Signatures.


def test_the_parameters_are_those_of_the_design_in_its_order():
    signature = inspect.signature(AsyncDataParallel)
    names = list(signature.parameters)
    assert names == [name for name in PARAMETERS if name in names]
    assert names[: len(FROM_THE_FIRST)] == FROM_THE_FIRST
    for name, parameter in signature.parameters.items():
        assert parameter.default == PARAMETERS[name]
        assert type(parameter.default) is type(PARAMETERS[name])
        positional = name in FROM_THE_FIRST[:4]  # as in torch_neuronx
        assert parameter.kind is (parameter.POSITIONAL_OR_KEYWORD if positional else parameter.KEYWORD_ONLY)


def test_the_signature_that_is_shown_is_the_one_that_holds():
    shown = inspect.signature(AsyncDataParallel)
    holds = list(inspect.signature(AsyncDataParallel.__init__).parameters.values())[1:]
    assert list(shown.parameters.values()) == holds
    arguments = {name: value for name, value in PARAMETERS.items() if name in shown.parameters and name != "model"}
    AsyncDataParallel(abs, **arguments)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("start", []),
        ("aclose", []),
        ("abort", []),
        ("disable_dynamic_batching", []),
        ("statistics", []),
    ],
)
def test_the_methods_are_those_of_the_design(name, parameters):
    method = getattr(AsyncDataParallel, name)
    assert list(inspect.signature(method).parameters)[1:] == parameters
    assert inspect.iscoroutinefunction(method) is (name in ("start", "aclose", "abort"))
    assert inspect.getdoc(method)


def test_the_properties_are_those_of_the_design():
    settable = {
        name: value.fset is not None for name, value in vars(AsyncDataParallel).items() if isinstance(value, property)
    }
    assert settable == {
        "num_workers": True, "split_size": True, "max_pending": True, "ready": False, "pool": False, "weight": False,
        "signature": False, "batch_size": False, "configuration": False,
    }  # fmt: skip


# Imports.


def modules():
    """Each file of the package by its name in the listing."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts:
            found[".".join(parts)] = path
    return found


def place(name):
    """Where in the listing a file stands; those of a folder without places of their own stand where the folder does."""
    return ORDER.index(name) if name in ORDER else ORDER.index(name.partition(".")[0])


def imported(tree):
    """The modules that a list of statements imports, and the names from them, with those inside if and try."""
    for node in tree:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            for alias in node.names:
                yield node.module, alias.name
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from imported(ast.iter_child_nodes(node))
        elif isinstance(node, ast.ExceptHandler):
            yield from imported(node.body)


def ours(tree, known):
    """The files of the package that top-level statements import."""
    for module, name in imported(tree):
        if module == "aneuron" or module.startswith("aneuron."):
            inner = module.partition(".")[2]
            whole = f"{inner}.{name}".strip(".") if name else inner
            yield whole if whole in known else inner


def test_the_listing_names_every_file():
    for name in modules():
        place(name)


@pytest.mark.parametrize("name", modules())
def test_a_file_imports_only_files_above_it(name):
    known = modules()
    for target in ours(ast.parse(known[name].read_text()).body, known):
        folder = name.partition(".")[0]
        if folder in OUTSIDE:
            allowed = OUTSIDE[folder]  # of folders all that is in them
            own = target.partition(".")[0] in {folder, *allowed}
            assert own or target in allowed, f"{name} imports aneuron.{target}; it may use the front door only"
        else:
            assert target, f"{name} imports the front door, which imports everything"
            assert place(target) < place(name), f"{name} imports {target}, which stands below it"


def test_the_rule_would_be_seen_to_be_broken():
    known = modules()
    broken = """
        from aneuron.tensors import rows
        if True:
            import aneuron.engine.lane
        try:
            from aneuron.tensors.rows import Call
        except ImportError:
            import aneuron
        def later():
            import aneuron.parallel
    """
    assert list(ours(ast.parse(textwrap.dedent(broken)).body, known)) == [
        "tensors.rows",
        "engine.lane",
        "tensors.rows",
        "",
    ]


def every_import(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_nothing_imports_the_tools_for_tests():
    for path in PACKAGE.rglob("*.py"):
        assert "aneuron.testing" not in set(every_import(path)), f"{path.name} imports aneuron.testing"
    code = "import aneuron, sys; sys.exit('aneuron.testing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        ("errors", ["*"]),
        ("sched.call", ["asyncio", "torch", "time", "threading", "anyio", "logging"]),
        ("sched.fair_queue", ["asyncio", "torch", "time", "threading", "anyio", "logging"]),
        ("sched.grouping", ["asyncio", "torch", "time", "threading", "anyio", "logging"]),
        ("sched.filling", ["asyncio", "torch", "time", "threading", "anyio", "logging"]),
        ("sched.slots", ["asyncio", "torch", "time", "threading", "anyio", "logging"]),
        ("sched.batch_delay", ["asyncio", "torch", "time", "threading", "anyio", "logging"]),
        ("sched.scheduler", ["asyncio", "torch", "time", "threading", "anyio", "logging"]),
        ("engine.health", ["asyncio", "torch", "time", "threading", "anyio"]),
        ("sched.sizes", ["asyncio", "torch", "time", "threading", "anyio", "logging"]),
        ("tensors.buckets", ["asyncio", "torch", "time", "threading", "anyio"]),
        ("tensors.lengths", ["asyncio", "threading", "time"]),
        ("tensors.outputs", ["asyncio", "threading", "time"]),
        ("tensors.copying", ["asyncio", "threading", "time"]),
        ("tensors.rows", ["asyncio", "threading", "time"]),
        ("tensors.nested", ["asyncio", "threading", "time"]),
        ("stats", ["asyncio", "torch", "time", "threading"]),
        ("observing", ["asyncio", "torch", "time", "threading", "opentelemetry"]),
        ("engine.threads", ["asyncio"]),
        ("engine.lane", ["torch"]),
        ("engine.futures", ["torch", "time", "threading"]),
        ("engine.run", ["torch", "time"]),
        ("engine.board", ["torch", "time"]),
        ("engine.dispatcher", ["torch", "time"]),
        ("sched.shares", ["asyncio", "torch", "time", "threading", "anyio", "logging"]),
    ],
)
def test_a_file_keeps_out_what_must_not_be_there(name, forbidden):
    path = modules().get(name)
    if path is None:
        pytest.skip("not written yet")
    found = {module.partition(".")[0] for module in every_import(path)}
    assert not found if forbidden == ["*"] else not found & set(forbidden)


def test_the_package_needs_torch_and_anyio_only():
    allowed = set(sys.stdlib_module_names) | {"aneuron", "torch", "anyio"}
    others = {"neuron", "cuda", "onnx", "openvino", "converting"}  # import what they are for, when it is needed
    others = {f"backends.{name}" for name in others} | {"_native.build"}
    for name, path in modules().items():
        if name.partition(".")[0] in OUTSIDE or name in others:
            continue
        assert {module.partition(".")[0] for module in every_import(path)} <= allowed


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()
