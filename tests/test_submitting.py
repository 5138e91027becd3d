"""Cores that complete without a thread: the protocol and its check, simulated ones, the timer that they share."""

import asyncio
import collections
import contextvars
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
from puppets import named

import aneuron
from aneuron import CpuBackend, CudaBackend, Fault, NeuronBackend, SimulatedBackend, testing
from aneuron.backends import PolledCore, SubmittingCore, check_ids, parse_device_ids, simulated, timer
from aneuron.backends.simulated import SimulatedFault
from aneuron.backends.timer import Timer
from aneuron.backends.traits import Traits, traits_of
from aneuron.testing import PuppetBackend, check_backend

X = torch.arange(6.0).reshape(3, 2)


class Plain:
    """No more than a backend must have."""

    name = "plain"
    recoverable = True

    def cores(self):
        return [0]

    def load(self, model, core_id, batch_size):
        return PlainCore(model)

    def classify(self, error):
        return Fault.INPUT


class PlainCore:
    concurrent = True

    def __init__(self, model):
        self.model = model

    def execute(self, args, kwargs):
        return self.model(*args, **kwargs)

    def close(self):
        pass


def having(**traits):
    backend = Plain()
    for name, value in traits.items():
        setattr(backend, name, value)
    return backend


# Traits.


def test_a_backend_that_says_nothing_has_the_defaults():
    traits = traits_of(Plain())
    assert traits == Traits()
    assert (traits.preferred_rows, traits.probes, traits.cuts_batches, traits.inline) == (32, True, False, False)
    assert (traits.compiled_rows("any"), traits.global_id(7), traits.workers) == (None, 7, None)
    with pytest.raises(AttributeError):
        traits.inline = True


def test_what_a_backend_says_is_read():
    assert traits_of(CudaBackend(cores_per_device=3)).cores_per_device == 3
    cpu = CpuBackend(cores=1)
    assert traits_of(cpu) == Traits(loads_scripts=True, inputs_of=cpu.inputs_of)
    assert traits_of(SimulatedBackend(service_time=0.0, inline=True)).inline
    neuron = NeuronBackend()
    assert traits_of(neuron).global_id == neuron.global_id
    assert traits_of(neuron).compiled_rows == neuron.compiled_rows
    puppets = PuppetBackend(1)
    assert traits_of(puppets).workers == puppets.workers
    assert not traits_of(puppets).probes
    assert traits_of(having(compiled_rows=None, global_id=None, workers=None, cores_per_device=None)) == Traits()


@pytest.mark.parametrize(
    ("traits", "rule"),
    [
        *(({name: value}, "expected True or False")
          for name in ("cuts_batches", "loads_scripts", "probes", "inline") for value in (1, None, "yes", all)),
        *(({"preferred_rows": value}, "expected an int of at least 1") for value in (0, -1, True, 8.0, "8", None)),
        *(({"cores_per_device": value}, "expected an int of at least 1") for value in (0, True, "2")),
        *(({name: 8}, "expected a method, or None for none") for name in ("compiled_rows", "global_id", "workers")),
    ],
    ids=named,
)  # fmt: skip
def test_a_trait_of_the_wrong_type_is_named(traits, rule):
    ((name, value),) = traits.items()
    words = f"the plain backend has {name}={re.escape(repr(value))}: {rule}"
    with pytest.raises(ValueError, match=words):
        traits_of(having(**traits))
    with pytest.raises(ValueError, match=words):
        check_backend(having(**traits))


def test_devices_are_looked_for_where_they_are_named_only():
    class Slow(Plain):
        @property
        def cuts_batches(self):
            raise OSError("looks for a package")

    check_ids(Slow(), None)
    check_ids(Slow(), parse_device_ids([0, "nc:1"]))


# The timer.


@pytest.fixture
def made():
    """A timer, which is stopped in the end."""
    timer = Timer("aneuron-test")
    yield timer
    for thread in timer.stop():
        thread.join(60.0)
        assert not thread.is_alive()


def now():
    return time.monotonic()


def test_calls_are_made_in_the_order_of_their_time_and_planning(made):
    seen, over = [], threading.Event()
    begin = now() + 0.02
    for index in range(4):
        made.at(begin, lambda index=index: seen.append(index), None)
    made.at(begin + 0.01, over.set, None)
    made.at(begin - 0.01, lambda: seen.append("first"), None)
    assert over.wait(60.0)
    assert seen == ["first", 0, 1, 2, 3]


