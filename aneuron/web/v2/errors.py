"""What a client of the Open Inference Protocol is told when it gets no answer.

Lives here: `Refused`, errors of ours in the protocol's status codes, and these in gRPC's. Must not be here: the words
of one rule (where it is checked), a web framework.
"""

from typing import NamedTuple

from aneuron import QueueFull
from aneuron.web.problems import log, said

_LONGEST = 500  # characters of what a client is told: it may have named something of any length

# As Triton has them; kserve answers what is not ready with 503 too.
CODES = {
    400: "INVALID_ARGUMENT",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    413: "RESOURCE_EXHAUSTED",
    415: "INVALID_ARGUMENT",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class Refused(Exception):
    """A request that is not served, and why; its client is told."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Told(NamedTuple):
    """What a client is told: by HTTP a status and perhaps when to come again, by gRPC a code."""

    status: int
    text: str
    code: str
    retry_after: int | None = None


def told(error: Exception) -> Told:
    """What to tell of an exception: by the table of `aneuron.web.problems`; of one of a model's own nothing but 500.

    What is the server's fault goes to the log.
    """
    if isinstance(error, Refused):
        return Told(error.status, _cut(str(error)), CODES[error.status])
    log(error)
    status, text, retry_after = said(error)
    if status == 422:  # the protocol knows one status for what the client has to mend
        status = 400
    code = CODES[status]
    if isinstance(error, QueueFull):  # some clients repeat what is UNAVAILABLE at once, three times
        code = "RESOURCE_EXHAUSTED"
    return Told(status, _cut(text or "The model could not answer."), code, retry_after)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
