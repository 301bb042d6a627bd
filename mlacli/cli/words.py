"""Walks the words of a command line by the flag table: what was given, how, and what is wrong.

It takes llama.cpp's grammar: a flag that takes a value takes the next word, whatever it looks like.
No click here, and nothing is raised: `check-flags` reports all problems, the commands the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlacli import dialects
from mlacli.errors import UsageError
from mlacli.flag_entry import Flag
from mlacli.flag_values import close
from mlacli.flags import COMMANDS, ENVIRONMENT, EXCLUSIVE, by_long_name, parse_value
from mlacli.flags_foreign import BY_NAME, SERVER, Foreign

_TRUE, _FALSE = ("1", "on", "true", "enabled"), ("0", "off", "false", "disabled")


@dataclass(frozen=True, slots=True)
class Given:
    """One flag as typed (`word`, and its value's `text`) with the parsed value."""

    flag: Flag
    word: str
    text: str | None
    value: Any
    becomes: Foreign | None = None  # the word is llama.cpp's, and this says what it means here


@dataclass(frozen=True, slots=True)
class Idle:
    """An option of llama.cpp that changes nothing here, and why."""

    word: str
    text: str | None
    why: str


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
    items: list[Given | Idle | Problem] = field(default_factory=list)
    dialect: str | None = None  # whose counts of values hold for options that are not ours

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
        typed = self.typed
        for g in self.given:
            if g.word in ENVIRONMENT and typed[g.flag.key] != g.word:
                continue
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

    def notes(self) -> list[str]:
        """One line for each option of llama.cpp that was accepted, and each variable that lost."""
        said = [f"{i.word} has no effect: {i.why}" for i in self.items if isinstance(i, Idle)]
        said += [f"{g.word} is {g.becomes.why}" for g in self.given if g.becomes]
        last = self.typed
        said += [
            f"{last[g.flag.key]} wins over {g.word}={g.text}"
            for g in self.given
            if g.word in ENVIRONMENT and last[g.flag.key] != g.word
        ]
        return list(dict.fromkeys(said))

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
    table: tuple[Flag, ...],
    words: Sequence[str],
    environ: Mapping[str, str] | None = None,
    dialect: str | None = None,
) -> CommandLine:
    """The command line that `words` make, after what the environment sets."""
    line = CommandLine(table, dialect=dialect)
    by_name = {canonical(n): f for f in table for n in f.names}
    _read_environment(line, environ or {})
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, text = _split(word, by_name.keys() | BY_NAME.keys())
        flag = by_name.get(canonical(name))
        if flag is None or _means_another(flag, canonical(name), dialect):
            _foreign(line, name, text, rest, by_name)
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


def _means_another(flag: Flag, name: str, dialect: str | None) -> bool:
    """Whether this project's option of our flag's name takes another number of values."""
    if dialect is None or name not in dialects.dialect(dialect).by_name:
        return False
    return dialects.dialect(dialect).by_name[name].values != (flag.parse is not None)


def _problem(
    line: CommandLine,
    word: str,
    text: str | None,
    error: UsageError,
    verdict: Literal["refused", "unknown", "bad value"] = "bad value",
) -> None:
    line.items.append(Problem(word, text, error, verdict))


def _give(
    line: CommandLine, flag: Flag, word: str, text: str, becomes: Foreign | None = None
) -> None:
    try:
        line.items.append(Given(flag, word, text, parse_value(flag, text, word), becomes))
    except UsageError as e:
        _problem(line, word, text, e)


def _read_environment(line: CommandLine, environ: Mapping[str, str]) -> None:
    known = by_long_name(line.table)
    for name, key in ENVIRONMENT.items():
        if key not in known or not (text := environ.get(name)):
            continue
        if known[key].parse is not None:
            _give(line, known[key], name, text)
        elif text.lower() in _TRUE:
            line.items.append(Given(known[key], name, text, True))
        elif text.lower() in _FALSE:
            if twin := known.get(f"no_{key}"):
                line.items.append(Given(twin, name, text, True))
        else:
            what = f"{name}: {text!r} is neither on nor off"
            _problem(line, name, text, UsageError(what, f"set {name}=1 or unset it"))
    for name, option in _foreign_variables(environ).items():
        rule = BY_NAME.get(option)
        if not option:
            near = close(name[10:], [n[10:] for n in ENVIRONMENT]).replace(
                "mean ", "mean LLAMA_ARG_"
            )
            why = near or "neither mlacli nor llama.cpp has this variable"
            line.items.append(Idle(name, environ[name], why))
        elif rule is None or rule.becomes:
            continue  # a flag of another command of ours
        elif rule.verdict == "no effect" or rule.why == SERVER or rule.is_neutral(environ[name]):
            line.items.append(Idle(name, environ[name], rule.why))
        else:
            error = UsageError(f"{name} is not supported: {rule.why}", f"unset {name}")
            _problem(line, name, environ[name], error, "refused")


