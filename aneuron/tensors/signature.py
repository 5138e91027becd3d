"""What a call brings: how many rows, what it may share a batch with, and what is wrong with it.

Lives here: looking at inputs, on the loop thread: shapes, dtypes and references, whatever the size. Must not be here:
anything that touches a tensor's data (rows.py), who runs when (sched/scheduler.py).
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, strided  # looked up for each call

from aneuron.errors import ShapeError
from aneuron.sched.call import Call
from aneuron.tensors.buckets import Buckets
from aneuron.tensors.lengths import Lengths, Pads, check_pad, choose_pads, common_length, size_at
from aneuron.tensors.marked import Rows, Shared, is_mark
from aneuron.tensors.nested import Path, Sealed, children, fill, is_array, is_masked, listed, paths, walk
from aneuron.tensors.outputs import PLAIN, SPECIAL
from aneuron.tensors.quantized import QUANTIZED, grid
from aneuron.tensors.rows import arguments, base_of, collate, columns, version_of


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Path]:
    """Where the tensors of a call stand, in the order of the walk."""
    where = [path for index, value in enumerate(args) for path in paths(value, f"input {index}", (index,))]
    return where + [path for key in sorted(kwargs) for path in paths(kwargs[key], f"input {key!r}", (key,))]


NO_ROWS = (
    "the call has no tensor among its inputs, so it has no rows; pass at least one tensor or NumPy array with a batch "
    "dimension, or aneuron.Rows([...]) with a Python object for each row"
)
SMALL = 4096  # bytes of shared tensors up to which equal ones are as good as the same

# Of the last lone tensor: calls alike get the same object as their signature, and are found to be alike faster.
_last: tuple[Any, Any, Any] = (None, None, None)  # shape, dtype, signature


def measure(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dim: int,
    buckets: Buckets | None = None,
    lengths: Lengths | None = None,
    known: Sequence[str] = (),
) -> Call:
    """Rows, signature and tensors of a call's inputs. Raises `ShapeError` for what no model could take.

    With `buckets` the length, too; the signature is then `(base, bucket)`, where the base is the same in all buckets.
    `lengths` are those of the example (`Compiled.lengths`): which inputs have a length is then not asked again.
    `known` are the places of its tensors (`Compiled.names`): lists there are no lists of images.
    """
    if len(args) == 1 and not kwargs and not dim and type(x := args[0]) is Tensor:  # the short way, same results
        try:
            fits = x.is_cpu and x.layout is strided and (shape := x.shape) and (rows := shape[0])
        except RuntimeError:  # a nested tensor has no shape
            fits = False
        if fits:
            if buckets is None:
                global _last
                last_shape, last_dtype, signature = _last
                if shape != last_shape or x.dtype is not last_dtype:
                    if x.dtype in QUANTIZED:
                        return _measure(args, kwargs, dim, buckets, lengths, known)
                    signature = (shape[1:], x.dtype)
                    _last = (shape, x.dtype, signature)
                try:
                    version = x._version
                except RuntimeError:  # made under inference mode: it counts nothing, and to ask first costs all calls
                    version = 0
                call = Call(rows, signature)
                call.leaves, call.version = args, version
                return call
            found = _lone(args, buckets, lengths)
            if found is not None:
                return found
        else:
            raise _unfit(args, kwargs, list(args), dim)
    return _measure(args, kwargs, dim, buckets, lengths, known)


def _measure(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dim: int,
    buckets: Buckets | None,
    lengths: Lengths | None,
    known: Sequence[str],
) -> Call:
    leaves, structure, template = _flatten_inputs(args, kwargs)
    rows = 0
    shapes: list[tuple[Any, ...]] = []
    for leaf in leaves:
        if is_mark(leaf):
            if type(leaf) is Rows:
                rows = rows or len(leaf)
                if len(leaf) != rows:
                    raise _unfit(args, kwargs, leaves, dim)
            shapes.append((type(leaf), None if type(leaf) is Rows else shared_key(leaf.value)))
            continue
        try:
            shape, dtype = leaf.shape, leaf.dtype
            size = shape[dim]
            if is_array(leaf):
                usable = not is_masked(leaf)
            else:
                usable = (
                    leaf.is_cpu and leaf.layout is torch.strided and (type(leaf) is torch.Tensor or _is_plain(leaf))
                )
        except (RuntimeError, IndexError):
            raise _unfit(args, kwargs, leaves, dim) from None
        rows = rows or size
        if not usable or not size or size != rows:
            raise _unfit(args, kwargs, leaves, dim)
        axis = dim % len(shape)
        shapes.append((*shape[:axis], shape[axis + 1 :], *_grid(leaf, dim), dtype_of(dtype)))
    if not rows:
        raise ShapeError(NO_ROWS)
    if not dim and all(map(_is_image, leaves)):
        _check_images(args, kwargs, leaves, known)
    version = version_of(leaves)
    if buckets is None:
        signature = (structure, *shapes) if structure else shapes[0]
        return _made(Call(rows, signature), leaves, template, structure, version)
    where = _inputs(args, kwargs)
    sizes = [size_at(leaf, dim, buckets) for leaf in leaves]
    pads = choose_pads(where, sizes, buckets, lengths)
    length = common_length(where, leaves, sizes, pads, buckets.dim)
    for index, pad in enumerate(pads):
        if pad is not None:
            shape, dtype = leaves[index].shape, shapes[index][-1]
            at, axis = buckets.dim % len(shape), dim % len(shape)
            row = (*shape[:at], None, *shape[at + 1 :])
            check_pad(where[index].text, pad, dtype)
            shapes[index] = (*row[:axis], row[axis + 1 :], dtype)
    base = (structure, *shapes) if structure else shapes[0]
    bucket = buckets.fit(length)
    call = Call(rows, (base, bucket), bucket=bucket)
    call.pads = Pads(buckets.dim, pads, length, buckets.side == "left")
    return _made(call, leaves, template, structure, version)


def _made(call: Call, leaves: Sequence[Any], template: Any, structure: tuple[Any, ...], version: int) -> Call:
    call.leaves, call.template, call.structure, call.version = leaves, template, structure, version
    return call


def _lone(args: tuple[torch.Tensor], buckets: Buckets, lengths: Lengths | None) -> Call | None:
    """A call of a single tensor whose rows count along dim 0; None if its length has to be looked for."""
    x, at = args[0], buckets.dim
    shape = x.shape
    pad = buckets.pad if lengths is None else lengths.get("input 0")
    at = at if at >= 0 else at + len(shape)
    if pad is None or isinstance(pad, Mapping) or not 0 < at < len(shape):
        return None
    length = shape[at]
    row = (None, *shape[2:]) if at == 1 else (*shape[1:at], None, *shape[at + 1 :])
    check_pad("input 0", pad, x.dtype)
    version = 0 if x.is_inference() else x._version
    bucket = buckets.fit(length)
    call = Call(shape[0], ((row, x.dtype), bucket), bucket=bucket)
    call.pads = Pads(buckets.dim, (pad,), length, buckets.side == "left")
    return _made(call, args, None, (), version)


def _flatten_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], tuple[Any, ...], Any]:
    leaves: list[Any] = []
    key: list[Any] = []
    ordered = dict(sorted(kwargs.items()))
    try:
        walk((args, ordered), leaves, key, [])
    except RecursionError:
        raise ShapeError("the inputs are nested too deeply, or contain themselves; pass a flatter structure") from None
    except Sealed as error:
        raise ShapeError(f"among the inputs is {error}") from error
    if not leaves:
        raise ShapeError(NO_ROWS)
    if len(args) == 1 and len(key) == 4 and leaves[0] is args[0]:
        return leaves, (), (args, {})  # a single array: packed with calls of a single tensor
    return leaves, tuple(key), (args, ordered)


def list_of_rows(args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> str | None:
    """The first plain list among the inputs that looks like one object a row and is not marked so."""
    for name, value in [(f"input {index}", value) for index, value in enumerate(args)] + [
        (f"input {key!r}", value) for key, value in sorted(kwargs.items())
    ]:
        if (found := _list_of_rows(value, name, rows)) is not None:
            return found
    return None


def _list_of_rows(value: Any, name: str, rows: int) -> str | None:
    if type(value) is list and len(value) == rows and not any(paths(value, name)):
        return name
    for step, child in children(value):
        if (found := _list_of_rows(child, f"{name}[{step!r}]", rows)) is not None:
            return found
    return None


def shared_key(value: Any) -> Hashable:
    """Equal for shared inputs with which calls may share a batch: the same tensors, or equal and small ones."""
    leaves: list[Any] = []
    key: list[Any] = []
    walk(value, leaves, key, [])
    for leaf in leaves:
        if is_mark(leaf):
            raise ShapeError(f"Shared(...) has {leaf!r} in it: marks do not nest; an input is one or the other")
        if isinstance(leaf, torch.Tensor) and (leaf.is_nested or not leaf.is_cpu or leaf.layout is not torch.strided):
            raise ShapeError(f"Shared(...) has a tensor on {leaf.device} ({leaf.layout}); pass a dense host tensor")
    small = sum([leaf.nbytes for leaf in leaves]) <= SMALL and not any(leaf.dtype in QUANTIZED for leaf in leaves)
    contents = [
        (tuple(leaf.shape), dtype_of(leaf.dtype), _content(leaf) if small else _identity(leaf)) for leaf in leaves
    ]
    return tuple(key), tuple(contents)


def _content(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        plain = leaf.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return plain.view(torch.uint8).numpy().tobytes() if leaf.numel() else b""
    return leaf.tobytes()  # type: ignore[no-any-return]


def _identity(leaf: Any) -> Hashable:
    changes = leaf._version if isinstance(leaf, torch.Tensor) and not leaf.is_inference() else 0
    return id(leaf), changes


def _is_plain(leaf: torch.Tensor) -> bool:
    """Whether a tensor of a class of its own is as good as one of torch's: that is what it becomes."""
    return type(leaf).__torch_dispatch__ is PLAIN and not vars(leaf)


