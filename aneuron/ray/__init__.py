"""Models in Ray Serve: replicas on many machines, each with an `AsyncDataParallel` on the cores that Ray gave it.

    Net = aneuron.ray.deployment(make_net, neuron_cores=2, num_replicas=4)
    net = aneuron.ray.view(serve.run(Net.bind("net.pt")))
    y = await net.options(timeout=0.5)(x)

Lives here: the front door. Ray (`pip install 'aneuron[ray]'`) is imported when it is first used, and by `serving.py`
only: the other files are tested where there is none.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aneuron.ray.serving import Refused, answer_errors, deployment, view

__all__ = ["Refused", "answer_errors", "deployment", "view"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("aneuron.ray.serving"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "ray":
            raise
        raise ModuleNotFoundError(
            f"aneuron.ray.{name} needs Ray Serve: pip install 'aneuron[ray]'", name="ray"
        ) from error


def __dir__() -> list[str]:
    return __all__
