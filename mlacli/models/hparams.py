"""Sizes and settings of a model with latent attention, from GGUF metadata and tensor presence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlacli.errors import GgufError, UnsupportedFeature
from mlacli.models.indexer import Indexer
from mlacli.models.parts import RopeScaling, Routing, Temperature

if TYPE_CHECKING:
    from mlacli.loading.gguf_file import GgufFile, Metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Hparams:
    """Sizes in legend letters (DESIGN section 4), settled from metadata and tensor presence."""

    n_layer: int  # without the skipped MTP blocks
    n_skipped: int
    n_ctx_train: int
    n_vocab: int
    d: int
    H: int
    q: int  # 0 = lite: a direct attn_q
    r: int
    k: int
    p: int
    v: int
    eps: float
    rope: RopeScaling
    temperature: Temperature | None
    n_dense: int
    E: int
    F: tuple[int, ...]  # dense FFN width per layer
    f: tuple[int, ...]  # expert width per layer
    n_shared: int
    routing: Routing
    indexer: Indexer | None

    @property
    def softmax_scale(self) -> float:
        """mscale^2 / sqrt(k + p), the real head size also in absorbed form (B 3.7)."""
        return self.rope.mscale() ** 2 / math.sqrt(self.k + self.p)

    @property
    def cache_width(self) -> int:
        return self.r + self.p

    @property
    def sparse(self) -> Indexer | None:
        """The indexer when attention is sparse, None when it is dense."""
        return self.indexer if self.indexer is not None and self.indexer.on else None

    def is_dense(self, layer: int) -> bool:
        return layer < self.n_dense or self.E == 0

    def dims(self, layer: int = 0) -> dict[str, int]:
        """The letters of the tensor table for `layer`."""
        return {
            "V": self.n_vocab, "d": self.d, "H": self.H, "q": self.q, "r": self.r, "k": self.k,
            "p": self.p, "v": self.v, "E": self.E, "F": self.F[layer], "f": self.f[layer],
            "s": self.f[layer] * self.n_shared,
            "I": self.indexer.n_heads if self.indexer else 0,
            "i": self.indexer.width if self.indexer else 0,
        }  # fmt: skip

    @classmethod
    def from_gguf(cls, file: GgufFile) -> Hparams:
        """Hparams of a file in mainline's or ik_llama.cpp's metadata style (B 3.2, 3.3)."""
        meta, arch = file.metadata, file.arch

        def key(name: str, default: int | None = None, low: int = 0) -> int:
            return meta.integer(f"{arch}.{name}", default, low)

        n_blocks = key("block_count", low=1)
        n_skipped = key("nextn_predict_layers", 0)
        n_layer = n_blocks - n_skipped
        if n_layer < 1:
            raise GgufError(f"all {n_blocks} blocks are MTP blocks", "check nextn_predict_layers")
        if n_layer > len(file.tensors):
            raise GgufError(
                f"block_count is {n_blocks}, but the file has {len(file.tensors)} tensors",
                "the metadata is damaged: convert the model again",
            )
        n_ctx_train = key("context_length", low=1)
        heads = _per_layer(meta, f"{arch}.attention.head_count", n_layer)
        mqa = key("attention.head_count_kv", heads[0]) == 1 and heads[0] > 1
        k_size = key("attention.key_length_mla", None if mqa else key("attention.key_length", 0))
        v_size = key(
            "attention.value_length_mla", None if mqa else key("attention.value_length", 0)
        )
        p = key("rope.dimension_count", 64, low=2)
        # glm-dsa has no lite models: its indexer reads the low-rank query.
        lite = "blk.0.attn_q.weight" in file.tensors and arch != "glm-dsa"
        rope = RopeScaling.from_gguf(meta, arch, n_ctx_train)
        hp = cls(
            n_layer=n_layer,
            n_skipped=n_skipped,
            n_ctx_train=n_ctx_train,
            n_vocab=_n_vocab(file),
            d=key("embedding_length", low=1),
            H=heads[0],
            q=0 if lite else key("attention.q_lora_rank", low=1),
            r=key("attention.kv_lora_rank", low=1),
            k=k_size - p,
            p=p,
            v=v_size,
            eps=meta.number(f"{arch}.attention.layer_norm_rms_epsilon"),
            rope=rope,
            temperature=Temperature.from_gguf(meta, arch, rope.n_ctx_orig),
            n_dense=key("leading_dense_block_count", 0),
            E=key("expert_count", 0),
            F=_per_layer(meta, f"{arch}.feed_forward_length", n_layer, default=0),
            f=_per_layer(meta, f"{arch}.expert_feed_forward_length", n_layer, default=0),
            n_shared=key("expert_shared_count", 0),
            routing=_routing(meta, arch, n_blocks, _n_vocab(file)),
            indexer=Indexer.from_gguf(file, n_layer, n_ctx_train) if arch == "glm-dsa" else None,
        )
        hp._check(heads)
        return hp

    def _check(self, heads: tuple[int, ...]) -> None:
        broken = [
            (self.H < 1, "head_count is 0"),
            (len(set(heads)) > 1, f"head_count differs between layers: {sorted(set(heads))}"),
            (self.k < 1, f"rope.dimension_count {self.p} reaches the key length {self.k + self.p}"),
            (self.p % 2 == 1, f"rope.dimension_count {self.p} is odd"),
            (self.v < 1, "value_length is 0"),
            (self.eps <= 0, f"layer_norm_rms_epsilon is {self.eps}"),
            (self.E and not 1 <= self.routing.n_used <= self.E,
             f"expert_used_count {self.routing.n_used} is not within 1..{self.E} experts"),
            (self.E and self.E % max(1, self.routing.n_groups),
             f"{self.E} experts don't divide into {self.routing.n_groups} groups"),
            (self.routing.n_groups_used > self.routing.n_groups,
             f"{self.routing.n_groups_used} of {self.routing.n_groups} expert groups used"),
            (self.E and self.routing.n_groups > 1 and self.routing.n_used
             > self.E // self.routing.n_groups * self.routing.n_groups_used,
             f"expert_used_count {self.routing.n_used} exceeds the experts of the chosen groups"),
            (self.indexer and self.indexer.eps <= 0,
             f"layer_norm_epsilon is {self.indexer.eps if self.indexer else 0}"),
            (self.indexer and self.indexer.width < self.p,
             f"indexer.key_length {self.dims()['i']} has no room for {self.p} rotated values"),
        ]  # fmt: skip
        for is_broken, what in broken:
            if is_broken:
                raise GgufError(what, "the metadata is damaged: convert the model again")


def _n_vocab(file: GgufFile) -> int:
    """Rows of token_embd, which every file has; the metadata's count may be padded or absent."""
    info = file.tensors.get("token_embd.weight")
    return info.shape[0] if info is not None else 0


