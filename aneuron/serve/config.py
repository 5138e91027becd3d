"""What is to be served and how: from a file's text and the command line to frozen settings.

Lives here: keys, types, defaults, and what is told of those that do not fit. Pure. Must not be here: reading files,
making models (loading.py).
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import PurePath
from typing import Annotated, Any, get_type_hints

import msgspec
import yaml

Table = Mapping[str, Any]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]

MAX_PENDING = 4096  # rows of a model that may wait, where nothing is said
SUFFIXES = (".toml", ".yaml", ".yml")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Of `aneuron.Pool` and not of a model: a model that has some has a pool of its own with them.
_PROCESSES: Table = {"processes": Count | None, "share": str | None, "linger": Seconds}
_CORES: Table = {
    "device_ids": list[int | str] | None,
    "backend": str | dict[str, Any],
    "num_workers": Count | None,
}
POOL: Table = {**_CORES, **_PROCESSES}
MODEL: Table = {
    **POOL,
    "pool": str | None,
    "dim": int,
    "set_dynamic_batching": bool,
    "batch_size": Count | None,
    "example_inputs": str | list[str] | dict[str, str] | None,
    "split_size": Count | None,
    "max_pending": Count | dict[str, int] | None,
    "max_delay": Seconds | None,
    "buckets": dict[str, Any] | None,
    "exec_timeout": Seconds | None,
    "min_cores": Count | None,
    "outputs": dict[str, str] | None,
    "check_rows": bool,
    "context": str | None,
    "weight": float,
}
_OWN: Table = {"model": str | dict[str, str], "signature": dict[str, list[dict[str, Any]] | None] | None}


class ConfigError(ValueError):
    """What is asked for cannot be meant: says the key, its value, the rule, and what to do."""


@dataclass(frozen=True)
class ServerSettings:
    """Of the whole service; `[server]` in a file, flags on the command line."""

    host: str = "127.0.0.1"  # others may come in only where that is said
    http: Port = 8000  # 0: any that is free
    grpc: Port | None = None
    allow_load: bool = False  # SIGHUP and POST /v2/repository/models/NAME/load have models loaded anew
    max_body: Count = 64 << 20  # bytes of a request
    max_timeout: Seconds | None = None  # that a request may have for its calls, also one that does not ask
    token_file: str | None = None  # holds the bearer token for what is not inference
    tls_cert: str | None = None  # PEM, the chain
    tls_key: str | None = None
    metrics: bool = True
    console: bool = True
    drain_delay: Seconds = 2.0  # from when /readyz is 503 to when nobody is let in any more, at SIGTERM
    drain_timeout: Seconds | None = 25.0  # for what was accepted, after that


@dataclass(frozen=True)
class ModelSettings:
    """One model: where it comes from, and what `AsyncDataParallel` and `Pool` are told of it."""

    name: str
    source: str | Mapping[str, str]
    arguments: Table = field(default_factory=dict)
    signature: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Settings:
    """All that is asked for, checked as far as that needs neither files nor devices."""

    server: ServerSettings
    models: tuple[ModelSettings, ...]
    pools: Mapping[str, Table] = field(default_factory=dict)  # the arguments of each


def settings_of(raw: Table) -> Settings:
    """The settings that tables are; raises `ConfigError`.

    >>> asked = settings_of({"models": {"net": {"model": "nets:net", "batch_size": 8}}})
    >>> asked.models[0].arguments["batch_size"], asked.server.http
    (8, 8000)
    >>> settings_of({"models": {"net": {"model": "nets:net", "batchsize": 8}}})
    Traceback (most recent call last):
    ...
    aneuron.serve.config.ConfigError: models.net.batchsize = 8: there is no such key; do you mean batch_size?
    """
    check_keys("", raw, ("server", "models", "pools"))
    types = get_type_hints(ServerSettings, include_extras=True)
    server = ServerSettings(**_checked("server", raw.get("server", {}), types))
    if (server.tls_cert is None) != (server.tls_key is None):
        missing = "tls_key" if server.tls_key is None else "tls_cert"
        raise ConfigError(f"server.{missing} is missing: TLS takes the certificate (tls_cert) and its key (tls_key)")
    if server.grpc and server.grpc == server.http:
        raise ConfigError(f"server.grpc = {server.grpc}: it is the port of HTTP, too; give it another")
    pools = {
        name: _checked(f"pools.{name}", given, POOL) for name, given in _table("pools", raw.get("pools", {})).items()
    }
    tables = _table("models", raw.get("models", {}))
    models = tuple(_model(name, tables, pools) for name in tables)
    if not models:
        raise ConfigError("no model is named: give a path or module:attribute, or a file with [models.NAME] tables")
    if unused := pools.keys() - {model.arguments.get("pool") for model in models}:
        raise ConfigError(f"pools.{min(unused)}: no model has it; say pool = {min(unused)!r} in one, or delete it")
    return Settings(server, models, pools)


def _model(name: str, tables: Table, pools: Table) -> ModelSettings:
    where = f"models.{name}"
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: {name!r} stands in addresses: expected letters, digits, '.', '_' and '-' (name it by NAME=MODEL)"
        )
    found = dict(_checked(where, tables[name], {**_OWN, **MODEL}))
    if "model" not in found:
        others = _nearest(name, [each for each in tables if each != name]) if len(tables) > 1 else ""
        raise ConfigError(f"{where}.model is missing: expected a path or module:attribute{others}")
    source, signature = found.pop("model"), found.pop("signature", None)
    if (pool := found.get("pool")) is not None:
        if pool not in pools:
            raise ConfigError(f"{where}.pool = {pool!r}: there is no such pool{_nearest(pool, pools)}")
        if own := sorted(POOL.keys() & found.keys()):
            raise ConfigError(f"{where}.{own[0]} = {found[own[0]]!r}: it is the pool's; say it in pools.{pool}")
    return ModelSettings(name, source, found, signature)


def _checked(where: str, given: Any, types: Table) -> Table:
    """The values of a table, each of its type."""
    given = _table(where, given)
    check_keys(where, given, types)
    return {key: _value(f"{where}.{key}", value, types[key]) for key, value in given.items()}


def _value(where: str, value: Any, kind: Any) -> Any:
    if value == "none":  # TOML has no null
        value = None
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where} = {value!r:.80}: {_plainly(str(error))}") from None


def _plainly(said: str) -> str:
    """The rule in a message of msgspec: "Expected `int >= 1`, got `str`"."""
    rule = said.partition(" - at ")[0].partition(", got")[0].replace("`", "")
    rule = rule.replace(" | ", " or ").replace("null", "none")
    return rule[:1].lower() + rule[1:]


def _table(where: str, given: Any) -> Table:
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise ConfigError(f"{where} = {given!r:.80}: expected a table of keys and values")
    return given


def check_keys(where: str, given: Table, keys: Iterable[str]) -> None:
    """Raise `ConfigError` for a key that there is not, with the one that is nearest."""
    keys = list(keys)
    for key in given:
        if key not in keys:
            path = f"{where}.{key}".lstrip(".")
            raise ConfigError(f"{path} = {given[key]!r:.80}: there is no such key{_nearest(key, keys)}")


def _nearest(name: str, names: Iterable[str]) -> str:
    names = list(names)
    close = get_close_matches(name, names, 1)
    return f"; do you mean {close[0]}?" if close else f"; there is {', '.join(names) or 'none'}"


# Text.


def parse(text: str, path: str) -> Table:
    """The tables in a file's text, TOML or YAML by its suffix. Raises `ConfigError`."""
    try:
        found = tomllib.loads(text) if path.endswith(".toml") else yaml.load(text, _Loader)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return _table(path, {} if found is None else found)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # there are no types of it
    """YAML as it says itself that it is: a key stands once. PyYAML takes the last, and loses a model."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        # Sizes and places, which TOML has as texts.
        return {str(key) if type(key) is int else key: value for key, value in found.items()}


def from_command_line(raw: Table, models: Iterable[str], server: Table, sets: Iterable[str]) -> Table:
    """The tables of a file, and what the command line has besides; where both say something, the command line.

    models: `path`, `module:attribute`, or either after `name=`. server: what flags say. sets: `batch_size=8` for each
    of these models, `models.NAME.batch_size=8`, `pools.NAME.processes=2`, `server.max_body=1000`; values as in TOML.

    >>> from_command_line({}, ["nets:encoder", "other=net.pt2"], {"http": 0}, ["batch_size=8"])["models"]["other"]
    {'model': 'net.pt2', 'batch_size': 8}
    """
    merged: dict[str, Any] = dict(raw)
    in_file = _table("models", raw.get("models", {}))
    named: dict[str, dict[str, Any]] = {}
    for text in models:
        name, source = _named(text)
        if name in named or name in in_file:
            other = in_file[name] if name in in_file else named[name]
            other = other.get("model") if isinstance(other, Mapping) else other
            raise ConfigError(f"{other!r} and {source!r} would both be named {name!r}: name one by NAME={source}")
        named[name] = {"model": source}
    merged["models"] = {**in_file, **named}
    merged["server"] = {**_table("server", raw.get("server", {})), **server}
    for text in sets:
        _set(merged, text, list(named))
    return merged


def _named(text: str) -> tuple[str, str]:
    """The name that a model of the command line has, and where it comes from."""
    name, equals, source = text.partition("=")
    if equals and _NAME.fullmatch(name):
        return name, source
    if re.fullmatch(r"[\w.]+:[\w.]+", text):
        return text.rpartition(":")[2].rpartition(".")[2], text
    return PurePath(text).stem, text


def _set(merged: dict[str, Any], text: str, named: list[str]) -> None:
    path, equals, written = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {text!r}: expected KEY=VALUE, as batch_size=8 or models.NAME.batch_size=8")
    try:
        value = tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        value = written.strip()
    places = [["models", name, *keys] for name in named] if len(keys) == 1 else [keys]
    if not places:
        raise ConfigError(f"--set {text!r}: no model is named on the command line; say models.NAME.{path}")
    for *tables, last in places:
        at = merged
        for depth, key in enumerate(tables, 1):
            at[key] = at = dict(_table(".".join(tables[:depth]), at.get(key, {})))
        at[last] = value


def arguments(values: Table) -> Table:
    """Those of `Pool` among a model's; none where the model takes all of them itself."""
    return {key: values[key] for key in POOL if key in values} if _PROCESSES.keys() & values.keys() else {}
