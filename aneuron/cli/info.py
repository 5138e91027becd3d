"""`aneuron info`: which backends this machine has, and which one would be chosen.

Lives here: the question to each backend, and the answers in words. Must not be here: looking for devices (each backend
reports for itself).
"""

import argparse
import json
import platform
import shutil
import textwrap
from collections.abc import Mapping
from itertools import chain
from typing import Any
from urllib.request import urlopen

import torch

import aneuron

DESCRIPTION = """\
Say which backends this machine has for this process, with how many cores, why, and what those that are not found lack;
and which one backend="auto" takes for a model. Nothing is loaded, and no core is claimed.

With the address of a running service's console: which of its models share which cores."""

CLASSES = {
    "neuron": "Neuron", "cuda": "Cuda", "cpu": "Cpu", "openvino": "OpenVino", "onnx": "Onnx", "simulated": "Simulated"
}  # fmt: skip
ABSENT = {"found": False, "cores": 0, "why": "not in this version of aneuron", "lacks": []}
WHOLE_WORDS: Mapping[str, Any] = {"break_long_words": False, "break_on_hyphens": False}  # addresses are copied
Report = Mapping[str, Any]


def add(subparsers: Any) -> None:
    """Add the subcommand to those of `aneuron`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "info", help="say which backends were found, why, and what the others lack", description=DESCRIPTION
    )
    parser.add_argument("console", nargs="?", help="address of a running service's console: say who shares its cores")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Say it."""
    if args.console is not None:
        try:
            models = served(args.console)
        except (OSError, ValueError, LookupError) as error:
            print(f"no console answers at {args.console}: {error}; pass its address, as http://127.0.0.1:8000/console")
            return 1
        print(json.dumps(models, indent=2) if args.json else "\n".join(pools(models)))
        return 0
    classes = {name: getattr(aneuron, f"{title}Backend", None) for name, title in CLASSES.items()}
    backends = {name: report(backend) for name, backend in classes.items()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    auto = automatic(backends)
    if args.json:
        print(json.dumps({**versions, "backends": backends, "auto": auto}, indent=2))
    else:
        print(f"PyTorch {versions['torch']}, Python {versions['python']}\n\n{table(backends)}\n\n{choices(auto)}")
    return 0


def served(address: str) -> Report:
    """The models that a console shows, by name, from the first event of its stream."""
    with urlopen(f"{address.rstrip('/')}/events", timeout=10) as stream:
        for line in stream:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "models" in event:  # not what others have seen before
                    models: Report = event["models"]
                    return models
    raise LookupError("the stream has no models")


def pools(models: Report) -> list[str]:
    """A line for each pool, and one for each model on it."""
    lines, said = [], set()
    for name, model in models.items():
        if name not in said:
            together = [name, *model["pool"]["with"]]
            said.update(together)
            cores = ", ".join(str(lane["id"]) for lane in model["lanes"]) or "not started"
            unnamed = f", and {model['pool']['unnamed']} more models" * bool(model["pool"]["unnamed"])
            lines.append(f"cores {cores}{unnamed}")
            for each in together:
                share = models[each]["busy_share"]
                had = "" if share is None else f"  {share:>3} % of the busy time"
                lines.append(f"  {each:<20}  weight {models[each]['pool']['weight']:<4g}{had}".rstrip())
    return lines


def report(backend: Any) -> Report:
    """What a backend says of itself; if it cannot even say, then why."""
    if not hasattr(backend, "report"):
        return ABSENT
    try:
        answer: Report = backend().report()
    except Exception as error:
        return {**ABSENT, "why": f"looking for it failed: {type(error).__name__}: {error}"}
    return answer


def automatic(backends: Mapping[str, Report]) -> dict[str, str | None]:
    """What backend="auto" takes for each kind of model; None: an error says what to do."""
    neuron = backends["neuron"].get("takes") if backends["neuron"]["found"] else None
    elsewhere = "cuda" if backends["cuda"]["found"] else "cpu"
    return {
        "callable": "cpu",
        "module": elsewhere if neuron is None else "neuron" if neuron == "modules" else None,
        "neuron": "neuron" if neuron == "traced models" else None,
        "onnx": next((name for name in ("onnx", "openvino") if backends[name]["found"]), None),
        "openvino": "openvino" if backends["openvino"]["found"] else None,
    }


def table(backends: Mapping[str, Report]) -> str:
    """A line for each backend, and below it what it lacks."""
    width = max(map(len, backends))
    columns = max(60, shutil.get_terminal_size((120, 0)).columns)
    lines = [f"{'backend':<{width}}  found  cores"]
    for name, answer in backends.items():
        start = f"{name:<{width}}  {'yes' if answer['found'] else 'no':<5}  {answer['cores']:>5}  "
        said = [answer["why"], *(f"lacks: {each}" for each in answer["lacks"])]
        for line in chain.from_iterable(textwrap.wrap(each, columns - len(start), **WHOLE_WORDS) for each in said):
            lines.append(start + line)
            start = " " * len(start)
    return "\n".join(lines)


def choices(auto: Mapping[str, str | None]) -> str:
    """What is chosen, in words."""
    kinds = {
        "callable": "a callable", "module": "an nn.Module", "neuron": "a model traced for Neuron",
        "onnx": "an ONNX file", "openvino": "an OpenVINO file",
    }  # fmt: skip
    errors = {
        "module": "an error: trace it for NeuronCores, or say backend='cpu'",
        "neuron": "an error: no NeuronCore",
        "onnx": "an error: install 'aneuron[onnx]' or 'aneuron[openvino]'",
        "openvino": "an error: install 'aneuron[openvino]'",
    }
    said = [f"  {kinds[kind]}: {name or errors[kind]}" for kind, name in auto.items()]
    return "\n".join(['backend="auto" takes for', *said])
