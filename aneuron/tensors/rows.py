"""Rows into batches, and batches back into results: all the tensor work that is not the model's.

Lives here: collate and scatter, which run in worker threads: what is copied where. Must not be here:
how rows are copied (copying.py), asyncio, threads, decisions about who runs when.
"""

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor  # looked up for each batch

from aneuron.errors import InputModified, OutputError
from aneuron.sched.call import Call, Chunk
from aneuron.tensors import copying
from aneuron.tensors.marked import Rows, Shared, is_mark
from aneuron.tensors.nested import fill, is_array, walk
from aneuron.tensors.outputs import Carried, Output, checked

Guard = AbstractContextManager[Any]


def base_of(call: Call) -> Hashable:
    """What is the same of the calls of all buckets, as their signature says it; None without buckets."""
    return call.signature[0] if call.bucket else None  # type: ignore[index]


class Parts:
    """The result of a call that is spread over several batches, as it grows.

    Two workers may be here for one call: `guard` is held while they agree, not while rows are copied.
    """

    def __init__(self, rows: int, output: Output) -> None:
        self._rows = self._missing = rows
        self._counted: set[int] = set()  # first rows of the chunks that are there
        self._dim = output.dim
        self._structure = output.structure
        self._pieces: dict[int, list[Any]] = {}  # by first row
        self._whole: list[Any] | None = None
        self.result: Any = None

    def place(self, at: int, output: Output, leaves: list[Any], start: int, stop: int, guard: Guard) -> None:
        """Copy rows `start` to `stop` of an output's leaves to their place in the result, from row `at` on.

        What is shared comes from the first.
        """
        if self._whole is None:
            whole = [_room(leaf, self._rows, self._dim) for leaf in leaves]
            result = output.filled(whole)
            with guard:
                if self._whole is None:
                    self.result, self._whole = result, whole
        self._check_structure(output)
        for target, leaf in zip(self._whole, leaves, strict=True):
            if type(leaf) is Rows:
                target[at : at + stop - start] = [own(each) for each in leaf[start:stop]]
            elif type(leaf) is not Shared and not copying.place(target, at, leaf, start, stop, self._dim):
                _check_alike([_unshared(output, each) for each in (self._whole, leaves)], self._dim)

    def append(self, start: int, output: Output) -> None:
        """Keep the output of a piece, whatever its size, for `join`."""
        self._check_structure(output)
        self._pieces[start] = [_keep(leaf) for leaf in output.leaves]

    def join(self, output: Output) -> None:
        """Join the pieces along `dim`, as they came; the only one is the result, whatever it is."""
        pieces = [piece for _, piece in sorted(self._pieces.items())]
        if len(pieces) > 1:
            _check_alike([_unshared(output, piece) for piece in pieces], self._dim)
            _check_joinable(output)
        self.result = output.filled(_concatenate(output, pieces, self._dim))

    def count(self, start: int, rows: int, guard: Guard) -> bool:
        """Count rows that have their results; whether the last have. Once a chunk: a batch may run twice."""
        with guard:
            if start in self._counted:
                return False
            self._counted.add(start)
            self._missing -= rows
            return not self._missing

    def _check_structure(self, output: Output) -> None:
        if output.structure is not self._structure and output.structure != self._structure:
            raise OutputError(
                "the model returned different structures for the parts of one call; they cannot be joined"
            )


Finished = tuple[Call, Any]  # a call and its result


def gather(chunks: Sequence[Chunk]) -> tuple[Sequence[Chunk], list[Sequence[Any]], Any]:
    """The chunks whose callers are still there, their calls' tensors, and what these stand in."""
    template = chunks[0][0].template if chunks else None  # before the leaves, of which the loop lets go first
    inputs: list[Any] = [call.leaves for call, _, _ in chunks]
    if all(inputs):  # no call is without
        return chunks, inputs, template
    there: list[Any] = [(call.template, call.leaves, (call, start, stop)) for call, start, stop in chunks]
    there = [each for each in there if each[1] is not None]
    return [chunk for _, _, chunk in there], [leaves for _, leaves, _ in there], there[0][0] if there else None


