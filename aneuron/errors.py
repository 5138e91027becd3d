"""Every exception that aneuron raises of its own accord.

Lives here: the tree below. Must not be here: an import, a status code of any web framework.

    AneuronError
    ├── ShapeError    (ValueError)    the inputs do not fit: mend the call
    ├── InputModified (RuntimeError)  an input was written to while its call waited: mend the caller
    ├── DeviceError   (ValueError)    the cores asked for cannot be had: mend the configuration
    ├── OutputError   (RuntimeError)  the model's output cannot be handed out: mend the model
    ├── QueueFull                     no room, or given to another: come back after `retry_after` seconds
    ├── DeadlineExceeded (TimeoutError)  too late: ask with more time, or less often
    ├── Closed        (RuntimeError)  the model is closed or closing: go elsewhere
    └── CoreFailed    (RuntimeError)  the core failed, not the input: try again
        └── NoHealthyCores            and there is no other: come back after `retry_after` seconds, if it says so

A model's own exception is none of these: it reaches the caller as the model raised it.
"""


class AneuronError(Exception):
    """The root of all errors that aneuron raises itself."""


class ShapeError(AneuronError, ValueError):
    """The inputs of a call do not fit: empty, of unequal rows, or not what the model was compiled for.

    Raised before any device work; no batch that others share has seen the call.
    """


class InputModified(AneuronError, RuntimeError):
    """A tensor among the inputs was written to in place between the call and the reading of its rows.

    Inputs are not copied at the call, they are read when their batch is formed (and once more if it must run again):
    leave them alone until the call has ended, or pass a copy, `x.clone()`. Views count with all of their base; where
    callers write to rows of one buffer that are their own, pass `buffer[i:j].data`, which counts for itself. Only this
    call fails, and none of its result is handed out. No `ShapeError`: nothing is wrong with what was passed, and a
    client that has sent it cannot mend it.

    PyTorch counts the writes to tensors, except to inference tensors, through `.data` and through NumPy; NumPy does
    not count: such writes cannot be seen.
    """


class DeviceError(AneuronError, ValueError):
    """The cores asked for cannot be had: unknown, malformed, duplicate or not visible to this process."""


class OutputError(AneuronError, RuntimeError):
    """The model's output cannot be handed out to the callers: it does not have the batch's rows."""


class QueueFull(AneuronError):
    """No room among the waiting rows (`max_pending`): the call was not accepted, or has given its room to another.

    A tenant that has less than its share of the room takes it from the newest call of the largest, and a call of a
    higher level (`options(priority=...)`) from the newest of the lowest: that is refused instead, unless it has begun.

    `retry_after` is the time in seconds after which room is expected at the rate at which rows have been
    leaving lately, or None while no rate has been measured yet.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(AneuronError, TimeoutError):
    """The call's `timeout` has passed, or what is known of the cores says that it cannot be met.

    In the second case it is raised before the time is over, and the cores have done nothing for the call.
    """


class Closed(AneuronError, RuntimeError):
    """The model was used after, or was closed during, the call."""


class CoreFailed(AneuronError, RuntimeError):
    """The core failed while it ran the call's rows; the input is not to blame.

    `core` is the id of that core; the device's own error is the `__cause__`.
    """

    def __init__(self, message: str, core: int | None = None) -> None:
        super().__init__(message)
        self.core = core


class NoHealthyCores(CoreFailed):
    """Every core is out of service.

    `retry_after` is the time in seconds after which one is loaded again, or None where none can be: then the process
    must be restarted.
    """

    def __init__(self, message: str, core: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, core)
        self.retry_after = retry_after
