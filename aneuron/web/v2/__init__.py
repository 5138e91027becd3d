"""The Open Inference Protocol (KServe v2, Triton) as a view of models: `routes` beside an application's own.

Must not be here: an import of a framework, or of gRPC, before it is asked for: whoever wants one does not need the
others. `aneuron.web.v2.starlette`, `.aiohttp` and `.grpc` carry the protocol; `aneuron serve` is a server of it.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """`routes` is that of Starlette and FastAPI; aiohttp's is in its own module."""
    if name == "routes":
        from aneuron.web.v2.starlette import routes

        return routes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
