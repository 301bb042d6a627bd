"""Sizes of expanded attention on a GPU: chunks of cache rows, and what they take of memory.

Shared by the kernels' launches and the plan. Knows no backend.
"""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 16384  # most cache rows that are expanded at a time
CHUNK_BYTES = 160 << 20  # what their keys and values may take, but for LEAST_CHUNK rows
LEAST_CHUNK = 1024
BLOCK = 128  # tokens of an item, whose result a CTA computes
MOST_PARTS = 660  # parts of items that split their rows: five for each SM of an H200
_MOST_SHARED = 227 << 10  # bytes of shared memory of a CTA
_STAGES = 2  # tiles of keys and values in shared memory
SLAB = 128 * 128  # bytes of 128 rows of 64 float16


def slabs(width: int) -> int:
    """Slabs of 64 values in a row."""
    return -(-width // 64)


@dataclass(frozen=True, slots=True)
class Sizes:
    """h local heads, kv rank r, nope k, rope p, value v."""

    h: int
    r: int
    k: int
    p: int
    v: int

    def items(self, n: int) -> int:
        """Blocks of tokens of all heads."""
        return self.h * -(-n // BLOCK)

    @property
    def kept(self) -> int:
        """Bytes of an item's unnormalised result, maxima and sums."""
        return 1024 * (32 * slabs(self.v) + 4)


def tile_rows(sizes: Sizes) -> int:
    """Cache rows that a step of attention takes: what registers and shared memory hold."""
    return 128 if sizes.v <= 128 and slabs(sizes.k) + slabs(sizes.p) <= 3 else 64


def attend_shared(sizes: Sizes) -> int:
    """Bytes of shared memory of an attention CTA."""
    key = slabs(sizes.k) + slabs(sizes.p)
    return key * SLAB + _STAGES * tile_rows(sizes) * (key + slabs(sizes.v)) * 128 + 128


def expand_shared(sizes: Sizes) -> int:
    """The same of an expansion CTA."""
    return (slabs(sizes.r) + 6) * SLAB + 256


def takes(capability: int, sizes: Sizes) -> bool:
    """Whether its kernels run on a device of this compute capability with these sizes."""
    return (
        capability == 90
        and all(size > 0 and size % 8 == 0 for size in (sizes.r, sizes.k, sizes.p, sizes.v))
        and sizes.v <= 256
        and max(attend_shared(sizes), expand_shared(sizes)) <= _MOST_SHARED
    )


def chunk_rows(sizes: Sizes, n_ctx: int) -> int:
    """Cache rows that are expanded at a time: a power of two, unless it holds all n_ctx.

    So a step over n_kv and one over more rows that have as many chunks for all heads have as many
    for some of them, and all ranks' steps can be told apart alike.
    """
    a_row = 128 * sizes.h * (slabs(sizes.k) + slabs(sizes.v))
    fitting = max(LEAST_CHUNK, min(CHUNK, CHUNK_BYTES // a_row))
    return min(1 << (fitting.bit_length() - 1), -(-n_ctx // 128) * 128)


def chunks(sizes: Sizes, n_ctx: int, n_kv: int) -> int:
    """Chunks of a step over n_kv rows."""
    return -(-n_kv // chunk_rows(sizes, n_ctx))


def step_kind(sizes: Sizes, n: int, n_ctx: int, n_kv: int) -> tuple[int, bool]:
    """What a captured step of `n` tokens, padded ones too, depends on: chunks; few rows before it.

    Alike for all heads means alike for some of them: see chunk_rows.
    """
    return chunks(sizes, n_ctx, n_kv), n_kv < 2 * n


def planned_rows(sizes: Sizes, n: int, n_ctx: int, n_kv: int) -> int:
    """The n_kv that work is divided for: one of all steps of a kind, so that bits don't depend on
    which of them was captured. The least while few rows lie before the step, else the most."""
    n_chunks, flat = step_kind(sizes, n, n_ctx, n_kv)
    chunk = chunk_rows(sizes, n_ctx)
    return max(n, (n_chunks - 1) * chunk + 1) if flat else min(n_ctx, n_chunks * chunk)


def scratch_bytes(sizes: Sizes, n: int, n_ctx: int) -> int:
    """Bytes that attention of n tokens takes at most, without its query, with its result."""
    blocks, chunk = -(-n // BLOCK), chunk_rows(sizes, n_ctx)
    key, value = slabs(sizes.k) + slabs(sizes.p), slabs(sizes.v)
    columns = sizes.h * (slabs(sizes.k) + value)
    up = -(-columns // 2) * slabs(sizes.r) * SLAB
    items = sizes.items(n)
    parts = max(items, min(8 * items, MOST_PARTS))
    return (
        blocks * sizes.h * key * SLAB + up + chunk * (columns + slabs(sizes.p)) * 128
        + parts * sizes.kept + 2 * n * sizes.h * sizes.v + 8 * 256
    )  # fmt: skip
