"""`trace`, and what is done with a traced module before it runs: options, separate weights, files.

Lives here: the module around the op, the patched `torch.jit.load` and `save`. Must not be here: what happens on cores
(compiled.py), which cores (placement.py).
"""

import io
import os
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from doubles.compiled import ASYNC, DYNAMIC, LAZY, MAGIC, Compiled, checked, models, parts, unpatched_load
from doubles.hardware import machine
from doubles.nesting import flatten, rebuild, tensors

# Put into the code of a saved file, so that torch without the Neuron packages refuses it as it refuses a real one.
CLASS_LINE = b"  neff : __torch__.torch.classes.neuron.Model\n"
SCRIPT_MODULES = (torch.jit.ScriptModule, torch.jit.RecursiveScriptModule)  # each has the methods of its own
unpatched_save = torch.jit.ScriptModule.save
unpatched_save_to_buffer = torch.jit.ScriptModule.save_to_buffer


class NeuronModule(torch.nn.Module):
    """What is traced: the inputs and the weights go flat to the op, its outputs get their structure back."""

    def __init__(self, compiled: Compiled, weights: Sequence[torch.Tensor], nesting: Any) -> None:
        super().__init__()
        content = bytearray(bytes(3) + MAGIC + pickle.dumps(compiled))
        self.register_buffer("model", torch.frombuffer(content, dtype=torch.uint8).clone())
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(each.clone(), requires_grad=False) for each in weights)
        self._nesting = nesting

    def forward(self, *args: Any) -> Any:
        flat = checked(torch.ops.neuron.forward_v2([*tensors(args), *self.weights], self.model))
        return rebuild(self._nesting, flat)


class _Example:
    """The device's side while the module around the op is traced: tracing needs no device."""

    def __init__(self, outputs: Sequence[torch.Tensor]) -> None:
        self.outputs = len(outputs)
        self._outputs = outputs

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [output.clone() for output in self._outputs]


def compile_model(func: Callable[..., Any], example_inputs: Any, inline_weights: bool, flags: Sequence[str]) -> Any:
    """A traced module for the shapes and dtypes of the example."""
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    leaves: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    nesting = flatten(args, leaves)
    with torch.no_grad():
        graph = torch.jit.trace(func, args, strict=False, check_trace=False)
        answer = flatten(graph(*args), outputs)
    weights = {} if inline_weights or not isinstance(func, torch.nn.Module) else func.state_dict()
    module = NeuronModule(
        Compiled(
            graph=unpatched_save_to_buffer(graph),
            shapes=[tuple(leaf.shape) for leaf in leaves],
            dtypes=[leaf.dtype for leaf in leaves],
            inputs=nesting,
            first=[next(j for j, other in enumerate(leaves) if other is leaf) for leaf in leaves],
            outputs=len(outputs),
            weights=list(weights),
            cores=_flag(flags, "--neuroncore-pipeline-cores", 1),
            lnc=_flag(flags, "--lnc", 0) or _flag(flags, "--logical-nc-config", 0) or machine.config.lnc,
            family=machine.config.family,
        ),
        list(weights.values()),
        answer,
    )
    module.model._device_side = _Example(outputs)
    with torch.no_grad():
        traced = torch.jit.trace(module.eval(), args, strict=False, check_trace=False)
    del traced.model._device_side
    return traced


def _flag(flags: Sequence[str], name: str, default: int) -> int:
    match = re.search(rf"{name}[=\s]+(\d+)", " ".join(flags))
    return int(match[1]) if match else default


def trace(
    func: Callable[..., Any],
    example_inputs: Any,
    *,
    input_output_aliases: dict[Any, int] | None = None,
    compiler_workdir: str | os.PathLike[str] | None = None,
    compiler_args: str | list[str] | None = None,
    partitioner_config: Any = None,
    inline_weights_to_neff: bool = True,
    cpu_backend: bool = False,
) -> Any:
    if input_output_aliases or cpu_backend:
        raise NotImplementedError("the double has neither input_output_aliases nor cpu_backend")
    if compiler_args is None:
        compiler_args = os.environ.get("NEURON_CC_FLAGS", "")
    flags = compiler_args.split() if isinstance(compiler_args, str) else compiler_args
    return compile_model(func, example_inputs, inline_weights_to_neff, flags)