def _is_image(leaf: Any) -> bool:
    """Whether a tensor or array has the shape of one image: (3, H, W), or as most files are read uint8 (H, W, 3)."""
    if is_mark(leaf):
        return False
    shape = leaf.shape
    if len(shape) != 3:
        return False
    first, second, third = shape
    if min(second, third) >= 8 and first == 3:
        return True
    return third == 3 and min(first, second) >= 8 and dtype_of(leaf.dtype) is torch.uint8


def _check_images(args: tuple[Any, ...], kwargs: dict[str, Any], leaves: Sequence[Any], known: Sequence[str]) -> None:
    """Raise `ShapeError` for lists of images, whose channels, or lines, would be taken for rows.

    Several inputs may look the same; in a tuple, or where the example has tensors too, they are what they seem.
    """
    if listed((args, kwargs)) == len(leaves) and [path.text for path in _inputs(args, kwargs)] != list(known):
        shape = tuple(leaves[0].shape)
        raise ShapeError(
            f"a list of {len(leaves)} tensors like an image, {shape}, where dim 0 is to count the rows; {_ONE_EACH}. "
            f"If they are inputs of {shape[0]} rows each pass a tuple, or example_inputs"
        )


_ONE_EACH = (
    "a list is a structure of inputs: for one tensor a row pass torch.stack(list), or aneuron.Rows(list) where their "
    "shapes differ"
)


