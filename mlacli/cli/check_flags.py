"""check-flags: what each flag of a whole command line, ours or llama.cpp's, would do here.

Thin: the words are walked by the same tables and judged by the same rules as in a run, and the
verdict on memory is the plan of a run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from mlacli import dialects
from mlacli.cli import console
from mlacli.cli.flag_command import FlagCommand
from mlacli.cli.invocation import Invocation, invocation, script_command
from mlacli.cli.words import CommandLine, Given, Idle, Problem, canonical, walk
from mlacli.errors import MlacliError, UsageError
from mlacli.flags import COMMANDS, ENVIRONMENT, to_params

if TYPE_CHECKING:
    from mlacli.compat import Finding
    from mlacli.parallel.plan import ShardPlan
    from mlacli.params import Params
    from mlacli.prepare import Prepared

_DEFAULT_ARCH = "deepseek2"
_DIFFERS = ("downgraded", "changed", "changes results")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one flag of the line would do."""

    flag: str
    value: str | None
    verdict: str
    message: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether the model fits: per device (name, bytes needed, bytes there)."""

    devices: tuple[tuple[str, int, int], ...]
    n_ctx: int
    n_ctx_fits: int

    @property
    def fits(self) -> bool:
        return all(need <= have for _, need, have in self.devices)

    def as_dict(self) -> dict[str, Any]:
        devices = [dict(zip(("device", "need", "have"), d, strict=True)) for d in self.devices]
        return {
            "fits": self.fits,
            "n_ctx": self.n_ctx,
            "n_ctx_fits": self.n_ctx_fits,
            "devices": devices,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """The verdicts of a line and what they add up to; `as_dict` documents the JSON keys."""

    called: Invocation
    arch: str
    arch_assumed: bool  # neither --arch nor a model's header says it
    asked_mode: str | None
    effective_mode: str
    verdicts: tuple[Verdict, ...]
    fit: Fit | None
    error: MlacliError | None  # the one that a run would end with

    @property
    def exit_code(self) -> int:
        if self.error is not None:
            return self.error.exit_code
        return 3 if any(v.verdict in _DIFFERS for v in self.verdicts) else 0

    def as_dict(self) -> dict[str, Any]:
        error = self.error and {"message": self.error.message, "hint": self.error.hint}
        return {
            "command": self.called.command,
            "program": self.called.program or None,
            "dialect": self.called.dialect,
            "arch": self.arch,
            "arch_assumed": self.arch_assumed,
            "commands": list(self.called.commands),
            "split_mode": {"asked": self.asked_mode, "effective": self.effective_mode},
            "flags": [asdict(v) for v in self.verdicts],
            "plan": self.fit and self.fit.as_dict(),
            "error": error,
            "exit_code": self.exit_code,
        }


def judge(
    words: Sequence[str],
    arch: str | None = None,
    vram: tuple[int, ...] = (),
    dialect: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Report:
    """The report on a command line; reads a model's header where the line names one."""
    from mlacli.compat import check, guard

    called = invocation(words, dialect)
    table = tuple(f for _, flags in COMMANDS[called.command] for f in flags)
    line = walk(table, called.flags, {**(environ or {}), **called.environ}, called.dialect)
    params = to_params(line.values, line.typed)
    if vram:
        params = replace(params, split=replace(params.split, vram=vram))
    errors: list[MlacliError] = [called.lacking] if called.lacking else []
    errors += [p.error for p in line.problems]
    fit, prepared = None, None
    if arch is None and called.command != "check-flags" and line["model"] is not None:
        try:
            prepared, too_big = _prepared(line["model"], params)
            fit, errors = _fit(prepared.plan), errors + too_big
        except MlacliError as e:
            errors.append(e)
            arch = _arch_of(line["model"])
    if prepared is not None:
        arch, settled, findings = prepared.arch, prepared.params, prepared.findings
    else:
        if arch is not None and (unknown := _unknown(arch)):
            errors.append(unknown)
        settled, findings = guard(arch or _DEFAULT_ARCH, params)
        findings = (*findings, *check(arch or _DEFAULT_ARCH, settled))
        errors += [UsageError(f.message, f.hint) for f in findings if f.level == "error"]
    mode = _mode(settled)
    verdicts = [*_program(called), *_typed(line, findings, mode, called)]
    verdicts += _untyped(line, findings)
    if missing := _missing_device(settled):
        errors.append(missing)
        verdicts = [_with_device(v, missing) for v in verdicts]
    return Report(
        called, arch or _DEFAULT_ARCH, arch is None, params.split.mode, mode, tuple(verdicts), fit,
        errors[0] if errors else None,
    )  # fmt: skip


