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


def chunk_rows(sizes: Sizes, n_ctx: int) -> int:
    """Cache rows that are expanded at a time: a power of two, unless it holds all n_ctx.

    So a step over n_kv and one over more rows that have as many chunks for all heads have as many
    for some of them, and all ranks' steps can be told apart alike.
    """
    a_row = 128 * sizes.h * (slabs(sizes.k) + slabs(sizes.v))
    fitting = max(LEAST_CHUNK, min(CHUNK, CHUNK_BYTES // a_row))
    return min(1 << (fitting.bit_length() - 1), -(-n_ctx // 128) * 128)


def chunks(sizes: Sizes, n_ctx: int, n_kv: int) -> int:
    """Chunks of a step over n_kv rows. Part of the key of captured steps."""
    return -(-n_kv // chunk_rows(sizes, n_ctx))


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
