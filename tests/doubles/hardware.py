"""The machine that the doubles run on: NeuronCores, who holds them, what is loaded on them, what goes wrong on them.

Lives here: the runtime of this process, exclusive cores, memory, faults, the record of executions. Must not be here:
torch modules, placement, anything that the Neuron packages do in Python.
"""

import contextlib
import fcntl
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

NOT_STARTED = "The PyTorch Neuron Runtime could not be initialized."
MESSAGES = {
    1: "Failure",
    2: "Invalid",
    3: "Invalid Handle",
    4: "Allocation Failure",
    5: "Timeout Exceeded",
    6: "Hardware Error",
    7: "Queue Full",
    9: "Not Enough NeuronCores",
    10: "Unsupported NEFF Version",
    101: "Execution Unit Unrecoverable",
    1002: "Incorrect Input",
    1003: "Numerical Error",
    1004: "Execution was completed with other errors",
    1005: "NeuronCore Busy",
    1006: "Execution Out-Of-Bounds Memory Access",
}


@dataclass
class Config:
    """What the machine is like. The environment sets it too: DOUBLE_NEURON_<NAME>, times in seconds, sizes in bytes."""

    cores: int = 4  # physical ones
    cores_per_chip: int = 2
    lnc: int = 1  # physical cores in a logical one, where NEURON_LOGICAL_NC_CONFIG does not say
    family: str = "inf2"
    memory: int = 16 * 2**30  # per logical core
    service_time: float = 0.0  # one run
    copy_time: float = 0.0  # host to device and back, overlaps with runs
    load_time: float = 0.0  # per core
    unload_time: float = 0.0
    jit_load_holds_gil: bool = False
    placement: str = "top"  # where torch_neuronx has its placement names: top, experimental, experimental.placement
    data_parallel_bugs: bool = True
    dir: str = ""  # what the processes on one machine share; empty: this process is alone on it


@dataclass(frozen=True)
class Execution:
    """One run: the core by the machine's number and by the process's, and the rows that it was for."""

    core: int
    local: int
    rows: int


@dataclass
class Fault:
    """What happens to `times` runs (None: all) of a core after `after` good ones."""

    status: int
    after: int = 0
    times: int | None = 1
    message: str | None = None
    wait: threading.Event | float | None = None  # before it strikes: seconds, or until a test lets go

    def strike(self) -> None:
        if isinstance(self.wait, threading.Event):
            self.wait.wait()
        elif self.wait:
            time.sleep(self.wait)
        if self.status:
            raise failure(self.status, self.message)


@dataclass
class Core:
    """One logical core, by the machine's number."""

    id: int
    turn: threading.Lock = field(default_factory=threading.Lock)  # one run at a time
    used: int = 0  # bytes
    models: int = 0  # loaded now
    loads: int = 0  # since the start
    unloads: int = 0
    runs: int = 0
    load_fails: int = 0  # with this status
    poison: Fault | None = None
    faults: list[Fault] = field(default_factory=list)

    def strike(self) -> None:
        """Fail if a fault is planned for this run, or if one has poisoned the core before."""
        self.runs += 1
        if self.poison:
            raise failure(self.poison.status, self.poison.message)
        for fault in self.faults:
            if fault.after > 0:
                fault.after -= 1
            elif fault.times is None or fault.times > 0:
                fault.times = fault.times and fault.times - 1
                if fault.status in (5, 6, 101, 1004) or 1200 <= fault.status < 1300:
                    self.poison = fault
                fault.strike()


def failure(status: int, message: str | None = None, what: str = "Failed to execute the model") -> RuntimeError:
    return RuntimeError(f"{what} status={status} message={message or MESSAGES.get(status, 'Unknown')}")


def not_loaded(status: int) -> RuntimeError:
    return failure(status, what="Could not load the model")


def log(text: str) -> None:
    """The runtime's own log goes to the console, not into exceptions."""
    print(f"ERROR  NRT:{text}", file=sys.stderr)


def read_config() -> Config:
    """The shared directory's, overridden by the environment."""
    shared = Path(os.environ.get("DOUBLE_NEURON_DIR") or "/nonexistent") / "machine.json"
    config = Config(**json.loads(shared.read_text())) if shared.is_file() else Config()
    for each in fields(Config):
        text = os.environ.get(f"DOUBLE_NEURON_{each.name.upper()}")
        if text is not None:
            kind = type(getattr(config, each.name))
            setattr(config, each.name, text not in ("", "0") if kind is bool else kind(text))
    return config


def parse_cores(text: str) -> list[int]:
    """NEURON_RT_VISIBLE_CORES: "3", "3-6", "3,4,5" or "3-5,6"; contiguous and rising. Raises ValueError."""
    cores: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise ValueError(text)
        cores += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not cores or cores != list(range(cores[0], cores[0] + len(cores))):
        raise ValueError(text)
    return cores


