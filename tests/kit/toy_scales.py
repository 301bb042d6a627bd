"""Toy files whose random blocks have values as small as those of a trained weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from kit.toy_gguf import SCALES_AT

# Types with a minimum: how many scales of it centre random values of q.
_CENTRE: Mapping[str, float] = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}


def tamed(path: Path) -> Path:
    """The file, its random blocks (toy_gguf.random_blocks) now of mean 0, spread 1 / sqrt(columns).

    As they are, values of Q4_K to Q6_K have spreads of 0.3 to 1.8 and some a mean: attention then
    hangs on the last bits of its scores, and experts' results exceed the 1.05e6 at which prefill's
    float16 of a sixteenth saturates.
    """
    reader = gguf.GGUFReader(path, "r+")
    for tensor in reader.tensors:
        places = SCALES_AT.get(tensor.tensor_type.name, ())
        if not places:
            continue
        size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
        blocks: Any = tensor.data.reshape(-1, size)
        scales = _scales(blocks, places[0])
        factors = (1.0, _CENTRE[tensor.tensor_type.name]) if len(places) == 2 else (1.0,)
        for at, factor in zip(places, factors, strict=True):
            _put(blocks, at, scales * factor)
        spread = float(np.std(dequantize(np.array(blocks[:256]), tensor.tensor_type)))
        columns = float(tensor.shape[0])
        for at, factor in zip(places, factors, strict=True):
            _put(blocks, at, scales * (factor * columns**-0.5 / spread))
    reader.data.flush()
    return path


def _scales(blocks: Any, at: int) -> Any:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _put(blocks: Any, at: int, scales: Any) -> None:
    blocks[:, at : at + 2] = np.ascontiguousarray(scales.astype(np.float16)).view(np.uint8)
