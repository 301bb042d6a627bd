"""Bytes of cache and scratch per rank, by formula, so that the plan can price them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlacli.parallel.cuts import Range
    from mlacli.params import ContextParams

INDEX_BLOCK = 2048  # index keys that are scored at a time
KV_BLOCK = 256  # cache rows that one step of block-wise attention covers
_BYTES_PER_32 = {"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34}


def cache_row_bytes(hp: Any, cache_type: str) -> int:
    """Bytes of one token's latent row in one layer; a started q8_0 block counts whole."""
    return _row_bytes(int(hp.cache_width), cache_type)


def index_row_bytes(hp: Any, cache_type: str, layers: Range) -> int:
    """Bytes of one token's index keys in `layers`: only those that choose rows keep any."""
    if hp.sparse is None:
        return 0
    n_full = sum(hp.sparse.full[slice(*layers)])
    return int(n_full) * _row_bytes(hp.sparse.width, cache_type)


def _row_bytes(width: int, cache_type: str) -> int:
    if cache_type == "q8_0":
        return -(-width // 32) * _BYTES_PER_32["q8_0"]
    return width * _BYTES_PER_32[cache_type] // 32


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
    if hp.sparse is not None:
        attention = max(attention, _sparse_values(hp, n, h))
    ffn = n * 3 * max((*hp.F, *(x * max(1, hp.n_shared) for x in hp.f), 1))
    ffn += 2 * n * hp.d + 2 * n * hp.E
    logits = 2 * max(vocab[1] - vocab[0], hp.n_vocab if vocab[1] and n_ranks > 1 else 0)
    return int(4 * (stream + max(attention, ffn) + logits))


def _sparse_values(hp: Any, n: int, h: int) -> int:
    """Peak values (of four bytes) of choosing rows, or of attending to those of one token.

    Choosing holds the index queries, a block's scores three times, and per candidate its score
    twice, its position twice and its rank twice, the last four in eight bytes.
    """
    ix, candidates = hp.sparse, hp.sparse.top_k + INDEX_BLOCK
    choosing = n * (hp.q + ix.n_heads * ix.width) + 3 * n * INDEX_BLOCK + 10 * n * candidates
    attending = n * h * (2 * hp.cache_width + 2 * hp.r + hp.k + hp.p)
    return int(max(choosing, attending + ix.top_k * (2 * hp.cache_width + 3 * h)))
