"""When a core is trusted, when it is tried again, and whether an input or the core is to blame.

Lives here: decisions about faults. Must not be here: asyncio, threads, torch, clocks, chance: they are arguments. What
follows from a decision is recovery.py's.
"""

from typing import Generic, TypeVar

FIRST = 0.5  # seconds until a core that has failed is loaded again
LONGEST = 60.0  # seconds: each further failure doubles the time, up to this
LIMIT = 6  # failures in a row, after which a core stays out
STEADY = 60.0  # seconds of service after which earlier failures are forgotten

T = TypeVar("T")


class Health:
    """The state of one core.

        loading ---> ready <--- suspect         loaded again, and not proven: its first batch tells
           ^           |           |
           |           v           v
           +------ quarantined ----+---> failed     for good: the process must be restarted

    `recoverable`: whether loading a core again can mend it. `proven`: whether loading it includes a run.
    """

    __slots__ = ("_proven", "_recoverable", "_since", "failures", "state", "until")

    def __init__(self, recoverable: bool, proven: bool) -> None:
        self.state = "loading"
        self.failures = 0  # in a row
        self.until: float | None = None  # when a quarantined core is loaded again
        self._recoverable = recoverable
        self._proven = proven
        self._since = 0.0  # when it came into service

    @property
    def serves(self) -> bool:
        """Whether batches may be bound to it."""
        return self.state in ("ready", "suspect")

    def loads(self) -> None:
        """It is being loaded."""
        self.state, self.until = "loading", None

    def loaded(self, now: float) -> None:
        """It is loaded, and warmed up if there is an example."""
        self.state = "ready" if self._proven or not self.failures else "suspect"
        self._since = now

    def served(self) -> None:
        """It has executed a batch."""
        if self.state == "suspect":
            self.state = "ready"

    def faulted(self, now: float, chance: float) -> float | None:
        """It has failed, or could not be loaded: seconds until it is to be loaded again, None if it stays out.

        `chance`, from 0 to 1, spreads the times of cores that have failed together: by a quarter to either side.
        """
        if self.serves and now - self._since >= STEADY:
            self.failures = 0
        self.failures += 1
        if not self._recoverable or self.failures >= LIMIT:
            self.fail()
            return None
        delay = min(LONGEST, FIRST * 2.0 ** (self.failures - 1)) * (0.75 + chance / 2)
        self.state, self.until = "quarantined", now + delay
        return delay

    def fail(self) -> None:
        """It stays out."""
        self.state, self.until = "failed", None


class Bisection(Generic[T]):
    """A batch of several calls that has failed, by its input as it seems, and is run again in parts.

    As long as no part has ended well, and all has happened on one core, that core may be what fails: the calls that
    failed alone are `held`. When no part is left, one of them is tried on another core.
    """

    __slots__ = ("__weakref__", "_cores", "_decided", "_parts", "asked", "held")

    def __init__(self) -> None:
        self.held: list[T] = []
        self.asked: T | None = None  # the one that is tried on another core
        self._parts = 1  # that have not ended
        self._cores: set[int] = set()
        self._decided = False

    def split(self, parts: int) -> None:
        """A part has failed and is replaced by so many smaller ones."""
        self._parts += parts - 1

    def ended(self, core: int, well: bool, alone: T | None = None) -> list[T]:
        """A part has ended on a core, well or not; `alone`: the one call that has failed. Those that are to blame."""
        self._parts -= 1
        self._cores.add(core)
        if alone is not None:
            self.held.append(alone)
        if well or len(self._cores) > 1:
            self._decided = True
        return self.let_go() if self._decided else []

    def close(self) -> list[T]:
        """Some of its parts will not run: whoever has failed alone, or does so from now on, is to blame."""
        self._decided = True
        return self.let_go()

    def let_go(self) -> list[T]:
        """Those that are held, no longer."""
        held, self.held = self.held, []
        return held

    def ask(self) -> T:
        """One of those held, to be tried on another core."""
        self.asked = asked = self.held.pop(0)
        return asked

    @property
    def open(self) -> bool:
        """Whether every part has failed, all on one core: another one has to be asked."""
        return not self._parts and bool(self.held)
