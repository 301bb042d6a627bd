"""Everything before weights load: header, guard, checks, hparams, plan, memory.

What can be known from flags and the GGUF header is refused here, and nothing after it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from mlacli.attention_forms import attention_text
from mlacli.compat import Finding, check, guard, indexer_rules, raise_first_error, settled
from mlacli.devices import Device, find_devices, host_memory, idle_gpus, main_device
from mlacli.errors import (
    GgufError,
    MemoryBudgetError,
    MlacliError,
    StrictDowngrade,
    UnsupportedFeature,
    UsageError,
)
from mlacli.loading.gguf_file import GgufFile
from mlacli.loading.tiles import GROWN
from mlacli.loading.tokenizer import Tokenizer, has_tokenizer
from mlacli.models import model_of
from mlacli.parallel.advice import Speeds, token_us
from mlacli.parallel.memory import active_elements
from mlacli.parallel.placement import rules, without_effect
from mlacli.parallel.plan import ShardPlan, check_memory, plan_shards, shares_of
from mlacli.params import ContextParams, Params, SplitMode, SplitParams

_CACHED = {
    "rows": "latent rows", "columns": "their transposed values",
    "keys": "keys per head", "values": "values per head",
}  # fmt: skip
BUNDLED = "tinytales-q8_0.gguf"
_THREAD_WORK = 16 << 20  # weights a token is multiplied with, per thread


@dataclass(frozen=True)
class Prepared:
    """A model that may be loaded: checked, planned, and priced."""

    path: Path
    gguf: GgufFile
    arch: str
    model: ModuleType
    hparams: Any
    params: Params  # settled: split.mode and the context sizes are final
    plan: ShardPlan
    findings: tuple[Finding, ...]

    def tokenizer(self) -> Tokenizer | None:
        """The file's tokenizer, None when it has none."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        if not has_tokenizer(self.gguf.metadata):
            return None
        tokenizer = Tokenizer.from_metadata(self.gguf.metadata)
        if tokenizer.n_vocab > self.hparams.n_vocab:
            raise GgufError(
                f"the tokenizer has {tokenizer.n_vocab} tokens, token_embd {self.hparams.n_vocab}",
                "the file is damaged, or its tokenizer is another model's",
            )
        return tokenizer

    @cached_property
    def predicted_tps(self) -> float | None:
        """Decode tokens a second to expect, from rates measured here; None off the CPU."""
        if any(rank.kind != "cpu" for rank in self.plan.ranks):
            return None
        from mlacli.backends.numpy_speed import predict_tps

        return predict_tps(self.plan, self.hparams)

    def check_memory(self) -> None:
        """MemoryBudgetError when the plan doesn't fit its devices."""
        check_memory(self.plan)

    @property
    def n_threads(self) -> int:
        """CPU threads of all ranks together: -t, else one for each `_THREAD_WORK` up to the cores.

        Threads of small products wait for each other more than they compute, on busy hosts badly.
        """
        asked = self.params.context.n_threads
        if not asked:
            work = sum(active_elements(shard, self.hparams) for shard in self.plan.shards)
            asked = min(len(os.sched_getaffinity(0)), int(work / _THREAD_WORK))
        return max(asked, len(self.plan.ranks))  # each rank is a thread

    @property
    def effective(self) -> tuple[tuple[str, str, str], ...]:
        """What will run, as (name, value, note)."""
        split, context, plan = self.params.split, self.params.context, self.plan
        graph, skipped = split.mode == "graph", self.hparams.n_skipped
        fits = f"trained with {plan.n_ctx_train}, {plan.n_ctx_fits} fit"
        rows = [
            ("model", str(self.path), self.gguf.metadata.text("general.name")),
            ("architecture", self.arch, f"{skipped} MTP blocks skipped" if skipped else ""),
            ("split mode", str(split.mode), f"experts by {split.expert_split}" if graph else ""),
            ("devices", ",".join(r.device for r in plan.ranks), ", ".join(plan.idle) and "idle: "
             + ", ".join(plan.idle)),
            ("context", str(plan.n_ctx), fits),
            ("batch", f"{context.n_batch} / {context.n_ubatch}", "logical / physical"),
            ("attention", f"-mla {context.mla} -fa {'on' if context.flash_attn else 'off'}",
             attention_text(context)),
            ("cache type", " / ".join(part.cache_type for part in plan.cache),
             " / ".join(_CACHED[part.name] for part in plan.cache)),
            *self._sparse_row(),
            ("reduce type", context.graph_reduce_type if graph else "-", ""),
            *self._thread_row(),
            *self._host_row(),
            *self._tiles_row(),
        ]  # fmt: skip
        rows += [(f.flag, f.verdict, f.message) for f in self.findings if f.level == "note"]
        return tuple(rows)

    def _thread_row(self) -> Iterator[tuple[str, str, str]]:
        """CPU threads, where a rank computes on the CPU."""
        if any(rank.kind == "cpu" for rank in self.plan.ranks):
            yield "threads", str(self.n_threads), f"{self.n_threads // len(self.plan.ranks)} a rank"

    def _host_row(self) -> Iterator[tuple[str, str, str]]:
        """What GPUs keep in host memory, where they do."""
        if on_host := sum(rank.host for rank in self.plan.ranks):
            how = "weights that GPUs read over the link; experts are copied ahead for many tokens"
            yield "host memory", f"{on_host / 2**30:.2f} GiB", how

    def _tiles_row(self) -> Iterator[tuple[str, str, str]]:
        """How GPUs keep the types that take more memory there than in the file."""
        kinds = {rank.rank: rank.kind for rank in self.plan.ranks}
        types = {
            s.qtype.name for s in self.plan.shards
            if kinds[s.rank] != "cpu" and s.qtype.name in GROWN and len(s.shape) > 1
        }  # fmt: skip
        if types:
            how = "as in the file" if self.plan.small else "in tiles"
            why = "less memory, half as fast" if self.plan.small else "more memory, twice as fast"
            yield "weights", f"{', '.join(sorted(types))} {how}", why

    def _sparse_row(self) -> Iterator[tuple[str, str, str]]:
        """How cache rows are chosen; nothing for a file without indexer."""
        hp = self.hparams
        if hp.sparse is not None:
            keys = self.params.context.indexer_cache_type_k
            who = f"{sum(hp.sparse.full)} of {hp.n_layer} layers choose, by keys in {keys}"
            yield "sparse attention", f"top {hp.sparse.top_k}", who
        elif hp.indexer is not None:
            yield "sparse attention", "off", "the indexer is left out"