def sliced(call: Call, start: int, stop: int, dim: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with some of its rows only; views of what was passed, uncopied."""
    leaves, template = call.leaves, call.template
    if stop - start == call.rows:
        return ((leaves[0],), {}) if template is None else template
    some = [leaf if type(leaf) is Shared else _some(leaf, start, stop, dim) for leaf in leaves]
    return ((some[0],), {}) if template is None else fill(template, iter(some))


def _some(leaf: Any, start: int, stop: int, dim: int) -> Any:
    if type(leaf) is Rows:
        return Rows(leaf[start:stop])
    return leaf[(slice(None),) * (dim % leaf.ndim) + (slice(start, stop),)]


def version_of(leaves: Sequence[Any]) -> int:
    """How often the tensors have been written to in place, all together, as far as torch counts it."""
    return sum([_version(leaf) for leaf in leaves])


def _version(leaf: Any) -> int:
    if isinstance(leaf, torch.Tensor):
        return 0 if leaf.is_inference() else leaf._version
    return version_in(leaf.value if type(leaf) is Shared else leaf.objects) if is_mark(leaf) else 0


def version_in(value: Any) -> int:
    """The same of the tensors in a structure; 0 for what a call will refuse."""
    leaves: list[Any] = [value]
    if not isinstance(value, torch.Tensor):
        leaves.clear()
        with suppress(Exception):
            walk(value, leaves, [], [])
    return version_of(leaves)


MODIFIED = (
    "a tensor among the inputs was modified in place while its call waited; inputs are read when their batch is "
    "formed: leave them alone until the call has ended, or pass a copy (x.clone()); for a slice of a buffer whose "
    "other rows are written to, buffer[i:j].data"
)


def check_unmodified(chunks: Sequence[Chunk], inputs: Sequence[Sequence[Any]], template: Any) -> None:
    """Raise `InputModified` if a tensor has been written to since its call; after they are read, not before."""
    if copying.unmodified(chunks, inputs):
        return
    if list(map(version_of, inputs)) != [call.version for call, _, _ in chunks]:
        raise InputModified(MODIFIED)


def columns(
    chunks: Sequence[Chunk], inputs: Sequence[Sequence[Any]], size: int, dim: int, bucket: int = 0
) -> list[Any]:
    """A batch's inputs, one after the other: the chunks' rows, padded to `size` rows. `inputs` are the calls' tensors.

    Padding repeats the last row: zeros can be outside the model's domain. With `bucket`, inputs that have a length are
    padded to it (or cut, to see what a model makes of a shorter one). The tensors are the batch's own, contiguous and
    aligned, whoever shares it: a row's result does not depend on how its neighbours lay in memory, and a model that
    writes to its input writes to no caller's. What is `Shared` is the first call's; `Rows` become a list.
    """
    joined: list[Any] = []
    pads = chunks[0][0].pads if bucket else None
    for index, first in enumerate(inputs[0]):
        if type(first) is Shared:
            joined.append(first)
        elif type(first) is Rows:
            joined.append(_objects(chunks, [leaves[index] for leaves in inputs], size))
        else:
            pad = None if pads is None else pads.values[index]
            to = None if pads is None or pad is None else copying.Length(pads.dim, bucket, pad, pads.left)
            joined.append(copying.join(chunks, inputs, index, size, dim, to))
    return joined


def arguments(template: Any, joined: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's arguments: the inputs of a batch, in what they stand in."""
    if template is None:
        return (joined[0],), {}
    args, kwargs = template
    if all(type(each) in _BARE for each in (*args, *kwargs.values())):  # the short way, same results
        values = iter(joined)
        bare = [next(values) if type(each) is Tensor else each for each in (*args, *kwargs.values())]
        return tuple(bare[: len(args)]), dict(zip(kwargs, bare[len(args) :], strict=True))
    filled = [_unmarked(each.value) if type(each) is Shared else each for each in joined]
    return fill(template, iter(filled))  # type: ignore[no-any-return]


_BARE = frozenset((Tensor, bool, int, float, str, type(None)))  # what is no container, mark or array


def collate(
    chunks: Sequence[Chunk], inputs: Sequence[Sequence[Any]], template: Any, size: int, dim: int, bucket: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's arguments for a batch: its `columns`, in what they stand in."""
    return arguments(template, columns(chunks, inputs, size, dim, bucket))


def _objects(chunks: Sequence[Chunk], column: Sequence[Any], size: int) -> list[Any]:
    """The objects of a batch's rows; the last one is repeated."""
    objects = [each for (_, start, stop), own in zip(chunks, column, strict=True) for each in own[start:stop]]
    return objects + objects[-1:] * (size - len(objects))


def _unmarked(value: Any) -> Any:
    """What is shared, as the model gets it: arrays as tensors, like everywhere."""
    leaves: list[Any] = []
    walk(value, leaves, [], [])
    if not any(map(is_array, leaves)):
        return value
    return fill(value, iter([copying.tensor(leaf) if is_array(leaf) else leaf for leaf in leaves]))


def scatter(
    value: Any, chunks: Sequence[Chunk], size: int, dim: int, guard: Guard, cut: Carried | None = None
) -> list[Finished]:
    """Hand the rows of a batch's output to its calls, each in storage of its own; the calls that are complete now.

    `value` is a single tensor, or an `Output`. With `cut`, what has the length of the batch's bucket is cut back to
    each call's own. Raises `OutputError` if the output does not have the batch's rows. Rows count as handed out when
    all of the batch are: if one call's cannot be, the batch will run again in parts.
    """
    if not chunks[0][0].cut.shared:
        return _keep_piece(value, chunks[0], dim, guard, cut)
    if type(value) is Tensor and not cut:  # the short way, same results
        finished: list[Finished] | None = copying.deal(value, chunks, size, dim)
        if finished is None:
            value = checked(value, size, dim)
            copies = copying.split(value, chunks, size, dim)
            finished = [(chunk[0], copy) for chunk, copy in zip(chunks, copies, strict=True) if copy is not None]
        return finished if len(finished) == len(chunks) else finished + _spread(Output(value, None, dim), chunks, guard)
    output = value if isinstance(value, Output) else Output(value, size, dim)
    lengths = cut or ((),) * len(output.leaves)
    split = [_split(leaf, chunks, size, dim, dims) for leaf, dims in zip(output.leaves, lengths, strict=True)]
    finished = [
        (call, output.filled(copies))
        for (call, start, stop), *copies in zip(chunks, *split, strict=True)
        if stop - start == call.rows
    ]
    return finished if len(finished) == len(chunks) else finished + _spread(output, chunks, guard, cut)


def _spread(output: Output, chunks: Sequence[Chunk], guard: Guard, cut: Carried | None = None) -> list[Finished]:
    """Put the rows of calls that are spread over several batches into their results; the calls that are complete."""
    placed: list[tuple[Call, Parts, int, int]] = []
    end = 0
    for call, at, stop in chunks:
        start, end = end, end + stop - at
        if stop - at != call.rows:
            leaves = output.leaves
            if cut:
                leaves = [copying.shortened(leaf, call, dims) for leaf, dims in zip(leaves, cut, strict=True)]
            parts = call.parts or _parts(call, output, guard)
            parts.place(at, output, leaves, start, end, guard)
            placed.append((call, parts, at, stop - at))
    return [(call, parts.result) for call, parts, at, rows in placed if parts.count(at, rows, guard)]


def _keep_piece(value: Any, chunk: Chunk, dim: int, guard: Guard, cut: Carried | None) -> list[Finished]:
    """The same where batches are not shared: the output of a piece may have any number of rows."""
    call, start, stop = chunk
    output = value if isinstance(value, Output) else Output(value, None, dim)
    if cut:
        output.leaves = [copying.shortened(leaf, call, dims) for leaf, dims in zip(output.leaves, cut, strict=True)]
    parts = _parts(call, output, guard)
    parts.append(start, output)
    if not parts.count(start, stop - start, guard):
        return []
    parts.join(output)
    return [(call, parts.result)]


def _parts(call: Call, output: Output, guard: Guard) -> Parts:
    with guard:
        call.parts = parts = call.parts or Parts(call.rows, output)
        return parts


def _split(leaf: Any, chunks: Sequence[Chunk], size: int, dim: int, dims: tuple[int, ...]) -> Sequence[Any]:
    """What of a tensor, a list of rows or a shared value each chunk gets that is the whole of its call; else None.

    At `dims` a tensor has the length, and is cut back to each call's own.
    """
    if isinstance(leaf, Tensor):
        return copying.split(leaf, chunks, size, dim, dims)
    copies: list[Any] = []
    end = 0
    for call, at, stop in chunks:
        start, end = end, end + stop - at
        if stop - at != call.rows:
            copies.append(None)
        else:
            copies.append(own(leaf.value) if type(leaf) is Shared else [own(each) for each in leaf[start:end]])
    return copies


def own(value: Any) -> Any:
    """A caller's own copy of what is not cut further: its tensors detached, on the host, in storage of their own."""
    leaves: list[Any] = []
    walk(value, leaves, [], [])
    if not leaves:
        return value
    copies = [checked(leaf, None, 0).detach().clone(memory_format=torch.contiguous_format) for leaf in leaves]
    return fill(value, iter(copies))


def _room(part: Any, rows: int, dim: int) -> Any:
    """Where the rows of a call are to be placed, for all its parts. What is shared is there already."""
    if type(part) is Rows:
        return [None] * rows
    return own(part.value) if type(part) is Shared else copying.room(part, rows, dim)


def _unshared(output: Output, parts: list[Any]) -> list[Any]:
    """Without what is the same for all: that is taken from the first part."""
    return [part for of, part in zip(output.leaves, parts, strict=True) if type(of) is not Shared]


def _check_alike(pieces: list[list[Any]], dim: int) -> None:
    """The tensors of the parts of one call must differ in their rows only."""
    kinds = [[copying.kind(part, dim) for part in parts if isinstance(part, torch.Tensor)] for parts in pieces]
    for kind in kinds[1:]:
        if kind != kinds[0]:
            raise OutputError(
                f"the model returned {kind} for one part of a call and {kinds[0]} for another (shape without rows, "
                "dtype, and how it is quantized, for each tensor); they cannot be joined"
            )


def _keep(leaf: Any) -> Any:
    """A part of a piece's output in storage of its own."""
    return own(leaf.objects if type(leaf) is Rows else leaf.value if type(leaf) is Shared else leaf)


def _check_joinable(output: Output) -> None:
    """What is neither tensor nor list of rows is one piece's, and cannot be joined with another's."""
    for constant in output.constants:
        if constant is not None:
            raise OutputError(
                f"the model returned a {type(constant).__name__} ({constant!r:.60}) for each of several pieces of a "
                "call; a value for the whole batch can be given to a call that is one piece only: send fewer rows, "
                "raise split_size, name one core with device_ids, or leave it out"
            )


def _concatenate(output: Output, parts: list[list[Any]], dim: int) -> list[Any]:
    """Chunk outputs joined along `dim`, as they come; lists after each other, and of what is shared the first."""
    if len(parts) == 1:
        return parts[0]
    return [_join(leaf, column, dim) for leaf, column in zip(output.leaves, zip(*parts, strict=True), strict=True)]


def _join(leaf: Any, column: tuple[Any, ...], dim: int) -> Any:
    if type(leaf) is Rows:
        return [each for part in column for each in part]
    if type(leaf) is Shared:
        return column[0]
    try:
        return copying.cat(column, dim)
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = [tuple(part.shape) for part in column]
        raise OutputError(f"the outputs of the chunks cannot be joined along dim {dim}: {shapes}: {error}") from error
