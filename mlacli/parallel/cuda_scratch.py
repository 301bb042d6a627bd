"""Scratch of a CUDA rank: what its ops take from the arena beside weights and cache.

A step's temporaries lie there until its half layer (attention | feed-forward) ends, and the same
bytes serve the next one, so a step takes the most of all halves and of the logits. `Taken` and
`Values` take buffers as backends/cuda_ops.py does, function by function; tests/ops/
test_cuda_scratch.py holds both together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlacli import expanded_sizes
from mlacli.attention_forms import EXPAND_FROM
from mlacli.expanded_sizes import Sizes
from mlacli.parallel.cuda_sizes import (
    FEW,
    PLAIN_SPLITS,
    Sums,
    bucket,
    most_score_bytes,
    on_tensor_cores,
    slot_tile,
    stays_plain,
    unpacked_bytes,
    unpacked_experts,
    unpacked_product_bytes,
)
from mlacli.parallel.host_stream import READ_ONCE, SLOTS, Stored, is_routed, ring_slot_bytes
from mlacli.parallel.memory import most_logit_rows

if TYPE_CHECKING:
    from mlacli.parallel.shards import Shard
    from mlacli.params import ContextParams

MOST_SM = 192  # of any GPU so far; split attention keeps a part for each
_ALIGN = 256  # of every buffer
_SAMPLER = 64 * 4 + 64 * 8  # ring and chain: backends/cuda_sampling.py
_GROUP = 32  # queries, of a token and head each, that a CTA of split attention takes


@dataclass(frozen=True, slots=True)
class Weight:
    """What of a weight decides on the buffers of its products."""

    shape: tuple[int, ...]
    tiled: bool
    f32: bool
    nbytes: int = 0  # in host memory
    unpacks: bool = False  # in parts, for many tokens: backends/cuda_raw.py

    @property
    def rows(self) -> int:
        return self.shape[-2]


Layer = Mapping[str, Weight]


class CudaScratch:
    """The scratch of one rank, by context size: asked again and again for the largest that fits."""

    def __init__(
        self, hp: Any, context: ContextParams, shards: Iterable[Shard], capability: int,
        sums: Sums,
    ) -> None:  # fmt: skip
        """`shards` of the rank, on a device of this compute capability."""
        self.hp, self.context, self.capability = hp, context, capability
        self.sums, self.n_ranks = sums, sums.n_ranks
        layers: dict[int | None, dict[str, Weight]] = {}
        routed: dict[int | None, list[Shard]] = {}
        for shard in shards:
            tiled = capability >= 80 and shard.tiled
            weight = Weight(
                shard.shape, tiled, shard.qtype.name == "F32",
                shard.bytes_on("cuda") if shard.host else 0,
                capability >= 80 and not (tiled or stays_plain(shard.tensor, shard.qtype)),
            )  # fmt: skip
            layers.setdefault(shard.layer, {})[_short_name(shard.tensor)] = weight
            if is_routed(shard.tensor):
                routed.setdefault(shard.layer, []).append(shard)
        travelling = [
            [Stored(s.shape, s.qtype, capability >= 80 and s.tiled, s.skip) for s in layer]
            for layer in routed.values() if any(s.host for s in layer)
        ]  # fmt: skip
        self._ring = SLOTS * ring_slot_bytes(travelling)  # cuda_host_experts
        self._output = layers.pop(None, {}).get("output")
        different = {tuple(sorted(layer.items(), key=lambda x: x[0])) for layer in layers.values()}
        self._layers = [dict(layer) for layer in different]
        self._by_tokens: dict[int, int] = {}  # of what doesn't depend on the context

    def nbytes(self, n_ctx: int) -> int:
        """Bytes at most of any step in a context of `n_ctx`."""
        n = min(self.context.n_ubatch, n_ctx)
        if n not in self._by_tokens:
            self._by_tokens[n] = max(self._feed_forward(n), self._logits(n))
        attention = max((self._attention(layer, n, n_ctx) for layer in self._layers), default=0)
        return self._kept(n) + max(attention, self._by_tokens[n])

    def outside(self, n_ctx: int) -> int:
        """What of it is no part of the rank's arena."""
        return self.sums.outside(min(self.context.n_ubatch, n_ctx), self.hp.d)

    def _kept(self, n: int) -> int:
        """What outlives a half layer: see Place, take_buffers of the ops, and the collectives."""
        hp, kept = self.hp, Taken(n)
        kept.take(3)  # tokens, positions, wanted rows
        if hp.sparse is not None:
            kept.take(hp.sparse.top_k)
        kept.take(hp.p // 2)  # cos and sin
        kept.take(hp.p // 2)
        kept.take(hp.d)  # the residual stream
        kept.nbytes += self._ring
        kept.nbytes += self.sums.inside(n, hp.d) + self.sums.outside(n, hp.d)
        return kept.nbytes + 4 * int(hp.p) + _SAMPLER + 4 * _ALIGN  # frequencies; a counter

    # ---- attention --------------------------------------------------------------------------

    def _attention(self, layer: Layer, n: int, n_ctx: int) -> int:
        """The most of all forms that steps of up to n tokens take."""
        if "attn_output" not in layer:
            return 0
        half = self.context.graph_attn_precision == "f16"
        sizes = self._sizes(layer)
        asked = self.context.mla in (2, 3) and n >= EXPAND_FROM and half
        expands = asked and expanded_sizes.takes(self.capability, sizes)
        chooses = self.hp.sparse is not None and n_ctx > self.hp.sparse.top_k
        cases = {(n, expands, False), (min(n, FEW), False, False)}
        if expands:
            cases.add((bucket(EXPAND_FROM - 1, n), False, False))
        if chooses:
            cases |= {(n, False, True), (min(n, FEW), False, True)}
        return max(self._attends(layer, *case, n_ctx) for case in cases)

    def _attends(self, layer: Layer, n: int, expands: bool, chooses: bool, n_ctx: int) -> int:
        """parts.queries, Attention.choose and .attend, and the product that follows."""
        hp, taken, sizes = self.hp, Taken(n), self._sizes(layer)
        x = self._normed(taken, hp.d)
        first = layer["attn_q_a" if "attn_q_a" in layer else "attn_q"]
        taken.take(first.rows)
        taken.take(hp.r + hp.p)
        x.products(first, layer["attn_kv_a_mqa"])
        if "attn_q_a" in layer:
            q_a = self._normed(taken, hp.q)
            if "indexer_attn_k" in layer:
                self._index(layer, x, q_a, chooses, n_ctx)
            taken.take(layer["attn_q_b"].rows)
            q_a.products(layer["attn_q_b"])
        taken.near(layer["attn_k_b"], layer["attn_v_b"])
        o = Values(taken, sizes.h * sizes.v)
        if expands:
            taken.nbytes += expanded_sizes.scratch_bytes(sizes, n, n_ctx)
            o.has16 = True
        else:
            self._absorbed(taken, layer, sizes)
            o.has32 = True
        self._into_stream(o, layer["attn_output"])
        return taken.peak

    def _sizes(self, layer: Layer) -> Sizes:
        return Sizes(layer["attn_k_b"].shape[0], self.hp.r, self.hp.k, self.hp.p, self.hp.v)

    def _index(self, layer: Layer, x: Values, q_a: Values, chooses: bool, n_ctx: int) -> None:
        """Attention.choose: cuda_sparse.index and .select."""
        taken, ix, key = x.taken, self.hp.sparse, layer["indexer_attn_k"]
        taken.take(ix.width)
        if not chooses:
            x.products(key)
            return
        taken.take(ix.n_heads)
        taken.take(ix.n_heads * ix.width)
        q_a.products(layer["indexer_attn_q_b"])
        x.products(key, layer["indexer_proj"])
        pieces = 3 if self.context.indexer_cache_type_k == "bf16" else 2
        taken.take(pieces * ix.n_heads * ix.width, 2)
        taken.take(ix.n_heads)
        taken.for_a_moment(most_score_bytes(taken.n, n_ctx))

    def _absorbed(self, taken: Taken, layer: Layer, sizes: Sizes) -> None:
        """cuda_attention: latent, attend, combine."""
        h, r, width = sizes.h, sizes.r, sizes.r + sizes.p
        n_queries, v_b = taken.n * h, layer["attn_v_b"]
        mma = on_tensor_cores(self.capability, r, width, self.context.cache_type_k)
        mma = mma and self.context.graph_attn_precision == "f16"
        taken.take(h * width, 2 if mma else 4)
        if not layer["attn_k_b"].tiled:
            taken.take(h * r)
        if mma:  # queries in groups, split until every SM has a part
            n_parts = max(n_queries, min(n_queries, _GROUP) * MOST_SM)
            taken.nbytes += _aligned(4 * n_parts * r) + _aligned(4 * n_parts * 2)
        else:
            n_parts = min(n_queries * PLAIN_SPLITS, n_queries + 255)
            taken.nbytes += _aligned(4 * n_parts * (r + 2))
        taken.take(h * sizes.v)
        at_once = taken.n > FEW or (self.capability >= 90 and r % 32 == 0)
        if not (v_b.tiled and mma and at_once):
            taken.take(h * r)

    # ---- feed-forward -----------------------------------------------------------------------

    def _feed_forward(self, n: int) -> int:
        sizes = {n, min(n, FEW)}
        return max((self._feeds(layer, i) for layer in self._layers for i in sizes), default=0)

    def _feeds(self, layer: Layer, n: int) -> int:
        taken = Taken(n)
        x = self._normed(taken, self.hp.d)
        if "ffn_down" in layer:
            h = self._gated(x, layer["ffn_gate"], layer["ffn_up"])
            self._into_stream(h, layer["ffn_down"])
        elif "ffn_down_exps" in layer or "ffn_down_shexp" in layer:
            self._experts(layer, x)
        return taken.peak

    def _gated(self, x: Values, gate: Weight, up: Weight) -> Values:
        """CudaOps.gated."""
        taken, f = x.taken, gate.rows
        h = Values(taken, f)
        if not (gate.tiled and up.tiled):
            for _ in range(3):  # gate, up, and what they make
                taken.take(f)
            x.products(gate, up)
            h.has32 = True
        elif taken.n > FEW:
            taken.near(gate, up)
            x.f16()
            taken.half(f)
            h.has16 = True
        else:
            taken.take(f)
            h.has32 = True
        return h

    def _experts(self, layer: Layer, x: Values) -> None:
        """CudaOps.route and ._experts."""
        taken, d, n_used = x.taken, self.hp.d, self.hp.routing.n_used
        down, shared = layer.get("ffn_down_exps"), layer.get("ffn_down_shexp")
        merged = layer.get("ffn_gate_up_exps")
        beside = False
        if down is not None:
            self._route(layer["ffn_gate_inp"], x)
            gate = layer["ffn_gate_exps"] if merged is None else merged
            up, (held, _, f) = layer["ffn_up_exps"] if merged is None else gate, down.shape
            tiled = gate.tiled and up.tiled and down.tiled
            unpacks = gate.unpacks and up.unpacks and down.unpacks
            on_host = down.nbytes or gate.nbytes or up.nbytes
            if on_host and taken.n <= FEW:  # perhaps fetched: HostExperts.fetched
                taken.take(n_used)
            if taken.n > FEW and (tiled or unpacks):
                x.f16()
                taken.half(f, n_used)
                taken.half(d, n_used)
                at_once, parts = held, 0
                if unpacks:
                    rows_of = [gate.rows] if merged is not None else [gate.rows, up.rows]
                    at_once = unpacked_experts(held, sum(rows_of), d, f)
                    parts = max(
                        sum(unpacked_bytes(rows, d, at_once) for rows in rows_of),
                        unpacked_bytes(d, f, at_once),
                    )
                n_slots = taken.n * n_used
                most = n_slots // slot_tile(n_slots, held) + at_once
                sort = _aligned(4 * n_slots) + _aligned(16 * most) + _ALIGN
                if unpacks:
                    taken.for_a_moment(sort + parts)
                else:
                    taken.nbytes += sort
            elif not tiled:
                x.f32()
                taken.take(n_used * f)
            else:
                both = [layer.get(f"ffn_{x}_shexp") for x in ("gate", "up", "down")]
                beside = not on_host and all(w is not None and w.tiled for w in both)
                taken.take(n_used * f + (both[0].rows if beside and both[0] else 0))
        if shared is not None and not beside:
            if taken.n <= FEW or not self._shared_tiled(layer):
                x.f32()
            h = self._gated(x, layer["ffn_gate_shexp"], layer["ffn_up_shexp"])
            h.products(shared)

    def _shared_tiled(self, layer: Layer) -> bool:
        return all(layer[f"ffn_{x}_shexp"].tiled for x in ("gate", "up", "down"))

    def _route(self, gate: Weight, x: Values) -> None:
        taken = x.taken
        taken.take(gate.rows)
        taken.take(self.hp.routing.n_used)
        taken.take(self.hp.routing.n_used)
        if taken.n > FEW or not (gate.tiled or (gate.f32 and gate.shape[1] % 4 == 0)):
            if gate.f32:
                x.f32()
            else:
                x.products(gate)

    # ---- plumbing ---------------------------------------------------------------------------

    def _logits(self, n: int) -> int:
        """CudaOps.rows and .logits, of at most as many rows as the engine asks for at once."""
        if self._output is None and self.n_ranks == 1:
            return 0
        taken = Taken(min(n, most_logit_rows(self.hp.n_vocab)))
        taken.take(self.hp.d)
        x = self._normed(taken, self.hp.d)
        if self.n_ranks > 1:  # by the first rank of a GPU, whether it has vocabulary rows or not
            taken.take(self.hp.n_vocab)
        if self._output is not None:
            taken.take(self._output.rows)
            x.products(self._output)
        return taken.peak

    def _normed(self, taken: Taken, width: int) -> Values:
        return Values(taken, width, halves=self.capability >= 80)

    def _into_stream(self, x: Values, w: Weight) -> None:
        """A product that adds into the residual stream; or a partial, stored for the others."""
        x.products(w)


class Taken:
    """Bytes that a half layer of n tokens has taken from the arena."""

    def __init__(self, n: int) -> None:
        self.n, self.nbytes, self._most = n, 0, 0

    def take(self, width: int, size: int = 4) -> None:
        """A buffer of `width` values of `size` bytes for each token."""
        self.nbytes += _aligned(self.n * width * size)

    def near(self, *weights: Weight) -> None:
        """CudaOps.near."""
        if self.n > READ_ONCE:
            self.nbytes += sum(_aligned(w.nbytes) for w in weights)

    def for_a_moment(self, nbytes: int) -> None:
        """A buffer that is given back before the half layer ends."""
        self._most = max(self._most, self.nbytes + _aligned(nbytes))

    @property
    def peak(self) -> int:
        return max(self.nbytes, self._most)

    def half(self, width: int, slots: int = 1) -> None:
        """cuda_gemm.rows16."""
        self.take(slots * -(-width // 8) * 8, 2)


@dataclass(slots=True)
class Values:
    """An activation of `width`, and which of its forms have been made: cuda_acts.Act."""

    taken: Taken
    width: int
    halves: bool = True  # norms of many tokens come in float16 too
    has32: bool = False
    has16: bool = False

    def f32(self) -> None:
        if self.has32:
            return
        if self.halves and self.taken.n > FEW:
            self.taken.half(self.width)
            self.has16 = True
        self.taken.take(self.width)
        self.has32 = True

    def f16(self) -> None:
        if not self.has16:
            self.taken.half(self.width)
            self.has16 = True

    def products(self, *weights: Weight) -> None:
        """CudaOps.products, the results aside."""
        self.taken.near(*weights)
        many = self.taken.n > FEW
        if many and any(w.tiled for w in weights):
            self.f16()
        for w in weights:
            if w.unpacks and many:
                self.f16()
                self.taken.for_a_moment(unpacked_product_bytes(*w.shape))
            elif not w.tiled:
                self.f32()


def _short_name(tensor: str) -> str:
    """`blk.3.attn_q_b.weight` -> `attn_q_b`."""
    parts = tensor.removesuffix(".weight").split(".")
    return "_".join(parts[2:] if parts[0] == "blk" else parts)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
