"""Block sizes against the gguf package's tables."""

import subprocess
import sys

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mlacli.errors import UnsupportedFeature
from mlacli.loading import quant_types


@pytest.mark.parametrize("kind", list(GGML_QUANT_SIZES), ids=lambda t: t.name)
def test_every_type_of_the_package(kind):
    """Name, block and bytes are the package's; a row of whole blocks counts as ggml counts it."""
    found = quant_types.from_id(kind.value, "x")
    block, nbytes = GGML_QUANT_SIZES[kind]
    assert (found.name, found.id, found.block, found.nbytes) == (
        kind.name, kind.value, block, nbytes,
    )  # fmt: skip
    assert found.row_bytes(3 * block) == 3 * nbytes
    assert found.row_bytes(3 * block - block // 2) == 3 * nbytes
    assert found.quantised == (block > 1)


@pytest.mark.parametrize("own", [quant_types.F32, quant_types.F16, quant_types.BF16,
                                 quant_types.Q8_0], ids=lambda t: t.name)  # fmt: skip
def test_named_constants_equal_the_table(own):
    assert own == quant_types.from_id(own.id, "x")


def test_ik_types_are_named_and_not_mainlines():
    """No id of ik_llama.cpp's list is one that the package knows; each is refused by its name."""
    mainline = {t.value for t in GGMLQuantizationType}
    for type_id, name in quant_types._IK_TYPES.items():
        assert type_id not in mainline
        with pytest.raises(UnsupportedFeature, match=f"tensor blk.0.x has type {name} of ik_llama"):
            quant_types.from_id(type_id, "blk.0.x")


def test_unknown_id_is_refused():
    with pytest.raises(UnsupportedFeature, match="type id 4711") as caught:
        quant_types.from_id(4711, "x")
    assert "Q4_K_M" in caught.value.hint


def test_numpy_is_imported_on_the_first_lookup_only():
    """--help imports this module; it must cost nothing."""
    code = (
        "import sys, mlacli.loading.quant_types as q; assert 'numpy' not in sys.modules; "
        "q.from_id(0, 'x'); assert 'numpy' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
