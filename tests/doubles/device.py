"""TorchNeuron's device: tensors on `neuron:i`, each a CPU tensor that the host may see when the core has got there.

The device type is torch's PrivateUse1, which keeps its name for the rest of the process. Needs what torch has for
backends written in Python (`available`). Must not be here: time (streams.py).
"""

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from doubles.hardware import failure, machine
from doubles.streams import api

available = hasattr(torch._C, "_acc") and hasattr(torch._C._acc, "register_python_privateuseone_device_guard")
unpatched_compile = torch.compile
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other}
SHAPES = 8  # that a compiled function may see, as torch's recompile limit
_thread = threading.local()
_compiled: dict[int, tuple[Any, set[Any]]] = {}


class NeuronTensor(torch.Tensor):
    """A tensor on `neuron:i`; `host` is its value."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor, index: int) -> "NeuronTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device("neuron", index),
        )
        tensor.host = host
        return tensor

    def __repr__(self, *_: Any) -> str:
        return f"tensor({self.host}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COPIES:
            return _copy(func, *args, **kwargs)
        if func is aten.copy_.default:
            return _copy_into(*args, **kwargs)
        if func is aten._has_compatible_shallow_copy_type.default:
            return False  # so that `Module.to` makes new parameters
        if func is aten._local_scalar_dense.default:
            _break_graph()
            api.synchronize(args[0].device)
            return args[0].host.item()
        tensors: list[torch.Tensor] = []
        tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
        devices = {tensor.device for tensor in tensors if isinstance(tensor, NeuronTensor) or tensor.dim()}
        if len(devices) > 1:
            names = " and ".join(sorted(map(str, devices)))
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {names}!"
            )
        (device,) = devices
        host_args, host_kwargs = tree_map_only(NeuronTensor, lambda tensor: tensor.host, (args, kwargs))
        if "device" in host_kwargs:
            host_kwargs["device"] = torch.device("cpu")
        output = func(*host_args, **host_kwargs)
        if not func.is_view and func is not aten.detach.default:
            _launch(device.index, str(func), tensors[0].shape[0] if tensors[0].dim() else 1)
        if func._schema.name.endswith("_"):
            return args[0]
        return tree_map_only(torch.Tensor, lambda tensor: on_device(tensor, device.index), output)


def on_device(host: torch.Tensor, index: int) -> NeuronTensor:
    """Its memory is the device's until nothing refers to it."""
    core, storage = machine.core(index), host.untyped_storage()
    if not hasattr(storage, "_on_device"):
        size = storage._on_device = storage.nbytes()
        if core.used + size > machine.config.memory:
            raise failure(4, what="nrt_tensor_allocate")
        core.used += size
        weakref.finalize(storage, _free, core, size)
    return NeuronTensor(host, index)


def _free(core: Any, size: int) -> None:
    core.used -= size


def _launch(index: int, operation: str, rows: int) -> None:
    graph = getattr(_thread, "graph", None)
    if graph is None:
        api.queue(index).launch(operation, rows)
    else:
        graph.setdefault(index, rows)


