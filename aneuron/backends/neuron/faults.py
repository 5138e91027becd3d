"""What an error of the Neuron software says: its status or text, whom that is to be blamed on, what to do about it.

Lives here: the tables, and the search in an exception; pure. Must not be here: retries, the state of a core, anything
of torch but the type of its errors.

The codes are those of the runtime's `nrt_status.h`, TorchNeuron's words for them those of its `ErrorHandler`, their
causes those of the runtime's troubleshooting guide,
https://awsdocs-neuron.readthedocs-hosted.com/en/latest/neuron-runtime/nrt-troubleshoot.html.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch

from aneuron.backends import Fault


class Kind(Enum):
    """What follows from an error."""

    INPUT = "input"
    """The rows or the model are to blame, on whichever core; this one goes on."""
    SUSPECT = "suspect"
    """Nobody knows yet: the call gets the error. The core is to blame if the next run fails so, too."""
    RETRY = "retry"
    """The core's queue is full: try again in a moment. Suspect if it stays so."""
    CORE = "core"
    """The core is lost, or cannot be had, until the process is restarted."""
    FATAL = "fatal"
    """The runtime serves no core of this process."""


@dataclass(frozen=True, slots=True)
class Cause:
    """What an error comes from, and what to do."""

    kind: Kind
    name: str
    advice: str = ""


_REPLACE = "stop this instance and replace it"
_RESTART = "restart the process: a core cannot be reset in one that lives"
_MEMORY = (
    "the memory of the device, or the host's, does not hold it: use fewer or smaller compiled shapes, or put fewer "
    "models on the core"
)
_BATCH = "batch_size= must be what the model was compiled for"

# Placement and configuration (9, 10, 1005, 1204) are no class of their own: a core that cannot be had is like a lost
# one, a file of the wrong version is the model's, whichever core it meets, and the rest is suspect.
STATUS = {
    1: Cause(Kind.SUSPECT, "FAILURE"),
    2: Cause(
        Kind.INPUT,
        "INVALID",
        f"inputs or a model that do not fit: {_BATCH}, and NEURON_LOGICAL_NC_CONFIG the --lnc it was compiled with",
    ),
    3: Cause(Kind.INPUT, "INVALID_HANDLE"),
    4: Cause(Kind.SUSPECT, "RESOURCE", _MEMORY),
    5: Cause(
        Kind.CORE,
        "TIMEOUT",
        f"the run took longer than NEURON_RT_EXEC_TIMEOUT (seconds; set it well above the longest run); {_RESTART}",
    ),
    6: Cause(Kind.CORE, "HW_ERROR", _RESTART),
    7: Cause(Kind.RETRY, "QUEUE_FULL", "lower num_workers"),
    9: Cause(
        Kind.CORE,
        "LOAD_NOT_ENOUGH_NC",
        "the model needs more cores than it was given: aneuron puts each copy on one, so compile it for one "
        "(no NeuronCore Pipeline, no tensor parallelism)",
    ),
    10: Cause(
        Kind.INPUT,
        "UNSUPPORTED_NEFF_VERSION",
        "the model was compiled with another SDK, or for another family of instances: compile it again here",
    ),
    11: Cause(Kind.SUSPECT, "FAIL_HOST_MEM_ALLOC", _MEMORY),
    13: Cause(Kind.FATAL, "UNINITIALIZED", "the runtime has not started in this process; restart it"),
    14: Cause(Kind.FATAL, "CLOSED", "the runtime has been closed in this process; restart it"),
    15: Cause(Kind.SUSPECT, "QUEUE_EMPTY"),
    101: Cause(Kind.CORE, "EXEC_UNIT_UNRECOVERABLE", _RESTART),
    1002: Cause(Kind.INPUT, "EXEC_BAD_INPUT", f"shapes and dtypes must be those of the trace; {_BATCH}"),
    1003: Cause(Kind.INPUT, "EXEC_COMPLETED_WITH_NUM_ERR", "the run made a NaN: look at the input, then at the casts"),
    1004: Cause(
        Kind.CORE, "EXEC_COMPLETED_WITH_ERR", f"logical or parity error; {_RESTART}; if it returns, {_REPLACE}"
    ),
    1005: Cause(Kind.CORE, "EXEC_NC_BUSY", "another model or process has locked the core"),
    1006: Cause(
        Kind.INPUT,
        "EXEC_OOB",
        "an index out of bounds, usually in the inputs (token ids); NEURON_RT_DBG_DUMP_INPUTS_ON_ERR=1006 keeps them",
    ),
    1100: Cause(Kind.SUSPECT, "COLL_PENDING", "look at the other workers of the collective operation"),
    1200: Cause(Kind.CORE, "HW_ERR_COLLECTIVES", "look at the other workers of the collective operation, and restart"),
    1201: Cause(Kind.CORE, "HW_ERR_HBM_UE", f"device memory beyond repair: {_REPLACE}"),
    1202: Cause(Kind.CORE, "HW_ERR_NC_UE", f"a parity error on the chip: {_REPLACE}"),
    1203: Cause(Kind.CORE, "HW_ERR_DMA_ABORT", _REPLACE),
    1204: Cause(Kind.SUSPECT, "SW_NQ_OVERFLOW", "start the process with NEURON_RT_ENABLE_DGE_NOTIFICATIONS=0"),
    1205: Cause(
        Kind.CORE, "HW_ERR_REPAIRABLE_HBM_UE", "device memory to be repaired: reload the driver, or reboot the instance"
    ),
    1206: Cause(Kind.SUSPECT, "NETWORK_PROXY_FAILURE", "the network (EFA) failed, not the core"),
}

