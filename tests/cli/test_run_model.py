"""run-model against a fake engine: prompt handling, streams, ends."""

import io
import sys
from dataclasses import dataclass

import pytest

from mlacli.cli.prompts import expand_escapes
from mlacli.errors import StrictDowngrade


@dataclass
class Note:
    level: str
    message: str
    hint: str = ""


TIMINGS = """\
       load time =     500.00 ms
prompt eval time =     250.00 ms /     5 tokens (   50.00 ms per token,    20.00 tokens per second)
       eval time =    2000.00 ms /     7 runs   (  285.71 ms per token,     3.50 tokens per second)
   sampling time =     100.00 ms /     8 runs   (   12.50 ms per token,    80.00 tokens per second)
      total time =    2350.00 ms /    12 tokens
     first token =     300.00 ms after the start of the prompt
     peak memory =      64.00 MiB resident
memory  self
------  ----
cpu       12
"""


def generated(model):
    return next(c for c in model.calls if c[0] == "generate")


def test_stdout_is_the_text_alone(mlacli, fake_model):
    done = mlacli("run-model", "-p", "Hello", "-n", "20", "--temp", "0")
    assert (done.code, done.out) == (0, "Hello world\n")
    _, ids, n_predict, sampler = generated(fake_model)
    assert (ids, n_predict) == ([0, *b"Hello"], 20)
    assert sampler.params.temp == 0
    assert fake_model.calls[-1] == ("close",)


def test_stderr_has_plan_configuration_timings_and_memory(mlacli, fake_model):
    err = mlacli("run-model", "-p", "Hello", "-s", "7").err
    assert "no -m given: running the bundled model bundled.gguf\n" in err
    assert "1.5 GiB" in err
    assert "configuration:\n  split mode  none\n  context     256  given\n" in err
    assert "seed: 7\n" in err
    assert err.endswith(TIMINGS)
    assert "output.weight" not in err
    assert "output.weight" in mlacli("run-model", "-p", "Hello", "-v").err


def test_without_the_prompt(mlacli, fake_model):
    assert mlacli("run-model", "-p", "Hello", "--no-display-prompt").out == " world\n"


def test_the_text_ends_with_one_newline(mlacli, fake_model):
    fake_model.answer = [*b"!\n", 1]
    assert mlacli("run-model", "-p", "Hello").out == "Hello!\n"
    fake_model.answer = []
    assert mlacli("run-model", "-p", "Hello", "--no-display-prompt").out == ""


def test_the_model_given_is_the_model_run(mlacli, fake_model):
    err = mlacli("run-model", "-p", "Hello", "-m", "some.gguf").err
    assert fake_model.path == "some.gguf"
    assert "bundled" not in err


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (rb"a\nb\tc\rd", b"a\nb\tc\rd"),
        (rb"\"\'\\n", b"\"'\\n"),
        (rb"\x41\xe4\xbd\xa0", "A你".encode()),
        (rb"\q\x4 \xzz", rb"\q\x4 \xzz"),
        (rb"end\ ".strip(), b"end\\"),
    ],
)
def test_escapes(raw, text):
    assert expand_escapes(raw) == text


@pytest.mark.parametrize(
    ("flags", "prompt"),
    [
        ([], b"a\nb"),
        (["-e"], b"a\nb"),
        (["--no-escape"], rb"a\nb"),
        (["-e", "--no-escape"], rb"a\nb"),
        (["--no-escape", "-e"], b"a\nb"),
    ],
)
def test_escapes_are_on_by_default(mlacli, fake_model, flags, prompt):
    assert mlacli("run-model", "-p", r"a\nb", *flags).code == 0
    assert generated(fake_model)[1] == [0, *prompt]


def test_a_prompt_file_loses_exactly_one_newline(mlacli, fake_model, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"one\\n two\n\n")
    assert mlacli("run-model", "-f", str(path)).code == 0
    assert generated(fake_model)[1] == [0, *b"one\\n two\n"]


