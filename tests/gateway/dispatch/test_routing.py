"""What the router is told of the cluster decides where a prompt goes."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tandem.core.config import RouterConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.gateway.dispatch.flight import Flight
from tandem.gateway.dispatch.routing import Routing
from tandem.gateway.dispatch.view import Member, Membership
from tandem.gateway.interfaces import ModelInfo


class TwoStreams:
    """A `DecodePool` whose streams are the workers' names."""

    accepting = ("a", "b")

    def stream(self, name: str) -> str:
        return name


async def place(prefix_cache: bool) -> list[str]:
    """Where two requests of the same long prompt go, one after the other."""
    routing = Routing(RouterConfig(prefix_weight=2.0), cast("Any", TwoStreams()), 0)
    model = ModelInfo("m", "/m", 4096, 16, 320, prefix_cache=prefix_cache)
    decode = {name: Member(name, f"{name}:1", 1) for name in TwoStreams.accepting}
    routing.set_membership(Membership({}, decode, model))
    routing.refresh()
    taken = []
    for number in range(2):
        request = Request(f"r{number}", tuple(range(1600)), 1600, SamplingParams(max_tokens=1))
        flight = Flight(request, request.request_id, 4096, cast("Any", None))
        taken.append(cast("str", routing.assign(flight, avoid_strictly=False).stream))
        routing.first_token(flight, is_local=False)
    return taken


@pytest.mark.parametrize("prefix_cache", [True, False])
async def test_a_prompt_follows_its_prefix_only_where_workers_keep_it(prefix_cache: bool) -> None:
    first, second = await place(prefix_cache)
    assert (first == second) is prefix_cache
