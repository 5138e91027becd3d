"""What the machine says of its NeuronCores without being asked for one: device files, sysfs, neuron-ls.

Lives here: files and one tool, read under a root directory. Must not be here: the Neuron packages, the runtime; nothing
in here claims a core.

The tool: https://awsdocs-neuron.readthedocs-hosted.com/en/latest/tools/neuron-sys-tools/neuron-ls.html, the files:
https://awsdocs-neuron.readthedocs-hosted.com/en/latest/tools/neuron-sys-tools/neuron-sysfs-user-guide.html.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOOL = "opt/aws/neuron/bin/neuron-ls"
_SYSFS = "sys/devices/virtual/neuron_device"
_PHYSICAL = 8  # cores of a chip from trn2 on, where several may make up a logical one; earlier chips have 2 or 4


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that uses a chip, and the machine's numbers of the chip's cores."""

    pid: int
    command: str
    cores: tuple[int, ...]

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command or 'command unknown'}), on the chip with cores {spelled(self.cores)}"


def chips(root: str | Path) -> list[int]:
    """The numbers of the chips that this machine, or container, has device files of."""
    try:
        names = [path.name for path in (Path(root) / "dev").iterdir()]
    except OSError:
        return []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"neuron(\d+)", name)))


def count_cores(root: str | Path, environ: Mapping[str, str]) -> int | None:
    """How many logical cores the chips have; None where nothing says it."""
    present = chips(root)
    counts = [_core_count(Path(root) / _SYSFS / f"neuron{chip}") for chip in present]
    if present and None not in counts and max(filter(None, counts), default=0) < _PHYSICAL:
        return sum(filter(None, counts))
    wanted = environ.get("NEURON_LOGICAL_NC_CONFIG", "")
    lnc = int(wanted) if wanted in ("1", "2") else None
    devices = neuron_ls(root)
    if devices:
        return sum(_logical(device, lnc) for device in devices)
    if present and None not in counts:
        return sum(filter(None, counts)) // (lnc or 2)  # the runtime's default
    return None


def _core_count(device: Path) -> int | None:
    try:
        return int((device / "core_count").read_text())
    except (OSError, ValueError):
        pass
    try:
        return len([path for path in device.iterdir() if re.fullmatch(r"neuron_core\d+", path.name)]) or None
    except OSError:
        return None


def _logical(device: Mapping[str, Any], lnc: int | None) -> int:
    """The cores of a chip in the units of this process, which may be others than those of the tool's."""
    count, own = _number(device.get("nc_count")), _number(device.get("logical_neuroncore_config"))
    return count * own // lnc if lnc and own else count


def neuron_ls(root: str | Path) -> list[dict[str, Any]] | None:
    """What `neuron-ls --json-output` prints; None where there is no such tool, or it says something else."""
    tool: str | Path | None = Path(root) / _TOOL
    if not Path(root, _TOOL).exists():
        tool = shutil.which("neuron-ls") if str(root) == "/" else None
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, "--json-output"], capture_output=True, timeout=10.0, check=True)
        devices = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError, RecursionError):
        return None
    return devices if isinstance(devices, list) and all(isinstance(each, dict) for each in devices) else None


def holders(root: str | Path, cores: Iterable[int] | None, but: int) -> list[Holder]:
    """The processes, `but` this one, that use chips with these cores of the machine; None: with any."""
    wanted, found, first = None if cores is None else set(cores), [], 0
    for device in neuron_ls(root) or ():
        count = _number(device.get("nc_count"))
        ids = device.get("neuroncore_ids")
        own = tuple(ids) if isinstance(ids, list) and ids else tuple(range(first, first + count))
        first += count
        if wanted is not None and wanted.isdisjoint(own):
            continue
        for process in device.get("neuron_processes") or ():
            if isinstance(process, dict) and _number(process.get("pid")) not in (0, but):
                found.append(Holder(_number(process["pid"]), str(process.get("command") or ""), own))
    return found


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def spelled(cores: Iterable[int]) -> str:
    """Numbers of cores as one would write them.

    >>> spelled([0, 1, 2, 5])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
