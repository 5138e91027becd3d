"""Which outputs have a row for each row, found out by executing: what is executed for it, and what is remembered.

Lives here: the verdicts of a run of a model, once for each kind of output, and the executions that they cost. Must not
be here: how executions are judged (tensors/verdicts.py), what an output is cut into (tensors/rows.py), who runs when.

What is asked for is two executions whose rows differ: in number, where the model takes another, else in order. At most
two are added to what is executed anyway, on one core; a worker that meets the same kind of output meanwhile waits.
"""

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from aneuron.errors import InputModified, OutputError
from aneuron.tensors.marked import Rows, Shared
from aneuron.tensors.nested import Marks, Sealed, Steps, children, fill, mapped, paths, walk
from aneuron.tensors.outputs import Output
from aneuron.tensors.varied import arrange, len_of, varies
from aneuron.tensors.verdicts import Need, Seen, Verdict, judge, repeats, row_lists

logger = logging.getLogger("aneuron")

EXTRA = 2  # executions that evidence may cost beside those that are had anyway
_POLL = 0.1  # seconds between two looks at whether who takes evidence still does
_PATIENCE = 300  # such looks, until a worker goes by shapes instead
_MOST = 1000  # kinds of outputs that are remembered: an argument may differ with each call
_NAME = 32  # characters of a text among the inputs up to which it may say what is asked for

Declared = Mapping[str | int, str]  # "whole" or "rows", by name, position or path


def check_declared(outputs: Any) -> Declared:
    """The user's `outputs=`, checked."""
    rule = "expected a mapping such as {'prototypes': 'whole'}, from names, positions or paths to 'whole' or 'rows'"
    if outputs is None:
        return {}
    if not isinstance(outputs, Mapping):
        raise ValueError(f"outputs={outputs!r:.80}: {rule}")
    for key, what in outputs.items():
        named = (isinstance(key, str) and key) or (isinstance(key, int) and not isinstance(key, bool) and key >= 0)
        if not named or what not in ("whole", "rows"):
            raise ValueError(f"outputs={outputs!r:.80}: {key!r}: {what!r}; {rule}")
    return dict(outputs)


class Trials(NamedTuple):
    """What can be executed beside what was: rows of the same batch, in other order, number or company."""

    columns: list[Any]  # of the rows that there are, each once
    dim: int
    sizes: Sequence[int] | None  # compiled ones; None: any number of rows
    execute: Callable[[list[Any], int], Any]  # those columns, so many rows
    go_on: Callable[[], None] = lambda: (
        None
    )  # said before each execution, and now and then while another's is waited for
    given_up: Callable[[], bool] = lambda: False  # whether who has these hangs in one


class _Known(NamedTuple):
    """A verdict on a kind of outputs."""

    error: OutputError | None  # why they cannot be cut
    fits: bool  # whether the one that it was found out with had the batch's rows everywhere, as far as it seemed


