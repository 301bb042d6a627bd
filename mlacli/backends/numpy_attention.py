"""Attention in plain NumPy: what queries meet in each form (`Keys`), and two ways of softmax.

Letters as in ops.py; g of the h heads are computed together, in b batches of m rows: b m = g n.
Cache rows from n_kv on are never read: they may hold anything, and 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from mlacli.backends.numpy_cache import Floats, Ints, LatentRows
from mlacli.parallel.memory import KV_BLOCK

Round = Callable[[Floats], Floats]


class Keys(Protocol):
    """Queries [h, n, w], and the cache rows start..stop as keys and values of some heads."""

    q: Floats

    def scores(self, start: int, stop: int, heads: slice) -> Floats:
        """q . key [b, m, t], a fresh array."""
        ...

    def values(self, start: int, stop: int, heads: slice) -> Floats:
        """[b, t, v]; absorbed [1, t, r]."""
        ...


class AbsorbedKeys:
    """Latent rows are all heads' keys and values: heads times tokens are one product's rows.

    With `columns`, the transposed copy, values come from there.
    """

    def __init__(
        self, q: Floats, rows: LatentRows, columns: LatentRows | None, r: int, rounded: Round
    ) -> None:
        self.q, self._columns, self._r = rounded(q), columns, r
        self._block = _last_block(rows, rounded)

    def scores(self, start: int, stop: int, heads: slice) -> Floats:
        q = self.q[heads]
        return q.reshape(1, -1, q.shape[-1]) @ self._block(start, stop).T

    def values(self, start: int, stop: int, heads: slice) -> Floats:
        if self._columns is not None:
            return self._columns.read(start, stop)[None]
        return self._block(start, stop)[None, :, : self._r]


class ExpandedKeys:
    """Keys and values of each head, built from latent rows block by block."""

    def __init__(
        self, q: Floats, rows: LatentRows, up_k: Floats, up_v: Floats, rounded: Round
    ) -> None:
        self.q, self._up_k, self._up_v = rounded(q), up_k, up_v  # [h, r, k], [h, v, r]
        self._block = _last_block(rows, rounded)

    def scores(self, start: int, stop: int, heads: slice) -> Floats:
        r, k = self._up_k.shape[1:]
        q, row = self.q[heads], self._block(start, stop)
        keys = row[:, :r] @ self._up_k[heads]  # [g, t, k]
        scores: Floats = q[..., :k] @ keys.transpose(0, 2, 1)
        scores += q[..., k:] @ row[:, r:].T
        return scores

    def values(self, start: int, stop: int, heads: slice) -> Floats:
        c_kv = self._block(start, stop)[:, : self._up_k.shape[1]]
        return c_kv @ self._up_v[heads].transpose(0, 2, 1)


class HeadKeys:
    """Keys [nope | rope] and values as cached for each head."""

    def __init__(self, q: Floats, keys: LatentRows, values: LatentRows, rounded: Round) -> None:
        self.q, self._keys, self._values, self._rounded = rounded(q), keys, values, rounded

    def scores(self, start: int, stop: int, heads: slice) -> Floats:
        scores: Floats = self.q[heads] @ self._of(self._keys, start, stop, heads).transpose(0, 2, 1)
        return scores

    def values(self, start: int, stop: int, heads: slice) -> Floats:
        return self._of(self._values, start, stop, heads)

    def _of(self, cached: LatentRows, start: int, stop: int, heads: slice) -> Floats:
        rows = self._rounded(cached.read(start, stop))
        return rows.reshape(stop - start, len(self.q), -1).transpose(1, 0, 2)[heads]


def _last_block(rows: LatentRows, rounded: Round) -> Callable[[int, int], Floats]:
    """Reads rows; the last block stays, so that its values needn't be read again."""
    return lru_cache(maxsize=1)(lambda start, stop: rounded(rows.read(start, stop)))


def join_heads(q_nope: Floats, q_pe: Floats) -> Floats:
    """[n, h, k], [n, h, p] -> [h, n, k + p]."""
    return np.concatenate([q_nope.transpose(1, 0, 2), q_pe.transpose(1, 0, 2)], axis=-1)


def expand(c_kv: Floats, k_pe: Floats, up_k: Floats, up_v: Floats) -> tuple[Floats, Floats]:
    """Keys [n, h, k + p] and values [n, h, v] of new tokens."""
    k_nope = (c_kv @ up_k).transpose(1, 0, 2)
    shared = np.broadcast_to(k_pe[:, None], (*k_nope.shape[:2], k_pe.shape[-1]))
    values = (c_kv @ up_v.transpose(0, 2, 1)).transpose(1, 0, 2)
    return np.concatenate([k_nope, shared], axis=-1), values


def blockwise(keys: Keys, pos: Ints, n_kv: int, scale: float, rounded: Round) -> Floats:
    """softmax(scores) values [n, h, v], block by block with a running maximum and sum.

    Token i sees cache rows up to pos[i]; every token sees row 0, so no first block is empty.
    """
    h, n = keys.q.shape[:2]
    top: Any = np.float32(-np.inf)
    total: Any = np.float32(0)
    o: Any = total
    for start, stop in _blocks(n_kv):
        p = _masked_scores(keys, pos, start, stop, scale, slice(h))
        old, top = top, np.maximum(top, p.max(axis=-1, keepdims=True))
        p -= top
        np.exp(p, out=p)
        keep = np.exp(old - top)  # 0 in the first block
        total = total * keep + p.sum(axis=-1, keepdims=True)
        o = o * keep + rounded(p) @ keys.values(start, stop, slice(h))
    o /= total
    heads: Floats = o.reshape(h, n, -1)
    return heads.transpose(1, 0, 2)


def whole_matrix(keys: Keys, pos: Ints, n_kv: int, scale: float, at_once: int) -> Floats:
    """The same [n, h, v] with all scores of `at_once` heads in memory."""
    groups = [slice(g, g + at_once) for g in range(0, len(keys.q), at_once)]
    o = np.concatenate([_whole_matrix(keys, pos, n_kv, scale, heads) for heads in groups])
    return o.transpose(1, 0, 2)


def _whole_matrix(keys: Keys, pos: Ints, n_kv: int, scale: float, heads: slice) -> Floats:
    """[g, n, v] of some heads."""
    g, n, _ = keys.q[heads].shape
    p = np.empty((g * n, n_kv), np.float32)
    for start, stop in _blocks(n_kv):
        scores = _masked_scores(keys, pos, start, stop, scale, heads)
        p[:, start:stop] = scores.reshape(g * n, -1)
    p -= p.max(axis=-1, keepdims=True)
    np.exp(p, out=p)
    o: Any = np.float32(0)
    for start, stop in _blocks(n_kv):
        values = keys.values(start, stop, heads)
        o = o + p[:, start:stop].reshape(len(values), -1, stop - start) @ values
    o = o.reshape(g * n, -1) / p.sum(axis=-1, keepdims=True)
    return np.asarray(o.reshape(g, n, -1))


def _blocks(n_kv: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n_kv, KV_BLOCK):
        yield start, min(start + KV_BLOCK, n_kv)


def _masked_scores(
    keys: Keys, pos: Ints, start: int, stop: int, scale: float, heads: slice
) -> Floats:
    """Scaled scores [b, m, t], -inf where a token would look ahead."""
    scores = keys.scores(start, stop, heads)
    scores *= np.float32(scale)
    if stop - 1 > pos[0]:
        by_head = scores.reshape(-1, len(pos), stop - start)
        np.copyto(by_head, np.float32(-np.inf), where=pos[:, None] < np.arange(start, stop))
    return scores
