"""The README's tour runs, line by line, as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TOUR = re.search(r"<!-- run -->\n```sh\n(.*?)```", README, re.DOTALL)[1].splitlines()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A folder with an `mlacli` that is this one."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "mlacli"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlacli "$@"\n')
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize("line", TOUR)
def test_a_line_of_the_tour(line, path, tmp_path):
    environ = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        line, shell=True, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if "-sm graph" in line and "Once upon" in line:
        plain = subprocess.run(
            TOUR[0], shell=True, env=environ, capture_output=True, text=True, check=True
        )
        assert done.stdout == plain.stdout, "the README says so"


def test_the_picture_and_every_linked_file_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    assert (ROOT / "examples" / "sweep.svg").read_text().lstrip().startswith("<?xml")
