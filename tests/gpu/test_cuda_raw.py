"""Products of weights in GGUF bytes on a GPU: types without tiles and some with them."""

from contextlib import suppress

import numpy as np
import pytest
from kit import raw_cases as cases

from mlacli.parallel import cuda_sizes

FEW = 1e-9  # x keeps 16 bits of its mantissa, everything else 24
MANY = 1e-6  # float16 inputs: 4.5e-8 each
TYPES = (*cases.RARE, "Q4_K", "Q5_1", "IQ4_NL", "MXFP4")


@pytest.fixture(scope="module")
def device():
    """With all kernels of every type compiled, at once."""
    from mlacli.backends.cuda_device import CudaDevice

    device = CudaDevice("cuda0", 1 << 30)
    mark, rng = device.mark(), np.random.default_rng(1)
    with device.prepared(), np.errstate(all="ignore"):
        for name in TYPES:
            for n in (1, 3, 9):
                for run in (dense_case, expert_case):
                    with suppress(AssertionError):  # nothing was computed
                        run(cases.RawOps(device), rng, name, n)
                    device.rewind(mark)
    return device


@pytest.fixture
def ops(device):
    mark = device.mark()
    yield cases.RawOps(device)
    device.rewind(mark)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def dense_case(ops, rng, name: str, n: int) -> float:
    skip = 32 if cases.qtype_of(name).block == 256 else 0
    return cases.dense(ops, rng, name, n, 2560 - 32, 1205, skip, add=n == 3)


def expert_case(ops, rng, name: str, n: int) -> float:
    case = cases.Experts((name, name, name), n, 3, 7, 512, 768, first=1, here=5, add=n == 3)
    return cases.experts(ops, rng, case)


@pytest.mark.parametrize("n", [1, 3, 9])
@pytest.mark.parametrize("name", TYPES)
def test_every_type(ops, rng, name, n) -> None:
    bar = FEW if n <= 8 else MANY
    errors = dense_case(ops, rng, name, n), expert_case(ops, rng, name, n)
    print(f"{name}, {n} tokens: {errors[0]:.1e} {errors[1]:.1e}")
    assert max(errors) < bar


@pytest.mark.parametrize("name", ["IQ1_S", "Q3_K"])
def test_heads_and_long_rows(ops, rng, name) -> None:
    assert cases.heads(ops, rng, name, 2, 5, 512, 130) < FEW
    assert cases.dense(ops, rng, name, 8, 7168, 100) < FEW
    assert cases.dense(ops, rng, name, 1, 18432, 64) < FEW


def test_many_tokens_in_parts(ops, rng, monkeypatch) -> None:
    monkeypatch.setattr(cuda_sizes, "_UNPACKED", 2 << 20)
    assert cases.dense(ops, rng, "IQ3_S", 100, 2048, 1500) < MANY
    case = cases.Experts(("IQ2_XXS", "IQ2_XXS", "IQ4_NL"), 64, 4, 16, 512, 352)
    assert cases.experts(ops, rng, case) < MANY


@pytest.mark.parametrize("scale", [1e5, 1e-6])
def test_any_size_of_x(ops, rng, scale) -> None:
    w = cases.held(ops, rng, "IQ2_S", (64, 512))
    x = (rng.standard_normal((1, 512)) * scale).astype(np.float32)
    y = ops.new((1, 64))
    cases.raw.product(ops, cases.Act(x.shape, ops.put(x)), w.weight, y, False)
    assert cases.nmse(ops.get(y), x.astype(np.float64) @ w.values.T) < FEW
