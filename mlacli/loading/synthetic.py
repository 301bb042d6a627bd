"""A model without a file: a preset's header, and seeded random weights in place of its tensors.

Values are spread as in a fresh network, so that activations stay finite and experts are chosen
evenly. The same seed gives the same bytes, tensor by tensor, in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from mlacli.loading import quant_types
from mlacli.loading.drawn import Drawn, source
from mlacli.loading.gguf_file import GgufFile, TensorInfo
from mlacli.loading.presets import Preset, type_name, value_spread

Bytes = NDArray[np.uint8]


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
        override_kv: Mapping[str, Any] | None = None, on_gpus: bool = False,
    ) -> None:  # fmt: skip
        """`on_gpus`: all weights go through GPUs, which draw their own."""
        super().__init__(Path(f"synthetic {preset.name} {quant}"))
        general = {"general.architecture": preset.arch, "general.name": "random weights"}
        self.metadata.override(general | preset.metadata() | dict(override_kv or {}))
        self.tensors = tensor_infos(preset, quant)
        self._seed, self._on_gpus = seed, on_gpus

    @property
    def size(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def data(self, info: TensorInfo) -> memoryview:
        """The tensor's bytes, drawn now."""
        out, at = np.empty(info.nbytes, np.uint8), 0
        for piece in self.pieces(info):
            out[at : at + len(piece)] = piece
            at += len(piece)
        return out.data

    def rows(self, info: TensorInfo) -> Any:
        drawn = self._drawn(info) if self._on_gpus else None
        return super().rows(info) if drawn is None else drawn

    def pieces(self, info: TensorInfo) -> Iterator[Bytes]:
        """The same bytes, some megabytes at a time."""
        drawn = self._drawn(info)
        if drawn is None:
            value = 1 if info.name.endswith("norm.weight") else 0
            yield np.full(info.shape, value, np.float32).reshape(-1).view(np.uint8)
        else:
            yield from drawn.pieces()

    def _drawn(self, info: TensorInfo) -> Drawn | None:
        """None: a norm's weight or bias, which is one or zero."""
        if info.name.endswith(("norm.weight", "k_norm.bias")):
            return None
        spread = value_spread(info.name, info.shape)
        drawn = source(info.name, info.qtype, spread, self._seed)
        return Drawn.whole(drawn, (*info.shape[:-1], info.row_bytes))
