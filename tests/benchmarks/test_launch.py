"""Starting a cluster: own ports, nothing but its file, and a reason when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks import launch

from tandem.core.config import TandemConfig


def test_a_cluster_that_cannot_start_says_what_it_printed(tmp_path: Path) -> None:
    config = TandemConfig.model_validate({"model": {"path": str(tmp_path / "absent")}})

    with (
        pytest.raises(launch.ClusterError, match="no such directory"),
        launch.running_cluster(config),
    ):
        pytest.fail("it started")


def test_every_server_has_a_port_of_its_own_and_the_rest_stays() -> None:
    config = TandemConfig.model_validate({"worker": {"threads": 2}})

    changed = launch._with_free_ports(config)

    ports = {changed.gateway.port, changed.gateway.grpc_port, changed.controller.port}
    assert len(ports) == 3
    assert min(ports) > 1023
    assert changed.worker == config.worker
    assert changed.gateway.router == config.gateway.router


def test_the_environment_changes_nothing_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TANDEM_WORKER__THREADS", "7")
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    environment = launch.serve_environment()

    assert "TANDEM_WORKER__THREADS" not in environment
    assert "RAY_ADDRESS" not in environment
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
