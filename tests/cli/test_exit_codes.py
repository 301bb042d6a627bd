"""What ends with which code, and that it says so in one line."""

import signal
import subprocess
import sys

import pytest

from mlacli import errors

# A process that runs one command line against a fake engine which never stops talking.
ENDLESS = """
import sys, time, types
from types import SimpleNamespace
from pathlib import Path
from mlacli.timings import Timings

class Engine:
    n_ctx, checked, n_compiled, sums = 64, None, 0, ""
    context_full = False
    timings, page_lock = Timings(1, 1, 1, 1, 1, 1), SimpleNamespace(problem=None)
    load_problems = ()
    on_ubatch = None
    def __init__(self, prepared, progress, compiling): self.prepared = prepared
    def __enter__(self): return self
    def __exit__(self, *e): pass
    def peak_memory(self): return 0
    def memory_beside(self): return {{}}
    def warm_up(self): pass
    def take_turn(self): pass
    def generate_ids(self, ids, n_predict, sampler):
        for i in range(10**9 if {endless} else 100):
            yield i % 50
            {pause}

def prepare(path, params):
    return SimpleNamespace(path=Path("x"), params=params,
        plan=SimpleNamespace(n_ctx=64, ranks=()),
        hparams=SimpleNamespace(n_vocab=50), findings=(), effective=(), predicted_tps=None,
        tokenizer=lambda: None)

rows = lambda plan: (("a",), [("b",)])
for name, names in {{"prepare": dict(prepare=prepare), "engine": dict(Engine=Engine),
                    "parallel.plan_report": dict(plan_rows=rows, shard_rows=rows,
                         plan_as_dict=lambda plan: {{}}, memory_rows=lambda plan, gpus: rows(plan),
                         beside_lines=lambda found: []),
                    }}.items():
    sys.modules["mlacli." + name] = types.ModuleType(name)
    vars(sys.modules["mlacli." + name]).update(names)
from mlacli.cli import main
main()
"""


def process(pause: str = "", endless: bool = True, **streams) -> subprocess.Popen:
    code = ENDLESS.format(pause=pause or "pass", endless=endless)
    words = ["run-model", "--prompt-ids", "1,2"]
    return subprocess.Popen([sys.executable, "-c", code, *words], text=True, **streams)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.GgufError("bad magic", "download it again"), 1, "bad magic (download it again)"),
        (errors.UsageError("no"), 2, "no"),
        (errors.StrictDowngrade("-sm graph became layer", "drop -rtr"), 3, None),
        (errors.MemoryBudgetError("cpu", 2**31, 2**30), 1, None),
        (errors.UnsupportedFeature("two\nlines"), 1, "two lines"),
        (ValueError("oops"), 1, "internal error: ValueError: oops (set MLACLI_DEBUG=1"),
    ],
)
def test_an_error_is_one_line_and_a_code(mlacli, fake_model, error, code, line):
    fake_model.error = error
    done = mlacli("run-model", "--prompt-ids", "1")
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(f"Error: {line or error.message}")
    assert done.err.count("\n") == 1


def test_debug_shows_the_traceback(mlacli, fake_model, monkeypatch):
    monkeypatch.setenv("MLACLI_DEBUG", "1")
    fake_model.error = errors.GgufError("bad magic")
    done = mlacli("plan")
    assert "Traceback" in done.err and done.err.endswith("Error: bad magic\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["frobnicate"], "unknown command 'frobnicate' (known: run-model"),
        (["run-modle"], "unknown command 'run-modle' (did you mean run-model?)"),
        (["-m", "x"], "-m before a command (write mlacli run-model -m)"),
        (["run-model", "-mx", "f"], "unknown flag -mx (did you mean -m?)"),
        (["run-model", "--lora", "f"], "--lora is not supported: there are no adapters (merge"),
        (["run-model"], "no prompt, and the bundled model has no chat template (give a prompt"),
        (["plan", "-p", "x"], "-p is a flag of mlacli run-model (leave it out)"),
        (["check-flags", "--arch"], "--arch needs a value"),
    ],
)
def test_usage_errors_exit_2_without_a_usage_dump(mlacli, words, line):
    done = mlacli(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"Error: {line}")
    assert done.err.count("\n") == 1


def test_a_repeated_flag_warns(mlacli, fake_model):
    done = mlacli("plan", "-c", "1", "--ctx_size", "2", "--json")
    assert done.code == 0
    assert "warning: --ctx_size is given 2 times; the last one counts (2)\n" in done.err
    assert fake_model.params.context.n_ctx == 2


def test_ctrl_c_exits_130_after_ending_the_line():
    p = process("time.sleep(0.01)", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = p.stdout.read(7)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=20)
    assert p.returncode == 130, err
    assert (first + out).startswith("1 2 0 1") and out.endswith("\n")
    assert "Error" not in err and "Traceback" not in err


def test_a_closed_pipe_ends_quietly():
    p = process(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.read(4)
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait(timeout=20) == 0
    assert "Error" not in err and "Traceback" not in err and "Exception" not in err


def test_a_pipe_closed_before_the_last_flush_ends_quietly():
    shell = f"{sys.executable} -m mlacli run-model --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=20)
    assert done.stdout == "0\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("redirected", "out", "code"),
    [
        (">&-", "", 0),
        ("2>&-", "Once", 0),
        (">&- 2>&- <&-", "", 0),
        (">/dev/full", "", 1),
        ("2>/dev/full", "", 1),
    ],
)
def test_streams_that_are_closed_or_full(redirected, out, code):
    words = "-m mlacli run-model -p Once -n 1 --temp 0"
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {words} {redirected}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code
    assert done.stdout.startswith(out) and bool(done.stdout) == bool(out)
    assert "Traceback" not in done.stderr and "internal" not in done.stderr
    said = "Error: can't write the output: No space left on device\n"
    assert done.stderr.endswith(said) == (redirected == ">/dev/full")


@pytest.mark.parametrize("words", ["--help", "run-model --help", "frobnicate", "--version"])
def test_answers_to_a_full_disk(words):
    shell = f"{sys.executable} -m mlacli {words} >/dev/full"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=20)
    assert done.returncode == (2 if words == "frobnicate" else 1)
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert "internal" not in done.stderr


def test_an_os_error_of_something_else_is_not_called_the_output(mlacli, fake_model, monkeypatch):
    fake_model.error = OSError(5, "Input/output error")
    done = mlacli("run-model", "--prompt-ids", "1")
    assert done.code == 1 and done.err.startswith("Error: internal error: OSError")


def test_ctrl_c_while_modules_load_is_silent():
    code = """
import runpy, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("click", "mlacli.cli.run_model"):
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
sys.argv = ["mlacli", "run-model"]
if "main" in sys.orig_argv[-1]:
    sys.meta_path.pop(0)
    from mlacli.cli import main
    sys.meta_path.insert(0, Finder())
    main()
runpy.run_module("mlacli", run_name="__main__")
"""
    for way in ("module", "main"):
        done = subprocess.run([sys.executable, "-c", code, way], capture_output=True, timeout=20)
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_text_survives_an_ascii_locale():
    code = "from mlacli.cli import main; import sys; sys.argv = ['mlacli', 'ü']; main()"
    env = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert done.returncode == 2 and done.stderr.startswith(b"Error: unknown command")
