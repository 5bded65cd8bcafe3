"""Whose account a request is on, and what its priority may be called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem.core.config import GatewayConfig, SchedulerConfig
from tandem.core.errors import ConfigError
from tandem.gateway.http.app import create_app
from tandem.gateway.metrics import GatewayMetrics
from tandem.gateway.server import make_service
from tandem.gateway.tenants import Tenants, load_tenants


@pytest.mark.parametrize(
    ("authorization", "claimed", "tenant"),
    [
        ("Bearer sk-1", "", "acme"),
        ("bearer  sk-1 ", "", "acme"),
        ("Bearer sk-1", "rival", "acme"),  # a key's own account cannot be talked away
        ("Bearer sk-2", "rival", "rival"),
        ("", "rival", "rival"),
        ("Basic c2s=", "", ""),
        ("Bearer ", "", ""),
        ("", "", ""),
    ],
)
def test_tenant_of_a_request(authorization: str, claimed: str, tenant: str) -> None:
    assert Tenants({"sk-1": "acme"}).of(authorization, claimed) == tenant


def test_unnamed_keys_are_accounts_of_their_own_and_stay_secret() -> None:
    tenants = Tenants()
    one, other = (tenants.of(f"Bearer {key}", "") for key in ("sk-secret-1", "sk-secret-2"))
    assert one != other
    assert one == tenants.of("Bearer sk-secret-1", "")
    assert "secret" not in one


def test_the_file_maps_keys_to_tenants(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("sk-1: acme\nsk-2: acme\n")
    assert load_tenants(str(file)).of("Bearer sk-2", "") == "acme"
    assert load_tenants("").of("Bearer sk-2", "me") == "me"


@pytest.mark.parametrize("content", ["- sk-1", "sk-1: 5", "{", "sk-1: {tenant: a}", ""])
def test_a_bad_file_is_refused_without_showing_a_key(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match="api_keys_file") as raised:
        load_tenants(str(file))
    assert str(file) in str(raised.value)
    assert "sk-1" not in str(raised.value)
    with pytest.raises(ConfigError, match="No such file"):
        load_tenants(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("priority", "number"), [("premium", -10), ("batch", 10), (3, 3), (None, 0)]
)
async def test_priorities_by_name(
    dispatcher: Any, metrics: GatewayMetrics, priority: Any, number: int
) -> None:
    config = GatewayConfig(port=0, grpc_port=0)
    service = make_service(config, dispatcher, metrics, SchedulerConfig())
    await service.start()
    transport = httpx.ASGITransport(create_app(service, config, metrics))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        body = {"prompt": "a", "max_tokens": 1, "priority": priority}
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        refused = await client.post("/v1/completions", json={**body, "priority": "vip"})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "priority"
        assert "premium, standard, batch" in refused.json()["error"]["message"]
    assert [request.priority for request in dispatcher.requests] == [number]
    await service.close()
