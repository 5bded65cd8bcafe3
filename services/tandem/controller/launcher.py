"""Ray as the platform that runs workers: a placement group per worker, a named actor per rank.

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

from tandem.controller.actors import RankActor, WorkerActor
from tandem.controller.machine_cores import with_cores
from tandem.controller.platform import StartFailure
from tandem.controller.roster import Endpoint, Role
from tandem.core.config import TandemConfig

NAMESPACE = "tandem"
CONTROLLER_NAME = "tandem-controller"
ACTOR_PREFIX = "tandem:"
RETRY_INTERVAL = 0.5


def actor_name(worker: str, rank: int = 0) -> str:
    """The name of a rank's actor; that of rank 0 is also the placement group's."""
    return f"{ACTOR_PREFIX}{worker}/{rank}" if rank else ACTOR_PREFIX + worker


class RayPlatform:
    """Implements `Platform`. A worker of several ranks lives and dies as one."""

    def __init__(
        self, config: TandemConfig, worker_classes: Mapping[Role, str], names: tuple[str, ...]
    ) -> None:
        self._config = config
        self._classes = worker_classes
        self._names = names
        self._ranks: dict[str, list[Any]] = {}
        """The actors of each worker, rank 0 first."""

    async def discover(self) -> list[str]:
        """Find the actors of this cluster's workers by name."""
        for name in self._names:
            found = await asyncio.to_thread(_actors_of, name)
            if found:
                self._ranks[name] = found
        return list(self._ranks)

    async def launch(self, name: str, role: Role) -> None:
        """Create the actors in the worker's placement group, which is made on first use."""
        self._ranks[name] = await asyncio.to_thread(self._launch, name, role)

    async def start(self, name: str) -> Endpoint | StartFailure:
        """Ask the actors to start their worker, again if the connection breaks meanwhile."""
        first, *others = self._ranks[name]
        while True:
            try:
                started = first.start.remote()
                if others:
                    address = await first.rank_address.remote()
                    await asyncio.gather(*(actor.start.remote(address) for actor in others))
                return cast("Endpoint | StartFailure", await started)
            except ActorUnavailableError:
                await asyncio.sleep(RETRY_INTERVAL)
            except RayError as error:
                return StartFailure(cause_of(error), fatal=False)

    async def progress(self, name: str) -> str:
        """How far the worker is. Raises `ConnectionError` when Ray cannot reach it."""
        try:
            return cast("str", await self._ranks[name][0].progress.remote())
        except RayError as error:
            raise ConnectionError(cause_of(error)) from error

    async def wait_until_dead(self, name: str) -> str:
        """Hold calls that never return; Ray fails one when its process is gone for good.

        The first rank that is gone ends the others. Returns when all are.
        """
        ends = [asyncio.create_task(_wait_until_gone(actor)) for actor in self._ranks[name]]
        try:
            done, _ = await asyncio.wait(ends, return_when="FIRST_COMPLETED")
            rank = next(rank for rank, end in enumerate(ends) if end in done)
            if len(ends) > 1:
                await self.kill(name)
                await asyncio.wait(ends)
            return f"rank {rank}: {ends[rank].result()}" if rank else ends[rank].result()
        finally:
            for end in ends:
                end.cancel()

    async def kill(self, name: str) -> None:
        """End the processes. Ray sends SIGKILL to one that is frozen after five seconds."""
        for actor in self._ranks.get(name, ()):
            with contextlib.suppress(ValueError, RayError):  # gone already
                await asyncio.to_thread(ray.kill, actor, no_restart=True)

    async def stop(self, name: str) -> None:
        """Stop the worker, end its processes and free its place."""
        actors = self._ranks.get(name)
        if actors:
            with contextlib.suppress(RayError):
                await actors[0].stop.remote()
        await self.kill(name)
        self._ranks.pop(name, None)
        await asyncio.to_thread(remove_place, name)

    def _launch(self, name: str, role: Role) -> list[Any]:
        several_nodes = sum(node["Alive"] for node in ray.nodes()) > 1  # type: ignore[no-untyped-call]
        config = with_cores(self._config, self._names, name, several_nodes=several_nodes)
        ranks = config.tensor_parallel(role)
        cpus, gpus = config.controller.cpus_per_worker, config.controller.gpus_per_worker
        place = place_of(name, cpus, gpus, ranks)
        _end_leftovers(name, ranks)
        device = "cuda" if gpus > 0 else "cpu"

        def options(rank: int) -> dict[str, Any]:
            strategy = PlacementGroupSchedulingStrategy(
                placement_group=place, placement_group_bundle_index=rank
            )
            return {
                "name": actor_name(name, rank),
                "namespace": NAMESPACE,
                "lifetime": "detached",
                "max_restarts": 0,
                "num_cpus": cpus,
                "num_gpus": gpus,
                "scheduling_strategy": strategy,
            }

        worker_class: Any = ray.remote(WorkerActor)
        rank_class: Any = ray.remote(RankActor)
        arguments = (name, self._classes[role], config, device)
        first = worker_class.options(**options(0)).remote(*arguments, several_nodes=several_nodes)
        others = [
            rank_class.options(**options(rank)).remote(
                name, role, config, device, rank, several_nodes=several_nodes
            )
            for rank in range(1, ranks)
        ]
        return [first, *others]


def _end_leftovers(name: str, ranks: int) -> None:
    """Ranks that outlived a rank 0 which no controller saw die: a frozen one cannot end itself."""
    for rank in range(1, ranks):
        with contextlib.suppress(ValueError, RayError):
            ray.kill(ray.get_actor(actor_name(name, rank), namespace=NAMESPACE), no_restart=True)


async def _wait_until_gone(actor: Any) -> str:
    """Return the cause once the actor's process is gone for good."""
    while True:
        try:
            await actor.wait.remote()
        except ActorUnavailableError:
            await asyncio.sleep(RETRY_INTERVAL)
        except RayError as error:
            return cause_of(error)


def _actors_of(name: str) -> list[Any]:
    """The living actors of a worker, rank 0 first; none if that is gone."""
    actors: list[Any] = []
    with contextlib.suppress(ValueError):  # Ray's way to say that there is none
        while True:
            actors.append(ray.get_actor(actor_name(name, len(actors)), namespace=NAMESPACE))
    return actors


def place_of(name: str, cpus: float, gpus: float, ranks: int = 1) -> PlacementGroup:
    """The worker's placement group, a bundle per rank: the one that it had, else a new one."""
    try:
        return cast("PlacementGroup", ray.util.get_placement_group(actor_name(name)))
    except ValueError:
        bundle = {"CPU": cpus, **({"GPU": gpus} if gpus > 0 else {})}
        made = placement_group(
            [bundle] * ranks,
            strategy=_strategy(bundle, ranks),
            name=actor_name(name),
            lifetime="detached",
        )
        return cast("PlacementGroup", made)


def _strategy(bundle: Mapping[str, float], ranks: int) -> str:
    """All ranks on one node, wherever one is large enough for them."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    fits = any(
        all(node.get(kind, 0) >= ranks * amount for kind, amount in bundle.items())
        for node in nodes
    )
    return "STRICT_PACK" if fits else "PACK"


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
