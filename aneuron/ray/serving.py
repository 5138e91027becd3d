"""Ray Serve: deployments, views of their handles, answers to their errors.

Lives here: what needs Ray. Must not be here: what a replica does with its model (replica.py), numbers (sizing.py).
"""

import os
from collections.abc import Callable
from math import ceil
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from aneuron import AneuronError, AsyncDataParallel, QueueFull
from aneuron.backends import cpus
from aneuron.ray.handles import HandleView, original, view_of
from aneuron.ray.replica import PLAINLY, Factory, How, Replica, named
from aneuron.ray.sizing import Resources, ongoing, scaling
from aneuron.web.problems import log, problem, problem_of

_LOST = (ActorDiedError, ActorUnavailableError, ReplicaUnavailableError, WorkerCrashedError)


class Refused(QueueFull, BackPressureError):  # type: ignore[misc]  # Ray is not read: its classes are Any
    """`aneuron.QueueFull` of a replica, as Serve knows it too: HTTP gets 503, or 429, with `Retry-After`."""

    def __init__(self, text: str, retry_after: float | None = None, status_code: int = 503) -> None:
        Exception.__init__(self, text, retry_after, status_code)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message

    @property
    def message(self) -> str:
        """What is full."""
        return str(self.args[0])

    @property
    def status_code(self) -> int:
        """The answer to an HTTP request."""
        return int(self.args[2])

    @property
    def retry_after_s(self) -> float:
        """Whole seconds, for `Retry-After`; one where nobody knows."""
        return float(max(1, ceil(self.args[1] or 0)))


