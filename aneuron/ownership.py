"""Whose each field is that changes: said once at its class, and checked in tests.

A class that the loop and other threads share says `owned = Owned(...)`. Its fields that are not named there stay what
they are once it is made. Nothing is checked, and nothing costs anything, but where the core runs as Python with
ANEURON_CHECK_OWNERS set: there `lock()` is one that knows who holds it, what is given to it by `adopt` is looked after
from then on, and who may not touch a field gets an `OwnershipError`.

Must not be here: what belongs to whom.
"""

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import MemberDescriptorType
from typing import Any

from aneuron._native import why_pure

CHECKED = why_pure is not None and bool(os.environ.get("ANEURON_CHECK_OWNERS"))

violations: list[str] = []  # for tests: the error itself may end in a log


class OwnershipError(AssertionError):
    """A thread has touched a field that is not its own to touch."""


class _Lock:
    """A lock that knows who holds it, and whose loop it is."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.holder = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if self.holder == threading.get_ident():
            _complain(f"{threading.current_thread().name} would wait for the lock that it holds itself")
        self._lock.acquire()
        self.holder = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self.holder = 0
        self._lock.release()


def lock() -> AbstractContextManager[Any]:
    """The lock of a board, on its loop."""
    return _Lock() if CHECKED else threading.Lock()


def _with_lock(lock: _Lock) -> bool:
    return lock.holder == threading.get_ident()


def _by_loop(lock: _Lock) -> bool:
    """On its thread; on any, once it runs no more."""
    return asyncio._get_running_loop() is lock.loop or not lock.loop.is_running()


def _by_either(lock: _Lock) -> bool:
    return _with_lock(lock) or _by_loop(lock)


def _by_both(lock: _Lock) -> bool:
    return _with_lock(lock) and _by_loop(lock)


def _by_anybody(lock: _Lock) -> bool:
    return True


_Rule = Callable[[_Lock], bool]
_NOTHING: dict[str, Any] = {}


class Owned:
    """Which fields of a class are whose.

    lock: read and set with the board's lock. loop: read and set on the loop's thread. both: set there with the lock, so
    that either is enough for reading. set_with_lock, set_by_loop: read by anybody; what is read may be of a moment
    before. free: no one's, as its class explains. parts: what is adopted with it. via: the path to an object that was
    adopted, from those that are too many to be.
    """

    def __init__(
        self,
        lock: Iterable[str] = (),
        loop: Iterable[str] = (),
        both: Iterable[str] = (),
        set_with_lock: Iterable[str] = (),
        set_by_loop: Iterable[str] = (),
        free: Iterable[str] = (),
        parts: Iterable[str] = (),
        via: str = "",
    ) -> None:
        rules: list[tuple[str, Iterable[str], _Rule, _Rule]] = [
            ("is the lock's", lock, _with_lock, _with_lock),
            ("is the loop's", loop, _by_loop, _by_loop),
            ("is set by the loop, with the lock", both, _by_either, _by_both),
            ("is set with the lock", set_with_lock, _by_anybody, _with_lock),
            ("is set by the loop", set_by_loop, _by_anybody, _by_loop),
        ]
        self.rules = {name: (words, read, write) for words, names, read, write in rules for name in names}
        self.names = frozenset((*self.rules, *free))  # of all fields that change
        self.parts = parts
        self.via = via.split(".") if via else ()
        self._checked: type | None = None

    def __set_name__(self, owner: type, name: str) -> None:
        if CHECKED and self.via:
            for field, check in self._checks(owner).items():
                setattr(owner, field, check)

    def checked(self, kind: type) -> type:
        """The class of those that are looked after."""
        if self._checked is None:
            named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
            self._checked = type(kind.__name__, (kind,), named | self._checks(kind))
        return self._checked

    def _checks(self, kind: type) -> dict[str, Any]:
        fields = {name: _Field(kind, name, *rule, self) for name, rule in self.rules.items()}
        return {**fields, "__setattr__": _setattr_of(kind, self)}

    def lock_of(self, owned: Any) -> _Lock | None:
        """The lock that an object was adopted by, if it was."""
        for name in self.via:
            owned = getattr(owned, name, None)
        return getattr(owned, "__dict__", _NOTHING).get("_adopted_by")


class _Field:
    """A field that is looked after."""

    def __init__(self, owner: type, name: str, words: str, read: _Rule, write: _Rule, owned: Owned) -> None:
        self.name, self.read, self.write, self.owned = name, read, write, owned
        self.words = f"{owner.__name__}.{name} {words}"
        self.slot: MemberDescriptorType | None = owner.__dict__.get(name)

    def __get__(self, owner: Any, kind: type) -> Any:
        if owner is None:
            return self
        self._check(owner, self.read, "read")
        if self.slot is not None:
            return self.slot.__get__(owner, kind)
        try:
            return owner.__dict__[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, owner: Any, value: Any) -> None:
        self._check(owner, self.write, "set")
        if self.slot is not None:
            self.slot.__set__(owner, value)
        else:
            owner.__dict__[self.name] = value

    def _check(self, owner: Any, rule: _Rule, what: str) -> None:
        lock = self.owned.lock_of(owner)
        if lock is not None and not rule(lock):
            _complain(f"{self.words}, and was {what} by {threading.current_thread().name}")


def _setattr_of(owner: type, owned: Owned) -> Any:
    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name not in owned.names and owned.lock_of(self) is not None and not (owned.via and not hasattr(self, name)):
            _complain(f"{owner.__name__}.{name} was set, and `owned` does not say whose it is")
        object.__setattr__(self, name, value)

    return __setattr__


def _complain(text: str) -> None:
    """Raise, unless it is a test that looks into the matter."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"] == __name__:
        frame = frame.f_back
    if CHECKED and frame.f_globals["__name__"].startswith("aneuron."):
        text = f"{text}, at {frame.f_code.co_filename}:{frame.f_lineno}"
        violations.append(text)
        raise OwnershipError(text)


def adopt(lock: Any, *objects: Any) -> None:
    """Look after objects, and their parts, from now on."""
    if CHECKED:
        for each in objects:
            if (owned := getattr(each, "owned", None)) is not None:
                adopt(lock, *[getattr(each, name) for name in owned.parts])
                each.__dict__["_adopted_by"] = lock
                object.__setattr__(each, "__class__", owned.checked(type(each)))


def _forget_all() -> None:
    """In a process that was forked all are dead, and nobody's."""
    global CHECKED
    CHECKED = False


if CHECKED and hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
