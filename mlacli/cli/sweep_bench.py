"""sweep-bench: runs `sweep.sweep` in one or several split modes, prints and draws its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mlacli.cli import console
from mlacli.cli.flag_command import FlagCommand
from mlacli.cli.start import open_engines, prepared_model, prepared_modes
from mlacli.cli.sweep_output import RowPrinter, row_values, token_times
from mlacli.cli.words import CommandLine
from mlacli.errors import MlacliError, UsageError

if TYPE_CHECKING:
    from mlacli.sweep import SweepRow
    from mlacli.sweep_compare import Point


def run(line: CommandLine) -> None:
    if line["plot"]:
        from mlacli.plot import check_plot

        check_plot(line["plot"])
    if line["results"]:
        draw_results(line)
        return
    rows = measure(line)
    if line["plot"]:
        draw(series(rows), line["plot"])
    n_failed = sum(bool(row.failed) for row in rows)
    if n_failed:
        why = next(row.failed for row in rows if row.failed)
        raise MlacliError(f"{n_failed} of {len(rows)} rows failed, the first with: {why}")


def measure(line: CommandLine) -> list[SweepRow]:
    """All rows, printed as they come."""
    from mlacli.sweep import sweep, sweep_shape
    from mlacli.sweep_compare import compare

    modes: Sequence[str] = line["compare"]
    prepared = prepared_modes(line, modes) if modes else [prepared_model(line)]
    n_ctx = min(p.plan.n_ctx for p in prepared)
    shape = sweep_shape(n_ctx, prepared[0].plan.n_ubatch, line["predict"])
    rows: list[SweepRow] = []
    with ExitStack() as stack:
        engines = open_engines(stack, prepared)
        show = RowPrinter(engines, line["output_format"], line["sweep_memory"])
        measured = sweep(
            engines, shape, repetitions=line["n_repetitions"], stride=line["sweep_stride"],
            warmup_batch=line["warmup_batch"], warm=not line["no_warmup"],
        )  # fmt: skip
        with console.StatusLine() as status:
            status.show("warming up")
            for row in measured:
                status.clear()
                show(row)
                if line["verbose"]:
                    console.log(token_times(row))
                console.event("timings", **row_values(row))
                if row.failed:
                    console.warning(f"N_KV {row.n_kv}, -sm {row.mode}: {row.failed}")
                rows.append(row)
                status.show(f"N_KV {row.n_kv} of {n_ctx} done")
        if len(engines) > 1:
            show.compared(compare(series(rows)))
        if shape.skipped is not None:
            console.note(
                f"stopped before N_KV {shape.skipped}: a row needs {max(shape.pp, shape.tg)} "
                f"tokens of the context of {shape.n_ctx}"
            )
        if line["verbose"]:
            for engine in engines:
                console.attention(engine.attention_forms)
        console.log(f"memory  {engines[0].peak_memory() / 2**20:10.1f} MiB peak")
    return rows


def series(rows: Sequence[SweepRow]) -> dict[str, list[Point]]:
    """Mode -> points, in the order of the modes."""
    from mlacli.sweep_compare import Point

    found: dict[str, list[Point]] = {}
    for row in rows:
        found.setdefault(row.mode, []).append(Point(row.n_kv, row.speed_pp, row.speed_tg))
    return found


def draw_results(line: CommandLine) -> None:
    """Draws saved results; nothing is measured."""
    from mlacli.sweep_files import read_series

    if not line["plot"]:
        raise UsageError("--results draws saved rows and needs --plot", "add --plot FILE.svg")
    found: dict[str, list[Point]] = {}
    for path in line["results"]:
        for label, points in read_series(path).items():
            name = label if label not in found else f"{label} ({path})"
            found[name] = points
    draw(found, line["plot"])


def draw(found: Mapping[str, Sequence[Point]], path: str) -> None:
    from mlacli.plot import draw as draw_file

    draw_file(found, path)
    console.log(f"drawn: {path}")


command = FlagCommand(
    "sweep-bench",
    run,
    "Measures decode and prefill speed at every depth of the context, one ubatch apart, and prints "
    "the table of ik_llama.cpp's llama-sweep-bench.",
)
