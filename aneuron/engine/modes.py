"""What of torch's state belongs to a worker thread, and is put back when a model has left it changed.

Lives here: which modes there are, how one is put back, and the contexts that executions run in. Must not be here: what
runs when.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import Context
from typing import Any

import torch

from aneuron.backends import Core

# Looked up once: they are asked for each execution.
_length = torch._C._len_torch_function_stack  # of the modes, of which a default device is one
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_dtype = torch.get_default_dtype
_grad = torch.is_grad_enabled
_set_grad = torch._C._set_grad_enabled
_inference = torch.is_inference_mode_enabled
_kept: list[object] = []  # guards that would undo themselves if they were let go


class Modes:
    """The modes of the calling thread as they are to be before each execution: gradients and autocast off, the rest as
    it is now.

    The default dtype is the process's: it is put back if it has changed while an execution ran, whoever has done it.
    """

    __slots__ = ("_autocast", "_cache", "_depth", "_dtype")

    def __init__(self) -> None:
        torch.set_grad_enabled(False)
        self._autocast = torch.get_autocast_dtype("cpu")
        self._cache = torch.is_autocast_cache_enabled()
        self._depth = _length()
        self._dtype = torch.get_default_dtype()

    def note(self) -> None:
        """An execution begins."""
        self._dtype = _dtype()

    def restore(self) -> None:
        """An execution has ended. Costs a microsecond or two where nothing has changed."""
        if _grad():
            _set_grad(False)
        if _dtype() is not self._dtype:
            torch.set_default_dtype(self._dtype)
        if _length() > self._depth:
            self._leave_functions()
        if _inference():
            guard = torch.inference_mode(False)
            guard.__enter__()
            _kept.append(guard)
        if _is_any_autocast_enabled():
            self._leave_autocast()

    def _leave_functions(self) -> None:
        """Take away the default device, and other modes that are around functions of torch."""
        torch.set_default_device(None)
        while _length() > self._depth:
            torch.overrides._pop_mode()  # type: ignore[no-untyped-call]

    def _leave_autocast(self) -> None:
        for kind in ("cpu", "cuda"):
            torch.set_autocast_enabled(kind, False)
        torch.set_autocast_dtype("cpu", self._autocast)
        torch.set_autocast_cache_enabled(self._cache)
        torch.clear_autocast_cache()  # of weights: nobody else would, where a context was never left
        for _ in range(torch.autocast_increment_nesting()):
            torch.autocast_decrement_nesting()


class Aside:
    """Around what is executed on a thread that is not ours: its modes are put aside, and put back. Not for two at once.

    Costs about a microsecond where gradients are all that is on.
    """

    __slots__ = ("_grad", "_modes", "_stack")

    def __init__(self) -> None:
        self._modes: Modes | None = None
        self._stack: ExitStack | None = None
        self._grad = False

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *error: object) -> None:
        self.end()

    def begin(self) -> None:
        """Put the thread's modes aside."""
        self._stack = _set_aside() if _length() or _inference() or _is_any_autocast_enabled() else None
        self._grad = _grad()
        if self._modes is None:
            self._modes = Modes()
        elif self._grad:
            _set_grad(False)
        self._modes.note()

    def end(self) -> None:
        """Put them back."""
        assert self._modes is not None
        self._modes.restore()
        if self._grad:
            _set_grad(True)
        if self._stack is not None:
            self._stack.close()


def _set_aside() -> ExitStack:
    """Set the rarer modes of the calling thread aside; what puts them back."""
    stack = ExitStack()
    if _length():
        functions = [torch.overrides._pop_mode() for _ in range(_length())]  # type: ignore[no-untyped-call]
        for mode in functions:  # called in the reverse order
            stack.callback(torch.overrides._push_mode, mode)
    if _inference():
        stack.enter_context(torch.inference_mode(False))
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            torch.set_autocast_enabled(kind, False)
            stack.callback(torch.set_autocast_enabled, kind, True)
    return stack


_local = threading.local()  # a worker thread's modes


def keep() -> Modes:
    """Keep the modes of the calling thread, which executes from now on."""
    _local.modes = modes = Modes()
    return modes


def of_this_thread() -> Modes | None:
    """The calling thread's modes, where it keeps any."""
    return getattr(_local, "modes", None)


def put_back() -> None:
    """Put the calling thread's modes back, where it has any: a model may have left them changed."""
    modes = of_this_thread()
    if modes is not None:
        modes.restore()


def execute_in_own(core: Core, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Execute, and put the thread's modes back."""
    modes = of_this_thread()  # puppets have none
    if modes is None:
        return core.execute(args, kwargs)
    modes.note()
    try:
        return core.execute(args, kwargs)
    finally:
        modes.restore()


class OwnContext:
    """A context to execute in, of which each thread has a copy: two cannot be in one. They end with this object."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._local = threading.local()

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Call a function in the calling thread's copy."""
        if not hasattr(self._local, "own"):
            self._local.own = self._context.copy()
        return self._local.own.run(fn, *args)


def same(one: Context, other: Context) -> bool:
    """Whether two contexts have the same values; these are not compared, which some would not have."""
    return len(one) == len(other) and all(other.get(name, one) is value for name, value in one.items())


class Within:
    """A core each of whose executions is in a context that the user makes."""

    def __init__(self, core: Core, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self.concurrent = core.concurrent
        self.close = core.close
        self._core, self._context = core, context

    def full(self) -> "Within":
        """The same in the model's own dtype, in the context too."""
        return Within(self._core.full(), self._context)  # type: ignore[attr-defined]

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model in the context. What entering and leaving it raise is like an error of the model."""
        with ExitStack() as stack:
            stack.enter_context(self._context())  # a bare `with` of what is none raises something else where compiled
            return self._core.execute(args, kwargs)
        raise RuntimeError("what context= has made suppressed an exception of the model: there is no result")
