"""ARCHS: GGUF architecture name -> the module that defines it.

A module has `Hparams` (with `from_gguf`), `MODEL`, `layer_tensors` and `forward`.
"""

from __future__ import annotations

from types import ModuleType

from mlacli.errors import UnsupportedFeature
from mlacli.models import deepseek2, glm_dsa, mistral4

ARCHS: dict[str, ModuleType] = {
    "deepseek2": deepseek2,
    "glm-dsa": glm_dsa,
    "mistral4": mistral4,
}


def model_of(arch: str) -> ModuleType:
    """The module of `arch`; UnsupportedFeature names the ones that exist."""
    if arch not in ARCHS:
        raise UnsupportedFeature(
            f"architecture {arch!r} is not supported",
            "mlacli runs " + ", ".join(ARCHS) + "; for others use llama.cpp",
        )
    return ARCHS[arch]
