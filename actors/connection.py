"""Finding the conductor, or starting it: Ray first if need be."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayActorError, RayTaskError

from actors import service
from actors._ray_private import authenticate
from actors.conductor_actor import GpuConductor
from conductor.config import Config, load_config
from conductor.errors import ConductorError, ServiceFailed


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
    running = None if address or "RAY_ADDRESS" in os.environ else service.running()
    if running is not None:
        address = running.address
        authenticate(running.environment)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise ServiceFailed(f"no Ray can be reached at {where}: {str(error).splitlines()[0]}") from error


def find(config: Config) -> Any | None:
    """The handle of a conductor that runs already; None if there is none."""
    try:
        return ray.get_actor(config.ray.name, namespace=config.ray.namespace)
    except ValueError:
        return None


def _start(config: Config) -> Any:
    handle = GpuConductor.options(
        name=config.ray.name,
        namespace=config.ray.namespace,
        lifetime="detached",
        get_if_exists=True,  # somebody else may be starting it at this moment
        num_gpus=_gpus(config),
    ).remote(config)
    try:
        ray.get(handle.ready.remote())
    except ConductorError as error:
        ray.kill(handle)
        raise own(error) from None
    return handle


def _gpus(config: Config) -> int:
    """One GPU where the cluster has any and the configuration may use it; asking for one elsewhere would wait forever."""
    return int(config.device.kind != "host" and ray.cluster_resources().get("GPU", 0) >= 1)  # type: ignore[no-untyped-call]


def stop(handle: Any, *, timeout_s: float = 30) -> None:
    """Let everything go and end the conductor."""
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
