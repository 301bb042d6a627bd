"""Which form attention takes and what a layer's cache holds for it, from the settings alone.

Ops, cache, plan and reports share them, so that none can disagree. Knows no backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mlacli.params import CacheType, ContextParams

EXPAND_FROM = 128  # tokens in a ubatch from which -mla 2 and 3 expand keys and values (B 3.8)
LEAST_SCORES_MIB = 128  # -amb below it is lifted, as in ik_llama.cpp
_BYTES_PER_32 = {"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34}


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """What keys and values a query meets, and how its softmax is taken.

    per-head: as cached for each head; absorbed: latent rows, the query brought into their space;
    expanded: built per head from latent rows. block-wise: running maximum and sum, bounded scratch;
    whole-matrix: all scores of some heads at once. sparse: a token's chosen rows, absorbed.
    """

    keys: Literal["per-head", "absorbed", "expanded", "sparse"]
    blockwise: bool

    def __str__(self) -> str:
        if self.keys == "sparse":
            return "sparse absorbed"
        return f"{self.keys} {'block-wise' if self.blockwise else 'whole-matrix'}"


SPARSE = AttentionForm("sparse", False)  # of layers with an indexer, once n_kv exceeds its top_k


def attention_form(context: ContextParams, n: int) -> AttentionForm:
    """The form in which a ubatch of `n` tokens attends to all rows."""
    if context.mla == 0:
        return AttentionForm("per-head", context.flash_attn)
    if context.mla == 1 or not context.flash_attn:
        return AttentionForm("absorbed", context.flash_attn)
    if n >= EXPAND_FROM:
        return AttentionForm("expanded", True)
    return AttentionForm("absorbed", context.mla == 3)


def forms_up_to(context: ContextParams, n: int) -> tuple[AttentionForm, ...]:
    """The forms that ubatches of at most `n` tokens take, that of `n` first."""
    return tuple(dict.fromkeys((attention_form(context, n), attention_form(context, 1))))


def is_blockwise(context: ContextParams) -> bool:
    """Whether no ubatch ever holds a whole score matrix."""
    return all(form.blockwise for form in forms_up_to(context, EXPAND_FROM))


def attention_text(context: ContextParams) -> str:
    """Which form prefill and decode will take, and what bounds or rounds them, in words."""
    first, *short = forms_up_to(context, context.n_ubatch)
    rest = f" ({short[0]} under {EXPAND_FROM} tokens)" if short else ""
    gap = f"; -gap {context.graph_attn_precision}" if context.flash_attn else ""
    amb = "" if is_blockwise(context) else f"; -amb {context.attention_max_batch}"
    return f"prefill {first}{rest}, decode {attention_form(context, 1)}{gap}{amb}"


def has_values(context: ContextParams) -> bool:
    """Whether V has a cache of its own, of type -ctv; else the latent rows hold it too."""
    return context.mla == 0 or (context.mla == 1 and not context.flash_attn)


@dataclass(frozen=True, slots=True)
class CachePart:
    """`width` values a token and layer under `name` in ops.LayerCache."""

    name: Literal["rows", "columns", "keys", "values"]
    width: int
    cache_type: CacheType
    transposed: bool = False  # [width, n_ctx] in memory

    @property
    def token_bytes(self) -> int:
        return row_bytes(self.width, self.cache_type)


def row_bytes(width: int, cache_type: str) -> int:
    """Bytes of `width` cached values of one token; a started q8_0 block counts whole."""
    if cache_type == "q8_0":
        return -(-width // 32) * _BYTES_PER_32["q8_0"]
    return width * _BYTES_PER_32[cache_type] // 32


def cache_parts(hp: Any, context: ContextParams) -> tuple[CachePart, ...]:
    """What each layer's cache holds."""
    k_type, v_type = context.cache_type_k, context.cache_type_v
    if context.mla == 0:
        keys = CachePart("keys", hp.H * (hp.k + hp.p), k_type)
        return keys, CachePart("values", hp.H * hp.v, v_type)
    rows = CachePart("rows", hp.cache_width, k_type)
    if has_values(context):
        return rows, CachePart("columns", hp.r, v_type, transposed=True)
    return (rows,)


def heads_at_once(context: ContextParams, h: int, n: int, n_kv: int) -> int:
    """How many of h heads have their whole score matrix [n, n_kv] in memory together (-amb)."""
    bound = context.attention_max_batch << 20
    return h if bound == 0 else max(1, min(h, bound // (4 * n * n_kv)))
