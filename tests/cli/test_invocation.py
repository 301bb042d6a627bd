"""Which command line a line or a script calls."""

import pytest

from mlacli.cli.invocation import invocation, shell_commands
from mlacli.errors import UsageError


@pytest.mark.parametrize(
    ("words", "command", "flags"),
    [
        (["-ub", "5"], "run-model", ["-ub", "5"]),
        (["llama-cli", "-ub", "5"], "run-model", ["-ub", "5"]),
        (["./build/bin/llama-server", "-ub", "5"], "run-model", ["-ub", "5"]),
        (["main.exe", "-ub", "5"], "run-model", ["-ub", "5"]),
        (["llama-sweep-bench", "-ub", "5"], "sweep-bench", ["-ub", "5"]),
        (["mlacli", "-ub", "5"], "run-model", ["-ub", "5"]),
        (["mlacli", "plan", "--json"], "plan", ["--json"]),
        (["python3", "-m", "mlacli", "sweep-bench"], "sweep-bench", []),
        (["CUDA_VISIBLE_DEVICES=0", "nohup", "llama-cli", "-e"], "run-model", ["-e"]),
        (["llama-cli -p 'a b' -e"], "run-model", ["-p", "a b", "-e"]),
        ([], "run-model", []),
    ],
)
def test_the_program_in_front_is_taken_off(words, command, flags):
    called = invocation(words)
    assert (called.command, list(called.flags)) == (command, flags)


def test_programs_without_a_counterpart():
    assert "no server" in invocation(["llama-server"]).lacking.message
    assert "no counterpart" in invocation(["llama-quantize"]).lacking.message
    assert invocation(["llama-cli"]).lacking is None
    assert invocation(["mlacli", "plan"]).lacking is None
    with pytest.raises(UsageError, match="llama-bench has options of its own"):
        invocation(["llama-bench", "-p", "512"])


SCRIPT = r"""#!/bin/bash
DIR=$(dirname "$0"); cd "$DIR"
# llama-cli -m wrong.gguf
MODEL="my model.gguf"   # with a space
EXTRA='-fa on'; export LLAMA_ARG_UBATCH=32
cd /tmp && GGML_X=1 \
  ./build/bin/llama-cli -m "$MODEL" ${EXTRA} \
    -p 'it'"'"'s "$so"' -r \"x\# --temp=0 "a\$b" "" > out.txt 2>&1 | tee log &
llama-server --port 1
"""


def test_a_script(mlacli, tmp_path):
    words = ["GGML_X=1", "./build/bin/llama-cli", "-m", "my model.gguf", "-fa", "on"]
    words += ["-p", 'it\'s "$so"', "-r", '"x#', "--temp=0"]
    found = [command.words for command in shell_commands(SCRIPT, {})]
    assert found[3:5] == [["cd", "/tmp"], [*words, "a$b", ""]]
    path = tmp_path / "run.sh"
    path.write_text(SCRIPT)
    done = mlacli("check-flags", "--arch", "deepseek2", "--file", str(path))
    assert "LLAMA_ARG_UBATCH  32 " in done.out and "--port" not in done.out
    assert done.code == 2 and "unexpected word 'a$b'" in done.out


def test_a_script_with_windows_line_ends_and_only_flags(mlacli, tmp_path):
    path = tmp_path / "flags.txt"
    path.write_bytes(b"-ub 64 \\\r\n  -c 128\r\n")
    done = mlacli("check-flags", "--json", "--file", str(path))
    assert done.code == 0
    assert '"value": "64"' in done.out and '"value": "128"' in done.out


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("llama-cli -m $NOT_SET", "$NOT_SET is not set"),
        ("llama-cli -m $(ls *.gguf)", "needs a shell"),
        ("llama-cli -m `ls`", "needs a shell"),
        ('llama-cli "${A[@]}"', "needs a shell"),
        ("llama-cli -p 'open", "a quote in line 1 is not closed"),
        ("echo nothing", "no llama.cpp or mlacli command"),
    ],
)
def test_what_a_script_can_not_hold(mlacli, tmp_path, monkeypatch, text, error):
    monkeypatch.delenv("NOT_SET", raising=False)
    path = tmp_path / "run.sh"
    path.write_text(text)
    done = mlacli("check-flags", "--file", str(path))
    assert done.code == 2 and error in done.err
    assert mlacli("check-flags", "--file", str(tmp_path / "none.sh")).code == 1
    assert mlacli("check-flags", "--file", str(path), "-ub", "1").code == 2


LAUNCHERS = (
    "taskset -c 0-7", "numactl --interleave=all", "nice -n 5", "stdbuf -oL", "timeout 10",
    "timeout -k 5s 10s", "env A=B", "env -i A=B", "sudo", "sudo -E", "nohup", "taskset 0xff",
    "A=B sudo nice -n 5 numactl -N 0 -m 0", "mpirun -np 2",
)  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("program", ["./bin/llama-cli", "python3 -m mlacli", "mlacli run-model"])
def test_launchers_in_front_are_passed_over(launcher, program):
    line = f"{launcher} {program} -ub 64"
    for words in ([line], line.split()):
        called = invocation(words)
        assert called.program in ("llama-cli", "mlacli") and called.flags == ("-ub", "64")
        assert called.environ == ({"A": "B"} if "A=B" in line else {})


@pytest.mark.parametrize(
    "line",
    [
        "cd llama-cli", "sudo cp llama-cli /bin", "time make llama-cli", "python llama-cli",
        "if ! command -v llama-cli", "nice -n 5 make llama-cli", "timeout 10 python x.py llama-cli",
    ],
)  # fmt: skip
def test_a_program_that_is_only_named_is_not_called(line):
    with pytest.raises(UsageError, match=r"no llama\.cpp or mlacli command"):
        invocation([line])
