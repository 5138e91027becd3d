"""How many CPUs this process may use: its affinity, and the quotas of its cgroups.

Lives here: what the files of Linux say. Must not be here: torch, cores.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Read = Callable[[str], str | None]  # a file's text; None where it cannot be read

_granted: tuple[float, str] | None = None


@dataclass(frozen=True, slots=True)
class Cpus:
    """CPUs to use, and why so many."""

    number: int
    why: str
    limited: bool  # whether it is a quota that says so, of which torch knows nothing


def available() -> Cpus:
    """What this process may use now."""
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on; it follows PYTHON_CPU_COUNT
        seen = os.process_cpu_count() or 1
    else:
        seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return within(seen, min((limit for limit in (quota(_read), _granted) if limit is not None), default=None))


def grant(number: float, who: str) -> None:
    """Heed that somebody who shares the machine out says so many CPUs are this process's; 0: as many as there are."""
    global _granted
    _granted = (number, who) if number > 0 else None


def within(seen: int, limit: "tuple[float, str] | None") -> Cpus:
    """The least of what is seen and a quota, which counts as whole CPUs, rounded up."""
    number = seen if limit is None else min(seen, max(1, math.ceil(limit[0])))
    why = f"this process may use {seen} CPU{'s' * (seen != 1)}"
    if limit is None or limit[0] >= seen:
        return Cpus(number, why, False)
    return Cpus(number, f"{why}, and {limit[1]} allows {limit[0]:g} of them: {number}", True)


def quota(read: Read) -> tuple[float, str] | None:
    """The least quota of this process's cgroups and those around them, in CPUs, and the file that has it; or None."""
    found = [limit for limit in _limits(read) if limit is not None]
    return min(found, default=None)


def _limits(read: Read) -> Iterator[tuple[float, str] | None]:
    for folder, unified in _folders(read):
        if unified:
            path = f"{folder}/cpu.max"
            words = (read(path) or "").split()
        else:
            path = f"{folder}/cpu.cfs_quota_us"
            words = f"{read(path) or ''} {read(f'{folder}/cpu.cfs_period_us') or ''}".split()
        yield _cpus_of(words, path)


def _cpus_of(words: list[str], path: str) -> tuple[float, str] | None:
    """A quota and a period, both in microseconds; "max" and -1 are none."""
    try:
        share, period = int(words[0]), int(words[1]) if len(words) > 1 else 100_000
    except (ValueError, IndexError):
        return None
    return (share / period, path) if share > 0 and period > 0 else None


def _folders(read: Read) -> Iterator[tuple[str, bool]]:
    """The folders of this process's cgroup and of those around it, as far as they can be seen; whether it is v2."""
    mounts = [_mount(line) for line in (read("/proc/self/mountinfo") or "").splitlines()]
    for line in (read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        unified = not controllers
        if not unified and "cpu" not in controllers.split(","):
            continue
        for mount in mounts:
            if mount is None or mount.unified != unified or not (unified or "cpu" in mount.options):
                continue
            inside = path.removeprefix(mount.root.rstrip("/")) if _is_in(path, mount.root) else ""
            names = [name for name in inside.split("/") if name]
            for depth in range(len(names), -1, -1):
                yield "/".join([mount.point.rstrip("/"), *names[:depth]]), unified


@dataclass(frozen=True, slots=True)
class _Mount:
    root: str  # the cgroup that is mounted
    point: str
    unified: bool
    options: list[str]


def _mount(line: str) -> _Mount | None:
    """A line of mountinfo, if it is a cgroup's."""
    before, _, after = line.partition(" - ")
    fields, kind = before.split(), after.split()
    if len(fields) < 5 or not kind or kind[0] not in ("cgroup", "cgroup2"):
        return None
    root, point = (re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field) for field in fields[3:5])
    return _Mount(root, point, kind[0] == "cgroup2", kind[2].split(",") if len(kind) > 2 else [])


def _is_in(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None
