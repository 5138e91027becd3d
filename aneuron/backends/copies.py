"""A module for each core: what a core may keep on itself in `forward` is its own, the weights are everybody's.

Lives here: what of a model is copied and what is shared, and what happens to one that cannot be copied. Must not be
here: devices, who runs when.
"""

import copy
import dis
import functools
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from aneuron.backends.exported import is_program
from aneuron.backends.unwarned import unwarned

# What need not be looked into for modules.
_LEAVES = (nn.Module, type, types.ModuleType, types.FunctionType, torch.Tensor, threading.Thread)
_lock = threading.Lock()  # around copies: two cores may load at once, and `deepcopy` of some modules writes to them


def own(model: Any, dtype: torch.dtype | None = None) -> Any:
    """What one core calls: a copy of the modules and buffers of `model` around the same parameters.

    With `dtype` what of both is floating is cast, the parameters once for all copies that are made of the same values.

    A module, a bound method of one, or a partial, an object or a closure that holds one is copied. What holds none is
    returned as it is: it may do anything, and several threads call it at once. What holds one and cannot be copied runs
    one execution at a time, on all cores and in all models of this process together, and a warning says why; with
    `dtype` it is a `ValueError`.
    """
    with _lock:
        module = next(_modules(model), None)
        if module is None:
            return model
        try:
            return _copied(model, dtype)
        except Exception as error:
            if dtype is not None:
                raise ValueError(
                    f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}), and so not be cast "
                    f"to {dtype}, since the one given stays as it is; pass a module that copy.deepcopy copies whole, "
                    "or cast it yourself and leave dtype= out"
                ) from error
            return functools.partial(_in_turn, _turn(module, error), model)


def own_dtype(model: Any) -> torch.dtype:
    """The floating dtype of a model: that of its first such parameter, else torch's default."""
    modules = [model] if is_program(model) else _modules(model)
    parameters = (parameter for module in modules for parameter in module.parameters())
    return next((each.dtype for each in parameters if each.is_floating_point()), torch.get_default_dtype())


def _copied(model: Any, dtype: torch.dtype | None) -> Any:
    """A copy with the parameters of the original; raises where there can be none that answers as it does."""
    if isinstance(model, types.FunctionType):
        return _rebuilt(model, dtype)
    modules = list(_modules(model))
    memo: dict[int, Any] = {}
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if torch.nn.parameter.is_lazy(parameter):
                raise ValueError(f"{name} of {type(module).__name__} is not initialised; call the module once before")
            memo[id(parameter)] = _cast_parameter(parameter, dtype)
        for buffer in module.buffers(recurse=False):
            if (cast := _cast(buffer, dtype)) is not buffer:
                memo[id(buffer)] = cast
        if module._compiled_call_impl is not None:
            raise ValueError(f"{type(module).__name__}.compile() is lost in a copy; pass torch.compile(module)")
        for value in () if isinstance(module, torch.jit.ScriptModule) else vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:  # as `nn.utils.weight_norm` leaves
                memo[id(value)] = _cast(value.detach(), dtype).clone()
    with unwarned():
        made = copy.deepcopy(model, memo)
    originals = set(map(id, modules))
    theirs = {id(module): module for module in _modules(made) if id(module) not in originals}
    _check_functions(made, type(made).__name__, memo, theirs)
    for module in theirs.values():
        for name, value in () if isinstance(module, torch.jit.ScriptModule) else vars(module).items():
            _check_functions(value, f"{type(module).__name__}.{name}", memo, theirs)
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule) and id(module) in memo:
            _share(module, memo[id(module)], dtype)
    if isinstance(model, torch.jit.ScriptModule):
        _share(model, made, dtype)
    return made


# By the original's id and the dtype. That the values are the same is looked up: the original may have been written to.
_casts: "weakref.WeakValueDictionary[tuple[int, torch.dtype], torch.Tensor]" = weakref.WeakValueDictionary()


def _cast_parameter(parameter: nn.Parameter, dtype: torch.dtype | None) -> torch.Tensor:
    """A parameter in a dtype, the same for all copies while its values are the same."""
    made = _cast(parameter.detach(), dtype)
    if dtype is None or made.dtype is parameter.dtype:
        return parameter
    found = _casts.get((id(parameter), dtype))
    if found is None or found.shape != made.shape or not torch.equal(found, made):
        found = _casts[id(parameter), dtype] = nn.Parameter(made, requires_grad=parameter.requires_grad)
    return found


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _rebuilt(function: types.FunctionType, dtype: torch.dtype | None) -> types.FunctionType:
    """A function whose closure has a copy of each module that it holds, and all else as it is."""
    cells = function.__closure__ or ()
    holding = [i for i, cell in enumerate(cells) if next(_modules(_content(cell)), None) is not None]
    copied = dict(zip(holding, _copied([_content(cells[i]) for i in holding], dtype), strict=True))
    closure = tuple(types.CellType(copied[i]) if i in copied else cell for i, cell in enumerate(cells))
    code, defaults = function.__code__, function.__defaults__
    made = types.FunctionType(code, function.__globals__, function.__name__, defaults, closure or None)
    made.__kwdefaults__ = function.__kwdefaults__
    if any(isinstance(each, nn.Module) for each in _reached(function, closure=False)):
        raise ValueError(f"the function {function.__qualname__} reaches a module by a global name or a default")
    return made


