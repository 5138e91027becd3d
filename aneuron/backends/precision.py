"""Half precision: a dtype to compute in that is not the model's own, and the way of tensors into it and back.

Lives here: what may be asked for, casting inputs and outputs, what CPUs compute natively. Must not be here: weights
(copies.py), comparing with full precision (engine/comparing.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from aneuron.arguments import is_finite
from aneuron.tensors.nested import Sealed, mapped

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # what PyTorch has CPU kernels for
OUTPUTS = ("as called", "as computed")


@dataclass(frozen=True, slots=True)
class Precision:
    """What cores compute in. `native`: whether the device has instructions for it; None: nobody knows."""

    dtype: torch.dtype
    outputs: Literal["as called", "as computed"] = "as called"
    min_cosine: float | None = None
    native: bool | None = None

    @property
    def name(self) -> str:
        """As users write it, without "torch."."""
        return str(self.dtype).removeprefix("torch.")

    def call(self, model: Callable[..., Any], own: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call what has weights of this dtype. `own`: the dtype of results where no input is floating."""
        called: list[torch.dtype] = []

        def down(leaf: torch.Tensor) -> torch.Tensor:
            if not leaf.is_floating_point():
                return leaf
            called.append(leaf.dtype)
            return leaf.to(self.dtype)

        try:
            args, kwargs = mapped((args, kwargs), down)
            output = model(*args, **kwargs)
        except Exception as error:
            error.add_note(f"aneuron: the model is computed in {self.name}, as dtype= of the backend says")
            raise
        back = max(called, key=_width, default=own)
        if self.outputs == "as computed" or back is self.dtype:
            return output
        try:
            return mapped(output, lambda leaf: leaf.to(back) if leaf.dtype is self.dtype else leaf)
        except Sealed:  # which is told where outputs are looked through
            return output


def precision_of(
    dtype: Any, outputs: Any, min_cosine: Any, native: Callable[[torch.dtype], bool | None] = lambda dtype: None
) -> Precision | None:
    """A backend's arguments, checked; None where no dtype is asked for."""
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs={outputs!r:.80}: expected 'as called' or 'as computed'")
    if min_cosine is not None and (not is_finite(min_cosine) or not -1 <= min_cosine <= 1):
        raise ValueError(f"min_cosine={min_cosine!r:.80}: expected a number up to 1, such as 0.999, or None")
    if dtype is None:
        if outputs != OUTPUTS[0] or min_cosine is not None:
            raise ValueError("outputs= and min_cosine= are about dtype=: pass dtype=torch.bfloat16, or leave them out")
        return None
    if dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise ValueError(f"dtype={dtype!r:.80}: expected one of {names}, or None for the model's own")
    return Precision(dtype, outputs, min_cosine, native(dtype))


def arguments_of(precision: Precision | None) -> dict[str, Any]:
    """What a backend was told to compute so, by the names of its arguments, without defaults."""
    said = {} if precision is None else {name: getattr(precision, name) for name in ("dtype", "outputs", "min_cosine")}
    return {name: value for name, value in said.items() if value not in (None, OUTPUTS[0])}


def cast(module: torch.nn.Module, dtype: torch.dtype | None) -> torch.nn.Module:
    """Cast a module that is nobody else's, in place: what of it is floating, and nothing complex. None: not at all."""
    if dtype is None:
        return module
    return module._apply(  # type: ignore[no-untyped-call,no-any-return]
        lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
    )


def is_native(dtype: torch.dtype) -> bool | None:
    """Whether this CPU has instructions that multiply in a dtype; None where PyTorch does not say."""
    flags = {
        torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
        torch.float16: ("amx_fp16", "avx512_fp16", "fp16_arith"),
    }.get(dtype)
    if flags is None:
        return True
    look = getattr(torch.cpu, "get_capabilities", None)  # from torch 2.10 or so on
    return None if look is None else any(look().get(flag) for flag in flags)


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize
