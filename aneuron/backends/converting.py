"""A module as an OpenVINO graph, and whether it still answers as the module does.

Lives here: tracing and translating, the structures on both sides, the comparison. Must not be here: compiling, cores.
"""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from aneuron.backends.graphs import Input, Unreadable, listed
from aneuron.backends.unwarned import unwarned
from aneuron.errors import ShapeError
from aneuron.tensors.nested import fill, walk

logger = logging.getLogger("aneuron")

Run = Callable[..., Sequence[torch.Tensor]]  # of a graph's inputs

_ALLOWED = {"f32": 1e-2, "bf16": 0.1}  # deviation, of the length of the output as a vector


class _Flat(nn.Module):
    """A module that takes its tensors one after the other, whatever they stand in, and returns them so."""

    def __init__(self, module: nn.Module, template: Any) -> None:
        super().__init__()
        self.module, self._template = module, template

    def forward(self, *leaves: torch.Tensor) -> tuple[Any, ...]:
        return tuple(_leaves(self.answer(leaves))[0])

    def answer(self, leaves: Sequence[torch.Tensor]) -> Any:
        """What the module returns."""
        args, kwargs = fill(self._template, iter(leaves))
        return self.module(*args, **kwargs)


class Converted:
    """What stands around a module's tensors, and the module, until it has been compared with what was made of it."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        template = args, dict(sorted(kwargs.items()))
        self._example, self._key = _leaves(template)
        self._flat: _Flat | None = _Flat(module, template)
        with _evaluating(module):
            self._output = self._flat.answer(self._example)

    def graph(self) -> Any:
        """The module as OpenVINO's. Rows and lengths are free in it."""
        # Not `openvino.convert_model`, which reports each conversion to its maker over the network unless told not to.
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        assert self._flat is not None
        with _evaluating(self._flat.module), unwarned():
            # With shared memory the compiled model follows some of the module's weights, those that it has not packed.
            decoder = TorchScriptPythonDecoder(self._flat, example_input=tuple(self._example), shared_memory=False)
            frontend = FrontEndManager().load_by_framework("pytorch")
            return frontend.convert(frontend.load(decoder))

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Sequence[Input]) -> list[torch.Tensor]:
        """A call's tensors, in the order of the inputs. Raises `ShapeError` for a structure unlike the example's."""
        leaves, key = _leaves((args, dict(sorted(kwargs.items()))))
        if key != self._key:
            raise ShapeError(
                f"the module was converted for {listed(inputs)}, which stand in example_inputs as they do not in this "
                "call, or with other arguments beside them"
            )
        return [each.tensor(leaf) for each, leaf in zip(inputs, leaves, strict=True)]

    def output(self, leaves: Sequence[torch.Tensor]) -> Any:
        """What the module would have returned."""
        return fill(self._output, iter(leaves))

    def check(self, run: Run, any_rows: bool, precision: str) -> None:
        """Raise `ValueError` if the graph does not answer as the module does: tracing fixes what Python decides."""
        assert self._flat is not None
        flat, self._flat = self._flat, None  # the module is the user's again
        worst = 0.0
        with _evaluating(flat.module):
            for leaves in self._inputs(any_rows):
                try:
                    answer = flat.answer(leaves)
                except Exception:
                    break  # the module itself does not take twice the rows
                expected, key = _leaves(answer)
                worst = max(worst, _deviation(run, leaves, expected))
                if key != _leaves(self._output)[1]:
                    raise ValueError(
                        f"{type(flat.module).__name__} returns something beside tensors that is not the same every "
                        "time, which cannot be converted for OpenVINO: return tensors only (use_cache=False, say)"
                    )
                if worst > _ALLOWED[precision] and _deviation(flat, leaves, expected) <= worst / 2:
                    raise ValueError(
                        f"converted for OpenVINO {type(flat.module).__name__} does not answer as in PyTorch: with "
                        f"{_shapes(leaves)} the deviation is {worst:.3g}. What its forward decides in Python by "
                        "values or sizes is fixed by tracing it with example_inputs: use tensor operations there, give "
                        "batch_size if the rows are fixed, or use backend='cpu'"
                    )
        logger.info(
            "%s is converted for OpenVINO, precision %s: its answer deviates by %.2g of its length at most",
            type(flat.module).__name__, precision, worst,
        )  # fmt: skip

    def _inputs(self, any_rows: bool) -> list[list[torch.Tensor]]:
        """The example, and twice its rows."""
        return [self._example] + [[torch.cat([x, x]) if x.ndim else x for x in self._example]] * any_rows


def identity(module: nn.Module, example: Any) -> tuple[Hashable, ...]:
    """Equal for conversions that give the same: of one module that nobody has written to as far as torch counts."""
    tensors = [*module.parameters(), *module.buffers()]
    writes = [0 if each.is_inference() else each._version for each in tensors]
    leaves, key = ([], []) if example is None else _leaves(example)
    return id(module), *map(id, tensors), *writes, *key, *((x.shape, x.dtype) for x in leaves)


def converted(module: nn.Module, example: Any) -> tuple[Any, Converted]:
    """A module as OpenVINO's graph. Raises `ValueError` where it cannot be one."""
    if example is None:
        raise ValueError(
            f"model={type(module).__name__}: OpenVINO converts a module by tracing it; pass example_inputs, or the "
            "path of an .onnx or .xml file"
        )
    if any(map(_drops_padding, module.modules())):
        raise ValueError(
            f"model={type(module).__name__} has an EmbeddingBag with padding_idx, which OpenVINO counts like any other "
            "row: use Embedding, mask and sum, or use backend='cpu'"
        )
    made = Converted(module, *example)
    try:
        return made.graph(), made
    except Exception as error:
        raise Unreadable(module, "OpenVINO", error, "") from error


def _drops_padding(module: nn.Module) -> bool:
    """Whether OpenVINO would answer otherwise where there is padding, which an example need not have."""
    if not isinstance(module, nn.EmbeddingBag) or module.padding_idx is None:
        return False
    return module.mode != "sum" or bool(module.weight[module.padding_idx].any())


def _leaves(value: Any) -> tuple[list[Any], list[Any]]:
    leaves: list[Any] = []
    key: list[Any] = []
    walk(value, leaves, key, [])
    return leaves, key


def _shapes(tensors: Sequence[torch.Tensor]) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _deviation(run: Any, tensors: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """How far outputs are from what was expected, at most, each as a part of its length; infinity for other shapes."""
    try:
        found = run(*tensors)
    except Exception as error:
        logger.info("the converted model does not take %s: %s", _shapes(tensors), error)
        return float("inf")
    if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in expected]:
        return float("inf")
    return max((_distance(x, y) for x, y in zip(found, expected, strict=True)), default=0.0)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    x, y = (each.double().nan_to_num(posinf=0.0, neginf=0.0) for each in (found, expected))
    return float((x - y).norm() / y.norm().clamp(min=1e-6))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Have a module in `eval()` meanwhile, as OpenVINO would leave it."""
    training = [each for each in module.modules() if getattr(each, "training", False)]
    for each in training:
        each.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for each in training:
            each.training = True
