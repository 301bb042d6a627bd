"""plan_shards(): the tensor-parallel plan as data, before any weight byte is read.

(tensor table, hparams, quant types, shares) -> ShardPlan. The loader obeys nothing else, `mlacli
plan` prints it, tests check it without a device. It never depends on the backend.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlacli.attention_forms import CachePart, cache_parts
from mlacli.errors import MemoryBudgetError, PlanError, UsageError
from mlacli.loading.quant_types import F32
from mlacli.parallel.cuda_scratch import CudaScratch
from mlacli.parallel.cuda_sizes import Sums
from mlacli.parallel.cuts import Range, cut
from mlacli.parallel.memory import cache_row_bytes, index_row_bytes, scratch_bytes
from mlacli.parallel.placement import Placement, placed
from mlacli.parallel.shards import Cutter, Part, Shard, grows, keep_raw
from mlacli.parallel.tensor_uses import tensor_uses

if TYPE_CHECKING:
    from mlacli.devices import Device
    from mlacli.loading.gguf_file import TensorInfo
    from mlacli.params import ContextParams, ModelParams, SplitParams

HOST = "host"  # the name of its memory in tables and errors
CTX_STEP = 256  # context sizes are rounded up to it, as llama.cpp does with flash attention


@dataclass(frozen=True, slots=True)
class Scratch:
    """Bytes at most in a context of so many tokens, and what of them is outside the arena."""

    nbytes: Callable[[int], int]
    outside: Callable[[int], int] = lambda n_ctx: 0


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank's part: what it computes, and bytes by purpose."""

    rank: int
    device: str
    kind: str  # of the device: cpu, cuda, planned
    layers: Range
    heads: Range
    vocab: Range
    experts: str
    asked: float  # share
    achieved: float  # share of the bytes that are cut (of all bytes when nothing is)
    weights: int  # as they lie in the rank's memory: GPUs keep most in tiles
    mirrored: int  # of `weights`: whole tensors that other ranks hold too
    derived: int  # of `weights`: built at load, so not pages of the file
    cache: int
    scratch: int
    dequant: int  # bound of NumPy's float32 copies; 0 on other backends
    capacity: int  # what the device may use, the margin taken off
    host: int = 0  # weights of a GPU's rank in host memory; not in `weights`
    host_capacity: int = 0  # of the host's memory, the margin taken off
    sums: int = 0  # of `scratch`: what sums between GPUs take for themselves

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.scratch + self.dequant

    @property
    def n_cached_layers(self) -> int:
        """Layers whose latent rows this rank keeps: none when it has no heads."""
        return self.layers[1] - self.layers[0] if self.heads[0] < self.heads[1] else 0

    @property
    def resident(self) -> int:
        """Bytes that must fit: on the CPU, weights that are pages of the file needn't."""
        return self.total - (self.weights - self.derived if self.kind == "cpu" else 0)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Everything the loader and the printed plan need to know."""

    arch: str
    mode: str
    expert_split: str
    n_ctx: int
    n_ctx_train: int
    n_ctx_fits: int  # the largest context that fits all devices
    n_ubatch: int
    cache: tuple[CachePart, ...]  # of each cached layer
    ranks: tuple[RankPlan, ...]
    idle: tuple[str, ...]  # devices that hold nothing
    shards: tuple[Shard, ...]
    small: bool = False  # types that tiles make larger aren't in tiles: it would cost context

    def of_rank(self, rank: int) -> Iterator[Shard]:
        return (shard for shard in self.shards if shard.rank == rank)


def plan_shards(
    model: ModuleType, arch: str, hp: Any, tensors: Mapping[str, TensorInfo],
    params: ModelParams, split: SplitParams, context: ContextParams,
    devices: Sequence[Device], host: Device, way: str = "p2p",
) -> ShardPlan:  # fmt: skip
    """The plan of a run in `split.mode` (settled) on `devices`; `context.n_ctx` 0 = what fits.

    Layers that -ngl keeps off the GPUs belong to the first one, which reads their weights in the
    memory of `host`. `way`: that of sums between GPUs, p2p, nccl or host. Types that tiles make
    larger lie in tiles where that costs no context.
    """
    args = (model, arch, hp, tensors, params, split, context, devices, host, way)
    plan, on_gpu = _plan(*args), any(device.kind != "cpu" for device in devices)
    fits = plan.n_ctx_fits >= (context.n_ctx or hp.n_ctx_train)
    return plan if fits or not (on_gpu and any(map(grows, plan.shards))) else _plan(*args, True)


def _plan(
    model: ModuleType, arch: str, hp: Any, tensors: Mapping[str, TensorInfo],
    params: ModelParams, split: SplitParams, context: ContextParams,
    devices: Sequence[Device], host: Device, way: str, small: bool = False,
) -> ShardPlan:  # fmt: skip
    uses = tensor_uses(model, hp, tensors, params.merge_up_gate_experts)
    n_off = _layers_off(split, devices, hp.n_layer)
    parts = _parts(split, devices, n_off, hp.n_layer)
    cutter = Cutter(hp, split.mode or "none", split.expert_split, [p.share for p in parts])
    shards = tuple(s for part in parts for use in uses for s in cutter.shards(use, part))
    if any(device.kind != "cpu" for device in devices):
        placement = Placement(params, n_off, [device.name for device in devices])
        shards = placed(shards, parts, placement)
    shards = keep_raw(shards, small)
    ranks = _rank_plans(hp, parts, cutter, shards, split.margin, context, host)
    scratch = _scratch(ranks, parts, hp, context, shards, way)
    fits = _largest_context(ranks, scratch, hp, context)
    wanted = context.n_ctx or min(hp.n_ctx_train, fits) or CTX_STEP
    n_ctx = -(-wanted // CTX_STEP) * CTX_STEP
    idle = (d.name for d in devices if not any(part.device is d for part in parts))
    return ShardPlan(
        arch, split.mode or "none", split.expert_split, n_ctx, hp.n_ctx_train, fits,
        context.n_ubatch, cache_parts(hp, context), _priced(ranks, scratch, hp, context, n_ctx),
        tuple(idle), shards, small,
    )  # fmt: skip


def check_memory(plan: ShardPlan) -> None:
    """MemoryBudgetError for the first device that its ranks don't fit."""
    for device, need, have in _needs(plan.ranks):
        if need > have:
            fits = plan.n_ctx_fits
            if plan.ranks[0].kind == "cpu":  # a host's free memory moves from one look to the next
                fits = int(fits * 0.95) // CTX_STEP * CTX_STEP
            hint = "use more or larger devices, a smaller quantisation, or a smaller -ub"
            if device == HOST:
                hint = "keep fewer experts in host memory: a smaller -ncmoe, or fewer by -ot"
            elif fits:
                hint = f"the largest context that fits is {fits}: use -c {fits}"
            elif not have:
                hint = "the margin is all that the device has: give a smaller --margin"
            raise MemoryBudgetError(device, need, have, hint)