def test_what_is_due_sooner_does_not_wait_for_what_is_due_in_an_hour(made):
    over = threading.Event()
    made.at(now() + 3600.0, lambda: None, None)
    for _ in range(3):
        over.clear()
        made.at(now(), over.set, None)
        assert over.wait(60.0)
    made.at(now() + 0.001, over.set, None)
    assert over.wait(60.0)


def test_nothing_waits_behind_a_call_that_blocks(made):
    blocked, free, over = threading.Event(), threading.Event(), threading.Event()

    def block():
        blocked.set()
        assert free.wait(60.0)

    made.at(now(), block, None)
    assert blocked.wait(60.0)
    made.at(now(), over.set, None)
    assert over.wait(60.0)
    assert not free.is_set()
    free.set()


def test_many_that_wait_for_one_another_meet(made):
    meeting, met = threading.Barrier(6), threading.Semaphore(0)

    def meet():
        meeting.wait(60.0)
        met.release()

    for index in range(6):
        made.at(now(), meet, None, long=index % 2 == 0)
    for _ in range(6):
        assert met.acquire(timeout=60.0)


def test_what_is_dropped_is_not_called_and_the_threads_end(made):
    seen, over = [], threading.Event()
    mine, other = object(), object()
    made.at(now(), over.set, None)
    assert over.wait(60.0)
    threads = set(made._threads)
    assert threads
    made.at(now() + 3600.0, lambda: seen.append("mine"), mine)
    made.at(now() + 0.03, lambda: seen.append("other"), other)
    made.at(now() + 0.02, lambda: seen.append("mine"), mine)
    made.drop(mine)
    over.clear()
    made.at(now() + 0.04, over.set, other)
    assert over.wait(60.0)
    assert seen == ["other"]
    made.drop(other)
    for thread in threads:
        thread.join(60.0)
        assert not thread.is_alive()
    over.clear()
    made.at(now(), over.set, None)  # and begin again
    assert over.wait(60.0)


def test_threads_without_a_call_end_by_themselves(made, monkeypatch):
    monkeypatch.setattr(timer, "IDLE", 0.01)
    for _ in range(3):
        over = threading.Event()
        for long in (True, False):
            made.at(now(), over.set, None, long)
        assert over.wait(60.0)
        for thread in set(made._threads):
            thread.join(60.0)
            assert not thread.is_alive()


def test_a_call_that_fails_is_told_and_the_others_go_on(made, caplog):
    over = threading.Event()

    def fail():
        raise SystemExit("of a call")

    made.at(now(), fail, None)
    made.at(now(), over.set, None)
    assert over.wait(60.0)
    (record,) = caplog.records
    assert record.levelname == "CRITICAL"
    assert "a call of aneuron-test failed" in record.message
    assert "of a call" in caplog.text


