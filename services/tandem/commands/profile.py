"""`tandem profile`: what iterations and links of a running cluster cost, into a file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from tandem.commands.options import ControllerAddress, takes_config
from tandem.commands.terminal import errors, reachable
from tandem.core.config import TandemConfig
from tandem.profiler import find_target, measure_profile
from tandem.simulator.profile import save_profile


@takes_config
def profile(
    config: TandemConfig,
    out: Annotated[Path, typer.Option(help="where the profile goes, YAML or JSON")],
    controller: ControllerAddress = "",
    gateway: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="HTTP address of a gateway", show_default=False)
    ] = "",
    name: Annotated[str, typer.Option(help="name of the profile; empty: that of the file")] = "",
) -> None:
    """Measure a running cluster of one decode and at most one prefill worker.

    Give it the configuration that the cluster was started with, and the cluster to itself.
    """
    at = controller or reachable(config.controller.host, config.controller.port)
    door = gateway or reachable(config.gateway.host, config.gateway.port)
    target = find_target(config, at, door)
    measured = asyncio.run(measure_profile(target, name or out.stem, errors.print))
    save_profile(measured, out)
    if measured.measured is not None:
        typer.echo(
            f"{out}: {measured.measured.samples} measurements, fitted within "
            f"{measured.measured.fit_error_p50:.1%} (median), "
            f"{measured.measured.fit_error_max:.1%} (worst)"
        )
