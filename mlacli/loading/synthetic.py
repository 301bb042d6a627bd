"""A model without a file: a preset's header, and seeded random weights in place of its tensors.

Values are spread as in a fresh network, so that activations stay finite and experts are chosen
evenly. The same seed gives the same bytes, tensor by tensor, in any order.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from mlacli.loading import quant_types
from mlacli.loading.gguf_file import GgufFile, TensorInfo
from mlacli.loading.presets import Preset, type_name, value_spread

Bytes = NDArray[np.uint8]
# Where a block's float16 scales lie, and their ratio: a Q4_K value is scale * sub-scale * x - min
# * sub-min with x in 0..15, so a min of 7.5 scales centres it.
_SCALES: Mapping[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 1.0),),
    "Q5_0": ((0, 1.0),),
    "Q8_0": ((0, 1.0),),
    "Q4_K": ((0, 1.0), (2, 7.5)),
    "Q6_K": ((208, 1.0),),
}


class Pool:
    """Random blocks drawn once per type; every tensor takes stretches of them, scaled to fit."""

    _BYTES = 16 << 20

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._kept: dict[str, tuple[Bytes, float]] = {}
        self._fitted: dict[str, tuple[float, Bytes]] = {}  # the latest spread of each type

    def blocks(self, qtype: str, spread: float) -> Bytes:
        """uint8 [n, block bytes] whose values have standard deviation `spread`."""
        if qtype not in self._kept:
            self._kept[qtype] = self._drawn(qtype)
        if self._fitted.get(qtype, (0.0,))[0] != spread:
            self._fitted[qtype] = spread, self._fit(qtype, spread)
        return self._fitted[qtype][1]

    def _fit(self, qtype: str, spread: float) -> Bytes:
        drawn, own = self._kept[qtype]
        if qtype in ("F32", "F16"):
            values = drawn.view(np.float32) * np.float32(spread)
            raw = values.astype(np.float32 if qtype == "F32" else np.float16)
            return raw.reshape(-1, 1).view(np.uint8)
        return _scaled(drawn.copy(), qtype, spread / own)

    def _drawn(self, qtype: str) -> tuple[Bytes, float]:
        rng = np.random.default_rng([self.seed, zlib.crc32(qtype.encode())])
        if qtype in ("F32", "F16"):
            return rng.standard_normal(self._BYTES // 4, np.float32).view(np.uint8), 1.0
        kind = GGMLQuantizationType[qtype]
        size = GGML_QUANT_SIZES[kind][1]
        drawn = rng.integers(0, 256, (self._BYTES // size, size), np.uint8)
        scaled = _scaled(drawn[:4096].copy(), qtype, 2.0**-8)
        return drawn, float(np.std(dequantize(scaled, kind))) * 2**8

    def pieces(self, info: TensorInfo) -> Iterator[Bytes]:
        """The tensor's bytes, a stretch of the pool at a time."""
        if info.name.endswith("norm.weight"):
            yield np.ones(info.shape, np.float32).view(np.uint8)
            return
        if info.name.endswith("k_norm.bias"):
            yield np.zeros(info.nbytes, np.uint8)
            return
        blocks = self.blocks(info.qtype.name, value_spread(info.name, info.shape))
        rng = np.random.default_rng([self.seed, zlib.crc32(info.name.encode())])
        left = info.nbytes // info.qtype.nbytes
        while left:
            part = blocks[int(rng.integers(len(blocks))) :][:left]
            yield part.reshape(-1)
            left -= len(part)


def _scaled(blocks: Bytes, qtype: str, scale: float) -> Bytes:
    for at, ratio in _SCALES[qtype]:
        blocks[:, at : at + 2] = np.frombuffer(np.float16(scale * ratio).tobytes(), np.uint8)
    return blocks


def tensor_infos(preset: Preset, quant: str = "q4_k_m") -> dict[str, TensorInfo]:
    """The directory that a file of the preset would have, its tensors one after another."""
    found, at = {}, 0
    for name, shape in preset.shapes().items():
        kind = GGMLQuantizationType[type_name(quant, name, shape, preset.layers)]
        info = TensorInfo(name, shape, quant_types.from_id(kind.value, name), 0, at)
        assert shape[-1] % info.qtype.block == 0, f"rows of {shape} don't fill {kind.name} blocks"
        found[name] = info
        at += info.nbytes
    return found


class SyntheticFile(GgufFile):
    """What a file of a preset would be; its tensors are drawn when they are asked for."""

    def __init__(
        self, preset: Preset, quant: str = "q4_k_m", seed: int = 1,
        override_kv: Mapping[str, Any] | None = None, copied: bool = False,
    ) -> None:  # fmt: skip
        """With `copied`, who asks for data has copied it before asking for the one after next."""
        super().__init__(Path(f"synthetic {preset.name} {quant}"))
        general = {"general.architecture": preset.arch, "general.name": "random weights"}
        self.metadata.override(general | preset.metadata() | dict(override_kv or {}))
        self.tensors = tensor_infos(preset, quant)
        self._pool = Pool(seed)
        self._largest = max(info.nbytes for info in self.tensors.values()) if copied else 0
        self._buffers = threading.local()  # a pair for each rank's thread, used in turns

    @property
    def size(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def data(self, info: TensorInfo) -> memoryview:
        """The tensor's bytes, drawn now."""
        out, at = self._buffer(info.nbytes), 0
        for piece in self.pieces(info):
            out[at : at + len(piece)] = piece
            at += len(piece)
        return out.data

    def _buffer(self, nbytes: int) -> Bytes:
        """Memory to draw into: fresh pages would take longer than filling them."""
        if not self._largest:
            return np.empty(nbytes, np.uint8)
        if not hasattr(self._buffers, "pair"):
            self._buffers.pair = [np.empty(self._largest, np.uint8) for _ in range(2)]
        self._buffers.pair.reverse()
        buffer: Bytes = self._buffers.pair[0][:nbytes]
        return buffer

    def pieces(self, info: TensorInfo) -> Iterator[Bytes]:
        """The same bytes, some megabytes at a time."""
        return self._pool.pieces(info)
