"""What two workers must agree on before KV flows, and the check that they do."""

from __future__ import annotations

from typing import Literal

import torch

from tandem.core.config import TransferConfig
from tandem.core.errors import PeerMismatchError
from tandem.transfer.slices import check_ranks
from tandem.transfer.types import KVBlocks
from tandem.v1 import worker_pb2
from tandem.wire import PROTOCOL_VERSION

LAYOUT = "layer,kv,token,head,dim"
"""Order of the dimensions of a piece on the wire."""

Backend = Literal["gloo", "nccl"]


def resolve_backend(config: TransferConfig, device: torch.device) -> Backend:
    """`auto` is nccl on CUDA and gloo elsewhere."""
    if config.backend != "auto":
        return config.backend
    return "nccl" if device.type == "cuda" else "gloo"


def make_kv_spec(
    model: str,
    revision: str,
    blocks: KVBlocks,
    config: TransferConfig,
    num_kv_heads: int | None = None,
    tensor_parallel: int = 1,
) -> worker_pb2.KVSpec:
    """Our side of the hand-shake. `revision` is a digest of the model's config and weights.

    With several ranks `blocks` are one rank's, and `num_kv_heads` is the whole model's.
    """
    num_layers, _, _, block_size, heads_held, head_dim = blocks.kv.shape
    return worker_pb2.KVSpec(
        model=model,
        revision=revision,
        dtype=str(blocks.kv.dtype).removeprefix("torch."),
        layout=LAYOUT,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads or heads_held,
        head_dim=head_dim,
        block_size=block_size,
        protocol_version=PROTOCOL_VERSION,
        backend=resolve_backend(config, blocks.kv.device),
        tensor_parallel=tensor_parallel,
    )


def check_kv_spec(ours: worker_pb2.KVSpec, theirs: worker_pb2.KVSpec) -> None:
    """Raise `PeerMismatchError` naming every field that differs and both of its values.

    The number of ranks may differ, as long as the KV heads divide over each.
    """
    differences = [
        f"{field.name} is {getattr(ours, field.name)!r} here"
        f" and {getattr(theirs, field.name)!r} there"
        for field in worker_pb2.KVSpec.DESCRIPTOR.fields
        if field.name != "tensor_parallel"
        and getattr(ours, field.name) != getattr(theirs, field.name)
    ]
    if differences:
        raise PeerMismatchError("KV of the two workers does not match: " + "; ".join(differences))
    check_ranks(ours, "here")
    check_ranks(theirs, "there")
