"""What processes of aneuron begin with: how their interpreter is called, what of the program is made the same in them.

Lives here: command lines, sys.path and `__main__` of the program, arguments on their way. Must not be here: who starts
what, and when.
"""

import ctypes
import json
import multiprocessing
import multiprocessing.process
import multiprocessing.spawn
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aneuron.remote.division import Share

# `sys.argv`: what the process is, for `ps`; its first argument; sys.path; then whatever it takes.
_BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[3]); import {module} as it; it.main(*sys.argv[2::2])"
_OF_MAIN = "init_main_from_name", "init_main_from_path"

UNGUARDED = (
    "a Pool(processes=) is started while the program is being imported by one of its engines, which need what is "
    "defined in it: put what runs under `if __name__ == '__main__':`, as for multiprocessing"
)


@dataclass(frozen=True)
class Begin:
    """What an engine is told first."""

    program: Mapping[str, Any]
    backend: Any  # pickled; the object itself where the engine is in this process
    share: Share
    total: int  # cores of the pool
    num_workers: int | None  # of the pool


def command(module: str, what: str, first: int | str, *more: str) -> list[str]:
    """The command line of a process that runs `main(first, *more)` of a module of this package."""
    program = of_program()
    args = [what, str(first), json.dumps(program["sys_path"])]
    for each in more:
        args += [each, ""]
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    executable = os.fsdecode(multiprocessing.spawn.get_executable())
    return [executable, *flags, "-c", _BOOT.format(module=module), *args]


# The program.


def of_program() -> dict[str, Any]:
    """What of this program its processes must have too; as multiprocessing does it."""
    found = multiprocessing.spawn.get_preparation_data("aneuron")
    wanted = "sys_path", "sys_argv", "dir", "orig_dir", *_OF_MAIN
    return {name: found[name] for name in wanted if name in found}


def prepare(program: Mapping[str, Any]) -> None:
    """Make a new process like the program, but for `__main__`."""
    multiprocessing.spawn.prepare({name: value for name, value in program.items() if name not in _OF_MAIN})


def prepare_main(program: Mapping[str, Any]) -> None:
    """Import what is the program's `__main__`, once, under another name, so that what is defined there is found.

    It is not for a thread with a running loop: what the program runs if it is not guarded says so only elsewhere.
    """
    main = {name: program[name] for name in _OF_MAIN if name in program}
    process: Any = multiprocessing.process.current_process()
    process._inheriting = True
    try:
        multiprocessing.spawn.prepare(main)
    finally:
        del process._inheriting


def check_guarded() -> None:
    """Raise `RuntimeError` while the program is being imported by a process that it has spawned."""
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        raise RuntimeError(UNGUARDED)


def check_main(program: Mapping[str, Any], what: str) -> None:
    """Raise `TypeError` for what is defined in a program that no other process can import: a session, a notebook."""
    if not any(name in program for name in _OF_MAIN):
        raise TypeError(
            f"{what} is defined in a program without a file (a session, a notebook, python -c), which engines, "
            "processes of their own, cannot import: put it into a module"
        )


# Arguments.


def names_main(data: bytes) -> bool:
    """Whether a pickle needs what is defined in the program itself."""
    return b"__main__" in data


def packed(given: Mapping[str, Any], program: Mapping[str, Any]) -> dict[str, bytes]:
    """A model's arguments, each pickled. Raises `TypeError` for one that cannot be."""
    return {name: packed_one(name, value, program) for name, value in given.items()}


def packed_one(name: str, value: Any, program: Mapping[str, Any]) -> bytes:
    """An argument, pickled. Raises `TypeError` if it cannot be."""
    try:
        data = pickle.dumps(value, protocol=5)
    except Exception as error:
        raise TypeError(
            f"{name}={value!r:.80} cannot be pickled ({type(error).__name__}: {error}), and engines are processes of "
            "their own: pass what is defined at the top level of a module that can be imported"
        ) from error
    if names_main(data):
        check_main(program, f"{name}={value!r:.80}")
    return data


def unpacked(given: Mapping[str, bytes]) -> dict[str, Any]:
    """The arguments."""
    return {name: pickle.loads(data) for name, data in given.items()}


# Ends.


def die_with(parent: int) -> None:
    """Have Linux end this process 16 seconds after the thread that has spawned it, whatever holds the interpreter; at
    once if that has ended already.

    The kernel sends a signal then, SIGSTKFLT, which nothing else uses. Its handler must need no Python, and leave time
    for what Python has to tidy up: it is alarm(2), which takes the signal's number, 16, for seconds.
    """
    if sys.platform == "linux" and hasattr(signal, "SIGSTKFLT"):
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(signal.SIGSTKFLT, ctypes.cast(libc.alarm, ctypes.c_void_p))
        libc.prctl(1, int(signal.SIGSTKFLT), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def outlive_signals() -> None:
    """A terminal and a service manager signal all processes of a program: this one ends when it is told to, or when
    nobody needs it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