def test_gradients_are_off_in_a_call_and_a_call_leaves_no_modes_behind(made):
    seen, over = [], threading.Event()

    def change():
        seen.append(torch.is_grad_enabled())
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float64)

    try:
        made.at(now(), change, None)
        made.at(now(), lambda: seen.append((torch.is_grad_enabled(), torch.get_default_dtype())), None)
        made.at(now(), over.set, None)
        assert over.wait(60.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == [False, (False, torch.float32)]


def test_no_thread_to_be_had_is_an_error_and_nothing_is_planned(made, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    seen, over = [], threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            made.at(now(), lambda: seen.append("planned"), None)
    made.at(now(), over.set, None)
    assert over.wait(60.0)
    assert seen == []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for long in (True, False):  # the one that there is does it all
            over.clear()
            made.at(now(), lambda: seen.append("long"), None, long)
            made.at(now(), over.set, None)
            assert over.wait(60.0)
    assert seen == ["long", "long"]


def test_a_call_plans_another_where_no_thread_is_to_be_had(made, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(timer, "IDLE", 0.0)
    inside, go, over, calling = threading.Event(), threading.Event(), threading.Event(), []

    def call():
        calling.append(threading.current_thread())
        inside.set()
        assert go.wait(60.0)
        made.at(now(), over.set, None)

    made.at(now(), call, None, long=True)
    assert inside.wait(60.0)
    for thread in set(made._threads) - set(calling):
        thread.join(60.0)
        assert not thread.is_alive()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        go.set()
        assert over.wait(60.0)


def test_every_call_is_made_once_whoever_plans_it(made):
    counts, over = collections.Counter(), threading.Semaphore(0)

    def plan(number):
        for index in range(200):

            def call(key=(number, index)):
                counts[key] += 1
                over.release()

            made.at(now() + (index % 3) * 0.0005, call, None, long=index % 50 == 0)

    threads = [threading.Thread(target=plan, args=(number,)) for number in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        for _ in range(1600):
            assert over.acquire(timeout=60.0)
    finally:
        sys.setswitchinterval(interval)
    assert set(counts.values()) == {1}
    assert len(counts) == 1600


FORK = """
import os, threading, time, warnings
from aneuron.backends.timer import Timer
warnings.simplefilter("ignore", DeprecationWarning)
timer, called, late = Timer("aneuron-fork"), threading.Event(), []
timer.at(time.monotonic(), called.set, None)
assert called.wait(60.0)
timer.at(time.monotonic() + 3600.0, lambda: late.append(1), None)
child = os.fork()
called = threading.Event()
timer.at(time.monotonic(), called.set, None)
assert called.wait(60.0)
assert len(timer._plan) == (1 if child else 0)
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print("both")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_a_timer_of_its_own_and_none_keeps_a_process_alive():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout.strip()) == (0, "both"), done.stderr


# Simulated cores, on virtual time.


class PuppetTimer:
    """Stands in for the timer of the simulated cores, and for their clock."""

    def __init__(self):
        self.now, self.computed, self.plan, self.long = 100.0, 0.0, [], []

    def monotonic(self):
        return self.now

    def thread_time(self):
        return self.computed

    def sleep(self, seconds):
        self.now += seconds

    def at(self, due, call, owner, long=False):
        self.plan.append((due, len(self.plan), call, owner))
        self.long.append(long)

    def drop(self, owner):
        self.plan = [each for each in self.plan if each[3] is not owner]

    def advance(self, seconds=float("inf")):
        """Make all calls that are due within so many seconds."""
        until = self.now + seconds
        while self.plan and min(self.plan)[0] <= until:
            planned = min(self.plan)
            self.plan.remove(planned)
            self.now = max(self.now, planned[0])
            with torch.no_grad():
                planned[2]()
        self.now = max(self.now, until if seconds < float("inf") else self.now)


@pytest.fixture
def puppet(monkeypatch):
    made = PuppetTimer()
    monkeypatch.setattr(simulated, "time", made)
    monkeypatch.setattr(simulated, "_timer", made)
    return made


class Ends(list):
    """What submissions have ended with, and when."""

    def __init__(self, puppet, core):
        super().__init__()
        self.puppet, self.core = puppet, core

    def submit(self, x, name=None):
        name = name if name is not None else len(self)
        self.core.submit((x,), {}, lambda output, error: self.append((name, self.puppet.now, output, error)))

    @property
    def times(self):
        return [(name, pytest.approx(at - 100.0)) for name, at, *_ in self]


def loaded(puppet, model=torch.neg, batch_size=None, core=0, **settings):
    return Ends(puppet, SimulatedBackend(**settings).load(model, core, batch_size))


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("settings", "rows", "seconds"),
    [
        ({}, 3, 0.005),
        ({"service_time": 0.5, "per_row": 0.25}, 8, 2.5),
        ({"service_time": 0.0, "per_row": 0.25}, 4, 1.0),
        ({"service_time": 0.5, "copy_time": 0.125}, 4, 0.625),
        ({"service_time": 7200.0}, 1, 7200.0),
    ],
    ids=named,
)
def test_a_submission_takes_the_time_that_was_asked_for(puppet, settings, rows, seconds, warm):
    ends = loaded(puppet, **settings)
    assert isinstance(ends.core, SubmittingCore)
    x = torch.ones(rows, 2)
    if warm:
        ends.core.execute((x,), {})
        puppet.now = 100.0
        ends.core._free = 0.0
    ends.submit(x)
    puppet.advance(seconds * 0.999)
    assert ends == []
    puppet.advance(seconds * 0.002)
    ((_, _, output, error),) = ends
    assert ends.times == [(0, seconds)]
    assert torch.equal(output, -x)
    assert error is None


def test_a_device_runs_one_batch_at_a_time_and_copies_overlap(puppet):
    ends = loaded(puppet, service_time=2.0, copy_time=1.0)
    for name in "abc":
        ends.submit(X, name)
    puppet.advance()
    assert ends.times == [("a", 3.0), ("b", 5.0), ("c", 7.0)]
    puppet.now += 13.0  # until 20
    ends.submit(X, "d")
    puppet.advance(2.5)
    ends.submit(X, "e")  # copied at 23.5, while d still runs, or has just ended
    puppet.advance()
    assert ends.times[3:] == [("d", 23.0), ("e", 25.5)]


def test_a_timer_that_is_late_does_not_delay_the_device(puppet):
    ends = loaded(puppet, service_time=2.0)
    ends.core.execute((X,), {})
    for name in "abc":
        ends.submit(X, name)
    begin, puppet.now = puppet.now, puppet.now + 5.0  # the first two are due
    puppet.advance(0.0)
    assert [name for name, *_ in ends] == ["a", "b"]
    puppet.advance()
    assert ends[2][1] == pytest.approx(begin + 6.0)


def test_a_model_that_waits_for_the_interpreter_is_not_one_that_takes_long(puppet):
    """A loop that is busy lets the timer's thread wait: more threads would wait as well, and take from the loop."""
    waits = computes = 0.0

    def net(x):
        puppet.now += waits + computes
        puppet.computed += computes
        return x * 2

    ends = loaded(puppet, net, service_time=0.5)
    ends.core.execute((X,), {})
    waits = 0.01
    for _ in range(100):
        ends.submit(X)
        puppet.advance()
    assert not any(puppet.long)
    computes = 0.01  # a quick one came first
    for _ in range(10):
        ends.submit(X)
        puppet.advance()
    assert any(puppet.long)


@pytest.mark.parametrize("seconds", [0.375, 0.625])
def test_the_time_of_the_model_itself_counts(puppet, seconds):
    def net(x):
        puppet.now += seconds
        return x * 2

    ends = loaded(puppet, net, service_time=0.5)
    for name in "ab":
        ends.submit(X, name)
    puppet.advance()
    each = max(0.5, seconds)
    assert ends.times == [("a", each), ("b", 2 * each)]


def test_a_model_is_not_computed_on_the_calling_thread(puppet):
    ran = []
    ends = loaded(puppet, lambda x: ran.append(x) or x)
    ends.submit(X)
    assert ran == []
    puppet.advance()
    assert len(ran) == len(ends) == 1


class Keeps(torch.nn.Module):
    """Writes its answers into memory of its own."""

    def __init__(self, kind):
        super().__init__()
        self.out, self.kind = torch.zeros(3, 2), kind

    def forward(self, x):
        self.out.copy_(x)
        shapes = {"plain": self.out, "view": self.out[:2], "nested": {"a": [self.out, "text"], "b": self.out.numpy()}}
        return shapes[self.kind]


@pytest.mark.parametrize("kind", ["plain", "view", "nested"])
def test_an_answer_stays_as_it_is_while_the_core_goes_on(puppet, kind):
    """As on a device, from which it is copied: two batches are in flight at once."""

    def first(output):
        return float(output["a"][0][0, 0]) + float(output["b"][0, 0]) if kind == "nested" else float(output[0, 0])

    ends = loaded(puppet, Keeps(kind))
    executed = [ends.core.execute((X + index,), {}) for index in range(3)]
    for index in range(3):
        ends.submit(X + index)
    puppet.advance()
    expected = [0.0, 2.0, 4.0] if kind == "nested" else [0.0, 1.0, 2.0]
    assert [first(output) for output in executed] == expected
    assert [first(output) for *_, output, _ in ends] == expected


def test_an_error_of_the_model_comes_by_done_and_the_next_goes_on(puppet):
    def net(x):
        if (x < 0).any():
            raise LookupError("negative")
        return x

    ends = loaded(puppet, net, service_time=1.0)
    ends.submit(-X - 1, "bad")
    ends.submit(X, "good")
    puppet.advance()
    (_, _, none, error), (_, _, output, no_error) = ends
    assert isinstance(error, LookupError)
    assert none is None
    assert torch.equal(output, X)
    assert no_error is None
    assert ends.times == [("bad", 1.0), ("good", 2.0)]


def test_a_batch_that_is_not_of_the_compiled_size_is_refused_at_once(puppet):
    ends = loaded(puppet, batch_size=4)
    with pytest.raises(ValueError, match="a batch of 3 rows, on a core compiled for 4"):
        ends.submit(X)
    puppet.advance()
    assert ends == []


@pytest.mark.parametrize("kind", ["input", "core", "fatal"])
def test_a_planned_fault_comes_by_done_while_the_device_runs_another(puppet, kind):
    plan = [SimulatedBackend.fault(kind, execution=1)]
    ends = loaded(puppet, service_time=2.0, copy_time=0.5, faults=plan)
    for name in "abc":
        ends.submit(X, name)
    puppet.advance()
    assert ends.times == [("b", 0.5), ("a", 2.5), ("c", 4.5)]
    error = ends[0][3]
    assert isinstance(error, SimulatedFault)
    assert SimulatedBackend().classify(error) is Fault(kind)


@pytest.mark.parametrize("kind", ["slow", "hang"])
def test_a_slow_or_hanging_submission_answers_late(puppet, kind):
    ends = loaded(puppet, service_time=1.0, faults=[SimulatedBackend.fault(kind, execution=1, seconds=30.0)])
    for name in "abc":
        ends.submit(X, name)
    puppet.advance()
    assert ends.times == [("a", 1.0), ("b", 32.0), ("c", 33.0)]
    assert all(torch.equal(output, -X) for *_, output, _ in ends)


@pytest.mark.parametrize(
    "settings", [{"seed": 3}, {"seed": 4, "per_row": 0.1}, {"seed": 5, "copy_time": 0.3}], ids=named
)
def test_a_submission_ends_as_an_execution_does(puppet, settings):
    """The same plan, one after the other: the same outcomes, after the same times."""
    fault = SimulatedBackend.fault
    plan = [fault("core", probability=0.1), fault("input", execution=4), fault("slow", probability=0.2, seconds=7.0)]
    settings = {"service_time": 1.0, "faults": plan, **settings}
    executed, submitted = [], []
    core = loaded(puppet, **settings).core
    for index in range(60):
        begin = puppet.now
        try:
            output = core.execute((X + index,), {})
        except SimulatedFault as error:
            output = str(error)
        executed.append((puppet.now - begin, output))
    ends = loaded(puppet, **settings)
    for index in range(60):
        begin = puppet.now
        ends.submit(X + index)
        puppet.advance()
        _, at, output, error = ends.pop()
        submitted.append((at - begin, output if error is None else str(error)))
    assert len({str(output) for _, output in executed}) > 20
    for (seconds, output), (theirs, other) in zip(submitted, executed, strict=True):
        assert seconds == pytest.approx(theirs)
        assert str(output) == str(other)


def test_closing_forgets_what_hangs(puppet):
    ends = loaded(puppet, service_time=1.0, faults=[SimulatedBackend.fault("hang")])
    other = loaded(puppet, service_time=1.0)
    ends.submit(X, "hangs")
    ends.submit(X, "waits")
    other.submit(X, "other")
    puppet.advance(10.0)
    ends.core.close()
    assert puppet.plan == []
    puppet.advance()
    assert ends == []
    assert other.times == [("other", 1.0)]


@pytest.mark.parametrize("faults", [[], [SimulatedBackend.fault("hang")]], ids=["", "hang"])
def test_a_core_that_is_closed_while_it_computes_starts_nothing_more(puppet, faults):
    def net(x):
        ends.core.close()
        return x * 2

    ends = loaded(puppet, net, service_time=1.0, faults=faults)
    ends.submit(X, "a")
    ends.submit(X, "b")
    puppet.advance()
    assert ends.times == [("a", 0.0)]  # to no effect
    assert puppet.plan == []


# What submits.


@pytest.mark.parametrize(
    ("settings", "submits"),
    [
        ({}, True),
        ({"service_time": 0.0}, False),  # nothing to wait for: what is left is the model's own time
        ({"service_time": 0.0, "per_row": 0.1}, True),
        ({"service_time": 0.0, "copy_time": 0.1}, True),
        ({"submits": False}, False),
        ({"service_time": 0.0, "inline": True}, False),
    ],
    ids=named,
)
def test_cores_submit_where_they_take_time(settings, submits):
    backend = SimulatedBackend(1, **settings)
    core = backend.load(torch.neg, 0, None)
    assert isinstance(core, SubmittingCore) is submits
    assert core.concurrent is (submits or not backend.submits)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"submits": 1}, "submits=1: expected True or False"),
        ({"inline": None}, "inline=None: expected True or False"),
        ({"inline": True}, r"inline=True with service_time=0\.005, .*: the event loop would sleep"),
        ({"inline": True, "service_time": 0.0, "per_row": 0.1}, "inline=True with"),
        ({"inline": True, "service_time": 0.0, "copy_time": 0.1}, "inline=True with"),
    ],
    ids=named,
)
def test_choices_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SimulatedBackend(1, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"service_time": 0.001},
        {"service_time": 0.001, "submits": False},
        {"service_time": 0.0005, "copy_time": 0.001, "per_row": 0.0001},
        {"service_time": 0.0, "inline": True},
    ],
    ids=named,
)
def test_simulated_cores_keep_the_contract(settings):
    net = torch.nn.Linear(2, 2).eval()
    backend = SimulatedBackend(cores=2, **settings)
    check_backend(backend)
    check_backend(backend, net, (X,))


