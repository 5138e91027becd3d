"""Which cores this process sees, what the environment says of them, who holds them, and which Neuron package is here.

Lives here: NEURON_RT_VISIBLE_CORES and NEURON_RT_NUM_CORES, the question whether the runtime has started, forks. Must
not be here: models, placement; but for `ask`, nothing in here claims a core.

The variables: https://awsdocs-neuron.readthedocs-hosted.com/en/latest/neuron-runtime/guides/configuration-guide.html.
"""

import importlib
import importlib.util
import os
import re
import sys
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from aneuron.backends.neuron import machine
from aneuron.backends.neuron.machine import spelled
from aneuron.errors import DeviceError

DIVIDE = (
    "each process takes all cores unless NEURON_RT_NUM_CORES (the same for all) or NEURON_RT_VISIBLE_CORES (a range of "
    "its own) says otherwise; workers x cores <= cores of the machine"
)
VISIBLE, NUMBER = "NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES"
TRACE, LEGACY, NATIVE, NONE = "trace", "legacy", "native", "none"
_NO_PACKAGE = "a Neuron package: torch_neuronx, or torch_neuron for Inf1"


@dataclass(frozen=True, slots=True)
class Found:
    """What a look at the machine found: how many cores this process would see, and what stands in their way.

    `package`: "trace" (torch_neuronx up to 2.9), "legacy" (torch_neuron, for Inf1), "native" (TorchNeuron,
    torch_neuronx from 2.13 on), or "none". `cores` is 0 where there is a device but no package, or the other way round;
    `lacks` says what is missing, `why` what the number comes from.
    """

    cores: int
    package: str
    why: str
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Package:
    """The Neuron package that is installed, told by what it can do: two generations share one name."""

    kind: str
    module: ModuleType | None = None
    problem: str = ""


# The environment.


def parse_cores(text: str) -> tuple[int, ...]:
    """The machine's numbers of the cores that a value of NEURON_RT_VISIBLE_CORES names, in any of its spellings.

    Raises `DeviceError` for one that the runtime refuses: numbers must rise without a gap.

        >>> parse_cores("3-5,6")
        (3, 4, 5, 6)
        >>> parse_cores("")
        ()
    """
    if not text.strip():
        return ()
    first = stop = 0
    for index, part in enumerate(text.split(",")):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part, re.ASCII)
        if not match:
            raise DeviceError(
                f"{VISIBLE}={text!r}: {part!r} is neither a core nor a range; write '3', '3-6' or '3,4,5'"
            )
        begin, last = int(match[1]), int(match[2] or match[1])
        if (index and begin != stop) or last < begin:
            raise DeviceError(
                f"{VISIBLE}={text!r}: the runtime takes cores that follow one another only, such as '3-6'; give this "
                "process a range without gaps"
            )
        first, stop = first if index else begin, last + 1
    return tuple(range(first, stop))


@dataclass(frozen=True, slots=True)
class Asked:
    """What the environment asks for: these cores of the machine, or so many, whichever; None: all there are."""

    cores: tuple[int, ...] | None
    number: int | None
    why: str


def asked(environ: Mapping[str, str]) -> Asked:
    """Read NEURON_RT_VISIBLE_CORES, which wins, and NEURON_RT_NUM_CORES. `DeviceError` for what they may not be."""
    text = environ.get(VISIBLE)
    if text is not None:
        cores = parse_cores(text)
        why = (
            f"{VISIBLE}={text}" if cores else f"{VISIBLE} is empty: this process is to have no cores; unset it for all"
        )
        return Asked(cores, len(cores), why)
    text = environ.get(NUMBER, "").strip() or "0"
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII):
        raise DeviceError(f"{NUMBER}={text!r}: expected a number of cores, or 0 for all")
    return Asked(None, int(text), f"{NUMBER}={text}") if int(text) else Asked(None, None, "all cores of the machine")


def count(root: str | Path, environ: Mapping[str, str]) -> tuple[int | None, str]:
    """How many cores this process sees, and why, without claiming one; None where only the runtime knows.

    Raises `DeviceError` where the environment asks for what the machine has not.
    """
    wish, total = asked(environ), machine.count_cores(root, environ)
    last = wish.cores[-1] + 1 if wish.cores else wish.number or 0
    # A container may have some chips of the machine only; the numbers of cores are the machine's all the same.
    if total is not None and last > total and (wish.cores is None or has_all_chips(root)):
        raise DeviceError(
            f"{wish.why}: the machine has {total} cores, 0 to {total - 1}, in {len(machine.chips(root))} chips"
        )
    number = total if wish.number is None else wish.number
    return number, wish.why


def has_all_chips(root: str | Path) -> bool:
    """Whether the chips are numbered from 0 without a gap. Where they are not, others are kept from this container."""
    chips = machine.chips(root)
    return chips == list(range(len(chips)))


# The package.


