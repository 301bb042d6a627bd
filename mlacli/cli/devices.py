"""devices: GPUs, who reaches whom, measured speeds, and which split of a model pays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mlacli.cli import console
from mlacli.cli.flag_command import FlagCommand
from mlacli.cli.words import CommandLine
from mlacli.errors import BackendError, MlacliError, UsageError
from mlacli.flags import to_params

if TYPE_CHECKING:
    from mlacli.backends.cuda_probe import Probe
    from mlacli.parallel.advice import Speeds
    from mlacli.parallel.plan import ShardPlan


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to run the model, its context, tokens a second to expect with nothing cached and deep.

    Deep is at as many rows for all choices of a list.
    """

    mode: str
    devices: tuple[str, ...]
    fits: bool
    n_ctx: int
    tps: float
    tps_deep: float
    n_kv_deep: int


def run(line: CommandLine) -> None:
    names = line["device"]
    if "cpu" in names:
        raise UsageError("devices looks at GPUs", "leave cpu out of -dev")
    probe, trouble = _probe(names, measure=not line["no_measure"])
    choices = _choices(line, probe) if line["model"] or line["synthetic"] else []
    if line["json"]:
        console.result(json.dumps(_as_dict(probe, trouble, choices), indent=2))
        return
    _print(probe, trouble)
    if choices:
        _print_advice(choices, probe)


def _probe(names: Sequence[str], measure: bool) -> tuple[Probe | None, str]:
    """What there is; None and why where there is no GPU."""
    from mlacli.backends.cuda_devices import device_count, device_memory

    for name in names:
        device_memory(name)  # raises for one that isn't there
    try:
        indices = [int(name.removeprefix("cuda")) for name in names] or range(device_count())
        if not indices:
            device_memory("cuda0")
    except BackendError as e:
        why = e.message.removeprefix("device cuda0 is not available: ")
        return None, f"{why} ({e.hint})" if e.hint else why
    from mlacli.backends import cuda_probe

    unique = list(dict.fromkeys(indices))
    return (cuda_probe.measured if measure else cuda_probe.listed)(unique), ""


# ---------------------------------------------------------------- what there is


def _print(probe: Probe | None, trouble: str) -> None:
    from mlacli.devices import host_memory

    total, free = host_memory()
    columns = ("device", "model", "capability", "SMs", "total", "free", "memory", "host link")
    rows = [("cpu", "host", "-", "-", _gib(total), _gib(free), "-", "-")]
    for gpu in probe.gpus if probe else ():
        rows.append((
            gpu.name, gpu.model, f"{gpu.capability // 10}.{gpu.capability % 10}", str(gpu.n_sm),
            _gib(gpu.total), _gib(gpu.free), _rate(gpu.memory_rate), _rate(gpu.host_rate),
        ))  # fmt: skip
    console.table(columns, rows, turn=True)
    if probe is None:
        console.result(f"\nno GPU: {trouble}")
        return
    if len(probe.gpus) < 2:
        return
    console.result("\npeer access, and copies from row to column:")
    names = tuple(gpu.name for gpu in probe.gpus)
    console.table(("from", *names), [_link_row(probe, i) for i in range(len(names))])
    if probe.how:
        figures = ", ".join(f"{us:.2f} us for {n} floats" for n, us in probe.sums.items())
        console.result(f"\nsums   {probe.how} ({probe.why}): {figures}")
        console.result(f"NCCL   {probe.nccl}")


def _link_row(probe: Probe, i: int) -> tuple[str, ...]:
    cells = [probe.gpus[i].name]
    for j in range(len(probe.gpus)):
        reach = "yes" if probe.access[i][j] else "no"
        rate = f" {_rate(probe.links[i][j])}" if probe.links else ""
        cells.append("-" if i == j else reach + rate)
    return tuple(cells)


def _gib(n: int) -> str:
    return f"{n / 2**30:.1f} GiB"


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.0f} GB/s" if rate else "-"


# ---------------------------------------------------------------- advice


def _choices(line: CommandLine, probe: Probe | None) -> list[Choice]:
    """Every mode on one, two, four .. and all GPUs; those of --vram in the place of real ones."""
    names = tuple(gpu.name for gpu in probe.gpus) if probe else ()
    n = len(line["vram"]) or len(names)
    if not n:
        raise BackendError(
            "there is no GPU to advise for", "--vram 80G,80G stands for GPUs that aren't here"
        )
    counts = sorted({1, n, *(2**i for i in range(n.bit_length()) if 2**i < n)})
    found = []
    for count in counts:
        for mode in ("none",) if count == 1 else ("layer", "graph"):
            try:
                found.append(_planned(line, mode, names[:count], count))
            except MlacliError as e:
                console.warning(f"-sm {mode} on {count}: {e.message}", e.hint)
    return _priced(found, speeds_of(probe))