def test_models_that_wait_for_one_another_meet():
    """A model may block: no other core waits behind it."""
    meeting, ends, over = threading.Barrier(4), [], threading.Semaphore(0)

    def net(x):
        if (x > 0).any():
            meeting.wait(60.0)
        return x + 1

    backend = SimulatedBackend(cores=4, service_time=0.0001)
    cores = [backend.load(net, core, None) for core in range(4)]
    try:
        for x in (torch.zeros(1), torch.ones(1)):  # known to be fast, and then not
            for core in cores:
                core.submit((x,), {}, lambda *end: (ends.append(end), over.release()))
            for _ in cores:
                assert over.acquire(timeout=60.0)
    finally:
        for core in cores:
            core.close()
    assert [error for _, error in ends] == [None] * 8
    assert [float(output) for output, _ in ends] == [1.0] * 4 + [2.0] * 4


def test_a_model_sees_the_context_in_which_it_was_loaded():
    variable = contextvars.ContextVar("variable", default="none")
    ends, over = [], threading.Event()
    backend = SimulatedBackend(cores=1, service_time=0.0001)

    def load():
        variable.set("of the load")
        return backend.load(lambda x: variable.get(), 0, None)

    core = contextvars.copy_context().run(load)
    variable.set("of the call")
    core.submit((X,), {}, lambda *end: (ends.append(end), over.set()))
    assert over.wait(60.0)
    core.close()
    assert ends == [("of the load", None)]


