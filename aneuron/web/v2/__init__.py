"""The Open Inference Protocol (KServe v2, Triton) as a view of models: `routes` beside an application's own.

Must not be here: an import of a framework, or of gRPC: whoever wants one does not need the others. `aneuron.web.v2.
starlette`, `.aiohttp` and `.grpc` carry the protocol; `aneuron serve` is a server of it.
"""
