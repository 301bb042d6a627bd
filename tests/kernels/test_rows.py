"""Cache rows out of a device's memory and back, in every type, as the NumPy backend keeps them."""

import numpy as np
import pytest
from kit.simt_device import SimtDevice

from mlacli.backends import cuda_attention, cuda_rows, cuda_sparse
from mlacli.backends.numpy_cache import LatentRows


@pytest.mark.parametrize("cache_type", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("new", [cuda_attention.new_rows, cuda_sparse.new_index_rows])
def test_rows_come_back_as_numpy_rounds_them(new, cache_type: str) -> None:
    values = np.random.default_rng(3).normal(size=(7, 72)).astype(np.float32)
    device, theirs = SimtDevice(), LatentRows(9, 72, cache_type)
    rows = new(device.take, 9, 72, cache_type)
    cuda_rows.write(device, rows, values)
    theirs.write(np.arange(7), values)
    got = cuda_rows.read(device, rows, 7)
    assert np.array_equal(got, theirs.read(0, 7))
    cuda_rows.write(device, rows, got)
    assert np.array_equal(cuda_rows.read(device, rows, 7), got)
