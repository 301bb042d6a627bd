"""Cases of the DSA kernels, run on a Launcher of any device and compared with NumPy.

Choices must be NumPy's but where scores lie closer together than their error bounds.
"""

from typing import Any

import numpy as np

from mlacli.backends import cuda_sparse, numpy_dsa
from mlacli.backends.numpy_cache import LatentRows
from mlacli.backends.numpy_ops import NumpyOps
from mlacli.backends.numpy_weights import NumpyWeight
from mlacli.loading.quant_types import F32
from mlacli.ops import Step
from mlacli.parallel.comm import SoloComm
from mlacli.params import ContextParams


def weight(values: np.ndarray) -> NumpyWeight:
    raw = np.ascontiguousarray(values, np.float32)
    return NumpyWeight("w", raw.shape, F32, raw.view(np.uint8))


def host_step(pos: np.ndarray, p: int) -> Step:
    angles = pos[:, None] * 10000.0 ** -(2 * np.arange(p // 2) / p)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return Step(pos * 0, pos, cos, sin, len(pos), int(pos.max()) + 1, [])


def device_step(ops: Any, step: Step) -> Step:
    pos, cos, sin = (ops.put(x) for x in (step.pos.astype(np.int32), step.cos, step.sin))
    return Step(pos, pos, cos, sin, step.n, step.n_kv, [])


class SparseCase:
    """Keys of n_kv rows in a cache of n_ctx, `n` tokens at its end, `padded` more behind them."""

    def __init__(
        self, seed: int, n: int, n_kv: int, cache_type: str = "f16", heads: int = 32,
        width: int = 128, p: int = 64, top_k: int = 2048, padded: int = 0, spare: int = 7,
        levels: int = 0, compared: int = 1 << 30,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        self.n, self.n_kv, self.top_k, self.heads, self.width = n, n_kv, top_k, heads, width
        self.cache_type, self.n_ctx = cache_type, n_kv + spare
        normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
        old = n_kv - n
        keys = normal(old, width)
        self.q, self.w = normal(n + padded, heads * width) * 3, normal(n + padded, heads)
        if levels:  # few different rows: most scores are ties
            keys = keys[rng.integers(0, levels, old)]
        self.key, self.norm, self.bias = (
            normal(n + padded, width) * 4 + 1,
            normal(width),
            normal(width),
        )
        self.step = host_step(np.arange(old, n_kv), p)
        self.compared = np.unique(np.linspace(0, n - 1, min(n, compared)).astype(int))
        self.numpy = LatentRows(self.n_ctx, width, cache_type)
        self.numpy.poison()
        self.numpy.write(np.arange(old), keys)
        pos = np.concatenate([self.step.pos, np.full(padded, -1)])
        self.padded = host_step(np.maximum(pos, 0), p)
        self.padded = Step(pos, pos, self.padded.cos, self.padded.sin, len(pos), n_kv, [])

    # ---- NumPy
    def store(self) -> None:
        """The tokens' keys, by NumPy."""
        o, n = NumpyOps(SoloComm(), ContextParams(), 1 << 30), self.n
        key = o.layer_norm(self.key[:n], weight(self.norm), weight(self.bias), 1e-6)
        o.store_index(self.numpy, o.rope_first(key, self.step), self.step)

    def want(self, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(scores [m, n_kv], chosen [m, top_k]) of the m compared tokens among stored keys."""
        o, n = NumpyOps(SoloComm(), ContextParams(), 1 << 30), self.n
        q = o.rope_first(self.q[:n].reshape(n, self.heads, self.width), self.step)
        q, w, pos = q[self.compared], self.w[self.compared], self.step.pos[self.compared]
        scaled = w / np.float32(np.sqrt(self.heads * self.width))
        keys = stored[: self.n_kv]
        scores = numpy_dsa.index_scores(q, scaled, keys)
        wide = (np.abs(scaled)[:, None] @ np.abs(q))[:, 0] @ np.abs(keys).T
        self.bound = wide * 2.0**-20  # of a float32 sum of 128 products, times 32 heads
        scores[pos[:, None] < np.arange(self.n_kv)] = -np.inf
        step = Step(pos, pos, None, None, len(pos), self.n_kv, [])
        rows = LatentRows(self.n_kv, self.width, "f32")
        rows.write(np.arange(self.n_kv), keys)
        return scores, numpy_dsa.select(q, w, rows, step, self.top_k)

    # ---- device
    def rows_on(self, ops: Any) -> cuda_sparse.IndexRows:
        """The old keys on the device, NaN bits in the rows behind."""
        rows = cuda_sparse.new_index_rows(ops.device.take, self.n_ctx, self.width, self.cache_type)
        raw = np.ascontiguousarray(self.numpy._rows)
        if rows.scales is None:
            ops.device.copy_in(rows.values, raw)
        else:
            blocks = raw.reshape(self.n_ctx, -1, 34)
            ops.device.copy_in(rows.values, np.ascontiguousarray(blocks[..., 2:]))
            ops.device.copy_in(rows.scales, np.ascontiguousarray(blocks[..., :2]))
        return rows

    def got(self, ops: Any) -> tuple[np.ndarray, np.ndarray]:
        """(the device's keys [n_ctx, i] as float32, chosen)."""
        rows = self.rows_on(ops)
        step = device_step(ops, self.padded)
        key, norm, bias, q, w = map(ops.put, (self.key, self.norm, self.bias, self.q, self.w))
        queries = cuda_sparse.index(ops, rows, key, norm, bias, 1e-6, step, q, w)
        chosen = cuda_sparse.select(ops, queries, rows, step, self.top_k)
        stored = ops.get(rows.values)
        if rows.scales is not None:
            scales = ops.get(rows.scales).astype(np.float32)
            blocks = stored.reshape(self.n_ctx, -1, 32) * scales[..., None]
            stored = blocks.reshape(self.n_ctx, -1)[:, : self.width]
        elif rows.values.dtype == np.uint16:
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32), ops.get(chosen)

    def check(self, ops: Any) -> str:
        """Asserts all; says how many rows differ from NumPy's choice and by what margin."""
        stored, chosen = self.got(ops)
        self.store()
        scores, want = self.want(stored)  # one rounding of a key apart is another key
        new = stored[self.n_kv - self.n : self.n_kv]
        truth = self.numpy.read(self.n_kv - self.n, self.n_kv)
        worst = np.abs(new - truth).max() / np.abs(truth).max()
        assert worst < 2e-2 if self.cache_type in ("q8_0", "bf16") else worst < 1e-3, worst
        if self.cache_type == "f32":
            assert worst < 1e-6, worst
        else:
            assert np.mean(new != truth) < 0.02, "most stored values are NumPy's to the bit"
        assert np.isnan(stored[self.n_kv :]).all() or self.cache_type == "q8_0", "spare rows"
        assert (chosen[self.n :] == -1).all(), "a padded token chose rows"
        flips, margin = 0, 0.0
        for t, token in enumerate(self.compared.tolist()):
            row, pos = chosen[token], int(self.step.pos[token])
            if pos < self.top_k:
                full = np.where(np.arange(self.top_k) <= pos, np.arange(self.top_k), -1)
                assert np.array_equal(row, full), (t, row[:9])
                continue
            assert np.all(np.diff(row) > 0) and row[0] >= 0 and row[-1] <= pos, (t, row[:9])
            ours, theirs = np.setdiff1d(row, want[t]), np.setdiff1d(want[t], row)
            if len(ours):
                gap = float(scores[t, theirs].max() - scores[t, ours].min())
                bound = self.bound[t, theirs].max() + self.bound[t, ours].max()
                flips, margin = flips + len(ours), max(margin, gap / bound)
                assert gap <= bound, (t, ours[:5], theirs[:5], gap, bound)
        of = len(self.compared) * self.top_k
        return f"{flips} flips of {of}, margin / bound {margin:.2g}, key {worst:.1e}"