def test_what_raises_holds_no_batch_behind():
    """No cycle of traceback and frame: the rows go with the error."""
    import gc
    import weakref

    def net(x):
        raise LookupError("no")

    ends, over = [], threading.Event()
    core = SimulatedBackend(cores=1, service_time=0.0001).load(net, 0, None)
    x = torch.ones(2, 2)
    rows = weakref.ref(x)
    gc.collect()
    gc.disable()
    try:
        core.submit((x,), {}, lambda *end: (ends.append(end), over.set()))
        del x
        assert over.wait(60.0)
        core.close()
        for thread in set(simulated._timer._threads):
            thread.join(60.0)
        ends.clear()
        assert rows() is None
    finally:
        gc.enable()


def test_a_context_of_the_user_is_around_executions_only():
    from aneuron.engine.modes import Within

    core = SimulatedBackend(cores=1).load(torch.neg, 0, None)
    assert not isinstance(Within(core, contextvars.copy_context), SubmittingCore)


# The check of the contract.


class Device(PlainCore):
    """A core that submits, by a thread for each submission; tests change one thing about it."""

    def submit(self, args, kwargs, done):
        threading.Thread(target=self.run, args=(args, kwargs, done), daemon=True).start()

    def run(self, args, kwargs, done):
        done(*self.outcome(args, kwargs))

    def outcome(self, args, kwargs):
        try:
            with torch.no_grad():
                return self.model(*args, **kwargs), None
        except Exception as error:
            return None, error


