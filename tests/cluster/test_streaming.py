"""Promise 3: KV of the first chunk is in the decode worker's blocks before the last is computed."""

from __future__ import annotations

import threading

import grpc.aio
import pytest

from local_cluster import MakeConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.decode.handoff import Handoff
from tandem.decode.worker import DecodeWorker
from tandem.engine.engine import Engine
from tandem.prefill.worker import PrefillWorker
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire import request_to_submit

pytestmark = pytest.mark.cluster

PROMPT = tuple(range(3, 99))  # six chunks of 16


async def test_the_last_chunk_is_computed_only_after_the_first_one_landed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last chunk is held back until the first has landed; without streaming this would hang."""
    first_landed = threading.Event()
    order: list[str] = []
    landed, run = Handoff.piece_landed, Engine.run

    def note_landed(self, peer, piece):
        landed(self, peer, piece)
        order.append(f"landed {piece.start}")
        if (
            piece.start == 0
            and piece.first_layer + piece.num_layers == self._runtime.engine.spec.num_layers
        ):
            first_landed.set()

    def hold_last_chunk(self, plan, on_layers=None):
        if on_layers is not None and plan.chunks[0].samples:
            assert first_landed.wait(20), "the first chunk never landed: KV is not streamed"
            order.append("last chunk computed")
        return run(self, plan, on_layers)

    monkeypatch.setattr(Handoff, "piece_landed", note_landed)
    monkeypatch.setattr(Engine, "run", hold_last_chunk)
    config = make_config()
    prefill, decode = PrefillWorker("prefill-0", config), DecodeWorker("decode-0", config)
    prefill_end, decode_end = prefill.start(), decode.start()
    try:
        output = await _serve_one(prefill_end, decode_end)
        metrics = decode._runtime.metrics.registry
        labels = {"worker": "decode-0", "role": "decode", "stage": "transfer_exposed"}
        assert metrics.get_sample_value("tandem_worker_stage_seconds_count", labels) == 1
    finally:
        decode.stop()
        prefill.stop()
    assert len(output) == 4
    assert order.index("landed 0") < order.index("last chunk computed") < order.index("landed 80")


async def _serve_one(prefill_end, decode_end) -> list[int]:
    """Speak to the decode worker as a gateway does."""
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    target = worker_pb2.PrefillTarget(
        name="prefill-0", address=prefill_end.address, incarnation=prefill_end.incarnation
    )
    tokens: list[int] = []
    async with grpc.aio.insecure_channel(decode_end.address) as channel:
        call = worker_pb2_grpc.DecodeStub(channel).Serve()
        hello = worker_pb2.GatewayHello(
            gateway_id="test", expected_incarnation=decode_end.incarnation
        )
        await call.write(worker_pb2.GatewayMessage(hello=hello))
        submit = request_to_submit(Request("r", PROMPT, len(PROMPT), params), target)
        await call.write(worker_pb2.GatewayMessage(submit=submit))
        async for message in call:
            for output in message.outputs.outputs:
                tokens.extend(output.token_ids)
                if output.finish_reason:
                    await call.done_writing()
                    call.cancel()
                    return tokens
    raise AssertionError("the stream ended early")
