"""Where settings come from, which source wins, and what a wrong one is answered with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tandem.commands.show_config import render_reference
from tandem.config import (
    FLAGS,
    allowed,
    dump_config,
    environment_variable,
    load_config,
    walk_settings,
)
from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, _ in walk_settings():
        monkeypatch.delenv(environment_variable(name), raising=False)


def write(directory: Path, text: str) -> str:
    path = directory / "tandem.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_without_any_source_everything_is_default() -> None:
    assert load_config() == TandemConfig()


def test_flags_beat_environment_beats_file_beats_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(
        tmp_path, "gateway: {port: 1001, grpc_port: 1002, max_n: 3, router: {policy: round_robin}}"
    )
    monkeypatch.setenv("TANDEM_GATEWAY__PORT", "2001")
    monkeypatch.setenv("TANDEM_GATEWAY__GRPC_PORT", "2002")
    gateway = load_config(file, {"gateway.port": 3001}).gateway
    assert (gateway.port, gateway.grpc_port, gateway.max_n) == (3001, 2002, 3)
    assert gateway.router.policy == "round_robin"
    assert gateway.max_attempts == TandemConfig().gateway.max_attempts


def test_the_environment_reaches_nested_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_GATEWAY__ROUTER__POLICY", "least_loaded")
    monkeypatch.setenv("TANDEM_LOG_LEVEL", "debug")
    config = load_config()
    assert config.gateway.router.policy == "least_loaded"
    assert config.log_level == "debug"


def test_variables_that_kubernetes_makes_for_services_are_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TANDEM_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("TANDEM_GATEWAY_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("TANDEM_GATEWAY_PORT", "tcp://10.0.0.1:8000")
    assert load_config() == TandemConfig()


def test_what_is_dumped_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config("", {"gateway.port": 1234, "worker.disaggregated": False})
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("file", "environment", "flags", "message"),
    [
        ("", {}, {"gateway.port": 70000},
         "gateway.port must be a whole number at least 0 and at most 65535, got 70000 "
         "(from --port)"),
        ("", {"TANDEM_CONTROLLER__DECODE_WORKERS": "0"}, {},
         "controller.decode_workers must be a whole number at least 1, got '0' "
         "(from TANDEM_CONTROLLER__DECODE_WORKERS)"),
        ("worker: {peer_timeout: 0}", {}, {},
         "worker.peer_timeout must be a number above 0, got 0 (from FILE)"),
        ("", {}, {"model.dtype": "int8"},
         "model.dtype must be one of auto, float32, bfloat16, float16, got 'int8' (from --dtype)"),
        ("cache: {prefix_cache: perhaps}", {}, {},
         "cache.prefix_cache must be true or false, got 'perhaps' (from FILE)"),
        ("gateway: {prot: 1}", {}, {},
         "gateway.prot (from FILE): there is no such setting; did you mean gateway.port?"),
        ("gateway: 7", {}, {}, "gateway must be a section with settings, got 7 (from FILE)"),
        ("", {}, {"gateway.max_n": "many"},
         "gateway.max_n must be a whole number at least 1, got 'many' (from --set gateway.max_n)"),
        ("", {"TANDEM_MODEL": "/models/x"}, {},
         "TANDEM_MODEL (environment) must be a JSON object; a single setting is named like "
         "TANDEM_GATEWAY__PORT"),
        ("- a\n- list", {}, {},
         "FILE (--config): expected sections and settings, found ['a', 'list']"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_allowed_and_its_source(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    environment: dict[str, str],
    flags: dict[str, object],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = write(tmp_path, file) if file else ""
    with pytest.raises(ConfigError) as caught:
        load_config(path, flags)
    assert caught.value.message == message.replace("FILE", path)


def test_every_error_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("", {"gateway.port": -1, "cache.block_size": 0})
    assert len(caught.value.message.splitlines()) == 2


def test_a_missing_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml .*cannot be read: No such file"):
        load_config(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(write(tmp_path, "gateway: [1,"))


def test_every_flag_belongs_to_a_setting_and_every_setting_is_described() -> None:
    settings = dict(walk_settings())
    assert set(FLAGS) <= set(settings)
    undescribed = [name for name, field in settings.items() if not field.description]
    assert undescribed in ([], ["log_level"])
    for field in settings.values():
        assert allowed(field)


def test_the_documented_settings_are_those_of_the_code() -> None:
    assert DOCS.read_text(encoding="utf-8") == render_reference()
    assert len(re.findall(r"^\| `", render_reference(), re.MULTILINE)) == len(list(walk_settings()))
