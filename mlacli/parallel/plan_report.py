"""The plan for people and programs: table rows and a JSON-ready dict. Prints nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlacli.attention_forms import CachePart
from mlacli.parallel.plan import HOST, RankPlan, ShardPlan
from mlacli.parallel.shards import Shard

if TYPE_CHECKING:
    from mlacli.devices import Device
    from mlacli.parallel.memory_watch import Beside

Rows = tuple[tuple[str, ...], list[tuple[str, ...]]]


def plan_rows(plan: ShardPlan) -> Rows:
    """(columns, one row per rank): what it computes and what it holds.

    What lies in host memory comes last, where anything does.
    """
    columns: tuple[str, ...] = (
        "rank", "device", "layers", "heads", "experts", "vocab", "share asked > got", "weights",
        "mirrored", "cache", "scratch", "f32 copies", "total", "of",
    )  # fmt: skip
    rows = [_rank_row(rank) for rank in plan.ranks]
    if any(rank.host for rank in plan.ranks):
        columns += ("in host memory", "of ")
        have = _bytes(plan.ranks[0].host_capacity)
        rows = [(*row, _bytes(rank.host), have)
                for row, rank in zip(rows, plan.ranks, strict=True)]  # fmt: skip
    return columns, rows


def _rank_row(r: RankPlan) -> tuple[str, ...]:
    return (
        str(r.rank), r.device, _span(r.layers), _span(r.heads), r.experts, _span(r.vocab),
        f"{r.asked:.0%} > {r.achieved:.0%}", _bytes(r.weights), _bytes(r.mirrored), _bytes(r.cache),
        _bytes(r.scratch), _bytes(r.dequant), _bytes(r.total), _bytes(r.capacity),
    )  # fmt: skip


def _span(span: tuple[int, int]) -> str:
    return f"{span[0]}..{span[1] - 1}" if span[0] < span[1] else "none"


def _bytes(n: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n / 1024:.1f} KiB"


def memory_rows(plan: ShardPlan, gpus: Sequence[Device]) -> Rows:
    """(columns, one row per device) in MiB, the columns of llama.cpp's memory breakdown.

    total = free + self + unaccounted, of GPUs; self = model + context + compute, as planned, the
    last with the bound of NumPy's float32 copies.
    """
    columns = (
        "memory [MiB]", "total", "free", "self", "model", "context", "compute", "unaccounted"
    )  # fmt: skip
    found = {gpu.name: gpu for gpu in gpus}
    rows = []
    for name in dict.fromkeys(rank.device for rank in plan.ranks):
        here = [rank for rank in plan.ranks if rank.device == name]
        model, context = sum(r.weights for r in here), sum(r.cache for r in here)
        own = sum(r.total for r in here)
        parts = [own, model, context, own - model - context]
        gpu = found.get(name)
        ends = ("-", "-", "-") if gpu is None else (
            _mebibytes(gpu.total), _mebibytes(gpu.free), _mebibytes(gpu.total - gpu.free - own)
        )  # fmt: skip
        rows.append((name, *ends[:2], *map(_mebibytes, parts), ends[2]))
    if on_host := sum(rank.host for rank in plan.ranks):
        rows.append((HOST, "-", "-", *map(_mebibytes, (on_host, on_host, 0, 0)), "-"))
    return columns, rows


def beside_lines(found: Mapping[str, Beside]) -> list[str]:
    """One line per GPU: what was measured beside the plan."""
    lines = []
    for name, beside in found.items():
        nccl = f"; NCCL took {_mebibytes(beside.nccl)} MiB" if beside.nccl else ""
        lines.append(
            f"{name} beside the plan: {_mebibytes(beside.before)} MiB in use before loading (CUDA, "
            f"other programs), {_mebibytes(beside.since)} MiB more since (kernels){nccl}"
        )
    return lines


def _mebibytes(n: int) -> str:
    return f"{n / 2**20:.0f}" if n >= 10 << 20 else f"{n / 2**20:.1f}"


def shard_rows(plan: ShardPlan) -> Rows:
    """(columns, one row per shard): name, shape, type, the range along the cut axis."""
    columns = ("rank", "tensor", "shape", "type", "bytes", "cut", "from")
    return columns, [_shard_row(shard, plan) for shard in plan.shards]


def _shard_row(s: Shard, plan: ShardPlan) -> tuple[str, ...]:
    derived = "+".join(s.sources) if s.sources != (s.tensor,) else ""
    cut = "whole" if s.axis is None else f"axis {s.axis}: " + ", ".join(map(_span, s.ranges))
    if s.tensor.endswith(("attn_k_b.weight", "attn_v_b.weight")):
        cut = f"heads {_span(plan.ranks[s.rank].heads)}"
    cut += ", in host memory" if s.host else ""
    return (
        str(s.rank), s.tensor, "x".join(map(str, s.shape)), s.qtype.name, str(s.nbytes), cut,
        derived,
    )  # fmt: skip


def plan_as_dict(plan: ShardPlan) -> dict[str, Any]:
    """The plan in plain types; the keys are an interface (examples/REFERENCE.md).

    Sizes in bytes, ranges as [first, last + 1].
    """
    return {
        "architecture": plan.arch,
        "split_mode": plan.mode,
        "expert_split": plan.expert_split,
        "n_ctx": plan.n_ctx,
        "n_ctx_train": plan.n_ctx_train,
        "n_ctx_fits": plan.n_ctx_fits,
        "n_ubatch": plan.n_ubatch,
        "cache_type": plan.cache[0].cache_type,
        "cache": [_part_dict(part) for part in plan.cache],
        "idle_devices": list(plan.idle),
        "ranks": [_rank_dict(rank) for rank in plan.ranks],
    }


def _part_dict(part: CachePart) -> dict[str, Any]:
    return {
        "part": part.name,
        "values_per_token": part.width,
        "type": part.cache_type,
        "bytes_per_token": part.token_bytes,
    }


def _rank_dict(r: RankPlan) -> dict[str, Any]:
    return {
        "rank": r.rank,
        "device": r.device,
        "layers": list(r.layers),
        "heads": list(r.heads),
        "vocab": list(r.vocab),
        "experts": r.experts,
        "share": {"asked": round(r.asked, 4), "achieved": round(r.achieved, 4)},
        "bytes": {
            "weights": r.weights,
            "mirrored": r.mirrored,
            "derived": r.derived,
            "cache": r.cache,
            "scratch": r.scratch,
            "float32_copies": r.dequant,
            "total": r.total,
            "capacity": r.capacity,
            **({"host": r.host, "host_capacity": r.host_capacity} if r.host else {}),
        },
    }
