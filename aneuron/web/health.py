"""What a supervisor and a load balancer ask: is the process to be restarted, may it be sent requests?

Lives here: the answers. Must not be here: a web framework, how a core's health is judged.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from aneuron import AsyncDataParallel


@dataclass(slots=True)
class Health:
    """The health of the models of one application."""

    models: Mapping[str, AsyncDataParallel]
    draining: bool = False  # no new requests, please; those that come are served all the same

    def live(self) -> tuple[int, bytes]:
        """Status and body: 503 when a model has lost every core for good, or has met an internal error: restart it."""
        return _answer({name: "failed" if _is_lost(model) else "live" for name, model in self.models.items()}, "live")

    def ready(self) -> tuple[int, bytes]:
        """Status and body: 503 until every model has started, from when one closes, and while draining."""
        states = {name: "ready" if model.ready else "not ready" for name, model in self.models.items()}
        return _answer(dict.fromkeys(states, "draining") if self.draining else states, "ready")


def _is_lost(model: AsyncDataParallel) -> bool:
    cores = model.statistics().cores
    return bool(cores) and all(core.state == "failed" for core in cores)


def _answer(states: Mapping[str, str], good: str) -> tuple[int, bytes]:
    bad = [state for state in states.values() if state != good]
    return 503 if bad else 200, json.dumps({"status": bad[0] if bad else good, "models": states}).encode()
