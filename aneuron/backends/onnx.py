"""ONNX files on virtual cores of the CPU, by ONNX Runtime.

Lives here: a session, its settings, what it says of itself, tensors in and out. Must not be here: what inputs have in
common with other runtimes' (graphs.py), who runs when.
"""

import os
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from aneuron.backends import Fault
from aneuron.backends.files import BESIDE, check_graph, has_external_data
from aneuron.backends.graphs import Held, Input, Sharing, Unreadable, VirtualCores, bind, file_identity, named, rows_of

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(bool)": torch.bool,
    **{
        f"tensor({kind}{bits})": getattr(torch, kind + str(bits))
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    },
}


_TAKES = (
    "backend='onnx' takes the path of an ONNX file: export the module (torch.onnx.export), or pass backend='openvino', "
    "which takes modules, or 'cpu'"
)


class OnnxBackend(VirtualCores):
    """Runs an ONNX file on virtual cores of the CPU with ONNX Runtime; the model is the path of the file.

    ``pip install 'aneuron[onnx]'``. `cores` and `threads_per_core` are as for `CpuBackend`: None means as many cores as
    there are CPUs, and as many threads as CPUs are left for each. The weights are there once for all cores where a core
    has one thread, else once for each core: threads belong to an ONNX Runtime session.

    *Inputs.* Positional arguments are the model's inputs in its order, keywords go by name. Their dtypes must be those
    that the model declares, nothing is cast, and sizes that it fixes must be as it says; else the call gets a
    `ShapeError` that lists the inputs. A Python number stands for an input of one element. Sizes that the model leaves
    open stay open; where all inputs fix the same number of rows batches are padded to it, as with `batch_size`.

    *Outputs.* A model with one output gives a tensor, one with several a dict of them by name. What is no tensor comes
    as ONNX Runtime gives it: strings as a list, sequences as lists.

    *Bits.* On x86, a row has the same bits in whatever company it is executed, with any number of threads, in a model
    of layers with constant weights (MatMul, Gemm, Conv), attention, Softmax, LayerNormalization, GELU: the tests hold
    it. It is not so for all operators: a sum or mean over positions, as of token vectors, has other last bits for one
    row than for several, Log and Softplus by where in the batch a number lies. Texts padded to different lengths are
    different inputs, and bits differ between machines and versions of ONNX Runtime.

    Raises at the start: `ModuleNotFoundError` without ONNX Runtime; `ValueError` for what is no ONNX file, with what it
    is, for a damaged one, one with an operator that ONNX Runtime does not know, or one whose weights lie in files that
    are missing. An execution holds no GIL, and the process's other threads go on. Whatever it raises is blamed on the
    input.

    ``AsyncDataParallel("model.onnx", backend=OnnxBackend(cores=4))``; ``backend="onnx"`` has the defaults, and "auto"
    is this backend for such a file where ONNX Runtime is installed.

        >>> from aneuron import OnnxBackend
        >>> OnnxBackend(cores=2, threads_per_core=1)
        OnnxBackend(cores=2, threads_per_core=1)
    """

    name = "onnx"
    recoverable = True
    preferred_rows = 32
    package, extra, title = "onnxruntime", "onnx", "ONNX Runtime"

    def __init__(self, cores: int | None = None, threads_per_core: int | None = None) -> None:
        super().__init__(cores, threads_per_core)
        self._given = cores, threads_per_core

    def __repr__(self) -> str:
        return "OnnxBackend(cores={}, threads_per_core={})".format(*self._given)

    def compiled_rows(self, model: Any) -> int | None:
        """The rows that the file's inputs fix, if they do."""
        check_graph(model, ("onnx",), _TAKES)
        return rows_of(_inputs(_open(model, threads=1, optimised=False)))

    def load(self, model: Any, core_id: int, batch_size: int | None) -> "OnnxCore":
        """Open the file, unless another core has."""
        check_graph(model, ("onnx",), _TAKES)
        threads = self._cpu.threads()
        # One session serves several threads, each with the weights that it has; but a session with threads of its own
        # lends them to whoever calls. Measured, six layers of 1,536, two CPUs: one session for two callers is as fast
        # as one each (177 and 181 executions/s), and has 57 MB less.
        key = file_identity(model), threads, core_id * (threads > 1)
        user = core_id, batch_size
        return OnnxCore(_sessions.take(key, user, lambda: _open(model, threads)), user)

    def classify(self, error: BaseException) -> Fault:
        """A CPU does not fail alone: whatever the model raises is about its input."""
        return Fault.INPUT


_sessions: Sharing[Any] = Sharing()


def _open(model: Any, threads: int, optimised: bool = True) -> Any:
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that spin for work take CPUs from other cores': with 2 threads 97 executions/s, 172 without (as above).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what goes wrong is raised; it need not be printed besides
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(os.fspath(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        hint = ""
        if isinstance(error, InvalidProtobuf):
            hint = " (the file is damaged or incomplete)"
        elif has_external_data(model):
            hint = BESIDE
        raise Unreadable(model, "ONNX Runtime", error, hint) from error


def _inputs(session: Any) -> list[Input]:
    found = []
    for each in session.get_inputs():
        sizes = tuple(size if isinstance(size, int) else None for size in each.shape)  # a name, or None: any
        found.append(Input(each.name, each.type, _DTYPES.get(each.type), sizes))
    return found


class OnnxCore:
    """A virtual core: a session, or the right to call one that others call, too."""

    concurrent = False

    def __init__(self, held: Held[Any], user: tuple[int, int | None]) -> None:
        self._held: Held[Any] | None = held
        self._user = user
        self._inputs = _inputs(held.graph)
        outputs = held.graph.get_outputs()
        self._names = [each.name for each in outputs]
        self._by_numpy = all("bfloat16" not in each.type for each in (*outputs, *held.graph.get_inputs()))

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model. Its outputs are in memory of their own."""
        assert self._held is not None
        session = self._held.graph
        names = [each.name for each in self._inputs]
        tensors = dict(zip(names, bind(self._inputs, args, kwargs), strict=True))
        if self._by_numpy:
            outputs = session.run(None, {name: x.numpy(force=True) for name, x in tensors.items()})
            return named([_output(each) for each in outputs], self._names)
        from onnxruntime import OrtValue  # 5 to 8 times the time that NumPy's way takes, which has no bfloat16

        values = session.run_with_ort_values(
            None, {name: OrtValue.from_dlpack(x.contiguous()) for name, x in tensors.items()}
        )
        return named([from_dlpack(each) for each in values], self._names)

    def close(self) -> None:
        """Let the weights go; with the last core's they are freed."""
        if self._held is not None:
            _sessions.leave(self._held, self._user)
        self._held = None


def _output(value: Any) -> Any:
    """A tensor of what is one to torch, without a copy; strings as lists."""
    if hasattr(value, "dtype"):
        return value.tolist() if value.dtype.kind in "OUS" else torch.from_numpy(value)
    return value
