"""What the architectures share verbatim: YaRN frequencies, the walk over layers, MLP, experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from mlacli.errors import GgufError, UnsupportedFeature

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlacli.latent_cache import LatentCache
    from mlacli.loading.gguf_file import Metadata
    from mlacli.ops import Act, ModelWeights, Ops, Step
    from mlacli.ops import LayerWeights as Layer


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rotary settings as GGUF stores them. `factor` 1 = unscaled; `yarn` False = linear."""

    base: float
    factor: float = 1.0
    yarn: bool = False
    n_ctx_orig: int = 0
    log_mul: float = 0.0  # 0.1 * mscale_all_dim
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    ext_factor: float = 1.0

    @classmethod
    def from_gguf(cls, meta: Metadata, arch: str, n_ctx_train: int) -> RopeScaling:
        key = f"{arch}.rope.scaling."
        kind = meta.text(key + "type", "linear")
        if kind not in ("none", "linear", "yarn"):
            raise UnsupportedFeature(
                f"rope scaling {kind!r} is not supported", "mlacli knows none, linear and yarn"
            )
        factor = meta.number(key + "factor", meta.number(f"{arch}.rope.scale_linear", 0.0))
        base = meta.number(f"{arch}.rope.freq_base", 10000.0)
        if base <= 1 or factor < 0:
            raise GgufError(
                f"rope base {base} or scaling factor {factor} is out of range",
                "the metadata is damaged: convert the model again",
            )
        betas = [meta.number(f"{key}yarn_beta_{x}", b) for x, b in (("fast", 32.0), ("slow", 1.0))]
        if min(betas) <= 0:
            raise GgufError(
                f"yarn_beta_fast {betas[0]} or yarn_beta_slow {betas[1]} is not above 0",
                "the metadata is damaged: convert the model again",
            )
        return cls(
            base=base,
            factor=factor if kind != "none" and factor > 0 else 1.0,
            yarn=kind == "yarn",
            n_ctx_orig=meta.integer(key + "original_context_length", n_ctx_train, low=1),
            log_mul=meta.number(key + "yarn_log_multiplier", 0.0),
            attn_factor=meta.number(key + "attn_factor", 1.0)
            * meta.number(key + "yarn_attn_factor", 1.0),
            beta_fast=betas[0],
            beta_slow=betas[1],
            ext_factor=meta.number(key + "yarn_ext_factor", 1.0),
        )

    def mscale(self) -> float:
        """The magnitude that enters the softmax scale squared; the rotation itself keeps 1."""
        return self.attn_factor * (1.0 + self.log_mul * math.log(self.factor))

    def frequencies(self, p: int) -> tuple[float, ...]:
        """Angle per position of each of the p/2 pairs, YaRN's ramp included (arXiv 2309.00071)."""
        return _frequencies(self, p)

    def _computed(self, p: int) -> tuple[float, ...]:
        plain = [self.base ** (-2.0 * i / p) for i in range(p // 2)]
        if not self.yarn or self.ext_factor == 0:
            return tuple(theta / self.factor for theta in plain)
        low = max(0, math.floor(self._pair_of(self.beta_fast, p)))
        high = min(p - 1, math.ceil(self._pair_of(self.beta_slow, p)))
        mixed = []
        for i, theta in enumerate(plain):
            ramp = 1.0 - min(1.0, max(0.0, (i - low) / max(0.001, high - low)))
            keep = ramp * self.ext_factor
            mixed.append(theta / self.factor * (1.0 - keep) + theta * keep)
        return tuple(mixed)

    def _pair_of(self, turns: float, p: int) -> float:
        """The pair that makes `turns` turns over the original context."""
        return p * math.log(self.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(self.base))


@cache
def _frequencies(rope: RopeScaling, p: int) -> tuple[float, ...]:
    """Asked for at every step: it takes as long as a layer on a GPU."""
    return rope._computed(p)


@dataclass(frozen=True, slots=True)
class Temperature:
    """Queries grow by 1 + scale * ln(1 + floor(pos / length)): sharper attention far out."""

    scale: float
    length: int

    @classmethod
    def from_gguf(cls, meta: Metadata, arch: str, n_ctx_orig: int) -> Temperature | None:
        """None without the key or with scale 0; `length` falls back to the original context."""
        scale = meta.number(f"{arch}.attention.temperature_scale", 0.0)
        if scale == 0:
            return None
        length = meta.integer(f"{arch}.attention.temperature_length", n_ctx_orig, low=0)
        return cls(scale, length or n_ctx_orig)


@dataclass(frozen=True, slots=True)
class Routing:
    """How the gate chooses experts (B 3.9 and DESIGN decision 13)."""

    n_used: int
    sigmoid: bool
    n_groups: int = 1
    n_groups_used: int = 1
    renormalise: bool = False
    scale: float = 1.0


def through_layers(
    ops: Ops, hp: Any, w: ModelWeights, cache: LatentCache, step: Step,
    layer: Callable[..., tuple[Act, Act]],
) -> Act | None:  # fmt: skip
    """Logits [n_out, V] after every `layer` held here; None on a stage that isn't the last."""
    residual = ops.receive() if w.token_embd is None else ops.embed(step.tokens, w.token_embd)
    norms = [layer_w.attn_norm for layer_w in w.layers.values()] + [w.output_norm]
    x = ops.rms_norm(residual, norms[0], hp.eps)
    for (il, layer_w), next_norm in zip(w.layers.items(), norms[1:], strict=True):
        residual, x = layer(ops, hp, layer_w, cache, il, residual, x, step, next_norm)
    if w.output_norm is None:
        ops.send(residual)
        return None
    return ops.logits(ops.rows(x, step.out_rows), w.output)


def queries(ops: Ops, hp: Any, x: Act, w: Layer) -> tuple[Act, Act, Act]:
    """(q, c_kv, k_pe): queries of local heads [n, h * (k + p)] and the latent row, unnormed.

    Queries come through the low rank where the model has one.
    """
    first = w.attn_q if w.attn_q_a is None else w.attn_q_a
    q, c_kv, k_pe = ops.project(x, first, w.attn_kv_a_mqa, hp.r)  # mirrored but for attn_q
    if w.attn_q_a is not None:
        q = ops.matmul(ops.rms_norm(q, w.attn_q_a_norm, hp.eps), w.attn_q_b)
    return q, c_kv, k_pe


def gated_mlp(ops: Ops, x: Act, w: Layer) -> Act | None:
    """down(silu(gate x) * up x) [n, d]: this rank's partial, None when it has no width."""
    if w.ffn_down is None:
        return None
    return ops.matmul(ops.gated(x, w.ffn_gate, w.ffn_up), w.ffn_down)


def routed_experts(ops: Ops, x: Act, w: Layer, routing: Routing) -> Act | None:
    """Sum over chosen experts plus the shared expert [n, d]: this rank's partial or None."""
    chosen = None
    if w.ffn_down_exps is not None:
        chosen = ops.route(x, w.ffn_gate_inp, w.exp_probs_b, routing)
    return ops.experts(x, chosen, w)
