"""Which command line is meant: environment, program, project and flags, from words or a script.

No shell is run: a script is read by the rules of POSIX shells for words, quotes, comments,
continued lines and plain variables, and what goes beyond them is refused by name.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from mlacli import dialects
from mlacli.cli.words import canonical
from mlacli.errors import MlacliError, UsageError
from mlacli.flags import COMMANDS

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_WRAPPERS = {"exec", "nohup", "time", "setsid", "export", "if", "then", "else", "do", "!"}
_LAUNCHERS = {  # these have options of their own, and numbers, in front of the program
    "env", "sudo", "doas", "taskset", "numactl", "nice", "ionice", "chrt", "stdbuf", "timeout",
    "mpirun", "mpiexec", "srun",
}  # fmt: skip
_PROGRAM = re.compile(r"llama-[\w.-]+|main|server|perplexity|mlacli")
_LIKE_RUN_MODEL = ("llama-cli", "llama-completion", "llama-simple", "main")
_COUNTERPARTS = {
    "llama-sweep-bench": "sweep-bench", "llama-perplexity": "perplexity", "perplexity": "perplexity"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Invocation:
    """One command line. `dialect` None: mlacli's own, or not to be told."""

    command: str  # of mlacli
    program: str  # as called, without its folder; empty when the words begin with a flag
    dialect: str | None
    environ: Mapping[str, str]
    flags: tuple[str, ...]
    commands: tuple[str, ...] = ()  # of the script it is from, those that call a known program

    @property
    def foreign(self) -> bool:
        return self.program not in ("", "mlacli")

    @property
    def lacking(self) -> UsageError | None:
        """The error when mlacli has no counterpart of the program."""
        if not self.foreign or self.program in (*_LIKE_RUN_MODEL, "llama-sweep-bench"):
            return None
        if _COUNTERPARTS.get(self.program) == self.command:
            return None
        what = "mlacli has no server" if "server" in self.program else "mlacli has no counterpart"
        return UsageError(f"{self.program} is not supported: {what}", "use run-model")


def invocation(words: Sequence[str], dialect: str | None = None) -> Invocation:
    """What the words of one command call; one word alone is a whole line."""
    rest = list(words)
    if len(rest) == 1 and " " in rest[0]:
        chosen = chosen_command(shell_commands(rest[0], os.environ), "the line")
        return replace(invocation(chosen.words, dialect), commands=chosen.commands)
    at = _program_at(rest)
    n = at
    if n is None:  # no program: what is in front of the flags
        n = next((i for i, word in enumerate(rest) if not _in_front(word)), len(rest))
    environ = {m[1]: m[2] for m in map(_ASSIGNMENT.fullmatch, rest[:n]) if m}
    del rest[:n]
    if at is None:
        return Invocation("run-model", "", dialect, environ, tuple(rest))
    program = _name(rest.pop(0))
    if program == "mlacli":
        name = rest.pop(0) if rest and rest[0] in COMMANDS else "run-model"
        return Invocation(name, program, None, environ, tuple(rest))
    if program == "llama-bench":
        raise UsageError("llama-bench has options of its own", "use sweep-bench")
    name = _COUNTERPARTS.get(program, "run-model")
    name = name if name in COMMANDS else "run-model"
    return Invocation(name, program, dialect or _told(program, rest), environ, tuple(rest))


def _told(program: str, words: Sequence[str]) -> str | None:
    """The project whose program this is, or whose options alone occur; None when unclear."""
    if program == "llama-sweep-bench":
        return "ik_llama_cpp"
    known = [dialects.dialect(name).by_name.keys() for name in dialects.NAMES]
    told = set()
    for word in map(canonical, words):
        having = [name for name, names in zip(dialects.NAMES, known, strict=True) if word in names]
        told |= {having[0]} if len(having) == 1 else set()
    return told.pop() if len(told) == 1 else None


def script_command(path: str) -> Chosen:
    """The command line in a shell script, what it exports in front."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise MlacliError(f"can't read {path}: {e}", "check --file") from e
    return chosen_command(shell_commands(text, os.environ), path)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The words of the first of a script's `commands`, all of which could be meant."""

    words: list[str]
    commands: tuple[str, ...]


def chosen_command(commands: Sequence[Command], where: str) -> Chosen:
    """The first command that calls a known program, else the first that begins with a flag."""
    found = [c for c in commands if _program_at(c.words) is not None]
    found = found or [c for c in commands if c.words[0].startswith("-")]
    if not found:
        hint = "write it as llama-cli -m ..."
        raise UsageError(f"no llama.cpp or mlacli command in {where}", hint)
    first = next(i for i, command in enumerate(commands) if command is found[0])
    exports = (c.words[1:] for c in commands[:first] if c.words[0] == "export")
    exported = [w for words in exports for w in words if "=" in w]
    return Chosen(exported + found[0].readable(), tuple(" ".join(c.words) for c in found))


def _name(word: str) -> str:
    return PurePath(word).name.removesuffix(".exe")


