"""The lightning indexer of sparse attention (DSA, arXiv 2512.02556) as a file describes it.

'full' layers choose cache rows, 'shared' ones reuse the last choice before them (arXiv 2603.12201).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlacli.errors import GgufError

if TYPE_CHECKING:
    from mlacli.loading.gguf_file import GgufFile, Metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexer:
    """Sizes, and which layers choose. `on` False: the tensors are there but attention is dense."""

    n_heads: int
    width: int  # of an index key, its rope part first
    top_k: int
    full: tuple[bool, ...]
    eps: float = 1e-6  # of the key's LayerNorm; the models' own code fixes it
    on: bool = True

    @classmethod
    def from_gguf(cls, file: GgufFile, n_layer: int, n_ctx_train: int) -> Indexer | None:
        """None for a file without indexer tensors in its first `n_layer` blocks."""
        present = _layers_with_indexer(file.tensors, n_layer)
        if not any(present):
            return None
        meta, arch = file.metadata, file.arch
        named = _full_layers(meta, f"{arch}.attention.indexer.types", n_layer, n_ctx_train)
        full = tuple(a and b for a, b in zip(named, present, strict=True))
        key = f"{arch}.attention.indexer."
        return cls(
            n_heads=meta.integer(key + "head_count", low=1),
            width=meta.integer(key + "key_length", low=1),
            top_k=meta.integer(key + "top_k", low=1),
            full=full,
            eps=meta.number(f"{arch}.attention.layer_norm_epsilon", 1e-6),
        )

    def check(self) -> None:
        """GgufError when the first layer would reuse a choice that nobody made."""
        if not self.full[0]:
            raise GgufError(
                "layer 0 has no sparse indexer of its own, and no layer before it chooses for it",
                "the file is incomplete: convert the model again, or run it with --no-dsa",
            )


def _layers_with_indexer(tensors: Mapping[str, Any], n_layer: int) -> list[bool]:
    found = {name.split(".")[1] for name in tensors if ".indexer." in name}
    return [str(il) in found for il in range(n_layer)]


def _full_layers(meta: Metadata, key: str, n_layer: int, n_ctx_train: int) -> list[bool]:
    """The metadata's word, else llama.cpp's rule: all, or GLM-5.2's pattern at its context."""
    value = meta.get(key)
    if value is None:
        return [n_ctx_train < 1 << 20 or il < 2 or il % 4 == 2 for il in range(n_layer)]
    values = value if isinstance(value, list) else [value] * n_layer
    if len(values) < n_layer or any(x not in (0, 1) for x in values[:n_layer]):
        raise GgufError(
            f"metadata key {key} is not one true (full) or false (shared) for each of {n_layer} "
            "layers",
            "the metadata is damaged: convert the model again",
        )
    return [bool(x) for x in values[:n_layer]]
