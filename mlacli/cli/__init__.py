"""The `mlacli` command: lazy subcommands, and the one place where errors become exit codes.

Nothing heavy is imported here, so that --help costs neither numpy nor gguf nor cupy.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

import click
from click.shell_completion import CompletionItem, shell_complete

from mlacli import __version__
from mlacli.cli import console
from mlacli.errors import KernelCompileError, MlacliError, UsageError
from mlacli.flag_values import nearest

_COMMANDS = {
    "run-model": ("mlacli.cli.run_model", "continue a prompt, or chat"),
    "sweep-bench": ("mlacli.cli.sweep_bench", "prefill and decode speed over the context"),
    "perplexity": ("mlacli.cli.perplexity", "perplexity of a text, KL divergence, modes compared"),
    "check-flags": ("mlacli.cli.check_flags", "what a llama.cpp command line would do here"),
    "devices": ("mlacli.cli.devices", "GPUs, their links and speed, which split pays"),
    "plan": ("mlacli.cli.plan", "shards and memory per device, from the file header"),
}

_HELP = """\
Usage: mlacli COMMAND [FLAGS]

  Runs MLA-attention GGUF models with head-wise tensor parallelism, with llama.cpp's flags.

Commands:
{commands}

Other:
  --version       version
  --list-devices  devices of this machine
  -h, --help      this text; `mlacli COMMAND --help` lists the flags of a command

Try:
  mlacli run-model -p "Once upon a time" -n 64      a story by the small model that comes along
  mlacli run-model -m model.gguf                    a chat, where the file has a template"""


# What writing to a stream fails with, and reading does not.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF)

_OWN_WORDS = ("--help", "--version", "--list-devices")


class LazyGroup(click.Group):
    """Imports a subcommand's module when it is called, not when it is listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(_COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def get_help(self, ctx: click.Context) -> str:
        rows = (f"  {name:<14}{summary}" for name, (_, summary) in _COMMANDS.items())
        return _HELP.format(commands="\n".join(rows))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("-"):
            return [CompletionItem(w) for w in _OWN_WORDS if w.startswith(incomplete)]
        return [
            CompletionItem(name, help=summary)
            for name, (_, summary) in _COMMANDS.items()
            if name.startswith(incomplete)
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # the shell asks for completions
            return super().parse_args(ctx, ["--", *args])
        first = args[0] if args else "--help"
        if first in ("-h", "--help"):
            click.echo(self.get_help(ctx))
            ctx.exit()
        if first == "--list-devices":
            from mlacli.cli.flag_command import device_list

            click.echo(device_list())
            ctx.exit()
        if first == "--version":
            click.echo(f"mlacli {__version__}")
            ctx.exit()
        if first.startswith("-"):
            raise UsageError(f"{first} before a command", "write mlacli run-model " + first)
        if first not in _COMMANDS:
            raise UsageError(f"unknown command {first!r}", nearest(first, _COMMANDS))
        return super().parse_args(ctx, ["--", *args])


cli = LazyGroup("mlacli", add_help_option=False)


def run(args: list[str]) -> int:
    """The exit code of one command line; what went wrong is one line on stderr."""
    try:
        return _run(args)
    finally:
        with suppress(OSError):  # a full disk, which was said when the line was written
            console.close_logs()


def _run(args: list[str]) -> int:
    try:
        code = _invoked(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _silence()
        return 0
    except MlacliError as e:
        if isinstance(e, KernelCompileError):
            console.log(e.log.rstrip(), 0)
        return _failed(e.message, e.hint, e.exit_code)
    except click.ClickException as e:
        return _failed(e.format_message(), "", 2)
    except OSError as e:
        if e.errno in _UNWRITABLE and e.filename is None:
            return _failed(f"can't write the output: {e.strerror}", "", 1)
        return _internal(e)
    except Exception as e:
        return _internal(e)


def _invoked(args: list[str]) -> int:
    try:
        with cli.make_context("mlacli", list(args)) as ctx:
            cli.invoke(ctx)
    except click.exceptions.Exit as e:
        return e.exit_code
    return 0


def _internal(e: Exception) -> int:
    what = f"internal error: {type(e).__name__}: {e}"
    return _failed(what, "set MLACLI_DEBUG=1 to see the traceback", 1)


def _failed(message: str, hint: str, code: int) -> int:
    """Prints the one `Error:` line, after what was already written to stdout."""
    try:
        sys.stdout.flush()
    except OSError:
        _silence()
    try:
        if os.environ.get("MLACLI_DEBUG", "0") not in ("", "0"):
            console.log(traceback.format_exc().rstrip(), 0)
        console.error(message, hint, code)
    except OSError:
        _silence()
    return code


def _silence() -> None:
    """Points streams that fail at nothing, so that the interpreter's last flush can't fail too."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(nothing, stream.fileno())


def _open_streams() -> None:
    """Streams that the caller closed (`>&-`) become the null device; text in any locale."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # text in an ASCII locale


def main() -> NoReturn:
    """The console script."""
    try:
        _open_streams()
        if instruction := os.environ.get("_MLACLI_COMPLETE"):
            sys.exit(shell_complete(cli, {}, "mlacli", "_MLACLI_COMPLETE", instruction))
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # outside a command: while it starts or ends
        sys.exit(130)
