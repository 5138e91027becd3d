"""Users' objects that others are told apart by, as the scheduler knows them: one object of ours for all that are equal.

Lives here: where a user's `__hash__` and `__eq__` are called, by the call that brings the object. Must not be here:
what is done with a tenant (sched/fair_queue.py) or with the keys of inputs (tensors/nested.py). The scheduler compares
with its lock held: what raises there, or takes its time, would take every caller's model along.
"""

from collections.abc import Hashable
from typing import Any
from weakref import WeakValueDictionary


class Name:
    """A tenant, or a key of inputs. Equal to itself only, and hashed by its address: no code of a user's is run."""

    __slots__ = ("__weakref__", "given")

    def __init__(self, given: Hashable) -> None:
        self.given = given

    def __repr__(self) -> str:
        return repr(self.given)


class _Key:
    """An object in the table. Equal to itself only, so that its end runs no code of a user's either."""

    __slots__ = ("given", "hash")

    def __init__(self, given: Any, hashed: int) -> None:
        self.given, self.hash = given, hashed

    def __hash__(self) -> int:
        return self.hash


class _Probe(_Key):
    """An object that is looked for: it compares itself with those in the table."""

    __slots__ = ()
    __hash__ = _Key.__hash__

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, _Key)
        mine, theirs = self.given, other.given
        if mine is theirs:
            return True
        mine_is: Any = type(mine)
        answer = mine_is.__eq__(mine, theirs)  # what it raises is its own caller's
        if answer is NotImplemented:
            try:
                theirs_is: Any = type(theirs)
                answer = theirs_is.__eq__(theirs, mine)
            except Exception:  # another caller's; this one is not to blame
                return False
        return answer is not NotImplemented and bool(answer)


# Those that a view, a call or a queue still holds: it does not grow with the tenants that have been.
_known: "WeakValueDictionary[_Key, Name]" = WeakValueDictionary()


def name_of(given: Hashable) -> Hashable:
    """The one name of all objects of a kind that are equal to this. Raises what hashing and comparing them raises.

    A str or an int, but not one of a subclass, is its own: Python compares those itself.

    >>> name_of("acme"), name_of((1, "acme")) is name_of((1, "ac" + "me")), name_of((1, "acme")) is name_of((2, "acme"))
    ('acme', True, False)
    """
    if type(given) is str or type(given) is int:
        return given
    hashed = hash(given)
    found = _known.get(_Probe(given, hashed))
    if found is None:
        found = _known[_Key(given, hashed)] = Name(given)
    return found
