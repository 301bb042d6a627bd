"""How one tensor is cut for one rank: Shard, the data, and Cutter, the rule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mlacli.loading.quant_types import QType
from mlacli.loading.tiles import GROWN, is_tiled, tiled_shape
from mlacli.models.tensor_table import Split
from mlacli.parallel.cuts import COLUMN_EDGE, Range, cut

if TYPE_CHECKING:
    from mlacli.devices import Device
    from mlacli.parallel.tensor_uses import TensorUse


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's slice of one tensor: `ranges` along `axis` (None = whole), in elements.

    A column range that cuts a quant block carries the block whole; `nbytes`, as GGUF stores it,
    counts it whole.
    `sources` are the tensors in the file that it is cut from; more than one, or one of another
    name, means it is derived at load.
    """

    tensor: str
    rank: int
    layer: int | None
    axis: int | None
    ranges: tuple[Range, ...]
    shape: tuple[int, ...]  # local
    qtype: QType
    nbytes: int
    sources: tuple[str, ...]
    raw: bool = False  # GGUF bytes on a GPU, whatever the type: see keep_raw()
    host: bool = False  # of a GPU's rank, in host memory, as it would lie on the GPU

    @property
    def tiled(self) -> bool:
        """Whether a GPU keeps it in tiles."""
        return not self.raw and is_tiled(self.tensor, self.shape, self.qtype)

    @property
    def is_copy(self) -> bool:
        """Built at load rather than a view of the file: k_b out of kv_b, merged gate and up."""
        transposed = self.tensor.endswith("attn_k_b.weight") and self.sources[0] != self.tensor
        return transposed or len(self.sources) > 1 or len(self.ranges) > 1

    @property
    def start(self) -> int:
        """First index along `axis`."""
        return self.ranges[0][0] if self.ranges else 0

    @property
    def skip(self) -> int:
        """Columns of a row's first block that are another rank's."""
        return self.start % self.qtype.block if self.axis == len(self.shape) - 1 else 0

    def bytes_on(self, kind: str) -> int:
        """What it takes on a device of `kind`: GGUF's bytes on a CPU, tiles on a GPU."""
        if kind == "cpu" or not self.tiled:
            return self.nbytes
        return tiled_shape(self.shape, self.qtype, self.skip).nbytes


def grows(shard: Shard) -> bool:
    """Whether it takes far more memory in tiles than as GGUF stores it."""
    return shard.tiled and shard.qtype.name in GROWN


