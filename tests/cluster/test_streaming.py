"""KV between a prefill and a decode worker, both in this process so that a test can see inside."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc.aio
import pytest

from local_cluster import MakeConfig
from tandem.core.config import TandemConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.decode.handoff import Handoff
from tandem.decode.worker import DecodeWorker
from tandem.engine.engine import Engine
from tandem.prefill.worker import PrefillWorker
from tandem.transfer.group import GlooGroup, LinkError
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire import request_to_submit
from tandem.worker.runtime import WorkerEndpoint

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="session")]

PROMPT = tuple(range(3, 99))  # six chunks of 16


class Pair:
    """One prefill and one decode worker."""

    def __init__(self, config: TandemConfig) -> None:
        self.prefill, self.decode = PrefillWorker("prefill-0", config), DecodeWorker("d-0", config)
        self.prefill_end, self.decode_end = self.prefill.start(), self.decode.start()
        self.need_prefill: list[str] = []
        """Why another prefill worker was asked for; the answer is always that there is none."""

    def stop(self) -> None:
        self.decode.stop()
        self.prefill.stop()

    def metric(self, name: str, **labels: str) -> float | None:
        labels = {"worker": "d-0", "role": "decode", **labels}
        return self.decode._runtime.metrics.registry.get_sample_value(name, labels)

    async def serve(self, prompt: tuple[int, ...], *, disaggregated: bool = True) -> list[int]:
        """Speak to the decode worker as a gateway does; returns the tokens of one request."""
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        request = Request("r", prompt, len(prompt), params)
        target = _target(self.prefill_end) if disaggregated else None
        tokens: list[int] = []
        async with grpc.aio.insecure_channel(self.decode_end.address) as channel:
            call: Any = worker_pb2_grpc.DecodeStub(channel).Serve()
            hello = worker_pb2.GatewayHello(
                gateway_id="test", expected_incarnation=self.decode_end.incarnation
            )
            await call.write(worker_pb2.GatewayMessage(hello=hello))
            submit = request_to_submit(request, target)
            await call.write(worker_pb2.GatewayMessage(submit=submit))
            async for message in call:
                assert not message.HasField("failed"), message
                if message.HasField("need_prefill"):
                    self.need_prefill.append(message.need_prefill.reason)
                    reassign = worker_pb2.Reassign(request_id="r", attempt=0)
                    await call.write(worker_pb2.GatewayMessage(reassign=reassign))
                for output in message.outputs.outputs:
                    tokens.extend(output.token_ids)
                    if output.finish_reason:
                        await call.done_writing()
                        return tokens
        raise AssertionError("the stream ended early")


def _target(endpoint: WorkerEndpoint) -> worker_pb2.PrefillTarget:
    return worker_pb2.PrefillTarget(
        name="prefill-0", address=endpoint.address, incarnation=endpoint.incarnation
    )


@pytest.fixture
def pair(make_config: MakeConfig) -> Iterator[Pair]:
    workers = Pair(make_config(cache={"prefix_cache": False}))
    try:
        yield workers
    finally:
        workers.stop()


async def test_the_last_chunk_is_computed_only_after_the_first_one_landed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last chunk is held back until the first has landed; without streaming this would hang."""
    first_landed = threading.Event()
    order: list[str] = []
    landed, run = Handoff.piece_landed, Engine.run

    def note_landed(self: Any, peer: Any, piece: Any) -> None:
        landed(self, peer, piece)
        order.append(f"landed {piece.start}")
        if (
            piece.start == 0
            and piece.first_layer + piece.num_layers == self._runtime.engine.spec.num_layers
        ):
            first_landed.set()

    def hold_last_chunk(self: Any, plan: Any, on_layers: Any = None) -> Any:
        if on_layers is not None and plan.chunks[0].samples:
            assert first_landed.wait(20), "the first chunk never landed: KV is not streamed"
            order.append("last chunk computed")
        return run(self, plan, on_layers)

    monkeypatch.setattr(Handoff, "piece_landed", note_landed)
    monkeypatch.setattr(Engine, "run", hold_last_chunk)
    assert len(await pair.serve(PROMPT)) == 4
    assert order.index("landed 0") < order.index("last chunk computed") < order.index("landed 80")
    exposed = pair.metric("tandem_worker_stage_seconds_count", stage="transfer_exposed")
    assert exposed == 1


async def test_a_link_that_breaks_is_rebuilt_and_nothing_is_lost(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ends alive: a new epoch, and what was not acknowledged is sent again."""
    expected = await pair.serve(PROMPT, disaggregated=False)
    send = GlooGroup.post_send
    sends: list[int] = []

    def break_once(self: Any, buffer: Any) -> Any:
        sends.append(1)
        if len(sends) == 2:  # the first is the byte that proves that the link works
            self.abort()
        return send(self, buffer)

    monkeypatch.setattr(GlooGroup, "post_send", break_once)
    assert await pair.serve(PROMPT) == expected
    assert len(sends) >= 4, "both bytes that open a link, what broke, and the same again"
    assert not pair.need_prefill, "the request never noticed"


async def test_a_link_that_never_works_costs_time_and_no_request(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await pair.serve(PROMPT, disaggregated=False)

    def break_always(self: Any, buffer: Any) -> Any:
        self.abort()
        raise LinkError("broken by the test")

    monkeypatch.setattr(GlooGroup, "post_send", break_always)
    assert await pair.serve(PROMPT) == expected
    assert len(pair.need_prefill) == 1
