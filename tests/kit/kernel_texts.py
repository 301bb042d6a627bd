"""What the texts of kernels/*.cu say of themselves: variants to compile, architecture, promises.

Lines of a header comment that are read here, beside those of DESIGN's order:
    // Variants  WTYPE=12 COLS=8; WTYPE=14 COLS=1     values for the macros, one set after the other
    // Needs     8.0                                  lowest compute capability; 9.0a for wgmma
    //                                                alone; a variant with @9.0a needs that much
    // Spills    none                                 held to by the compile test
A continued line begins with `//` and more than two blanks.
"""

from __future__ import annotations

import re
from functools import cache

from mlacli.backends import cuda_sources
from mlacli.backends.cuda_sources import kernel_folder, signatures

FILES = sorted({file for file, _ in signatures().values()})


def header(file: str, word: str) -> str:
    """The text of a line of the header comment, continued lines joined; empty when absent."""
    text = kernel_folder().joinpath(f"{file}.cu").read_text()
    found = re.search(rf"^// {word}\b[ \t]+(.*(?:\n//   .*)*)", text, re.M)
    return re.sub(r"\s*\n//\s*", " ", found[1]) if found else ""


def variants(file: str) -> list[tuple[dict[str, str], tuple[int, bool]]]:
    """Sets of macro values to compile `file` with, and what each needs; one without any if none.

    Needs: (lowest compute capability as 75, whether it is for that architecture alone).
    """
    lowest, found = header(file, "Needs"), []
    for one in header(file, "Variants").split(";"):
        words = one.split()
        macros = dict(word.split("=", 1) for word in words if "=" in word)
        own = next((word[1:] for word in words if word.startswith("@")), lowest)
        if words:
            found.append((macros, _needs(own)))
    return found or [({}, _needs(lowest))]


def _needs(text: str) -> tuple[int, bool]:
    found = re.match(r"(\d+)\.(\d)(a?)", text)
    return (int(found[1] + found[2]), bool(found[3])) if found else (75, False)


def promises_no_spills(file: str) -> bool:
    return header(file, "Spills").startswith("none")


def body(text: str, at: int) -> str:
    """The braces that open first after `at`, with all between."""
    start = text.index("{", at)
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start : end + 1]
    raise AssertionError("braces don't match")


def waits(file: str, name: str) -> bool:
    """Whether function `name` of a file calls pdl_wait, itself or through what it calls."""
    text = _bare(file)
    todo, seen = [name], {"if", "for", "while", "switch", "return"}
    while todo:
        function = todo.pop()
        seen.add(function)
        for found in re.finditer(rf"\b{function}\s*\([^;{{}}]*\)\s*{{", text):
            inside = body(text, found.start())
            if "pdl_wait()" in inside:
                return True
            called = set(re.findall(r"\b([a-z]\w*)\s*(?:<[^;{}()]*>)?\s*\(", inside))
            todo += called - seen
    return False


@cache
def _bare(file: str) -> str:
    """The text with headers inlined, without comments."""
    return re.sub(r"//.*|/\*.*?\*/", "", cuda_sources.source(file))