def test_a_prompt_from_stdin(mlacli, fake_model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped\n")))
    assert mlacli("run-model", "-f", "-").out == "piped world\n"


def test_a_missing_prompt_file(mlacli, fake_model):
    done = mlacli("run-model", "-f", "/nowhere/prompt.txt")
    assert done.code == 1
    assert "can't read the prompt file /nowhere/prompt.txt" in done.err


def test_a_prompt_that_is_no_utf8_says_so(mlacli, fake_model, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"ab\xff")
    assert "is no UTF-8 at byte 2" in mlacli("run-model", "-f", str(path)).err


def test_an_empty_prompt_is_bos_where_bos_is_used(mlacli, fake_model):
    assert mlacli("run-model", "-p", "").out == " world\n"
    assert generated(fake_model)[1] == [0]
    fake_model.tokenizer.add_bos = False
    done = mlacli("run-model", "-p", "")
    assert (done.code, done.out) == (2, "")
    assert "the prompt is empty" in done.err


def test_prompt_ids_with_a_tokenizer_print_text(mlacli, fake_model):
    done = mlacli("run-model", "--prompt-ids", "72,105")
    assert done.out == "Hi world\n"
    assert generated(fake_model)[1] == [72, 105]


def test_a_file_without_tokenizer_takes_and_prints_ids(mlacli, fake_model):
    fake_model.tokenizer, fake_model.answer = None, [7, 1, 299]
    assert mlacli("run-model", "--prompt-ids", "5 6").out == "5 6 7 1 299\n"
    assert mlacli("run-model", "--prompt-ids", "5", "--no-display-prompt").out == "7 1 299\n"
    done = mlacli("run-model", "-p", "text")
    assert done.code == 2 and "the file has no tokenizer" in done.err


def test_ids_outside_the_vocabulary_are_refused_before_loading(mlacli, fake_model):
    done = mlacli("run-model", "--prompt-ids", "5,300")
    assert done.code == 2 and "token id 300 is not in the vocabulary of 300" in done.err
    assert not fake_model.weights_loaded


def test_a_prompt_longer_than_the_context_is_refused_before_loading(mlacli, fake_model):
    fake_model.n_ctx = 5
    done = mlacli("run-model", "-p", "Hello", "-c", "5")
    assert (done.code, done.out) == (1, "")
    assert "the prompt has 6 tokens, the context 5" in done.err
    assert not fake_model.weights_loaded


def test_a_full_context_is_a_note_and_no_failure(mlacli, fake_model):
    fake_model.n_ctx, fake_model.answer = 8, list(b"a long answer")
    done = mlacli("run-model", "-p", "Hello", "-n", "-2")
    assert (done.code, done.out) == (0, "Helloa \n")
    assert done.err.count("note: stopped: the context of 8 tokens is full\n") == 1


def test_findings_are_printed_before_the_text(mlacli, fake_model):
    fake_model.findings = (
        Note("warning", "-sm graph became layer: -rtr", "leave -rtr out"),
        Note("note", "-ctv has no effect"),
    )
    err = mlacli("run-model", "-p", "x").err
    assert "warning: -sm graph became layer: -rtr (leave -rtr out)\n" in err
    assert "-ctv has no effect" not in err, "notes are rows of the configuration"


def test_strict_exits_3(mlacli, fake_model):
    fake_model.error = StrictDowngrade("-sm graph would run as layer", "leave -rtr out")
    done = mlacli("run-model", "-p", "x", "--strict", "-rtr")
    assert done.code == 3 and done.err.startswith("Error: -sm graph would run as layer (leave")


def test_a_slow_model_says_so_before_it_starts(mlacli, fake_model):
    fake_model.predicted_tps = 0.25
    assert (
        "warning: this will be slow: about 0.25 tokens a second\n"
        in mlacli("run-model", "-p", "x").err
    )
    fake_model.predicted_tps = 20.0
    assert "slow" not in mlacli("run-model", "-p", "x").err


def test_ctrl_c_ends_the_line(mlacli, fake_model):
    fake_model.fails_after = 3
    done = mlacli("run-model", "-p", "Hello")
    assert (done.code, done.out) == (130, "Hello wo\n")
    assert "Error" not in done.err
    assert fake_model.calls[-1] == ("close",)
    assert "eval time =    2000.00 ms /     7 runs" in done.err


def test_ctrl_c_before_the_first_token_has_no_timings(mlacli, fake_model):
    fake_model.fails_after = 0
    done = mlacli("run-model", "-p", "Hello")
    assert done.code == 130 and "eval time" not in done.err


@pytest.mark.parametrize("text", ["0", "false", "OFF"])
def test_a_variable_turns_a_switch_off(mlacli, fake_model, monkeypatch, text):
    monkeypatch.setenv("LLAMA_ARG_DISPLAY_PROMPT", text)
    monkeypatch.setenv("LLAMA_ARG_ESCAPE", text)
    assert mlacli("run-model", "-p", r"a\nb").out == " world\n"
    assert generated(fake_model)[1] == [0, *rb"a\nb"]
    done = mlacli("run-model", "-p", r"a\nb", "-e", "--display-prompt")
    assert done.out == "a\nb world\n", "a word wins"


def test_warnings_of_the_tokenizer_are_printed(mlacli, fake_model):
    fake_model.tokenizer.warnings = ("two BOS at the start",)
    assert "warning: two BOS at the start\n" in mlacli("run-model", "-p", "x").err
