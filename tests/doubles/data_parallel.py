"""The reference: `torch_neuronx.DataParallel` and the legacy `torch.neuron.DataParallel`.

With `machine.config.data_parallel_bugs` (the default) it does what the original does, wrong results included; without,
it gives right results for every batch size, dim and nesting.
"""

import copy
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch._utils import ExceptionWrapper

from doubles.hardware import machine
from doubles.nesting import flatten, rebuild
from doubles.placement import Runtime, set_neuron_cores
from doubles.tracing import dynamic_batch

logger = logging.getLogger("Neuron")


def parse_id(value: Any) -> int:
    if isinstance(value, str) and (match := re.search(r"nc:(\d+)", value)):
        return int(match[1])
    if isinstance(value, int):
        return value
    raise ValueError(f"Expected `nc:#` or an integer, but got: {value}")


class DataParallel(torch.nn.Module):
    always_copies = False  # legacy: one module for each core, whatever the ids

    def __init__(
        self,
        module: torch.nn.Module,
        device_ids: Sequence[int | str] | None = None,
        dim: int = 0,
        set_dynamic_batching: bool = True,
    ) -> None:
        super().__init__()
        self.module, self.dim, self.split_size = module, dim, -1
        self.set_dynamic_batching = set_dynamic_batching
        self.dynamic_batching_failed = False
        if not set_dynamic_batching or dim != 0:
            why = "it was not asked for" if not set_dynamic_batching else f"dim={dim} is not 0"
            logger.info("Automatic dynamic batching is off: %s", why)
        dynamic_batch(module, set_dynamic_batching and dim == 0)
        if device_ids is None:
            count = Runtime().get_nc_count()
            if count == -1:
                raise RuntimeError(
                    "The Neuron runtime cannot be initialized, and the number of NeuronCores cannot be determined"
                )
            device_ids = range(count)
        self.device_ids = sorted(parse_id(each) for each in device_ids)
        self._load()

    def disable_dynamic_batching(self) -> None:
        self.set_dynamic_batching = False
        dynamic_batch(self.module, False)
        self._load()

    def _load(self) -> None:
        ids = self.device_ids
        self.loaded_modules = [self.module]
        try:
            if ids == list(range(ids[0], ids[0] + len(ids))) and not self.always_copies:
                set_neuron_cores(self.module, ids[0], len(ids))
            else:
                self.loaded_modules += [copy.deepcopy(self.module) for _ in ids[1:]]
                for module, core in zip(self.loaded_modules, ids, strict=True):
                    set_neuron_cores(module, core, 1)
        except ValueError as error:  # also what a wrong number of cores raises
            self.dynamic_batching_failed = True
            logger.warning("Automatic dynamic batching failed due to %s", error)
            logger.warning("Call disable_dynamic_batching() before running inference")
        self.num_workers = 2 * (len(self.loaded_modules) if machine.config.data_parallel_bugs else len(ids))

    def forward(self, *inputs: Any) -> Any:
        if self.dynamic_batching_failed and self.set_dynamic_batching:
            raise RuntimeError(
                "Automatic dynamic batching must be disabled before running inference: call disable_dynamic_batching()"
            )
        scatter = self._scatter if machine.config.data_parallel_bugs else self._scatter_rightly
        chunks = scatter(inputs) or [()]
        if len(chunks) % len(self.device_ids) != 0:
            warnings.warn(
                f"The NeuronCores are not being fully utilized: {len(chunks)} chunks for {len(self.device_ids)} cores",
                stacklevel=2,
            )
        return self._gather(self._run(chunks))

    # Into chunks.

    def _bounds(self, rows: int) -> list[tuple[int, int]]:
        if self.split_size != -1:
            count = -(-rows // self.split_size)
            return [(i * self.split_size, (i + 1) * self.split_size) for i in range(count)]
        cores = len(self.device_ids)
        q, r = divmod(rows, cores)
        return [(i * q + min(i, r), (i + 1) * q + min(i + 1, r)) for i in range(cores if q else r)]

    def _scatter(self, value: Any) -> list[Any]:
        """As the original: each leaf by itself, then zipped, so that the leaf with the fewest chunks decides."""
        if isinstance(value, torch.Tensor):
            rows = value.shape[self.dim]
            if self.dim == 0:
                return [value[begin:end] for begin, end in self._bounds(rows)]
            steps = rows // len(self.device_ids) if self.split_size == -1 else self.split_size
            return [  # BUG: not all indices where a chunk has one row more, and indices past the end in the last one
                value.index_select(self.dim, torch.linspace(begin, end - 1, steps=steps).long())
                for begin, end in self._bounds(rows)
            ]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return [type(value)(*each) for each in zip(*map(self._scatter, value), strict=False)]
        if isinstance(value, (tuple, list)) and value:
            return [type(value)(each) for each in zip(*map(self._scatter, value), strict=False)]
        if isinstance(value, dict) and value:
            columns = zip(*map(self._scatter, value.values()), strict=False)
            return [type(value)(zip(value, each, strict=True)) for each in columns]
        raise UnboundLocalError("BUG: as often as there are chunks, which only a tensor could count")

    def _scatter_rightly(self, inputs: tuple[Any, ...]) -> list[Any]:
        leaves: list[Any] = []
        nesting = flatten(inputs, leaves)
        sizes = [leaf.shape[self.dim] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()]
        rows = max(sizes, default=0)
        if any(size not in (1, rows) for size in sizes):
            raise ValueError(f"the inputs have {sorted(set(sizes))} rows in dim {self.dim}: expected one number, or 1")
        if self.split_size < 1 and self.split_size != -1:
            raise ValueError(f"split_size={self.split_size}: expected -1 or at least 1")

        def cut(leaf: Any, begin: int, end: int) -> Any:
            if not isinstance(leaf, torch.Tensor) or not leaf.dim() or leaf.shape[self.dim] != rows:
                return leaf
            return leaf.narrow(self.dim, begin, min(end, rows) - begin)

        bounds = self._bounds(rows) or [(0, rows)]
        return [rebuild(nesting, [cut(leaf, *each) for leaf in leaves]) for each in bounds]

    # On cores.

    def _run(self, chunks: list[Any]) -> list[Any]:
        results: dict[int, Any] = {}

        def work(i: int, call: Callable[..., Any], chunk: Any) -> None:
            try:
                results[i] = call(*chunk) if isinstance(chunk, (list, tuple)) else call(chunk)
            except Exception:
                results[i] = ExceptionWrapper(where=f"on neuroncore {i}")

        modules = self.loaded_modules
        if self.always_copies and (len(chunks) == 1 or len(modules) == 1):
            for i, chunk in enumerate(chunks):
                work(i, modules[i % len(modules)], chunk)
        else:
            with ThreadPoolExecutor(self.num_workers) as pool:
                for i, chunk in enumerate(chunks):
                    pool.submit(work, i, modules[i % len(modules)], chunk)
        outputs = [results[i] for i in range(len(chunks))]
        for output in outputs:
            if isinstance(output, ExceptionWrapper):
                output.reraise()
        return outputs

    # Out of chunks.

    def _gather(self, outputs: list[Any]) -> Any:
        first = outputs[0]
        if isinstance(first, torch.Tensor):
            if self.dim == 0 and all(output.dim() == 0 for output in outputs):
                warnings.warn("The model returns scalar outputs, which cannot be gathered by rows", stacklevel=2)
                return torch.stack(outputs)
            if self.dim != 0 or not machine.config.data_parallel_bugs:
                return torch.cat(outputs, self.dim)
            whole = torch.empty((sum(output.shape[0] for output in outputs), *first.shape[1:]), dtype=first.dtype)
            begin = 0
            for output in outputs:
                whole[begin : begin + output.shape[0]] = output
                begin += output.shape[0]
            return whole
        if first is None:
            return None
        if isinstance(first, dict):
            if any(len(output) != len(first) for output in outputs):
                raise ValueError("All dicts must have the same number of keys")
            return type(first)((key, self._gather([output[key] for output in outputs])) for key in first)
        if isinstance(first, tuple) and hasattr(first, "_fields"):
            return type(first)._make(map(self._gather, zip(*outputs, strict=False)))
        return type(first)(map(self._gather, zip(*outputs, strict=False)))
