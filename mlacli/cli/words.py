"""Walks the words of a command line by the flag table: what was given, how, and what is wrong.

It takes llama.cpp's grammar: a flag that takes a value takes the next word, whatever it looks like.
No click here, and nothing is raised: `check-flags` reports all problems, the commands the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlacli.errors import UsageError
from mlacli.flag_values import close
from mlacli.flags import ENVIRONMENT, EXCLUSIVE, Flag, by_long_name, parse_value
from mlacli.flags_refused import BY_NAME


@dataclass(frozen=True, slots=True)
class Given:
    """One flag as typed (`word`, and its value's `text`) with the parsed value."""

    flag: Flag
    word: str
    text: str | None
    value: Any


@dataclass(frozen=True, slots=True)
class Problem:
    """A word that can't stand, its value as typed, and the error that says why."""

    word: str
    text: str | None
    error: UsageError
    verdict: Literal["refused", "unknown", "bad value"]


@dataclass(slots=True)
class CommandLine:
    """Everything that was typed, in order."""

    table: tuple[Flag, ...]
    items: list[Given | Problem] = field(default_factory=list)
    help: bool = False

    @property
    def given(self) -> list[Given]:
        return [item for item in self.items if isinstance(item, Given)]

    @property
    def problems(self) -> list[Problem]:
        return [item for item in self.items if isinstance(item, Problem)]

    @property
    def typed(self) -> dict[str, str]:
        """Key -> the word it was last typed as, in the order of these last words."""
        last: dict[str, str] = {}
        for g in self.given:
            last.pop(g.flag.key, None)
            last[g.flag.key] = g.word
        return last

    @property
    def values(self) -> dict[str, Any]:
        """Key -> parsed value of the flags that were given; the last one wins, repeats add up."""
        found: dict[str, Any] = {}
        for g in self.given:
            if g.flag.repeats:
                found[g.flag.key] = (*found.get(g.flag.key, ()), g.value)
            else:
                found[g.flag.key] = g.value
        return found

    def __getitem__(self, key: str) -> Any:
        """The value given for `key`, else the flag's default (a switch: False)."""
        if key in (values := self.values):
            return values[key]
        flag = next(f for f in self.table if f.key == key)
        return False if flag.parse is None else flag.default

    def repeated(self) -> list[str]:
        """One warning for each flag that was given more than once though only one value counts."""
        groups: dict[str, list[Given]] = {}
        for g in self.given:
            if not g.flag.repeats and g.flag.parse and g.word not in ENVIRONMENT:
                groups.setdefault(g.flag.key, []).append(g)
        return [
            f"{gs[-1].word} is given {len(gs)} times; the last one counts ({gs[-1].text})"
            for gs in groups.values()
            if len(gs) > 1
        ]

    def raise_first(self) -> None:
        if self.problems:
            raise self.problems[0].error


def canonical(word: str) -> str:
    """The word with `_` as `-` where it is a long flag."""
    return word.replace("_", "-") if word.startswith("--") else word


def _split(word: str, known: Iterable[str]) -> tuple[str, str | None]:
    """('-ub', '128') from '-ub=128'; a word without `=`, or a flag by itself, stays whole."""
    name, equals, text = word.partition("=")
    if not equals or canonical(word) in known:
        return word, None
    return name, text


def _optional(flag: Flag, rest: Sequence[str]) -> bool:
    """Whether the next word is a value of a flag whose value may be left out."""
    try:
        parse_value(flag, rest[0], "")
    except (UsageError, IndexError):
        return False
    return True


def walk(
    table: tuple[Flag, ...], words: Sequence[str], environ: Mapping[str, str] | None = None
) -> CommandLine:
    """The command line that `words` make, after what the environment sets."""
    line = CommandLine(table)
    by_name = {canonical(n): f for f in table for n in f.names}
    _read_environment(line, environ or {})
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            line.help = True
            continue
        name, text = _split(word, by_name.keys() | BY_NAME.keys())
        flag = by_name.get(canonical(name))
        if flag is None:
            _refuse(line, name, text, rest, by_name)
            continue
        if flag.parse is None:
            if text is not None:
                _problem(line, name, text, UsageError(f"{name} takes no value", f"write {name}"))
            else:
                line.items.append(Given(flag, name, None, True))
            continue
        if text is None:
            if flag.optional is not None and not _optional(flag, rest):
                text = flag.optional
            elif rest:
                text = rest.pop(0)
            else:
                hint = f"write {name} {flag.metavar}"
                _problem(line, name, None, UsageError(f"{name} needs a value", hint))
                break
        _give(line, flag, name, text)
    _exclude(line)
    return line


def _problem(
    line: CommandLine,
    word: str,
    text: str | None,
    error: UsageError,
    verdict: Literal["refused", "unknown", "bad value"] = "bad value",
) -> None:
    line.items.append(Problem(word, text, error, verdict))


def _give(line: CommandLine, flag: Flag, word: str, text: str) -> None:
    try:
        line.items.append(Given(flag, word, text, parse_value(flag, text, word)))
    except UsageError as e:
        _problem(line, word, text, e)


def _read_environment(line: CommandLine, environ: Mapping[str, str]) -> None:
    known = by_long_name(line.table)
    for name, key in ENVIRONMENT.items():
        if key in known and environ.get(name):
            _give(line, known[key], name, environ[name])


def _refuse(
    line: CommandLine, word: str, text: str | None, rest: list[str], by_name: Mapping[str, Flag]
) -> None:
    """Takes `word` and the values that seem to belong to it off the line, as a problem."""
    refused = BY_NAME.get(canonical(word))
    if refused is not None:
        if text is None and refused.values:
            text = " ".join(rest[: refused.values])
            del rest[: refused.values]
        _problem(line, word, text, refused.error(word), "refused")
    elif word.startswith("-") and len(word) > 1:
        if text is None and rest and not rest[0].startswith("-"):
            text = rest.pop(0)
        hint = close(canonical(word), by_name) or "--help lists the flags"
        _problem(line, word, text, UsageError(f"unknown flag {word}", hint), "unknown")
    else:
        hint = "quote a prompt of several words: -p 'Once upon a time'"
        if line.given and line.given[-1].flag.optional is not None:
            hint = f"{line.given[-1].word} takes on, off or auto"
        _problem(line, word, None, UsageError(f"unexpected word {word!r}", hint), "unknown")


def _exclude(line: CommandLine) -> None:
    typed = line.typed
    for keys in EXCLUSIVE:
        words = [typed[k] for k in keys if k in typed]
        if len(words) > 1:
            error = UsageError(f"{' and '.join(words)} exclude each other", "give one of them")
            _problem(line, words[-1], None, error, "refused")
