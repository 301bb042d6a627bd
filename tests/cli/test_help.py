"""Help texts, and that they cost neither numpy nor rich."""

import subprocess
import sys

import pytest

COMMANDS = ["run-model", "sweep-bench", "perplexity", "check-flags", "devices", "plan"]


def test_help_of_the_group(mlacli, golden):
    done = mlacli("--help")
    assert (done.code, done.err) == (0, "")
    golden("help", done.out)
    assert mlacli().out == done.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(mlacli, golden, name):
    done = mlacli(name, "--help")
    assert (done.code, done.err) == (0, "")
    golden(f"help-{name}", done.out)
    assert max(map(len, done.out.splitlines())) <= 100


def test_help_wins_over_a_mistake(mlacli):
    assert mlacli("run-model", "-ub", "x", "-h").code == 0
    assert mlacli("run-model", "-p", "--help", "--nonsense").code == 2


def test_version(mlacli):
    from mlacli import __version__

    assert mlacli("--version").out == f"mlacli {__version__}\n"


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_nothing_heavy(words):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mlacli", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert "click" in loaded
    assert not loaded & {"numpy", "gguf", "cupy", "rich", "tokenizers", "threadpoolctl"}
