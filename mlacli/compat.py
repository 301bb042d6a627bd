"""Which flags go together: a table of rules over any architecture name. Returns findings only.

The guard is the original's contract (ik_llama.cpp PR 1821): on MLA architectures `-sm graph` with
expert placement or repacking flags runs as `-sm layer`, with one warning for the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from mlacli.attention_forms import LEAST_SCORES_MIB, has_values, is_blockwise
from mlacli.errors import UsageError
from mlacli.parallel.placement import rules
from mlacli.params import ContextParams, Params

MLA_ARCHS = ("deepseek2", "glm-dsa", "mistral4")


@dataclass(frozen=True, slots=True)
class Finding:
    """What becomes of a flag. An error stops the run, a note changes nothing.

    A warning says what runs differently; with the verdict "warned" all runs as asked.
    """

    level: Literal["error", "warning", "note"]
    flag: str
    verdict: Literal["refused", "downgraded", "changed", "warned", "no effect"]
    message: str
    hint: str = ""


# Flags that graph mode can't take, in the order in which the original tests them.
_OFFENDERS: tuple[tuple[tuple[str, ...], Callable[[Params], bool]], ...] = (
    (("n_cpu_moe", "cpu_moe"), lambda p: p.model.n_cpu_moe > 0 or p.model.cpu_moe),
    (("run_time_repack",), lambda p: p.model.run_time_repack),
    (("merge_up_gate_experts",), lambda p: p.model.merge_up_gate_experts),
    (("override_tensor",), lambda p: bool(p.model.override_tensor)),
)


def offenders(params: Params) -> list[str]:
    """The given flags that graph mode can't take, in test order, spelled as typed."""
    found = []
    for keys, given in _OFFENDERS:
        if given(params):
            typed = [key for key in keys if key in params.typed] or [keys[0]]
            found.append(params.spelled(typed[0]))
    return found


def guard(arch: str, params: Params) -> tuple[Params, tuple[Finding, ...]]:
    """`params` with graph mode downgraded where it must be; comes before every other check."""
    if params.split.mode != "graph" or arch not in MLA_ARCHS:
        return params, ()
    found = offenders(params)
    if not found:
        return params, ()
    finding = Finding(
        "warning",
        found[0],
        "downgraded",
        f"-sm graph can't be combined with {found[0]} on {arch}, so -sm layer takes its place",
        f"leave {found[0]} out to keep -sm graph",
    )
    return replace(params, split=replace(params.split, mode="layer")), (finding,)


def check(arch: str, params: Params) -> tuple[Finding, ...]:
    """Every other finding about settled flags; `arch` is already past the guard."""
    found = (rule for rules in (_refused, _changed, _idle) for rule in rules(params))
    return (*found, *indexer_rules(arch == "glm-dsa", params))


def indexer_rules(has_indexer: bool, params: Params) -> Iterable[Finding]:
    """Findings about the flags of sparse attention, for a file with or without an indexer."""
    dense, asked = not has_indexer or params.context.no_dsa, params.spelled("dsa")
    why = "attention is dense" if has_indexer else "the file has no sparse indexer"
    if params.context.dsa and dense:
        against = why if not has_indexer else f"{params.spelled('no_dsa')} excludes it"
        yield Finding("error", asked, "refused", f"{asked}: {against}", "leave it out")
    keys = ("no_dsa",) * (not has_indexer) + ("dsa_top_k", "indexer_cache_type_k") * dense
    for key in keys:
        if key in params.typed:
            yield Finding("note", params.spelled(key), "no effect", why)


def raise_first_error(findings: Iterable[Finding]) -> None:
    """UsageError for the first finding that stops the run."""
    for finding in findings:
        if finding.level == "error":
            raise UsageError(finding.message, finding.hint)


def _mode(params: Params) -> str:
    several = len(params.split.vram or params.split.devices) > 1
    return params.split.mode or ("layer" if several else "none")


def _on_cpu(params: Params) -> bool:
    return not params.split.vram and all(d == "cpu" for d in params.split.devices)


def _on_gpu(params: Params) -> bool:
    return any(device != "cpu" for device in params.split.devices)


