"""Which of a pool's cores belong to which engine, and the environment in which each finds its own.

Lives here: pure arithmetic on numbers of cores and on variables. Must not be here: processes, sockets, a look at the
machine.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from aneuron.backends.neuron.cores import NUMBER, VISIBLE
from aneuron.errors import DeviceError

COMM = "NEURON_RT_ROOT_COMM_ID"
CUDA = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Share:
    """What one engine has of a pool's cores."""

    ids: tuple[int, ...]
    """The numbers by which callers know them: those of the pool."""
    local: tuple[int, ...]
    """The same as the engine counts them: its `device_ids`."""
    environ: Mapping[str, str | None] = field(default_factory=dict)
    """Variables that are different in the engine; None: one that is not there."""


def divide(
    ids: Sequence[int],
    processes: int,
    environ: Mapping[str, str],
    *,
    backend: str = "",
    cores_per_device: int | None = None,
    global_id: Callable[[int], int | None] = int,
) -> tuple[Share, ...]:
    """Divide cores among engines, as evenly as they go, those with neighbouring numbers together.

    ids: the pool's cores, as this process counts them, which has `environ`. backend: "neuron" for NeuronCores, of which
        an engine sees its own only, as a range. cores_per_device: of CUDA devices, of which an engine sees those that
        its cores are on; a device is not divided while there are enough of them. global_id: the machine's number of a
        NeuronCore; None where nobody can tell.

    Raises `DeviceError` if there are fewer cores than engines.

        >>> [share.ids for share in divide(range(5), 2, {})]
        [(0, 1, 2), (3, 4)]
        >>> divide([0, 1], 2, {}, backend="neuron", global_id=lambda core: core + 4)[1]
        Share(ids=(1,), local=(0,), environ={'NEURON_RT_VISIBLE_CORES': '5', 'NEURON_RT_NUM_CORES': None})
    """
    if processes > len(ids):
        raise DeviceError(
            f"processes={processes}, and the pool has {len(ids)} core{'s' * (len(ids) != 1)}: {list(ids)}; each engine "
            f"needs one at least, so say processes={len(ids)} or fewer"
        )
    parts = _parts(sorted(ids), processes, cores_per_device or 1)
    if backend == "neuron":
        return tuple(_of_neuron(part, index, environ, global_id) for index, part in enumerate(parts))
    if cores_per_device is not None:
        return tuple(_of_cuda(part, environ, cores_per_device) for part in parts)
    return tuple(Share(part, part) for part in parts)


def _parts(ids: Sequence[int], processes: int, together: int) -> list[tuple[int, ...]]:
    """Cores in so many parts; `together`: of so many consecutive numbers, if there are enough of such groups."""
    groups: dict[int, list[int]] = {}
    for each in ids:
        groups.setdefault(each // together, []).append(each)
    units = list(groups.values()) if len(groups) >= processes else [[each] for each in ids]
    least, more = divmod(len(units), processes)
    parts, start = [], 0
    for index in range(processes):
        stop = start + least + (index < more)
        parts.append(tuple(each for unit in units[start:stop] for each in unit))
        start = stop
    return parts


def _of_neuron(
    part: tuple[int, ...], index: int, environ: Mapping[str, str], global_id: Callable[[int], int | None]
) -> Share:
    """The runtime takes a range: cores within it that nobody asked for are taken along, as they are in one process."""
    first, last = part[0], part[-1]
    begin, end = global_id(first), global_id(last)
    here: dict[str, str | None]
    if begin is None or end is None:  # whichever the runtime finds free
        here = {NUMBER: str(last - first + 1)}
    else:
        here = {VISIBLE: str(begin) if begin == end else f"{begin}-{end}", NUMBER: None}
    if environ.get(COMM):
        here[COMM] = _next_port(environ[COMM], index)
    return Share(part, tuple(each - first for each in part), here)


def _next_port(address: str, index: int) -> str:
    """An address of its own for each engine, from the one that is the program's: the ports that follow."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise DeviceError(f"{COMM}={address!r}: expected host:port, of which the engines use the ports from there on")
    return f"{host}:{int(port) + index}"


def _of_cuda(part: tuple[int, ...], environ: Mapping[str, str], each: int) -> Share:
    devices = sorted({core // each for core in part})
    said = environ.get(CUDA)
    names = [name.strip() for name in said.split(",")] if said is not None else None
    visible = [names[device] if names is not None else str(device) for device in devices]
    local = tuple(devices.index(core // each) * each + core % each for core in part)
    return Share(part, local, {CUDA: ",".join(visible)})
