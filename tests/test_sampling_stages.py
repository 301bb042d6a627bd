"""Every stage of the chain against its definition, written here with loops and sorts."""

import math

import numpy as np
import pytest

from mlacli.flag_values import sampler_letters, sampler_names
from mlacli.params import SAMPLERS, SamplingParams
from mlacli.sampling import Sampler, uniform
from mlacli.sampling_stages import ON_DEVICE, STAGES, mirostat_kept

VOCAB = 60
SEEDS = range(6)
ALL_OFF = {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def logits_of(seed, size=VOCAB, scale=3.0):
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


def shares(values):
    top = max(values)
    weights = [math.exp(v - top) for v in values]
    return [w / sum(weights) for w in weights]


def ranked(logits, ids=None):
    """(probability, id), the likeliest first, of equals the lower id."""
    ids = range(len(logits)) if ids is None else ids
    share = shares([float(logits[i]) for i in ids])
    return sorted(zip(share, ids, strict=True), key=lambda x: (-x[0], x[1]))


def sampler(past=(), breakers=None, **given):
    made = Sampler(SamplingParams(seed=3, **(ALL_OFF | given)), breakers=breakers)
    made.begin(past)
    return made


def kept(logits, position=0, **given):
    ids, share = sampler(**given).candidates(logits, position)
    np.testing.assert_allclose(share, shares([float(logits[i]) for i in ids]), rtol=1e-9)
    return ids.tolist()


def edited(logits, past, breakers=None, **given):
    """The logits that the chain turned `logits` into, up to a constant."""
    ids, share = sampler(past, breakers, **given).candidates(logits)
    assert ids.tolist() == list(range(len(logits)))
    return np.log(share)


def same_up_to_a_constant(a, b):
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    np.testing.assert_allclose(difference - difference[0], 0, atol=1e-9)


# ---- filters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_typical(seed, p):
    logits = logits_of(seed)
    share = shares(logits.tolist())
    entropy = -sum(s * math.log(s) for s in share)
    order = sorted(range(VOCAB), key=lambda i: abs(-math.log(share[i]) - entropy))
    total, n = 0.0, 0
    while n < VOCAB and total <= p:
        total += share[order[n]]
        n += 1
    found = kept(logits, typical=p)
    assert found == sorted(order[:n]) and 0 < len(found) < VOCAB


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [0.3, 1.0, 2.5])
def test_top_n_sigma(seed, n):
    logits = logits_of(seed)
    values = [float(x) for x in logits]
    mean = sum(values) / VOCAB
    sigma = math.sqrt(sum((v - mean) ** 2 for v in values) / VOCAB)
    assert kept(logits, top_n_sigma=n) == [
        i for i, v in enumerate(values) if v >= max(values) - n * sigma
    ]
    assert kept(logits, top_n_sigma=0.0) == list(range(VOCAB))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.4])
def test_xtc(seed, threshold):
    logits = logits_of(seed)
    above = [i for share, i in ranked(logits) if share >= threshold]
    expected = [i for i in range(VOCAB) if i not in above[:-1]]
    assert kept(logits, xtc_probability=1.0, xtc_threshold=threshold) == expected
    assert kept(logits, xtc_probability=1.0, xtc_threshold=0.51) == list(range(VOCAB))
    assert kept(logits, xtc_probability=0.0, xtc_threshold=threshold) == list(range(VOCAB))


def test_xtc_strikes_as_often_as_asked_and_not_by_the_number_that_draws():
    logits = logits_of(1)
    made = sampler(xtc_probability=0.3, xtc_threshold=0.05)
    hits = [len(made.candidates(logits, i)[0]) < VOCAB for i in range(4000)]
    assert abs(sum(hits) / 4000 - 0.3) < 0.03
    assert hits == [uniform(3, i, 1) <= 0.3 for i in range(4000)]
    draws = [uniform(3, i) for i in range(4000)]
    assert abs(np.corrcoef(hits, draws)[0, 1]) < 0.05