def _grid(leaf: Any, dim: int) -> tuple[Hashable, ...]:
    """What a quantized tensor's integers stand for; nothing for others."""
    if leaf.dtype not in QUANTIZED:
        return ()
    try:
        return (grid(leaf, dim),)
    except ValueError as error:
        raise ShapeError(f"an input {error}") from None


def dtype_of(dtype: Any) -> torch.dtype:
    """The torch dtype of a tensor's or an array's dtype."""
    if type(dtype) is torch.dtype:
        return dtype
    others = 2  # what `isbuiltin` is for dtypes that are not NumPy's own, such as float8 of ml_dtypes
    equal = getattr(torch, dtype.name, None) if dtype.kind in "biufc" and dtype.isbuiltin != others else None
    if not isinstance(equal, torch.dtype):
        raise ShapeError(
            f"a NumPy array of dtype {dtype} cannot become a tensor; convert it first, for example with "
            "array.astype('float32')"
        )
    return equal


def _unfit(args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], dim: int) -> ShapeError:
    """Say which input has no rows, or not as many as the others."""
    names = [path.text for path in _inputs(args, kwargs)]
    sizes: dict[str, int] = {}
    for name, leaf in zip(names, leaves, strict=True):
        if is_mark(leaf):
            if type(leaf) is Rows:
                sizes[name] = len(leaf)
            continue
        if isinstance(leaf, torch.Tensor):
            if leaf.is_nested or leaf.layout is not torch.strided:
                layout = "nested" if leaf.is_nested else leaf.layout
                return ShapeError(
                    f"{name} is a {layout} tensor, which has no rows to cut; pass a dense one (to_dense())"
                )
            if type(leaf).__torch_dispatch__ is not PLAIN:
                return ShapeError(f"{name} is a {type(leaf).__name__}, {SPECIAL}; pass plain tensors")
            if type(leaf) is not torch.Tensor and vars(leaf):
                return ShapeError(
                    f"{name} is a {type(leaf).__name__} with attributes ({', '.join(vars(leaf))}), which rows in a "
                    "batch cannot keep: pass them beside it, and x.as_subclass(torch.Tensor)"
                )
            if leaf.is_meta:
                return ShapeError(f"{name} is a meta tensor: it has a shape but no data; pass a real one")
            if not leaf.is_cpu:
                return ShapeError(f"{name} is on {leaf.device}; inputs are host tensors: pass it as .cpu()")
        elif is_masked(leaf):
            return ShapeError(
                f"{name} is a masked array, whose mask no tensor has; pass array.filled(...), or its data and its mask "
                "as two arrays"
            )
        if leaf.ndim == 0:
            return ShapeError(
                f"{name} is a 0-d tensor and has no batch dimension; pass a Python number if every row is to see it, "
                "or give it one row with .reshape(1)"
            )
        if not -leaf.ndim <= dim < leaf.ndim:
            return ShapeError(f"{name} has shape {tuple(leaf.shape)} and no dimension {dim} (dim={dim}) to cut along")
        if leaf.shape[dim] == 0:
            return ShapeError(
                f"{name} has shape {tuple(leaf.shape)}: an empty batch, 0 rows along dim {dim}; send one at least"
            )
        sizes[name] = leaf.shape[dim]
    said = ", ".join(f"{name} has {rows}" for name, rows in sizes.items())
    in_lists = f"; {_ONE_EACH}" if listed((args, kwargs)) else ""
    return ShapeError(
        f"the inputs have unequal rows along dim {dim}: {said}; every tensor needs the same number "
        "(x.expand(rows, ...) repeats one row without a copy; wrap what belongs to all rows, as a table does, in "
        f"aneuron.Shared(x)){in_lists}"
    )