def _prepared(path: str, params: Params) -> tuple[Prepared, list[MlacliError]]:
    """The model as a run would plan it, and the error when that doesn't fit; others are raised."""
    from mlacli.prepare import prepare

    prepared = prepare(path, replace(params, strict=False), refuse_oversize=False)
    prepared.gguf.close()
    try:
        prepared.check_memory()
    except MlacliError as e:
        return prepared, [e]
    return prepared, []


def _fit(plan: ShardPlan) -> Fit:
    need: dict[str, int] = {}
    for rank in plan.ranks:
        need[rank.device] = need.get(rank.device, 0) + rank.resident
    have = {rank.device: rank.capacity for rank in plan.ranks}
    devices = tuple((name, n, have[name]) for name, n in need.items())
    return Fit(devices, plan.n_ctx, plan.n_ctx_fits)


def _arch_of(path: str) -> str | None:
    """The architecture in a file's header, None where there is none."""
    from mlacli.loading.gguf_file import GgufFile

    try:
        file = GgufFile.open(path)
    except MlacliError:
        return None
    try:
        return file.arch if "general.architecture" in file.metadata else None
    finally:
        file.close()


def _unknown(arch: str) -> MlacliError | None:
    from mlacli.models import model_of

    try:
        model_of(arch)
    except MlacliError as e:
        return e
    return None


def _missing_device(params: Params) -> MlacliError | None:
    from mlacli.devices import find_devices

    try:
        find_devices(params.split)
    except MlacliError as e:
        return e
    return None


def _with_device(v: Verdict, e: MlacliError) -> Verdict:
    if canonical(v.flag) not in ("-dev", "--device", "LLAMA_ARG_DEVICE"):
        return v
    return replace(v, verdict="refused", message=e.message, hint=e.hint)


def _mode(params: Params) -> str:
    if params.split.mode is not None:
        return params.split.mode
    return "layer" if len(params.split.vram or params.split.devices) > 1 else "none"


def _program(called: Invocation) -> Iterator[Verdict]:
    if e := called.lacking:
        yield Verdict(called.program, None, "refused", e.message, e.hint)


def _typed(
    line: CommandLine, findings: Sequence[Finding], mode: str, called: Invocation
) -> Iterator[Verdict]:
    """One verdict for each flag as typed; a flag that counts no more says so."""
    last = {g.flag.key: g for g in line.given}
    by_word = {f.flag: f for f in reversed(findings)}  # the first finding about a flag counts
    for item in line.items:
        if isinstance(item, Problem):
            e = item.error
            yield Verdict(item.word, item.text, item.verdict, e.message, e.hint)
        elif isinstance(item, Idle):
            yield Verdict(item.word, item.text, "no effect", item.why)
        elif (w := last[item.flag.key]) is not item and (
            not item.flag.repeats or item.word in ENVIRONMENT
        ):
            why = f"{w.word} wins over it" if item.word in ENVIRONMENT else "given again later"
            yield Verdict(item.word, item.text, "no effect", why)
        elif item.flag.key == "split_mode" and item.value not in (mode, "auto"):
            yield Verdict(item.word, item.text, "downgraded", f"runs as -sm {mode}")
        elif called.foreign and (differs := _differs(item, line, by_word)):
            yield Verdict(item.word, item.text, *differs)
        elif f := by_word.get(item.word):
            yield Verdict(item.word, item.text, f.verdict, f.message, f.hint)
        elif item.becomes:
            yield Verdict(item.word, item.text, "renamed", item.becomes.why)
        else:
            yield Verdict(item.word, item.text, "supported")


def _differs(
    item: Given, line: CommandLine, by_word: Mapping[str, Finding]
) -> tuple[str, str, str] | None:
    """(verdict, message, hint) where llama.cpp's own run would differ from ours."""
    if item.flag.key == "seed" and item.value is not None and line["temp"] > 0:
        why = "a seed draws other numbers than in llama.cpp; runs of mlacli repeat each other"
        return "changes results", why, "use --temp 0 to compare"
    asked = item.flag.key == "gpu_layers" and item.value and "device" not in line.values
    if asked and (f := by_word.get(item.word)):
        return "changed", f.message, "name GPUs with -dev, or give -ngl 0"
    return None


