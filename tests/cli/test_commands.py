"""The commands that need no cluster, as a person runs them."""

from __future__ import annotations

import json

import pytest
import yaml

from tandem.config import FLAGS

from .conftest import Run


def test_help_lists_the_commands_and_serve_every_flag(run_tandem: Run) -> None:
    overview = run_tandem("--help")
    assert overview.returncode == 0
    for command in ("serve", "up", "down", "gateway", "status", "chat", "call", "config"):
        assert f" {command} " in overview.stdout
    serve = run_tandem("serve", "--help", COLUMNS="200").stdout
    for flags in FLAGS.values():
        for flag in flags.split("/"):
            assert f"{flag} " in serve


def test_config_prints_what_is_in_effect(run_tandem: Run) -> None:
    result = run_tandem(
        "config", "--no-disaggregation", "--set", "gateway.max_n=3", TANDEM_GATEWAY__PORT="9001"
    )
    config = yaml.safe_load(result.stdout)
    assert config["worker"]["disaggregated"] is False
    assert config["gateway"]["max_n"] == 3
    assert config["gateway"]["port"] == 9001


def test_a_wrong_setting_is_one_line_and_exit_code_2(run_tandem: Run) -> None:
    result = run_tandem("serve", "--port", "70000")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: gateway.port must be a whole number at least 0 and at most 65535, got 70000 "
        "(from --port)"
    ]


@pytest.mark.parametrize("flag", ["--port", "--grpc-port", "--controller-port", "--dashboard-port"])
def test_a_busy_port_is_told_before_anything_starts(
    run_tandem: Run, busy_port: int, flag: str
) -> None:
    free = ["--port", "0", "--grpc-port", "0", "--controller-port", "0", "--dashboard-port", "0"]
    result = run_tandem("serve", *free, flag, str(busy_port))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.strip() == (
        f"error: port {busy_port} ({flag}) is in use by another program; choose another with {flag}"
    )


def test_one_port_for_two_servers_is_refused(run_tandem: Run, closed_port: int) -> None:
    result = run_tandem("serve", "--port", str(closed_port), "--grpc-port", str(closed_port))
    assert result.returncode == 2
    assert f"gateway.port and gateway.grpc_port are both {closed_port}" in result.stderr


def test_a_model_that_is_not_there_is_told_before_anything_starts(run_tandem: Run) -> None:
    ports = ["--port", "0", "--grpc-port", "0", "--controller-port", "0", "--dashboard-port", "0"]
    result = run_tandem("serve", *ports, "--model", "/nonesuch")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.strip() == "error: model: no such directory: /nonesuch"


def test_status_as_json_has_the_promised_fields(run_tandem: Run, scripted_controller: str) -> None:
    result = run_tandem("status", "--json", "--controller", scripted_controller)
    assert result.returncode == 0
    status = json.loads(result.stdout)
    first, second = status["workers"]
    expected = {
        "name": "prefill-0",
        "role": "prefill",
        "state": "ready",
        "pid": 4242,
        "node": "10.0.0.7",
        "device": "cpu",
        "incarnation": 17,
        "running": 3,
        "waiting": 2,
        "blocks_used": 10,
        "blocks_cached": 20,
        "blocks_total": 64,
        "links": 1,
        "tokens_per_second": 123.4,
    }
    assert {name: first[name] for name in expected} == expected
    assert (second["state"], second["restarts"]) == ("dead", 2)
    assert second["detail"] == "its process ended (system error)"


def test_the_status_table_is_readable_in_80_columns(
    run_tandem: Run, scripted_controller: str
) -> None:
    result = run_tandem("status", "--controller", scripted_controller, COLUMNS="80")
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if line.startswith("prefill-0"))
    assert row.split() == ["prefill-0", "prefill", "ready", "4242", "cpu", "3", "2",
                           "10/20/64", "1", "123.4"]  # fmt: skip
    assert "decode-0: restarts: 2, its process ended (system error)" in result.stdout


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("status", "--controller"), "no Tandem controller answers at"),
        (("call", "--address"), "no gRPC server answers at"),
    ],
)
def test_nothing_listening_is_said_plainly(
    run_tandem: Run, closed_port: int, command: tuple[str, str], says: str
) -> None:
    result = run_tandem(*command, f"127.0.0.1:{closed_port}")
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {says} 127.0.0.1:{closed_port}")
    assert "Traceback" not in result.stderr


def test_chat_with_nobody_says_so(run_tandem: Run, closed_port: int) -> None:
    result = run_tandem("chat", "--url", f"http://127.0.0.1:{closed_port}")
    assert result.returncode == 1
    assert "nothing is listening at" in result.stderr