class AtOnce(Device):
    def submit(self, args, kwargs, done):
        self.run(args, kwargs, done)


class OneAtATime(Device):
    concurrent = False
    inside = 0

    def submit(self, args, kwargs, done):
        assert not self.inside, "one submission at a time"
        self.inside = 1
        super().submit(args, kwargs, done)

    def run(self, args, kwargs, done):
        end = self.outcome(args, kwargs)
        self.inside = 0
        done(*end)


class Refuses(Device):
    """Errors that are known at once are raised."""

    def submit(self, args, kwargs, done):
        if not args:
            raise TypeError("no rows")
        super().submit(args, kwargs, done)


class Polled(Device):
    """Its completions are read from an eventfd."""

    def __init__(self, model):
        super().__init__(model)
        self.completions, self.ends = os.eventfd(0, os.EFD_NONBLOCK), collections.deque()

    def run(self, args, kwargs, done):
        self.ends.append((done, *self.outcome(args, kwargs)))
        os.eventfd_write(self.completions, 1)

    def complete(self):
        os.eventfd_read(self.completions)
        while self.ends:
            done, output, error = self.ends.popleft()
            done(output, error)

    def close(self):
        os.close(self.completions)


def cores_of(core):
    backend = Plain()
    backend.load = lambda model, core_id, batch_size: core(model)
    return backend