def keep_raw(shards: Sequence[Shard], small: bool = False) -> tuple[Shard, ...]:
    """The same shards; what tiles don't serve stays GGUF bytes.

    That is types whose tiles are larger in host memory, as a link carries them, and with `small`
    anywhere; and a layer's routed experts where not all can be in tiles: kernels take gate, up
    and down together, in tiles or as GGUF stores them.
    """
    shards = [replace(s, raw=True) if (small or s.host) and grows(s) else s for s in shards]
    apart = {(s.rank, s.layer) for s in shards if s.tensor.endswith("_exps.weight") and not s.tiled}
    return tuple(
        replace(s, raw=True)
        if s.tensor.endswith("_exps.weight") and (s.rank, s.layer) in apart
        else s
        for s in shards
    )


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank computes, before bytes are counted."""

    rank: int
    device: Device
    share: float
    layers: Range
    first: bool  # of its pipeline
    last: bool
    n_ranks: int  # that share each tensor with it
    index: int  # among those


class Cutter:
    """Cuts tensors for the ranks of one plan; the same cuts in all layers."""

    def __init__(self, hp: Any, mode: str, expert_split: str, shares: Sequence[float]) -> None:
        self.hp, self.expert_split = hp, expert_split
        self.graph = mode == "graph"
        self.shares = list(shares) if self.graph else [1.0]

    def heads(self, part: Part) -> Range:
        unit = math.lcm(COLUMN_EDGE, self.hp.v) // self.hp.v
        return cut(self.hp.H, self.shares, unit)[part.index]

    def vocab(self, part: Part) -> Range:
        return cut(self.hp.n_vocab, self.shares)[part.index] if part.last else (0, 0)

    def experts(self, part: Part) -> Range:
        """Expert ids of this rank under `--expert-split id`; all of them otherwise."""
        shares = self.shares if self.expert_split == "id" else [1.0]
        return cut(self.hp.E, shares)[part.index if self.expert_split == "id" else 0]

    def owns(self, part: Part, layer: int) -> bool:
        return not self.graph or layer % part.n_ranks == part.index

    def experts_text(self, part: Part) -> str:
        """What this rank holds of the routed experts, for people."""
        hp = self.hp
        if hp.E == 0:
            return "-"
        if not self.graph or part.n_ranks == 1:
            return f"{hp.E} whole"
        if self.expert_split == "id":
            start, stop = self.experts(part)
            return f"{start}..{stop - 1} whole" if start < stop else "none"
        if self.expert_split == "layer":
            owned = sum(self.owns(part, i) and not hp.is_dense(i) for i in range(*part.layers))
            return f"{hp.E} in {owned} layers"
        start, stop = cut(hp.f[-1], self.shares, COLUMN_EDGE)[part.index]
        return f"{hp.E} x {stop - start} wide"

    def shards(self, use: TensorUse, part: Part) -> Iterator[Shard]:
        """At most one shard of `use` for `part`."""
        if not self._wanted(use, part):
            return
        axis, ranges = self._ranges(use, part)
        if axis is None:
            shape = use.sizes
        else:
            length = sum(stop - start for start, stop in ranges)
            if length == 0:
                return
            shape = (*use.sizes[:axis], length, *use.sizes[axis + 1 :])
        nbytes = math.prod(shape[:-1]) * _row_bytes(use, axis, ranges)
        yield Shard(
            use.name, part.rank, use.layer, axis, ranges, shape, use.qtype, nbytes, use.sources
        )

    def _wanted(self, use: TensorUse, part: Part) -> bool:
        if use.layer is None:
            return part.first if use.spec.name == "token_embd.weight" else part.last
        if not part.layers[0] <= use.layer < part.layers[1]:
            return False
        if use.spec.attention:
            start, stop = self.heads(part)
            return start < stop
        if use.spec.experts and self.expert_split == "layer":
            return self.owns(part, use.layer)
        return True

    def _ranges(self, use: TensorUse, part: Part) -> tuple[int | None, tuple[Range, ...]]:
        spec, hp = use.spec, self.hp
        if not self.graph or part.n_ranks == 1 or spec.split is Split.MIRROR:
            return None, ()
        if spec.split is Split.VOCAB:
            return 0, (self.vocab(part),)
        if spec.split in (Split.HEAD_OUT, Split.HEAD_IN, Split.HEAD_LEAD):
            axis = len(use.sizes) - 1 if spec.split is Split.HEAD_IN else 0
            unit = use.sizes[axis] // hp.H
            start, stop = self.heads(part)
            return axis, ((start * unit, stop * unit),)
        if spec.experts and self.expert_split == "id":
            return 0, (self.experts(part),)
        if spec.experts and self.expert_split == "layer":
            return None, ()
        width = hp.dims(use.layer)[spec.width]
        start, stop = cut(width, self.shares, COLUMN_EDGE)[part.index]
        axis = len(use.sizes) - (1 if spec.split is Split.FF_IN else 2)
        return axis, tuple((h * width + start, h * width + stop) for h in range(spec.halves))


def _row_bytes(use: TensorUse, axis: int | None, ranges: tuple[Range, ...]) -> int:
    """Bytes of one local row; blocks that a column range touches count whole."""
    if axis is None or axis != len(use.sizes) - 1:
        return use.qtype.row_bytes(use.sizes[-1])
    block = use.qtype.block
    return sum((-(-stop // block) - start // block) * use.qtype.nbytes for start, stop in ranges)
