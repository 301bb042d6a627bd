"""The sampler chain on host logits: the definition that device samplers must agree with.

Order and defaults are llama.cpp's: top-k, top-p, min-p, temperature, draw. A filter keeps a set of
ids, and the draw runs through the kept ids in ascending order, so that nothing but top-p sorts.
Knows no engine and no tokenizer.
"""

from __future__ import annotations

import math
import secrets

import numpy as np
from numpy.typing import NDArray

from mlacli.errors import MlacliError
from mlacli.params import SamplingParams

Ids = NDArray[np.intp]
AHEAD = 8  # tokens that a device draws at one go
Logits = NDArray[np.float32]


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
    order = np.argsort(-logits[ids], kind="stable")  # equal logits: lower id first
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


def probabilities(logits: NDArray[np.floating], temp: float = 1.0) -> NDArray[np.float64]:
    """softmax(logits / temp), in float64."""
    scaled = logits.astype(np.float64) / temp
    weights = np.exp(scaled - scaled.max())
    return np.asarray(weights / weights.sum())


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone.

    The top 53 bits of the first word of Philox4x64-10 with key (seed, 0) and counter
    (position + 1, 0, 0, 0): NumPy steps the counter before its first block.
    """
    words = np.random.Philox(key=[seed, 0], counter=[position, 0, 0, 0]).random_raw(1)
    return float(int(words[0]) >> 11) * 2.0**-53


class Sampler:
    """The next token id from logits; `seed` is the one in use, drawn if none was given."""

    def __init__(self, params: SamplingParams, eog_ids: frozenset[int] = frozenset()) -> None:
        self.params = params
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self.banned = np.array(sorted(eog_ids) if params.ignore_eos else [], dtype=np.intp)

    def candidates(self, logits: Logits) -> tuple[Ids, NDArray[np.float64]]:
        """Ids that pass the filters, ascending, and the probability of each."""
        p = self.params
        ids = top_k(logits, np.arange(logits.size), p.top_k)
        ids = top_p(logits, ids, p.top_p)
        ids = min_p(logits, ids, p.min_p)
        return ids, probabilities(logits[ids], p.temp)

    def next(self, logits: Logits, position: int) -> int:
        """The id that follows; `position` is its place in the context and keys the random number.

        temp <= 0 takes the largest logit, of equals the lowest id.
        """
        if self.banned.size:
            logits = logits.copy()
            logits[self.banned] = -np.inf
        best = int(np.argmax(logits))
        if not np.isfinite(logits[best]):  # argmax finds a NaN first
            raise MlacliError(
                f"the logits at position {position} hold {logits[best]}",
                "the file is damaged or a number overflowed; try -ctk f32 -gap f32",
            )
        if self.params.temp <= 0:
            return best
        ids, share = self.candidates(logits)
        reached = np.cumsum(share)
        place = int(np.searchsorted(reached, uniform(self.seed, position) * reached[-1], "right"))
        return int(ids[min(place, ids.size - 1)])