_FORKED = Cause(
    Kind.FATAL,
    "forked",
    "the Neuron runtime does not survive a fork: start processes with the spawn method, or fork before the first model "
    "is loaded (gunicorn without --preload)",
)
_NOT_STARTED = (
    "either another process has the cores (each takes all unless NEURON_RT_NUM_CORES or NEURON_RT_VISIBLE_CORES says "
    "otherwise), or the driver is missing (ls /dev/neuron*), or the variables name cores that are not there"
)

# Texts that say more than their status, or have none.
TEXTS = [
    (re.compile(pattern, re.IGNORECASE), cause)
    for pattern, cause in (
        (r"NRT_STATE_CHILD|in forked subprocess", _FORKED),
        (
            r"Neuron Runtime could not be initialized|NeuronCore\(s\) not available",
            Cause(Kind.FATAL, "not initialized", _NOT_STARTED),
        ),
        (
            r"Could not open the nd\d",
            Cause(Kind.FATAL, "no device", "more devices are asked for than exist, or than the container is given"),
        ),
        (
            r"must be allocated on same vnc as model",
            Cause(Kind.CORE, "placement", "the model's weights lie on another core than the model; load it again"),
        ),
        (
            r"Unknown type name '__torch__\.torch\.classes\.neuron|Unknown builtin op: neuron::",
            Cause(Kind.INPUT, "no package", "install the torch_neuronx that it was traced with (up to 2.9)"),
        ),
        (
            r"Mismatch detected between Runtime configuration and NEFF",
            Cause(
                Kind.INPUT,
                "logical core mismatch",
                "NEURON_LOGICAL_NC_CONFIG (1 or 2; 2 where it is not set) must be the --lnc that the model was "
                "compiled with, and be set before the process starts",
            ),
        ),
        (r"Inconsistent batch sizes found on inputs", Cause(Kind.INPUT, "unequal rows", "all inputs need equal rows")),
        (r"\bDGE notification", STATUS[1204]),
    )
]

