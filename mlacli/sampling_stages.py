"""Every stage of the sampler chain, as one function each: logits [V] and kept ids in, both out.

Definitions are llama.cpp's, in float64 where probabilities are involved; ids stay in ascending
order, and of equal logits the lower id counts as the likelier. Holds no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlacli.params import SamplingParams

Ids = NDArray[np.intp]
Logits = NDArray[Any]  # float32 as they come, float64 once edited
Breakers = Mapping[int, tuple[tuple[int, ...], ...]]  # first token -> the rest of each sequence

_MIROSTAT_M = 100  # likeliest tokens by which mirostat 1 estimates the slope
_LARGEST_LOG = 88.7228391  # of float32: DRY's power may not pass it


@dataclass(frozen=True, slots=True)
class Turn:
    """What a stage may look at besides logits: parameters, the tokens so far, a random number."""

    params: SamplingParams
    past: Sequence[int]
    breakers: Breakers
    chance: float


def probabilities(logits: Logits, temp: float = 1.0) -> NDArray[np.float64]:
    """softmax(logits / temp), in float64."""
    scaled = logits.astype(np.float64) / temp
    weights = np.exp(scaled - scaled.max())
    return np.asarray(weights / weights.sum())


def _likeliest_first(logits: Logits, ids: Ids) -> NDArray[np.intp]:
    """Places in `ids`, the largest logit first, of equals the lower id."""
    return np.argsort(-logits[ids], kind="stable")


# ---- filters: a smaller set of ids --------------------------------------------------------------


def top_k(logits: Logits, ids: Ids, k: int) -> Ids:
    """The k ids of the largest logits; among equals at the edge the lowest ids. k <= 0: all."""
    if k <= 0 or k >= ids.size:
        return ids
    values = logits[ids]
    edge = np.partition(values, ids.size - k)[ids.size - k]
    above = ids[values > edge]
    level = ids[values == edge][: k - above.size]
    return np.sort(np.concatenate((above, level)))


def top_p(logits: Logits, ids: Ids, p: float) -> Ids:
    """The fewest likeliest ids whose probabilities reach p (at least one); p >= 1: all."""
    if p >= 1:
        return ids
    order = _likeliest_first(logits, ids)
    reached = np.cumsum(probabilities(logits[ids][order]))
    n = int(np.searchsorted(reached, p)) + 1
    return np.sort(ids[order[:n]])


def min_p(logits: Logits, ids: Ids, p: float) -> Ids:
    """The ids with at least p times the largest probability; p <= 0: all."""
    if p <= 0:
        return ids
    values = logits[ids].astype(np.float64)
    kept: Ids = ids[(values >= values.max() + math.log(p)) | (values == values.max())]
    return kept


def typical(logits: Logits, ids: Ids, p: float) -> Ids:
    """The ids whose surprise is nearest the entropy, until their probabilities pass p."""
    if p >= 1:
        return ids
    share = probabilities(logits[ids])
    surprise = -np.log(np.maximum(share, np.finfo(np.float64).tiny))
    entropy = float((share * surprise).sum())
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    passed = np.cumsum(share[order]) > p
    n = int(np.argmax(passed)) + 1 if passed.any() else ids.size
    return np.sort(ids[order[:n]])


def top_n_sigma(logits: Logits, ids: Ids, n: float) -> Ids:
    """The ids within n standard deviations of the largest logit; n <= 0: all."""
    if n <= 0:
        return ids
    values = logits[ids].astype(np.float64)
    kept: Ids = ids[values >= values.max() - n * values.std()]
    return kept


def xtc(logits: Logits, ids: Ids, probability: float, threshold: float, chance: float) -> Ids:
    """With `probability`: all but the least likely of the ids that reach `threshold` go."""
    if probability <= 0 or threshold > 0.5 or ids.size < 2 or chance > probability:
        return ids
    order = _likeliest_first(logits, ids)
    n_above = int((probabilities(logits[ids])[order] >= threshold).sum())
    return np.sort(ids[order[max(0, n_above - 1) :]])


# ---- edits: other logits ------------------------------------------------------------------------


def penalties(logits: Logits, ids: Ids, turn: Turn) -> tuple[Logits, Ids]:
    """Logits of the last tokens divided by the repeat penalty (multiplied where negative), less
    the frequency penalty for each time they occurred and the presence penalty once.
    """
    p, n = turn.params, turn.params.repeat_last_n
    window = turn.past if n < 0 else turn.past[len(turn.past) - min(n, len(turn.past)) :]
    seen, counts = np.unique(np.asarray(window, np.intp), return_counts=True)
    inside = seen < logits.size
    seen, counts = seen[inside], counts[inside]
    logits = logits.astype(np.float64)
    values = logits[seen]
    values = np.where(values <= 0, values * p.repeat_penalty, values / p.repeat_penalty)
    logits[seen] = values - counts * p.frequency_penalty - p.presence_penalty
    return logits, ids


def dry(logits: Logits, ids: Ids, turn: Turn) -> tuple[Logits, Ids]:
    """Less multiplier * base^(length - allowed) for a token that would continue a repetition.

    The length is that of the longest end of the text which occurred before that token already; a
    breaker bounds how far back an end reaches, and is never penalised itself.
    """
    p = turn.params
    n = p.dry_penalty_last_n
    back = turn.past[::-1] if n < 0 else turn.past[: -n - 1 : -1]  # the last token first
    if len(back) <= p.dry_allowed_length:
        return logits, ids
    limit = _unbroken(back, turn.breakers)
    if limit < p.dry_allowed_length:
        return logits, ids
    longest: dict[int, int] = {}
    for k, length in enumerate(_shared_starts(back)):
        length = min(length, limit)
        if k and length >= p.dry_allowed_length:
            token = back[k - 1]  # what followed that occurrence
            longest[token] = max(length, longest.get(token, 0))
    most = int(_LARGEST_LOG / math.log(p.dry_base)) if p.dry_base > 1.000001 else 0
    logits = logits.astype(np.float64)
    for token, length in longest.items():
        if token < logits.size and () not in turn.breakers.get(token, ()):
            power = length - p.dry_allowed_length
            logits[token] -= p.dry_multiplier * p.dry_base ** (min(power, most) if most else power)
    return logits, ids


def _unbroken(back: Sequence[int], breakers: Breakers) -> int:
    """How many tokens of `back` lie after the nearest breaker in the text."""
    for i, token in enumerate(back):
        tails = [
            t
            for t in breakers.get(token, ())
            if len(t) <= i and tuple(back[i - len(t) : i][::-1]) == t
        ]
        if tails:
            return i - max(map(len, tails))
    return len(back)


def _shared_starts(words: Sequence[int]) -> list[int]:
    """For each k, how long words[k:] agrees with the start of words (the Z-algorithm)."""
    n = len(words)
    found, left, right = [n] + [0] * (n - 1), 0, 0
    for k in range(1, n):
        length = min(right - k, found[k - left]) if k < right else 0
        while k + length < n and words[length] == words[k + length]:
            length += 1
        found[k] = length
        if k + length > right:
            left, right = k, k + length
    return found


def temperature(logits: Logits, ids: Ids, turn: Turn) -> tuple[Logits, Ids]:
    """logits / temp; temp <= 0 keeps the largest alone, of equals the lowest id.

    With a dynatemp range temp lies between temp - range and temp + range: the further up, the
    nearer the entropy is to that of equal probabilities.
    """
    p, temp = turn.params, turn.params.temp
    if p.dynatemp_range > 0:
        if ids.size < 2:
            return logits, ids
        share = probabilities(logits[ids])
        entropy = -float((share * np.log(np.maximum(share, np.finfo(np.float64).tiny))).sum())
        low, high = max(0.0, temp - p.dynatemp_range), temp + p.dynatemp_range
        temp = low + (high - low) * (entropy / math.log(ids.size)) ** p.dynatemp_exp
    if temp <= 0:
        return logits, ids[[int(np.argmax(logits[ids]))]]
    return logits.astype(np.float64) / temp, ids


def mirostat_kept(logits: Logits, ids: Ids, limit: float, p: SamplingParams) -> Ids:
    """The ids that mirostat 1 or 2 draws from, for the surprise `limit` in bits.

    2 keeps those less surprising than the limit, 1 the k likeliest, with k from the slope of a
    Zipf distribution fitted to the 100 likeliest.
    """
    order = _likeliest_first(logits, ids)
    share = probabilities(logits[ids])[order]
    if p.mirostat == 2:
        over = -np.log2(np.maximum(share, np.finfo(np.float64).tiny)) > limit
        n = int(np.argmax(over)) if over.any() else ids.size
        return np.sort(ids[order[: max(1, n)]])
    m = min(_MIROSTAT_M - 1, ids.size - 1)
    if m < 1:
        return ids
    t = np.log(np.arange(2, m + 2) / np.arange(1, m + 1))
    b = -np.diff(np.log(np.maximum(share[: m + 1], np.finfo(np.float64).tiny)))
    slope = float((t * b).sum() / (t * t).sum())
    gap = slope - 1
    n_vocab = logits.size
    if slope == 0:  # all alike
        return ids
    ratio = 1 / math.log(n_vocab) if gap == 0 else gap / (1 - n_vocab**-gap)
    log_k = (math.log(ratio) + limit * math.log(2)) / slope
    return top_k(logits, ids, max(1, int(math.exp(min(log_k, math.log(ids.size))) + 1e-9)))


# ---- the chain ----------------------------------------------------------------------------------

Apply = Callable[[Logits, Ids, Turn], tuple[Logits, Ids]]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: its letter in --sampling-seq, whether parameters make it do something, and how."""

    letter: str
    is_on: Callable[[SamplingParams], bool]
    apply: Apply


