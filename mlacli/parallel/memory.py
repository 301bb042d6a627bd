"""Bytes of cache and scratch per rank, by formula, so that the plan can price them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlacli.parallel.cuts import Range
    from mlacli.params import ContextParams

KV_BLOCK = 256  # cache rows that one step of block-wise attention covers
_BYTES_PER_32 = {"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34}


def cache_row_bytes(hp: Any, cache_type: str) -> int:
    """Bytes of one token's latent row in one layer; a started q8_0 block counts whole."""
    if cache_type == "q8_0":
        return -(-int(hp.cache_width) // 32) * _BYTES_PER_32["q8_0"]
    return int(hp.cache_width) * _BYTES_PER_32[cache_type] // 32


def scratch_bytes(hp: Any, context: ContextParams, heads: Range, vocab: Range, n_ranks: int) -> int:
    """Peak activation bytes of one ubatch: the larger of the attention and FFN phases, plus logits.

    Float32 throughout; n tokens, h local heads. Attention holds queries, one block of scores and
    its exponentials, the accumulator twice, one block of expanded keys and values.
    """
    n, h = context.n_ubatch, heads[1] - heads[0]
    width = max(hp.r, hp.k + hp.p, hp.v)
    stream = 4 * n * hp.d
    attention = n * (hp.q + hp.r + hp.p) + n * h * (2 * (hp.k + hp.p) + 3 * width)
    attention += 2 * n * h * KV_BLOCK + KV_BLOCK * h * (hp.k + hp.p + hp.v)
    ffn = n * 3 * max((*hp.F, *(x * max(1, hp.n_shared) for x in hp.f), 1))
    ffn += 2 * n * hp.d + 2 * n * hp.E
    logits = 2 * max(vocab[1] - vocab[0], hp.n_vocab if vocab[1] and n_ranks > 1 else 0)
    return int(4 * (stream + max(attention, ffn) + logits))
