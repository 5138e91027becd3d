"""Tenants as the scheduler knows them: one object of ours for all names that are equal.

Lives here: where a user's `__hash__` and `__eq__` are called, once for each `options(tenant=)`, by its caller. Must not
be here: turns, shares (order.py). The scheduler compares tenants with its lock held; what raises there, or takes its
time, would take every caller's model along.
"""

from collections.abc import Hashable
from typing import Any
from weakref import WeakValueDictionary


class Tenant:
    """Who asks. Equal to itself only, and hashed by its address: no code of a user's is run."""

    __slots__ = ("__weakref__", "name")

    def __init__(self, name: Hashable) -> None:
        self.name = name

    def __repr__(self) -> str:
        return repr(self.name)


class _Key:
    """A name in the table. Equal to itself only, so that the end of a tenant runs no code of a user's either."""

    __slots__ = ("hash", "name")

    def __init__(self, name: Any, hashed: int) -> None:
        self.name, self.hash = name, hashed

    def __hash__(self) -> int:
        return self.hash


class _Probe(_Key):
    """A name that is looked for: it compares itself with those in the table."""

    __slots__ = ()
    __hash__ = _Key.__hash__

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, _Key)
        mine, theirs = self.name, other.name
        if mine is theirs:
            return True
        mine_is: Any = type(mine)
        answer = mine_is.__eq__(mine, theirs)  # what it raises is its own caller's
        if answer is NotImplemented:
            try:
                theirs_is: Any = type(theirs)
                answer = theirs_is.__eq__(theirs, mine)
            except Exception:  # another caller's tenant; this one is not to blame
                return False
        return answer is not NotImplemented and bool(answer)


# Those that a view, a call or a queue still holds: it does not grow with the tenants that have been.
_known: "WeakValueDictionary[_Key, Tenant]" = WeakValueDictionary()


def tenant_of(name: Hashable) -> Tenant | None:
    """The tenant of that name; None for None. Raises TypeError for a name that is not hashable, and what it raises.

    >>> tenant_of("acme") is tenant_of("ac" + "me"), tenant_of("acme") is tenant_of("other")
    (True, False)
    """
    if name is None:
        return None
    try:
        hashed = hash(name)
    except TypeError:
        raise TypeError(f"tenant={name!r:.80} is not hashable; pass a name, a number or a tuple") from None
    found = _known.get(_Probe(name, hashed))
    if found is None:
        found = _known[_Key(name, hashed)] = Tenant(name)
    return found
