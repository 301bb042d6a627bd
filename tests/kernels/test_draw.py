"""Random weights drawn by the kernel are NumPy's, bit for bit: on the CPU by kit/simt.h."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from kit.simt import why_not
from kit.simt_device import SimtDevice

from mlacli.backends import cuda_weights
from mlacli.loading import drawn, quant_types

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_K", "IQ1_M", "IQ3_S", "MXFP4"])
def test_bytes(name: str) -> None:
    device = SimtDevice()
    qtype = quant_types.from_id(GGMLQuantizationType[name].value, name)
    shape = 3, 5, qtype.row_bytes(512)
    whole = drawn.Drawn.whole(drawn.source("w", qtype, 0.05, 2), shape)
    for raw in (whole, whole[1:, 2:4, qtype.row_bytes(256) :]):
        target = device.take(raw.shape, np.uint8)
        cuda_weights._send(device, target, raw)
        assert np.array_equal(device.get(target), np.asarray(raw))
