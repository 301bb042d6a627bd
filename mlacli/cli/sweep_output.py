"""The lines of sweep-bench: ik_llama.cpp's table and JSON keys, ours after them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mlacli.cli import console

if TYPE_CHECKING:
    from mlacli.engine import Engine
    from mlacli.sweep import SweepRow
    from mlacli.sweep_compare import Comparison

_COLUMNS = (
    ("PP", 6), ("TG", 6), ("N_KV", 6), ("T_PP s", 8), ("S_PP t/s", 8), ("T_TG s", 8),
    ("S_TG t/s", 8),
)  # fmt: skip
_MEMORY = (("RSS HWM", 10), ("VRAM delta", 10))
_MODE = (("MODE", 6),)
_MIB = 1 << 20


class RowPrinter:
    """Prints rows as they come, in one format; for md and csv the head is printed at once.

    ik_llama.cpp's plot script takes the first line of stdout for the table's head.
    """

    def __init__(self, engines: Iterable[Engine], output_format: str, memory: bool) -> None:
        engines = list(engines)
        self._format, self._memory, self._several = output_format, memory, len(engines) > 1
        self._heads = {str(e.params.split.mode): head(e) for e in engines}
        self._configs = {str(e.params.split.mode): config(e) for e in engines}
        if output_format == "md":
            first = next(iter(self._heads.values()))
            console.log("main: " + ", ".join(f"{k} = {v}" for k, v in first.items()))
            extra = (_MEMORY if memory else ()) + (_MODE if self._several else ())
            console.result(md_head(*_COLUMNS, *extra))
        elif output_format == "csv":
            first = next(iter(self._heads.values()))
            console.result(_csv_line([*first, *_csv_keys(memory)]))

    def __call__(self, row: SweepRow) -> None:
        mode = row.mode
        if self._format == "md":
            console.result(md_row(row, self._memory, self._several))
        elif self._format == "csv":
            values = self._heads[mode] | row_values(row, self._memory) | own_values(row)
            console.result(_csv_line([values.get(k) for k in values if k != "memory"]))
        else:
            values = self._heads[mode] | row_values(row, self._memory) | own_values(row)
            console.result(json.dumps(values | {"config": self._configs[mode]}))

    def compared(self, comparisons: Iterable[Comparison]) -> None:
        """Ratios and overtakings: a second table, or one more JSON object per pair.

        A CSV file has one table only: there they go to stderr.
        """
        if self._format == "jsonl":
            for c in comparisons:
                console.result(json.dumps(_as_dict(c)))
            return
        comparisons = list(comparisons)
        show = console.result if self._format == "md" else console.log
        show("\n" + "\n".join(ratio_lines(comparisons)))


def head(engine: Engine) -> dict[str, int]:
    """What stays the same in all rows, by the names that ik_llama.cpp prints."""
    context, split = engine.params.context, engine.params.split
    threads = engine.prepared.n_threads
    return {
        "n_kv_max": engine.n_ctx,
        "n_batch": context.n_batch,
        "n_ubatch": context.n_ubatch,
        "flash_attn": int(context.flash_attn),
        "n_gpu_layers": -1 if split.n_gpu_layers is None else split.n_gpu_layers,
        "n_threads": threads,
        "n_threads_batch": threads,
    }


def config(engine: Engine) -> dict[str, str]:
    """The effective configuration, as it is printed on stderr."""
    return {
        name: f"{value} ({note})" if note else value
        for name, value, note in engine.prepared.effective
    }


def row_values(row: SweepRow, memory: bool = False) -> dict[str, Any]:
    """The original's part of a JSON line: six decimals, as C prints %f; null where it failed."""
    values: dict[str, Any] = {"pp": row.pp, "tg": row.tg, "n_kv": row.n_kv}
    values |= {"t_pp": _rounded(row.t_pp), "speed_pp": _rounded(row.speed_pp)}
    values |= {"t_tg": _rounded(row.t_tg), "speed_tg": _rounded(row.speed_tg)}
    if memory:
        values["rss_hwm_mib"] = round(row.peak / _MIB, 3)
        values["vram_delta_mib"] = None if row.vram is None else round(row.vram / _MIB, 3)
    return values


def own_values(row: SweepRow) -> dict[str, Any]:
    """What the original doesn't have; step times in seconds, memory in bytes."""
    return {
        "split_mode": row.mode,
        "step_p50": _rounded(row.step_percentile(50)),
        "step_p99": _rounded(row.step_percentile(99)),
        "memory": dict(row.memory),
        "failed": row.failed or None,
        "attention_prefill": row.attention.get("prefill") or None,
        "attention_decode": row.attention.get("decode") or None,
    }


