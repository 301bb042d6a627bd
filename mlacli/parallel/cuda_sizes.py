"""Sizes of buffers that CUDA ops and the plan must agree on; plain arithmetic.

Tokens of a step, the kernels of absorbed attention, the scores of an indexer; of expanded attention
see expanded_sizes.py. The ops take their buffers by these, cuda_scratch.py adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlacli.loading.quant_types import QType

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


# ---- sums between GPUs ----------------------------------------------------------------------


MAIL_FLOATS = 192 << 10  # of a rank's packets in an inbox: cuda_peer.ROOM
# What NCCL takes on a GPU for itself: 388 MiB when it starts and 474 at its first sums, measured
# with 2.28.9 on two H200, 2026-11-22 (mlacli's own buffers aside); on more GPUs not measured.
NCCL_BYTES = 880 << 20


@dataclass(frozen=True, slots=True)
class Sums:
    """How a rank's partials meet those of the others, and the memory that this takes.

    `n_ranks` share each tensor, on `n_gpus`, `n_here` of them on this one. `way`: p2p, nccl, host.
    """

    n_ranks: int = 1
    n_gpus: int = 1
    n_here: int = 1
    way: str = "p2p"

    def outside(self, n_ubatch: int, d: int) -> int:
        """A rank's part of what the collectives between GPUs take beside the arenas.

        As in cuda_peer.py and cuda_nccl.py; the ranks of a GPU share evenly.
        """
        if self.n_gpus == 1:
            return 0
        slot = _slot_bytes(n_ubatch, d)
        if self.way == "nccl":  # a slot a rank, what it reads, and what it gathers
            whole = (self.n_here + 1 + self.n_gpus) * slot + NCCL_BYTES
        else:  # tables and slots; flags and two inboxes
            mail = 2 * 16 * 128 * 4 + 2 * self.n_ranks * MAIL_FLOATS * 8
            whole = 1024 + self.n_here * slot + (0 if self.way == "host" else mail)
        return -(-whole // self.n_here // 256) * 256

    def inside(self, n_ubatch: int, d: int) -> int:
        """What ranks take from their arenas for it: a partial each, where one GPU has them all."""
        if self.n_ranks == 1:
            return 0
        tables = 2 * -(-8 * self.n_ranks // 256) * 256  # where all ranks have their parts
        return tables + (_slot_bytes(n_ubatch, d) if self.n_gpus == 1 else 0)


def _slot_bytes(n_ubatch: int, d: int) -> int:
    """A rank's partial of a step."""
    return -(-4 * n_ubatch * d // 256) * 256


# ---- routed experts -------------------------------------------------------------------------


def slot_tile(n_slots: int, held: int) -> int:
    """Slots of one expert that its grouped product takes at a time: kernels/moe_sort.cu.

    A tile's width is a quarter of it, two, three or four; few slots an expert need narrow ones.
    """
    return next((tile for tile, most in ((32, 16), (64, 48)) if n_slots <= most * held), 128)


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
    size += 4 * m * (SPLIT_ROWS + 8) * 4 + m * (SPLIT_ROWS + 8) * 2 + m * 4 + 16 * stages
    size += 2 * SPLIT_ROWS * -(-width // 32) * 4 if cache_type == "q8_0" else 0
    return max(size + 4 * slots, 4 * m * (r + 8))


# ---- an indexer's scores --------------------------------------------------------------------

_SCORES = 64 << 20  # bytes of scores held at once; fewer tokens go together where rows are many
_TOKENS_AT_ONCE = 16  # kernels/dsa_scores.cu


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


# ---- weights that stay GGUF bytes, unpacked for a product of many tokens -----------------------

_UNPACKED = 256 << 20  # bytes that are unpacked at once, unless a single piece is larger
_ROWS_AT_ONCE = 256  # of a dense weight: what the product's CTAs take


def stays_plain(name: str, qtype: QType) -> bool:
    """Whether products of a weight in GGUF bytes stay in float32: routers and plain numbers."""
    return name.endswith(".ffn_gate_inp.weight") or not qtype.quantised


def unpacked_bytes(rows: int, n_in: int, lead: int = 1) -> int:
    """Bytes of float16 tiles of [lead, rows, n_in]: loading/tiles.py."""
    return 256 + lead * (-(-rows // 16) * 16) * (-(-n_in // 64) * 64) * 2


def unpacked_rows(rows: int, n_in: int) -> int:
    """How many rows of a dense weight are unpacked at once."""
    most = _UNPACKED // unpacked_bytes(_ROWS_AT_ONCE, n_in)
    return min(rows, max(1, most) * _ROWS_AT_ONCE)


def unpacked_experts(held: int, up_rows: int, d: int, f: int) -> int:
    """How many experts of `up_rows` gate and up rows are unpacked at once."""
    expert = max(unpacked_bytes(up_rows, d), unpacked_bytes(d, f))
    return min(held, max(1, _UNPACKED // expert))


def unpacked_product_bytes(rows: int, n_in: int) -> int:
    """Scratch of a dense product of many tokens with a weight in GGUF bytes."""
    return unpacked_bytes(unpacked_rows(rows, n_in), n_in)
