"""Search in one application of Ray Serve: an encoder and a reranker, each in replicas of its own, and HTTP in front.

python examples/ray_service.py [PORT]               # a small cluster on this machine; asks itself, and ends
serve run examples.ray_service:app                  # on a cluster that is there; with `pip install 'aneuron[ray]'`

curl -X POST localhost:8000/search -H 'Content-Type: application/json' -d '{"query": [1, 0, 0, 0], "best": 2}'
"""

import asyncio
import sys
import tempfile

import numpy as np
import torch
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve

import aneuron.ray
from aneuron import AsyncDataParallel

FEATURES = 4
DOCUMENTS = torch.eye(FEATURES).repeat(8, 1) + torch.arange(8 * FEATURES).unsqueeze(1) / 100


def make_encoder(scale: float = 1.0, max_pending: int = 512) -> AsyncDataParallel:
    """Runs in the replica; `user_config` may change `scale` (by a swap) and `max_pending` while it serves."""
    net = torch.nn.Linear(FEATURES, FEATURES, bias=False).eval()
    torch.nn.init.eye_(net.weight).data.mul_(scale)
    return AsyncDataParallel(
        net, backend="cpu", batch_size=8, example_inputs=torch.rand(1, FEATURES), max_pending=max_pending
    )


def make_reranker() -> AsyncDataParallel:
    return AsyncDataParallel(torch.nn.CosineSimilarity().eval(), backend="cpu", batch_size=32, max_pending=4096)


Encoder = aneuron.ray.deployment(make_encoder, num_cpus=1, num_replicas=2)
Reranker = aneuron.ray.deployment(make_reranker, num_cpus=1)

front = FastAPI()
aneuron.ray.answer_errors(front)


class Question(BaseModel):
    """What a client sends."""

    query: list[float]
    best: int = 3
    timeout: float = 5.0


@serve.deployment(max_ongoing_requests=256)
@serve.ingress(front)
class Search:
    """Knows the documents; asks both models."""

    def __init__(self, encoder: serve.handle.DeploymentHandle, reranker: serve.handle.DeploymentHandle) -> None:
        self.encode, self.rank = aneuron.ray.view(encoder), aneuron.ray.view(reranker)

    @front.post("/search")
    async def search(self, question: Question) -> list[int]:
        """The numbers of the documents that are nearest to the query, best first."""
        encode, rank = (each.options(timeout=question.timeout) for each in (self.encode, self.rank))
        query = await encode(np.array([question.query], dtype="float32"))
        scores = await rank(query.expand_as(DOCUMENTS).contiguous(), DOCUMENTS)
        return scores.topk(question.best).indices.tolist()


app = Search.bind(Encoder.bind(), Reranker.bind())


def ask(port: int, query: list[float]) -> list[int]:
    import json
    import urllib.request

    body = json.dumps({"query": query}).encode()
    request = urllib.request.Request(f"http://localhost:{port}/search", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


async def main(port: int) -> None:
    answers = await asyncio.gather(*(asyncio.to_thread(ask, port, row.tolist()) for row in torch.eye(FEATURES)))
    for number, best in enumerate(answers):
        assert all(document % FEATURES == number for document in best), (number, best)
        print(f"query {number}: documents {best}")


if __name__ == "__main__":
    import ray

    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        ray.init(num_cpus=5, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=folder)
        try:
            serve.start(http_options={"port": port})
            serve.run(app, name="search")
            asyncio.run(main(port))
        finally:
            serve.shutdown()
            ray.shutdown()
