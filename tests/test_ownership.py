"""Whose each field is: that classes say it, and that the debug mode of ownership.py finds who does not keep to it."""

import ast
import asyncio
import importlib
import pathlib
import threading

import pytest
import torch
from test_errors_public import PACKAGE, modules

from aneuron import AsyncDataParallel, SimulatedBackend, ownership

# What changes elsewhere than in `__init__`, and is reached through others, or says in words whose it is.
ELSEWHERE = {
    "sched.flows": "all",  # by FairQueue
    "sched.filling": {"Batch", "Filling"},  # formed with the lock, then in one thread's hands
    "engine.health": "all",  # by Recovery
    "engine.evidence": "all",  # has a lock of its own
    "engine.modes": "all",  # a thread's own
    "engine.threads": {"Workers"},  # has a lock of its own
    "stats": {"Tally", "Recent", "ServiceTimes"},  # set by the loop; what others read is replaced as one
}


def is_self(node):
    return isinstance(node, ast.Name) and node.id == "self"


def assigned(node):
    """The fields that methods of a class set, `__init__` aside."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and method.name != "__init__":
            for each in ast.walk(method):
                if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and is_self(each.value):
                    yield each.attr


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith(("sched.", "engine.", "stats"))])
def test_each_class_says_whose_the_fields_are_that_change(name):
    source = ast.parse((PACKAGE / pathlib.Path(*name.split("."))).with_suffix(".py").read_text())
    module = importlib.import_module(f"aneuron.{name}")
    for node in source.body:
        if isinstance(node, ast.ClassDef):
            told = getattr(getattr(module, node.name), "owned", None)
            elsewhere = ELSEWHERE.get(name, ())
            if told is not None:
                assert set(assigned(node)) <= told.names, node.name
            elif elsewhere != "all" and node.name not in elsewhere:
                assert not set(assigned(node)), node.name


def inside(code, **names):
    """Run code as if it were the package's: tests may look at everything."""
    exec(code, {"__name__": "aneuron.somewhere", **names})


def in_a_thread(fn):
    """Call, and the error."""
    errors = []

    def call():
        try:
            fn()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call, name="another")
    thread.start()
    thread.join()
    return errors[0] if errors else None


@pytest.mark.pure
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("board.stopped", r"Board.stopped is the lock's, and was read by another, at .*:1"),
        ("board.stopped = True", "Board.stopped is the lock's, and was set by another"),
        ("with board.lock: board.stopped", None),
        ("with board.lock: board.slots.bound, board.lanes[0].queue, scheduler.out, scheduler._queue.kinds", None),
        ("board.slots.bound", "Slots.bound is the lock's, and was read"),
        ("board.lanes[0].queue", "Bound.queue is the lock's, and was read"),
        ("scheduler._room._inside", "Room._inside is the lock's, and was read"),
        ("scheduler.has_work()", None),
        ("run.futures.calls", "Futures.calls is the loop's, and was read"),
        ("run.dispatcher.dispatch_soon()", "Dispatcher._scheduled is the loop's, and was read"),
        ("run.dispatcher.call_loop(print)", None),
        ("run.admission.traced", None),
        ("run.admission.traced = True", "Admission.traced is set by the loop, and was set by another"),
        ("run.scheduler.rules", None),
        ("run.scheduler.rules = None", "Scheduler.rules is set with the lock, and was set"),
        ("board.slots.staging", "Slots.staging is set by the loop, with the lock, and was read by another"),
        ("with board.lock: board.slots.staging", None),
        ("with board.lock: board.slots.staging = True", "Slots.staging is set by the loop, with the lock, and was set"),
        ("run.counters.accepted += 1", "Counters.accepted is set by the loop, and was set"),
        ("run.counters.cores[0].state", None),
        ("run.loaded[0].out = True", "Loaded.out is set by the loop, and was set"),
        ("with board.lock: board.shares.accounts[0].tag", None),
        ("for each in board.shares._shares_of_the_test: each.account.tag", "Account.tag is the lock's, and was read"),
        ("board.shares = None", "Board.shares was set, and `owned` does not say whose it is"),
        ("run.new = 1", "Run.new was set, and `owned` does not say whose it is"),
        ("board.lock.__enter__(); board.lock.__enter__()", "another would wait for the lock that it holds itself"),
    ],
)
async def test_who_touches_what_is_not_his_is_found(code, said):
    async with AsyncDataParallel(torch.neg, backend=SimulatedBackend(cores=1, service_time=0.0)) as model:
        await model(torch.ones(1, 1))
        run = model._life.run
        board = run.dispatcher.board
        board.shares.__dict__["_shares_of_the_test"] = board.shares.shares
        names = {"board": board, "run": run, "scheduler": run.scheduler}
        error = in_a_thread(lambda: inside(code, **names))
        if board.lock.holder:
            board.lock.__exit__()
        if said is None:
            assert error is None
        else:
            assert isinstance(error, ownership.OwnershipError)
            assert error.args == tuple(ownership.violations)
            with pytest.raises(AssertionError, match=said):
                raise error
        ownership.violations.clear()


@pytest.mark.pure
async def test_the_loop_may_read_what_it_sets_with_the_lock_and_tests_may_look_at_everything():
    async with AsyncDataParallel(torch.neg, backend=SimulatedBackend(cores=1, service_time=0.0)) as model:
        await model(torch.ones(1, 1))
        board = model._life.run.dispatcher.board
        inside("board.slots.staging, board.shares.shares", board=board)
        with pytest.raises(ownership.OwnershipError, match=r"Slots\.timed is set by the loop, with the lock"):
            inside("board.slots.timed = True", board=board)
        ownership.violations.clear()
        assert in_a_thread(lambda: (board.slots.bound, board.stopped)) is None


@pytest.mark.pure
def test_on_a_loop_that_runs_no_more_anybody_may_close_what_it_has_left():
    model = AsyncDataParallel(torch.neg, backend=SimulatedBackend(cores=1, service_time=0.0))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(model.start())
    run = model._life.run
    assert in_a_thread(lambda: inside("run.stop()", run=run)) is None
    assert run.dispatcher.stopped
    loop.run_until_complete(model.aclose())
    loop.close()


@pytest.mark.pure
def test_the_debug_mode_is_on_where_the_core_runs_as_python():
    assert ownership.CHECKED


def test_nothing_is_looked_after_where_the_debug_mode_is_off():
    assert ownership.CHECKED or type(ownership.lock()) is type(threading.Lock())
