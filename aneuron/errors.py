"""Every exception that aneuron raises of its own accord.

Lives here: the tree below. Must not be here: an import, a status code of any web framework.

    AneuronError
    ├── ShapeError    (ValueError)    the inputs do not fit: mend the call
    ├── DeviceError   (ValueError)    the cores asked for cannot be had: mend the configuration
    ├── OutputError   (RuntimeError)  the model's output cannot be handed out: mend the model
    ├── QueueFull                     no room: come back after `retry_after` seconds
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


class DeviceError(AneuronError, ValueError):
    """The cores asked for cannot be had: unknown, malformed, duplicate or not visible to this process."""


class OutputError(AneuronError, RuntimeError):
    """The model's output cannot be handed out to the callers: it does not have the batch's rows."""


class QueueFull(AneuronError):
    """No room among the waiting rows (`max_pending`): the call was not accepted, or has given its room to another.

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
