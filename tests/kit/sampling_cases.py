"""Cases of the device sampler, run on a Launcher of any device and compared with the Sampler."""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from kit.sent_cases import TICKS, Inboxes

from mlacli.backends import cuda_sampling
from mlacli.backends.cuda_group import Mail
from mlacli.errors import MlacliError
from mlacli.params import SamplingParams
from mlacli.sampling import Sampler, uniform

CHAINS = (
    SamplingParams(seed=1, temp=0.0),
    SamplingParams(seed=2),
    SamplingParams(seed=3, top_k=1),
    SamplingParams(seed=4, top_k=1000, top_p=0.99, min_p=0.0, temp=1.3),
    SamplingParams(seed=5, top_k=1024, top_p=1.0, min_p=0.02, temp=0.7),
    SamplingParams(seed=6, top_k=64, top_p=0.3, min_p=0.0, temp=5.0),
    SamplingParams(seed=(1 << 63) + 12345, top_k=33, top_p=1.0, min_p=0.0, temp=1.0),
)


def logits_of(rng: np.random.Generator, n_vocab: int, kind: str) -> np.ndarray:
    x = (rng.standard_normal(n_vocab) * 3).astype(np.float32)
    if kind == "flat":
        x *= np.float32(0.01)
    elif kind == "ties":
        x = np.round(x * 2) / 2
    elif kind == "equal":
        x[:] = -0.0
        x[::2] = 0.0
    elif kind == "peak":
        x[n_vocab // 3] = 40.0
    return x


class Driven:
    """A sampler state on a device, fed one vector of logits after another."""

    def __init__(
        self, ops: Any, params: SamplingParams, n_vocab: int, banned: Iterable[int] = ()
    ) -> None:
        self.ops = ops
        token, pos = ops.put(np.array([7], np.int32)), ops.put(np.array([99], np.int32))
        self.state = cuda_sampling.new_state(ops.device.take, token, pos)
        banned = sorted(banned)
        params = replace(params, ignore_eos=bool(banned) or params.ignore_eos)
        self.host = Sampler(params, frozenset(banned))
        words = cuda_sampling.chain_words(params, self.host.seed, n_vocab, banned)
        ops.device.copy_in(self.state.chain, words)

    def __call__(
        self, logits: np.ndarray, position: int, mail: Mail | None = None, first: int = 0
    ) -> int:
        """The device's id for `position`; asserts that state and ring agree."""
        ops, state = self.ops, self.state
        ops.device.copy_in(state.pos, np.array([position - 1], np.int32))
        cuda_sampling.next_token(ops, ops.put(logits), state, mail, first)
        token, pos, ring = (ops.get(x) for x in (state.token, state.pos, state.ring))
        assert pos[0] == position
        drawn = cuda_sampling.produced(ring, position, 1)[0]
        assert drawn == token[0]
        return drawn


def check_apart(ops: Any, widths: tuple[int, ...], ended: int, kinds: Iterable[str]) -> None:
    """Every GPU of several draws the Sampler's token from its columns and others' candidates."""
    rng, n_vocab = np.random.default_rng(2), sum(widths)
    firsts = np.cumsum([0, *widths])
    for params in CHAINS:
        if not cuda_sampling.can_exchange(params, widths):
            continue
        driven = Driven(ops, params, n_vocab, banned=range(0, n_vocab, 97))
        for kind, me in itertools.product(kinds, range(len(widths))):
            logits, position = logits_of(rng, n_vocab, kind), int(rng.integers(1, 1 << 20))
            want = driven.host.next(logits, position)
            logits_there = np.where(np.arange(n_vocab) % 97 == 0, -np.inf, logits)
            k = params.top_k if params.temp > 0 else 1
            parts = np.stack([
                candidates(logits_there[a:b].astype(np.float32), a, k)
                for a, b in itertools.pairwise(firsts)
            ])  # fmt: skip
            boxes = Inboxes(ops, rng, (len(widths), me, ended), 2 * k, parts)
            own = logits[firsts[me] : firsts[me + 1]]
            got = driven(own, position, boxes.mail, int(firsts[me]))
            near = params.temp > 0 and admissible(driven.host, logits_there, position)
            assert got == want or (near and got in near), (params, kind, me, got, want)
            sent = boxes.sent([g for g in range(len(widths)) if g != me])
            assert np.array_equal(sent.view(np.uint32), parts[me].view(np.uint32))
            words = ops.get(boxes.words)
            assert words[0] // TICKS == boxes.step and words[1] == 0, "one step was counted"


def candidates(logits: np.ndarray, first: int, k: int) -> np.ndarray:
    """Bits of the k largest and their ids, by ascending id, in turns."""
    at = np.sort(np.argsort(-logits, kind="stable")[:k])
    both = np.stack([logits[at].view(np.uint32), (at + first).astype(np.uint32)], 1)
    return both.reshape(-1).view(np.float32)


def admissible(sampler: Sampler, logits: np.ndarray, position: int) -> set[int]:
    """Tokens of the chain when sums of probabilities are off by 1e-12, far more than rounding."""
    p, found = sampler.params, set()
    for nudge in (-1e-12, 0.0, 1e-12):
        nudged = Sampler(replace(p, top_p=p.top_p + nudge if p.top_p < 1 else p.top_p))
        ids, share = nudged.candidates(logits)
        reached = np.cumsum(share)
        for shift in (-1e-12, 0.0, 1e-12):
            target = uniform(sampler.seed, position) * reached[-1] + shift
            place = int(np.searchsorted(reached, target, "right"))
            found.add(int(ids[min(place, ids.size - 1)]))
    return found


def check(ops: Any, n_vocab: int, kinds: Iterable[str], draws: int, seed: int = 0) -> int:
    """All chains on each kind of logits; how many tokens were decided by rounding alone."""
    rng, n = np.random.default_rng(seed), 0
    for params in CHAINS:
        assert cuda_sampling.can_run(params)
        driven = Driven(ops, params, n_vocab)
        for kind in kinds:
            for position in rng.integers(1, 1 << 20, draws).tolist():
                logits = logits_of(rng, n_vocab, kind)
                want = driven.host.next(logits, position)
                got = driven(logits, position)
                if got != want:
                    likely = admissible(driven.host, logits, position)
                    assert params.temp > 0 and got in likely, (params, kind, position, got, want)
                    n += 1
    return n


def check_banned(ops: Any, n_vocab: int) -> None:
    """Banned ids are never drawn, not even when they are the largest."""
    rng = np.random.default_rng(3)
    logits = logits_of(rng, n_vocab, "flat")
    banned = np.argsort(-logits)[:5].tolist()
    for temp in (0.0, 0.8):
        params = SamplingParams(seed=9, temp=temp, top_k=5, ignore_eos=True)
        driven = Driven(ops, params, n_vocab, banned)
        for position in range(1, 9):
            got = driven(logits, position)
            assert got == driven.host.next(logits, position)
            assert got not in banned


def check_not_finite(ops: Any, n_vocab: int) -> None:
    """NaN of either sign and infinity are refused, as by the Sampler."""
    negative_nan = np.array([0xFFC00000], np.uint32).view(np.float32)[0]
    for temp in (0.0, 0.8):
        driven = Driven(ops, SamplingParams(seed=9, temp=temp), n_vocab)
        for bad in (np.nan, negative_nan, np.inf):
            logits = logits_of(np.random.default_rng(4), n_vocab, "")
            logits[n_vocab // 2] = bad
            for draw in (driven, driven.host.next):
                try:
                    draw(logits, 5)
                except MlacliError as e:
                    assert "position 5" in str(e)
                else:
                    raise AssertionError(f"{bad} at temperature {temp} went unnoticed")
        everything = np.full(n_vocab, -np.inf, np.float32)
        try:
            driven(everything, 6)
        except MlacliError:
            continue
        raise AssertionError("no possible token went unnoticed")
