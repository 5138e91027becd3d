"""The time that a client allows for its request.

Lives here: the headers that say so. Must not be here: a web framework, a clock (`now` is an argument).
"""

import re
from collections.abc import Mapping

_MILLISECONDS = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)")
_GRPC = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


class MalformedTimeout(ValueError):
    """A header that should say a time does not; the client's fault (400)."""


def deadline(headers: Mapping[str, str], now: float, max_seconds: float | None) -> float | None:
    """When a request that arrives `now` must be answered; None: whenever.

    The client asks by `X-Request-Timeout-Ms` (a number) or `grpc-timeout` (at most eight digits and one of H, M, S, m,
    u, n); by both: the shorter. `max_seconds` is the most that it gets, also where it does not ask. Header names must
    be looked up without regard to case. Raises `MalformedTimeout`.

    >>> deadline({"x-request-timeout-ms": "250"}, now=10.0, max_seconds=5.0)
    10.25
    >>> deadline({"grpc-timeout": "1M"}, now=10.0, max_seconds=5.0)
    15.0
    """
    allowed = [] if max_seconds is None else [max_seconds]
    if (value := headers.get("x-request-timeout-ms")) is not None:
        if (match := _MILLISECONDS.fullmatch(value.strip())) is None:
            raise MalformedTimeout(f"X-Request-Timeout-Ms: {value!r:.40}; expected milliseconds, a number of 0 or more")
        allowed.append(float(match[1]) / 1000)
    if (value := headers.get("grpc-timeout")) is not None:
        if (match := _GRPC.fullmatch(value.strip())) is None:
            raise MalformedTimeout(f"grpc-timeout: {value!r:.40}; expected up to 8 digits and one of H, M, S, m, u, n")
        allowed.append(int(match[1]) * _UNITS[match[2]])
    return now + min(allowed) if allowed else None
