"""Texts of the kernels: headers inlined, parameters read off. Knows neither CuPy nor compiler."""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

_KERNEL = re.compile(
    r'extern "C" __global__\s+(?:__\w+__\s*\([^)]*\)\s*)*void\s+'
    r"(?:__\w+__\s*\([^)]*\)\s*)*(\w+)\(([^)]*)\)"
)
_KINDS = {"int": "i", "float": "f", "long": "l"}


def kernel_folder() -> Traversable:
    """The package mlacli.kernels; in a checkout that isn't installed, the folder it maps."""
    try:
        return files("mlacli.kernels")
    except ModuleNotFoundError:
        return Path(__file__).parents[2] / "kernels"


def source(file: str) -> str:
    """kernels/<file>.cu with our own headers inlined, each once; #line keeps places right."""
    root, seen = kernel_folder(), set[str]()

    def inlined(path: str) -> list[str]:
        lines = []
        for number, line in enumerate(root.joinpath(path).read_text().splitlines(), 1):
            match = re.match(r'\s*#include "([\w.]+)"', line)
            if match is None:
                lines.append("" if line.strip() == "#pragma once" else line)
            elif match[1] in seen:
                lines.append("")
            else:
                seen.add(match[1])
                header = f"include/{match[1]}"
                lines += [f'#line 1 "kernels/{header}"', *inlined(header)]
                lines += [f'#line {number + 1} "kernels/{path}"']
        return lines

    return "\n".join([f'#line 1 "kernels/{file}.cu"', *inlined(f"{file}.cu"), ""])


@cache
def signatures() -> dict[str, tuple[str, str]]:
    """Kernel -> (file, parameters) of every kernel: p pointer, i int, l long long, f float."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(kernel_folder().iterdir(), key=lambda path: path.name):
        if path.name.endswith(".cu"):
            for kernel, parameters in _KERNEL.findall(path.read_text()):
                assert kernel not in found, f"two kernels are called {kernel}"
                found[kernel] = path.name.removesuffix(".cu"), _kinds(parameters)
    return found


def _kinds(parameters: str) -> str:
    return "".join(
        "p" if "*" in one else _KINDS[one.replace("const ", "").split()[0]]
        for one in parameters.split(",")
    )


def debugging() -> bool:
    """MLACLI_DEBUG=1: line numbers in kernels, one allocation per buffer, ranks compared."""
    return os.environ.get("MLACLI_DEBUG", "0") not in ("", "0")
