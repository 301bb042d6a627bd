"""How routed experts in host memory come to a GPU when many tokens need them; plain arithmetic.

A layer's experts travel in chunks of neighbours, through a ring of equal slots on the device. The
ops fill the ring by these numbers, cuda_scratch.py counts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlacli.loading.tiles import tiled_shape

if TYPE_CHECKING:
    from mlacli.loading.quant_types import QType

SLOTS = 3  # one in use, one that has come, one on its way
SLOT_BYTES = 128 << 20  # 2.5 ms of a PCIe 5.0 link: longer than a layer's attention takes
_ALIGN = 256  # of a weight in a slot
READ_ONCE = 128  # tokens of a work item of products: more read a weight several times
EXPERTS = ("gate_exps", "up_exps", "gate_up_exps", "down_exps")  # ends of their names
# Fewer tokens read just their experts where they lie; from this share of all experts on, a copy of
# all of them, which the copy engine makes ahead of the products, is faster.
_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight of routed experts [experts, rows, columns], in tiles or as GGUF stores it."""

    shape: tuple[int, ...]
    qtype: QType
    tiled: bool
    skip: int = 0

    def nbytes(self, n: int) -> int:
        """What `n` of its experts take."""
        if self.tiled:
            return tiled_shape((n, *self.shape[1:]), self.qtype, self.skip).nbytes
        return n * self.shape[1] * self.qtype.row_bytes(self.skip + self.shape[2])


def is_routed(tensor: str) -> bool:
    """Whether a tensor holds routed experts."""
    return tensor.removesuffix(".weight").endswith(EXPERTS)


def slot_offsets(layer: Sequence[Stored], n: int) -> list[int]:
    """Where each weight of a chunk of `n` experts begins in its slot; and the slot's end."""
    at = [0]
    for weight in layer:
        at.append(at[-1] + -(-weight.nbytes(n) // _ALIGN) * _ALIGN)
    return at


def chunk_experts(layer: Sequence[Stored]) -> int:
    """How many experts travel together: what a slot holds, in equal parts, at least one."""
    n_experts = layer[0].shape[0]
    most = min(n_experts, max(1, SLOT_BYTES // slot_offsets(layer, 1)[-1]))
    return -(-n_experts // -(-n_experts // most))


def ring_slot_bytes(layers: Iterable[Sequence[Stored]]) -> int:
    """Bytes of a slot that serves all the layers; 0 without any."""
    return max((slot_offsets(layer, chunk_experts(layer))[-1] for layer in layers), default=0)


def streams(n: int, n_used: int, n_experts: int) -> bool:
    """Whether `n` tokens are likely to choose so many experts that all of them are copied."""
    return 1 - (1 - n_used / n_experts) ** n >= _SHARE
