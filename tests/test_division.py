"""Which cores belong to which engine, and in which environment it finds them. Pure."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aneuron.backends.neuron import cores
from aneuron.errors import DeviceError
from aneuron.remote.division import divide


def visible(shares):
    return [share.environ["NEURON_RT_VISIBLE_CORES"] for share in shares]


@given(st.sets(st.integers(0, 40), min_size=1), st.data())
def test_every_core_is_in_one_engine_and_the_engines_are_about_equal(ids, data):
    processes = data.draw(st.integers(1, len(ids)))
    each = data.draw(st.sampled_from([None, 1, 2, 3]))
    backend = data.draw(st.sampled_from(["cpu", "neuron"])) if each is None else "cuda"
    shares = divide(
        sorted(ids), processes, {}, backend=backend, cores_per_device=each, global_id=lambda core: core + 100
    )
    assert [core for share in shares for core in share.ids] == sorted(ids)
    assert len(shares) == processes
    assert all(share.local and len(share.local) == len(share.ids) for share in shares)
    sizes = [len(share.ids) for share in shares]
    assert max(sizes) - min(sizes) <= 1 or each in (2, 3)  # devices, of which some cores may be named only
    if backend == "neuron":
        ranges = [tuple(int(number) for number in text.split("-")) for text in visible(shares)]
        for share, numbers in zip(shares, ranges, strict=True):
            assert tuple(numbers[0] + core for core in share.local) == tuple(100 + core for core in share.ids)
        assert all(one[-1] < other[0] for one, other in itertools.pairwise(ranges))


def test_an_inf2_48xlarge_in_four_engines():
    shares = divide(range(24), 4, {}, backend="neuron")
    assert visible(shares) == ["0-5", "6-11", "12-17", "18-23"]
    assert [share.local for share in shares] == [tuple(range(6))] * 4
    assert shares[3].ids == tuple(range(18, 24))
    assert all(share.environ["NEURON_RT_NUM_CORES"] is None for share in shares)


def test_the_parent_s_own_cores_are_divided():
    environ = {"NEURON_RT_VISIBLE_CORES": "8-11"}
    shares = divide(range(4), 2, environ, backend="neuron", global_id=lambda core: cores.global_id(core, environ))
    assert visible(shares) == ["8-9", "10-11"]
    assert visible(divide(range(3), 3, {}, backend="neuron")) == ["0", "1", "2"]


def test_where_nobody_knows_their_numbers_the_runtime_chooses_them():
    """NEURON_RT_NUM_CORES, or a container with some of the machine's chips."""
    shares = divide(range(5), 2, {}, backend="neuron", global_id=lambda core: None)
    assert [share.environ for share in shares] == [{"NEURON_RT_NUM_CORES": "3"}, {"NEURON_RT_NUM_CORES": "2"}]


def test_cores_that_were_named_are_found_in_each_engine_s_range():
    shares = divide([6, 0, 2, 7], 2, {}, backend="neuron")
    assert [(share.ids, share.local) for share in shares] == [((0, 2), (0, 2)), ((6, 7), (0, 1))]
    assert visible(shares) == ["0-2", "6-7"]


def test_each_engine_has_a_port_of_its_own():
    environ = {"NEURON_RT_ROOT_COMM_ID": "10.0.0.1:62182"}
    shares = divide(range(2), 2, environ, backend="neuron")
    assert [share.environ["NEURON_RT_ROOT_COMM_ID"] for share in shares] == ["10.0.0.1:62182", "10.0.0.1:62183"]
    assert "NEURON_RT_ROOT_COMM_ID" not in divide(range(2), 2, {}, backend="neuron")[0].environ
    with pytest.raises(DeviceError, match=r"NEURON_RT_ROOT_COMM_ID='here': expected host:port"):
        divide(range(2), 2, {"NEURON_RT_ROOT_COMM_ID": "here"}, backend="neuron")


@pytest.mark.parametrize(
    ("ids", "processes", "each", "said", "expected"),
    [
        (range(4), 2, 1, None, [("0,1", (0, 1)), ("2,3", (0, 1))]),
        (range(4), 2, 2, None, [("0", (0, 1)), ("1", (0, 1))]),  # devices stay whole
        (range(2), 2, 2, None, [("0", (0,)), ("0", (1,))]),  # unless there are too few
        (range(3), 3, 1, "5,GPU-8932f937,1", [("5", (0,)), ("GPU-8932f937", (0,)), ("1", (0,))]),
        ([1, 3], 2, 1, "4, 5, 6, 7", [("5", (0,)), ("7", (0,))]),
        ([2, 5], 1, 2, None, [("1,2", (0, 3))]),
    ],
)
def test_cuda_devices(ids, processes, each, said, expected):
    environ = {} if said is None else {"CUDA_VISIBLE_DEVICES": said}
    shares = divide(ids, processes, environ, backend="cuda", cores_per_device=each)
    assert [(share.environ["CUDA_VISIBLE_DEVICES"], share.local) for share in shares] == expected


def test_other_backends_have_the_same_ids_and_nothing_in_the_environment():
    shares = divide([4, 2, 0], 2, {"NEURON_RT_VISIBLE_CORES": "0"})
    assert [(share.ids, share.local, share.environ) for share in shares] == [
        ((0, 2), (0, 2), {}),
        ((4,), (4,), {}),
    ]


def test_more_engines_than_cores():
    with pytest.raises(DeviceError, match=r"processes=3, and the pool has 2 cores: \[0, 1\]; .* processes=2 or fewer"):
        divide(range(2), 3, {})
