"""Our own unpacking against the gguf package's, bit for bit. Weakest link: gguf's."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from mlacli.loading import unpack as module
from mlacli.loading.quant_types import from_id
from mlacli.loading.unpack import UNPACKERS, unpack


@pytest.mark.parametrize("name", UNPACKERS)
def test_every_bit_pattern_unpacks_as_in_gguf(name: str, monkeypatch) -> None:
    kind = gguf.GGMLQuantizationType[name]
    qtype = from_id(kind.value, "x")
    monkeypatch.setattr(module, "_CHUNK", 3 * qtype.block)  # several chunks, the last one short
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, (7, 11, 5 * qtype.nbytes), np.uint8)  # infinite scales among them
    with np.errstate(all="ignore"):
        want, got = dequantize(raw, kind), unpack(raw, qtype)
    assert got.dtype == np.float32 and got.shape == (7, 11, 5 * qtype.block)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[got == 0]), np.signbit(want[got == 0]))


def test_slices_of_columns_unpack_alone() -> None:
    qtype = from_id(gguf.GGMLQuantizationType.Q4_K.value, "x")
    raw = np.random.default_rng(6).integers(0, 64, (9, 4 * qtype.nbytes), np.uint8)
    part = raw[2:7, qtype.nbytes : 3 * qtype.nbytes]
    np.testing.assert_array_equal(unpack(part, qtype), unpack(raw, qtype)[2:7, 256:768])
