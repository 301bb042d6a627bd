"""Perplexity and KL divergence against plain float64 loops; modes compared layer by layer."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mlacli
from mlacli.errors import MemoryBudgetError, MlacliError, UsageError
from mlacli.kl_divergence import Divergence, Estimate
from mlacli.kld_file import BaseFile, BaseWriter
from mlacli.perplexity import (
    base_chunks,
    check_logits_memory,
    check_same_text,
    compare,
    cut,
    kl_divergence,
    perplexity,
)

GOLDEN = Path(__file__).parent / "golden"
V3 = GOLDEN / "models" / "v3.gguf"
EXACT = {"cache_type_k": "f32", "graph_attn_precision": "f32"}
IDS = np.random.default_rng(5).integers(300, size=200).tolist()


@pytest.fixture
def engine():
    with mlacli.load(V3, ctx_size=256, ubatch_size=16, **EXACT) as engine:
        yield engine


def in_loops(engine, windows):
    """Losses in float64, each window's logits all at once; windows are (ids, scored positions)."""
    losses = []
    for ids, positions, truth in windows:
        logits = engine.logits(ids).astype(np.float64)
        for j in positions:
            row = logits[j] - logits[j].max()
            losses.append(math.log(np.exp(row).sum()) - row[truth[j + 1]])
    return np.array(losses)


