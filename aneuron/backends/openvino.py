"""OpenVINO on virtual cores of the CPU: its own files, ONNX files, and modules, which are converted.

Lives here: converting, compiling, tensors in and out. Must not be here: what inputs have in common with other
runtimes' (graphs.py), who runs when.
"""

import functools
import logging
import os
import threading
from collections.abc import Hashable
from typing import Any

import torch

from aneuron.backends import Fault
from aneuron.backends.converting import Converted, converted, identity
from aneuron.backends.files import BESIDE, check_graph, has_external_data
from aneuron.backends.graphs import Held, Input, Sharing, Unreadable, VirtualCores, bind, file_identity, named, rows_of
from aneuron.errors import ShapeError

logger = logging.getLogger("aneuron")

_DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "boolean": torch.bool,
    **{f"{kind[0]}{bits}": getattr(torch, kind + str(bits)) for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}


_TAKES = "backend='openvino' takes an nn.Module, or the path of an OpenVINO (.xml) or ONNX (.onnx) file"


class OpenVinoBackend(VirtualCores):
    """Runs a model on virtual cores of the CPU with OpenVINO, compiled once for all of them, the weights there once.

    ``pip install 'aneuron[openvino]'``. The model is the path of an OpenVINO file (`.xml`, with its `.bin` beside it)
    or of an ONNX file, or an `nn.Module`. `cores` and `threads_per_core` are as for `CpuBackend`: None means as many
    cores as there are CPUs, and as many threads as CPUs are left for each. (OpenVINO makes no more of them than there
    are CPUs; cores beyond that wait for one another.)

    `precision`: what is computed in. "f32", the default, also where OpenVINO by itself would take bfloat16 without
    saying so; "bf16" is about twice as fast on CPUs that have it, and wrong in the third digit. On others OpenVINO
    computes in float32 whatever it is asked for, and a warning in the log says so. Inputs and outputs keep their types.

    *Modules* are converted at the start, by tracing them with `example_inputs`, which must be given: rows and lengths
    stay free, but what `forward` decides by values or sizes in Python is fixed. The result is therefore compared with
    the module's own, on the example and, where any number of rows will do, on twice its rows: where it differs by more
    than the precision explains the start fails with a `ValueError`, and the log says by how much it differs. The
    weights are copied; later changes of the module do not show (`swap` it for itself). Calls have the structure of
    `example_inputs`, and the same other arguments; outputs have the module's. It is converted as in `eval()`.

    *Files.* Positional arguments are the model's inputs in its order, keywords go by name. A Python number stands for
    an input of one element. A model with one output gives a tensor, one with several a dict of them by name. Where all
    inputs fix the same number of rows batches are padded to it, as with `batch_size`.

    *Types.* Dtypes must be those that the model declares: OpenVINO would cast silently. They, and sizes that it fixes,
    are checked; the call gets a `ShapeError` that lists the inputs. OpenVINO computes float64 as it does float32, and
    integers in 32 bits, those of 8 and 16 bits without wrapping around: inputs that do not fit 32 bits are a
    `ShapeError`, but what becomes too large within the model is wrong without a word.

    *Telemetry.* Whoever imports `openvino`, and so this backend when a model starts, has it report that to its maker
    over the network, from a forked process, unless ``opt_in_out --opt_out`` was run once, or the variable `CI` is
    `true`. Conversions, which OpenVINO reports by itself, are not reported here.

    Raises at the start: `ModuleNotFoundError` without OpenVINO; `ValueError` for a module without an example, for a
    file that OpenVINO does not read, with what it is, a damaged one, an unknown operator, and weights that are missing.
    An execution holds no GIL, and the process's other threads go on. Whatever it raises is blamed on the input.

    ``AsyncDataParallel(net, backend=OpenVinoBackend(precision="bf16"), example_inputs=x)``; ``backend="openvino"`` has
    the defaults, and "auto" is this backend for an OpenVINO file, and for an ONNX file without ONNX Runtime.

        >>> from aneuron import OpenVinoBackend
        >>> OpenVinoBackend(cores=2, precision="bf16")
        OpenVinoBackend(cores=2, threads_per_core=None, precision='bf16')
    """

    name = "openvino"
    recoverable = True
    preferred_rows = 32
    wants_example = True
    package, extra, title = "openvino", "openvino", "OpenVINO"

    def __init__(self, cores: int | None = None, threads_per_core: int | None = None, precision: str = "f32") -> None:
        super().__init__(cores, threads_per_core)
        if precision not in ("f32", "bf16"):
            raise ValueError(f"precision={precision!r}: expected 'f32' or 'bf16'")
        self._given = cores, threads_per_core, precision
        self._precision = precision

    def __repr__(self) -> str:
        return "OpenVinoBackend(cores={}, threads_per_core={}, precision={!r})".format(*self._given)

    def compiled_rows(self, model: Any) -> int | None:
        """The rows that a file's inputs fix, if they do."""
        if isinstance(model, torch.nn.Module):
            return None
        check_graph(model, ("onnx", "openvino"), _TAKES)
        return rows_of(_inputs(_read(model)))

    def load(self, model: Any, core_id: int, batch_size: int | None, *, example: Any = None) -> "OpenVinoCore":
        """Compile the model, unless another core has."""
        threads, cores = self._cpu.threads(), len(self._cpu.cores())
        settings = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else it rounds the activations of quantized layers to 8 bits
            # A stream for each core: two streams have the weights once, two compiled models twice, and are no faster
            # (six layers of 1,536, two shared CPUs). Bound to CPUs, as by default, two streams do 159 to 173
            # executions/s in place of 207: other processes may be bound to the same ones.
            "NUM_STREAMS": cores,
            "INFERENCE_NUM_THREADS": cores * threads,
            "ENABLE_CPU_PINNING": False,
        }
        if isinstance(model, torch.nn.Module):
            made_of: Hashable = (batch_size, *identity(model, example))
        else:
            check_graph(model, ("onnx", "openvino"), _TAKES)
            made_of = file_identity(model)
        key = (made_of, *settings.items())
        user = core_id, batch_size
        return OpenVinoCore(_compiled.take(key, user, lambda: _Graph(model, batch_size, example, settings)), user)

    def classify(self, error: BaseException) -> Fault:
        """A CPU does not fail alone: whatever the model raises is about its input."""
        return Fault.INPUT