def package() -> Package:
    """The Neuron package of this process. Imports it, which claims no core."""
    problem = ""
    if _is_there("torch_neuronx"):
        try:
            module = importlib.import_module("torch_neuronx")  # before any torch.jit.load, which needs its classes
            if hasattr(module, "trace"):
                return Package(TRACE, module)
        except Exception as error:
            problem = f"torch_neuronx is installed and cannot be imported ({type(error).__name__}: {error})"
    device = getattr(torch, "neuron", None)
    if device is not None and hasattr(device, "device_count"):
        return Package(NATIVE, device)
    if _is_there("torch_neuron"):
        try:
            module = importlib.import_module("torch_neuron")
            if hasattr(module, "trace"):
                return Package(LEGACY, module)
        except Exception as error:
            problem = problem or f"torch_neuron is installed and cannot be imported ({type(error).__name__}: {error})"
    return Package(NONE, None, problem or "no Neuron package is installed (torch_neuronx; torch_neuron for Inf1)")


def _is_there(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def found(root: str | Path = "/", environ: Mapping[str, str] | None = None) -> Found:
    """Look for cores without claiming one, and for a package without importing it where there are none. Never raises.

    `environ` is what the runtime goes by, unless given.

    >>> found("/nowhere").cores
    0
    """
    if not machine.chips(root):
        lacks = ["a NeuronCore: there is no /dev/neuron*, so no device, no driver, or none that the container is given"]
        if not (_is_there("torch_neuronx") or _is_there("torch_neuron") or hasattr(torch, "neuron")):
            lacks.append(_NO_PACKAGE)
        return Found(0, NONE, "no device files", tuple(lacks))
    try:
        number, why = count(root, frozen_environment() if environ is None else environ)
    except DeviceError as error:
        return Found(0, NONE, str(error), ("an environment that names cores of this machine",))
    here = package()
    if here.kind == NONE:
        return Found(0, NONE, f"{len(machine.chips(root))} chips, but {here.problem}", (_NO_PACKAGE,))
    if number == 0:
        return Found(0, here.kind, why, ("cores for this process",))
    if number is None:
        return Found(len(machine.chips(root)), here.kind, "one core a chip at least; only the runtime knows how many")
    return Found(number, here.kind, why)


# The runtime.


_lock = threading.Lock()
_started: tuple[int, dict[str, str]] | None = None  # in which process, and in what environment


def settings() -> dict[str, str]:
    """The variables that the runtime reads when it starts."""
    names = ("NEURON_RT_", "NEURON_LOGICAL_NC_CONFIG")
    return {name: value for name, value in os.environ.items() if name.startswith(names)}


def check_fork() -> None:
    """Raise `RuntimeError` in a child of the process whose runtime has started."""
    if _started is not None and _started[0] != os.getpid():
        raise RuntimeError(
            f"the Neuron runtime was started in process {_started[0]}, and this is its child {os.getpid()} "
            "(NRT_STATE_CHILD): it does not survive a fork. Start processes with the spawn method, or fork before the "
            "first model is loaded (gunicorn without --preload)"
        )


def note_start() -> None:
    """The runtime is started now if it was not: from here on it does not look at the environment."""
    global _started
    with _lock:
        check_fork()
        if _started is None:
            _started = os.getpid(), settings()


def has_started() -> bool:
    """Whether the runtime is started in this process, and holds its cores until that ends."""
    return _started is not None


def check_environment() -> None:
    """Warn of variables that have been changed since the runtime read them."""
    if _started is None:
        return
    before, now = _started[1], settings()
    changed = sorted(name for name in before | now if before.get(name) != now.get(name))
    if changed:
        names = ", ".join(f"{name}={now.get(name)!r}" for name in changed)
        warnings.warn(
            f"{names}: changed after the Neuron runtime has started, which reads it once; it has no effect in this "
            "process. Set it before the first model is loaded, and choose cores by device_ids",
            stacklevel=2,
        )


def frozen_environment() -> Mapping[str, str]:
    """The environment that the runtime goes by: its own copy, once it has started."""
    return os.environ if _started is None else _started[1]


def ask(here: Package) -> int:
    """How many cores the runtime gives this process. It may start for that, and claim them. Raises what it raises."""
    if here.kind == NATIVE:
        return int(here.module.device_count())  # type: ignore[union-attr]
    runtime: Any = torch.classes.neuron.Runtime()
    number = int(runtime.get_nc_count())
    if number < 0:
        raise RuntimeError("The PyTorch Neuron Runtime could not be initialized.")
    note_start()
    return number


def taken_by(root: str | Path, environ: Mapping[str, str]) -> str:
    """Who else uses the chips of the cores that this process asks for, in words; empty where nothing tells of any."""
    try:
        wanted = asked(environ).cores
    except DeviceError:
        return ""
    others = machine.holders(root, wanted, os.getpid())
    if not others:
        return ""
    mine = f"cores {spelled(wanted)} of the machine, which this process asks for," if wanted else "the machine's cores"
    return f"{mine} are used by " + "; ".join(map(str, others))


def global_id(core: int, environ: Mapping[str, str], root: str | Path = "/") -> int | None:
    """The machine's number of a core of this process; None where the runtime chose the cores, or where chips of the
    machine are not to be seen and no NEURON_RT_VISIBLE_CORES says which ones this process has.

    >>> global_id(7, {"NEURON_RT_VISIBLE_CORES": "7-15"})
    14
    """
    wish = asked(environ)
    if wish.cores is not None:
        return wish.cores[core] if core < len(wish.cores) else None
    return core if wish.number is None and has_all_chips(root) else None