# ---- edits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("last_n", [-1, 5, 64])
def test_penalties(seed, last_n):
    logits = logits_of(seed)
    past = np.random.default_rng(seed).integers(0, 12, 20).tolist()
    window = past if last_n < 0 else past[-last_n:]
    expected = logits.astype(np.float64)
    for token in set(window):
        value = float(logits[token])
        value = value * 1.3 if value <= 0 else value / 1.3
        expected[token] = value - window.count(token) * 0.4 - 0.7
    given = {"repeat_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.7}
    same_up_to_a_constant(edited(logits, past, repeat_last_n=last_n, **given), expected)
    assert (expected != logits).sum() == len(set(window)) > 2


def test_penalties_forget_and_are_off_where_they_should_be():
    logits = logits_of(0)
    assert sampler(repeat_last_n=0, repeat_penalty=2.0).stages == ("temperature",)
    assert sampler().stages == ("temperature",)
    same_up_to_a_constant(edited(logits, [], repeat_penalty=2.0), logits)
    far = [9, *range(20, 24)]
    same_up_to_a_constant(
        edited(logits, far, repeat_penalty=2.0, repeat_last_n=4),
        edited(logits, far[1:], repeat_penalty=2.0, repeat_last_n=4),
    )


def test_the_samplers_own_choices_are_penalised_too():
    logits = np.zeros(4, np.float32)
    made = Sampler(SamplingParams(temp=0.0, presence_penalty=1.0))
    assert [made.next(logits, i) for i in range(4)] == [0, 1, 2, 3]
    made.begin([0, 1])
    assert made.next(logits, 0) == 2


def dry_expected(logits, past, base, multiplier, allowed, breakers=()):
    """Less multiplier * base^(length - allowed) for each token that continues a repetition."""
    limit = len(past)
    for i in range(len(past)):  # the nearest breaker, from the end of the text
        at = len(past) - 1 - i
        found = [b for b in breakers if past[at : at + len(b)] == list(b)]
        if found:
            limit = i - max(len(b) - 1 for b in found)
            break
    expected = logits.astype(np.float64)
    for token in range(len(logits)):
        lengths = []
        for j, earlier in enumerate(past):
            if earlier == token and j:  # before the first token is nothing to repeat
                n = 0
                while n < j and past[j - 1 - n] == past[len(past) - 1 - n]:
                    n += 1
                lengths.append(min(n, limit))
        longest = max(lengths, default=-1)
        if longest >= allowed and (token,) not in breakers:
            expected[token] -= multiplier * base ** (longest - allowed)
    return expected if limit >= allowed and len(past) > allowed else logits


@pytest.mark.parametrize("seed", range(40))
def test_dry(seed):
    random = np.random.default_rng(seed)
    logits = logits_of(seed, 6)
    past = random.integers(0, 3, random.integers(1, 30)).tolist()
    sequences = [(4,), (2, 1)] if seed % 2 else []
    if seed % 4 == 3:
        past.insert(int(random.integers(0, len(past))), 4)
    breakers = {}
    for first, *rest in sequences:
        breakers.setdefault(first, ())
        breakers[first] += (tuple(rest),)
    allowed = int(random.integers(0, 4))
    given = {"dry_multiplier": 0.8, "dry_base": 1.6, "dry_allowed_length": allowed}
    expected = dry_expected(logits, past, 1.6, 0.8, allowed, sequences)
    same_up_to_a_constant(edited(logits, past, breakers, **given), expected)


def test_dry_looks_back_as_far_as_told_and_its_power_stays_finite():
    logits = logits_of(1, 6)
    past = [0, 1, 2, 3, 0, 1, 2]
    given = {"dry_multiplier": 1.0, "dry_allowed_length": 1}
    far = edited(logits, past, dry_penalty_last_n=-1, **given)
    near = edited(logits, past, dry_penalty_last_n=3, **given)
    same_up_to_a_constant(near, logits)
    assert far[3] - near[3] != pytest.approx(far[4] - near[4])
    long = sampler([1] * 5000, None, dry_multiplier=1.0).candidates(logits)[1]
    assert np.isfinite(long).all() and long[1] == 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("spread", "power"), [(0.5, 1.0), (2.0, 0.5)])
def test_dynatemp(seed, spread, power):
    logits = logits_of(seed)
    share = shares(logits.tolist())
    entropy = -sum(s * math.log(s) for s in share) / math.log(VOCAB)
    low, high = max(0.0, 1.0 - spread), 1.0 + spread
    temp = low + (high - low) * entropy**power
    given = {"dynatemp_range": spread, "dynatemp_exp": power}
    same_up_to_a_constant(edited(logits, (), **given), logits.astype(np.float64) / temp)


# ---- mirostat -----------------------------------------------------------------------------------


def replay_mirostat(version, rows, tau, eta, seed):
    """Chosen ids by the papers' recipe: filter, draw, correct the limit by the surprise."""
    limit, chosen = 2 * tau, []
    for position, logits in enumerate(rows):
        order = ranked(logits)
        if version == 2:
            pool = [i for n, (s, i) in enumerate(order) if n == 0 or -math.log2(s) <= limit]
        else:
            m = min(99, len(order) - 1)
            t = [math.log((n + 2) / (n + 1)) for n in range(m)]
            b = [math.log(order[n][0] / order[n + 1][0]) for n in range(m)]
            s = sum(x * y for x, y in zip(t, b, strict=True)) / sum(x * x for x in t)
            k = ((s - 1) * 2**limit / (1 - len(order) ** (1 - s))) ** (1 / s)
            pool = [i for _, i in order[: max(1, int(k))]]
        pool.sort()
        share = shares([float(logits[i]) for i in pool])
        reached = np.cumsum(share)
        place = int(np.searchsorted(reached, uniform(seed, position) * reached[-1], "right"))
        chosen.append(pool[place])
        limit -= eta * (-math.log2(share[place]) - tau)
    return chosen


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [0.5, 1.5, 3.0])
def test_mirostat(version, tau):
    rows = [logits_of(100 + i, 150, 2.0) for i in range(60)]
    made = Sampler(
        SamplingParams(seed=3, temp=1.0, mirostat=version, mirostat_ent=tau, mirostat_lr=0.2)
    )
    found = [made.next(row, i) for i, row in enumerate(rows)]
    assert found == replay_mirostat(version, rows, tau, 0.2, 3)
    assert made.stages == () and made.on_host == ("mirostat",)


