"""Which flags go together: a table of rules over any architecture name. Returns findings only.

The guard is the original's contract (ik_llama.cpp PR 1821): on MLA architectures `-sm graph` with
expert placement or repacking flags runs as `-sm layer`, with one warning for the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from mlacli.errors import UsageError
from mlacli.params import Params

MLA_ARCHS = ("deepseek2", "glm-dsa", "mistral4")


@dataclass(frozen=True, slots=True)
class Finding:
    """What becomes of a flag. An error stops the run, a warning changes it, a note does neither."""

    level: Literal["error", "warning", "note"]
    flag: str
    verdict: Literal["refused", "downgraded", "changed", "no effect"]
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
        f"-sm graph can't be combined with {found[0]} on {arch}: running with -sm layer",
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


def _refused(params: Params) -> Iterable[Finding]:
    def no(key: str, message: str, hint: str) -> Finding:
        flag = params.spelled(key)
        return Finding("error", flag, "refused", message.format(flag=flag), hint)

    graph = "-sm graph needs {flag} " if _mode(params) == "graph" else "{flag} "
    if not params.context.flash_attn:
        rest = "on" if graph.startswith("-sm") else "off is not supported by this version"
        yield no("flash_attn", graph + rest, "leave it out: block-wise attention is the default")
    if params.context.mla == 0:
        rest = "1, 2 or 3" if graph.startswith("-sm") else "0 is not supported by this version"
        yield no("mla_use", graph + rest, "use -mla 3, the default")
    on_gpu = any(device != "cpu" for device in params.split.devices)
    if on_gpu and params.context.cache_type_k == "q8_0":
        yield no("cache_type_k", "{flag} q8_0 is not supported on GPUs by this version", "use f16")
    if not _on_cpu(params):
        for flag in offenders(params):
            yield Finding(
                "error", flag, "refused", f"{flag} is not supported on GPUs by this version",
                "leave it out, or run on -dev cpu",
            )  # fmt: skip


def _changed(params: Params) -> Iterable[Finding]:
    n_devices = len(params.split.vram or params.split.devices)
    if _mode(params) == "graph" and n_devices == 1:
        yield Finding(
            "warning", params.spelled("split_mode"), "changed",
            "-sm graph on one device runs as one rank",
            "name several devices, e.g. -dev cpu,cpu",
        )  # fmt: skip


def _idle(params: Params) -> Iterable[Finding]:
    mode = _mode(params)
    on_cpu = _on_cpu(params)
    graph_only = "it acts under -sm graph only"
    rules = (
        ("cache_type_v", True, "the latent row holds V too: -ctk is the type of both"),
        ("main_gpu", mode in ("layer", "graph"), "it picks the device of -sm none only"),
        ("tensor_split", mode == "none", "-sm none uses one device"),
        ("expert_split", mode != "graph", graph_only),
        ("graph_reduce_type", mode != "graph", graph_only),
        ("gpu_layers", on_cpu, "no effect on cpu"),
        ("n_cpu_moe", on_cpu, "no effect on cpu"),
        ("cpu_moe", on_cpu, "no effect on cpu"),
        ("run_time_repack", on_cpu, "no effect on cpu"),
        ("override_tensor", on_cpu, "no effect on cpu"),
    )
    for key, idle, why in rules:
        if idle and key in params.typed:
            yield Finding("note", params.spelled(key), "no effect", why)
