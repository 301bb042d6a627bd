"""What llama.cpp's and ik_llama.cpp's parsers accept: data extracted from their sources.

`tests/golden/extract_dialects.py` writes the JSON files; what becomes of an option here is in
`flags_foreign.py`. Read when a word is not in mlacli's own table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType

NAMES = ("llama_cpp", "ik_llama_cpp")

# Options of older versions that people still paste; the parsers of today don't know them.
_FORMER = {
    "llama_cpp": (
        ("--mlock", 0), ("--mmap", 0), ("--no-mmap", 0), ("-dio", 0), ("--direct-io", 0),
        ("-ndio", 0), ("--no-direct-io", 0), ("-spf", 1),
    ),
    "ik_llama_cpp": (("-fmoe", 0), ("--fused-moe", 0), ("--typical-p", 1), ("--slots", 0)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a parser: all its names, how many words follow, its environment variable."""

    names: tuple[str, ...]
    values: int
    env: str


@dataclass(frozen=True, slots=True)
class Dialect:
    """The options of one project's parser at one commit, by name."""

    repository: str
    commit: str
    files: tuple[str, ...]
    options: tuple[Option, ...]
    former: tuple[Option, ...]
    by_name: Mapping[str, Option]


@cache
def dialect(name: str) -> Dialect:
    """The dialect of that name, one of NAMES."""
    raw = json.loads(files(__name__).joinpath(f"{name}.json").read_text())
    options = tuple(Option(tuple(names), n, env) for names, n, env in raw["options"])
    former = tuple(Option((word,), n, "") for word, n in _FORMER[name])
    by_name = MappingProxyType({n: o for o in (*former, *options) for n in o.names})
    return Dialect(raw["repository"], raw["commit"], tuple(raw["files"]), options, former, by_name)


def all_options() -> Iterator[Option]:
    """The options of both projects, those of today."""
    for name in NAMES:
        yield from dialect(name).options


def value_counts(word: str, of: str | None = None) -> tuple[int, int] | None:
    """(fewest, most) words that follow an option in the dialect `of` (None = any), if known."""
    found = [
        option.values
        for name in NAMES
        if of in (None, name) and (option := dialect(name).by_name.get(word))
    ]
    if not found and of is not None:
        return value_counts(word)
    return (min(found), max(found)) if found else None