def token_times(row: SweepRow) -> str:
    """How evenly tokens came: a step's time, as jsonl has it in step_p50 and step_p99."""
    p50, p99 = row.step_percentile(50), row.step_percentile(99)
    if not p50 or p99 is None:
        return f"N_KV {row.n_kv}: no tokens"
    which = f", -sm {row.mode}" if row.mode else ""
    return (
        f"N_KV {row.n_kv}{which}: a token took {p50 * 1e3:.3f} ms, at most {p99 * 1e3:.3f} ms "
        f"({p99 / p50:.2f}x) for 99 of 100"
    )


def _csv_keys(memory: bool) -> list[str]:
    from mlacli.sweep import SweepRow

    row = SweepRow(1, 1, 0, None, None)
    return [k for k in row_values(row, memory) | own_values(row) if k != "memory"]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _csv_line(cells: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def md_head(*columns: tuple[str, int]) -> str:
    """The table's head and its rule, which the plot script skips."""
    titles = _md_line([f"{title:>{width}}" for title, width in columns])
    return titles + "\n|" + "-|-".join("-" * width for _, width in columns) + "-|"


def md_row(row: SweepRow, memory: bool = False, mode: bool = False) -> str:
    cells = [f"{n:6d}" for n in (row.pp, row.tg, row.n_kv)]
    for seconds, speed in ((row.t_pp, row.speed_pp), (row.t_tg, row.speed_tg)):
        if seconds is None or speed is None:
            cells += [f"{'failed':>8}", f"{'nan':>8}"]  # nan: plot scripts read it as a number
        else:
            cells += [f"{seconds:8.3f}", f"{speed:8.2f}"]
    if memory:
        vram = "n/a" if row.vram is None else f"{row.vram / _MIB:.1f}"
        cells += [f"{row.peak / _MIB:10.1f}", f"{vram:>10}"]
    if mode:
        cells.append(f"{row.mode:>6}")
    return _md_line(cells)


def _md_line(cells: list[str]) -> str:
    return "|" + " | ".join(cells) + " |"


def ratio_lines(comparisons: list[Comparison]) -> list[str]:
    """The ratios, one row per depth and pair, then one line per overtaking (or that none is)."""
    width = max((len(c.name) for c in comparisons), default=0)
    lines = [md_head(("N_KV", 6), (f"{'PAIR':<{width}}", width), ("S_PP", 8), ("S_TG", 8))]
    cells = [
        (n_kv, [f"{n_kv:6d}", f"{c.name:<{width}}", _ratio_cell(pp), _ratio_cell(tg)])
        for c in comparisons
        for n_kv, pp, tg in zip(c.n_kv, c.pp, c.tg, strict=True)
    ]
    lines += [_md_line(row) for _, row in sorted(cells, key=lambda cell: cell[0])]
    lines.append("")
    for c in comparisons:
        for what, ratios in (("S_PP", c.pp), ("S_TG", c.tg)):
            lines += _overtaking_lines(c, what, ratios)
    return lines


def _ratio_cell(ratio: float | None) -> str:
    return f"{'nan':>8}" if ratio is None else f"{ratio:8.3f}"


def _overtaking_lines(c: Comparison, what: str, ratios: tuple[float | None, ...]) -> list[str]:
    found = c.overtakings(ratios)
    if found:
        return [f"{what}: {o.ahead} overtakes {o.behind} at N_KV {o.n_kv}" for o in found]
    known = [r for r in ratios if r is not None]
    if not known:
        return [f"{what}: {c.mode} and {c.base} have no depth in common"]
    ahead, behind = (c.mode, c.base) if max(known) > 1 else (c.base, c.mode)
    return [f"{what}: {ahead} stays ahead of {behind}"]


def _as_dict(c: Comparison) -> Mapping[str, Any]:
    def part(ratios: tuple[float | None, ...]) -> dict[str, Any]:
        overtakings = [
            {"n_kv": o.n_kv, "ahead": o.ahead, "behind": o.behind} for o in c.overtakings(ratios)
        ]
        return {"ratio": [_rounded(r) for r in ratios], "overtakings": overtakings}

    return {"compare": c.name, "n_kv": list(c.n_kv), "pp": part(c.pp), "tg": part(c.tg)}