polled = pytest.param(Polled, marks=pytest.mark.skipif(not hasattr(os, "eventfd"), reason="no eventfd here"))


@pytest.mark.parametrize("core", [Device, AtOnce, OneAtATime, Refuses, polled])
def test_what_keeps_the_contract_passes(core):
    check_backend(cores_of(core))
    check_backend(cores_of(core), torch.nn.Linear(2, 2).eval(), (X,))
    made = core(torch.neg)
    assert isinstance(made, PolledCore) is (core is Polled)
    made.close()


@pytest.mark.skipif(not hasattr(os, "eventfd"), reason="no eventfd here")
def test_a_loop_that_watches_the_descriptor_of_a_polled_core_is_told_on_its_own_thread():
    async def main():
        loop, core, told = asyncio.get_running_loop(), Polled(torch.neg), []
        loop.add_reader(core.completions, core.complete)
        futures = [loop.create_future() for _ in range(8)]
        for index, future in enumerate(futures):

            def done(output, error, future=future):
                told.append(threading.get_ident())
                future.set_result((output, error))

            core.submit((X + index,), {}, done)
        ends = await asyncio.gather(*futures)
        loop.remove_reader(core.completions)
        core.close()
        assert all(torch.equal(output, -(X + index)) for index, (output, _) in enumerate(ends))
        assert set(told) == {threading.get_ident()}

    asyncio.run(main())


class Twice(Device):
    def run(self, args, kwargs, done):
        end = self.outcome(args, kwargs)
        done(*end)
        done(*end)


class Late(Device):
    """Says it once more when it is closed."""

    def run(self, args, kwargs, done):
        self.last = done
        super().run(args, kwargs, done)

    def close(self):
        self.last(None, None)


class Never(Device):
    def run(self, args, kwargs, done):
        pass


class Early(Device):
    """Says it is done before it is."""

    def run(self, args, kwargs, done):
        output, error = self.outcome(args, kwargs)
        if error is not None:
            done(None, error)
        else:
            right = output.clone()
            output.zero_()
            done(output, None)
            output.copy_(right)


class Reuses(Device):
    """Has one memory for all outputs."""

    def __init__(self, model):
        super().__init__(model)
        self.lock, self.memory = threading.Lock(), None

    def run(self, args, kwargs, done):
        with self.lock:
            output, error = self.outcome(args, kwargs)
            if error is None:
                self.memory = output = output if self.memory is None else self.memory.copy_(output)
            done(output, error)


class Swaps(AtOnce):
    """Mixes up two that are in flight."""

    def outcome(self, args, kwargs):
        output, error = super().outcome(args, kwargs)
        self.last, last = output, getattr(self, "last", output)
        return (last, None) if error is None else (None, error)


class Both(Device):
    def run(self, args, kwargs, done):
        output, error = self.outcome(args, kwargs)
        done(output, error or ValueError("as well"))


