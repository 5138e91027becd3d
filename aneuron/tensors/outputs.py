"""What the model returned, looked through: its tensors, and which of them carry the length of the batch's bucket.

Lives here: what is wrong with an output, and learning from two where the length stands. Must not be here: handing out
rows and cutting them (rows.py), which bucket fits (buckets.py).
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from aneuron.errors import OutputError
from aneuron.tensors.buckets import Buckets
from aneuron.tensors.copying import fits, tensor
from aneuron.tensors.marked import Rows, Shared, is_mark  # never subclassed; `isinstance` asks Rows' metaclass, slowly
from aneuron.tensors.nested import Marks, Path, Sealed, fill, is_masked, mark, named, paths, walk
from aneuron.tensors.quantized import QUANTIZED, grid

Carried = tuple[tuple[int, ...], ...]  # for each tensor of an output the dims where the length stands: none, mostly one


class Output:
    """What the model returned for a batch, looked through: its tensors on the host, and what is marked in it.

    `size` is the number of rows of the batch, None where it is not to be checked yet; `asked` tells kinds of calls
    apart, whose outputs may mean different things; `marks` says where lists with an entry a row stand (`Rows`), and
    what all callers get (`Shared`). `constants` are what is neither. Raises `OutputError`.
    """

    def __init__(self, value: Any, size: int | None, dim: int, asked: Hashable = None, marks: Marks = {}) -> None:  # noqa: B006  # never written to
        self.value = value = mark(value, marks) if marks else value
        self.dim = dim
        self.asked = asked
        self.leaves: list[Any]
        self.structure: list[Any]
        self.constants: Sequence[Any] = ()
        self._container: Any = type(value)  # None if it holds more than tensors
        if self._container is torch.Tensor:
            self.leaves, self.structure = [checked(value, size, dim)], _LONE
            return
        found = _flat(value)
        leaves, structure, constants = found or ([], [], [])
        if found is None:
            self._container = None
            try:
                walk(value, leaves, structure, constants, by_name=True)
            except Sealed as error:
                raise OutputError(f"the model returned {error}") from error
        self.structure, self.constants = structure, constants
        self.leaves = [leaf if is_mark(leaf) else checked(leaf, None, dim) for leaf in leaves]
        if size is not None:
            self.check(size)

    def filled(self, leaves: Sequence[Any]) -> Any:
        """The output with other leaves in the place of its own."""
        kind = self._container
        if kind is None:
            return fill(self.value, iter(leaves))
        if kind is torch.Tensor:
            return leaves[0]
        return dict(zip(self.value, leaves, strict=True)) if kind is dict else kind(leaves)

    def check(self, size: int) -> None:
        """Raise `OutputError` unless everything in it can be cut into `size` rows."""
        for leaf in self.leaves:
            if type(leaf) is Rows:
                if len(leaf) != size:
                    raise OutputError(f"the model returned a list of {len(leaf)} entries for a batch of {size} rows")
            elif type(leaf) is not Shared:
                checked(leaf, size, self.dim)
        for constant in self.constants:
            if constant is not None:
                raise OutputError(
                    f"the model returned a {type(constant).__name__} ({constant!r:.60}); only tensors and lists with "
                    "the batch's rows can be handed out to the calls that shared the batch: return these, and None "
                    "where there is nothing; outputs={name: 'whole'} gives a value to every caller"
                )
        if not self.leaves:
            raise OutputError("the model returned no tensor; every call needs its rows of at least one")

    def fits(self, size: int) -> bool:
        """Whether everything in it could be cut into `size` rows."""
        try:
            self.check(size)
        except OutputError:
            return False
        return True

    def paths(self) -> list[Path]:
        """Where its tensors and marks stand, in the order of `leaves`."""
        return list(paths(self.value, "output"))


_LONE: list[Any] = [torch.Tensor]  # what `walk` would find around a tensor


def _flat(value: Any) -> tuple[list[Any], list[Any], list[Any]] | None:
    """What `walk` would find of what holds nothing but tensors, at once; None for all else."""
    kind = type(value)
    names: Iterable[Any]
    if kind is dict:
        leaves, names = list(value.values()), value
        if any(type(name) is not str for name in value):
            return None
    elif kind is tuple or kind is list:
        leaves, names = list(value), range(len(value))
    else:
        return None
    if not leaves or any(type(leaf) is not torch.Tensor for leaf in leaves):
        return None
    return leaves, [(kind, *names, ""), *(torch.Tensor,) * len(leaves)], []


def kind(output: Output) -> Hashable:
    """What an output is like, whatever its rows: structure, and the shapes and dtypes of one row."""
    rows: list[Any] = []
    for leaf in output.leaves:
        if isinstance(leaf, torch.Tensor):
            dim = output.dim % leaf.ndim if leaf.ndim else 0
            rows.append(((*leaf.shape[:dim], *leaf.shape[dim + 1 :]), leaf.dtype))
        else:
            rows.append(type(leaf))
    return tuple(output.structure), tuple(rows)


def checked(leaf: Any, size: int | None, dim: int) -> torch.Tensor:
    """One tensor of an output, on the host."""
    if fits(leaf, size, dim):  # nothing is wrong with it
        return leaf  # type: ignore[no-any-return]
    if not isinstance(leaf, torch.Tensor):
        if is_masked(leaf):
            raise OutputError("the model returned a masked array, whose mask no tensor has; return it beside the data")
        try:
            leaf = tensor(leaf)
        except TypeError:
            raise OutputError(
                f"the model returned a NumPy array of dtype {leaf.dtype} (objects, one a row?), which cannot become a "
                "tensor; return tensors, or a list with an entry for each row"
            ) from None
    if leaf.layout is not torch.strided or leaf.is_nested or leaf.is_meta:
        kind = leaf.layout if leaf.layout is not torch.strided else "nested" if leaf.is_nested else "meta"
        raise OutputError(f"the model returned a {kind} tensor, which cannot be cut into rows; return a dense one")
    if type(leaf).__torch_dispatch__ is not PLAIN:
        raise OutputError(f"the model returned a {type(leaf).__name__}, {SPECIAL}; return plain tensors")
    if size is not None and (not -leaf.ndim <= dim < leaf.ndim or leaf.shape[dim] != size):
        raise OutputError(
            f"the model returned a tensor of shape {tuple(leaf.shape)} for a batch of {size} rows; every output tensor "
            f"needs that many along dim {dim}, so that each call can be given its own (a value for the whole batch "
            "needs outputs={name: 'whole'}, or disable_dynamic_batching())"
        )
    if leaf.dtype in QUANTIZED and -leaf.ndim <= dim < leaf.ndim:
        try:
            grid(leaf, dim)
        except ValueError as error:
            raise OutputError(f"a tensor that the model returned {error}") from None
    host: torch.Tensor = leaf if leaf.is_cpu else leaf.cpu()
    return host


PLAIN = torch.Tensor.__torch_dispatch__  # what subclasses have whose rows are cut as those of any tensor
SPECIAL = "a kind of tensor with operations of its own, whose rows cannot be cut and joined"


NAME_THEM = (
    "name the outputs to cut back to each call's own length with Buckets(unpad=[...]), or say with unpad=False that "
    "all are to be handed out as they come"
)


def carriers(one: Output, bucket_one: int, other: Output, bucket_other: int) -> Carried:
    """Which tensors of an output carry the length, and where, from the outputs of equal rows in two buckets.

    Those dims whose sizes are the two buckets. Raises `OutputError` if anything else differs: what is twice as long as
    the bucket, or shorter by two, cannot be cut by a rule that holds for all models.
    """
    if one.structure != other.structure:
        raise OutputError(
            f"the model returned different structures for buckets {bucket_one} and {bucket_other}, so it cannot be "
            f"learnt which outputs carry the length; {NAME_THEM}"
        )
    carried: list[tuple[int, ...]] = []
    for path, ours, theirs in zip(one.paths(), one.leaves, other.leaves, strict=True):
        if not isinstance(ours, torch.Tensor):  # what is in lists is the model's affair
            carried.append(())
            continue
        sizes = list(zip(ours.shape, theirs.shape, strict=False))
        dims = tuple(dim for dim, (size, size_other) in enumerate(sizes) if size != size_other)
        if ours.ndim != theirs.ndim or any(sizes[dim] != (bucket_one, bucket_other) for dim in dims):
            raise OutputError(
                f"{path.text} has shape {tuple(ours.shape)} in bucket {bucket_one} and {tuple(theirs.shape)} in bucket "
                f"{bucket_other}: it depends on the bucket, but is not as long; {NAME_THEM}"
            )
        carried.append(dims)
    return tuple(carried)


class Unpad:
    """Which outputs of a model carry the length: as the user said, or as learnt, once for each kind of call and output.

    Any thread may ask and learn: two that learn at the same time learn the same.
    """

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._carried: dict[Hashable, Carried | OutputError] = {}  # or why it cannot be decided

    def known(self, output: Output, bucket: int) -> Carried | None:
        """What to cut from an output of this bucket, None if that is to be learnt yet.

        Raises `OutputError` if the output is not as long as the bucket where it should be, or if `unpad=` names an
        output that is not there.
        """
        key = _key(output)
        carried = self._carried.get(key)
        if carried is None:
            if self._buckets.unpad is None:
                return None
            carried = self._said(output)
            self._keep(key, carried)
        if isinstance(carried, OutputError):
            raise OutputError(*carried.args)
        for index, (leaf, dims) in enumerate(zip(output.leaves, carried, strict=True)):
            if any(leaf.shape[dim] != bucket for dim in dims):
                raise OutputError(
                    f"{output.paths()[index].text} has shape {tuple(leaf.shape)} in bucket "
                    f"{bucket}, but was to carry the length along dim {', '.join(map(str, dims))}; {NAME_THEM}"
                )
        return carried

    def learn(self, one: Output, bucket_one: int, other: Output | None = None, bucket_other: int = 0) -> Carried:
        """Learn from the outputs of equal rows in two buckets, or from one where no other has this batch size.

        One will do if no size in it is the bucket's: then nothing carries the length. Raises `OutputError` where it
        cannot be decided.
        """
        try:
            carried = self._lone(one, bucket_one) if other is None else carriers(one, bucket_one, other, bucket_other)
        except OutputError as error:
            self._keep(_key(one), OutputError(*error.args))  # or each batch would be run twice to find out again
            raise
        self._keep(_key(one), carried)
        return carried

    def _keep(self, key: Hashable, carried: Carried | OutputError) -> None:
        if len(self._carried) > 1000:  # an argument that differs with each call
            self._carried.clear()
        self._carried[key] = carried

    def _lone(self, one: Output, bucket: int) -> Carried:
        """Nothing carries the length, or it cannot be known."""
        for path, leaf in zip(one.paths(), one.leaves, strict=True):
            if isinstance(leaf, torch.Tensor) and bucket in (
                size for dim, size in enumerate(leaf.shape) if dim != one.dim % leaf.ndim
            ):
                raise OutputError(
                    f"{path.text} has shape {tuple(leaf.shape)} in bucket {bucket}, with no other of its batch "
                    f"size to compare: whether that is the length or an equal number cannot be known; {NAME_THEM}"
                )
        return ((),) * len(one.leaves)

    def _said(self, output: Output) -> Carried:
        """What the user said, for an output."""
        unpad = self._buckets.unpad or ()
        where = output.paths()
        carried: list[tuple[int, ...]] = [()] * len(where)
        for key in unpad:
            found = named(key, where)
            dims = unpad[key] if isinstance(unpad, Mapping) else self._buckets.dim
            if not found:
                there = ", ".join(f"{index}: {path.text}" for index, path in enumerate(where))
                raise OutputError(f"unpad={unpad!r}: the model returned no {key!r}; there are {there}")
            for index in (each for each in found if isinstance(output.leaves[each], torch.Tensor)):
                carried[index] = self._checked_dims(output, where[index].text, output.leaves[index], dims)
        return tuple(carried)

    def _checked_dims(
        self, output: Output, name: str, leaf: torch.Tensor, dims: int | tuple[int, ...]
    ) -> tuple[int, ...]:
        wanted = dims if isinstance(dims, tuple) else (dims,)
        for dim in wanted:
            if not -leaf.ndim <= dim < leaf.ndim or (dim - output.dim) % leaf.ndim == 0:
                raise OutputError(
                    f"unpad={self._buckets.unpad!r}: {name} has shape {tuple(leaf.shape)} and no length along dim "
                    f"{dim}; a mapping says where it stands: unpad={{name: dim}}"
                )
        return tuple(dim % leaf.ndim for dim in wanted)


def _key(output: Output) -> Hashable:
    return (output.asked, tuple(output.structure), *(leaf.ndim for leaf in output.leaves if hasattr(leaf, "ndim")))
