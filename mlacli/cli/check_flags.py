"""check-flags: what each flag of a whole command line, ours or llama.cpp's, would do here.

Thin: the words are walked by the same table and judged by the same rules as in a run.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import click

from mlacli.cli import console
from mlacli.cli.words import CommandLine, Problem, walk
from mlacli.errors import UsageError
from mlacli.flags import COMMANDS, to_params

if TYPE_CHECKING:
    from mlacli.compat import Finding
    from mlacli.params import Params

_DEFAULT_ARCH = "deepseek2"

_HELP = """\
Usage: mlacli check-flags [--json] [--arch NAME] [--] COMMAND LINE

  Says for each flag of a llama.cpp or mlacli command line what it would do here. The line may
  begin with its program (llama-cli, llama-server, llama-sweep-bench, mlacli run-model, ...).
  With -m FILE in the line the architecture comes from the file's header.

Flags:
  --json                              print one JSON object
  --arch NAME                         architecture to judge for (default: deepseek2)
  -h, --help                          this text

Verdicts: supported, no effect, downgraded, changed, refused, unknown, bad value.
JSON keys: command, arch, split_mode {asked, effective}, flags [{flag, value, verdict, message,
hint}], exit_code; asked and value may be null.
Exit: 0 runs as asked, 1 bad file, 2 refused, 3 would run differently than asked."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one flag of the line would do."""

    flag: str
    value: str | None
    verdict: str
    message: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The verdicts of a line and what they add up to; `as_dict` documents the JSON keys."""

    command: str
    arch: str
    asked_mode: str | None
    effective_mode: str
    verdicts: tuple[Verdict, ...]
    error: UsageError | None  # the first one

    @property
    def exit_code(self) -> int:
        if self.error is not None:
            return self.error.exit_code
        return 3 if any(v.verdict in ("downgraded", "changed") for v in self.verdicts) else 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "command": self.command,
            "arch": self.arch,
            "split_mode": {"asked": self.asked_mode, "effective": self.effective_mode},
            "flags": [asdict(v) for v in self.verdicts],
            "exit_code": self.exit_code,
        }


def judge(words: Sequence[str], arch: str | None = None) -> Report:
    """The report on a command line; reads a file's header where the line names one."""
    from mlacli.compat import check, guard

    name, flags = command_of(words)
    line = walk(tuple(f for _, table in COMMANDS[name] for f in table), flags)
    params = to_params(line.values, line.typed)
    arch = arch or _arch_of(line)
    settled, findings = guard(arch, params)
    findings = (*findings, *check(arch, settled))
    errors = [p.error for p in line.problems]
    errors += [UsageError(f.message, f.hint) for f in findings if f.level == "error"]
    return Report(
        name,
        arch,
        params.split.mode,
        _mode(settled),
        (*_typed(line, findings, _mode(settled)), *_untyped(line, findings)),
        errors[0] if errors else None,
    )


def command_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """('run-model', flags) of a command line, with or without environment and program in front."""
    rest = shlex.split(words[0]) if len(words) == 1 else list(words)
    while rest and re.match(r"[A-Za-z_]\w*=", rest[0]):
        rest.pop(0)
    if rest and re.fullmatch(r"python[\d.]*", PurePath(rest[0]).name) and rest[1:2] == ["-m"]:
        del rest[:2]
    program = PurePath(rest[0]).name.removesuffix(".exe") if rest else ""
    if program == "mlacli":
        name = rest[1] if rest[1:] and rest[1] in COMMANDS else "run-model"
        return name, rest[2:] if rest[1:2] == [name] else rest[1:]
    if re.fullmatch(r"llama-\S+|main|server", program):
        return "sweep-bench" if program == "llama-sweep-bench" else "run-model", rest[1:]
    return "run-model", rest


def _arch_of(line: CommandLine) -> str:
    if line["model"] is None:
        return _DEFAULT_ARCH
    from mlacli.loading.gguf_file import GgufFile
    from mlacli.models import model_of

    file = GgufFile.open(line["model"])
    try:
        model_of(file.arch)  # refuses an architecture that would not run
        return file.arch
    finally:
        file.close()


def _mode(params: Params) -> str:
    if params.split.mode is not None:
        return params.split.mode
    return "layer" if len(params.split.devices) > 1 else "none"


def _typed(line: CommandLine, findings: Sequence[Finding], mode: str) -> Iterator[Verdict]:
    """One verdict for each flag as typed; a flag that counts no more says so."""
    last = {g.flag.key: g for g in line.given if not g.flag.repeats}
    by_word = {f.flag: f for f in reversed(findings)}  # the first finding about a flag counts
    for item in line.items:
        if isinstance(item, Problem):
            e = item.error
            yield Verdict(item.word, item.text, item.verdict, e.message, e.hint)
        elif last.get(item.flag.key, item) is not item:
            yield Verdict(item.word, item.text, "no effect", "given again later")
        elif item.flag.key == "split_mode" and item.value not in (mode, "auto"):
            yield Verdict(item.word, item.text, "downgraded", f"runs as -sm {mode}")
        elif f := by_word.get(item.word):
            yield Verdict(item.word, item.text, f.verdict, f.message, f.hint)
        else:
            yield Verdict(item.word, item.text, "supported")


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
    asked = report.asked_mode or "not given"
    console.result(f"architecture: {report.arch}")
    console.result(f"split mode: {report.effective_mode} (asked: {asked})")
    ends = {0: "runs as asked", 2: "refused", 3: "would run differently than asked"}
    console.result(f"result: {ends[report.exit_code]}")


class CheckFlagsCommand(click.Command):
    """Takes its own flags up to the first other word; the rest is the line to judge."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = list(args)
        params: dict[str, Any] = {"as_json": False, "arch": None}
        while rest and rest[0] in ("--json", "--arch", "-h", "--help"):
            word = rest.pop(0)
            if word == "--json":
                params["as_json"] = True
            elif word != "--arch":
                click.echo(_HELP)
                ctx.exit()
            elif not rest:
                raise UsageError("--arch needs a value", "write --arch deepseek2")
            else:
                params["arch"] = rest.pop(0)
        ctx.params = {"words": rest[1:] if rest[:1] == ["--"] else rest, **params}
        return []


def run(words: list[str], as_json: bool, arch: str | None) -> None:
    report = judge(words, arch)
    if as_json:
        console.result(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        print_report(report)
    if report.error is not None:
        raise report.error
    raise click.exceptions.Exit(report.exit_code)


command = CheckFlagsCommand("check-flags", callback=run, add_help_option=False)
