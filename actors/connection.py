"""Finding the conductor, or starting it: Ray first if need be."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayActorError, RayTaskError

from actors import service
from actors._ray_private import authenticate
from conductor.config import Config, load_config
from conductor.errors import ConductorError, ServiceFailed

_GPU_WITHIN_S = 3.0


def connect(config: Config | str | os.PathLike[str] | None = None, *, address: str | None = None) -> Any:
    """The conductor's handle; Ray and the conductor are started if they are not running.

    `config`: a Config, or the path of its file; only a conductor that is started here takes it up. `address`: Ray's, as
    `ray.init` takes it; without one, the Ray of `conductor up` if it runs, else what `ray.init` finds or starts.
    Raises ConfigError, ServiceFailed.
    """
    settings = load_config(config)
    join_ray(address)
    handle = find(settings)
    if handle is not None:
        return handle
    return _start(settings)


def join_ray(address: str | None = None) -> None:
    """Connect this process to Ray, quietly, unless it is connected. Raises ServiceFailed."""
    if ray.is_initialized():
        return
    running = None if address or service.users_address() else service.running()
    if running is not None:
        address = running.address
        authenticate(running.environment)
    init_ray(address)


def init_ray(address: str | None, **options: Any) -> None:
    """`ray.init`, quietly. Raises ServiceFailed."""
    # Ray makes its workers nice, and so the threads that feed the GPU: whoever computes beside them would go first.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ServiceFailed(f"no Ray can be reached at {where}: {why}") from error


def find(config: Config) -> Any | None:
    """The handle of a conductor that runs already; None if there is none. `join_ray` comes first."""
    try:
        return ray.get_actor(config.ray.name, namespace=config.ray.namespace)
    except ValueError:
        return None


def _start(config: Config) -> Any:
    handle, created = _create(config)
    try:
        ray.get(handle.ready.remote())
    except BaseException as error:
        if created:
            ray.kill(handle)
        if not isinstance(error, Exception):
            raise
        error = own(error)
        if isinstance(error, ConductorError):
            raise error from None
        raise ServiceFailed(f"the conductor could not start: {type(error).__name__}: {error}") from error
    return handle


def _create(config: Config) -> tuple[Any, bool]:
    """(handle, whether it is ours): somebody else may be starting it at this moment."""
    gpus = _gpus(config)
    if gpus and not _a_gpu_is_free():
        handle = find(config)
        if handle is None:
            raise ServiceFailed(
                "all GPUs of this Ray cluster are taken, and the conductor needs one: end the work that holds it "
                "(`ray status` shows the figures), or set device.kind to host"
            )
        return handle, False
    from actors.conductor_actor import GpuConductor  # here, for its streams import this module

    options = {"name": config.ray.name, "namespace": config.ray.namespace, "lifetime": "detached", "num_gpus": gpus}
    try:
        return GpuConductor.options(**options).remote(config), True
    except ValueError:  # the name is taken
        handle = find(config)
        if handle is None:
            raise
        return handle, False


def _gpus(config: Config) -> int:
    """One GPU where the cluster has any and the configuration may use it; asking for one elsewhere would wait forever.

    Zero if the configuration names another than the first: the choice is ours then, and Ray, which gives away a GPU of its
    own choice and hides the others (CUDA_VISIBLE_DEVICES), would hide the one named.
    """
    may_use_one = config.device.kind != "host" and config.device.index == 0
    return int(may_use_one and ray.cluster_resources().get("GPU", 0) >= 1)  # type: ignore[no-untyped-call]


def _a_gpu_is_free() -> bool:
    """Looks for some seconds: a GPU that has just been given back is not seen at once."""
    deadline = time.monotonic() + _GPU_WITHIN_S
    while ray.available_resources().get("GPU", 0) < 1:  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def stop(handle: Any, *, timeout_s: float = 30) -> None:
    """Let everything go and end the conductor; turns that take longer than `timeout_s` to end are ended with it. Ray goes on."""
    try:
        ray.get(handle.close.remote(), timeout=timeout_s)
    except (RayActorError, TimeoutError):
        pass  # it is gone already, or hangs: in both cases the kill ends it
    finally:
        ray.kill(handle)


def own(error: BaseException) -> BaseException:
    """The project's exception inside what Ray raised, or `error` itself.

    Ray hands errors on as a class of both kinds, whose text is the remote traceback; this is the plain one.
    """
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error