def _in_front(word: str) -> bool:
    return bool(_ASSIGNMENT.fullmatch(word)) or word in _WRAPPERS or _name(word) in _LAUNCHERS


def _program_at(words: Sequence[str]) -> int | None:
    """Where the program is that the words call, None when they call none that is known.

    Behind a launcher its options, one value after each, and numbers are passed over.
    """
    launched = False
    for i, word in enumerate(words):
        name = _name(word)
        if _PROGRAM.fullmatch(name):
            return i
        if re.fullmatch(r"python[\d.]*", name):
            is_ours = "-m" in words[i:] and words[words.index("-m", i) + 1 :][:1] == ["mlacli"]
            return words.index("mlacli", i) if is_ours else None
        launched = launched or name in _LAUNCHERS
        its_own = word.startswith("-") or words[i - 1].startswith("-") or word[:1].isdigit()
        if not _in_front(word) and not (launched and its_own):
            return None
    return None


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a script; `error` says what in it needs a shell."""

    words: list[str]
    error: UsageError | None = None

    def readable(self) -> list[str]:
        if self.error:
            raise self.error
        return self.words


def shell_commands(text: str, environ: Mapping[str, str]) -> list[Command]:
    """The commands of a script as words; redirections are left out, plain variables put in."""
    variables = dict(environ)
    found: list[Command] = []
    words: list[str] = []
    error: UsageError | None = None
    for word in [*_pieces(text), None]:
        if word is not None:
            try:
                words += _expanded(word, variables)
            except UsageError as e:
                words.append("".join(part for _, part in word))
                error = error or e
        elif words:
            assigns = words[0] == "export" or all(_ASSIGNMENT.fullmatch(w) for w in words)
            if assigns and error is None:
                variables |= dict(w.split("=", 1) for w in words if "=" in w)
            if not assigns or words[0] == "export":
                found.append(Command(words, error))
            words, error = [], None
    return found


Word = list[tuple[str, str]]  # (quote, text) in a row; quote is ', ", \ or nothing

_TOKEN = re.compile(
    r"""(?P<skip>[ \t]+|\\\n)
      | (?P<redirect>&>>?|\d*[<>]{1,2}(?:&\d|&-)?)
      | (?P<end>\n|;|&|\||\(|\))
      | '(?P<single>[^']*)'
      | "(?P<double>(?:[^"\\]|\\.)*)"
      | \\(?P<escaped>.)
      | (?P<plain>[^\s;&|()<>'"\\]+)
    """,
    re.VERBOSE | re.DOTALL,
)


def _pieces(text: str) -> list[Word | None]:
    """Words, and None where a command ends."""
    text = text.replace("\r\n", "\n")
    found: list[Word | None] = []
    at, word, drop = 0, Word(), False
    while at <= len(text):
        m = _TOKEN.match(text, at)
        starts_comment = not word and at < len(text) and text[at] == "#"
        kind = m.lastgroup if m else None
        continued = m is not None and m[0] == "\\\n"
        if word and (at == len(text) or kind in ("skip", "redirect", "end")) and not continued:
            found += [] if drop else [word]
            word, drop = Word(), False
        if at == len(text):
            break
        if starts_comment:
            at = text.find("\n", at) if "\n" in text[at:] else len(text)
            continue
        if m is None or kind is None:
            line = text.count("\n", 0, at) + 1
            raise UsageError(f"a quote in line {line} is not closed", "close it")
        if kind == "end":
            found.append(None)
        elif kind == "redirect":
            drop = "&" not in m[0][1:]  # the next word is the file
        elif kind != "skip":
            word.append(({"single": "'", "double": '"', "escaped": "\\"}.get(kind, ""), m[kind]))
        at = m.end()
    return found


def _expanded(word: Word, variables: Mapping[str, str]) -> list[str]:
    """The words that one word of the script becomes; an unquoted variable may become several."""
    words, empty = [""], True
    for quote, text in word:
        if quote:
            words[-1] += _filled(text, variables) if quote == '"' else text
            empty = False
            continue
        home = os.path.expanduser(text) if text.startswith("~/") and not words[-1] else text
        filled = _filled(home + ("\n" if home.endswith("$") else ""), variables)
        parts = filled.split() if filled != home else [filled]
        words[-1] += parts[0] if parts else ""
        words += parts[1:]
        empty = empty and not parts
    return [] if empty else words


_MEANT = re.compile(r"""\\([$`"\\\n])|\$(?:\{(\w+)\}|(\w+))|(\$[({@*#?!$\n-]|`)""")


def _filled(text: str, variables: Mapping[str, str]) -> str:
    """`text` with the variables in it; UsageError for one that is not set, or more than that."""

    def value(m: re.Match[str]) -> str:
        if m[1]:
            return m[1].replace("\n", "")
        if m[4]:
            raise UsageError(f"{text.strip()!r} needs a shell", "write out what it stands for")
        if (name := m[2] or m[3]) not in variables:
            raise UsageError(f"${name} is not set in the script", "set it, or write its value")
        return variables[name]

    return _MEANT.sub(value, text)
