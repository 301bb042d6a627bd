"""Block size and bytes of each GGUF tensor type, from the gguf package's tables.

gguf (and with it numpy) is imported on the first lookup only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from mlacli.errors import UnsupportedFeature

# Types of ik_llama.cpp that mainline's tables don't hold, by id, to name them in errors.
_IK_TYPES = {
    133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K",
    140: "IQ5_K", 141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 151: "Q8_KV",
    152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL",
    158: "IQ1_KT", 202: "Q4_0_R8", 206: "Q5_0_R4", 208: "Q8_0_R8", 210: "Q2_K_R4",
    211: "Q3_K_R4", 212: "Q4_K_R4", 213: "Q5_K_R4", 214: "Q6_K_R4", 216: "IQ2_XXS_R4",
    217: "IQ2_XS_R4", 218: "IQ3_XXS_R4", 219: "IQ1_S_R4", 220: "IQ4_NL_R4", 221: "IQ3_S_R4",
    222: "IQ2_S_R4", 223: "IQ4_XS_R8", 229: "IQ1_M_R4", 230: "BF16_R16", 233: "Q6_0_R4",
    335: "IQ2_BN_R4", 337: "IQ2_K_R4", 338: "IQ3_K_R4", 339: "IQ4_K_R4", 340: "IQ5_K_R4",
    344: "IQ4_KS_R4", 352: "IQ5_KS_R4", 353: "MXFP4_R8", 397: "Q8_K_R16", 398: "Q8_KV_R8",
    399: "Q8_K_R8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class QType:
    """A GGUF tensor type: `block` elements along a row take `nbytes` bytes."""

    name: str
    id: int
    block: int
    nbytes: int

    @property
    def quantised(self) -> bool:
        return self.block > 1

    def row_bytes(self, n: int) -> int:
        """Bytes of `n` elements; a started block counts whole."""
        return -(-n // self.block) * self.nbytes


F32 = QType("F32", 0, 1, 4)
F16 = QType("F16", 1, 1, 2)
BF16 = QType("BF16", 30, 1, 2)
Q8_0 = QType("Q8_0", 8, 32, 34)


@cache
def _known() -> dict[int, QType]:
    from gguf.constants import GGML_QUANT_SIZES

    return {t.value: QType(t.name, t.value, *sizes) for t, sizes in GGML_QUANT_SIZES.items()}


def from_id(type_id: int, tensor: str) -> QType:
    """The type of `tensor`; an unknown id names the tensor and what to do about it."""
    found = _known().get(type_id)
    if found is not None:
        return found
    name = _IK_TYPES.get(type_id)
    what = f"{name} of ik_llama.cpp" if name else f"id {type_id}"
    raise UnsupportedFeature(
        f"tensor {tensor} has type {what}, which mlacli can't read",
        "use a file quantised with mainline types, such as Q4_K_M, IQ4_XS or Q8_0",
    )