class Evidence:
    """The verdicts on the outputs of one run of a model. Any thread may ask and take.

    declared: what the user says, which is taken for granted. With `check` False the shape of each output decides, as
    far as it goes. `dtype`: what cores compute in, whatever the outputs are cast to: results round as it does.
    """

    def __init__(self, dim: int, declared: Declared, check: bool, dtype: torch.dtype | None = None) -> None:
        self.dim = dim
        self._dtype = dtype
        self.check = check
        # Lone tensors that have rows: whether calls share batches, what was asked, and dimensions.
        self.plain: set[tuple[bool, Hashable, int]] = set()
        self._declared = declared
        self._marks: dict[Hashable, Marks] = {}  # by what was asked
        self._known: dict[Hashable, _Known] = {}
        self._alike: set[Hashable] = set()  # kinds of which equal rows have told what they can
        self._taker: Trials | None = None
        self._free = threading.Condition()
        self._warned: set[str] = set()

    def look(
        self,
        value: Any,
        asked: Hashable,
        rows: int,
        packing: bool,
        lone: bool,
        first: Callable[[], tuple[Seen, Trials]],
    ) -> Output:
        """An output, marked by what is known of its kind; evidence is taken if nothing is.

        asked: the structure of the inputs. rows: how many were executed. packing: whether calls share batches; else
        tensors with other numbers of entries may be joined as they come. lone: it has one row, of which no others can
        be made, and so tells something once only. first: the execution that it came from, as evidence, and what else
        can be had. Raises `OutputError` for what cannot be cut into rows, or joined.
        """
        known = self.known(value, asked, rows, packing)
        if known is not None:
            return known
        kind = packing, asked_for(asked)
        if lone and _key(kind, Output(value, None, self.dim, asked, self._marks.get(kind, {}))) in self._alike:
            return self.marked(value, asked, rows, packing)
        try:
            seen, trials = first()
        except InputModified:  # it had been read, and may be: what was executed cannot be executed anew
            return self.marked(value, asked, rows, packing)
        except Exception as error:
            return self._unseen(error, value, asked, rows, packing)
        with self._turn(trials) as mine:
            if not mine:
                return self.marked(seen.value, asked, rows, packing)
            known = self.known(seen.value, asked, rows, packing)  # by now
            return known if known is not None else self.take([seen], asked, packing, trials)

    def known(self, value: Any, asked: Hashable, rows: int, packing: bool) -> Output | None:
        """An output, marked by what is known of its kind; None if nothing is. Raises `OutputError` as `look` does."""
        kind = packing, asked_for(asked)
        output = Output(value, None, self.dim, asked, self._marks.get(kind, {}))
        if not self._is_known(kind, output, rows):
            return None
        if packing:
            output.check(rows)
        if type(value) is torch.Tensor:
            self.plain.add((packing, asked, value.ndim))
        return output

    def take(self, seen: list[Seen], asked: Hashable, packing: bool, trials: Trials) -> Output:
        """Take evidence, from executions that there are, and up to `EXTRA` more; the output of the last of the former.

        Remembers the verdict, unless there were no two different rows. Raises `OutputError`.
        """
        last = seen[-1]
        try:
            return self._take(seen, asked, packing, trials)
        except Exception as error:
            return self._unseen(error, last.value, asked, len(last.rows), packing)

    def _unseen(self, error: Exception, value: Any, asked: Hashable, rows: int, packing: bool) -> Output:
        """An output by its shape, where evidence could not be taken or understood. Raises `OutputError`."""
        if isinstance(error, OutputError):
            raise error
        self.say(
            "unseen",
            f"it could not be found out which outputs have rows ({type(error).__name__}); their shapes alone "
            "decide. outputs={...: 'rows'} confirms it, check_rows=False silences this",
        )
        return self.marked(value, asked, rows, packing)

    def _take(self, seen: list[Seen], asked: Hashable, packing: bool, trials: Trials) -> Output:
        kind, last = (packing, asked_for(asked)), seen[-1]
        verdicts = self._judge(self._as_computed(seen), asked)
        refused: BaseException | None = None
        spent = 0
        while self.check and spent < EXTRA and (rows := self._next(seen, verdicts, trials, refused)):
            spent += 1
            try:
                seen.append(_execute(trials, rows))
            except Exception as error:
                refused = error
                continue
            verdicts = self._judge(self._as_computed(seen), asked)
        marks = self._find_marks(self._as_computed(seen))
        output = Output(last.value, None, self.dim, asked, marks)
        wrong = self._error(len(last.rows), output, verdicts, packing)
        if not self.check or len(seen) > 1 or refused is not None or wrong is not None or trials.sizes == [1]:
            self._bound()
            self._marks[kind] = marks
            self._known[_key(kind, output)] = _Known(wrong, output.fits(len(last.rows)))
            if packing:
                self._warn(seen, output, verdicts, refused)
        else:
            self._alike.add(_key(kind, output))
        if wrong is not None:
            raise wrong
        if packing:
            output.check(len(last.rows))
        return output

    def _bound(self) -> None:
        """Forget everything when it has become too much."""
        if len(self._known) > _MOST:
            for each in (self._known, self._marks, self.plain, self._alike):
                each.clear()

    def wants(self, asked: Hashable) -> bool:
        """Whether nothing is known yet of the outputs of calls that share batches."""
        return self.check and (True, asked_for(asked)) not in self._marks

    def marked(self, value: Any, asked: Hashable, rows: int, packing: bool) -> Output:
        """An output by what is known of its kind, or else by its shape."""
        marks = self._marks.get((packing, asked_for(asked)))
        if marks is None:
            marks = self._find_marks([Seen((0,) * rows, value)])
        return Output(value, rows if packing else None, self.dim, asked, marks)

    def _is_known(self, kind: Hashable, output: Output, rows: int) -> bool:
        """Whether there is a verdict on outputs of this kind. Raises it, if it is that they cannot be cut.

        One that fits where another did not is asked about anew: some of a model's outputs may depend on its inputs.
        """
        known = self._known.get(_key(kind, output))
        if known is None:
            return False
        if known.error is not None and (known.fits or not output.fits(rows)):
            raise OutputError(*known.error.args)
        return known.error is None

    @contextmanager
    def _turn(self, trials: Trials) -> Iterator[bool]:
        """One takes evidence at a time; False for who has waited for another for long. Who hangs ends all of it."""
        with self._free:
            for _ in range(_PATIENCE):
                if self._taker is None:
                    self._taker = trials
                    break
                if self._taker.given_up():
                    self.check, self._taker = False, trials
                    self.say("hung", "an execution that was to show which outputs have rows did not end; shapes decide")
                    break
                self._free.wait(_POLL)
                trials.go_on()
        try:
            yield self._taker is trials
        finally:
            with self._free:
                if self._taker is trials:
                    self._taker = None
                self._free.notify_all()

    def _find_marks(self, seen: Sequence[Seen]) -> Marks:
        value = seen[0].value
        marks: dict[Steps, Any] = dict.fromkeys(row_lists(seen, self.dim), Rows)
        for key, what in self._declared.items():
            found = list(_named(key, value))
            if not found:
                there = ", ".join(f"{index}: {path.text}" for index, path in enumerate(paths(value, "output")))
                raise OutputError(f"outputs={self._declared!r}: the model returned no {key!r}; there are {there}")
            for steps, child in found:
                if what == "whole":
                    marks[steps] = Shared
                elif type(child) in (list, tuple):
                    marks[steps] = Rows
        return marks

    def _judge(self, seen: Sequence[Seen], asked: Hashable) -> list[Verdict]:
        marks = self._find_marks(seen)
        outputs = [Output(each.value, None, self.dim, asked, marks) for each in seen]
        for output, each in zip(outputs, seen, strict=True):
            if output.structure != outputs[0].structure:
                raise OutputError(
                    f"the model returned different structures for {len(seen[0].rows)} and {len(each.rows)} rows; what "
                    "is in them cannot be handed out to the calls that shared the batch"
                )
        columns = list(zip(*[output.leaves for output in outputs], strict=True))
        tried = repeats(seen, [output.leaves for output in outputs])
        said = {steps for key, what in self._declared.items() for steps, _ in _named(key, seen[0].value)}
        verdicts = []
        for path, leaves in zip(outputs[0].paths(), columns, strict=True):
            if any(path.steps[: len(steps)] == steps for steps in said):
                verdicts.append(Verdict("whole" if isinstance(leaves[0], Shared) else "row"))
            else:
                verdicts.append(judge(seen, leaves, self.dim, tried))
        return verdicts

    def _as_computed(self, seen: Sequence[Seen]) -> list[Seen]:
        """The executions with outputs in the dtype that they were computed in: it says how far they are rounded."""
        dtype = self._dtype
        if dtype is None:
            return list(seen)

        def rounded(leaf: torch.Tensor) -> torch.Tensor:
            return leaf.to(dtype) if leaf.is_floating_point() and leaf.dtype.itemsize > dtype.itemsize else leaf

        return [Seen(each.rows, mapped(each.value, rounded)) for each in seen]

    def _next(
        self, seen: Sequence[Seen], verdicts: Sequence[Verdict], trials: Trials, refused: BaseException | None
    ) -> tuple[int, ...]:
        """The rows of the execution that says most; none if nothing more can be said."""
        needs: set[Need] = {verdict.need for verdict in verdicts if verdict.need is not None}
        last = seen[-1].rows
        if "repeat" in needs:
            return last
        if "order" in needs:
            return (*last[1:], last[0])
        if "company" in needs:
            return (last[0],) * len(last)
        if "other rows" in needs:
            return _other_rows(seen, trials, refused is not None)
        return ()

    def _error(self, rows: int, output: Output, verdicts: Sequence[Verdict], packing: bool) -> OutputError | None:
        for path, leaf, verdict in zip(output.paths(), output.leaves, verdicts, strict=True):
            if verdict.what == "row" or isinstance(leaf, Shared) or (verdict.loose and not packing):
                continue
            shape = f"{len(leaf)} entries" if isinstance(leaf, Rows) else f"shape {tuple(leaf.shape)}"
            found = f"{path.text} has {shape} for a batch of {rows} rows"
            rule = f"every output needs a row for each along dim {self.dim}, so that each call can be given its own"
            ways = "leave it out of what the model returns, or call disable_dynamic_batching() and send one piece"
            if verdict.what == "whole":
                what, ways = (
                    "the same whatever the rows are",
                    f"declare it, outputs={{{path.name!r}: 'whole'}}, or {ways}",
                )
            elif verdict.elsewhere is not None:
                what = f"whose rows stand along dim {verdict.elsewhere}"
                ways = f"return it as x.movedim({verdict.elsewhere}, {self.dim}), or {ways}"
            elif verdict.need is not None:
                what = "which is not as many"
                ways = f"return tensors with the batch's rows (a value for the whole batch: {ways})"
            else:
                what = "which do not follow the rows of the batch"
            return OutputError(f"{found}, {what}; {rule}: {ways}")
        return None

    def _warn(
        self, seen: Sequence[Seen], output: Output, verdicts: Sequence[Verdict], refused: BaseException | None
    ) -> None:
        """Say once what callers have to know who share batches."""
        for path, verdict in zip(output.paths(), verdicts, strict=True):
            if verdict.influence:
                self.say(
                    "influence",
                    f"{path.text}: a row's result changed by {percent(verdict.influence)} of the largest value when "
                    f"other rows shared its batch of {len(seen[-1].rows)}: rows influence one another (batch norm in "
                    "training mode, one scale a batch, attention or padding across rows), so whoever shares a batch "
                    "changes others' results. Mend the model, or keep calls apart with set_dynamic_batching=False; "
                    "check_rows=False silences this",
                )
            if verdict.sampled and len({len(each.rows) for each in seen}) == 1:
                self.say(
                    "sampled",
                    f"{path.text}: the model answers the same rows differently each time (it samples), and only one "
                    "number of rows can be executed: its shape alone says that it has a row for each; "
                    "outputs={...: 'rows'} confirms it",
                )
        if refused is not None and len({each.rows for each in seen}) == 1:
            self.say(
                "refused",
                f"the model refused the execution that would have shown whether its outputs have a row for each "
                f"({type(refused).__name__}); their shapes alone decide. outputs={{...: 'rows'}} "
                "confirms it, check_rows=False silences this",
            )

    def say(self, what: str, text: str) -> None:
        """Warn of something once."""
        if what not in self._warned:
            self._warned.add(what)
            logger.warning(text)


