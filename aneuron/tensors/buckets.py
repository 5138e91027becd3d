"""Which compiled size fits: lengths into buckets, rows into batch sizes.

Lives here: numbers, and what the user says about buckets. Must not be here: torch, asyncio, a clock; which tensors have
a length (lengths.py, outputs.py), which rows run next (sched/scheduler.py).
"""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from aneuron.errors import ShapeError

Key = str | int  # what names tensors of a call's inputs or of an output
STEP = 8  # positions; kernels compute several at once


@dataclass(frozen=True)
class Buckets:
    """The lengths that a model takes, and how inputs are brought to them and outputs back.

    A call's inputs are padded along `dim` to the smallest of `sizes` that holds them. Calls of one bucket share
    batches, and may ride in a longer one's: which do is chosen by what each shape has taken on the core, so that all
    that wait take least; none waits longer for it than twice what it would in order of coming. Outputs that carry the
    length are cut back to the call's own. What the model makes of the padding in the others is its own affair: that is
    what attention masks are for.

    dim: the dimension where the length stands; it counts in the whole shape, batch dimension included.
    sizes: the lengths that the model was compiled for, in any order; kept sorted. None, for a model that takes any:
        steps of 8 up to 128, from there on eight between a power of two and the next, up to `max`. Batches have 1, 2,
        3, 4, 6, 8, 12, 16 ... rows there, so that the number of shapes is bounded, for each of which kernels and
        allocators may keep memory; rows that are added repeat a real one. Warmed up are the example's length, the
        longest, and the shortest, which a model need not take.
    side: where padding is added, as with tokenizers: models that look at the last position want it on the "left".
    max: the longest that the model takes, where `sizes` is None; 512 unless you say another.
    pad: a number, and then the inputs that have a length are those of the example whose size at `dim` is that of the
        first tensor that has this dimension. Without an example those of the call: sixteen features then look like a
        length in a call that is 16 long. Or a mapping, which names the inputs that have a length and says what each
        is padded with: `{"input_ids": 0, "attention_mask": 0}`. Infinities will do, NaN is a fault on some devices.
    unpad: None: learn by comparing two buckets which outputs carry the length. False: none does. Else the ones that
        do, `["last_hidden_state"]`; where the length stands elsewhere in them than at `dim`, a mapping says where,
        `{"logits": 2, "attentions": (2, 3)}`.

    A key names tensors: a str is a keyword, dict key or attribute that stands on the way to them (it then names all
    tensors in there), or a tensor's whole path as the errors print it, `"output['hidden'][0]"`; an int is a tensor's
    position among the tensors (depth first; of inputs the positional ones, then those by keyword in order of name).

    Raises `ValueError` for what cannot be meant.

        >>> buckets = Buckets(sizes=(128, 32, 64))
        >>> buckets.sizes
        (32, 64, 128)
        >>> buckets.fit(33)
        64
        >>> Buckets(max=512).fit(33)
        40
    """

    dim: int = 1
    sizes: Sequence[int] = None  # type: ignore[assignment]  # `__post_init__` makes the steps of it
    pad: float | Mapping[Any, float] = field(default=0, hash=False)
    unpad: Literal[False] | Collection[Key] | Mapping[Any, int | tuple[int, ...]] | None = field(
        default=None, hash=False
    )
    max: int | None = None
    side: Literal["right", "left"] = "right"
    free: bool = field(default=False, init=False, repr=False)  # whether the model takes any length

    def __post_init__(self) -> None:
        if not _is_int(self.dim):
            raise ValueError(f"dim={self.dim!r}: expected an int, the dimension where the length stands")
        object.__setattr__(self, "free", self.sizes is None or isinstance(self.sizes, _Steps))
        longest = _checked_max(512 if self.max is None else self.max)
        object.__setattr__(self, "sizes", _Steps(steps(longest)) if self.free else _checked_sizes(self.sizes))
        if not self.free and self.max is not None:
            raise ValueError(
                f"max={self.max!r} with sizes={self.sizes}: the largest of the sizes is the most; leave it out"
            )
        if self.side not in ("right", "left"):
            raise ValueError(f"side={self.side!r}: expected 'right' or 'left', where padding is added")
        object.__setattr__(self, "pad", _checked_pad(self.pad))
        object.__setattr__(self, "unpad", _checked_unpad(self.unpad))

    def fit(self, length: int) -> int:
        """The smallest bucket that holds `length`. Raises `ShapeError` if none does, or the length is 0."""
        sizes = self.sizes
        if not length:
            raise ShapeError(f"the inputs have length 0 along dim {self.dim}; send one position at least")
        if length > sizes[-1]:
            most, more = f"the largest bucket is {sizes[-1]}", "compile a larger one and add it to Buckets(sizes=...)"
            if self.free:
                most, more = f"the longest is max={sizes[-1]}", "if the model takes more, raise Buckets(max=...)"
            raise ShapeError(f"the inputs have length {length} along dim {self.dim}; {most}: shorten them, or {more}")
        return sizes[bisect_left(sizes, length)]


