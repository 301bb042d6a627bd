"""Which tensors a model uses, in a given file: present, derived at load, missing or strange."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlacli.errors import BadTensorShape, MissingTensor, PlanError
from mlacli.loading.quant_types import BF16, F16, F32, Q8_0, QType
from mlacli.loading.tiles import ROWS
from mlacli.models.tensor_table import Split, TensorSpec

if TYPE_CHECKING:
    from mlacli.loading.gguf_file import TensorInfo

_IGNORED = ("rope_freqs.weight",)


@dataclass(frozen=True, slots=True)
class TensorUse:
    """A tensor as the model uses it: where it comes from and how it is stored."""

    name: str
    layer: int | None
    spec: TensorSpec
    sizes: tuple[int, ...]
    qtype: QType
    sources: tuple[str, ...]


def tensor_uses(
    model: ModuleType, hp: Any, tensors: Mapping[str, TensorInfo], merge: bool
) -> list[TensorUse]:
    """Every tensor that the model uses, in order; strangers and absences are errors by name."""
    known: set[str] = set(_IGNORED)
    uses = []
    for layer in (None, *range(hp.n_layer)):
        prefix = "" if layer is None else f"blk.{layer}."
        specs = model.MODEL if layer is None else model.layer_tensors(hp, layer, tensors)
        for spec in _merged(specs, prefix, tensors) if merge else specs:
            use = _use(spec, prefix, layer, hp, tensors)
            known |= {prefix + spec.name, prefix + spec.derived_from}
            if use is not None and not spec.unread:
                uses.append(use)
                known.update(use.sources)
    skipped = tuple(f"blk.{hp.n_layer + i}." for i in range(hp.n_skipped))
    for name in tensors:
        if name not in known and not name.startswith(skipped):
            raise PlanError(
                f"tensor {name} is not part of this architecture",
                "the file is of another kind, or needs a newer mlacli",
            )
    return uses


def _merged(
    specs: Sequence[TensorSpec], prefix: str, tensors: Mapping[str, TensorInfo]
) -> list[TensorSpec]:
    """-muge: expert gate and up of one type become one tensor, gate rows first.

    Not where a tile of 16 rows would hold some of both: GPUs multiply many tokens by whole tiles.
    """
    gate, up = (tensors.get(f"{prefix}ffn_{x}_exps.weight") for x in ("gate", "up"))
    if gate is None or up is None or gate.qtype != up.qtype or gate.shape[-2] % ROWS:
        return list(specs)
    out = []
    for spec in specs:
        if spec.name == "ffn_gate_exps.weight":
            out.append(replace(spec, name="ffn_gate_up_exps.weight", shape="E, 2*f, d", halves=2,
                               derived_from="ffn_gate_exps.weight+ffn_up_exps.weight"))  # fmt: skip
        elif spec.name != "ffn_up_exps.weight":
            out.append(spec)
    return out


def _use(
    spec: TensorSpec, prefix: str, layer: int | None, hp: Any, tensors: Mapping[str, TensorInfo]
) -> TensorUse | None:
    sizes, name = spec.sizes(hp.dims(layer or 0)), prefix + spec.name
    info = tensors.get(name)
    if info is not None:
        _check_shape(info, sizes, spec.split is Split.HEAD_LEAD)
        return TensorUse(name, layer, spec, sizes, info.qtype, (name,))
    sources = tuple(prefix + part for part in spec.derived_from.split("+") if part)
    if not sources or any(source not in tensors for source in sources):
        if spec.optional or spec.unread:
            return None
        raise MissingTensor(
            f"tensor {name} is missing" + (f", and so is {sources[0]}" if sources else ""),
            "the file is incomplete or of another architecture",
        )
    info = tensors[sources[0]]
    qtype = info.qtype
    if spec.derived_from == "attn_kv_b.weight":
        _check_shape(info, (hp.H * (hp.k + hp.v), hp.r))
        if spec.name == "attn_k_b.weight" and qtype not in (F32, F16, BF16):
            # Transposing breaks the blocks; like the original we store Q8_0 (B 4.7).
            qtype = Q8_0 if hp.k % Q8_0.block == 0 else F32
    return TensorUse(name, layer, spec, sizes, qtype, sources)


def _check_shape(info: TensorInfo, sizes: tuple[int, ...], per_head: bool = False) -> None:
    """BadTensorShape unless it is `sizes`; old files fold per-head tensors into two dimensions."""
    folded = (math.prod(sizes[:-1]), sizes[-1])
    if info.shape != sizes and not (per_head and info.shape == folded):
        raise BadTensorShape(
            f"tensor {info.name} has shape {list(info.shape)}, the metadata says {list(sizes)}",
            "the file is damaged or of another architecture",
        )
