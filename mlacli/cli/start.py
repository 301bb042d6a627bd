"""What every command that runs a model does first: prepare it and say on stderr what will run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from mlacli.cli import console
from mlacli.cli.words import CommandLine
from mlacli.errors import UsageError
from mlacli.flags import to_params

if TYPE_CHECKING:
    from mlacli.engine import Engine
    from mlacli.loading.presets import Preset
    from mlacli.loading.synthetic import SyntheticFile
    from mlacli.params import Params
    from mlacli.prepare import Prepared

_SLOW = 1.0  # predicted tokens a second under which a run is announced as slow


def prepared_model(line: CommandLine, **settled: Any) -> Prepared:
    """The model of `-m` (else the bundled one), checked and planned; no weight is read.

    `settled`: values by key that the command knows better than the line.
    """
    from mlacli.parallel.plan_report import plan_as_dict, plan_rows, shard_rows
    from mlacli.prepare import prepare

    params, preset = to_params(line.values | settled, line.typed), line.values.get("synthetic")
    prepared = prepare(_synthetic(line, preset, params) if preset else line["model"], params)
    if line["model"] is None and not preset:
        console.log(f"no -m given: running the bundled model {prepared.path.name}")
    console.findings(f for f in prepared.findings if f.level != "note")  # notes: in the rows below
    console.event("plan", **plan_as_dict(prepared.plan))
    console.table(*plan_rows(prepared.plan), to_stderr=True, turn=True)
    if line["verbose"] or line["verbosity"] >= console.TRACE:
        console.table(*shard_rows(prepared.plan), to_stderr=True)
    console.effective(prepared.effective)
    if prepared.predicted_tps is not None and prepared.predicted_tps < _SLOW:
        console.warning(f"this will be slow: about {prepared.predicted_tps:.2g} tokens a second")
    return prepared


def _synthetic(line: CommandLine, preset: Preset, params: Params) -> SyntheticFile:
    """--synthetic: random weights in the place of a file."""
    from mlacli.loading.synthetic import SyntheticFile

    if line["model"] is not None:
        raise UsageError("--synthetic takes the place of a model file", "leave -m out")
    on_gpus = "cpu" not in params.split.devices  # they draw what stays in host memory too
    return SyntheticFile(preset, override_kv=params.model.override_kv, on_gpus=on_gpus)


def prepared_modes(line: CommandLine, modes: Sequence[str], **settled: Any) -> list[Prepared]:
    """The model once per split mode of --compare; each must run as asked, and all fit together."""
    from mlacli.prepare import together

    if len(to_params(line.values | settled, line.typed).split.devices) < 2:
        raise UsageError(
            "--compare needs several devices to split a model over", "e.g. -dev cpu,cpu"
        )
    prepared = [prepared_model(line, split_mode=mode, **settled) for mode in modes]
    for mode, p in zip(modes, prepared, strict=True):
        if p.params.split.mode != mode:
            raise UsageError(
                f"--compare: -sm {mode} would run as -sm {p.params.split.mode}",
                next((f.hint for f in p.findings if f.verdict == "downgraded"), ""),
            )
    return together(prepared)


def open_engines(
    stack: ExitStack, prepared: Sequence[Prepared], *, warm: bool = False
) -> list[Engine]:
    """One engine per prepared model, closed with `stack`; `warm` ones computed a token."""
    from mlacli.engine import Engine

    engines = []
    for p in prepared:
        with console.LoadProgress() as progress, console.StatusLine() as status:

            def compiling(
                done: int, total: int,
                progress: console.LoadProgress = progress, status: console.StatusLine = status,
            ) -> None:  # fmt: skip
                progress.close()
                status.show(f"compiling kernels: {done} of {total}")

            engine = stack.enter_context(Engine(p, progress, compiling))
        if engine.n_compiled:
            console.log(f"compiled {engine.n_compiled} kernels in {engine.compile_s:.1f} s")
        if engine.sums:
            console.log(f"sums between GPUs: {engine.sums}")
        for problem in engine.load_problems:
            console.warning(problem)
        engines.append(engine)
        if engines[-1].checked is not None:
            console.checked(engines[-1].checked)
    for engine in engines if warm else ():
        engine.take_turn()
        engine.warm_up()
    return engines
