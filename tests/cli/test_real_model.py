"""The commands on a real file, with the real engine, rules and plan behind them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MODEL = str(Path(__file__).parents[1] / "golden" / "models" / "v3.gguf")
RUN = ("run-model", "-m", MODEL, "--prompt-ids", "1,2,3", "--temp", "0", "-c", "256")


def test_the_same_greedy_ids_in_every_mode(mlacli):
    alone = mlacli(*RUN, "-n", "8")
    assert alone.code == 0
    assert alone.out.startswith("1 2 3 ") and len(alone.out.split()) == 11
    for mode in ("graph", "layer"):
        split = mlacli(*RUN, "-n", "8", "-dev", "cpu,cpu", "-sm", mode)
        assert split.out == alone.out, mode


def test_a_seed_gives_the_same_ids_again(mlacli):
    words = (*RUN[:-4], "-c", "256", "-n", "8", "-s", "3", "--temp", "2")
    first = mlacli(*words)
    assert first.code == 0 and "seed: 3\n" in first.err
    assert mlacli(*words).out == first.out
    assert mlacli(*words, "-s", "4").out != first.out


def test_a_full_context_ends_well(mlacli):
    ids = ",".join(str(i % 200) for i in range(250))
    done = mlacli("run-model", "-m", MODEL, "--prompt-ids", ids, "-c", "256", "--ignore-eos")
    assert done.code == 0
    assert len(done.out.split()) == 257, "one token more than the cache holds can be chosen"
    assert done.err.count("note: stopped: the context of 256 tokens is full") == 1


def test_a_prompt_longer_than_the_context(mlacli):
    done = mlacli("run-model", "-m", MODEL, "--prompt-ids", ",".join(["1"] * 257), "-c", "256")
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[-1].startswith("Error: the prompt has 257 tokens, the context 256")


def test_the_guard_warns_once_and_strict_exits_3(mlacli):
    words = (*RUN, "-n", "1", "-dev", "cpu,cpu", "--split_mode", "graph", "-rtr", "-cmoe")
    done = mlacli(*words)
    assert done.code == 0 and done.err.count("warning: ") == 1
    assert "warning: -sm graph can't be combined with -cmoe" in done.err
    strict = mlacli(*words, "--strict")
    assert (strict.code, strict.out) == (3, "")
    assert strict.err.splitlines()[-1].startswith("Error: -sm graph can't be combined with -cmoe")


def test_check_flags_agrees_with_the_run(mlacli):
    done = mlacli("check-flags", "--json", "-m", MODEL, "-sm", "graph", "-rtr", "-dev", "cpu,cpu")
    report = json.loads(done.out)
    assert done.code == 3
    assert report["split_mode"] == {"asked": "graph", "effective": "layer"}
    verdicts = {v["flag"]: v["verdict"] for v in report["flags"]}
    assert verdicts == {
        "-m": "supported",
        "-sm": "downgraded",
        "-rtr": "downgraded",
        "-dev": "supported",
    }
    assert mlacli("check-flags", "-sm", "graph", "-fa", "off", "-dev", "cpu,cpu").code == 2
    other = mlacli("check-flags", "--arch", "llama", "-sm", "graph", "-rtr", "-dev", "cpu,cpu")
    assert "split mode: graph (asked: graph)" in other.out


def test_plan_for_devices_that_are_not_there(mlacli):
    words = ("plan", "-m", MODEL, "-sm", "graph", "--vram", "80G,80G,24G", "-c", "1024")
    plan = json.loads(mlacli(*words, "--json").out)
    assert (plan["n_ctx"], len(plan["ranks"])) == (1024, 3)
    table = mlacli(*words).out.splitlines()
    assert len(table) == 2 + 3 and table[0].split()[:3] == ["rank", "device", "layers"]
    assert "blk.0.attn_kv_a_mqa.weight" in mlacli(*words, "-v").out


def test_sweep_bench(mlacli):
    words = ("sweep-bench", "-m", MODEL, "-c", "256", "-ub", "96", "-n", "2")
    done = mlacli(*words, "--output-format", "jsonl", "-dev", "cpu,cpu", "-sm", "graph")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [r["n_kv"] for r in rows] == [0, 96]
    assert all(r["speed_pp"] > 0 and r["speed_tg"] > 0 for r in rows)
    assert "note: stopped before N_KV 192" in done.err


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_ctrl_c_while_ranks_work(devices):
    words = (*RUN[:-1], "100000", "-n", "-1", "-dev", devices, "-sm", "graph", "--ignore-eos")
    p = subprocess.Popen(
        [sys.executable, "-m", "mlacli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert p.stdout.read(7).startswith("1 2 3 ")
        time.sleep(0.1)
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=20)
    finally:
        p.kill()  # a run that ignores the signal would go on for ever
    assert p.returncode == 130 and out.endswith("\n")
    assert "Error" not in err and "Traceback" not in err


def test_a_closed_pipe_while_ranks_work():
    words = " ".join((*RUN[:-1], "100000", "-dev", "cpu,cpu", "-sm", "graph", "--ignore-eos"))
    shell = f"{sys.executable} -m mlacli {words} | head -c 20; echo :${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=30)
    assert done.stdout.endswith(":0\n")
    assert "Error" not in done.stderr and "Traceback" not in done.stderr
