"""Ray as the platform that runs workers: one placement group and one named actor per worker.

Workers are detached actors, so that they outlive the controller that made them; a name finds them
again. Ray restarts none of them: the roster decides. Every Ray error ends here, as a result or as
a `ConnectionError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping
from typing import Any, cast

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tandem.controller.actors import WorkerActor
from tandem.controller.machine_cores import ownable_cores
from tandem.controller.platform import StartFailure
from tandem.controller.roster import Endpoint, Role
from tandem.core.config import TandemConfig
from tandem.core.cores import assign_cores, format_cores

NAMESPACE = "tandem"
CONTROLLER_NAME = "tandem-controller"
ACTOR_PREFIX = "tandem:"
RETRY_INTERVAL = 0.5


def actor_name(worker: str) -> str:
    """The name of a worker's actor and of its placement group."""
    return ACTOR_PREFIX + worker


class RayPlatform:
    """Implements `Platform`."""

    def __init__(
        self, config: TandemConfig, worker_classes: Mapping[Role, str], names: tuple[str, ...]
    ) -> None:
        self._config = config
        self._classes = worker_classes
        self._names = names
        self._actors: dict[str, Any] = {}

    async def discover(self) -> list[str]:
        """Find the actors of this cluster's workers by name."""
        for name in self._names:
            with contextlib.suppress(ValueError):  # Ray's way to say that there is none
                self._actors[name] = await asyncio.to_thread(
                    ray.get_actor, actor_name(name), namespace=NAMESPACE
                )
        return list(self._actors)

    async def launch(self, name: str, role: Role) -> None:
        """Create the actor in the worker's placement group, which is made on first use."""
        self._actors[name] = await asyncio.to_thread(self._launch, name, role)

    async def start(self, name: str) -> Endpoint | StartFailure:
        """Ask the actor to start its worker, again if the connection breaks meanwhile."""
        while True:
            try:
                return cast("Endpoint | StartFailure", await self._actors[name].start.remote())
            except ActorUnavailableError:
                await asyncio.sleep(RETRY_INTERVAL)
            except RayError as error:
                return StartFailure(cause_of(error), fatal=False)

    async def progress(self, name: str) -> str:
        """How far the actor is. Raises `ConnectionError` when Ray cannot reach it."""
        try:
            return cast("str", await self._actors[name].progress.remote())
        except RayError as error:
            raise ConnectionError(cause_of(error)) from error

    async def wait_until_dead(self, name: str) -> str:
        """Hold a call that never returns; Ray fails it when the process is gone for good."""
        while True:
            try:
                await self._actors[name].wait.remote()
            except ActorUnavailableError:
                await asyncio.sleep(RETRY_INTERVAL)
            except RayError as error:
                return cause_of(error)

    async def kill(self, name: str) -> None:
        """End the actor's process. Ray sends SIGKILL to one that is frozen after five seconds."""
        actor = self._actors.get(name)
        if actor is not None:
            with contextlib.suppress(ValueError, RayError):  # gone already
                await asyncio.to_thread(ray.kill, actor, no_restart=True)

    async def stop(self, name: str) -> None:
        """Stop the worker, end its process and free its place."""
        actor = self._actors.pop(name, None)
        if actor is not None:
            with contextlib.suppress(RayError):
                await actor.stop.remote()
            with contextlib.suppress(ValueError, RayError):
                await asyncio.to_thread(ray.kill, actor, no_restart=True)
        await asyncio.to_thread(remove_place, name)

    def _launch(self, name: str, role: Role) -> Any:
        cpus = self._config.controller.cpus_per_worker
        gpus = self._config.controller.gpus_per_worker
        several_nodes = sum(node["Alive"] for node in ray.nodes()) > 1  # type: ignore[no-untyped-call]
        options = {
            "name": actor_name(name),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": 0,
            "num_cpus": cpus,
            "num_gpus": gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=place_of(name, cpus, gpus), placement_group_bundle_index=0
            ),
        }
        actor_class: Any = ray.remote(WorkerActor)
        return actor_class.options(**options).remote(
            name,
            self._classes[role],
            with_cores(self._config, self._names, name, several_nodes=several_nodes),
            "cuda" if gpus > 0 else "cpu",
            several_nodes=several_nodes,
        )


def with_cores(
    config: TandemConfig, names: tuple[str, ...], name: str, *, several_nodes: bool
) -> TandemConfig:
    """Resolve worker.cpu_affinity "auto" to the worker's own cores, "off" where there are none.

    On several nodes Ray chooses a worker's node later than this, so nobody knows its neighbours.
    """
    if config.worker.cpu_affinity != "auto":
        return config
    cores: tuple[int, ...] = ()
    if not several_nodes and config.controller.gpus_per_worker == 0:
        cores = assign_cores(ownable_cores(), names, config.worker.threads).get(name, ())
    affinity = format_cores(cores) if cores else "off"
    worker = config.worker.model_copy(update={"cpu_affinity": affinity})
    return config.model_copy(update={"worker": worker})


def place_of(name: str, cpus: float, gpus: float) -> PlacementGroup:
    """The worker's placement group: the one that it had, else a new one."""
    try:
        return cast("PlacementGroup", ray.util.get_placement_group(actor_name(name)))
    except ValueError:
        bundle = {"CPU": cpus, **({"GPU": gpus} if gpus > 0 else {})}
        made = placement_group([bundle], name=actor_name(name), lifetime="detached")
        return cast("PlacementGroup", made)


def remove_place(name: str) -> None:
    """Give back what was reserved for a worker."""
    with contextlib.suppress(ValueError):
        remove_placement_group(ray.util.get_placement_group(actor_name(name)))


def cause_of(error: RayError) -> str:
    """One readable line out of Ray's page about a dead actor."""
    text = str(error)
    exit_type = re.search(r"Worker exit type: (\w+)", text)
    if exit_type:
        return f"its process ended ({exit_type.group(1).lower().replace('_', ' ')})"
    reason = re.search(r"The actor (?:is dead|died) because (?:it )?(.+)", text)
    return reason.group(1).strip() if reason else text.strip().splitlines()[-1]
