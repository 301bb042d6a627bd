"""C++ programs around kernels' headers, under the sanitizers: for what needs no kernel launched."""

import shutil
import subprocess
from pathlib import Path

import pytest

INCLUDE = Path(__file__).parents[2] / "kernels" / "include"
_FLAGS = ("-std=c++17", "-ffp-contract=off", f"-I{INCLUDE}", "-Wall", "-Wextra", "-Werror",
          "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-fsanitize=address,undefined",
          "-fno-sanitize-recover=all")  # fmt: skip


def program(source: Path, folder: Path, optimised: str) -> Path:
    """`source` built in `folder`; skips the test where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the harness with")
    binary = folder / "harness"
    subprocess.run(["g++", *_FLAGS, optimised, str(source), "-o", str(binary)], check=True)
    return binary