def _needs(ranks: Sequence[RankPlan]) -> Iterator[tuple[str, int, int]]:
    """(device, bytes that its ranks need together, bytes that it has)."""
    by_device: dict[str, list[RankPlan]] = {}
    for rank in ranks:
        by_device.setdefault(rank.device, []).append(rank)
    for device, on_device in by_device.items():
        yield device, sum(rank.resident for rank in on_device), on_device[0].capacity
    if on_host := sum(rank.host for rank in ranks):
        yield HOST, on_host, ranks[0].host_capacity


def _token_bytes(hp: Any, context: ContextParams, rank: RankPlan) -> int:
    """What one token takes in this rank's caches: its layers, and index keys beside them."""
    if not rank.n_cached_layers:
        return 0
    dense = cache_row_bytes(hp, context) * rank.n_cached_layers
    return dense + index_row_bytes(hp, context.indexer_cache_type_k, rank.layers)


def _scratch(
    ranks: Sequence[RankPlan], parts: Sequence[Part], hp: Any, context: ContextParams,
    shards: Sequence[Shard], way: str,
) -> list[Scratch]:  # fmt: skip
    """How each rank's scratch follows from the context size."""
    found: list[Scratch] = []
    of_rank: list[list[Shard]] = [[] for _ in ranks]
    for shard in shards:
        of_rank[shard.rank].append(shard)
    on_gpu = Counter(rank.device for rank in ranks)
    for rank, part in zip(ranks, parts, strict=True):
        # What GPUs refuse (-mla 0, -fa off) can still be planned: priced as on a CPU.
        if rank.kind != "cpu" and context.mla and context.flash_attn:
            capability, own, n = part.device.capability, of_rank[rank.rank], part.n_ranks
            sums = Sums(n, len(on_gpu), on_gpu[rank.device], way) if n > 1 else Sums()
            on_cuda = CudaScratch(hp, context, own, capability, sums)
            found.append(Scratch(on_cuda.nbytes, on_cuda.outside))
        else:
            on_cpu = partial(scratch_bytes, hp, context, heads=rank.heads, vocab=rank.vocab)
            found.append(Scratch(partial(on_cpu, n_ranks=len(ranks))))
    return found


def _priced(
    ranks: Sequence[RankPlan], scratch: Sequence[Scratch], hp: Any, context: ContextParams,
    n_ctx: int,
) -> tuple[RankPlan, ...]:  # fmt: skip
    """`ranks` with the cache and scratch of a context of `n_ctx`."""
    return tuple(
        replace(
            rank,
            cache=n_ctx * _token_bytes(hp, context, rank),
            scratch=of.nbytes(n_ctx),
            sums=of.outside(n_ctx),
        )
        for rank, of in zip(ranks, scratch, strict=True)
    )