def percent(share: float) -> str:
    """A share, for people."""
    return "more than it" if share == float("inf") else f"{100 * share:.2g} %"


def _key(kind: Hashable, output: Output) -> Hashable:
    return (kind, tuple(output.structure), *(leaf.ndim for leaf in output.leaves if isinstance(leaf, torch.Tensor)))


@lru_cache
def asked_for(structure: Hashable) -> Hashable:
    """What of a call's structure may decide what its outputs mean: containers, names, what is on or off, short texts.

    Other constants are left out: each call may have its own.
    """
    if not isinstance(structure, tuple):
        return structure
    return tuple(each for each in structure if not _is_constant(each))


def _is_constant(entry: Any) -> bool:
    if not isinstance(entry, tuple) or len(entry) != 2 or entry[1] == "" or entry[0] in (bool, type(None)):
        return False
    return entry[0] is not str or len(entry[1]) > _NAME


def _named(key: str | int, value: Any) -> Iterator[tuple[Steps, Any]]:
    """The places of an output that a key names: its position among the tensors, the last step to it, or its path."""
    if isinstance(key, int):
        for path in list(paths(value, "output"))[key : key + 1]:
            yield path.steps, None
        return
    yield from _below(key, value, "output", ())


def _below(key: str, value: Any, text: str, steps: Steps) -> Iterator[tuple[Steps, Any]]:
    if key == text or (steps and key == steps[-1]):
        yield steps, value
        return
    for step, child in children(value):
        name = f"[{step!r}]" if not isinstance(step, str) or isinstance(value, dict) else f".{step}"
        yield from _below(key, child, text + name, (*steps, step))


