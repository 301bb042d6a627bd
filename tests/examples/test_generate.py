"""The examples run as their first lines say; what needs torch or a GPU is checked elsewhere."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_generate_prints_the_prompt_and_more() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "generate.py"],
        cwd=EXAMPLES.parent, env={"PYTHONPATH": str(EXAMPLES.parent)}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
    assert len(done.stdout.split()) > 20
    assert "tokens a second" in done.stderr
