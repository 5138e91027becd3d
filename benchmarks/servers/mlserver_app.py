"""MLServer, as its documentation shows adaptive batching and parallel workers; run by a Python that has it, not torch.

`python mlserver_app.py`, settings as those of the others.
"""

import asyncio
import os
import sys
import time

import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput


def setting(name: str, default: str) -> str:
    return os.environ.get(f"BENCHMARK_{name.upper()}", default)


class Simulated(MLModel):
    """One core in each worker: twice the row, plus one, after its service time."""

    async def load(self) -> bool:
        self.seconds = float(setting("seconds", "0.005"))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = self.decode(payload.inputs[0], default_codec=NumpyCodec)
        time.sleep(self.seconds)  # noqa: ASYNC251 - a model that computes
        y = np.asarray(x, dtype=np.float32) * 2 + 1
        output = ResponseOutput(name="output0", shape=list(y.shape), datatype="FP32", data=y.ravel().tolist())
        return InferenceResponse(model_name=self.name, outputs=[output])


async def main() -> None:
    port = int(setting("port", "8001"))
    settings = Settings(
        debug=False, host="127.0.0.1", http_port=port + 1, grpc_port=port, metrics_port=port + 2,
        parallel_workers=int(setting("cores", "4")), load_models_at_startup=False, metrics_endpoint=None,
    )  # fmt: skip
    sys.modules["mlserver_app"] = sys.modules["__main__"]  # workers import the model by this name
    server = MLServer(settings)
    model = ModelSettings(
        name="net", implementation=Simulated, max_batch_size=int(setting("batch", "8")), max_batch_time=0.01,
        parameters=ModelParameters(version="1"),
    )  # fmt: skip
    await server.start([model])


if __name__ == "__main__":
    asyncio.run(main())
