"""kernels/shared_gpu.cu on the CPU: sums in rank order, of partials rounded as NumPy ranks do."""

import numpy as np
import pytest
from kit.simt import why_not
from kit.simt_device import SimtDevice

from mlacli.backends.cuda_array import Array
from mlacli.backends.numpy_ops import reduce_typed

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
TYPES = ("f32", "f16", "bf16", "q8_0")


def put(device: SimtDevice, host: np.ndarray) -> Array:
    array = device.take(host.shape, host.dtype)
    device.copy_in(array, host)
    return array


@pytest.mark.parametrize("reduce_type", TYPES)
@pytest.mark.parametrize("held", [0b111, 0b101, 0b010, 0b110])
def test_partials_are_added_in_rank_order(reduce_type: str, held: int) -> None:
    rng = np.random.default_rng(held)
    partials = (rng.normal(size=(3, 33, 96)) * 10.0 ** rng.integers(-3, 4, (3, 33, 96))).astype(
        "f4"
    )
    partials[:, :, :32] = 0  # a block without scale
    residual = rng.normal(size=(33, 96)).astype("f4")
    typed = reduce_typed(reduce_type) or (lambda x: x)
    shown = [typed(partials[rank]) for rank in range(3) if held >> rank & 1]
    total = shown[0]
    for other in shown[1:]:
        total = total + other
    device = SimtDevice()
    streams = [put(device, residual) for _ in range(3)]
    slots = [put(device, partial) for partial in partials]
    tables = [put(device, np.array([x.ptr for x in of], np.int64)) for of in (slots, streams)]
    n = residual.size
    device.launch(
        "add_partials", (-(-n // 256),), 256, *tables, n, 3, held, TYPE=TYPES.index(reduce_type)
    )
    for stream in streams:
        assert np.array_equal(device.get(stream), residual + total)


def test_nobody_has_a_partial() -> None:
    device, residual = SimtDevice(), np.ones((1, 64), "f4")
    stream = put(device, residual)
    table = put(device, np.array([stream.ptr], np.int64))
    device.launch("add_partials", (1,), 256, table, table, 64, 1, 0, TYPE=0)
    assert np.array_equal(device.get(stream), residual)


def test_columns_are_joined() -> None:
    device, rng = SimtDevice(), np.random.default_rng(0)
    parts = [rng.normal(size=(3, width)).astype("f4") for width in (300, 1, 17)]
    out, first = device.take((3, 318), "f4"), 0
    for part in parts:
        width = part.shape[1]
        grid = (-(-width // 256), 3)
        device.launch("join_columns", grid, 256, out, put(device, part), width, 318, first)
        first += width
    assert np.array_equal(device.get(out), np.concatenate(parts, axis=1))
