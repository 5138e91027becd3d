"""LitServe, as its documentation shows batching and several workers; raw bytes, which it takes faster than JSON."""

from typing import Annotated, Any

import litserve
import torch
from fastapi import Body, Response

from benchmarks import servers
from benchmarks.floors import Core


class Api(litserve.LitAPI):
    """One core in each worker."""

    def setup(self, device: str) -> None:
        self.core = Core(servers.SECONDS, servers.BATCH)

    def decode_request(self, request: Annotated[bytes, Body(media_type=servers.MEDIA_TYPE)]) -> torch.Tensor:
        return servers.tensor(request)[0]

    def predict(self, rows: torch.Tensor) -> torch.Tensor:
        return self.core.run(rows)

    def encode_response(self, output: torch.Tensor) -> Response:
        return Response(output.numpy().tobytes(), media_type=servers.MEDIA_TYPE)


if __name__ == "__main__":
    api: Any = Api(max_batch_size=servers.BATCH, batch_timeout=0.01)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=servers.CORES)
    server.run(host="127.0.0.1", port=servers.PORT, generate_client_file=False, log_level="error", access_log=False)