# Executions.


def _other_rows(seen: Sequence[Seen], trials: Trials, refused: bool) -> tuple[int, ...]:
    """Rows in another number, where that can be executed, else in another order, or beside others; none if neither.

    Row 0 stands at more than one place, and where it would not, were the order turned round.
    """
    last = seen[-1].rows
    known = sorted({row for each in seen for row in each.rows})
    if len(known) > 1:
        one, other = known[0], known[1]
    elif varies(trials.columns):
        one, other = known[0], len_of(trials.columns, trials.dim)  # the first row beside those that there are: varied
    else:
        return ()
    counts = {len(each.rows) for each in seen}
    number = len(last)
    if not refused:
        if trials.sizes is None:
            number = 4 if 3 in counts else 3
        else:
            number = next((size for size in sorted(trials.sizes) if size not in counts), max(trials.sizes))
    if number == len(last) and len(set(last)) > 1:
        return (*last[1:], last[0])
    return (one,) if number == 1 and number not in counts else (other, *(one,) * (number - 1)) if number > 1 else ()


def _execute(trials: Trials, rows: tuple[int, ...]) -> Seen:
    trials.go_on()
    return Seen(rows, snapshot(trials.execute(arrange(trials.columns, rows, trials.dim), len(rows))))


def snapshot(value: Any) -> Any:
    """An output in memory of its own: what a core returns may be overwritten by its next execution."""
    leaves: list[Any] = []
    try:
        walk(value, leaves, [], [])
    except Sealed as error:
        raise OutputError(f"the model returned {error}") from error
    copies = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf.copy() for leaf in leaves]
    return fill(value, iter(copies))
