"""--log-file, --log-jsonl, -lv, --list-devices, --version and what the shell completes."""

import json
import os
import subprocess
import sys

import pytest

from mlacli import __version__

RUN = ("run-model", "-p", "Hi", "--temp", "0")


def test_the_log_file_holds_what_stderr_got(mlacli, fake_model, tmp_path):
    path = tmp_path / "log.txt"
    done = mlacli(*RUN, "--log-file", str(path), "-c", "1", "-c", "128", "--offline")
    assert done.code == 0 and "-c is given 2 times" in done.err
    assert path.read_text() == done.err and "configuration:" in done.err
    done = mlacli(*RUN, "--log-file", str(path), "--nonsense")
    assert (done.code, path.read_text()) == (2, done.err), "begun anew, and errors go there too"
    done = mlacli(*RUN, "--log-file", str(tmp_path))
    assert done.code == 1 and "--log-file" in done.err


def test_events(mlacli, fake_model, tmp_path):
    path = tmp_path / "log.jsonl"
    done = mlacli(*RUN, "--log-jsonl", str(path), "-c", "1", "-c", "128", "--offline", "-lv", "0")
    assert (done.code, done.err) == (0, "")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [e["event"] for e in events]
    assert kinds == ["warning", "note", "plan", "configuration", "timings"]
    assert all(e["time"] > 1e9 for e in events)
    assert events[0]["message"] == "-c is given 2 times; the last one counts (128)"
    assert events[2]["n_ctx"] == 256
    assert events[3]["split mode"] == {"value": "none", "note": ""}
    assert events[4]["n_decoded"] == 7 and events[4]["peak_memory"] == 64 << 20
    assert mlacli(*RUN, "--log-jsonl", str(path), "--lora", "x").code == 2
    last = json.loads(path.read_text().splitlines()[-1])
    assert (last["event"], last["exit_code"]) == ("error", 2) and last["hint"]


@pytest.mark.parametrize(
    ("flags", "warnings", "plan", "shards"),
    [
        (["-lv", "0"], False, False, False),
        (["-lv", "1"], False, False, False),
        (["--verbosity", "2"], True, False, False),
        ([], True, True, False),
        (["--log-verbosity", "4"], True, True, True),
        (["-v"], True, True, True),
    ],
)
def test_verbosity(mlacli, fake_model, flags, warnings, plan, shards):
    err = mlacli(*RUN, "-c", "1", "-c", "2", *flags).err
    assert ("warning: -c" in err) == warnings
    assert ("configuration:" in err) == ("1.5 GiB" in err) == plan
    assert ("output.weight" in err) == shards
    assert mlacli(*RUN, "-lv", "0", "--nonsense").err.startswith("Error: "), "never hidden"
    assert "configuration:" in mlacli(*RUN).err, "the next run speaks again"


def test_idle_and_renamed_flags_run_with_a_note(mlacli, fake_model):
    done = mlacli(*RUN, "--offline", "--numa", "distribute", "-smf16", "--cfg-scale", "1.0")
    assert done.code == 0
    notes = [line for line in done.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 4 and "note: -smf16 is spelled -grt f16 here" in notes
    assert fake_model.params.context.graph_reduce_type == "f16"
    done = mlacli(*RUN, "--cfg-scale", "1.1")
    assert done.code == 2 and "--cfg-scale is not supported" in done.err


def test_variables_reach_a_run(mlacli, fake_model, monkeypatch):
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "128")
    monkeypatch.setenv("LLAMA_ARG_DISPLAY_PROMPT", "1")
    monkeypatch.setenv("LLAMA_ARG_UBATCH", "16")
    done = mlacli(*RUN, "-ub", "32")
    assert "note: -ub wins over LLAMA_ARG_UBATCH=16" in done.err
    assert (fake_model.params.context.n_ctx, fake_model.params.context.n_ubatch) == (128, 32)


def test_the_prompt_is_shown_as_the_last_flag_says(mlacli, fake_model):
    assert mlacli(*RUN, "--no-display-prompt").out == " world\n"
    assert mlacli(*RUN, "--no-display-prompt", "--display-prompt").out == "Hi world\n"


@pytest.mark.parametrize("words", [[], ["run-model"], ["sweep-bench"], ["plan"]])
def test_answers(mlacli, words):
    assert mlacli(*words, "--version").out == f"mlacli {__version__}\n"
    done = mlacli(*words, "--list-devices")
    assert (done.code, done.err) == (0, "")
    first, *devices = done.out.splitlines()
    assert first == "Available devices:" and devices[0].startswith("  cpu: cpu, ")


def completed(*words):
    """What bash is offered for the last word."""
    done = subprocess.run(
        [sys.executable, "-c", "from mlacli.cli import main; main()"],
        env=os.environ
        | {
            "_MLACLI_COMPLETE": "bash_complete",
            "COMP_WORDS": "mlacli " + " ".join(words),
            "COMP_CWORD": str(len(words)),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["pl"], ["plain,plan"]),
        (["--v"], ["plain,--version"]),
        (["run-model", "--cache-t"], ["plain,--cache-type-k", "plain,--cache-type-v"]),
        (["run-model", "--cache_type_k"], ["plain,--cache-type-k"]),
        (["run-model", "-sm", "g"], ["plain,graph"]),
        (["run-model", "-sm", "=", "g"], ["plain,graph"]),
        (["run-model", "--expert-split", "i"], ["plain,id"]),
        (["run-model", "-ctk", "b"], ["plain,bf16"]),
        (["run-model", "-p", "-sm", "-gra"], []),
        (["run-model", "-fa", "of"], ["plain,off"]),
        (["run-model", "-fa", "-grt", "q"], ["plain,q8_0"]),
        (["run-model", "-m", "mod"], ["file,mod"]),
        (["run-model", "-cmoe", "--strict", "--split-m"], ["plain,--split-mode"]),
        (["check-flags", "--fi"], ["plain,--file"]),
    ],
)
def test_completion(words, offered):
    assert completed(*words) == offered


def test_the_completion_script():
    done = subprocess.run(
        [sys.executable, "-c", "from mlacli.cli import main; main()"],
        env=os.environ | {"_MLACLI_COMPLETE": "bash_source"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "complete -o nosort -F _mlacli_completion mlacli" in done.stdout
