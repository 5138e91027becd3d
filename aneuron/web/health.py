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
    advice: str = "it has to be started before it serves"  # what starts a model, if nothing has
    begun: bool = False  # the application has started, or been asked
    draining: bool = False  # no new requests, please; those that come are served all the same

    def live(self) -> tuple[int, bytes]:
        """Status and body: 503 when a model has lost every core for good, or has met an internal error: restart it."""
        return _answer({name: "failed" if _is_lost(model) else "live" for name, model in self.models.items()}, "live")

    def ready(self) -> tuple[int, bytes]:
        """Status and body: 503 until every model has started, from when one closes, and while draining."""
        if self.draining:
            return _answer(dict.fromkeys(self.models, "draining"), "ready")
        asleep = self.asleep()
        states = {
            name: "ready" if model.ready else "never started" if name in asleep else "not ready"
            for name, model in self.models.items()
        }
        return _answer(states, "ready", self.advice if asleep else None)

    def asleep(self) -> list[str]:
        """The models that nothing has ever started."""
        return [name for name, model in self.models.items() if not model.ready and not model.statistics().cores]


def _is_lost(model: AsyncDataParallel) -> bool:
    cores = model.statistics().cores
    return bool(cores) and all(core.state == "failed" for core in cores)


def _answer(states: Mapping[str, str], good: str, detail: str | None = None) -> tuple[int, bytes]:
    bad = [state for state in states.values() if state != good]
    members = {"status": bad[0] if bad else good, "models": states} | ({"detail": detail} if detail else {})
    return 503 if bad else 200, json.dumps(members).encode()