def _refused(params: Params) -> Iterable[Finding]:
    def no(key: str, message: str, hint: str) -> Finding:
        flag = params.spelled(key)
        return Finding("error", flag, "refused", message.format(flag=flag), hint)

    context, layer = params.context, "or use -sm layer"
    if _mode(params) == "graph" and not context.flash_attn:
        yield no("flash_attn", "-sm graph needs {flag} on", f"leave it out: on is default; {layer}")
    if _mode(params) == "graph" and context.mla == 0:
        yield no("mla_use", "-sm graph needs {flag} 1, 2 or 3", f"use -mla 3, the default, {layer}")
    if has_values(context) and not context.flash_attn and context.cache_type_v == "q8_0":
        hint = "use f16 or bf16, or leave -fa off out"
        yield no("cache_type_v", "{flag} q8_0 needs -fa on", hint)
    if _on_gpu(params):
        rest = "is not supported on GPUs by this version"
        if not context.flash_attn:
            yield no("flash_attn", "{flag} off " + rest, "leave it out, or run on -dev cpu")
        if context.mla == 0:
            yield no("mla_use", "{flag} 0 " + rest, "leave it out, or run on -dev cpu")
    if not _on_cpu(params):
        names = params.split.devices
        if params.split.vram:
            names = tuple(f"gpu{i}" for i in range(len(params.split.vram)))
        try:
            rules(params.model.override_tensor, names)
        except UsageError as e:
            yield no("override_tensor", e.message.replace("{", "{{").replace("}", "}}"), e.hint)
    if params.model.cpu_moe and params.model.n_cpu_moe and not _on_cpu(params):
        few = f"{params.spelled('n_cpu_moe')} {params.model.n_cpu_moe}"
        yield no("cpu_moe", f"{{flag}} and {few} contradict each other", "keep one of them")


def _changed(params: Params) -> Iterable[Finding]:
    n_devices, n_shares = len(params.split.vram or params.split.devices), _n_shares(params)
    if _mode(params) == "graph" and min(n_devices, n_shares) == 1:
        ts = params.spelled("tensor_split")
        several = f"give several devices a share in {ts}"
        yield Finding(
            "warning", params.spelled("split_mode"), "changed",
            "-sm graph on one device runs as one rank",
            "name several devices, e.g. -dev cpu,cpu" if n_devices == 1 else several,
        )  # fmt: skip
    if _is_lifted(_as_it_runs(params)):
        flag = params.spelled("attention_max_batch")
        yield Finding(
            "warning", flag, "changed", f"{flag} is lifted to {LEAST_SCORES_MIB} MiB, the least",
            f"give {LEAST_SCORES_MIB} or more, or a smaller -ub",
        )  # fmt: skip


def _n_shares(params: Params) -> int:
    """How many devices get a share of the model; without -ts all do."""
    shares = params.split.tensor_split or [1.0] * len(params.split.vram or params.split.devices)
    return sum(share > 0 for share in shares)


def _n_gpus(params: Params) -> int:
    """How many different GPUs there are, those of --vram counted."""
    return len(params.split.vram or {name for name in params.split.devices if name != "cpu"})


def _is_lifted(context: ContextParams) -> bool:
    return 0 < context.attention_max_batch < LEAST_SCORES_MIB and not is_blockwise(context)


def _as_it_runs(params: Params) -> ContextParams:
    """Graph mode and GPUs always decode block-wise, so that -mla 2 is 3 there (B 3.8)."""
    context = params.context
    is_same = (_mode(params) == "graph" or _on_gpu(params)) and context.mla == 2
    return replace(context, mla=3) if is_same else context


def settled(params: Params) -> Params:
    """`params` as they run, once `check` has said what changes."""
    context = _as_it_runs(params)
    if _is_lifted(context):
        context = replace(context, attention_max_batch=LEAST_SCORES_MIB)
    return replace(params, context=context)


def _idle(params: Params) -> Iterable[Finding]:
    mode = _mode(params)
    on_cpu = _on_cpu(params)
    context = _as_it_runs(params)
    graph_only = "it acts under -sm graph only"
    v_type = "the latent row holds V too: -ctk is the type of both"
    if context.mla > 1 and not context.flash_attn:
        v_type += ", where ik_llama.cpp takes -ctv without flash attention"
    repacked = "weights are repacked for the GPU whenever they are loaded"
    if on_cpu:
        repacked = "nothing is repacked on the CPU"
    rules = (
        ("cache_type_v", not has_values(context), v_type),
        ("mla_use", context.mla != params.context.mla, f"it runs as -mla {context.mla} here"),
        ("graph_attn_precision", not context.flash_attn, "-fa off rounds nothing"),
        ("attention_max_batch", is_blockwise(context), "block-wise attention holds no matrix"),
        ("main_gpu", mode in ("layer", "graph"), "it picks the device of -sm none only"),
        ("tensor_split", mode == "none", "-sm none uses one device"),
        ("expert_split", mode != "graph", graph_only),
        ("graph_reduce_type", mode != "graph", graph_only),
        ("comm", mode != "graph", graph_only),
        ("comm", mode == "graph" and _n_gpus(params) < 2, "there are no sums between GPUs"),
        ("gpu_layers", on_cpu, "all layers are on the CPU"),
        ("n_cpu_moe", on_cpu, "all layers are on the CPU"),
        ("cpu_moe", on_cpu, "all layers are on the CPU"),
        ("run_time_repack", True, repacked),
        ("override_tensor", on_cpu, "all layers are on the CPU"),
    )
    for key, idle, why in rules:
        if idle and key in params.typed:
            yield Finding("note", params.spelled(key), "no effect", why)
