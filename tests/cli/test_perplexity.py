"""The perplexity command on a real engine, with bytes for tokens."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import mlacli as library
from mlacli.cli import run
from mlacli.kld_file import BaseWriter
from mlacli.perplexity import cut, perplexity
from mlacli.prepare import Prepared

MODEL = str(Path(__file__).parents[1] / "golden" / "models" / "v3.gguf")
TEXT = bytes(np.random.default_rng(8).integers(97, 123, size=300, dtype=np.uint8)).decode()
RUN = ("perplexity", "-m", MODEL, "-c", "40", "-t", "1")


class Bytes:
    """Bytes are ids, 1 is BOS."""

    warnings = ()
    add_bos, bos_id = True, 1

    def encode(self, text, add_special=True, parse_special=True):
        assert add_special and not parse_special
        return [1, *text.encode()]


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A file to score; the model gets a tokenizer."""
    monkeypatch.setattr(Prepared, "tokenizer", lambda self: Bytes())
    path = tmp_path / "text"
    path.write_text(TEXT + "\n")
    return str(path)


def test_the_lines_of_llama_perplexity(mlacli, text):
    done = mlacli(*RUN, "-f", text, "--chunks", "3")
    assert done.code == 0
    estimates, final = done.out.splitlines()
    assert re.fullmatch(r"\[1\]\d+\.\d{4},\[2\]\d+\.\d{4},\[3\]\d+\.\d{4},", estimates)
    with library.load(MODEL, ctx_size=40) as engine:
        *_, want = perplexity(engine, cut([1, *TEXT.encode()], 40, 1, 3))
    assert final == f"Final estimate: PPL = {want.value:.4f} +/- {want.error:.5f}"
    assert "memory" in done.err and "scored" in done.err


def test_the_work_is_announced_before_the_first_estimate(text, monkeypatch):
    both = io.StringIO()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    assert run([*RUN, "-f", text, "--chunks", "2"]) == 0
    assert re.search(r"\n2 chunks of 40 tokens, about \d+ s\n\[1\]\d", both.getvalue())


def test_chunks_are_of_c_tokens_though_the_context_is_rounded_up(mlacli, text):
    assert mlacli(*RUN, "-f", text).out.count("[") == 301 // 40
    assert "context       256" in mlacli(*RUN, "-f", text).err


def test_a_base_file_written_and_read(mlacli, text, tmp_path):
    base = str(tmp_path / "base.kld")
    first = mlacli(*RUN, "-f", text, "--kl-divergence-base", base)
    assert first.code == 0
    words = ("perplexity", "-m", MODEL, "--kl-divergence", "--kl-divergence-base", base)
    done = mlacli(*words)
    lines = done.out.splitlines()
    assert lines[0].startswith("chunk             PPL               ln(PPL(Q)/PPL(base))")
    assert [line.split()[0] for line in lines[1:8]] == list("1234567")
    ppl = re.search(r"PPL = (\S+)", first.out)[1]
    assert float(re.search(r"Mean PPL\(Q\) +: +(\S+)", done.out)[1]) == pytest.approx(
        float(ppl), abs=1e-3
    )
    assert re.search(r"^Mean    KLD: +-?0\.00000\d ± +\d\.\d{6}$", done.out, re.M)
    assert "Same top p: " in done.out and "99.9%   Δp:" in done.out
    assert mlacli(*words, "-f", text).out == done.out, "the same text"
    few = mlacli(*words, "--chunks", "1")
    assert len(few.out.splitlines()) == 2 and "no statistics: 19 tokens" in few.err


def test_a_base_of_another_text_or_vocabulary_is_refused(mlacli, text, tmp_path):
    base = tmp_path / "base.kld"
    tokens = np.full((1, 40), 98, np.int32)
    for n_vocab in (300, 77):
        with BaseWriter(base, tokens % n_vocab, n_vocab) as writer:
            writer.write(np.zeros((19, n_vocab), np.float32))
        words = ("perplexity", "-m", MODEL, "--kl-divergence", "--kl-divergence-base", str(base))
        done = mlacli(*words, "-f", text)
        assert (done.code, done.out) == (1, "")
        want = "has token 98 at position 0, the text 1" if n_vocab == 300 else "vocabulary of 77"
        assert want in done.err.splitlines()[-1]
    done = mlacli(*words, "-c", "39")
    assert done.code == 2 and "computed with 40 tokens a chunk" in done.err


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ((), 2, "no text to score (give one with -f FILE)"),
        (("-f", "TEXT", "--chunks", "0"), 2, "--chunks 0 scores nothing"),
        (("-f", "TEXT", "-c", "0"), 2, "perplexity needs chunks of at least 4 tokens"),
        (("-f", "TEXT", "-c", "200"), 1, "the text has 301 tokens, 400 are needed"),
        (("-f", "absent"), 1, "can't read the text file absent"),
        (("--kl-divergence",), 2, "--kl-divergence needs a base"),
        (("--kl-divergence", "--kl-divergence-base", "absent"), 1, "can't read absent"),
        (("-f", "TEXT", "--ppl-stride", "41"), 2, "--ppl-stride 41 is larger than -c 40"),
        (("-f", "TEXT", "--ppl-stride", "8", "--save-all-logits", "x"), 2, "--save-all-logits and"),
        (("-f", "TEXT", "--compare", "none,graph"), 2, "--compare needs several devices"),
        (("-f", "TEXT", "--kl-divergence-base", "/no/x"), 1, "can't write /no/x.part"),
    ],
)
def test_errors_come_early(mlacli, text, words, code, line):
    done = mlacli(*RUN, *(text if w == "TEXT" else w for w in words))
    assert done.code == code and done.out == ""
    assert done.err.splitlines()[-1].startswith(f"Error: {line}")


def test_a_file_without_tokenizer(mlacli, tmp_path):
    (tmp_path / "t").write_text(TEXT)
    done = mlacli(*RUN, "-f", str(tmp_path / "t"))
    assert done.code == 2
    assert "Error: v3.gguf has no tokenizer, so no text can be scored" in done.err


def test_modes_side_by_side(mlacli, text):
    done = mlacli(*RUN, "-f", text, "-dev", "cpu,cpu", "--compare", "none,layer,graph")
    head, _, none, layer, graph = done.out.splitlines()
    assert head.split()[:2] == ["mode", "PPL"] and "first layer that differs" in head
    assert [x.split()[0] for x in (none, layer, graph)] == ["none", "layer", "graph"]
    ppl = {float(x.split()[1]) for x in (none, layer, graph)}
    assert max(ppl) - min(ppl) < 1e-2 * min(ppl)
    assert none.split()[3:] == ["-"] * 6 and graph.split()[-1] != "-"


def test_modes_side_by_side_on_a_narrow_terminal(text, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    for name, value in {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    modes = ("-dev", "cpu,cpu", "--compare", "none,layer,graph")
    assert run([*RUN, "-f", text, "--chunks", "2", *modes]) == 0
    shown = screen.getvalue()
    lines = {line[:24].strip(): line for line in shown.splitlines()}
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    assert len(re.findall(r"\d\.\d{3}e[-+]\d\d", lines["max logit diff"])) == 2