def _foreign_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Variable -> the option it stands for ('' = none), of the set ones that are not ours."""
    names = [n for n in environ if n.startswith("LLAMA_ARG_") and n not in ENVIRONMENT]
    found = {n: "" for n in names if environ[n]}
    for option in dialects.all_options() if found else ():
        negated = next((n for n in option.names if n.startswith("--no-")), None)
        without = option.env.replace("LLAMA_ARG_", "LLAMA_ARG_NO_")
        if negated and without in found:
            found[without] = negated
        if option.env in found:
            switched_off = option.values == 0 and environ[option.env].lower() in _FALSE
            if not switched_off:
                found[option.env] = option.names[0]
            elif negated:
                found[option.env] = negated
            else:
                del found[option.env]
    return found


def _foreign(
    line: CommandLine, word: str, text: str | None, rest: list[str], by_name: Mapping[str, Flag]
) -> None:
    """Takes a word that is not in the table, and the values that belong to it, off the line."""
    name = canonical(word)
    counts = dialects.value_counts(name, line.dialect)
    if text is None and counts is not None:
        text = _take(rest, *counts, by_name)
    rule = BY_NAME.get(name)
    if rule is not None:
        if rule.becomes:
            long, *fixed = rule.becomes
            _give(line, by_name[canonical(long)], word, fixed[0] if fixed else text or "", rule)
        elif rule.verdict == "no effect" or rule.is_neutral(text):
            why = rule.why if rule.verdict == "no effect" else f"{text} is what happens anyway"
            line.items.append(Idle(word, text, why))
        else:
            _problem(line, word, text, rule.error(word), "refused")
    elif owner := _owner(name):
        if text is None and counts is None and _takes_value(owner, name) and rest:
            text = rest.pop(0)
        error = UsageError(f"{word} is a flag of mlacli {owner}", "leave it out")
        _problem(line, word, text, error, "refused")
    elif name in by_name:
        hint = f"{word} {by_name[name].metavar} means something else in mlacli"
        error = UsageError(f"{word} as a switch is not supported", hint)
        _problem(line, word, text, error, "refused")
    else:
        _unknown(line, word, text, rest, by_name)


def _take(rest: list[str], fewest: int, most: int, by_name: Mapping[str, Flag]) -> str | None:
    """The words that belong to an option; beyond the fewest only those that are no flags."""
    n = min(fewest, len(rest))
    while n < min(most, len(rest)) and not _is_flag(rest[n], by_name):
        n += 1
    taken = rest[:n]
    del rest[:n]
    return " ".join(taken) if taken else None


def _is_flag(word: str, by_name: Mapping[str, Flag]) -> bool:
    return canonical(word) in by_name.keys() | BY_NAME.keys()


def _owner(name: str) -> str | None:
    """The other command of mlacli that has this flag."""
    for command, sections in COMMANDS.items():
        if any(name in flag.names for _, flags in sections for flag in flags):
            return command
    return None


def _takes_value(command: str, name: str) -> bool:
    flags = (flag for _, flags in COMMANDS[command] for flag in flags)
    return next(flag for flag in flags if name in flag.names).parse is not None


def _unknown(
    line: CommandLine, word: str, text: str | None, rest: list[str], by_name: Mapping[str, Flag]
) -> None:
    if word.startswith("-") and len(word) > 1:
        if text is None and rest and not rest[0].startswith("-"):
            text = rest.pop(0)
        near = close(canonical(word), [*by_name, *BY_NAME])
        _problem(
            line, word, text, UsageError(f"unknown flag {word}", near or "--help lists the flags"),
            "unknown",
        )  # fmt: skip
    else:
        hint = "quote a prompt of several words: -p 'Once upon a time'"
        if line.given and line.given[-1].flag.optional is not None:
            hint = f"{line.given[-1].word} takes on, off or auto"
        _problem(line, word, None, UsageError(f"unexpected word {word!r}", hint), "unknown")


def _exclude(line: CommandLine) -> None:
    """Flags that exclude each other; a word of the line wins over a variable."""
    typed = line.typed
    for keys in EXCLUSIVE:
        words = [typed[k] for k in keys if k in typed]
        if all(w in ENVIRONMENT for w in words) or not any(w in ENVIRONMENT for w in words):
            spoken = words
        else:
            spoken = [w for w in words if w not in ENVIRONMENT]
            line.items = [
                Idle(i.word, i.text, f"{spoken[0]} wins over it")
                if isinstance(i, Given) and i.flag.key in keys and i.word in ENVIRONMENT
                else i
                for i in line.items
            ]
        if len(spoken) > 1:
            error = UsageError(f"{' and '.join(spoken)} exclude each other", "give one of them")
            _problem(line, spoken[-1], None, error, "refused")