def _untyped(line: CommandLine, findings: Sequence[Finding]) -> Iterator[Verdict]:
    """Findings about flags that were not typed."""
    typed = {g.word for g in line.given}
    for f in findings:
        if f.flag not in typed:
            yield Verdict(f.flag, None, f.verdict, f.message, f.hint)


def print_report(report: Report) -> None:
    columns = ("flag", "value", "verdict", "why")
    rows = []
    for v in report.verdicts:
        why = f"{v.message} ({v.hint})" if v.hint else v.message
        rows.append((v.flag, v.value or "", v.verdict, why))
    if rows:
        console.table(columns, rows)
        console.result("")
    if name := report.called.dialect:
        source = dialects.dialect(name)
        console.result(f"options of: {source.repository} at {source.commit[:9]}")
    asked = report.asked_mode or "not given"
    console.result(f"architecture: {report.arch}{' (assumed)' * report.arch_assumed}")
    console.result(f"split mode: {report.effective_mode} (asked: {asked})")
    for text in plan_lines(report.fit):
        console.result(text)
    ends = {0: "runs as asked", 3: "would run differently than asked"}
    console.result(f"result: {ends.get(report.exit_code, 'refused')}")


def plan_lines(fit: Fit | None) -> Iterator[str]:
    if fit is None:
        return
    sizes = (f"{d} needs {n / 2**30:.2f} of {h / 2**30:.2f} GiB" for d, n, h in fit.devices)
    yield f"plan: {'fits' if fit.fits else 'does not fit'}: {', '.join(sizes)}"
    yield f"context: {fit.n_ctx} ({fit.n_ctx_fits} fit)"


class CheckFlagsCommand(FlagCommand):
    """Takes its own flags up to the first other word; the rest is the line to judge."""

    reads_environment = False

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own, rest = [], list(args)
        flags = {canonical(n): f for f in self.table for n in f.names}
        while rest and (flag := flags.get(canonical(rest[0].partition("=")[0]))):
            values = int(flag.parse is not None and "=" not in rest[0])
            own += rest[: 1 + values]
            del rest[: 1 + values]
        super().parse_args(ctx, own)
        if not ctx.resilient_parsing:
            ctx.params["words"] = rest[1:] if rest[:1] == ["--"] else rest
        return []


def run(line: CommandLine, words: list[str]) -> None:
    script = line["file"]
    if script is not None and words:
        raise UsageError("a command line beside --file", "give one of them")
    if script is None and not words:
        raise UsageError("no command line to judge", "e.g. check-flags -- llama-cli -m model.gguf")
    commands: tuple[str, ...] = ()
    if script is not None:
        chosen = script_command(script)
        words, commands = chosen.words, chosen.commands
    report = judge(words, line["arch"], line["vram"], line["dialect"], os.environ)
    if commands:
        report = replace(report, called=replace(report.called, commands=commands))
    if len(found := report.called.commands) > 1:
        console.note(f"{len(found)} commands found, only the first is judged: {found[0]}")
    if line["json"]:
        console.result(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        print_report(report)
    if report.error is not None:
        raise report.error
    raise click.exceptions.Exit(report.exit_code)


command = CheckFlagsCommand(
    "check-flags",
    run,
    "Says for each flag of a llama.cpp, ik_llama.cpp or mlacli command line what it would do here.",
    usage="[FLAGS] [--] COMMAND LINE",
    notes=(
        "The line may begin with its program (llama-cli, llama-server, llama-sweep-bench, mlacli "
        "run-model, ...) and variables (LLAMA_ARG_CTX_SIZE=4096 llama-cli ...); those that are set "
        "count too. With -m FILE in the line its header is read, and the plan says what fits.",
        "Verdicts: supported; warned (runs as asked, but); renamed; no effect (and why); "
        "changes results; changed (device or mode); downgraded (split mode); refused (why, and "
        "what to do); unknown; bad value.",
        "JSON keys: command, program, dialect, arch, arch_assumed, commands (of a script: all that "
        "call a known program, the first is judged), split_mode {asked, effective}, flags [{flag, "
        "value, verdict, message, hint}], plan {fits, n_ctx, n_ctx_fits, devices [{device, need, "
        "have}]}, error {message, hint}, exit_code; program, dialect, asked, value, plan and "
        "error may be null; need and have are bytes.",
        "Exit: 0 runs as asked; 3 would run, but results, mode, device or memory differ from what "
        "was asked; else the code that the run would end with (1 bad file or memory, 2 usage).",
    ),
)
