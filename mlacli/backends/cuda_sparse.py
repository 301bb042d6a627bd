"""The lightning indexer of sparse attention (DSA) on a CUDA device: launches of kernels/dsa*.cu.

A layer calls `index` once its products are there: it stores the tokens' keys and, where the step is
sparse (step.n_kv > top_k, known on the host: two graphs), prepares their queries, which `select`
turns into chosen rows [n, top_k] (int32, ascending, -1 where a token may see fewer). Two or three
launches in decode: prepare, scores, select. Knows no weights' layout and no attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlacli.backends.cuda_array import Array

if TYPE_CHECKING:
    from mlacli.ops import Step

_KEYS: dict[str, tuple[int, Any]] = {
    "f32": (0, np.float32), "f16": (1, np.float16), "bf16": (2, np.uint16), "q8_0": (3, np.int8),
}  # fmt: skip
_LAYOUTS = {"dsa_scores_wgmma": 1, "dsa_scores_wgmma_few": 1, "dsa_scores_wgmma_one": 2}
_PARTS = {"f16": 2, "bf16": 3}  # 16-bit pieces of a query; other key types take float32 products
_BLOCK = 32  # columns of a q8_0 scale
_FEW = 3  # tokens whose queries fit shared memory together, twice an SM
_TOKENS_AT_ONCE = 16  # kernels/dsa_scores.cu
_PLAIN_ROWS = 64  # kernels/dsa_scores.cu
_SCORES = 64 << 20  # bytes of scores held at once; fewer tokens go together where rows are many
_MOST_WIDTH, _MOST_PLAIN_WIDTH = 128, 1024  # of tensor kernels: registers; of all: shared memory


@dataclass(frozen=True, slots=True)
class IndexRows:
    """One layer's index keys [n_ctx, width]; q8_0 keeps int8 and float16 scales apart."""

    values: Array
    scales: Array | None
    cache_type: str
    width: int

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass(frozen=True, slots=True)
class Queries:
    """A step's index queries as the score kernels take them, with the weights of their heads."""

    parts: Array
    weights: Array  # [n, I]
    n_parts: int  # 0: float32 [n, I, i]
    kernel: str  # that takes them