def _planned(
    line: CommandLine, mode: str, names: tuple[str, ...], count: int
) -> tuple[ShardPlan, Any, bool]:
    """The plan of a choice, the model's hparams, and whether it fits."""
    from mlacli.loading.synthetic import SyntheticFile
    from mlacli.parallel.plan import check_memory
    from mlacli.prepare import prepare

    values = line.values | {"split_mode": mode, "device": names, "vram": line["vram"][:count]}
    params = to_params(values, line.typed)
    path = SyntheticFile(line["synthetic"]) if line["synthetic"] else line["model"]
    prepared = prepare(path, params, refuse_oversize=False)
    try:
        plan, fits = prepared.plan, True
        try:
            check_memory(plan)
        except MlacliError:
            fits = False
        # Ranks of --vram count as GPUs, for the bytes that weights take there.
        plan = replace(plan, ranks=tuple(replace(r, kind="cuda") for r in plan.ranks))
        return plan, prepared.hparams, fits
    finally:
        prepared.gguf.close()


def _priced(planned: Sequence[tuple[ShardPlan, Any, bool]], speeds: Speeds) -> list[Choice]:
    """Deep is at the end of the smallest context of those that fit, so that they compare."""
    from mlacli.parallel.advice import token_us

    sizes = [plan.n_ctx for plan, _, fits in planned if fits]
    deep = min(sizes or [plan.n_ctx for plan, _, _ in planned], default=0)
    found = []
    for plan, hp, fits in planned:
        tps, tps_deep = (1e6 / token_us(plan, hp, speeds, n_kv) for n_kv in (0, deep))
        used = tuple(rank.device for rank in plan.ranks)
        found.append(Choice(plan.mode, used, fits, plan.n_ctx, tps, tps_deep, deep))
    return found


def speeds_of(probe: Probe | None) -> Speeds:
    """The slowest GPU's memory and the measured sums; an H200's where nothing was measured."""
    from mlacli.parallel.advice import Speeds

    speeds = Speeds()
    if probe and all(gpu.memory_rate for gpu in probe.gpus):
        speeds = replace(speeds, memory=min(gpu.memory_rate for gpu in probe.gpus))
    return replace(speeds, sums=probe.sums) if probe and probe.sums else speeds


def best(choices: Sequence[Choice]) -> Choice | None:
    """The fastest that fits; of equals the one on fewer GPUs."""
    fitting = [c for c in choices if c.fits]
    return max(fitting, key=lambda c: (c.tps + c.tps_deep, -len(c.devices)), default=None)


def _print_advice(choices: Sequence[Choice], probe: Probe | None) -> None:
    measured = probe is not None and any(gpu.memory_rate for gpu in probe.gpus)
    basis = "measured speeds" if measured else "an H200's speeds"
    console.result(f"\ndecode to expect by plan and {basis} (for the order, not the figure):")
    columns = ("split", "GPUs", "context", "t/s empty", f"t/s at {choices[0].n_kv_deep}")
    console.table(columns, [
        (f"-sm {c.mode}", ",".join(c.devices), str(c.n_ctx) if c.fits else "doesn't fit",
         f"{c.tps:.0f}", f"{c.tps_deep:.0f}") for c in choices
    ])  # fmt: skip
    chosen = best(choices)
    if chosen is None:
        console.result("advice: none fits; a smaller -c, more GPUs or a smaller file might")
    else:
        where = "" if chosen.devices[0].startswith("gpu") else f" -dev {','.join(chosen.devices)}"
        console.result(f"advice: -sm {chosen.mode}{where} on {len(chosen.devices)}")


def _as_dict(probe: Probe | None, trouble: str, choices: Sequence[Choice]) -> dict[str, Any]:
    from dataclasses import asdict

    chosen = best(choices)
    found: dict[str, Any] = asdict(probe) if probe else {"gpus": []}
    return {
        **found,
        "no_gpu": trouble,
        "choices": [asdict(choice) for choice in choices],
        "advice": asdict(chosen) if chosen else None,
    }


command = FlagCommand(
    "devices",
    run,
    "Lists the GPUs of this machine and measures them: memory, links, sums over all of them, NCCL. "
    "With -m or --synthetic it says which split of the model decodes fastest on how many.",
)