STAGES: Mapping[str, Stage] = MappingProxyType(
    {
        "penalties": Stage(
            "e",
            lambda p: p.repeat_last_n != 0
            and (p.repeat_penalty, p.frequency_penalty, p.presence_penalty) != (1, 0, 0),
            penalties,
        ),
        "dry": Stage(
            "d",
            lambda p: p.dry_multiplier != 0 and p.dry_base >= 1 and p.dry_penalty_last_n != 0,
            dry,
        ),
        "top_n_sigma": Stage(
            "s",
            lambda p: p.top_n_sigma > 0,
            lambda x, ids, t: (x, top_n_sigma(x, ids, t.params.top_n_sigma)),
        ),
        "top_k": Stage(
            "k", lambda p: p.top_k > 0, lambda x, ids, t: (x, top_k(x, ids, t.params.top_k))
        ),
        "typ_p": Stage(
            "y", lambda p: p.typical < 1, lambda x, ids, t: (x, typical(x, ids, t.params.typical))
        ),
        "top_p": Stage(
            "p", lambda p: p.top_p < 1, lambda x, ids, t: (x, top_p(x, ids, t.params.top_p))
        ),
        "min_p": Stage(
            "m", lambda p: p.min_p > 0, lambda x, ids, t: (x, min_p(x, ids, t.params.min_p))
        ),
        "xtc": Stage(
            "x",
            lambda p: p.xtc_probability > 0 and p.xtc_threshold <= 0.5,
            lambda x, ids, t: (
                x, xtc(x, ids, t.params.xtc_probability, t.params.xtc_threshold, t.chance)
            ),
        ),
        "temperature": Stage("t", lambda p: True, temperature),
    }
)  # fmt: skip
ON_DEVICE = ("top_k", "top_p", "min_p", "temperature")  # what a device sampler computes


def stage_is_on(name: str, params: SamplingParams) -> bool:
    """Whether the stage does anything with these parameters."""
    return STAGES[name].is_on(params)