def _largest_context(
    ranks: Sequence[RankPlan], scratch: Sequence[Scratch], hp: Any, context: ContextParams
) -> int:
    """Tokens whose cache and scratch fit beside the weights on every device; 0 when none do."""

    def is_too_much(steps: int) -> bool:
        priced = _priced(ranks, scratch, hp, context, steps * CTX_STEP)
        return any(need > have for device, need, have in _needs(priced) if device != HOST)

    # One layer's cache alone fills the largest device at `most`.
    most = max(rank.capacity for rank in ranks) // cache_row_bytes(hp, context) // CTX_STEP + 1
    return bisect_left(range(1, most + 1), True, key=is_too_much) * CTX_STEP


def shares_of(split: SplitParams, devices: Sequence[Device]) -> list[float]:
    """Each device's share: -ts, else equal within 5% of memory, else by total memory."""
    if split.tensor_split:
        missing = len(devices) - len(split.tensor_split)
        if missing < 0:
            raise UsageError(
                f"-ts has {len(split.tensor_split)} shares for {len(devices)} devices",
                "give at most one share per device",
            )
        asked = [*split.tensor_split, *[0.0] * missing]
        return [x / sum(asked) for x in asked]
    totals = [d.total for d in devices]
    if max(totals) - min(totals) <= 0.05 * max(totals):
        return [1.0 / len(devices)] * len(devices)
    return [t / sum(totals) for t in totals]


def _layers_off(split: SplitParams, devices: Sequence[Device], n_layer: int) -> int:
    """How many layers, from the first on, -ngl keeps off the GPUs."""
    if split.n_gpu_layers is None or all(d.kind == "cpu" for d in devices):
        return 0
    return max(0, n_layer - split.n_gpu_layers)


def _parts(split: SplitParams, devices: Sequence[Device], n_host: int, n_layer: int) -> list[Part]:
    """Who computes which layers; devices with share 0 (or no layer) take no part.

    Shares deal out the layers after `n_host`, those before it go with the first of them.
    """
    if split.mode == "graph":
        if n_host:
            raise UsageError(
                f"-ngl {split.n_gpu_layers} leaves {n_host} of {n_layer} layers off the GPUs, "
                "which -sm graph can't do",
                "use -sm layer, or leave -ngl out",
            )
        active = [(d, s) for d, s in zip(devices, shares_of(split, devices), strict=True) if s > 0]
        return [
            Part(i, device, share, (0, n_layer), True, True, len(active), i)
            for i, (device, share) in enumerate(active)
        ]
    if split.mode == "layer":
        shares = shares_of(split, devices)
        n_host = min(n_host, n_layer - 1)  # one layer is dealt out, to find the first device
        stages = list(zip(devices, shares, cut(n_layer - n_host, shares), strict=True))
    else:
        n_host, stages = 0, [(devices[split.main_gpu], 1.0, (0, n_layer))]
    stages = [(d, s, (a + n_host if i else 0, b + n_host)) for i, (d, s, (a, b)) in
              enumerate(stage for stage in stages if stage[2][0] < stage[2][1])]  # fmt: skip
    return [
        Part(i, device, share, layers, i == 0, i == len(stages) - 1, 1, 0)
        for i, (device, share, layers) in enumerate(stages)
    ]


def _rank_plans(
    hp: Any, parts: list[Part], cutter: Cutter, shards: Sequence[Shard],
    margin: int, context: ContextParams, host: Device,
) -> list[RankPlan]:  # fmt: skip
    """Every rank's plan, cache and scratch still unpriced: they need the context size."""
    weights, mirrored, derived, float32, on_host = ([0] * len(parts) for _ in range(5))
    holders = Counter(shard.tensor for shard in shards)
    for shard in shards:
        nbytes = shard.bytes_on(parts[shard.rank].device.kind)
        if shard.host:
            on_host[shard.rank] += nbytes
            continue
        weights[shard.rank] += nbytes
        derived[shard.rank] += nbytes if shard.is_copy else 0
        float32[shard.rank] += 4 * math.prod(shard.shape) if shard.qtype != F32 else 0
        if shard.axis is None and holders[shard.tensor] > 1:
            mirrored[shard.rank] += nbytes
    cut_bytes = [w + h - m for w, h, m in zip(weights, on_host, mirrored, strict=True)]
    out = []
    for part in parts:
        i, device, on_cpu = part.rank, part.device, part.device.kind == "cpu"
        heads, vocab = cutter.heads(part), cutter.vocab(part)
        capacity = max(0, (device.free if on_cpu else device.total) - margin)
        sharing = sum(other.device.name == device.name for other in parts)
        out.append(
            RankPlan(
                rank=i,
                device=device.name,
                kind=device.kind,
                layers=part.layers,
                heads=heads,
                vocab=vocab,
                experts=cutter.experts_text(part),
                asked=part.share,
                achieved=cut_bytes[i] / max(1, sum(cut_bytes)),
                weights=weights[i],
                mirrored=mirrored[i],
                derived=derived[i],
                cache=0,
                scratch=0,
                dequant=min(float32[i], capacity // 2 // sharing) if on_cpu else 0,
                capacity=capacity,
                host=on_host[i],
                host_capacity=max(0, host.free - margin),
            )
        )
    if not out:
        raise PlanError("no device takes part", "give at least one device a share above 0")
    return out