class RaisesToo(AtOnce):
    def submit(self, args, kwargs, done):
        super().submit(args, kwargs, done)
        if not args:
            raise TypeError("no rows")


class Errors(Device):
    def run(self, args, kwargs, done):
        done(None, OSError("the device is gone"))


class Raises(Device):
    def submit(self, args, kwargs, done):
        raise OSError("the device is gone")


class Words(Device):
    def outcome(self, args, kwargs):
        output, error = super().outcome(args, kwargs)
        return output, error and str(error)


class Trains(Device):
    """Forgets that nobody has switched gradients off."""

    def outcome(self, args, kwargs):
        try:
            return self.model(*args, **kwargs), None
        except Exception as error:
            return None, error


class Overwrites(Device):
    def outcome(self, args, kwargs):
        output, error = super().outcome(args, kwargs)
        for x in args:
            x.zero_()
        return output, error


class LeavesGradients(Device):
    def submit(self, args, kwargs, done):
        torch.set_grad_enabled(False)
        super().submit(args, kwargs, done)


class LeavesDtype(Device):
    def submit(self, args, kwargs, done):
        torch.set_default_dtype(torch.float64)
        super().submit(args, kwargs, done)


class LeavesInference(Device):
    def submit(self, args, kwargs, done):
        self.guard = torch.inference_mode()
        self.guard.__enter__()
        super().submit(args, kwargs, done)


class Meanwhile(Device):
    """Executes wrongly while a submission is in flight."""

    flying = 0

    def submit(self, args, kwargs, done):
        self.flying += 1
        super().submit(
            args, kwargs, lambda *end: (threading.Event().wait(0.05), setattr(self, "flying", 0), done(*end))
        )

    def execute(self, args, kwargs):
        return super().execute(args, kwargs) + self.flying


@pytest.fixture
def modes_again():
    """Put this thread's modes back: the check is left in the middle."""
    with torch.set_grad_enabled(True):
        yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("core", "words"),
    [
        (Twice, "called once: it was called 2 times"),
        (Late, "called once: it was called 2 times"),
        (Never, r"done\(\) is called when a submission has ended"),
        (Early, "when the output is there"),
        (Reuses, "is not written to again"),
        (Swaps, "the same as of execute"),
        (Both, "an output or an error, not both"),
        (RaisesToo, "not called where submit\\(\\) raises"),
        (Errors, "the device is gone"),
        (Raises, "the device is gone"),
        (Words, r"done\(output, error\): error="),
        (Trains, "gradients are off where it computes"),
        (Overwrites, "left as they are"),
        (LeavesGradients, "leaves the modes"),
        (LeavesDtype, "leaves the modes"),
        (LeavesInference, "leaves the modes"),
        (Meanwhile, "executes while submissions are in flight"),
    ],
    ids=named,
)
def test_the_check_finds_what_is_broken(core, words, monkeypatch, modes_again):
    monkeypatch.setattr(testing, "PATIENCE", 1.0 if core is Never else 60.0)
    backend = cores_of(core)
    made = []
    backend.load = lambda model, core_id, batch_size: made.append(core(model)) or made[-1]
    try:
        with pytest.raises((AssertionError, OSError), match=words):
            check_backend(backend, torch.nn.Linear(2, 2).eval(), (X,))
    finally:
        for each in made:
            if hasattr(each, "guard"):
                each.guard.__exit__(None, None, None)


class LeavesModes(PlainCore):
    def execute(self, args, kwargs):
        if threading.current_thread() is threading.main_thread():
            torch.set_grad_enabled(True)
        return super().execute(args, kwargs)


def test_an_inline_core_that_leaves_modes_behind_is_found(modes_again):
    backend = cores_of(LeavesModes)
    check_backend(backend)
    backend.inline = True
    with pytest.raises(AssertionError, match="an inline core leaves the modes"):
        check_backend(backend)


def test_a_submitting_core_serves_as_any_other():
    """Whether the lanes use `submit` or not."""

    async def main():
        async with aneuron.AsyncDataParallel(torch.neg, backend=cores_of(Device), batch_size=4) as model:
            results = await asyncio.gather(*(model(X + index) for index in range(20)))
            assert all(torch.equal(result, -(X + index)) for index, result in enumerate(results))

    asyncio.run(main())