def test_mirostat_survives_the_extremes():
    params = SamplingParams(mirostat=1)
    same = np.zeros(50, np.float32)
    ids = np.arange(50)
    assert mirostat_kept(same, ids, 3.0, params).size == 50
    sharp = same.copy()
    sharp[7] = 1e4
    for limit in (-50.0, 0.0, 2000.0):
        for version in (1, 2):
            found = mirostat_kept(sharp, ids, limit, SamplingParams(mirostat=version))
            assert 7 in found
    assert mirostat_kept(same, ids[:1], 3.0, params).tolist() == [0]


# ---- the chain ----------------------------------------------------------------------------------


def test_names_order_and_letters_are_the_parsers():
    assert tuple(STAGES) == SAMPLERS
    assert sampler_letters("".join(s.letter for s in STAGES.values())) == SAMPLERS
    assert sampler_names("penalties;DRY;top-n-sigma;top_k;typical;nucleus;min-p;xtc;temp") == (
        SAMPLERS
    )
    assert [name for name in SAMPLERS if name in ON_DEVICE] == list(ON_DEVICE)


def test_stages_run_in_the_order_asked_for():
    logits = logits_of(4)
    given = {"temp": 3.0, "min_p": 0.3}
    before = kept(logits, temp=1.0, min_p=0.3)
    first, _ = sampler(**given, samplers=("temperature", "min_p")).candidates(logits)
    last, _ = sampler(**given, samplers=("min_p", "temperature")).candidates(logits)
    assert last.tolist() == before
    assert first.tolist() == kept(logits / np.float32(3), temp=1.0, min_p=0.3) != before


def test_an_empty_chain_draws_from_the_models_own_probabilities():
    logits = logits_of(5)
    made = Sampler(SamplingParams(seed=1, temp=0.0, samplers=()))
    ids, share = made.candidates(logits)
    assert ids.size == VOCAB
    np.testing.assert_allclose(share, shares(logits.tolist()), rtol=1e-9)
    assert len({made.next(logits, i) for i in range(50)}) > 1, "no temperature, so not greedy"


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_takes_the_best_of_what_the_chain_leaves(seed):
    logits = logits_of(seed)
    given = ALL_OFF | {"temp": 0.0, "xtc_probability": 1.0, "xtc_threshold": 0.05}
    made = Sampler(SamplingParams(**given))
    above = [i for share, i in ranked(logits) if share >= 0.05]
    assert made.next(logits, 0) == (above or [int(logits.argmax())])[-1]


def test_biases_add_up_and_forbid():
    logits = logits_of(2)
    best = int(logits.argmax())
    made = Sampler(SamplingParams(temp=0.0, logit_bias=((best, -math.inf), (3, 60.0), (5, 30.0))))
    assert made.next(logits, 0) == 3
    made = Sampler(SamplingParams(temp=0.0, logit_bias=((5, 30.0), (5, 30.0), (3, 45.0))))
    assert made.next(logits, 0) == 5
    assert made.on_host == ("logit bias",)
    assert float(logits.max()) == logits[best], "the engine's logits stay as they are"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ()),
        ({"samplers": ("min_p", "top_k", "temperature")}, ("samplers in another order",)),
        ({"samplers": ("top_k", "temperature"), "top_p": 1.0, "min_p": 0.0}, ()),
        ({"samplers": ("top_k", "temperature")}, ("samplers in another order",)),
        ({"samplers": ("top_k", "top_p", "min_p")}, ("samplers in another order",)),
        ({"mirostat": 2}, ("mirostat",)),
        ({"logit_bias": ((3, -math.inf),)}, ()),
        ({"logit_bias": ((3, 1.0),)}, ("logit bias",)),
        ({"typical": 0.5}, ("typ_p",)),
        ({"repeat_penalty": 1.1, "dynatemp_range": 0.2}, ("penalties", "dynatemp")),
    ],
)
def test_what_a_device_sampler_must_leave_to_the_host(given, expected):
    assert Sampler(SamplingParams(**given)).on_host == expected
