"""The controller as the command line sees it: start it in a Ray cluster, find it, stop it.

Also starts a Ray cluster of our own on this machine. Call everything from the main thread: Ray's
processes die with the thread that started them. Call `prepare_environment` before importing this.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tandem.controller.actors import WORKER_CLASSES, ControllerActor
from tandem.controller.launcher import ACTOR_PREFIX, CONTROLLER_NAME, NAMESPACE, remove_place
from tandem.controller.roster import Role
from tandem.controller.runner import pool_slots
from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError, TandemError, UnavailableError

OBJECT_STORE_BYTES = 128 * 2**20
CONNECT_TIMEOUT = 5.0
START_TIMEOUT = 60.0
STOP_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class RayCluster:
    """A Ray cluster that this process is connected to."""

    address: str
    dashboard: str
    """With scheme; empty when there is none."""
    session_dir: Path | None
    """Where a cluster of our own keeps its files; None when Ray was there before us."""


def start_local_ray(config: TandemConfig) -> RayCluster:
    """Start a Ray cluster on this machine, with room for every worker whatever the cores."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    _provide_token()
    workers = len(pool_slots(config))
    context: Any = ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=math.ceil(workers * config.controller.cpus_per_worker) + 1,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=config.controller.dashboard,
        dashboard_host="127.0.0.1",
        dashboard_port=config.controller.dashboard_port,
        log_to_driver=config.log_level == "debug",
        logging_level=logging.ERROR,
    )
    if config.log_level != "debug":
        _silence_raylet_messages()
    session_dir = Path(context.address_info["session_dir"])
    return RayCluster(context.address_info["address"], _url(context.dashboard_url), session_dir)


def connect_to_ray(address: str) -> RayCluster:
    """Connect to a running Ray cluster. Raises `UnavailableError` if there is none."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    _check_listening(address)
    try:
        context: Any = ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
        )
    except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnavailableError(
            f"no Ray cluster answers at {address!r} (--ray-address): {reason}"
        ) from error
    _silence_raylet_messages()
    return RayCluster(context.address_info["address"], _url(context.dashboard_url), None)


class ControllerHandle:
    """The controller actor, for the command line."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def address(self) -> str:
        """Where it serves gRPC. Raises `TandemError` if it cannot."""
        return str(_get(self._actor.address.remote(), START_TIMEOUT))

    def fatal(self) -> str:
        """Why some worker can never start; empty while all may."""
        return str(_get(self._actor.fatal.remote(), START_TIMEOUT))

    def stop(self) -> None:
        """Stop every worker, then the controller itself. Kills it if it does not answer."""
        with contextlib.suppress(ray.exceptions.RayError, TandemError):
            _get(self._actor.stop.remote(), STOP_TIMEOUT)
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(self._actor, no_restart=True)


def start_controller(
    config: TandemConfig,
    cluster: RayCluster,
    worker_classes: Mapping[Role, str] = WORKER_CLASSES,
) -> ControllerHandle:
    """Start the controller on this node. Raises `ConfigError` if the cluster has one already."""
    if find_controller() is not None:
        raise ConfigError(
            f"Tandem is up already on the Ray cluster at {cluster.address}; `tandem down` ends it"
        )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor_class: Any = ray.remote(ControllerActor)
    actor = actor_class.options(
        name=CONTROLLER_NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        scheduling_strategy=here,
    ).remote(config, dict(worker_classes), cluster.dashboard)
    return ControllerHandle(actor)


def find_controller() -> ControllerHandle | None:
    """The controller of the Ray cluster that this process is connected to."""
    try:
        return ControllerHandle(ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE))
    except ValueError:  # Ray's way to say that there is none
        return None


def stop_everything() -> bool:
    """Stop the controller and every worker, also workers whose controller is gone for good.

    Returns whether there was anything to stop.
    """
    handle = find_controller()
    if handle is not None:
        handle.stop()
    orphans = [
        entry["name"]
        for entry in ray.util.list_named_actors(all_namespaces=True)
        if entry["namespace"] == NAMESPACE and entry["name"].startswith(ACTOR_PREFIX)
    ]
    for name in orphans:
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
        remove_place(name.removeprefix(ACTOR_PREFIX))
    return handle is not None or bool(orphans)


def disconnect() -> None:
    """Leave the Ray cluster; one of our own ends with it."""
    ray.shutdown()


def _get(reference: Any, timeout: float) -> object:
    try:
        return ray.get(reference, timeout=timeout)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TandemError):
            raise error.cause from None
        raise
    except ray.exceptions.GetTimeoutError as error:
        raise UnavailableError(f"the controller did not answer within {timeout:.0f} s") from error


def _check_listening(address: str) -> None:
    """Ray itself would try for minutes before it gave up on an address where nothing listens."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():  # "auto", or a form that Ray resolves
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
    except OSError as error:
        raise UnavailableError(
            f"no Ray cluster answers at {address} (--ray-address): {error.strerror or error}"
        ) from error


def _provide_token() -> None:
    """Ray makes itself a token and keeps it in ~/.ray; where it cannot write, it is given one."""
    home = Path.home()
    directory = home / ".ray" if (home / ".ray").exists() else home
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if not given and not os.access(directory, os.W_OK):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _silence_raylet_messages() -> None:
    """Keep Ray's essays about dead workers out of the terminal: the controller says it in a line.

    `log_to_driver` does not cover them, and Ray has no setting that does. They stay in its logs.
    """
    ray._private.worker.print_to_stdstream = lambda *args, **kwargs: None


def _url(dashboard: str | None) -> str:
    return f"http://{dashboard}" if dashboard else ""