def _content(cell: types.CellType) -> Any:
    """What is in a cell; None where nothing is yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _share(script: torch.jit.ScriptModule, made: torch.jit.ScriptModule, dtype: torch.dtype | None) -> None:
    """Have the copy of a ScriptModule, which is made without Python's help, use the parameters of the original."""
    modules = script.named_modules(remove_duplicate=False), made.named_modules(remove_duplicate=False)
    for (_, of), (_, to) in zip(*modules, strict=True):
        for name, parameter in of.named_parameters(recurse=False):
            to._c.setattr(name, _cast_parameter(parameter, dtype))
        for name, buffer in to.named_buffers(recurse=False) if dtype is not None else ():
            to._c.setattr(name, _cast(buffer, dtype))


def _check_functions(value: Any, where: str, memo: dict[int, Any], theirs: dict[int, Any]) -> None:
    """Raise for a function on a module, a hook say, that reaches what has been copied: it would reach the original."""
    for function in _walk(value, objects=True):
        if not isinstance(function, types.FunctionType):
            continue
        for reached in _reached(function):
            if id(reached) in theirs:
                continue
            if isinstance(reached, nn.Module) or memo.get(id(reached), reached) is not reached:
                raise ValueError(
                    f"{where} holds {function.__qualname__}, which reaches the {type(reached).__name__} of the original"
                )


def _reached(function: types.FunctionType, closure: bool = True) -> Iterator[Any]:
    """What a function has at hand besides its arguments: closure, defaults, globals that it names."""
    given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    given += [_content(cell) for cell in (function.__closure__ or ()) * closure]
    for instruction in dis.get_instructions(function):
        if instruction.opname == "LOAD_GLOBAL" and instruction.argval in function.__globals__:
            given.append(function.__globals__[instruction.argval])
    for each in given:
        yield from _walk(each)


def _modules(value: Any) -> Iterator[nn.Module]:
    """The modules that a model is, or holds, at any depth."""
    seen: set[int] = set()
    for each in _held(value, nn.Module, functions=True):
        for module in each.modules():
            if id(module) not in seen:
                seen.add(id(module))
                yield module


def _held(value: Any, kind: type, functions: bool = False) -> Iterator[Any]:
    """What of a kind a value is or holds."""
    for each in _walk(value, objects=functions):
        if isinstance(each, kind):
            yield each
        elif functions and isinstance(each, types.FunctionType):
            yield from (reached for reached in _reached(each) if isinstance(reached, kind))


def _walk(value: Any, objects: bool = False) -> Iterator[Any]:
    """A value, and what it holds: in containers, methods, partials, closures; with `objects` also in attributes."""
    todo: list[Any] = [value]
    seen: set[int] = set()
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if isinstance(each, dict):
            todo += each.values()
        elif isinstance(each, (list, tuple, set, frozenset)):
            todo += each
        elif isinstance(each, types.MethodType):
            todo.append(each.__self__)
        elif isinstance(each, types.FunctionType):
            todo += [_content(cell) for cell in each.__closure__ or ()]
        elif isinstance(each, functools.partial):
            todo += (each.func, *each.args, *each.keywords.values())
        elif objects and not isinstance(each, _LEAVES):
            todo += getattr(each, "__dict__", {}).values()


class _Turn:
    """Whose turn it is to execute a module that all cores share."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module  # which keeps its id
        self.lock = threading.Lock()


_turns: "weakref.WeakValueDictionary[int, _Turn]" = weakref.WeakValueDictionary()  # by the module's id


def _turn(module: nn.Module, error: Exception) -> _Turn:
    """The turn of a module that cannot be copied."""
    turn = _turns.get(id(module))
    if turn is None:
        turn = _turns[id(module)] = _Turn(module)
        warnings.warn(
            f"{type(module).__name__} cannot be copied for each core ({type(error).__name__}: {error}): it runs one "
            "execution at a time, on all cores together. Pass a module that copy.deepcopy copies whole (keep locks, "
            "files and functions that reach it out of it, or give it a __deepcopy__), or CpuBackend(cores=1)",
            stacklevel=2,
        )
    return turn


def _in_turn(turn: _Turn, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    with turn.lock:
        return model(*args, **kwargs)