# What TorchNeuron's errors have in place of a status.
_NATIVE = re.compile(r"\b(NRT Execution|Compilation) error occurred on Neuron for operation=")
_WORDS = {
    "Non-specific failure": 1,
    "Invalid NEFF, instruction, or input": 2,
    "Invalid handle": 3,
    "Failed to allocate resource": 4,
    "Operation timed out": 5,
    "Hardware failure": 6,
    "input queue full": 7,
    "Not enough NCs": 9,
    "Unsupported NEFF version": 10,
    "Failed to allocate host memory": 11,
    "NRT not initialized": 13,
    "NRT already closed": 14,
    "Accessed an empty Queue": 15,
    "Invalid input to exec()": 1002,
    "completed with numerical errors": 1003,
    "Execution completed with errors": 1004,
    "Neuron core busy": 1005,
    "updates are out of bound": 1006,
    "Collective operation pending": 1100,
    "Stuck in collectives": 1200,
    "unrepairable uncorrectable error": 1201,
    "encountered a parity error": 1202,
    "DMA engine encountered": 1203,
    "notification queue overflow": 1204,
    "HBM repairable uncorrectable error": 1205,
    "EFA network proxy failure": 1206,
}
_COMPILATION = Cause(Kind.INPUT, "compilation", "the Neuron compiler refuses the model, or an operation of it")

_STATUS = re.compile(r"\bstatus=(\d+)|\bUnknown status \(status: (\d+)\)|\bNRT_[A-Z_]+\((\d+)\)|\bNRT_([A-Z_]+)\b")
_RAISED = (RuntimeError, torch.jit.Error)  # the latter is none of the former
_BY_NAME = {cause.name.removeprefix("EXEC_"): code for code, cause in STATUS.items()}


class Repeated(RuntimeError):
    """A core failed twice, with no success in between, in a way that does not tell whose fault it is: its own, then."""


def cause(error: BaseException) -> Cause | None:
    """What an error comes from; None where nothing in it is the Neuron software's.

    The text is searched, not matched from its start: TorchScript puts a traceback before it, DataParallel a prefix.
    Only in the types that this software raises: an error of the user's own may quote an input, and an input is no
    reason to lose a core.

        >>> cause(RuntimeError("Failed to execute the model status=1003 message=Numerical Error")).kind
        <Kind.INPUT: 'input'>
        >>> cause(ValueError("cannot read 'status=5'"))
    """
    for text in (_text(each) for each in _chain(error) if isinstance(each, _RAISED)):
        for pattern, named in TEXTS:
            if pattern.search(text):
                return named
        native = _NATIVE.search(text)
        if native and native[1] == "Compilation":
            return _COMPILATION
        code = status(text)
        if code is not None:
            lost = Kind.CORE if 1200 <= code <= 1299 else Kind.SUSPECT
            return STATUS.get(code) or Cause(lost, f"status {code}")
        if native:
            return Cause(Kind.SUSPECT, "unknown")
    return None


def status(text: str) -> int | None:
    """The last status code in a text: the last line is the runtime's own. TorchNeuron's texts have it in words."""
    code = None
    if _NATIVE.search(text):
        code = next((code for words, code in _WORDS.items() if words in text), None)
    for match in _STATUS.finditer(text):
        number = match[1] or match[2] or match[3]
        found = int(number) if number else _BY_NAME.get(match[4].removeprefix("EXEC_"))
        code = found or code  # 0 is success
    return code


def classify(error: BaseException) -> Fault:
    """Whom to blame; what nothing is known about is the model's own exception, about its input.

    >>> classify(RuntimeError("Failed to execute the model status=5 message=Timeout Exceeded"))
    <Fault.CORE: 'core'>
    """
    if isinstance(error, Repeated):
        return Fault.CORE
    found = cause(error)
    if found is None:
        return Fault.INPUT
    return {Kind.CORE: Fault.CORE, Kind.FATAL: Fault.FATAL}.get(found.kind, Fault.INPUT)


def last_line(error: BaseException) -> str:
    """What the device said: TorchScript puts its own traceback before it, TorchNeuron Python's after it."""
    text = _text(error)
    if said := _NATIVE.search(text) and re.search(r'error message="(.+?)"?$', text, re.MULTILINE):
        return said[1]
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and what caused it."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return type(error).__name__
