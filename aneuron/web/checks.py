"""What the front doors refuse: keywords that are no models, names, numbers and paths that cannot be meant.

Lives here: checks of what `install`, `lifespan`, `setup` and their like are given. Must not be here: a web framework.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from aneuron import AsyncDataParallel
from aneuron.arguments import seconds
from aneuron.web.views import installed

# Of all doors: what one of them takes is no name for a model in another, where the same models go in.
OPTIONS = ("drain_timeout", "freeze", "max_body", "max_timeout", "server_timing", "shed")


def check_models(door: Callable[..., Any], models: Mapping[str, AsyncDataParallel]) -> None:
    """Raise for what is not a model under a name of its own: every keyword that is no option is taken for one."""
    options = sorted(getattr(door, "__kwdefaults__", None) or ())
    title = f"{door.__module__.removeprefix('aneuron.web.')}.{door.__qualname__}"
    names: dict[int, str] = {}
    for name, model in models.items():
        if not isinstance(model, AsyncDataParallel):
            raise TypeError(f"{title}({name}={model!r:.80}): {_not_a_model(name, options, title)}")
        if name in OPTIONS:
            raise ValueError(f"{title}({name}=...): that is the name of an option; give the model another")
        if not name.strip() or not name.isprintable() or {'"', "\\"} & set(name):
            raise ValueError(f"{title}({name!r}=...): a model's name has printable characters, no quote or backslash")
        if id(model) in names:
            raise ValueError(
                f"{title}({names[id(model)]}=..., {name}=...): they are one and the same model; it has one name"
            )
        names[id(model)] = name


def _not_a_model(name: str, options: list[str], title: str) -> str:
    if name in OPTIONS:
        return f"{title} has no such option" + (f"; it has {', '.join(options)}" if options else "")
    if close := get_close_matches(name, options, 1):
        return f"there is no such option; do you mean {close[0]}=? (Other keywords name models.)"
    return "expected an aneuron.AsyncDataParallel, under the name that it is to have" + (
        f"; the options are {', '.join(options)}" if options else ""
    )


def check_flags(**flags: bool) -> None:
    """Raise for what is neither True nor False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r:.80}: expected True or False")


def time_allowed(name: str, value: float | None) -> float | None:
    """A checked number of seconds that something may take, or None for no bound."""
    if value is not None and seconds(name, value) == 0:
        raise ValueError(f"{name}={value!r}: no request could be served; expected more than 0 seconds, or None")
    return value


def drain_time(value: float | None) -> float | None:
    """A checked `drain_timeout`, None for no bound."""
    return None if value is None else seconds("drain_timeout", value)


def check_body(max_body: int | None) -> None:
    """Raise for what is no number of bytes."""
    if max_body is not None and (isinstance(max_body, bool) or not isinstance(max_body, int) or max_body < 1):
        raise ValueError(f"max_body={max_body!r:.80}: expected an int of bytes, 1 or more, or None")


def guarded(shed: Mapping[str, str] | None, models: Mapping[str, AsyncDataParallel]) -> dict[str, AsyncDataParallel]:
    """By path, the model without which a request need not come in."""
    if shed is not None and not isinstance(shed, Mapping):
        raise TypeError(f"shed={shed!r:.80}: expected paths and the names of models, {{'/predict': 'net'}}")
    for path in shed or {}:
        if not isinstance(path, str) or not path.startswith("/"):
            raise ValueError(f"shed={{{path!r:.80}: ...}}: a path begins with a slash")
        if {"{", "}", "?", "#"} & set(path):
            raise ValueError(f"shed={{{path!r:.80}: ...}}: paths are compared as they are, without any parameters")
    return {path: installed(name, models) for path, name in (shed or {}).items()}


def nowhere(path: str) -> LookupError:
    """The error for a path in `shed` that no route of the application answers."""
    return LookupError(f"shed={{{path!r}: ...}}: no route of the application has that path, so nothing would be shed")


def check_same(started: Mapping[str, AsyncDataParallel], there: Mapping[str, AsyncDataParallel]) -> None:
    """Raise where models are started under one name and installed under another."""
    names = {id(model): name for name, model in there.items()}
    for name, model in started.items():
        if names.get(id(model), name) != name:
            raise ValueError(
                f"lifespan({name}=...) is installed as {names[id(model)]}: a model has the same name in both"
            )
        if there.get(name, model) is not model:
            raise ValueError(f"lifespan({name}=...) and install({name}=...) are two models; give both the same one")
