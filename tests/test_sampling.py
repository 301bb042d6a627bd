"""The sampler against its written definition, done here with loops and sorts."""

import math
import zlib

import numpy as np
import pytest

from mlacli.errors import MlacliError
from mlacli.params import SamplingParams
from mlacli.sampling import Sampler, probabilities, top_k, top_p, uniform

VOCAB = 50


def logits_of(seed: int, size: int = VOCAB, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


def expected_kept(logits, k, p, m):
    """Ids that survive top-k, top-p, min-p, by sorting (logit down, id up)."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    if k > 0:
        order = order[:k]
    weights = [math.exp(float(logits[i]) - float(logits[order[0]])) for i in order]
    if p < 1:
        reached, n = 0.0, 0
        while n < len(weights) and (n == 0 or reached < p):
            reached += weights[n] / sum(weights)
            n += 1
        order, weights = order[:n], weights[:n]
    if m > 0:
        order = [i for i, weight in zip(order, weights, strict=True) if weight >= m]
    return sorted(order)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("k", "p", "m"), [(40, 0.95, 0.05), (0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.5, 0.0), (-1, 1, 0.3)]
)
def test_filters_match_the_definition(seed, k, p, m):
    logits = logits_of(seed)
    sampler = Sampler(SamplingParams(seed=1, temp=0.7, top_k=k, top_p=p, min_p=m))
    ids, share = sampler.candidates(logits)
    assert ids.tolist() == expected_kept(logits, k, p, m)
    weights = np.exp((logits[ids].astype(np.float64) - logits.max()) / 0.7)
    np.testing.assert_allclose(share, weights / weights.sum(), rtol=1e-12)


def test_top_k_keeps_the_lower_ids_of_a_tie():
    logits = np.array([1, 3, 2, 2, 2, 0], np.float32)
    assert top_k(logits, np.arange(6), 3).tolist() == [1, 2, 3]


def test_top_p_keeps_the_lower_ids_of_a_tie():
    logits = np.zeros(4, np.float32)
    assert top_p(logits, np.arange(4), 0.5).tolist() == [0, 1]
    assert top_p(logits, np.arange(4), 0.0).tolist() == [0]


def test_greedy_takes_the_lowest_id_of_a_tie_and_draws_nothing():
    logits = np.array([0, 5, 5, 1], np.float32)
    for temp in (0.0, -1.0):
        assert Sampler(SamplingParams(temp=temp)).next(logits, 3) == 1


def test_top_k_of_one_is_greedy():
    sampler = Sampler(SamplingParams(seed=1, temp=5.0, top_k=1))
    assert {sampler.next(logits_of(3), i) for i in range(20)} == {int(logits_of(3).argmax())}


def test_the_draws_follow_the_probabilities():
    logits = logits_of(7, size=12, scale=1.5)
    sampler = Sampler(SamplingParams(seed=11, temp=1.3, top_k=8, top_p=1.0, min_p=0.0))
    n = 20_000
    seen = np.bincount([sampler.next(logits, i) for i in range(n)], minlength=12) / n
    expected = np.zeros(12)
    ids, share = sampler.candidates(logits)
    expected[ids] = share
    bound = 4.5 * np.sqrt(expected * (1 - expected) / n)  # 4.5 sigma; the draw is seeded anyway
    assert (np.abs(seen - expected) <= bound).all()
    assert len(ids) == 8


def test_a_draw_depends_on_seed_and_position_alone():
    logits = logits_of(2, scale=0.5)
    forward = Sampler(SamplingParams(seed=5, temp=1.0))
    backward = Sampler(SamplingParams(seed=5, temp=1.0))
    a = [forward.next(logits, i) for i in range(30)]
    b = [backward.next(logits, i) for i in reversed(range(30))]
    assert a == b[::-1]
    other = Sampler(SamplingParams(seed=6, temp=1.0))
    assert a != [other.next(logits, i) for i in range(30)]


def test_without_a_seed_a_fresh_one_is_drawn_and_told():
    a, b = Sampler(SamplingParams()), Sampler(SamplingParams())
    assert a.seed != b.seed
    assert Sampler(SamplingParams(seed=0)).seed == 0


def philox(key: int, counter: int) -> int:
    """First word of Philox4x64-10 of Salmon et al., key (key, 0), counter (counter, 0, 0, 0)."""
    mask = 2**64 - 1
    x, k = [counter, 0, 0, 0], [key, 0]
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * x[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * x[2], 2**64)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return x[0]


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 0), (42, 7), (2**32 - 1, 163_839)])
def test_the_random_number_is_the_documented_one(seed, position):
    assert uniform(seed, position) == (philox(seed, position + 1) >> 11) * 2.0**-53


def test_ignore_eos_bans_every_end_token():
    logits = np.array([9, 8, 1, 0], np.float32)
    eog = frozenset({0, 1})
    assert Sampler(SamplingParams(temp=0.0), eog).next(logits, 0) == 0
    assert Sampler(SamplingParams(temp=0.0, ignore_eos=True), eog).next(logits, 0) == 2
    assert logits[0] == 9, "the engine's logits stay as they are"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_broken_logits_are_an_error_with_a_hint(bad, temp):
    logits = logits_of(1)
    logits[17] = bad
    with pytest.raises(MlacliError, match="position 12") as e:
        Sampler(SamplingParams(seed=1, temp=temp)).next(logits, 12)
    assert e.value.hint


def test_tiny_temperatures_and_large_vocabularies_hold():
    logits = logits_of(zlib.crc32(b"large"), size=129_280)
    best = int(logits.argmax())
    assert Sampler(SamplingParams(seed=1, temp=1e-6)).next(logits, 0) == best
    everything = Sampler(SamplingParams(seed=1, temp=1.0, top_k=0, top_p=1.0, min_p=0.0))
    assert 0 <= everything.next(logits, 0) < logits.size
    assert probabilities(logits).sum() == pytest.approx(1)
