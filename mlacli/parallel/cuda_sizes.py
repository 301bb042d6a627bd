"""Sizes of buffers that CUDA ops and the plan must agree on; plain arithmetic.

Tokens of a step, the chunks of expanded attention, the splits of absorbed attention, the scores of
an indexer. The ops take their buffers by these, cuda_scratch.py adds them up for the plan.
"""

from __future__ import annotations

from dataclasses import dataclass

# ---- steps ----------------------------------------------------------------------------------

FEW = 8  # tokens that decode's products take in one pass


def bucket(n: int, most: int) -> int:
    """The number of tokens that a step of `n` is padded to, so that few graphs serve all."""
    if n <= FEW:
        return n
    size = 16
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return min(size, most)


# ---- expanded attention ---------------------------------------------------------------------

SLAB = 128 * 128  # bytes of 128 rows of 64 float16
BLOCK = 128  # tokens of an item
SPLIT_ITEMS = 5  # most parts of items for each SM
_CHUNK = 8192  # most cache rows that are expanded at a time
_CHUNK_BYTES = 160 << 20  # what their keys and values may take, but for _LEAST_CHUNK rows
_LEAST_CHUNK = 1024
_MOST_SHARED = 227 << 10  # bytes of shared memory of a CTA
_STAGES = 2  # tiles of keys and values in shared memory


@dataclass(frozen=True, slots=True)
class Sizes:
    """h local heads, kv rank r, nope k, rope p, value v."""

    h: int
    r: int
    k: int
    p: int
    v: int

    @property
    def tile(self) -> int:
        """Cache rows that a step of attention takes: what registers and shared memory hold."""
        return 128 if self.v <= 128 and slabs(self.k) + slabs(self.p) <= 3 else 64

    @property
    def shared(self) -> int:
        """Bytes of shared memory of an attention CTA."""
        key = slabs(self.k) + slabs(self.p)
        rows = _STAGES * self.tile * (key + slabs(self.v))
        return key * SLAB + rows * 128 + 128

    @property
    def expand_shared(self) -> int:
        """The same of an expansion CTA."""
        return (slabs(self.r) + 6) * SLAB + 256


def can_expand(capability: int, sizes: Sizes) -> bool:
    """Whether a device of this compute capability runs expanded attention of these sizes."""
    return (
        capability == 90
        and all(size > 0 and size % 8 == 0 for size in (sizes.r, sizes.k, sizes.p, sizes.v))
        and sizes.v <= 256
        and max(sizes.shared, sizes.expand_shared) <= _MOST_SHARED
    )


def chunk_rows(sizes: Sizes, n_ctx: int) -> int:
    """Cache rows that are expanded at a time: a power of two, unless it holds all n_ctx.

    So a step over n_kv and one over more rows that have as many chunks for all heads have as many
    for some of them, and all ranks' steps can be told apart alike.
    """
    a_row = 128 * sizes.h * (slabs(sizes.k) + slabs(sizes.v))
    fitting = max(_LEAST_CHUNK, min(_CHUNK, _CHUNK_BYTES // a_row))
    return min(1 << (fitting.bit_length() - 1), -(-n_ctx // 128) * 128)


def chunks(sizes: Sizes, n_ctx: int, n_kv: int) -> int:
    """Chunks of a step over n_kv rows. Part of the key of captured steps."""
    return -(-n_kv // chunk_rows(sizes, n_ctx))


def expanded_bytes(sizes: Sizes, n: int, n_ctx: int, n_sm: int) -> int:
    """Bytes that expanded attention takes from the arena at most, its result included."""
    blocks, chunk = -(-n // BLOCK), chunk_rows(sizes, n_ctx)
    key, value = slabs(sizes.k) + slabs(sizes.p), slabs(sizes.v)
    columns = sizes.h * (slabs(sizes.k) + value)
    up = -(-columns // 2) * slabs(sizes.r) * SLAB
    items = n_items(sizes, n)
    parts = max(items, min(8 * items, SPLIT_ITEMS * n_sm))
    return (
        blocks * sizes.h * key * SLAB + up + chunk * (columns + slabs(sizes.p)) * 128
        + parts * kept_bytes(sizes) + 2 * n * sizes.h * sizes.v + 8 * 256
    )  # fmt: skip


def slabs(width: int) -> int:
    return -(-width // 64)


def n_items(sizes: Sizes, n: int) -> int:
    """Blocks of tokens of all heads."""
    return sizes.h * -(-n // BLOCK)


def kept_bytes(sizes: Sizes) -> int:
    """Bytes of an item's unnormalised result, maxima and sums."""
    return 1024 * (32 * slabs(sizes.v) + 4)


# ---- absorbed attention ---------------------------------------------------------------------

PLAIN_SPLITS = 32
SPLIT_ROWS = 32  # cache rows at a time: kernels/include/mla_splits.cuh
_SHARED = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 120: 99 << 10}
_SHARED_90 = 227 << 10


def on_tensor_cores(capability: int, r: int, width: int, cache_type: str) -> bool:
    """Whether a device takes float16 queries over rows of `width` on tensor cores."""
    rows_fit = r % 16 == 0 and width % 8 == 0
    shared = decode_shared(r, width, 1, cache_type, 2, 0)
    return capability >= 80 and rows_fit and shared <= shared_limit(capability)


def shared_limit(capability: int) -> int:
    """Bytes of shared memory that a CTA may have."""
    return _SHARED.get(capability, _SHARED_90)


def decode_shared(
    r: int, width: int, m_tiles: int, cache_type: str, stages: int, slots: int
) -> int:
    """Shared bytes of mla_decode_mma, in the order of its carve()."""
    line = 2 * (-(-width // 16) * 16 + 8)
    packed = {"bf16": 2 * width, "f32": 4 * width, "q8_0": -(-width // 32) * 32}
    raw = packed.get(cache_type, line)
    m = 16 * m_tiles
    size = stages * SPLIT_ROWS * raw + (SPLIT_ROWS * line if cache_type != "f16" else 0)
    size += 4 * m * (SPLIT_ROWS + 8) * 4 + m * (SPLIT_ROWS + 8) * 2 + m * 4 + 8 * (stages + 1)
    size += 2 * SPLIT_ROWS * -(-width // 32) * 4 if cache_type == "q8_0" else 0
    return max(size + 4 * slots, 4 * m * (r + 8))


# ---- an indexer's scores --------------------------------------------------------------------

_SCORES = 64 << 20  # bytes of scores held at once; fewer tokens go together where rows are many
_TOKENS_AT_ONCE = 16  # kernels/dsa.cu


def score_stride(n_ctx: int) -> int:
    """Values between the scores of neighbouring tokens: read four at a time."""
    return -(-n_ctx // 4) * 4


def tokens_at_once(n: int, n_ctx: int) -> int:
    """Tokens whose scores are held together: what _SCORES bounds, whole groups if it can be."""
    most = max(1, _SCORES // (4 * score_stride(n_ctx)))
    if n <= most:
        return n
    return most // _TOKENS_AT_ONCE * _TOKENS_AT_ONCE or most


def most_score_bytes(n: int, n_ctx: int) -> int:
    """Bytes of n tokens' scores at most; unlike tokens_at_once, never fewer with more rows."""
    token = 4 * score_stride(n_ctx)
    return min(n * token, max(_SCORES, token))