class Compiled:
    """The inputs that a model was compiled for; a call that differs is refused before any device work.

    `lengths` says which of them have a length (None without buckets): those of the example decide it for all calls.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], dim: int, buckets: Buckets | None = None) -> None:
        self._dim = dim
        self._call = measure(args, kwargs, dim, buckets)
        self.rows = self._call.rows
        self.base = base_of(self._call)
        self.leaves = self._call.leaves or ()
        self.paths = _inputs(args, kwargs)
        self.names = [path.text for path in self.paths]
        pads = self._call.pads
        self.lengths = None if pads is None else dict(zip(self.names, pads.values, strict=True))

    def check(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise `ShapeError` unless the call's inputs have the compiled structure, shapes and dtypes, of any length."""
        if _base(call) == _base(self._call):
            return
        names = [path.text for path in _inputs(args, kwargs)]
        if sorted(names) != sorted(self.names):
            raise ShapeError(f"the model was compiled for {_listed(self.names)}; this call has {_listed(names)}")
        expected = dict(zip(self.names, self.leaves, strict=True))  # by name: dicts may come in another order
        for name, leaf in zip(names, call.leaves or (), strict=True):
            if is_mark(leaf) or is_mark(expected[name]):
                _check_mark(name, leaf, expected[name])
                continue
            shape, wanted_shape, free = tuple(leaf.shape), tuple(expected[name].shape), self.free(name)
            dtype, wanted = dtype_of(leaf.dtype), dtype_of(expected[name].dtype)
            if _fixed(shape, free) != _fixed(wanted_shape, free):
                axis = free[0]
                unsqueezed = _fixed((*shape[:axis], 1, *shape[axis:]), free) == _fixed(wanted_shape, free)
                hint = f"; for one row without its batch dimension pass x.unsqueeze({axis})" if unsqueezed else ""
                raise ShapeError(
                    f"{name} has shape {shape}; the model was compiled for {wanted_shape}, where only "
                    f"{' and '.join(f'dim {at}' for at in free)} may differ{hint}"
                )
            if dtype != wanted:
                raise ShapeError(f"{name} has dtype {dtype}; the model was compiled for {wanted}: pass x.to({wanted})")

    def free(self, name: str) -> list[int]:
        """The dims of an input that are any call's own: its rows, and its length if it has one."""
        ndim = self.leaves[self.names.index(name)].ndim
        pads = self._call.pads
        at = [pads.dim % ndim] if pads is not None and self.lengths and self.lengths[name] is not None else []
        return [self._dim % ndim, *at]

    def example(self, rows: int | None, bucket: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example inputs, their rows repeated and cut to `rows` (None: as they are). Worker thread.

        Those that have a length are padded or cut to `bucket` (0: as they are).
        """
        have = self.rows
        times, rest = divmod(rows or have, have)
        chunks = [(self._call, 0, have)] * times + [(self._call, 0, rest)] * bool(rest)
        return collate(chunks, [self.leaves] * len(chunks), self._call.template, rows or have, self._dim, bucket)

    def columns(self, bucket: int) -> list[Any]:
        """The example inputs one after the other, as they are but for their length. Worker thread."""
        return columns([(self._call, 0, self.rows)], [self.leaves], self.rows, self._dim, bucket)

    def arguments(self, joined: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments of an execution of inputs like these: what is shared is without its mark."""
        return arguments(self._call.template, joined)

    def filled(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with inputs like these, marked as they are, in what the example's stand in."""
        if self._call.template is None:
            return (leaves[0],), {}
        args, kwargs = fill(self._call.template, iter(leaves))
        return args, kwargs

    @property
    def length(self) -> int:
        """The length of the example; 0 if it has none."""
        return 0 if self._call.pads is None else self._call.pads.length

    @property
    def padded_left(self) -> bool:
        """Whether padding comes first."""
        return self._call.pads is not None and self._call.pads.left

    @property
    def structure(self) -> tuple[Any, ...]:
        """What is around the inputs."""
        return self._call.structure


def _check_mark(name: str, leaf: Any, expected: Any) -> None:
    """A marked input must be marked as in the example, with tensors of the same shapes and dtypes if it is shared."""
    if type(leaf) is not type(expected) and (is_mark(leaf) != is_mark(expected) or is_mark(leaf)):
        said, wanted = (type(each).__name__ for each in (leaf, expected))
        raise ShapeError(f"{name} is a {said}, in example_inputs it is a {wanted}: pass it as it is there")
    if type(leaf) is Shared and (have := _form(leaf.value)) != (form := _form(expected.value)):
        raise ShapeError(f"{name} is shared and has tensors {have}; the model was compiled for {form}")


def _form(value: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    leaves: list[Any] = []
    walk(value, leaves, [], [])
    return [(tuple(leaf.shape), dtype_of(leaf.dtype)) for leaf in leaves]


def _base(call: Call) -> Any:
    """What a call's signature says beside its bucket."""
    return call.signature[0] if call.bucket else call.signature  # type: ignore[index]


def _fixed(shape: tuple[int, ...], free: Sequence[int]) -> list[int | None]:
    return [None if dim in free else size for dim, size in enumerate(shape)]


def _listed(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({', '.join(names)})"
