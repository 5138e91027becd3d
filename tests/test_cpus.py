"""CPUs that a process may use, by what the files of its cgroups say."""

import os
import subprocess
import sys

import pytest
import torch

from aneuron import CpuBackend
from aneuron.backends import cpus
from aneuron.backends.cpus import Cpus, quota, within

V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V2_HOST_PATH = "31 23 0:28 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw"
V2_SPACE = r"31 23 0:28 / /sys/fs/my\040cgroup rw - cgroup2 cgroup2 rw"
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
HYBRID = f"{V1}\n{V1_MEMORY}\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"


def _files(cgroup, mountinfo, files):
    known = {"/proc/self/cgroup": cgroup, "/proc/self/mountinfo": mountinfo}
    known |= {f"/sys/fs/{path}": text for path, text in files.items()}
    return known.get


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "files", "expected"),
    [
        ("0::/\n", V2, {}, None),  # the root has no cpu.max
        ("0::/\n", V2, {"cgroup/cpu.max": "max 100000\n"}, None),
        ("0::/\n", V2, {"cgroup/cpu.max": "50000 100000\n"}, (0.5, "cgroup/cpu.max")),
        ("0::/\n", V2, {"cgroup/cpu.max": "150000 50000"}, (3.0, "cgroup/cpu.max")),
        ("0::/\n", V2, {"cgroup/cpu.max": "150000"}, (1.5, "cgroup/cpu.max")),  # the period may be left out
        ("0::/\n", V2_SPACE, {"my cgroup/cpu.max": "150000"}, (1.5, "my cgroup/cpu.max")),
        ("0::/a/b\n", V2, {"cgroup/a/b/cpu.max": "400000 100000"}, (4.0, "cgroup/a/b/cpu.max")),
        (  # the least of those around it
            "0::/a/b\n",
            V2,
            {"cgroup/a/b/cpu.max": "400000 100000", "cgroup/a/cpu.max": "150000 100000"},
            (1.5, "cgroup/a/cpu.max"),
        ),
        (  # a mount of a part, and the path as the host has it
            "0::/docker/abc/x\n",
            V2_HOST_PATH,
            {"cgroup/x/cpu.max": "max 100000", "cgroup/cpu.max": "200000 100000"},
            (2.0, "cgroup/cpu.max"),
        ),
        ("0::/docker/abcd\n", V2_HOST_PATH, {"cgroup/cpu.max": "200000 100000"}, (2.0, "cgroup/cpu.max")),
        ("0::/../other\n", V2_HOST_PATH, {"cgroup/cpu.max": "200000 100000"}, (2.0, "cgroup/cpu.max")),
        (
            "4:cpu,cpuacct:/pod\n3:memory:/\n",
            V1,
            {
                "cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "250000\n",
                "cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000\n",
            },
            (2.5, "cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us"),
        ),
        (
            "4:cpu,cpuacct:/pod\n",
            V1,
            {
                "cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "-1",
                "cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000",
                "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000",
                "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            (0.5, "cgroup/cpu,cpuacct/cpu.cfs_quota_us"),
        ),
        (
            "4:cpu,cpuacct:/\n3:memory:/\n0::/\n",
            HYBRID,
            {"cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000", "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000"},
            (1.0, "cgroup/cpu,cpuacct/cpu.cfs_quota_us"),
        ),
        ("3:memory:/\n2:cpuset:/\n", V1_MEMORY, {"cgroup/memory/cpu.max": "1 1"}, None),
        (None, None, {}, None),  # no Linux
        ("", "", {}, None),
        ("nonsense\n", "nonsense\n - cgroup2\n", {}, None),
        ("0::/\n", V2, {"cgroup/cpu.max": "many 100000"}, None),
        ("0::/\n", V2, {"cgroup/cpu.max": "100000 0"}, None),
    ],
)
def test_quota(cgroup, mountinfo, files, expected):
    found = quota(_files(cgroup, mountinfo, files))
    assert found == (None if expected is None else (expected[0], f"/sys/fs/{expected[1]}"))


@pytest.mark.parametrize(
    ("seen", "limit", "number", "limited"),
    [
        (8, None, 8, False),
        (8, 0.5, 1, True),
        (8, 1.5, 2, True),
        (8, 7.2, 8, True),
        (8, 8.0, 8, False),
        (2, 9.0, 2, False),
    ],
)
def test_a_quota_counts_as_whole_cpus(seen, limit, number, limited):
    answer = within(seen, None if limit is None else (limit, "/x/cpu.max"))
    assert (answer.number, answer.limited) == (number, limited)
    assert (f"/x/cpu.max allows {limit or 0:g} of them: {number}" in answer.why) is limited


def test_half_a_cpu_is_one_core_with_one_thread_and_info_says_why(monkeypatch):
    monkeypatch.setattr(cpus, "available", lambda: within(64, (0.5, "/x/cpu.max")))
    backend = CpuBackend()
    assert backend.report() == {
        "found": True,
        "cores": 1,
        "why": "this process may use 64 CPUs, and /x/cpu.max allows 0.5 of them: 1",
        "lacks": [],
    }
    assert backend.load(torch.neg, 0, None)._threads == 1


def test_threads_are_divided_among_the_cores_of_a_quota(monkeypatch):
    monkeypatch.setattr(cpus, "available", lambda: Cpus(4, "", True))
    monkeypatch.setattr("aneuron.backends.cpu._in_a_new_thread", lambda fn: 64)
    assert CpuBackend(cores=2).load(torch.neg, 0, None)._threads == 2
    monkeypatch.setattr(cpus, "available", lambda: Cpus(4, "", False))
    assert CpuBackend(cores=2).load(torch.neg, 0, None)._threads == 32


@pytest.mark.skipif(sys.version_info < (3, 13), reason="PYTHON_CPU_COUNT is new in Python 3.13")
def test_python_cpu_count_is_heard():
    program = "import aneuron; print(len(aneuron.CpuBackend().cores()))"
    environ = {**os.environ, "PYTHON_CPU_COUNT": "1"}
    assert (
        subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, check=True).stdout == b"1\n"
    )
