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


@dataclass(frozen=True)
class Buckets:
    """The lengths that a model was compiled for, and how inputs are brought to them and outputs back.

    A call's inputs are padded along `dim` to the smallest of `sizes` that holds them; calls of one bucket share
    batches, and may ride in a longer one's. Outputs that carry the length are cut back to the call's own. What the
    model makes of the padding in the others is its own affair: that is what attention masks are for.

    dim: the dimension where the length stands; it counts in the whole shape, batch dimension included.
    sizes: the buckets, in any order; kept sorted.
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
    """

    dim: int = 1
    sizes: Sequence[int] = (32, 64, 128)
    pad: float | Mapping[Any, float] = field(default=0, hash=False)
    unpad: Literal[False] | Collection[Key] | Mapping[Any, int | tuple[int, ...]] | None = field(
        default=None, hash=False
    )

    def __post_init__(self) -> None:
        if not _is_int(self.dim):
            raise ValueError(f"dim={self.dim!r}: expected an int, the dimension where the length stands")
        object.__setattr__(self, "sizes", _checked_sizes(self.sizes))
        object.__setattr__(self, "pad", _checked_pad(self.pad))
        object.__setattr__(self, "unpad", _checked_unpad(self.unpad))

    def fit(self, length: int) -> int:
        """The smallest bucket that holds `length`. Raises `ShapeError` if none does, or the length is 0."""
        sizes = self.sizes
        if not length:
            raise ShapeError(f"the inputs have length 0 along dim {self.dim}; send one position at least")
        if length > sizes[-1]:
            raise ShapeError(
                f"the inputs have length {length} along dim {self.dim}; the largest bucket is {sizes[-1]}: shorten "
                "them, or compile a larger one and add it to Buckets(sizes=...)"
            )
        return sizes[bisect_left(sizes, length)]


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