def bundled_model() -> Path:
    """The small model that ships with mlacli."""
    return Path(str(files("mlacli.bundled").joinpath(BUNDLED)))


def prepare(
    path: str | Path | GgufFile | None, params: Params, *, refuse_oversize: bool = True
) -> Prepared:
    """The model at `path` (None = the bundled one) ready to load; every refusal comes from here.

    An open file, or what stands in for one, becomes the engine's to close.
    Without `refuse_oversize` a plan that doesn't fit is returned too, to be looked at.
    """
    if isinstance(path, GgufFile):
        file = path
    else:
        file = GgufFile.open(path or bundled_model(), params.model.override_kv)
    try:
        prepared = _prepare(file, params)
        if refuse_oversize:
            prepared.check_memory()
        return prepared
    except BaseException:
        file.close()
        raise


def _prepare(file: GgufFile, params: Params) -> Prepared:
    if "general.architecture" not in file.metadata:
        raise GgufError(
            f"{file.path.name} names no architecture", "it is no model file: convert it again"
        )
    arch = file.arch
    params, findings = guard(arch, params)
    model = model_of(arch)
    findings += check(arch, params)
    raise_first_error(findings)
    params = settled(params)
    if params.strict:
        _refuse_changes(findings)
    hp = settle_indexer(model.Hparams.from_gguf(file), params.context)
    if hp.indexer is None:  # glm-dsa files needn't have one
        findings += tuple(f for f in indexer_rules(False, params) if f not in findings)
        raise_first_error(findings)
    _check_types(file)
    devices = find_devices(params.split)
    main_device(params.split, devices)
    host = Device("host", "cpu", *host_memory())
    context = replace(params.context, n_ubatch=min(params.context.n_ubatch, params.context.n_batch))

    def planned(split: SplitParams) -> ShardPlan:
        return plan_shards(
            model, arch, hp, file.tensors, params.model, split, context, devices, host,
            _way_of_sums(split, context, devices),
        )  # fmt: skip

    split = _settle_mode(arch, params, hp, devices, planned)
    plan = planned(split)
    findings += (*_idle_rules(params, plan), *_idle_gpus(params))
    if context.n_ctx > hp.n_ctx_train:
        findings += (_beyond_training(params, plan),)
    context = _clipped(context, plan.n_ctx)
    plan = replace(plan, n_ubatch=context.n_ubatch)
    params = replace(params, split=split, context=context)
    return Prepared(file.path, file, arch, model, hp, params, plan, findings)


def settle_indexer(hp: Any, context: ContextParams) -> Any:
    """`hp` with its indexer as the flags want it; GgufError when a layer would reuse no choice."""
    if hp.indexer is None:
        return hp
    top_k = context.dsa_top_k or hp.indexer.top_k
    indexer = replace(hp.indexer, top_k=top_k, on=not context.no_dsa)
    if indexer.on:
        indexer.check()
        if context.mla == 0:
            raise UsageError(
                "-mla 0 keeps no latent rows, which sparse attention reads",
                "use -mla 1, 2 or 3, or --no-dsa",
            )
    return replace(hp, indexer=indexer)


