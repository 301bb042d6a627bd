"""The router of many tokens, and choices imposed on it, run on the CPU (kit/simt.h)."""

from typing import Any

import numpy as np
import pytest
from kit.few_tokens import choose
from kit.launcher import Launcher
from kit.simt import why_not
from kit.simt_device import SimtDevice

from mlacli.backends import cuda_plain, cuda_sparse
from mlacli.models.parts import Routing

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
N, E = 11, 24
ROUTINGS = (
    Routing(3, False),
    Routing(3, False, 4, 2),
    Routing(4, True, 4, 2, True, 2.5),
    Routing(2, True, 1, 1, True),
)


class Bias:
    def __init__(self, raw: Any) -> None:
        self.raw = raw


@pytest.mark.parametrize("imposed", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_choices_and_weights(routing: Routing, imposed: bool) -> None:
    ops, rng = Launcher(SimtDevice()), np.random.default_rng(routing.n_used)
    logits = rng.standard_normal((N, E)).astype(np.float32)
    bias = rng.standard_normal(E).astype(np.float32) * 0.1
    pos = np.arange(N, dtype=np.int32)
    pos[-2:] = -1
    fixed = np.stack([rng.permutation(E)[: routing.n_used] for _ in range(N)]).astype(np.int32)
    got = cuda_plain.route(
        ops,  # type: ignore[arg-type]
        ops.put(logits),
        Bias(ops.put(bias)),  # type: ignore[arg-type]
        routing,
        ops.put(pos),
        ops.put(fixed) if imposed else None,
    )
    ids, weights = choose(logits.astype(float), bias, routing, fixed if imposed else None)
    ids[pos < 0], weights[pos < 0] = -1, 0
    assert np.array_equal(ops.get(got.ids), ids)
    assert np.allclose(ops.get(got.weights), weights, rtol=1e-5, atol=1e-7)


def test_imposed_rows_fill_what_later_layers_read() -> None:
    """In order, and padded tokens get none."""
    ops = Launcher(SimtDevice())
    into = ops.new((3, 4), "i4")
    rows = np.array([[7, 1, 3, 0], [2, 9, 4, 8]])
    chosen = cuda_sparse.select(ops, None, None, None, 4, rows, into)  # type: ignore[arg-type]
    assert chosen is into
    assert ops.get(into).tolist() == [[0, 1, 3, 7], [2, 4, 8, 9], [-1] * 4]
