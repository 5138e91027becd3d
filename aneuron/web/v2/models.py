"""The models that the protocol serves: what is told of each, and how a request becomes a call and its result.

Lives here: metadata, readiness, configuration, statistics, inference; as plain values, for HTTP and gRPC alike. Must
not be here: how requests are read (requests.py) and answers written (http.py, grpc.py).
"""

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from aneuron import AsyncDataParallel, Closed, OutputError, Signature, TensorSpec, View
from aneuron.web.checks import check_models
from aneuron.web.problems import logger
from aneuron.web.v2.datatypes import BYTES, Datatype, datatype, datatype_of
from aneuron.web.v2.errors import Refused
from aneuron.web.v2.requests import Inference, Remembered, Terms, rows_at

VERSION = "1"  # each model has one: what it was swapped for answers under the same
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics", "parameters")
Load = Callable[[str], Awaitable[None]]


class Result(NamedTuple):
    """An output of an answer."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    value: Any  # a tensor, or the elements of BYTES
    binary: bool


class Served:
    """One model under a name."""

    def __init__(self, name: str, model: AsyncDataParallel, declared: Signature | None = None) -> None:
        self.name, self.model = name, model
        self._declared = declared
        self._last = 0  # ms since 1970, of the last answer
        self._known: Signature | None = None
        self.remembered = Remembered()
        signature = self.signature
        if not signature.inputs:
            raise ValueError(
                f"{name}: nothing says what the model takes: give it example_inputs, or declare its signature"
            )
        for spec in signature.inputs:
            datatype_of(spec)

    @property
    def signature(self) -> Signature:
        """What it takes and returns, as far as it is known by now."""
        if self._known is not None:
            return self._known
        own = self.model.signature
        signature = own if self._declared is None else own.declared(self._declared)
        if own.outputs is not None:  # what the model itself returns is known, for good
            self._known = signature
            self.remembered.clear()  # what was asked for before could not be checked
        return signature

    async def infer(self, inference: Inference, view: View | AsyncDataParallel) -> list[Result]:
        """The outputs that a request asks for, in its order. Raises what the call raises, and `Refused`."""
        signature = self.signature
        if inference.empty:
            outputs = _nothing(signature)
        else:
            args, kwargs = signature.arguments(inference.values)
            if inference.terms != _USUAL:
                view = view.options(**inference.terms._asdict())
            output = await view(*args, **kwargs)
            outputs = self.signature.named(output)  # not that of before: the call may have started the model
        self._last = time.time_ns() // 1_000_000
        if inference.outputs is None:
            return [_result(name, value, inference.binary) for name, value in outputs]
        values = dict(outputs)
        missing = [wanted.name for wanted in inference.outputs if wanted.name not in values]
        if missing:
            raise Refused(400, f"the model has no output {missing[0]!r}; it has {', '.join(map(repr, values))}")
        return [_result(wanted.name, values[wanted.name], wanted.binary) for wanted in inference.outputs]

    def metadata(self) -> dict[str, Any]:
        """Its name, versions, inputs and outputs."""
        signature = self.signature
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": "aneuron",
            "inputs": list(map(_metadata, signature.inputs)),
            "outputs": list(map(_metadata, signature.outputs or ())),
        }

    def config(self) -> dict[str, Any]:
        """Triton's configuration of it, as far as there is such a thing here. Shapes have their rows in them."""
        signature = self.signature
        return {
            "name": self.name,
            "platform": "aneuron",
            "backend": "aneuron",
            "max_batch_size": 0,
            "input": [_config(spec) for spec in signature.inputs],
            "output": [_config(spec) for spec in signature.outputs or ()],
            "dynamic_batching": {},
        }

    def statistics(self) -> dict[str, Any]:
        """Triton's statistics: rows, executions, and for how long; of executions by size nothing is known."""
        now = self.model.statistics()
        calls, none = now.calls, _duration(0, 0.0)
        return {
            "name": self.name,
            "version": VERSION,
            "last_inference": self._last,
            "inference_count": sum(core.rows for core in now.cores),
            "execution_count": sum(core.batches for core in now.cores),
            "inference_stats": {
                "success": _duration(calls.completed, now.total_seconds.sum),
                "fail": _duration(calls.failed, 0.0),
                "queue": _duration(sum(now.queue_seconds.counts), now.queue_seconds.sum),
                "compute_input": none,
                "compute_infer": _duration(sum(now.device_seconds.counts), now.device_seconds.sum),
                "compute_output": none,
                "cache_hit": none,
                "cache_miss": none,
            },
            "batch_stats": [],
            "memory_usage": [],
            "response_stats": {},
        }


_USUAL = Terms()


