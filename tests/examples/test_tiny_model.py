"""How the bundled model is made, at toy scale; training and its kin need torch and transformers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "tiny_model"


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_corpus_is_told_again_from_its_seed() -> None:
    heldout = (FOLDER / "heldout.txt").read_text()
    told = run(FOLDER, "corpus.py", "--seed", "2", "--count", "3")
    assert told.strip()
    for story in told.strip().split("\n\n"):
        assert story.strip() in heldout, "seed 2 is the held-out text"
    assert run(FOLDER, "corpus.py", "--seed", "1", "--count", "3") != told


@pytest.mark.slow
def test_from_nothing_to_a_file_that_mlacli_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="training needs torch")
    pytest.importorskip("transformers", reason="training needs transformers")
    folder = tmp_path / "examples" / "tiny_model"
    shutil.copytree(FOLDER, folder)
    (tmp_path / "mlacli" / "bundled").mkdir(parents=True)
    run(folder, "train.py", "--out", "build", "--toy")
    run(folder, "make_gguf.py", "--model", "build")
    made = next((tmp_path / "mlacli" / "bundled").glob("*.gguf"))
    text = run(tmp_path, "-m", "mlacli", "run-model", "-m", str(made), "-p", "One day", "-n", "8")
    assert text.startswith("One day") and len(text) > 10
    run(folder, "evaluate.py", "--model", "build")
    assert "perplexity" in (folder / "results.json").read_text()
