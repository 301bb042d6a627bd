"""llama.cpp's file of log-probabilities, against its layout written out in plain loops."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest

from mlacli.errors import MlacliError
from mlacli.kld_file import BaseFile, BaseWriter, decode_rows, encode_rows, log_softmax, n_scored

LLAMA_CPP = Path(__file__).parent / "golden" / "kld" / "tinytales-c16.kld"


def row_in_loops(logits):
    """One row as the format says: float32 scale, float32 lowest, uint16 codes, padded."""
    top = max(logits)
    total = math.log(sum(math.exp(x - top) for x in logits))
    low = max(min(logits), top - 16)
    scale = (top - low) / 65535
    codes = [round((x - low) / scale) if x > low else 0 for x in logits]
    codes += [0] * (len(codes) % 2)
    return struct.pack(f"<ff{len(codes)}H", scale, low - top - total, *codes)


@pytest.mark.parametrize("n_vocab", [6, 7])
def test_rows_have_the_layout_of_llama_cpp(n_vocab):
    logits = np.random.default_rng(1).normal(0, 4, (5, n_vocab)).astype(np.float32)
    logits[2, 3] = -40  # beyond the range: clipped to code 0
    got = encode_rows(logits)
    for i, row in enumerate(logits):
        want = np.frombuffer(row_in_loops([float(x) for x in row]), "<u2")
        mine = got[i]
        assert len(mine) == len(want) == 4 + n_vocab + n_vocab % 2
        assert np.allclose(mine[:4].copy().view("<f4"), want[:4].copy().view("<f4"), rtol=1e-5)
        assert np.abs(mine[4:].astype(int) - want[4:].astype(int)).max() <= 1  # float32 or float64


def test_what_is_decoded_is_what_was_encoded():
    logits = np.random.default_rng(2).normal(0, 3, (4, 300)).astype(np.float32)
    log_p = log_softmax(logits)
    assert np.allclose(np.exp(log_p.astype(np.float64)).sum(-1), 1, atol=1e-6)
    decoded = decode_rows(encode_rows(logits), 300)
    inside = log_p > log_p.max(-1, keepdims=True) - 16
    assert np.abs(decoded - log_p)[inside].max() <= 16 / 65535 / 2 + 1e-5
    flat = np.full((1, 8), 2.5, np.float32)
    assert np.allclose(decode_rows(encode_rows(flat), 8), -math.log(8), atol=1e-6)


def written(path, n_chunks=2, n_ctx=9, n_vocab=5):
    tokens = np.arange(n_chunks * n_ctx, dtype=np.int32).reshape(n_chunks, n_ctx) % n_vocab
    logits = np.random.default_rng(3).normal(size=(n_chunks * n_scored(n_ctx), n_vocab))
    with BaseWriter(path, tokens, n_vocab) as writer:
        writer.write(logits[:3].astype(np.float32))
        writer.write(logits[3:].astype(np.float32))
    return tokens, logits.astype(np.float32)


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "base.kld"
    tokens, logits = written(path)
    raw = path.read_bytes()
    assert raw[:20] == b"_logits_" + struct.pack("<iii", 9, 5, 2)
    assert len(raw) == 20 + 4 * 18 + 2 * 4 * 2 * (4 + 6)
    base = BaseFile(path)
    assert np.array_equal(base.tokens, tokens)
    assert np.abs(base.log_probs(1, 1, 4) - log_softmax(logits[5:8])).max() < 1e-3
    assert [p.name for p in tmp_path.iterdir()] == ["base.kld"]


def test_a_run_that_breaks_off_leaves_no_file(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        BaseWriter(tmp_path / "base.kld", np.zeros((1, 9), np.int32), 5),
    ):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-2], "has 78 bytes instead of 80"),
        (lambda raw: raw + b"x", "has 81 bytes instead of 80"),
        (lambda raw: b"_LOGITS_" + raw[8:], "is no file of log-probabilities"),
        (lambda raw: raw[:9], "is no file of log-probabilities"),
        (lambda raw: raw[:8] + struct.pack("<iii", 2, 5, 1) + raw[20:], "claims 1 chunks of 2"),
        (lambda raw: raw[:8] + struct.pack("<iii", 9, -5, 1) + raw[20:], "a vocabulary of -5"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    path = tmp_path / "base.kld"
    written(path, n_chunks=1, n_ctx=5, n_vocab=5)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(MlacliError, match=message):
        BaseFile(path)


def test_a_file_of_llama_cpp_is_read():
    base = BaseFile(LLAMA_CPP)
    assert (base.n_ctx, base.n_vocab, base.n_chunks) == (16, 3072, 1)
    assert base.tokens[0, 0] == 0, "BOS"
    log_p = base.log_probs(0, 0, n_scored(16))
    assert np.abs(np.exp(log_p.astype(np.float64)).sum(-1) - 1).max() < 1e-3
    assert (log_p.max(-1) > -3).all(), "a trained model is sure of something"
