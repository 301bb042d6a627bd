"""The flag reference, examples/FLAGS.md, from the tables that the parser reads.

tests/cli/test_flag_reference.py compares the two; UPDATE_GOLDEN=1 writes the file anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mlacli import dialects
from mlacli.cli.flag_command import show_default
from mlacli.dialects import Option
from mlacli.flag_entry import Flag
from mlacli.flags import COMMANDS, ENVIRONMENT
from mlacli.flags_foreign import BY_NAME

HEAD = """\
# Flags

Written by `UPDATE_GOLDEN=1 python -m pytest tests/cli/test_flag_reference.py` from the tables that
the parser reads. `_` and `-` are the same in long flags, `--flag=value` is `--flag value`. A
variable is read before the flags, which win; switches are on with `1`, `on` or `true`.

## mlacli's flags
"""

FOREIGN_HEAD = """
## Options of llama.cpp and ik_llama.cpp

{sources}. A number is how many values the option takes there, `-` that it is not known. "no effect"
is accepted with a note, because results, mode, device and memory stay as they are; "renamed" is
done under mlacli's name; "refused" ends a run with exit code 2. Values in brackets are accepted:
they ask for what happens anyway. `mlacli check-flags` says all this for a whole command line.
"""


def reference() -> str:
    """The whole file."""
    lines = [*HEAD.splitlines(), *_own(), *FOREIGN_HEAD.format(sources=_sources()).splitlines(), ""]
    lines += _table(("option", "llama.cpp", "ik_llama.cpp", "here", "why, and what to do"), _rows())
    return "\n".join(lines) + "\n"


def _own() -> Iterator[str]:
    """One table a section; a flag that differs between commands has a row for each."""
    sections: dict[str, dict[Flag, list[str]]] = {}
    for command, parts in COMMANDS.items():
        for title, flags in parts:
            for flag in flags:
                sections.setdefault(title, {}).setdefault(flag, []).append(command)
    for title, flags in sections.items():
        users = [command for command, parts in COMMANDS.items() if title in dict(parts)]
        yield from ("", f"### {title}: {', '.join(users)}", "")
        yield from _table(("flag", "default", "variable", "what it does"), map(_own_row, flags))


def _own_row(flag: Flag) -> tuple[str, ...]:
    names = ", ".join(f"`{n}`" for n in flag.names) + (f" {flag.metavar}" if flag.metavar else "")
    env = f"`{flag.env}`" if ENVIRONMENT.get(flag.env) == flag.key else ""
    return names, show_default(flag), env, flag.help


def _sources() -> str:
    found = [dialects.dialect(name) for name in dialects.NAMES]
    texts = [
        f"{len(d.options)} options of {d.repository} at `{d.commit[:9]}` ({', '.join(d.files)})"
        for d in found
    ]
    return " and ".join(texts)


def _rows() -> Iterator[tuple[str, ...]]:
    """What is not ours, options of both projects with a name in common joined, by name."""
    groups: list[list[str]] = []
    for option in _options():
        joined = [g for g in groups if set(g) & set(option.names)]
        rest = [g for g in groups if g not in joined]
        merged = [n for g in joined for n in g]
        groups = [*rest, merged + [n for n in option.names if n not in merged]]
    for group in sorted(groups, key=lambda g: g[0].lstrip("-").lower()):
        for rule in dict.fromkeys(BY_NAME[n] for n in group if n in BY_NAME):
            names = [n for n in group if n in rule.names]
            neutral = f" ({', '.join(rule.neutral)})" if rule.neutral else ""
            why = f"{rule.why}; {rule.hint}" if rule.hint else rule.why
            counts = [_count(name, names) for name in dialects.NAMES]
            yield ", ".join(f"`{n}`" for n in names), *counts, rule.verdict + neutral, why


def _options() -> Iterator[Option]:
    for name in dialects.NAMES:
        yield from dialects.dialect(name).former
        yield from dialects.dialect(name).options


def _count(dialect: str, names: Iterable[str]) -> str:
    known = dialects.dialect(dialect).by_name
    return next((str(known[n].values) for n in names if n in known), "-")


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    for row in (columns, ("---",) * len(columns), *rows):
        cells = (cell.replace("|", "\\|") for cell in row)
        yield f"| {' | '.join(cells)} |"
