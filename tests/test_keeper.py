"""Engines for all processes that say the same name: who starts them, who may use them, when they end.

The keeper runs on the test's own loop, behind a real socket; real processes are in test_engine_processes.py.
"""

import asyncio
import contextlib
import os
import pickle
import socket
import stat
from dataclasses import replace

import pytest
from virtual_engines import Virtual, source

from aneuron import Buckets, CpuBackend
from aneuron.errors import Closed, CoreFailed
from aneuron.remote import control, keeper
from aneuron.remote.control import VersionsDiffer
from aneuron.remote.division import divide
from aneuron.remote.keeper import Keeper
from aneuron.remote.meeting import Meeting, tidy
from aneuron.remote.shared import Shared
from aneuron.remote.supervision import Plan

NAME = "a name/with slashes, as long as you like: " + "x" * 300


class Machine:
    """A directory, and the keepers that were started in it."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.keepers = []
        self.spawners = []
        self.ends = []
        self.processes = []

    def process(self, name=NAME, cores=4, processes=2, linger=0.05, **more):
        """One that shares engines."""
        backend = more.pop("backend", CpuBackend(cores=cores))
        plan = Plan(divide(range(cores), processes, {}), pickle.dumps(backend), program={}, **more)
        process = Process(self, name, plan, linger)
        self.processes.append(process)
        return process

    def start_keeper(self, meeting):
        spawner = Virtual()
        spawner.link = lambda index: socket.socketpair()
        it = Keeper(meeting.open(), Meeting.at(meeting.folder, meeting.name), spawner)
        self.keepers.append(it)
        self.spawners.append(spawner)
        self.ends.append(asyncio.ensure_future(self.end(it)))

    async def end(self, it):
        await it.ended
        await it.aclose()
        it._meeting.close()

    def kill_keeper(self):
        """As SIGKILL does: its engines, which it leaves behind, end too."""
        it = self.keepers[-1]
        self.ends[-1].cancel()
        asyncio.get_running_loop().remove_reader(it._listener.fileno())
        it._listener.close()
        for client in list(it._clients):
            client.channel.close()
        for engine in self.spawners[-1].engines.values():
            engine.kill()
        if it._leaving is not None:
            it._leaving.cancel()
        it._supervisor.abandon()
        for each in it._supervisor._engines:
            each.life.cancel()
        it._meeting.close()

    async def ended(self):
        await asyncio.gather(*self.ends, return_exceptions=True)

    @property
    def names(self):
        return os.listdir(self.folder)

    @property
    def engines(self):
        return [engine for spawner in self.spawners for engine in spawner.engines.values()]


class Process(Shared):
    def __init__(self, machine, name, plan, linger):
        super().__init__(name, plan, linger, folder=machine.folder)
        self.machine = machine

    def _start_keeper(self):
        self.machine.start_keeper(self._meeting)
        return self._meeting.join()


@pytest.fixture
async def machine(tmp_path):
    machine = Machine(tmp_path / "aneuron")
    yield machine
    for process in machine.processes:
        await process.aclose()
    async with asyncio.timeout(60):
        await machine.ended()
    assert machine.names == []
    assert all(engine.ended.done() for engine in machine.engines)


def marked(text, mark=None):
    return replace(source(text), fingerprint=mark or text)


async def until(process, condition):
    changed = asyncio.Event()
    stop = process.subscribe(changed.set)
    while not condition(process.engines):
        changed.clear()
        await changed.wait()
    stop()


def all_ready(engines):
    return all(engine.state == "ready" for engine in engines)


# Who starts them, who uses them.


async def test_processes_that_say_the_same_name_use_the_same_engines(machine):
    many = [machine.process() for _ in range(5)]
    await asyncio.gather(*[each.start() for each in many])
    assert len(machine.keepers) == 1
    assert machine.spawners[0].started == [0, 1]
    assert all([each.state for each in process.engines] == ["ready", "ready"] for process in many)
    facts = await asyncio.gather(*[each.load(0, marked("net"), {"split_size": 4}) for each in many])
    assert [[fact.of for fact in each.values()] for each in facts] == [[0, 1]] * 5
    assert [engine.server.models for engine in machine.engines] == [{0: ("net", 0)}] * 2
    link = await many[0].connect(1)
    assert link.fileno() >= 0
    link.close()
    (name,) = machine.names
    found = os.lstat(os.path.join(machine.folder, name))
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(os.stat(machine.folder).st_mode) == 0o700


async def test_another_name_is_other_engines(machine):
    await asyncio.gather(*[machine.process(name).start() for name in ("one", "other")])
    assert len(machine.keepers) == 2


async def test_the_engines_outlive_who_started_them_and_end_after_the_last(machine):
    first, second = machine.process(), machine.process()
    await first.start()
    await first.load(0, marked("net"), {})
    await second.start()
    await first.aclose()
    await second.load(0, marked("net"), {})
    assert machine.spawners[0].started == [0, 1]
    assert [engine.server.models for engine in machine.engines] == [{0: ("net", 0)}] * 2
    await second.aclose()
    await machine.ended()
    assert machine.names == []
    await second.start()
    assert len(machine.keepers) == 2


async def test_a_rolling_restart_of_the_processes_loads_nothing_again(machine):
    loads = []
    one, other = machine.process(linger=30.0), machine.process(linger=30.0)
    for process in (one, other):
        await process.start()
        await process.load(0, marked("net"), {})
    engine = machine.engines[0].server
    real, engine.load = engine.load, lambda *args: loads.append(args)
    for process in (one, other, one, other):
        await process.unload(0)
        await process.aclose()
        await process.start()
        await process.load(0, marked("net"), {})
    assert loads == []
    engine.load = real
    machine.keepers[0]._linger = 0.0


async def test_a_process_that_dies_leaves(machine):
    first = machine.process()
    await first.start()
    await first.load(0, marked("net"), {})
    first._channel._sock.shutdown(socket.SHUT_RDWR)  # as when it is killed
    first._closed = True
    await machine.ended()
    assert machine.names == []


# Arguments.


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"processes": 1}, ["processes=1 here and 2 there"]),
        ({"linger": 1.0}, ["linger=1.0 here and 0.05 there"]),
        ({"num_workers": 8}, ["num_workers=8 here and None there"]),
        ({"backend": CpuBackend(4, 1)}, ["backend=CpuBackend(cores=4, threads_per_core=1) here and CpuBackend("]),
        ({"cores": 2}, ["device_ids=[0, 1] here and [0, 1, 2, 3] there", "backend="]),
    ],
)
async def test_other_arguments_of_the_pool_are_named(machine, other, named):
    first = machine.process()
    await first.start()
    second = machine.process(**other)
    with pytest.raises(ValueError, match="the engines of this share= run with other arguments") as info:
        await second.start()
    assert all(each in str(info.value) for each in named)
    third = machine.process()
    await third.start()  # the others go on


@pytest.mark.parametrize(
    ("model", "given", "named"),
    [
        ("other", {"buckets": Buckets(dim=1, sizes=(4, 8))}, ["model=other here and net there"]),
        ("net", {"buckets": Buckets(dim=1, sizes=(4,))}, ["buckets=Buckets(", "(4,)", "(4, 8)"]),
        ("net", {}, ["buckets=not given here and Buckets("]),
        ("net", {"buckets": Buckets(dim=1, sizes=(4, 8)), "weight": 2.0}, ["weight=2.0 here and not given there"]),
    ],
)
async def test_other_arguments_of_a_model_are_named(machine, model, given, named):
    first, second = machine.process(), machine.process()
    await first.start()
    await second.start()
    await first.load(0, marked("net"), {"buckets": Buckets(dim=1, sizes=(4, 8))})
    with pytest.raises(ValueError, match="the model runs with other arguments") as info:
        await second.load(0, marked(model), given)
    assert all(each in str(info.value) for each in named)
    await second.load(0, marked("net"), {"buckets": Buckets(dim=1, sizes=(4, 8))})


async def test_what_nobody_uses_any_more_may_be_replaced(machine):
    first, second = machine.process(linger=30.0), machine.process(linger=30.0)
    await first.start()
    await second.start()
    await first.load(0, marked("net"), {})
    await first.unload(0)
    await second.load(0, marked("other"), {"split_size": 2})
    assert [engine.server.models for engine in machine.engines] == [{0: ("other", 0)}] * 2
    await first.aclose()
    await second.aclose()
    third = machine.process(cores=6)
    await third.start()  # and so are the engines
    assert [each.cores for each in third.engines] == [(0, 1, 2), (3, 4, 5)]
    assert len(machine.keepers) == 1


# Starts and loads that do not succeed.


async def test_a_load_that_fails_fails_for_all_that_wait(machine):
    processes = [machine.process() for _ in range(3)]
    await asyncio.gather(*[each.start() for each in processes])
    spawner = machine.spawners[0]
    spawner.model_fails["load", 1] = ValueError("cannot be run")
    loads = [each.load(0, marked("net"), {}) for each in processes]
    errors = await asyncio.gather(*loads, return_exceptions=True)
    assert [type(error) for error in errors] == [ValueError] * 3
    spawner.model_fails.clear()
    await asyncio.gather(*[each.load(0, marked("net"), {}) for each in processes])


async def test_who_gives_up_a_load_leaves_it_to_the_others(machine):
    first, second = machine.process(), machine.process()
    await first.start()
    await second.start()
    spawner = machine.spawners[0]
    begun, go = asyncio.Event(), asyncio.Event()

    async def asked(what):
        begun.set()
        await go.wait()

    for engine in spawner.engines.values():
        engine.server.asked = asked
    loads = [asyncio.ensure_future(each.load(0, marked("net"), {})) for each in (first, second)]
    await begun.wait()
    while machine.keepers[0]._models[0].waiters < 2:
        await asyncio.sleep(0)
    loads[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await loads[0]
    go.set()
    assert list(await loads[1]) == [0, 1]


async def test_a_load_that_everybody_gives_up_is_undone(machine):
    first = machine.process()
    await first.start()
    machine.spawners[0].slow = 3600.0
    load = asyncio.ensure_future(first.load(0, marked("net"), {}))
    while 0 not in machine.keepers[0]._models:
        await asyncio.sleep(0)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    while 0 in machine.keepers[0]._models:
        await asyncio.sleep(0)
    machine.spawners[0].slow = 0.0
    await first.load(0, marked("net"), {})


async def test_engines_that_do_not_start_fail_the_start_and_the_next_one_tries_again(machine, monkeypatch):
    real = Machine.start_keeper

    def failing(self, meeting):
        real(self, meeting)
        self.spawners[-1].fail = {1: 1}

    monkeypatch.setattr(Machine, "start_keeper", failing)
    first = machine.process()
    with pytest.raises(OSError, match="no more processes"):
        await first.start()
    await first.start()
    assert all_ready(first.engines)


# At run time.


async def test_a_swap_is_for_all(machine):
    first, second = machine.process(), machine.process()
    for process in (first, second):
        await process.start()
        await process.load(0, marked("net"), {})
    await first.swap(0, marked("new"))
    await second.swap(0, marked("new"))  # is there already
    assert [engine.server.models for engine in machine.engines] == [{0: ("new", 1)}] * 2
    third = machine.process()
    await third.start()
    await third.load(0, marked("net"), {})  # a worker that is restarted
    assert [engine.server.models for engine in machine.engines] == [{0: ("new", 1)}] * 2
    await second.change(0, split_size=2)
    await second.change(0, split_size=3)
    assert [engine.server.settings[0] for engine in machine.engines] == [{"split_size": 3}] * 2


async def test_all_hear_of_an_engine_that_dies(machine):
    first, second = machine.process(), machine.process()
    await first.start()
    await second.start()
    machine.engines[1].kill()
    await asyncio.gather(*[until(each, lambda engines: engines[1].state == "restarting") for each in (first, second)])
    with pytest.raises(CoreFailed, match="engine 1 is restarting"):
        await first.connect(1)
    await asyncio.gather(*[until(each, all_ready) for each in (first, second)])
    assert first.engines[1].incarnation == 2


async def test_a_keeper_that_dies_is_replaced_with_all_models(machine):
    first, second = machine.process(), machine.process()
    for process in (first, second):
        await process.start()
        await process.load(0, marked("net"), {"split_size": 4})
    await first.load(1, marked("other"), {})
    await first.swap(0, marked("new"))
    await first.change(0, split_size=2)
    await second.change(0, split_size=3)
    machine.kill_keeper()
    assert len(machine.names) == 1
    await asyncio.gather(*[until(each, lambda engines: not all_ready(engines)) for each in (first, second)])
    with pytest.raises(CoreFailed, match="the keeper of the engines has died; another is started"):
        await first.connect(0)
    await first.load(2, marked("third"), {})  # waits for the next one
    await second.load(2, marked("third"), {})
    assert len(machine.keepers) == 2
    await asyncio.gather(*[until(each, all_ready) for each in (first, second)])
    assert all(each.incarnation == 2 for process in (first, second) for each in process.engines)
    models = [{key: text for key, (text, _) in engine.server.models.items()} for engine in machine.engines[2:]]
    assert models == [{0: "new", 1: "other", 2: "third"}] * 2


async def test_a_closed_one_says_so(machine):
    first = machine.process()
    await first.start()
    await first.aclose()
    await first.aclose()
    with pytest.raises(Closed):
        await first.load(0, marked("net"), {})
    await first.unload(0)


# The directory.


def place(tmp_path):
    return str(tmp_path / "aneuron")


def test_a_directory_that_others_can_enter_is_refused(tmp_path):
    os.mkdir(place(tmp_path), 0o755)
    with pytest.raises(PermissionError, match=r"aneuron must be a directory that only user .* its mode is 0755: chmod"):
        Meeting("name", place(tmp_path))


@pytest.mark.parametrize("what", ["link", "file"])
def test_what_is_no_directory_is_refused(tmp_path, what):
    if what == "link":
        os.mkdir(tmp_path / "other", 0o700)
        os.symlink(tmp_path / "other", place(tmp_path))
    else:
        (tmp_path / "aneuron").write_text("")
    with pytest.raises(PermissionError, match="it is a link, or no directory: remove it"):
        Meeting("name", place(tmp_path))


def test_a_directory_of_another_user_is_refused(tmp_path, monkeypatch):
    os.mkdir(place(tmp_path), 0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(PermissionError, match=r"it belongs to user .*: say another place by XDG_RUNTIME_DIR or TMPDIR"):
        Meeting("name", place(tmp_path))


def test_a_peer_of_another_user_is_refused(tmp_path, monkeypatch):
    one, other = socket.socketpair()
    with one, other:
        keeper.check_peer(one)
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        with pytest.raises(PermissionError, match="and this one is of user 4711"):
            keeper.check_peer(one)


async def test_a_socket_that_is_left_is_removed(tmp_path):
    meeting = Meeting("name", place(tmp_path))
    async with meeting.locked():
        meeting.open().close()  # as when its process is killed
    assert os.listdir(meeting.folder) == [meeting.name]
    async with meeting.locked():
        assert meeting.join() is None
    assert os.listdir(meeting.folder) == []
    async with meeting.locked():
        listener = meeting.open()
    tidying = asyncio.ensure_future(asyncio.to_thread(tidy, meeting.folder, meeting.name))
    listener.setblocking(False)
    came, _ = await asyncio.get_running_loop().sock_accept(listener)
    came.send(b"!")
    await tidying
    assert os.listdir(meeting.folder) == [meeting.name]  # somebody is there
    tidying = asyncio.ensure_future(asyncio.to_thread(tidy, meeting.folder, meeting.name))
    dying, _ = await asyncio.get_running_loop().sock_accept(listener)
    listener.close()  # after it was asked
    dying.close()
    await tidying
    assert os.listdir(meeting.folder) == []
    came.close()
    tidy(str(tmp_path / "nothing"), meeting.name)
    meeting.close()


async def test_the_lock_is_one_at_a_time(tmp_path):
    one, other = Meeting("name", place(tmp_path)), Meeting("other name", place(tmp_path))
    inside = []

    async def enter(meeting):
        async with meeting.locked():
            inside.append(meeting)

    async with one.locked():
        waiting = asyncio.ensure_future(enter(other))
        await asyncio.sleep(0)
        assert inside == []
    await waiting
    assert inside == [other]
    one.close()
    other.close()


def test_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with contextlib.closing(Meeting("name")) as meeting:
        assert meeting.folder == place(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "nothing"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with contextlib.closing(Meeting("name")) as meeting:
        assert meeting.folder == str(tmp_path / f"aneuron-{os.geteuid()}")
    os.rmdir(meeting.folder)


# Versions.


async def test_a_process_of_another_version_is_told(machine, monkeypatch):
    first, second = machine.process(), machine.process()
    await first.start()
    real, old = control.versions, [{"aneuron": "9.9", "torch": "2.0", "python": "3.11.0"}]  # of the first that asks
    monkeypatch.setattr(control, "versions", lambda: old.pop() if old else real())
    with pytest.raises(VersionsDiffer, match=r"must run the same versions: aneuron 9\.9 here and .* there"):
        async with asyncio.timeout(60):
            await second.start()
    monkeypatch.undo()
    assert (await first.load(0, marked("net"), {}))[0].of == 0