def test_the_second_half_of_each_chunk_counts_and_bos_takes_its_first_place(engine):
    n = 45
    chunks = cut(IDS, n, bos=7)
    found = list(perplexity(engine, chunks))
    windows = []
    for start in range(0, 180, n):
        truth = IDS[start : start + n]
        windows.append(([7, *truth[1:]], range(n // 2, n - 1), truth))
    losses = in_loops(engine, windows)
    assert len(found) == 4 and found[-1].count == len(losses) == 4 * 22
    assert found[-1].value == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert found[0].value == pytest.approx(math.exp(losses[:22].mean()), rel=1e-5)
    error = losses.std() / math.sqrt(len(losses) - 1) * found[-1].value
    assert found[-1].error == pytest.approx(error, rel=1e-4)
    plain = list(perplexity(engine, cut(IDS, n, bos=None)))[-1]
    assert plain.value != found[-1].value


def test_a_stride_counts_the_last_tokens_of_overlapping_windows(engine):
    chunks = cut(IDS, 64, bos=7, stride=24)
    assert chunks.n_chunks == 6  # (200 - 64) / 24, rounded up
    windows = [
        (IDS[s : s + 64], range(64 - 24 - 1, 63), IDS[s : s + 64]) for s in range(0, 144, 24)
    ]
    windows = [w for w in windows if len(w[0]) == 64]
    assert len(windows) == 6
    found = list(perplexity(engine, chunks))
    losses = in_loops(engine, windows)
    assert found[-1].count == len(losses) == 6 * 24
    assert found[-1].value == pytest.approx(math.exp(losses.mean()), rel=1e-5)


def test_what_a_text_must_have():
    with pytest.raises(MlacliError, match="the text has 200 tokens, 202 are needed"):
        cut(IDS, 101, None)
    with pytest.raises(UsageError, match="a stride of 64"):
        cut(IDS, 64, None, stride=64)
    assert cut(IDS, 40, None, limit=3).n_chunks == 3
    assert cut(IDS, 40, None, limit=9).n_chunks == 5


def test_the_logits_of_a_ubatch_must_fit_too(engine):
    plan = engine.prepared.plan
    need = plan.ranks[0].resident + 2 * 4 * 16 * 300

    def with_capacity(capacity):
        return replace(plan, ranks=(replace(plan.ranks[0], capacity=capacity),))

    check_logits_memory(with_capacity(need), 300)
    with pytest.raises(MemoryBudgetError) as caught:
        check_logits_memory(with_capacity(need - 1), 300)
    assert caught.value.need == need and "lower -ub" in caught.value.hint


def test_many_small_blocks_count_as_one(engine, monkeypatch):
    chunks = cut(IDS, 45, bos=7)
    whole = list(perplexity(engine, chunks))[-1]
    monkeypatch.setattr("mlacli.perplexity._VALUES", 300 * 3)
    pieces = list(perplexity(engine, chunks))[-1]
    assert pieces.count == whole.count
    assert pieces.value == pytest.approx(whole.value, rel=1e-12)


def test_a_base_file_of_ours_has_no_divergence_from_us(engine, tmp_path):
    chunks = cut(IDS, 45, bos=7, limit=3)
    tokens = chunks.tokens[: 3 * 45].reshape(3, 45)
    with BaseWriter(tmp_path / "b", tokens, 300) as writer:
        ppl = list(perplexity(engine, chunks, writer))[-1]
    base = BaseFile(tmp_path / "b")
    check_same_text(base, IDS)
    *_, d = kl_divergence(engine, base, base_chunks(base, 300, 7))
    assert d.count == ppl.count == 3 * 22
    assert abs(d.mean_kld.value) < 1e-6 and d.same_top.value > 0.95
    assert d.log_ppl.exp().value == pytest.approx(ppl.value, rel=1e-6)
    with mlacli.load(GOLDEN / "models" / "v3_q8.gguf", ctx_size=256) as other:
        *_, far = kl_divergence(other, base, base_chunks(base, 300, 7))
    assert far.mean_kld.value > 1e-5


def test_a_base_file_of_something_else_is_named(tmp_path):
    tokens = np.array(IDS[:90], np.int32).reshape(2, 45)
    with BaseWriter(tmp_path / "b", tokens, 300) as writer:
        writer.write(np.zeros((44, 300), np.float32))
    base = BaseFile(tmp_path / "b")
    with pytest.raises(MlacliError, match="is of a vocabulary of 300 tokens, the model has 301"):
        base_chunks(base, 301, None)
    other = [*IDS[:50], (IDS[50] + 1) % 300, *IDS[51:]]
    with pytest.raises(MlacliError, match=f"has token {IDS[50]} at position 50, the text"):
        check_same_text(base, other)
    with pytest.raises(MlacliError, match="has 90 tokens, the text only 80"):
        check_same_text(base, IDS[:80])


def test_the_statistics_are_those_of_the_definition():
    rng = np.random.default_rng(6)
    logits, theirs = rng.normal(0, 2, (2, 40, 11)).astype(np.float32)
    targets = rng.integers(11, size=40).astype(np.int32)
    theirs[3, 2] = -60  # too unlikely to count
    p, q = (np.exp(x.astype(np.float64)) for x in (theirs, logits))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    d = Divergence()
    base = np.log(p).astype(np.float32)
    d.add(logits[:25], base[:25], targets[:25])
    d.add(logits[25:], base[25:], targets[25:])
    terms = np.where(np.log(p) > -16, p * np.log(p / q), 0)
    kld = terms.sum(-1)
    assert np.allclose(d.kld, kld, atol=1e-6)
    assert d.mean_kld.error == pytest.approx(kld.std() / math.sqrt(39), rel=1e-5)
    rows = np.arange(40)
    diff = q[rows, targets] - p[rows, targets]
    assert np.allclose(d.p_diff, diff, atol=1e-6)
    assert d.rms_p_diff.value == pytest.approx(math.sqrt((diff**2).mean()), rel=1e-5)
    assert d.same_top.value == (p.argmax(-1) == q.argmax(-1)).mean()
    a, b = -np.log(q[rows, targets]), -np.log(p[rows, targets])
    assert d.correlation == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-5)
    assert d.log_ratio.value == pytest.approx((a - b).mean(), rel=1e-5)
    assert d.log_ratio.error == pytest.approx((a - b).std() / math.sqrt(39), rel=1e-4)
    ratio = d.ppl_difference
    assert ratio.value == pytest.approx(math.exp(a.mean()) - math.exp(b.mean()), rel=1e-5)
    assert Estimate.of(np.ones(5)) == Estimate(1.0, 0.0)


def load_pair(**second):
    first = mlacli.load(V3, ctx_size=256, ubatch_size=16, **EXACT)
    return first, mlacli.load(V3, ctx_size=256, ubatch_size=16, **(EXACT | second))


def test_modes_that_compute_the_same_do_not_differ():
    first, second = load_pair(device="cpu,cpu", split_mode="layer", threads=2)
    with first, second:
        *_, (_, layer) = compare([first, second], cut(IDS, 45, bos=7, limit=2))
    assert layer.mode == "layer" and layer.ppl.count == 44
    assert layer.first_layer(1e-5) is None and layer.max_logit_diff < 1e-4
    assert sorted(layer.layers) == list(range(len(layer.layers)))


def test_graph_differs_by_rounding_only():
    first, second = load_pair(device="cpu,cpu", split_mode="graph")
    with first, second:
        *_, (none, graph) = compare([first, second], cut(IDS, 45, bos=7, limit=2))
    assert graph.first_layer() is not None, "partial sums round differently"
    assert graph.first_layer(1e-3) is None
    assert 0 < graph.max_logit_diff < 1e-3
    assert graph.divergence.mean_kld.value < 1e-6 and graph.divergence.same_top.value == 1
    assert none.ppl.value == pytest.approx(graph.ppl.value, rel=1e-5)


def test_the_first_layer_that_goes_wrong_is_found():
    first, second = load_pair()
    with first, second:
        n = first.prepared.hparams.n_layer
        wrong = n - 1
        layers = second._weights[0].layers
        layers[wrong]._weights["ffn_norm"] = layers[0].ffn_norm
        *_, (_, other) = compare([first, second], cut(IDS, 45, bos=7, limit=1))
    assert other.first_layer() == wrong == other.first_layer(1e-3)
    assert other.layers[wrong - 1] == 0 and other.max_logit_diff > 1e-3


def test_llama_cpp_and_we_agree_on_the_bundled_model():
    """A base file that llama-perplexity wrote (golden/kld/README.md), read by us."""
    base = BaseFile(GOLDEN / "kld" / "tinytales-c16.kld")
    with mlacli.load(ctx_size=256) as engine:
        *_, d = kl_divergence(engine, base, base_chunks(base, 3072, 0))
    assert abs(d.mean_kld.value) <= 1e-4 and d.same_top.value == 1


def test_the_bundled_model_has_the_recorded_perplexity():
    """transformers' figure on the float32 weights, and our own, both on the whole held-out text."""
    folder = Path(__file__).parents[1] / "examples" / "tiny_model"
    recorded = json.loads((folder / "results.json").read_text())
    with mlacli.load(ctx_size=256) as engine:
        ids = engine.tokenizer.encode((folder / "heldout.txt").read_text())
        chunks = cut(ids, 256, engine.tokenizer.bos_id)
        value = list(perplexity(engine, chunks))[-1].value
    assert value == pytest.approx(recorded["transformers"]["chunks_256"]["perplexity"], rel=0.01)
    assert value == pytest.approx(recorded["mlacli"]["chunks_256"]["q8_0"], abs=1e-3)
