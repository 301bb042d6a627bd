"""sweep-bench: prints the rows of `sweep.sweep` as ik_llama.cpp does, as table or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlacli.cli import console
from mlacli.cli.flag_command import FlagCommand
from mlacli.cli.start import prepared_model
from mlacli.cli.words import CommandLine

if TYPE_CHECKING:
    from mlacli.engine import Engine
    from mlacli.sweep import SweepRow

_WIDTHS = (6, 6, 6, 8, 8, 8, 8)
_TITLES = ("PP", "TG", "N_KV", "T_PP s", "S_PP t/s", "T_TG s", "S_TG t/s")

Head = dict[str, int]


def run(line: CommandLine) -> None:
    from mlacli.engine import Engine
    from mlacli.sweep import sweep, sweep_shape

    prepared = prepared_model(line)
    shape = sweep_shape(prepared.plan.n_ctx, prepared.plan.n_ubatch, line["predict"])
    with console.LoadProgress() as progress, Engine(prepared, progress) as engine:
        progress.close()
        if engine.checked is not None:
            console.checked(engine.checked)
        rows = sweep(
            engine, shape, repetitions=line["n_repetitions"], warmup_batch=line["warmup_batch"]
        )
        show = row_printer(head(engine), line["output_format"])
        for row in rows:
            show(row)
        if shape.skipped is not None:
            console.note(
                f"stopped before N_KV {shape.skipped}: a row needs {max(shape.pp, shape.tg)} "
                f"tokens of the context of {shape.n_ctx}"
            )
        console.log(f"memory  {engine.peak_memory() / 2**20:10.1f} MiB peak")


def head(engine: Engine) -> Head:
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


def row_printer(constant: Head, output_format: str) -> Callable[[SweepRow], None]:
    """A function that prints one row; for md the table's head is printed at once.

    ik_llama.cpp's plot script takes the first line of stdout for the table's head.
    """
    if output_format == "jsonl":
        return lambda row: console.result(json.dumps(constant | row_values(row)))
    console.log("main: " + ", ".join(f"{k} = {v}" for k, v in constant.items()))
    console.result(_md_line([f"{t:>{w}}" for t, w in zip(_TITLES, _WIDTHS, strict=True)]))
    console.result("|" + "-|-".join("-" * w for w in _WIDTHS) + "-|")
    return lambda row: console.result(md_row(row))


def row_values(row: SweepRow) -> dict[str, int | float]:
    """The measured part of a JSON line: six decimals, as C prints %f."""
    times = {
        "t_pp": row.t_pp,
        "speed_pp": row.speed_pp,
        "t_tg": row.t_tg,
        "speed_tg": row.speed_tg,
    }
    counts = {"pp": row.pp, "tg": row.tg, "n_kv": row.n_kv}
    return counts | {k: round(v, 6) for k, v in times.items()}


def md_row(row: SweepRow) -> str:
    cells = [f"{n:6d}" for n in (row.pp, row.tg, row.n_kv)]
    for seconds, speed in ((row.t_pp, row.speed_pp), (row.t_tg, row.speed_tg)):
        cells += [f"{seconds:8.3f}", f"{speed:8.2f}"]
    return _md_line(cells)


def _md_line(cells: list[str]) -> str:
    return "|" + " | ".join(cells) + " |"


command = FlagCommand(
    "sweep-bench",
    run,
    "Measures decode and prefill speed at every depth of the context, one ubatch apart, and prints "
    "the table of ik_llama.cpp's llama-sweep-bench.",
)
