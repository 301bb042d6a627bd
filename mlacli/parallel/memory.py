"""Bytes of cache and scratch per rank, by formula, so that the plan can price them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mlacli.attention_forms import (
    EXPAND_FROM,
    AttentionForm,
    cache_parts,
    forms_up_to,
    row_bytes,
)

if TYPE_CHECKING:
    from mlacli.parallel.cuts import Range
    from mlacli.parallel.shards import Shard
    from mlacli.params import ContextParams

INDEX_BLOCK = 2048  # index keys that are scored at a time
LOGIT_BYTES = 256 << 20  # of the logits that a step leaves at most, but for one row
KV_BLOCK = 256  # cache rows that one step of block-wise attention covers


def cache_row_bytes(hp: Any, context: ContextParams) -> int:
    """Bytes of one token in one layer's cache."""
    return sum(part.token_bytes for part in cache_parts(hp, context))


def index_row_bytes(hp: Any, cache_type: str, layers: Range) -> int:
    """Bytes of one token's index keys in `layers`: only those that choose rows keep any."""
    if hp.sparse is None:
        return 0
    n_full = sum(hp.sparse.full[slice(*layers)])
    return int(n_full) * row_bytes(hp.sparse.width, cache_type)


def most_logit_rows(n_vocab: int) -> int:
    """Tokens of a ubatch that may want logits: the engine cuts it, the plan pays for them."""
    return max(1, LOGIT_BYTES // (4 * n_vocab))


def scratch_bytes(
    hp: Any, context: ContextParams, n_ctx: int, heads: Range, vocab: Range, n_ranks: int
) -> int:
    """Peak activation bytes of a ubatch on a CPU: the larger of attention and FFN, plus logits.

    Float32 throughout; n tokens, h local heads.
    """
    n, h = min(context.n_ubatch, n_ctx), heads[1] - heads[0]
    stream = 4 * n * hp.d
    attention = max(
        _attention(hp, context, form, min(n, EXPAND_FROM - 1) if i else n, n_ctx, h)
        for i, form in enumerate(forms_up_to(context, n))
    )
    if hp.sparse is not None:
        attention = max(attention, _sparse_values(hp, n, h))
    ffn = n * 3 * max((*hp.F, *(x * max(1, hp.n_shared) for x in hp.f), 1))
    ffn += 2 * n * hp.d + 2 * n * hp.E
    logits = 2 * max(vocab[1] - vocab[0], hp.n_vocab if vocab[1] and n_ranks > 1 else 0)
    return int(4 * (stream + max(attention, ffn) + logits))


def _attention(
    hp: Any, context: ContextParams, form: AttentionForm, n: int, n_ctx: int, h: int
) -> int:
    """Values held at once while n tokens attend in `form` to a full cache.

    The mirrored products, the queries as they came and as this form takes them, scores, the
    accumulator before and after a block with what is added, one block of keys and values.
    """
    absorbed = form.keys == "absorbed"
    key, value = (hp.r + hp.p, hp.r) if absorbed else (hp.k + hp.p, hp.v)
    held = n * (hp.q + 2 * (hp.r + hp.p)) + n * h * (hp.k + 2 * hp.p)
    held += n * h * (key + 3 * value + (hp.r if absorbed else 0))
    rows = 0 if form.keys == "per-head" else hp.r + hp.p
    block = KV_BLOCK * 3 * (rows + (0 if absorbed else h * (key + value)))
    return int(held + block + _scores(context, form, n, n_ctx, h))


def _scores(context: ContextParams, form: AttentionForm, n: int, n_ctx: int, h: int) -> int:
    """A block's scores with their f16 and rounded copies; or what -amb bounds, and a block.

    The most over all depths up to n_ctx: while few rows are cached, more heads stand together.
    """
    block = 5 * n * KV_BLOCK // 2
    if form.blockwise:
        return h * block
    one_head = n * n_ctx
    bound = (context.attention_max_batch << 20) // 4 or h * one_head
    heads = min(h, max(1, bound // (n * KV_BLOCK)))
    return min(h * one_head, max(one_head, bound)) + heads * block


def _sparse_values(hp: Any, n: int, h: int) -> int:
    """Peak values (of four bytes) of choosing rows, or of attending to those of one token.

    Choosing holds the index queries, a block's scores three times, and per candidate its score
    twice, its position twice and its rank twice, the last four in eight bytes.
    """
    ix, candidates = hp.sparse, hp.sparse.top_k + INDEX_BLOCK
    choosing = n * (hp.q + ix.n_heads * ix.width) + 3 * n * INDEX_BLOCK + 10 * n * candidates
    attending = n * h * (2 * hp.cache_width + 2 * hp.r + hp.k + hp.p)
    return int(max(choosing, attending + ix.top_k * (2 * hp.cache_width + 3 * h)))


def active_elements(shard: Shard, hp: Any) -> float:
    """Weights of a shard that one token is multiplied with."""
    if shard.tensor == "token_embd.weight":
        return 0.0
    used = hp.routing.n_used / hp.E if "_exps." in shard.tensor else 1.0
    return math.prod(shard.shape) * used