class Machine:
    """This process's view of the machine: its runtime, which starts at first use and holds its cores until the end."""

    def __init__(self, config: Config) -> None:
        self._starting = threading.Lock()
        self.loading = threading.Lock()
        self.reset(config)

    def reset(self, config: Config | None = None) -> None:
        """As after a restart of the process."""
        self.close()
        self.config = config or read_config()
        self.cores: dict[int, Core] = {}
        self.executions: list[Execution] = []
        self.slow_copies = 0  # of weights, host to device, in a call
        self.fallbacks = 0  # native: operations that failed on the device and ran on the CPU
        self.default = (-1, -1)  # where a module that is loaded goes: start, count; one for the whole process

    def close(self) -> None:
        """Give the cores back."""
        for file in getattr(self, "_held", ()):
            file.close()
        self._held: list[IO[str]] = []
        self.visible: list[int] | None = None  # the machine's numbers of this process's cores; None: not started
        self._pid = self._lnc = 0

    @property
    def lnc(self) -> int:
        """Physical cores in a logical one; like the rest of the environment it is read once."""
        return self._lnc or int(os.environ.get("NEURON_LOGICAL_NC_CONFIG") or self.config.lnc)

    def start(self) -> list[int]:
        """Start the runtime if it has not started: read the environment, and take the cores."""
        with self._starting:
            if self.visible is None:
                self.visible = self._take()
                self._lnc = self.lnc
                self.cores = {core: Core(core) for core in self.visible}
                self._pid = os.getpid()
            if self._pid != os.getpid():
                raise RuntimeError("Incompatible runtime state: NRT_STATE_CHILD")
            return self.visible

    def core(self, local: int) -> Core:
        visible = self.start()
        return self.cores[visible[local]]

    def fail(self, local: int, status: int, **plan: Any) -> None:
        """Plan a fault of a core; arguments are those of `Fault`. Status 0 with `wait` is a slow run."""
        self.core(local).faults.append(Fault(status, **plan))

    @property
    def loads(self) -> list[int]:
        """Loads on each of the process's cores since the start."""
        return [self.cores[core].loads for core in self.visible or ()]

    def count(self) -> int:
        """Cores that this process would take, without taking them. Raises where the runtime would not start."""
        return len(self.visible) if self.visible is not None else self._wanted()[1]

    def _wanted(self) -> tuple[range, int, str]:
        """By the environment: among which cores, how many, and how the log writes them."""
        total = self.config.cores // self.lnc
        visible, count = os.environ.get("NEURON_RT_VISIBLE_CORES"), os.environ.get("NEURON_RT_NUM_CORES")
        if visible is None:
            size = int(count or 0) or total
            return range(total), size, str(size)
        try:
            cores = parse_cores(visible)
        except ValueError:
            log(f"nrt_init Invalid NEURON_RT_VISIBLE_CORES={visible}")
            raise RuntimeError(NOT_STARTED) from None
        if cores[-1] >= total:
            log(f"nrt_init Could not open the nd{cores[-1] * self.lnc // self.config.cores_per_chip}")
            raise RuntimeError(NOT_STARTED)
        return range(cores[0], cores[-1] + 1), len(cores), f"nc{cores[0]}-nc{cores[-1]}"

    def _take(self) -> list[int]:
        among, size, name = self._wanted()
        with self._locks() as locks:
            for start in range(among.start, among.stop - size + 1):
                if self._hold(locks, start, size):
                    return list(range(start, start + size))
            free = sum(self._hold(locks, core, 1) for core in among)
            self.close()
        log(f"nrt_allocate_neuron_cores NeuronCore(s) not available - Requested:{name} Available:{free}")
        raise RuntimeError(NOT_STARTED)

    def _hold(self, locks: Path, start: int, size: int) -> bool:
        """Lock the files of these cores' physical cores, all or none; the system frees them when the process ends."""
        taken: list[IO[str]] = []
        for core in range(start * self.lnc, (start + size) * self.lnc):
            file = open(locks / f"nc{core}", "a+")  # noqa: SIM115 - held as long as the process lives
            taken.append(file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                for each in taken:
                    each.close()
                return False
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        self._held += taken
        return True

    @contextlib.contextmanager
    def _locks(self) -> Iterator[Path]:
        """The directory of lock files, while no other process takes cores."""
        if not self.config.dir:
            with tempfile.TemporaryDirectory() as alone:
                yield Path(alone)
            return
        locks = Path(self.config.dir) / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with open(locks / "all", "a") as everything:
            fcntl.flock(everything, fcntl.LOCK_EX)
            yield locks


machine = Machine(read_config())


def build(root: Path, **config: Any) -> Config:
    """A machine's shared directory, which doubles as the root of its file system: device files, sysfs, neuron-ls.

    Processes that have DOUBLE_NEURON_DIR=root are on this machine.
    """
    made = Config(**config, dir=str(root))
    (root / "dev").mkdir(parents=True)
    for chip in range(made.cores // made.cores_per_chip):
        (root / "dev" / f"neuron{chip}").touch()
        device = root / "sys/devices/virtual/neuron_device" / f"neuron{chip}"
        device.mkdir(parents=True)
        (device / "core_count").write_text(f"{made.cores_per_chip}\n")
    (root / "machine.json").write_text(json.dumps(asdict(made)))
    tool = root / "opt/aws/neuron/bin/neuron-ls"
    tool.parent.mkdir(parents=True)
    script = Path(__file__).with_name("neuron_ls.py")
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "{root}" "$@"\n')
    tool.chmod(0o755)
    return made
