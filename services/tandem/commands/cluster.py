"""`serve`, `up`, `down`, `gateway`: the commands that start and stop things."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from tandem.commands.options import ControllerAddress, RayAddress, takes_config
from tandem.commands.ports import held_ports, serve_ports, settle_metrics_ports, settle_ports
from tandem.commands.progress import ClusterView, StartProgress
from tandem.commands.start import everyone_ready
from tandem.commands.terminal import console, reachable, tandem_command
from tandem.controller.environment import prepare_environment
from tandem.core.config import TandemConfig
from tandem.core.errors import UnavailableError
from tandem.modelfiles import read_json, resolve_model

if TYPE_CHECKING:
    from tandem.controller.session import ControllerHandle

POLL_INTERVAL = 0.25


@takes_config
def serve(config: TandemConfig, ray_address: RayAddress = "") -> None:
    """Start everything on this machine: Ray, workers, gateway. Ctrl-C ends it."""
    from tandem.commands.supervisor import Supervisor

    dashboard = config.controller.dashboard and not ray_address
    config = settle_ports(config, serve_ports(config, dashboard=dashboard))
    config = settle_metrics_ports(config)
    _check_model(config)
    with held_ports(config):
        Supervisor(config, ray_address).run()


@takes_config
def up(config: TandemConfig, ray_address: RayAddress = "auto") -> None:
    """Start controller and workers on a running Ray cluster, and return."""
    prepare_environment()
    from tandem.controller import session

    controller = config.controller
    settings = {"controller.port": (controller.host, controller.port)}
    config = settle_ports(config, settings)
    cluster = session.connect_to_ray(ray_address)
    try:
        handle = session.start_controller(config, cluster)
        try:
            address = handle.address()
            _wait_for_workers(handle, reachable(*_split(address)))
        except BaseException:
            handle.stop()
            raise
    finally:
        session.disconnect()
    shown = reachable(*_split(address))
    console.print(f"Tandem is up; its controller serves at {shown}", markup=False)
    console.print(f"  {tandem_command()} gateway --controller {shown}", markup=False)
    console.print(f"  {tandem_command()} status --controller {shown}", markup=False)


def down(ray_address: RayAddress = "auto") -> None:
    """Stop controller and workers on a running Ray cluster. Ray itself stays."""
    prepare_environment()
    from tandem.controller import session

    session.connect_to_ray(ray_address)
    try:
        if not session.stop_everything():
            raise UnavailableError("Tandem is not up on this Ray cluster")
    finally:
        session.disconnect()
    console.print("Tandem is down")


@takes_config
def gateway(
    config: TandemConfig,
    controller: ControllerAddress = "",
    parent: Annotated[int, typer.Option(hidden=True)] = 0,
    index: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Run a gateway against a controller, in the foreground. Many may run."""
    from tandem.commands.gateway_process import die_with, run_gateway
    from tandem.commands.gateways import run_gateways

    die_with(parent)
    controller = controller or reachable(config.controller.host, config.controller.port)
    several = config.gateway.processes > 1
    if several and parent:  # one of several: the ports are settled, and others may hold them
        run_gateway(config, controller, index)
        return
    ports = serve_ports(config, dashboard=False)
    del ports["controller.port"]
    config = settle_metrics_ports(settle_ports(config, ports))
    (run_gateways if several else run_gateway)(config, controller)


def _check_model(config: TandemConfig) -> None:
    """Refuse a model that is not there before anything starts."""
    read_json(resolve_model(config.model.path), "config.json")


def _wait_for_workers(handle: ControllerHandle, address: str) -> None:
    view = ClusterView(address)
    try:
        with StartProgress(console).shown() as progress:
            progress.stage("starting workers")
            while not everyone_ready(handle, view, progress):
                time.sleep(POLL_INTERVAL)
    finally:
        view.close()


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
