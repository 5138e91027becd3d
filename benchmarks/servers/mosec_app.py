"""mosec, as its documentation shows batching and several workers; its window is 10 ms by default."""

import os
import sys

import torch
from mosec import Server, Worker

from benchmarks import servers
from benchmarks.floors import Core


class Inference(Worker):
    """One core in each worker."""

    resp_mime_type = servers.MEDIA_TYPE

    def __init__(self) -> None:
        super().__init__()
        self.core = Core(servers.SECONDS, servers.BATCH, servers.FEATURES)

    def deserialize(self, data: bytes) -> torch.Tensor:
        return servers.tensor(data)

    def forward(self, data: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(self.core.run(torch.cat(data)).split(1))

    def serialize(self, data: torch.Tensor) -> bytes:
        return data.numpy().tobytes()


if __name__ == "__main__":
    os.environ |= {"MOSEC_PORT": str(servers.PORT), "MOSEC_ADDRESS": "127.0.0.1", "MOSEC_LOG_LEVEL": "error"}
    del sys.argv[1:]
    server = Server()
    server.append_worker(Inference, num=servers.CORES, max_batch_size=servers.BATCH, route="/predict")
    server.run()
