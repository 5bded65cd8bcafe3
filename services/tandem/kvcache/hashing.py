"""Names for full KV blocks: each hash covers a block's tokens and everything before them.

Two blocks have equal hashes only if the sequences up to their ends are equal, and salt and model
too, because these enter at the root of the chain. Partial blocks have no hash. Pure functions.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16


def chain_hashes(
    token_ids: Sequence[int], block_size: int, salt: str = "", model_key: str = ""
) -> list[bytes]:
    """Return the 16-byte hashes of the full blocks of `token_ids`, first block first."""
    hashes: list[bytes] = []
    extend_hashes(hashes, token_ids, block_size, salt, model_key)
    return hashes


def extend_hashes(
    hashes: list[bytes],
    token_ids: Sequence[int],
    block_size: int,
    salt: str = "",
    model_key: str = "",
) -> None:
    """Append to `hashes` those of the full blocks of `token_ids` that it does not cover yet.

    `hashes` must come from an earlier call with the same first tokens, salt and model key.
    """
    num_full = len(token_ids) // block_size
    if len(hashes) >= num_full:
        return
    parent = hashes[-1] if hashes else _root(salt, model_key)
    pack_block = struct.Struct(f"<{block_size}I").pack
    for index in range(len(hashes), num_full):
        tokens = token_ids[index * block_size : (index + 1) * block_size]
        parent = blake2b(parent + pack_block(*tokens), digest_size=HASH_BYTES).digest()
        hashes.append(parent)


def _root(salt: str, model_key: str) -> bytes:
    """The parent of every first block. The length in front keeps (salt, model) unambiguous."""
    salt_bytes, model_bytes = salt.encode(), model_key.encode()
    root = struct.pack("<Q", len(salt_bytes)) + salt_bytes + model_bytes
    return blake2b(root, digest_size=HASH_BYTES).digest()