class _Graph:
    """A compiled model, and how a call's arguments become its inputs, and its outputs what the caller gets."""

    def __init__(self, model: Any, batch_size: int | None, example: Any, settings: dict[str, Any]) -> None:
        self.given = model  # whose id is that of no other model while it is here
        self.of_module: Converted | None = None
        if isinstance(model, torch.nn.Module):
            graph, self.of_module = converted(model, example)
        else:
            graph = _read(model)
        self.inputs = _inputs(graph)
        try:
            self.compiled = _core().compile_model(graph, "CPU", settings)
        except Exception as error:
            raise Unreadable(model, "OpenVINO", error, "") from error
        self.names = [_name(each, f"output {n}") for n, each in enumerate(self.compiled.outputs)]
        if len(set(self.names)) < len(self.names):  # one tensor, several times
            self.names = [f"output {n}" for n in range(len(self.names))]
        asked, used = settings["INFERENCE_PRECISION_HINT"], self.compiled.get_property("INFERENCE_PRECISION_HINT")
        if used.get_type_name() != asked:
            logger.warning(
                "precision=%r: OpenVINO computes in %s, which is all that this CPU has", asked, used.get_type_name()
            )
        if self.of_module is not None:
            self.of_module.check(_Request(self.compiled).run, batch_size is None, asked)

    def execute(self, request: "_Request", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        of_module = self.of_module
        tensors = bind(self.inputs, args, kwargs) if of_module is None else of_module.leaves(args, kwargs, self.inputs)
        for each, tensor in zip(self.inputs, tensors, strict=True):
            _check_range(each, tensor)
        outputs = request.run(*tensors)
        return named(outputs, self.names) if of_module is None else of_module.output(outputs)


class _Request:
    """What runs a compiled model, for one thread."""

    def __init__(self, compiled: Any) -> None:
        self._request, self._outputs = compiled.create_infer_request(), len(compiled.outputs)
        self._inputs: list[Any] = []  # OpenVINO does not hold what it reads, and an output may be an input's memory

    def run(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Outputs in memory that the next run overwrites."""
        self._inputs = [_to_openvino(tensor) for tensor in tensors]
        for index, tensor in enumerate(self._inputs):
            self._request.set_input_tensor(index, tensor)
        self._request.infer(share_outputs=True)
        return [_to_torch(self._request.get_output_tensor(index)) for index in range(self._outputs)]


_compiled: Sharing[_Graph] = Sharing()


class OpenVinoCore:
    """A virtual core: the right to a stream of a compiled model."""

    concurrent = False

    def __init__(self, held: Held[_Graph], user: tuple[int, int | None]) -> None:
        self._held: Held[_Graph] | None = held
        self._user = user
        self._local = threading.local()

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model. Each thread has a request of its own, whose next run overwrites the outputs of this one:
        by then they have been copied out, as those of any core.
        """
        assert self._held is not None
        graph = self._held.graph
        if not hasattr(self._local, "request"):
            self._local.request = _Request(graph.compiled)
        return graph.execute(self._local.request, args, kwargs)

    def close(self) -> None:
        """Let the weights go; with the last core's they are freed."""
        if self._held is not None:
            _compiled.leave(self._held, self._user)
        self._held, self._local = None, threading.local()


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _read(model: Any) -> Any:
    """The graph in a file."""
    path = os.fspath(model)
    try:
        return _core().read_model(path)
    except Exception as error:
        text, hint = str(error), ""
        if "weights" in text or "bin file" in text or has_external_data(path):
            hint = BESIDE
        elif "pugi" in text or "Unable to read the model" in text:  # the one reads XML
            hint = " (the file is damaged or incomplete)"
        raise Unreadable(model, "OpenVINO", error, hint) from error


def _inputs(graph: Any) -> list[Input]:
    found = []
    for index, each in enumerate(graph.inputs):
        kind, shape = each.get_element_type().get_type_name(), each.get_partial_shape()
        sizes = [dim.get_length() if dim.is_static else None for dim in shape] if shape.rank.is_static else None
        found.append(
            Input(_name(each, f"input {index}"), kind, _DTYPES.get(kind), None if sizes is None else tuple(sizes))
        )
    return found


def _name(port: Any, default: str) -> str:
    """The name of an input or output in its file; a tensor may have several, of what was between it and its node."""
    names, own = port.get_names(), port.get_node().get_friendly_name().removesuffix("/sink_port_0")
    return own if own in names else min(names, default=default)


def _check_range(given: Input, tensor: torch.Tensor) -> None:
    """Raise `ShapeError` for integers that OpenVINO would cut to 32 bits without a word."""
    if tensor.dtype in (torch.int64, torch.uint64) and tensor.numel():
        array = tensor.numpy(force=True)
        for value in (int(array.min()), int(array.max())):
            if not -(2**31) <= value < 2**31:
                raise ShapeError(
                    f"{value} is given for {given}, and OpenVINO computes integers in 32 bits; pass numbers that fit "
                    "them, or use another backend"
                )


def _to_openvino(tensor: torch.Tensor) -> Any:
    """The same memory, if it lies in order."""
    import openvino

    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype is torch.bfloat16:  # which NumPy does not know
        bits = tensor.view(torch.int16).numpy()
        return openvino.Tensor(bits, openvino.Shape(list(tensor.shape)), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


def _to_torch(tensor: Any) -> torch.Tensor:
    """The same memory."""
    if tensor.element_type.get_type_name() == "bf16":  # as NumPy it claims to be float16, with other numbers
        return torch.from_numpy(tensor.data.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(tensor.data)
