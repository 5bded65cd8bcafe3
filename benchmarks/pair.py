"""What the proxy before vLLM's prefill/decode pair does, done by the load client.

A request goes to the prefill server first, for one token. Its answer says where the KV lies; with
that, the same prompt goes to the decode server, which fetches the KV and answers the client.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from benchmarks.stream import post_request

_FIRST_LEG: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class PairError(Exception):
    """The prefill server refused, or did not say where the KV lies."""


async def prefill_elsewhere(
    host: str, port: int, model: str, prompt: tuple[int, ...]
) -> dict[str, Any]:
    """Have the prompt computed; returns what the decode server's request must carry too.

    Raises `PairError`, `OSError`.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0,
        "ignore_eos": True,
        "kv_transfer_params": _FIRST_LEG,
    }
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(post_request(host, body))
        answer = await reader.read()
    finally:
        writer.close()
    head, _, content = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if status != [b"200"]:
        raise PairError(f"the prefill server answered {head[:60]!r} {content[:200]!r}")
    parameters = orjson.loads(content).get("kv_transfer_params")
    if not parameters:
        raise PairError("the prefill server did not say where the KV lies")
    return {"kv_transfer_params": parameters}
