"""What the user marks among inputs: `Rows`, one Python object a row, and `Shared`, what belongs to all rows.

Lives here: the two marks. The runtime marks outputs with them, too: a list with an entry for each row, a value that
every caller gets. Must not be here: the walk that finds them (nested.py), what calls may share (signature.py), cutting
(rows.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

from aneuron.errors import ShapeError

T = TypeVar("T")


class Shared(Generic[T]):
    """An input that belongs to all rows: label embeddings, prototypes, a table. The model gets it as it is, whole.

    value: anything; tensors and NumPy arrays in it are host ones, of any shape. It is neither cut, packed nor padded,
    and not copied: every piece of the call sees it. Calls share a batch only if theirs are the same objects, or equal
    and small (4 KiB of tensors, together). It may stand anywhere among the inputs, also in `example_inputs`, which
    then fix its shapes and dtypes; a call has rows from some other input. Do not change it while a call waits. Engines
    (`Pool(processes=...)`) keep one that is passed again, until torch counts a write to a tensor in it: writes through
    `.data`, or through NumPy to what the tensor lies over, they do not see.

    Raises `ShapeError` if another mark is in it.

        >>> import asyncio, torch, aneuron
        >>> def nearest(x, prototypes):
        ...     return torch.cdist(x, prototypes).argmin(1)
        >>> async def main():
        ...     prototypes = aneuron.Shared(torch.tensor([[0.0], [10.0], [20.0]]))
        ...     async with aneuron.AsyncDataParallel(nearest) as model:
        ...         return await model(torch.tensor([[1.0], [19.0]]), prototypes)
        >>> asyncio.run(main())
        tensor([0, 2])
    """

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        if isinstance(value, (Shared, Rows)):
            raise ShapeError(f"Shared({type(value).__name__}(...)): marks do not nest; an input is one or the other")
        self.value = value

    def __repr__(self) -> str:
        return f"Shared({type(self.value).__name__})"


class Rows(Sequence[T]):
    """One Python object for each row: texts, paths, ragged boxes. The model gets a list, as long as the batch.

    The objects are cut and packed with the rows of the tensors beside them, and the last one is repeated where a batch
    is padded; a call may consist of nothing else. They reach the model as they are: tensors in them too, uncopied.
    Outputs need no mark: a list with an entry for each row is found out, and cut.

    Raises `ShapeError` without rows, or if an object is itself a mark.

        >>> import asyncio, torch, aneuron
        >>> def lengths(texts):
        ...     return torch.tensor([len(text) for text in texts])
        >>> async def main():
        ...     async with aneuron.AsyncDataParallel(lengths) as model:
        ...         return await model(aneuron.Rows(["a", "abc"]))
        >>> asyncio.run(main())
        tensor([1, 3])
    """

    __slots__ = ("objects",)

    def __init__(self, objects: Iterable[T]) -> None:
        if isinstance(objects, (str, bytes)) or not isinstance(objects, Iterable):
            raise ShapeError(f"Rows({objects!r:.40}): expected a list, with one object for each row")
        self.objects = list(objects)
        if not self.objects:
            raise ShapeError("Rows([]): an empty batch, 0 rows; send one at least")
        for index, each in enumerate(self.objects):
            if isinstance(each, (Shared, Rows)):
                raise ShapeError(
                    f"Rows([...]): object {index} is {each!r:.60}: marks do not nest; one object belongs to one row"
                )

    def __len__(self) -> int:
        return len(self.objects)

    def __iter__(self) -> Iterator[T]:
        return iter(self.objects)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        return self.objects[index]

    def __repr__(self) -> str:
        return f"Rows({len(self.objects)} objects)"


def is_mark(value: Any) -> bool:
    """Whether a value is one of the two."""
    return type(value) is Rows or type(value) is Shared
