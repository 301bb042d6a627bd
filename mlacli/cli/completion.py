"""What the shell offers after TAB: flags, the words a flag takes, file names.

click asks (`_MLACLI_COMPLETE=bash_source mlacli` prints the script that does); the answers come
from the flag table.
"""

from __future__ import annotations

from collections.abc import Sequence

from click.shell_completion import CompletionItem

from mlacli.cli.words import canonical
from mlacli.flag_entry import Flag
from mlacli.flag_values import choices, devices


def complete(
    table: tuple[Flag, ...], before: Sequence[str], incomplete: str
) -> list[CompletionItem]:
    """The words that may stand for `incomplete` after the words `before`."""
    waiting = awaited(table, before)
    name, equals, begun = incomplete.partition("=")
    if waiting is None and equals and (flag := _named(table, name)):
        return [CompletionItem(f"{name}={word}") for word in _values(flag, begun)]
    if waiting is not None and (waiting.optional is None or not incomplete.startswith("-")):
        if waiting.metavar == "FILE":
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(word) for word in _values(waiting, incomplete)]
    if incomplete and not incomplete.startswith("-"):
        return []
    return [
        CompletionItem(name, help=flag.help)
        for flag in table
        for name in flag.names
        if name.startswith(canonical(incomplete))
    ]


def awaited(table: tuple[Flag, ...], before: Sequence[str]) -> Flag | None:
    """The flag whose value comes next, None when a flag may."""
    words = [word for word in before if word != "="]  # bash cuts -sm=graph into three words
    waiting: Flag | None = None
    for word in words:
        if waiting is not None and not (waiting.optional is not None and word.startswith("-")):
            waiting = None
            continue
        waiting = _named(table, word)
    return waiting


def _named(table: tuple[Flag, ...], word: str) -> Flag | None:
    """The flag of that name that takes a value."""
    found = (flag for flag in table if canonical(word) in flag.names and flag.parse)
    return next(found, None)


def _values(flag: Flag, begun: str) -> list[str]:
    words = ("cpu",) if flag.parse is devices else choices(flag.parse)
    return [word for word in words if word.startswith(begun.lower())]
