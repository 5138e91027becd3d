"""Settings made into models: paths and `module:attribute` looked up, arguments that are written made into objects.

Lives here: what is made, and loaded anew. Must not be here: starting and swapping (app.py, reloading.py), which keys
there are (config.py).
"""

import importlib
import inspect
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch

import aneuron
from aneuron import AsyncDataParallel, Pool, Signature, TensorSpec
from aneuron.cli import reading
from aneuron.serve.config import MAX_PENDING, ConfigError, ModelSettings, Settings, Table, arguments, check_keys

T = TypeVar("T")
_BACKENDS = {
    name.removesuffix("Backend").lower(): name
    for name in aneuron.__all__
    if name.endswith("Backend") and name != "Backend"
}
_IMPORTING = Lock()  # held by who imports anew: nobody else may find a module half done


@dataclass(frozen=True)
class Made:
    """A model that is to be served, not started, and how what it runs is had anew."""

    name: str
    source: str  # as it was written
    model: AsyncDataParallel
    signature: Signature | None
    reload: Callable[[], Any]  # blocking; raises `ConfigError`


def make(settings: Settings) -> list[Made]:
    """All models, not started. Raises `ConfigError` for what is not there and what does not fit together."""
    pools = {name: _made(f"pools.{name}", Pool, _objects(f"pools.{name}", a)) for name, a in settings.pools.items()}
    made = [_model(each, pools) for each in settings.models]
    names: dict[int, str] = {}
    for each in made:
        if not (each.signature or each.model.signature).inputs:
            raise ConfigError(
                f"models.{each.name}.example_inputs is missing: nothing says what the model takes; expected a shape, "
                "as 1x128:int64, a .pt file or module:attribute, or a declaration in its place (signature)"
            )
        if (other := names.setdefault(id(each.model), each.name)) != each.name:
            raise ConfigError(
                f"models.{other} and models.{each.name} are one and the same AsyncDataParallel; it has one name"
            )
    return made


def _model(asked: ModelSettings, pools: Mapping[str, Pool]) -> Made:
    where, source = f"models.{asked.name}", str(asked.source)
    found = _found(f"{where}.model", asked.source)
    whole = isinstance(found, AsyncDataParallel)
    model = _as_it_is(where, asked, found) if whole else _with_arguments(where, asked, found, pools)
    modules = _modules(asked.source)
    code = _code(modules)

    def reload() -> Any:
        with _IMPORTING, _imported_anew(modules):
            again = None if whole else _found(f"{where}.model", asked.source)
            if whole or isinstance(again, AsyncDataParallel):
                raise ConfigError(
                    f"{where}.model = {source!r} is an AsyncDataParallel, which is not loaded anew; name in its place "
                    "the torch module that it runs, or a function that makes that module"
                )
            if model.pool.processes and _code(modules) != code:  # they would go on with it, without a word
                raise ConfigError(
                    f"{where}.model = {source!r}: its module has changed, and the pool's processes have imported it "
                    "as it was: start the service again (other weights, which a function loads, can be loaded anew)"
                )
            return again

    return Made(asked.name, source, model, _signature(f"{where}.signature", asked.signature), reload)


def _as_it_is(where: str, asked: ModelSettings, model: AsyncDataParallel) -> AsyncDataParallel:
    """A model that brings its arguments with it."""
    if asked.arguments:
        key, value = next(iter(asked.arguments.items()))
        raise ConfigError(f"{where}.{key} = {value!r:.80}: {asked.source!r} is an AsyncDataParallel, which has its own")
    if model.max_pending is None:
        model.max_pending = MAX_PENDING
    return model


def _with_arguments(where: str, asked: ModelSettings, model: Any, pools: Mapping[str, Pool]) -> AsyncDataParallel:
    own = arguments(asked.arguments)
    said = {key: value for key, value in asked.arguments.items() if key not in own}
    given = {"max_pending": MAX_PENDING, **_objects(where, said)}
    if own:
        given["pool"] = _made(where, Pool, _objects(where, own))
    elif isinstance(pool := given.get("pool"), str):
        given["pool"] = pools[pool]
    return _made(where, AsyncDataParallel, given, model)


def _made(where: str, kind: Callable[..., T], given: Table, *model: Any) -> T:
    """Raises what is not meant as `ConfigError`: the constructor's own words, and whose they are."""
    check_keys(where, given, inspect.signature(kind).parameters)
    try:
        return kind(*model, **given)
    except (TypeError, ValueError, NotImplementedError, LookupError, aneuron.AneuronError) as error:
        raise ConfigError(f"{where}: {error}") from error


# What is named.


def _found(where: str, source: str | Mapping[str, str]) -> Any:
    """The model that a text names, or a mapping of them by size."""
    if isinstance(source, Mapping):
        return {_size(where, size): _found(f"{where}.{size}", text) for size, text in source.items()}
    if not os.path.exists(source):
        if not reading.is_name(source):
            raise ConfigError(
                f"{where} = {source!r}: there is no such file ({os.path.abspath(source)}), and it is not of the form "
                "module:attribute, as nets:encoder is for `encoder` in nets.py"
            )
        return _read(where, reading.value, source).value
    if source.endswith(".py"):
        raise ConfigError(f"{where} = {source!r} is no model, has one maybe: write {Path(source).stem}:ATTRIBUTE")
    return os.path.abspath(source)