def _copy(func: Any, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`to`, from a device."""
    named = {argument.name: value for argument, value in zip(func._schema.arguments[1:], args, strict=False)} | kwargs
    other = named.pop("other", None)
    device = torch.device(named.pop("device", None) or (other.device if other is not None else source.device))
    dtype = named.get("dtype") or (other.dtype if other is not None else source.dtype)
    if (
        device == source.device
        and dtype == source.dtype
        and func is not aten._to_copy.default
        and not named.get("copy")
    ):
        return source
    assert isinstance(source, NeuronTensor)
    host = source.host.to(dtype, copy=True)
    if device.type == "neuron":
        return on_device(host, api.index(device))
    return _copy_into(torch.empty_like(host), source, bool(named.get("non_blocking")))


def _copy_into(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """To a device through a bounce buffer, so the source is free at once; to the host later, if nobody waits for it."""
    if isinstance(target, NeuronTensor):
        target.host.copy_(source.host if isinstance(source, NeuronTensor) else source)
        return target
    assert isinstance(source, NeuronTensor)
    value = source.host.detach().clone()
    queue = api.queue(source.device)
    queue.deliver(lambda: _arrive(target, value))
    if non_blocking:
        target.fill_(float("nan") if target.is_floating_point() else -1 if target.dtype.is_signed else 1)
    else:
        queue.synchronize()
    return target


def _arrive(target: torch.Tensor, value: torch.Tensor) -> None:
    with torch.inference_mode():  # which may write to any tensor
        target.copy_(value)


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> NeuronTensor:
    return on_device(torch.empty(size, dtype=dtype), api.index(device))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> NeuronTensor:
    return on_device(torch.empty_strided(size, stride, dtype=dtype), api.index(device))


class FailOnRecompileLimitHit(Exception):
    """As torch._dynamo.exc has it, which takes a second to import."""


class CompiledGraph(torch.nn.Module):
    """`torch.compile(..., backend="neuron")`: one launch a call, and a compilation for each shape.

    Compilations are kept by the code that they are of, whichever module it belongs to, and whoever has called
    `torch.compile`: beyond the limit the call runs op by op, or raises where the whole is to be one graph.
    """

    def __init__(self, function: Callable[..., Any], fullgraph: bool, dynamic: bool | None) -> None:
        super().__init__()
        self._orig_mod = function
        self._fullgraph, self._dynamic = fullgraph, dynamic

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._dynamic:
            raise RuntimeError("Dynamic shapes detected in the model, but torch-neuronx requires static shapes. ")
        known = _known_to(self._orig_mod)
        tensors: list[torch.Tensor] = []
        tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
        what = tuple((tuple(each.shape), each.dtype, each.device) for each in tensors)
        if what not in known and len(known) >= SHAPES:
            text = f"torch._dynamo hit config.recompile_limit ({SHAPES})"
            if self._fullgraph:
                raise FailOnRecompileLimitHit(text)
            logging.getLogger("torch._dynamo").warning(text)
            return self._orig_mod(*args, **kwargs)
        _thread.graph, _thread.fullgraph = graph, _ = {}, self._fullgraph
        try:
            output = self._orig_mod(*args, **kwargs)
        finally:
            _thread.graph = None
        known.add(what)
        _launch_graph(graph)
        return output


def _known_to(function: Any) -> set[Any]:
    """What has been compiled of a function's code. By the identity of the code: equal copies are others to Dynamo."""
    code = (type(function).forward if isinstance(function, torch.nn.Module) else function).__code__
    return _compiled.setdefault(id(code), (code, set()))[1]


def _launch_graph(graph: dict[int, int]) -> None:
    for index, rows in graph.items():
        api.queue(index).launch("graph", rows)
    graph.clear()


def _break_graph() -> None:
    """What only the host can go on from, within a graph."""
    if getattr(_thread, "graph", None) is None:
        return
    if _thread.fullgraph:
        raise RuntimeError("Unsupported Tensor.item() call with fullgraph=True: graph break")
    _launch_graph(_thread.graph)


def compile_(
    model: Any = None,
    *,
    backend: Any = "inductor",
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Any:
    if backend != "neuron":
        return unpatched_compile(model, backend=backend, mode=mode, fullgraph=fullgraph, dynamic=dynamic, **kwargs)
    if mode not in (None, "default"):
        logging.getLogger().warning(f"Neuron backend does not support mode='{mode}', falling back to default mode.")
    make = functools.partial(CompiledGraph, fullgraph=fullgraph, dynamic=dynamic)
    return make if model is None else make(model)


def install() -> None:
    api.reset(installed=True)
    _compiled.clear()
    if torch._C._get_privateuse1_backend_name() != "neuron":
        _register()
    torch.neuron, torch.compile = api, compile_


def uninstall() -> None:
    api.reset(installed=False)
    torch.compile = unpatched_compile


def _register() -> None:
    """Once for the process."""
    from torch.utils import backend_registration

    class Hooks(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return api.is_available()

        def has_primary_context(self, device: int) -> bool:
            return api.is_initialized()

        def is_built(self) -> bool:
            return True

    backend_registration._setup_privateuseone_for_python_backend("neuron", backend_module=api, hook=Hooks())
    global _library
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("empty.memory_format", _empty, "PrivateUse1")
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