class Models:
    """All that a server serves."""

    def __init__(
        self,
        door: Callable[..., Any],
        models: Mapping[str, AsyncDataParallel],
        signatures: Mapping[str, Signature] | None = None,
        load: Load | None = None,
    ) -> None:
        check_models(door, models)
        said = dict(signatures or {})
        if strangers := said.keys() - models.keys():
            raise LookupError(f"signatures={{{sorted(strangers)[0]!r}: ...}}: there is no such model; {list(models)}")
        self.served = {name: Served(name, model, said.get(name)) for name, model in models.items()}
        self._load = load
        self.draining = False  # no new requests, please; those that come are served all the same

    def find(self, name: str, version: str = "") -> Served:
        """The model of a name. Raises `Refused`."""
        served = self.served.get(name)
        if served is None:
            raise Refused(404, f"there is no model {name!r:.80}; there is {', '.join(map(repr, self.served))}")
        if version and version != VERSION:
            raise Refused(404, f"model {name!r} has no version {version!r:.40}; it has {VERSION!r}")
        return served

    def is_ready(self, name: str, version: str) -> bool:
        """Whether there is such a model, and it serves."""
        served = self.served.get(name)
        if served is None or version not in ("", VERSION):
            return False
        return served.model.ready and not self.draining

    @property
    def ready(self) -> bool:
        """Whether every model serves."""
        return all(self.is_ready(name, VERSION) for name in self.served)

    def metadata(self) -> dict[str, Any]:
        """What the server is."""
        return {"name": "aneuron", "version": version("aneuron"), "extensions": list(EXTENSIONS)}

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Of one model, or of all."""
        served: Iterable[Served] = [self.find(name, version)] if name else self.served.values()
        return {"model_stats": [each.statistics() for each in served]}

    def index(self, ready: bool = False) -> list[dict[str, str]]:
        """Which models there are, and whether each serves; or those that do."""
        said = {"state": "UNAVAILABLE", "reason": "draining" if self.draining else "not ready"}
        states = {name: self.is_ready(name, VERSION) for name in self.served}
        return [
            {"name": name, "version": VERSION, **({"state": "READY", "reason": ""} if serves else said)}
            for name, serves in states.items()
            if serves or not ready
        ]

    async def load(self, name: str) -> None:
        """Have a model loaded anew. Raises `Refused` where that is not allowed, or fails."""
        self.find(name)
        if self._load is None:
            raise Refused(403, "models are not loaded on request here")
        try:
            await self._load(name)
        except (Refused, Closed):
            raise
        except Exception as error:  # whatever loading, or a module that is imported, raises
            logger.exception("model %r was not loaded, and serves as before", name)
            why = str(error).strip().partition("\n")[0]  # more may be a traceback, with the server's paths
            raise Refused(400, f"model {name!r} was not loaded, and serves as before: {why}") from error

    def unload(self, name: str) -> None:
        """Models stay: who serves one decides when it ends."""
        self.find(name)
        raise Refused(501, "models are not unloaded on request")


def _metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": _datatype(spec).name, "shape": list(spec.shape)}


def _config(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": _datatype(spec).config, "dims": list(spec.shape)}


def _datatype(spec: TensorSpec) -> Datatype:
    try:
        return datatype_of(spec)
    except ValueError as error:  # of an output: inputs were looked at when the routes were made
        raise Refused(500, str(error)) from None


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}


def _result(name: str, value: Any, binary: bool) -> Result:
    """An output, as the protocol can have it."""
    if type(value) is torch.Tensor:
        try:
            return Result(name, datatype(name, value.dtype), tuple(value.shape), value, binary)
        except ValueError as error:
            raise OutputError(str(error)) from None
    if isinstance(value, (list, tuple)) and all(isinstance(each, (str, bytes)) for each in value):
        return Result(name, BYTES, (len(value),), value, binary)
    raise OutputError(f"output {name!r} is a {type(value).__name__}: neither a tensor nor texts, one for each row")


def _nothing(signature: Signature) -> list[tuple[str, Any]]:
    """The outputs of no rows: the model is not asked. Raises `Refused` where they cannot be known."""
    if signature.outputs is None:
        raise Refused(400, "the request has no rows, and it is not known yet what the model returns")
    for spec in (*signature.inputs, *signature.outputs):
        if not spec.whole and any(size == -1 for at, size in enumerate(spec.shape) if at != rows_at(spec)):
            raise Refused(400, f"the request has no rows, and {spec.name!r} has a length: send one row at least")
    found: list[tuple[str, Any]] = []
    for spec in signature.outputs:
        rows = rows_at(spec)
        if rows is None:
            raise Refused(400, f"the request has no rows, and output {spec.name!r} belongs to all of them")
        shape = [0 if at == rows else size for at, size in enumerate(spec.shape)]
        value: Any = torch.empty(shape, dtype=spec.dtype) if isinstance(spec.dtype, torch.dtype) else []
        found.append((spec.name, value))
    return found