def _modules(source: str | Mapping[str, str]) -> list[str]:
    """Those that are named."""
    texts = source.values() if isinstance(source, Mapping) else [source]
    return [text.partition(":")[0] for text in texts if reading.is_name(text) and not os.path.exists(text)]


def _code(modules: Iterable[str]) -> list[bytes]:
    """What is written in their files."""
    files = [getattr(sys.modules[name], "__file__", None) for name in modules]
    return [Path(file).read_bytes() for file in files if file is not None]


@contextmanager
def _imported_anew(modules: Iterable[str]) -> Iterator[None]:
    """Have modules run again when they are imported next, into namespaces of their own: functions of those that serve
    find their globals in the old ones. If that fails, the old ones are found again.
    """
    old = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    importlib.invalidate_caches()
    try:
        yield
    except BaseException:
        sys.modules.update(old)
        raise


def _size(where: str, text: str) -> int | tuple[int, int]:
    """A batch size, `8`, or one and a bucket, `8x64`."""
    parts = text.split("x")
    if not 1 <= len(parts) <= 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"{where}: {text!r} is no batch size, as 8 is, nor one and a bucket, as 8x64 is")
    return int(text) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def _read(where: str, read: Callable[[str], T], text: str) -> T:
    """Raises what cannot be read as `ConfigError`."""
    try:
        return read(text)
    except ArgumentTypeError as error:  # which begins with the text
        raise ConfigError(f"{where} = {error}") from error


def _attribute(where: str, text: str) -> Any:
    return _read(where, reading.attribute, text)[0]


# What is written.


def _objects(where: str, given: Table) -> dict[str, Any]:
    """Arguments as the constructors take them."""
    return {key: _object(f"{where}.{key}", key, value) for key, value in given.items()}


def _object(where: str, key: str, value: Any) -> Any:
    if key == "backend":
        return _backend(where, value)
    if key == "example_inputs" and value is not None:
        return _example(where, value)
    if key == "buckets" and value is not None:
        return _made(where, aneuron.Buckets, value)
    if key == "max_pending" and isinstance(value, Mapping):
        return _made(where, aneuron.Work, value)
    if key == "outputs" and value is not None:
        return {int(name) if name.isdecimal() else name: verdict for name, verdict in value.items()}
    if key == "context" and value is not None:
        return _attribute(where, value)
    return value


def _backend(where: str, value: str | Mapping[str, Any]) -> Any:
    """A name, `module:attribute`, or a table with a `name` and what that backend's constructor takes."""
    if isinstance(value, str) and (value == "auto" or ":" in value):
        return value if value == "auto" else _attribute(where, value)
    given: dict[str, Any] = {"name": value} if isinstance(value, str) else dict(value)
    name = given.pop("name", None)
    if name not in _BACKENDS:
        raise ConfigError(
            f"{where}{'' if isinstance(value, str) else '.name'} = {name!r:.80}: expected one of "
            f"{', '.join(sorted(_BACKENDS))}; or, in place of a table, auto or module:attribute"
        )
    if isinstance(dtype := given.get("dtype"), str):
        given["dtype"] = _dtype(where, dtype)
    return _made(where, getattr(aneuron, _BACKENDS[name]), given)


def _example(where: str, value: str | list[str] | Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _example(f"{where}.{name}", each) for name, each in value.items()}
    if isinstance(value, list):
        return tuple(_example(where, each) for each in value)
    if not reading.is_name(value):
        return _read(where, reading.inputs, value).value
    found = _attribute(where, value)
    try:
        return found() if callable(found) else found
    except (Exception, SystemExit) as error:  # it is the user's: whatever it raises
        raise ConfigError(f"{where} = {value!r} makes no inputs: {type(error).__name__}: {error}") from error


def _signature(where: str, given: Mapping[str, Any] | None) -> Signature | None:
    """A declaration: `inputs` and `outputs`, a list of tables with `name`, `dtype` and `shape` each."""
    if given is None:
        return None
    sides = {key: None if specs is None else tuple(_spec(f"{where}.{key}", spec) for spec in specs)
             for key, specs in given.items()}  # fmt: skip
    return _made(where, Signature, sides)


def _spec(where: str, given: Mapping[str, Any]) -> TensorSpec:
    spec = dict(given)
    if isinstance(dtype := spec.get("dtype"), str):
        spec["dtype"] = {"str": str, "bytes": bytes}.get(dtype) or _dtype(where, dtype)
    if isinstance(shape := spec.get("shape"), list):
        spec["shape"] = tuple(shape)
    return _made(where, TensorSpec, spec)


def _dtype(where: str, name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{where}.dtype = {name!r}: expected the name of a dtype, as float32 or bfloat16")
    return dtype
