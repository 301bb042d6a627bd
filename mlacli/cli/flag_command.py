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

from mlacli.cli.words import CommandLine, walk
from mlacli.flags import COMMANDS, ENVIRONMENT, Flag

WIDTH = 100
_COLUMN = 38


class FlagCommand(click.Command):
    """The command `name` with the flags that `flags.COMMANDS` lists for it; runs `run(line)`."""

    def __init__(self, name: str, run: Callable[[CommandLine], None], summary: str) -> None:
        super().__init__(name, callback=run, help=summary, add_help_option=False)
        self.sections = COMMANDS[name]
        self.table = tuple(flag for _, flags in self.sections for flag in flags)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leaves the walked command line in `ctx.params`; the first problem is raised."""
        line = walk(self.table, args, os.environ)
        if line.help:
            click.echo(self.get_help(ctx))
            ctx.exit()
        line.raise_first()
        from mlacli.cli import console

        for message in line.repeated():
            console.warning(message)
        ctx.params["line"] = line
        return []

    def get_help(self, ctx: click.Context) -> str:
        summary = textwrap.fill(self.help or "", WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines = [f"Usage: {ctx.command_path} [FLAGS]", "", summary]
        for title, flags in self.sections:
            lines += ["", f"{title}:"]
            lines += [text for flag in flags for text in flag_help(flag)]
        lines += ["", "Other:", f"{'  -h, --help':<{_COLUMN}}this text"]
        known = {flag.key for flag in self.table}
        names = ", ".join(name for name, key in ENVIRONMENT.items() if key in known)
        lines += ["", "Environment, read before the flags:"]
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
        return ",".join(str(v) for v in value)
    if flag.metavar == "SIZE":
        return f"{value >> 30}G"
    return str(value)
