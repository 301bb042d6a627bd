"""A rank's weights: the byte ranges that its shards name, and nothing else.

Views of the mapped file wherever a slice allows it; what must be rebuilt (k_b out of kv_b, merged
gate and up) is a copy, and the plan says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from mlacli.loading.unpack import UNPACKERS, unpack
from mlacli.ops import LayerWeights, ModelWeights, Ops, Weight

if TYPE_CHECKING:
    from mlacli.loading.gguf_file import GgufFile
    from mlacli.loading.quant_types import QType
    from mlacli.parallel.plan import ShardPlan
    from mlacli.parallel.shards import Shard

Bytes = NDArray[np.uint8]
_THREADS = 8
Floats = NDArray[np.float32]


def load_weights(
    file: GgufFile, plan: ShardPlan, rank: int, hp: Any, ops: Ops,
    progress: Callable[[int], None] | None = None, *, copied: bool = False,
    lock: Callable[[Bytes], None] | None = None,
) -> ModelWeights:  # fmt: skip
    """All weights of `rank`, handed to `ops`; `progress` is told each shard's bytes.

    `copied` takes them out of the mapped file; `lock` is shown each array that is kept.
    """
    top: dict[str, Weight] = {}
    layers: dict[int, dict[str, Weight]] = {}
    shards = list(plan.of_rank(rank))
    ops.begin_upload(shards)
    for shard in shards:
        raw = read_shard(file, shard, hp)
        assert raw.nbytes == shard.nbytes, f"{shard.tensor}: the plan and the bytes disagree"
        if copied:
            raw = raw.copy()
        if lock is not None:
            lock(raw)
        held = top if shard.layer is None else layers.setdefault(shard.layer, {})
        held[short_name(shard.tensor)] = ops.upload(raw, shard)
        if progress is not None:
            progress(shard.nbytes)
    ops.end_upload()
    return ModelWeights(
        top.get("token_embd"), top.get("output_norm"), top.get("output"),
        {il: LayerWeights(layers[il]) for il in sorted(layers)},
    )  # fmt: skip


def short_name(tensor: str) -> str:
    """`blk.3.attn_q_b.weight` -> `attn_q_b`; a bias beside a weight keeps its ending."""
    parts = tensor.removesuffix(".weight").split(".")
    name = "_".join(parts[2:] if parts[0] == "blk" else parts)
    return name.removesuffix("_bias") if name == "exp_probs_b_bias" else name


def read_shard(file: GgufFile, shard: Shard, hp: Any) -> Bytes:
    """The shard's bytes, uint8 [*leading axes, bytes of a local row], or what slices like them."""
    if shard.sources[0].endswith("attn_kv_b.weight"):
        return _from_kv_b(file, shard, hp)
    if len(shard.sources) > 1:
        return _joined([_rows(file, source) for source in shard.sources], 1)
    raw = _rows(file, shard.sources[0])
    if len(shard.shape) == 3 and raw.ndim == 2:  # per-head tensors folded into two dimensions
        raw = raw.reshape(-1, shard.shape[1], raw.shape[-1])
    if shard.axis is None:
        return raw
    if shard.axis == raw.ndim - 1:
        ((start, stop),) = shard.ranges
        return raw[..., slice(*_block_bytes(start, stop, shard.qtype))]
    pieces = [raw[(slice(None),) * shard.axis + (slice(*r),)] for r in shard.ranges]
    return pieces[0] if len(pieces) == 1 else _joined(pieces, shard.axis)


def _joined(parts: list[Bytes], axis: int) -> Bytes:
    """The parts one after another along `axis`.

    Several threads copy: a layer's experts are gigabytes, and one thread is slower than the bus.
    """
    edges = np.cumsum([0, *(part.shape[axis] for part in parts)])
    out = np.empty((*parts[0].shape[:axis], edges[-1], *parts[0].shape[axis + 1 :]), np.uint8)
    before = (slice(None),) * axis
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for part, stop in zip(parts, edges[1:], strict=True):
            to = out[(*before, slice(stop - part.shape[axis], stop))]
            list(pool.map(np.copyto, np.array_split(to, _THREADS), np.array_split(part, _THREADS)))
    return out


def _rows(file: GgufFile, name: str) -> Bytes:
    rows: Bytes = file.rows(file.tensors[name])
    return rows


def _block_bytes(start: int, stop: int, qtype: QType) -> tuple[int, int]:
    """Byte range in a row of the blocks that columns [start, stop) touch."""
    return start // qtype.block * qtype.nbytes, -(-stop // qtype.block) * qtype.nbytes


def _from_kv_b(file: GgufFile, shard: Shard, hp: Any) -> Bytes:
    """k_b [h, r, k] or v_b [h, v, r] of local heads; per head kv_b has k key rows, v value rows."""
    info = file.tensors[shard.sources[0]]
    heads = slice(*shard.ranges[0]) if shard.ranges else slice(None)
    raw = np.asarray(_rows(file, info.name).reshape(hp.H, hp.k + hp.v, info.row_bytes)[heads])
    if shard.tensor.endswith("attn_v_b.weight"):
        return raw[:, hp.k :]
    keys = to_float32(raw[:, : hp.k], info.qtype)  # [h, k, r]
    return from_float32(np.ascontiguousarray(keys.transpose(0, 2, 1)), shard.qtype)


def to_float32(raw: Bytes, qtype: QType) -> Floats:
    """Rows of GGUF bytes as float32; float32 itself stays a view."""
    if qtype.name == "F32":
        return raw.view(np.float32)
    if qtype.name == "F16":
        return raw.view(np.float16).astype(np.float32)
    if qtype.name in UNPACKERS:
        return unpack(raw, qtype)
    return np.asarray(dequantize(np.ascontiguousarray(raw), GGMLQuantizationType(qtype.id)))


def from_float32(values: Floats, qtype: QType) -> Bytes:
    """Rows of float32 as GGUF bytes of a type that the gguf package can quantise."""
    if qtype.name == "F32":
        return np.ascontiguousarray(values).view(np.uint8)
    if qtype.name == "F16":
        return np.ascontiguousarray(values.astype(np.float16)).view(np.uint8)
    return np.asarray(quantize(values, GGMLQuantizationType(qtype.id))).view(np.uint8)
