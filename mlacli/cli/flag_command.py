"""A click command made of flag tables: llama.cpp's grammar for the words, our layout for --help.

click's own parser reads `-mx` as `-m x` and knows no optional values, so `words.walk` does the
parsing; click keeps the command tree, the context and the exit.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import click
from click.shell_completion import CompletionItem

from mlacli import __version__
from mlacli.cli.completion import complete
from mlacli.cli.words import CommandLine, walk
from mlacli.flag_entry import Flag
from mlacli.flags import COMMANDS, ENVIRONMENT

WIDTH = 100
WORDS = "mlacli.words"  # where a context keeps the words before the one to complete
_COLUMN = 38


class FlagCommand(click.Command):
    """The command `name` with the flags that `flags.COMMANDS` lists for it; runs `run(line)`."""

    reads_environment = True

    def __init__(
        self,
        name: str,
        run: Callable[..., None],
        summary: str,
        *,
        usage: str = "[FLAGS]",
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(name, callback=run, help=summary, add_help_option=False)
        self.usage, self.notes = usage, notes
        self.sections = COMMANDS[name]
        self.table = tuple(flag for _, flags in self.sections for flag in flags)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leaves the walked command line in `ctx.params`; the first problem is raised."""
        if ctx.resilient_parsing:  # the shell asks for completions
            ctx.meta[WORDS] = list(args)
            return []
        line = walk(self.table, args, os.environ if self.reads_environment else None)
        if self._answered(ctx, line):
            ctx.exit()
        from mlacli.cli import console

        given = line.values
        verbosity = console.TRACE if given.get("verbose") else given.get("verbosity")
        console.open_logs(given.get("log_file"), given.get("log_jsonl"), verbosity)
        line.raise_first()
        for message in line.repeated():
            console.warning(message)
        for message in line.notes():
            console.note(message)
        ctx.params["line"] = line
        return []

    def _answered(self, ctx: click.Context, line: CommandLine) -> bool:
        """Whether --help, --version or --list-devices was asked for, and is printed."""
        if line["help"]:
            click.echo(self.get_help(ctx))
        elif line["version"]:
            click.echo(f"mlacli {__version__}")
        elif line["list_devices"]:
            click.echo(device_list())
        else:
            return False
        return True

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return complete(self.table, ctx.meta.get(WORDS, []), incomplete)

    def get_help(self, ctx: click.Context) -> str:
        summary = textwrap.fill(self.help or "", WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines = [f"Usage: {ctx.command_path} {self.usage}", "", summary]
        for title, flags in self.sections:
            lines += ["", f"{title}:"]
            lines += [text for flag in flags for text in flag_help(flag)]
        for note in self.notes:
            lines += ["", textwrap.fill(note, WIDTH)]
        if self.reads_environment:
            known = {flag.key for flag in self.table}
            names = ", ".join(name for name, key in ENVIRONMENT.items() if key in known)
            lines += ["", "Environment, read before the flags, which win:"]
            lines += textwrap.wrap(names, WIDTH, initial_indent="  ", subsequent_indent="  ")
        return "\n".join(lines)

    def invoke(self, ctx: click.Context) -> Any:
        assert self.callback is not None
        return ctx.invoke(self.callback, **ctx.params)


def flag_help(flag: Flag) -> Iterator[str]:
    """The lines of one flag: names and value on the left, help and default on the right."""
    left = "  " + ", ".join(sorted(flag.names, key=lambda n: (n.startswith("--"), len(n))))
    if flag.metavar:
        left += f" [{flag.metavar}]" if flag.optional is not None else f" {flag.metavar}"
    default = show_default(flag)
    text = flag.help + (f" (default: {default})" if default else "")
    right = textwrap.wrap(text, WIDTH - _COLUMN)
    if len(left) >= _COLUMN:
        yield left
        left = ""
    for part in right:
        yield f"{left:<{_COLUMN}}{part}"
        left = ""


def show_default(flag: Flag) -> str:
    """The default as one would type it; empty where the help text itself says it."""
    value = flag.default
    if value is None or value == ():
        return ""
    if value is True:
        return "on"
    if isinstance(value, tuple):
        return (";" if flag.metavar == "NAMES" else ",").join(str(v) for v in value)
    if flag.metavar == "SIZE":
        return f"{value >> 30}G"
    return str(value)


def device_list() -> str:
    """One line a device: name, kind, memory."""
    from mlacli.devices import present_devices

    lines = [
        f"  {d.name}: {d.kind}, {d.total / 2**20:.0f} MiB, {d.free / 2**20:.0f} MiB free"
        for d in present_devices()
    ]
    return "\n".join(["Available devices:", *lines])