def new_index_rows(
    take: Callable[[tuple[int, ...], Any], Array], n_ctx: int, width: int, cache_type: str
) -> IndexRows:
    """Rows from `take(shape, dtype)`, for example Arena.take."""
    assert width <= _MOST_PLAIN_WIDTH, "an index key fits a CTA's shared memory"
    if cache_type != "q8_0":
        return IndexRows(take((n_ctx, width), _KEYS[cache_type][1]), None, cache_type, width)
    blocks = -(-width // _BLOCK)
    keys, scales = take((n_ctx, blocks * _BLOCK), np.int8), take((n_ctx, blocks), np.float16)
    return IndexRows(keys, scales, cache_type, width)


def index(
    ops: Any, rows: IndexRows, key: Array, norm: Array, bias: Array, eps: float, step: Step,
    q: Array | None = None, weights: Array | None = None,
) -> Queries | None:  # fmt: skip
    """Stores layer_norm(key), rotated, at step.pos; with q also this step's queries. One launch.

    key [n, i], q [n, I * i] and weights [n, I] are products as they come, float32, rows may be
    strided; norm and bias [i] float32.
    """
    half, width = step.cos.shape[-1], rows.width
    heads = 0 if weights is None else weights.shape[1]
    n_parts = _n_parts(ops, rows, heads)
    kernel = _score_kernel(ops, rows, heads, step.n)
    prepared = None
    if q is not None and weights is not None:
        parts = ops.new((step.n, (n_parts or 2) * heads * width), "u2")
        prepared = Queries(parts, ops.new((step.n, heads), "f4"), n_parts, kernel)
    ops.run(
        "dsa_prepare", (step.n, 1 + -(-heads // 8)), 256, rows.values, rows.scales,
        None if prepared is None else prepared.parts,
        None if prepared is None else prepared.weights, key, norm, bias, q, weights, step.pos,
        step.cos, step.sin, width, half, heads, key.stride(0), 0 if q is None else q.stride(0),
        0 if weights is None else weights.stride(0), eps, float(np.float32(np.sqrt(heads * width))),
        KEYS=_KEYS[rows.cache_type][0], PARTS=n_parts, LAYOUT=_LAYOUTS.get(kernel, 0),
    )  # fmt: skip
    return prepared


def select(
    ops: Any, queries: Queries | None, rows: IndexRows, step: Step, top_k: int,
    imposed: Any = None, into: Array | None = None,
) -> Array:  # fmt: skip
    """The top_k best rows of each token, ascending [n, top_k], ties to the lower row, -1 = none.

    `imposed` host rows [tokens, top_k] are taken instead (a test hook; not in a captured step).
    """
    n = step.n if imposed is None else max(len(imposed), 0 if into is None else len(into))
    chosen: Array = ops.new((n, top_k), "i4") if into is None else into
    if imposed is not None:
        rows_of = np.full((n, top_k), -1, np.int32)  # of padded tokens as well
        rows_of[: len(imposed)] = np.sort(imposed, axis=1)
        ops.device.copy_in(chosen, rows_of)
        return chosen
    assert queries is not None, "index() had no queries"
    ld = score_stride(len(rows.values))
    at_once = tokens_at_once(step.n, len(rows.values))
    mark = ops.device.mark()
    scores = ops.new((at_once, ld), "f4")
    for start in range(0, step.n, at_once):
        stop = min(step.n, start + at_once)
        pos, n = step.pos[start:stop], stop - start
        _scores(ops, scores, queries, rows, pos, start, n)
        cluster = clusters(ops, n)
        ops.run(
            "dsa_select", (cluster, n), 1024, chosen[start:stop], scores, pos, top_k, ld,
            CLUSTER=cluster,
        )  # fmt: skip
    ops.device.rewind(mark)  # kernels run in order: what comes next may overwrite the scores
    return chosen


def clusters(ops: Any, n: int) -> int:
    """CTAs that share one token's row: as many as leave no SM idle, one CTA an SM."""
    if ops.capability < 90:
        return 1
    return next((c for c in (8, 4, 2) if n * c <= ops.n_sm), 1)


def score_stride(n_ctx: int) -> int:
    """Values between the scores of neighbouring tokens: read four at a time."""
    return -(-n_ctx // 4) * 4


def tokens_at_once(n: int, n_ctx: int) -> int:
    """Tokens whose scores are held together: what _SCORES bounds, whole groups if it can be."""
    most = max(1, _SCORES // (4 * score_stride(n_ctx)))
    if n <= most:
        return n
    return most // _TOKENS_AT_ONCE * _TOKENS_AT_ONCE or most


def scratch_bytes(n: int, n_ctx: int, heads: int, width: int, top_k: int) -> int:
    """What `index` and `select` take of the arena for n tokens, for the plan; 256 a buffer more."""
    queries = n * heads * (3 * 2 * width + 4)
    return queries + 4 * (n * top_k + tokens_at_once(n, n_ctx) * score_stride(n_ctx)) + 4 * 256


def _n_parts(ops: Any, rows: IndexRows, heads: int) -> int:
    """16-bit pieces of a query for tensor cores; 0 where sizes or the device leave them out."""
    n_parts = _PARTS.get(rows.cache_type, 0) if ops.capability >= 80 else 0
    fits = heads % 8 == 0 and rows.width % 32 == 0 and rows.width <= _MOST_WIDTH
    fits = fits and 3 * _token_bytes(n_parts, heads, rows.width) <= _most_shared(ops)
    return n_parts if fits else 0


def _most_shared(ops: Any) -> int:
    """Bytes of shared memory that a CTA may have."""
    return {75: 64, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(ops.capability, 99) << 10


def _score_kernel(ops: Any, rows: IndexRows, heads: int, n: int) -> str:
    """Which kernel of dsa_scores.cu or dsa_scores_wgmma.cu scores the rows for n tokens."""
    if not _n_parts(ops, rows, heads):
        return "dsa_scores_plain"
    if ops.capability == 90 and rows.cache_type == "f16" and rows.width in (64, 128):
        if n == 1 and heads in (32, 64):
            return "dsa_scores_wgmma_one"
        if n <= _FEW and heads in (32, 64, 128):
            return "dsa_scores_wgmma_few"
        if n > _FEW and heads in (8, 16, 32, 64, 128):
            return "dsa_scores_wgmma"
    return "dsa_scores_few" if n <= _FEW else "dsa_scores_many"


def _token_bytes(n_parts: int, heads: int, width: int) -> int:
    """Shared memory of one token's queries and weights."""
    return 2 * n_parts * heads * width + 4 * heads


def _scores(
    ops: Any, scores: Array, queries: Queries, rows: IndexRows, pos: Array, start: int, n: int
) -> None:
    heads, width, ld = queries.weights.shape[1], rows.width, scores.shape[1]
    parts, weights = queries.parts[start : start + n], queries.weights[start : start + n]
    key_type = _KEYS[rows.cache_type][0]
    args = scores, parts, weights, rows.values
    if queries.kernel == "dsa_scores_plain":
        columns, heads4 = -(-width // 4) * 4, -(-heads // 4) * 4
        shared = 4 * (heads4 * (columns + 1) + _PLAIN_ROWS * (columns + 1))
        assert shared <= _most_shared(ops), "index queries of one token fit shared memory"
        ops.run(
            queries.kernel, (max(1, 2 * ops.n_sm // n), n), 256, *args, rows.scales, pos, width,
            heads, ld, shared=shared, KEYS=key_type, PARTS=0,
        )  # fmt: skip
        return
    token, sizes = _token_bytes(queries.n_parts, heads, width), {"HEADS": heads, "WIDTH": width}
    match queries.kernel:
        case "dsa_scores_wgmma_one":
            shared = 6 * 256 * width + 8192
            ops.run(queries.kernel, (ops.n_sm,), 256, *args, pos, shared=shared, **sizes)
        case "dsa_scores_wgmma_few":
            ops.run(queries.kernel, (ops.n_sm,), 512, *args, pos, n, ld, shared=n * token, **sizes)
        case "dsa_scores_wgmma":
            shared = 2 * (512 * width + 512)
            ops.run(queries.kernel, (ops.n_sm,), 384, *args, pos, n, ld, shared=shared, **sizes)
        case kernel:
            few = kernel == "dsa_scores_few"
            ops.run(
                kernel, (2 * ops.n_sm if few else ops.n_sm,), 256, *args, pos, n, ld,
                shared=(n if few else 3) * token, KEYS=key_type, PARTS=queries.n_parts, **sizes,
            )  # fmt: skip