def _per_layer(meta: Metadata, key: str, n: int, default: int | None = None) -> tuple[int, ...]:
    """A scalar or per-layer array as one integer per layer."""
    value: Any = meta.get(key, default)
    if isinstance(value, list):
        if len(value) < n or not all(isinstance(x, int) and x >= 0 for x in value):
            raise GgufError(
                f"metadata key {key} has {len(value)} entries for {n} layers, or negative ones",
                "the metadata is damaged: convert the model again",
            )
        return tuple(value[:n])
    return (meta.integer(key, default),) * n


def _routing(meta: Metadata, arch: str, n_blocks: int, n_vocab: int) -> Routing:
    # Without the key GLM has a sigmoid gate (4.7-Flash is known by its sizes), all others softmax.
    glm = arch == "glm-dsa" or (n_blocks in (47, 48) and n_vocab == 154880)
    gate = meta.integer(f"{arch}.expert_gating_func", 0) or (2 if glm else 1)
    if gate not in (1, 2):
        raise UnsupportedFeature(
            f"expert_gating_func {gate} is not supported", "mlacli knows 1 softmax and 2 sigmoid"
        )
    return Routing(
        n_used=meta.integer(f"{arch}.expert_used_count", 0),
        sigmoid=gate == 2,
        n_groups=max(1, meta.integer(f"{arch}.expert_group_count", 1)),
        n_groups_used=max(1, meta.integer(f"{arch}.expert_group_used_count", 1)),
        renormalise=bool(meta.get(f"{arch}.expert_weights_norm", False)),
        scale=meta.number(f"{arch}.expert_weights_scale", 1.0) or 1.0,
    )