class _Served:
    """What Serve calls in a replica. The factory, and what else is fixed, are attributes of a class below."""

    factory: Factory
    status_code: int

    async def __init__(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        said = getattr(serve.get_replica_context(), "_deployment_config", None)
        resources = ray.get_runtime_context().get_assigned_resources()
        cpus.grant(resources.get("CPU", 0), "Ray (num_cpus)")
        self.replica = Replica(type(self).factory, args, kwargs, tensors=_tensors_are_shared())
        await self.replica.start(getattr(said, "user_config", None), getattr(said, "max_ongoing_requests", None))

    async def answer(self, how: How, /, *inputs: Any, **kwargs: Any) -> Any:
        """One call, on its terms; what a view asks for."""
        try:
            return await self.replica.answer(how, inputs, kwargs)
        except QueueFull as error:
            raise Refused(str(error), error.retry_after, self.status_code) from None

    async def reconfigure(self, user_config: Any, rank: Any = None) -> None:
        """Another `user_config`, or none any more, of which Serve tells only those who ask for their rank, too."""
        await self.replica.reconfigure(user_config)

    async def check_health(self) -> None:
        """Raises where Serve is to replace the replica."""
        self.replica.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For an autoscaling policy."""
        return self.replica.figures()

    async def __del__(self) -> None:
        """Serve awaits it, when the calls have ended."""
        if hasattr(self, "replica") and hasattr(self.replica, "model"):
            await self.replica.close()


class _Called(_Served):
    """For handles."""

    async def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """One call: `handle.remote(x)`."""
        if inputs and isinstance(inputs[0], Request):
            return _response(
                problem(404, "This deployment answers handles, not HTTP; see `ingress` of aneuron.ray.deployment.")
            )
        return await self.answer(PLAINLY, *inputs, **kwargs)


class _Ingress(_Served):
    """For HTTP, too."""

    ingress: Callable[[AsyncDataParallel], Any]

    async def __serve_build_asgi_app__(self) -> Any:
        return type(self).ingress(self.replica.model)


def deployment(
    factory: Factory,
    *,
    ingress: Callable[[AsyncDataParallel], Any] | None = None,
    neuron_cores: int | None = None,
    num_gpus: float | None = None,
    num_cpus: float | None = None,
    max_ongoing_requests: int | None = None,
    **options: Any,
) -> serve.Deployment:
    """A deployment of Ray Serve whose replicas each have a model, on the cores that Ray gives them.

    factory: makes an `AsyncDataParallel`, not started, in the replica: a function, `async` or run in a thread, or the
        class itself. It gets the arguments of `bind()`, and over those by keyword what `user_config` has. If it raises,
        or the model does not start, so has the replica not; Serve's status of the application has the traceback.
    ingress: makes an ASGI application (FastAPI, Starlette) of the model, started, in the replica: for HTTP requests
        without another process between. With `aneuron.web.starlette.install(app, net=model)` errors become answers.
        The model starts and closes with the replica: no `lifespan` is needed. Without it only handles can call.
    neuron_cores, num_gpus, num_cpus: what each replica has of its machine. NeuronCores are whole, and the model sees no
        others; GPUs likewise, or a part of one. `CpuBackend()` makes as many virtual cores as there are CPUs (Serve
        gives one if nothing is said).
    max_ongoing_requests: calls that a replica has at a time. None: what fills batches of 64 on all of its cores, 256 at
        least; the log of a replica says so if that is less than its model needs. What is more waits at the callers, for
        whichever replica is free first. (Serve's own default, 5, fills no batch.)
    options: those of `ray.serve.deployment`: `num_replicas`, `autoscaling_config`, `user_config` and so on. Other
        defaults: 30 s for a shutdown, `Retry-After: 1` where Serve itself refuses, and for autoscaling a third of
        `max_ongoing_requests` as a target.

    A replica is healthy while its model is `ready`; Serve replaces one that is not (after 30 s, as it is configured).
    On shutdown Serve waits for the calls, then the model drains. Another `user_config` in the file of `serve deploy`
    (`serve.run` replaces all replicas each time) makes each replica call the
    factory again and become what that makes: another model by `swap`, while the old one serves; `max_pending`,
    `num_workers`, `split_size`; no call fails. Whatever else differs fails the update, and Serve replaces the replica.

    `QueueFull` reaches callers as `Refused`, which Serve answers like its own back-pressure (503, or what
    `backpressure_config` says, with `Retry-After`). Read-only arrays of the object store are copied before the model
    sees them. An autoscaling policy finds "calls", "waiting_rows", "waiting_work", "busy" (of the cores' time, 0 to 1),
    "queue_seconds" (mean, since it was asked last) and "cores" (that serve) of each replica.

    Raises TypeError and ValueError for what cannot be meant, here; what Serve raises for its own options.
    """
    if isinstance(factory, AsyncDataParallel) or not callable(factory):
        raise TypeError(
            f"deployment({factory!r:.80}): expected a function that makes an AsyncDataParallel in the replica; a model "
            "that is here already travels with it as deployment(lambda: model)"
        )
    resources = Resources(neuron_cores, num_gpus, num_cpus)
    actor_options = resources.actor_options(options.pop("ray_actor_options", None))
    most = ongoing(resources.cores) if max_ongoing_requests is None else max_ongoing_requests
    autoscaling = scaling(options.pop("autoscaling_config", None), options.get("num_replicas"), most)
    pressure = options.setdefault("backpressure_config", {"retry_after_s": 1.0})
    pressed = serve.config.BackpressureConfig.model_validate(pressure or {})
    options.setdefault("graceful_shutdown_timeout_s", 30.0)
    options.setdefault("name", _name(factory))
    fixed = {"factory": staticmethod(factory), "status_code": pressed.status_code}
    if ingress is None:
        replica: Any = type("Replica", (_Called,), fixed)
    else:
        replica = serve.ingress()(type("Replica", (_Ingress,), fixed | {"ingress": staticmethod(ingress)}))
    if autoscaling is not None:
        options["autoscaling_config"] = autoscaling
    decorate = serve.deployment(max_ongoing_requests=most, ray_actor_options=actor_options, **options)
    made: serve.Deployment = decorate(replica)
    return made


def view(handle: serve.handle.DeploymentHandle[Any]) -> HandleView:
    """What calls such a deployment like the model, given its handle: `await net(x)`, `net.timed(x)`, `net.map(source)`,
    `net.options(timeout=, priority=, tenant=)`, in a deployment or in any program that awaits.

    A timeout counts from the call to its result, the way there and back included, and holds in the replica too: what
    cannot be met costs its cores nothing. Cancelling the call takes its rows out of the replica's queue. A call whose
    replica dies, or is being closed, or has lost its cores, runs once more, elsewhere if there is another.

    Raises what the model raises, as it was raised there, with Ray's error, whose text is the replica's traceback, as
    `__cause__`: `ShapeError`, `QueueFull` (also where Serve itself refuses, by `max_queued_requests`),
    `DeadlineExceeded`, the model's own exception; `CoreFailed` after two deaths; `Closed` where the application was
    deleted. A call that waits for a replica while it is being deleted waits on, as with any handle: give it a timeout.
    """
    return view_of(handle, _LOST, (BackPressureError,), (DeploymentUnavailableError,), _tensors_are_shared())


def answer_errors(app: Any) -> None:
    """Have an application in front of handles answer aneuron's errors by the table of `aneuron.web.problems`: 422 for
    `ShapeError`, 503 (or what `backpressure_config` says) with `Retry-After` for `QueueFull`, 504 for
    `DeadlineExceeded`, problem details (RFC 9457) for all. Errors of views and of plain handles alike.

    Call it on a Starlette or FastAPI application before it is given to `ray.serve.ingress`.
    """
    app.add_exception_handler(AneuronError, _on_error)


async def _on_error(_: HTTPConnection, error: Exception) -> Response:
    error = original(error)
    log(error)
    response = _response(problem_of(error))
    if isinstance(error, Refused):
        response.status_code = error.status_code
    return response


def _response(said: Any) -> Response:
    return Response(said.body, said.status, dict(said.headers))


def _name(factory: Factory) -> str:
    name = named(factory)
    return name if name.isidentifier() else "Model"


def _tensors_are_shared() -> bool:
    return os.environ.get("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "0").lower() in ("1", "true")