def together(prepared: Sequence[Prepared]) -> list[Prepared]:
    """The same models, to be loaded at once; MemoryBudgetError when they can't be.

    Where they don't fit as they are, each keeps fewer float32 copies of its weights.
    """

    def fits(plans: Sequence[ShardPlan]) -> MemoryBudgetError | None:
        try:
            check_memory(replace(plans[0], ranks=tuple(r for plan in plans for r in plan.ranks)))
        except MemoryBudgetError as e:
            hint = f"all {len(plans)} modes are loaded at once: use a smaller -c, or fewer modes"
            return MemoryBudgetError(e.device, e.need, e.have, hint)
        return None

    if fits([p.plan for p in prepared]) is None:
        return list(prepared)
    plans = [
        replace(p.plan, ranks=tuple(replace(r, dequant=r.dequant // len(prepared)) for r in
                                    p.plan.ranks))
        for p in prepared
    ]  # fmt: skip
    if (error := fits(plans)) is not None:
        raise error
    return [replace(p, plan=plan) for p, plan in zip(prepared, plans, strict=True)]


def _refuse_changes(findings: Sequence[Finding]) -> None:
    for finding in findings:
        if finding.verdict in ("downgraded", "changed"):
            raise StrictDowngrade(finding.message, finding.hint + ", or leave --strict out")


def _settle_mode(
    arch: str, params: Params, hp: Any, devices: tuple[Device, ...], planned: Any
) -> SplitParams:
    """The split with its mode decided: by the number of devices, or under auto by what fits.

    Of several modes that fit GPUs, the one that decodes fastest by the plan (parallel/advice.py).
    """
    split = params.split
    if split.mode not in (None, "auto"):
        return split
    several = replace(split, mode="layer" if len(devices) > 1 else "none")
    if split.mode is None:
        return several
    modes: tuple[SplitMode, ...] = ("none",)
    if len(devices) > 1 and all(device.kind != "cpu" for device in devices):
        modes = ("none", "layer", "graph") if _runs_as_graph(arch, params) else ("none", "layer")
    fitting = []
    for mode in modes:
        with suppress(MlacliError):  # too large, or not with the other flags
            plan = planned(replace(split, mode=mode))
            check_memory(plan)
            fitting.append((token_us(plan, hp, Speeds()), mode))
    return replace(split, mode=min(fitting, key=lambda one: one[0])[1]) if fitting else several


def _way_of_sums(split: SplitParams, context: ContextParams, devices: tuple[Device, ...]) -> str:
    """The way of sums between GPUs, refused here where it isn't possible; of others p2p."""
    if split.mode != "graph" or any(device.kind == "cpu" for device in devices):
        return "p2p"
    from mlacli.backends.cuda_ways import way_of_sums

    shares = zip(devices, shares_of(split, devices), strict=True)
    return way_of_sums(context.comm, [device for device, share in shares if share > 0]) or "p2p"


def _runs_as_graph(arch: str, params: Params) -> bool:
    """Whether the other flags would let -sm graph be."""
    params, _ = guard(arch, replace(params, split=replace(params.split, mode="graph")))
    errors = [f for f in check(arch, params) if f.level == "error"]
    return params.split.mode == "graph" and not errors


def _clipped(context: ContextParams, n_ctx: int) -> ContextParams:
    n_batch = min(context.n_batch, n_ctx)
    return replace(context, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=min(context.n_ubatch, n_batch))


def _idle_rules(params: Params, plan: ShardPlan) -> Iterator[Finding]:
    """A warning for each rule of -ot that places nothing; on CPUs none places anything."""
    if all(rank.kind == "cpu" for rank in plan.ranks):
        return
    flag = params.spelled("override_tensor")
    for rule, why in without_effect(rules(params.model.override_tensor), plan.shards):
        yield Finding(
            "warning", flag, "warned", f"{flag} {rule} places nothing: {why}",
            "mlacli plan -v lists the tensors",
        )  # fmt: skip


def _idle_gpus(params: Params) -> Iterator[Finding]:
    """A warning where GPUs would be taken by default, were CuPy installed."""
    if "device" in params.typed or params.split.devices != ("cpu",) or params.split.vram:
        return
    if n := idle_gpus():
        yield Finding(
            "warning", "-dev", "warned",
            f"this machine's GPUs ({n}) are not used: CuPy is not installed",
            "install mlacli[cuda13], or mlacli[cuda12] for an older driver; -dev cpu wants the CPU",
        )  # fmt: skip


def _beyond_training(params: Params, plan: ShardPlan) -> Finding:
    return Finding(
        "warning", params.spelled("ctx_size"), "warned",
        f"the context of {plan.n_ctx} exceeds the training context of {plan.n_ctx_train}",
        "text beyond it may degrade",
    )  # fmt: skip


def _check_types(file: GgufFile) -> None:
    """Every tensor must be of a type that NumPy can unpack."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import _type_traits  # the package has no public list

    for info in file.tensors.values():
        name = info.qtype.name
        if name not in ("F32", "F16") and GGMLQuantizationType[name] not in _type_traits:
            raise UnsupportedFeature(
                f"tensor {info.name} has type {name}, which can't be multiplied",
                "use a file quantised with types such as Q4_K_M, IQ4_XS or Q8_0",
            )
