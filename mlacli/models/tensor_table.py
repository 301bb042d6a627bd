"""TensorSpec and the split vocabulary: which tensors an architecture has and how they are cut.

Pure data types; a model file lists its specs, `parallel/plan.py` turns them into shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import CodeType


class Split(Enum):
    """How a tensor is divided over ranks."""

    MIRROR = "whole on every rank"
    HEAD_OUT = "rows by head"
    HEAD_LEAD = "leading axis by head"
    HEAD_IN = "columns by head"
    FF_OUT = "rows of the FFN width"
    FF_IN = "columns of the FFN width"
    VOCAB = "rows by token id"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a layer (or of the model): GGUF name without `blk.N.`, row-major shape.

    `shape` is symbolic, in the letters of the model's `dims()`. `width` names the letter that
    FF_OUT / FF_IN cut; `experts` marks a leading axis of routed experts; `halves` 2 = gate rows
    above up rows. `attention` tensors are needed only where there are heads. A tensor that is
    absent may be cut per head from `derived_from`. `unread`: the file may have it, nobody needs it.
    """

    name: str
    shape: str
    split: Split = Split.MIRROR
    optional: bool = False
    attention: bool = False
    width: str = ""
    experts: bool = False
    halves: int = 1
    derived_from: str = ""
    unread: bool = False

    def sizes(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers."""
        return tuple(_evaluate(part.strip(), dims) for part in self.shape.split(","))


@cache
def _compiled(expression: str) -> CodeType:
    return compile(expression, "<shape>", "eval")


def _evaluate(expression: str, dims: Mapping[str, int]) -> int:
    # The expressions are constants of the model files, never input.
    return int(eval(_compiled(expression), {"__builtins__": {}}, dims))