def _set_option(trace: Any, which: int, enable: bool) -> Any:
    for part in parts(trace):
        part.model.untyped_storage()[which] = int(enable)  # also where the buffer is an inference tensor
    return trace


def dynamic_batch(neuron_trace: Any, enable: bool = True) -> Any:
    return _set_option(neuron_trace, DYNAMIC, enable)


def lazy_load(trace: Any, enable_lazy_load: bool = True) -> Any:
    return _set_option(trace, LAZY, enable_lazy_load)


def async_load(trace: Any, enable_async_load: bool = True) -> Any:
    return _set_option(trace, ASYNC, enable_async_load)


def replace_weights(neuron_trace: Any, weights: torch.nn.Module | dict[str, torch.Tensor]) -> None:
    state = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
    for part, model in zip(parts(neuron_trace), models(neuron_trace), strict=True):
        if not model.compiled.weights:
            warnings.warn("The weights of this model are part of its NEFF and cannot be replaced", stacklevel=2)
        for name, parameter in zip(model.compiled.weights, part.weights.parameters(), strict=True):
            if name in state:
                parameter.data.copy_(state[name])


def move_trace_to_device(trace: Any, device_id: int) -> None:
    """Moves the weights, not the model; leaves the process's default core changed, as the real one does."""
    machine.start()
    machine.default = (device_id, -1)
    for model in models(trace):
        model.weights_on = device_id


# Files.


def _rewrite(reader: Any, change: Callable[[bytes], bytes]) -> bytes:
    """A TorchScript file with other code; torch's own reader and writer."""
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    for name in reader.get_all_records():
        if name not in ("version", "byteorder", ".data/serialization_id"):  # the writer's own
            record = reader.get_record(name)
            record = change(record) if name.endswith(".py") else record
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return file.getvalue()


def _marked(code: bytes) -> bytes:
    return re.sub(rb"^class \w+\(Module\):\n", rb"\g<0>" + CLASS_LINE, code, flags=re.M)


def save_to_buffer(module: Any, *args: Any, **kwargs: Any) -> bytes:
    content = unpatched_save_to_buffer(module, *args, **kwargs)
    return _rewrite(torch._C.PyTorchFileReader(io.BytesIO(content)), _marked) if parts(module) else content


def save(module: Any, f: str | os.PathLike[str], **kwargs: Any) -> None:
    with open(f, "wb") as file:
        file.write(save_to_buffer(module, **kwargs))


def load(f: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.jit.load`, at the end of which the model is on its core."""
    try:
        reader = torch._C.PyTorchFileReader(os.fspath(f) if isinstance(f, os.PathLike) else f)
        ours = any(CLASS_LINE in reader.get_record(name) for name in reader.get_all_records() if name.endswith(".py"))
    except Exception:  # no TorchScript file: torch says so
        ours = False
    if not isinstance(f, (str, os.PathLike)):
        f.seek(0)
    module = unpatched_load(
        io.BytesIO(_rewrite(reader, lambda code: code.replace(CLASS_LINE, b""))) if ours else f, *args, **kwargs
    )
    for model in models(module):
        model.on_jit_load()
    return module


def install() -> None:
    _patch(load, save, save_to_buffer)


def uninstall() -> None:
    _patch(unpatched_load, unpatched_save, unpatched_save_to_buffer)


def _patch(load: Any, save: Any, save_to_buffer: Any) -> None:
    torch.jit.load = load
    for module in SCRIPT_MODULES:
        module.save, module.save_to_buffer = save, save_to_buffer