class _Steps(tuple[int, ...]):
    """The lengths of who has named none: shown so, and made anew where `dataclasses.replace` gives them back."""

    def __repr__(self) -> str:
        return "None"


def steps(most: int) -> tuple[int, ...]:
    """The lengths to which those of a model that takes any are rounded up: few, and none by more than an eighth from
    64 on.

        >>> steps(20), steps(200)[-6:]
        ((8, 16, 20), (128, 144, 160, 176, 192, 200))
    """
    lengths, at = [], STEP
    while at < most:
        lengths.append(at)
        at += max(STEP, 1 << at.bit_length() - 4)
    return (*lengths, most)


def beside(bucket: int, buckets: Collection[int]) -> int | None:
    """Another one, to see what depends on the length: about twice as long, which a model takes rather than a shorter
    one, else the next shorter; None if there is no other.

        >>> beside(8, (8, 16, 24)), beside(24, (8, 16, 24)), beside(8, [8])
        (16, 16, None)
    """
    if longer := [each for each in buckets if each > bucket]:
        return min(longer, key=lambda each: abs(each - 2 * bucket))
    return max((each for each in buckets if each < bucket), default=None)


def _checked_max(most: Any) -> int:
    if not _is_int(most) or most < 1:
        raise ValueError(
            f"max={most!r}: expected an int of at least 1, the longest that the model takes (a transformer says it as "
            "config.max_position_embeddings)"
        )
    return int(most)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_sizes(sizes: Any) -> tuple[int, ...]:
    rule = "expected different ints of at least 1, one for each compiled length, such as (32, 64, 128)"
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Iterable):
        raise ValueError(f"sizes={sizes!r}: {rule}")
    given = list(sizes)
    for size in given:
        if not _is_int(size) or size < 1:
            raise ValueError(f"sizes={sizes!r}: {size!r} cannot be a bucket; {rule}")
        if given.count(size) > 1:
            raise ValueError(f"sizes={sizes!r}: {size} is there twice; {rule}")
    if not given:
        raise ValueError(f"sizes={sizes!r}: no bucket; {rule}")
    return tuple(sorted(given))


def _checked_pad(pad: Any) -> float | dict[Key, float]:
    rule = "expected a number, or a mapping that says for each input that has a length what it is padded with"
    named = dict(pad) if isinstance(pad, Mapping) else {"": pad}
    if not named:
        raise ValueError(f"pad={pad!r}: no input would have a length; {rule}")
    for key, value in named.items():
        if not isinstance(value, (int, float)):
            raise ValueError(f"pad={pad!r}: {value!r} is not a number; {rule}")
        if value != value:
            raise ValueError(f"pad={pad!r}: NaN is a fault on some devices; pad with a number that the model masks")
        if isinstance(pad, Mapping):
            _check_key("pad", pad, key)
    return named if isinstance(pad, Mapping) else named[""]


def _checked_unpad(unpad: Any) -> Any:
    if unpad is None or unpad is False:
        return unpad
    if isinstance(unpad, (str, bytes)) or not isinstance(unpad, Collection):
        raise ValueError(
            f"unpad={unpad!r}: expected None (learn), False (no output carries the length), a list of the outputs that "
            "do (names or positions), or a mapping from those to the dimension where it stands"
        )
    for key in unpad:
        _check_key("unpad", unpad, key)
    if not isinstance(unpad, Mapping):
        return tuple(unpad)
    for key, dims in unpad.items():
        if not (_is_int(dims) or (isinstance(dims, tuple) and dims and all(map(_is_int, dims)))):
            raise ValueError(f"unpad={unpad!r}: {key!r} has {dims!r}; expected a dimension, or a tuple of several")
    return dict(unpad)


def _check_key(what: str, value: Any, key: Any) -> None:
    if not (isinstance(key, str) and key) and not (_is_int(key) and key >= 0):
        raise ValueError(f"{what}={value!r}: {key!r} names no tensor; expected a name, or a position from 0 on")
