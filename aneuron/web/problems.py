"""Errors as HTTP answers, in the words of RFC 9457 (problem details).

Lives here: the one table of errors, what a client may be told. Must not be here: a web framework.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from math import ceil
from typing import Any

from aneuron import (
    AneuronError,
    Closed,
    CoreFailed,
    DeadlineExceeded,
    DeviceError,
    InputModified,
    NoHealthyCores,
    OutputError,
    QueueFull,
    ShapeError,
)

logger = logging.getLogger("aneuron.web")

# The status, and what the client is told; None: the error's own text. The text of the others is for the log: it may
# quote the device or the model's output.
TABLE: Mapping[type[Exception], tuple[int, str | None]] = {
    ShapeError: (422, None),
    QueueFull: (503, None),
    DeadlineExceeded: (504, None),
    Closed: (503, "The model is closed or closing."),
    NoHealthyCores: (503, "Every core is out of service."),
    CoreFailed: (500, "A core failed, not the input; the request may be tried again."),
    OutputError: (500, "The model's output cannot be handed out."),
    InputModified: (500, "The input was changed by the server while it waited."),
    DeviceError: (500, "The model cannot be run here."),
    AneuronError: (500, "The model could not answer."),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """An answer that says what went wrong: status, headers and JSON body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def problem(
    status: int, detail: str | None = None, error: str | None = None, retry_after: int | None = None
) -> Problem:
    """Problem details of a status. `error`, the name of ours, tells those of one status apart.

    >>> problem(504, "timeout=0.2 s has passed", "DeadlineExceeded").body.decode()
    '{"type": "about:blank", "title": "Gateway Timeout", "status": 504, "detail": "timeout=0.2 s has passed", "error": "DeadlineExceeded"}'
    """  # noqa: E501
    members: dict[str, Any] = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    members |= {name: value for name, value in (("detail", detail), ("error", error)) if value is not None}
    headers = {"Content-Type": "application/problem+json"}
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    return Problem(status, headers, json.dumps(members).encode())


def problem_of(error: Exception) -> Problem:
    """What a client is told of an exception: by the table, and of those that are not in it nothing but 500."""
    status, text, retry_after = said(error)
    known = _known(error)
    return problem(status, text, None if known is None else known.__name__, retry_after)


def said(error: Exception) -> tuple[int, str | None, int | None]:
    """Of an exception the status, what a client may read of it, and after how many seconds it may come again."""
    known = _known(error)
    if known is None:
        return 500, None, None
    status, told = TABLE[known]
    return status, str(error) if told is None else told, _retry_after(error)


def log(error: Exception) -> None:
    """Leave an error of ours that is the server's fault, and that nobody else will log, to the log."""
    known = _known(error)
    if known is None or TABLE[known][0] == 500:
        logger.error("a request failed", exc_info=error)


def _known(error: Exception) -> type[Exception] | None:
    return next((kind for kind in type(error).__mro__ if kind in TABLE), None)


def _retry_after(error: Exception) -> int | None:
    """Whole seconds, as the header has them; one where the error would say when, and does not know."""
    if not hasattr(error, "retry_after"):
        return None
    return max(1, ceil(error.retry_after or 0))
