"""The order that plans are expected to decode in; figures are sweep-bench's business."""

import pytest

from mlacli.flags import to_params
from mlacli.loading.presets import preset
from mlacli.loading.synthetic import SyntheticFile
from mlacli.parallel.advice import HOP_US, LAYER_US, Speeds, token_us
from mlacli.prepare import prepare

GPU = 141 << 30


def microseconds(name: str, mode: str, n: int, speeds: Speeds, n_kv: int = 0) -> float:
    values = {"split_mode": mode, "vram": (GPU,) * n, "device": (), "ctx_size": 16384}
    prepared = prepare(SyntheticFile(preset(name)), to_params(values), refuse_oversize=False)
    try:
        return token_us(prepared.plan, prepared.hparams, speeds, n_kv)
    finally:
        prepared.gguf.close()


def test_graph_pays_where_sums_are_fast_and_not_where_they_are_slow() -> None:
    fast, slow = Speeds(), Speeds(sums={2048: 40.0, 7168: 60.0})
    alone = microseconds("v2lite", "none", 1, fast)
    assert microseconds("v2lite", "graph", 2, fast) < alone
    assert microseconds("v2lite", "graph", 2, slow) > alone


def test_layers_on_two_cost_a_hop() -> None:
    alone = microseconds("v2lite:4", "none", 1, Speeds())
    assert microseconds("v2lite:4", "layer", 2, Speeds()) == pytest.approx(alone + HOP_US, rel=1e-3)


def test_time_is_bytes_and_launches() -> None:
    """V2-Lite multiplies a token with 1.75 GB; 16k cache rows of 27 layers are 0.51 GB."""
    us = microseconds("v2lite", "none", 1, Speeds(memory=1e12)) - 27 * LAYER_US
    assert us == pytest.approx(1750, rel=0.1)
    deep = microseconds("v2lite", "none", 1, Speeds(memory=1e12), n_kv=16384) - 27 * LAYER_US
    assert deep - us == pytest.approx(16384 * 27 * 1152 / 1e6, rel=0.02)


@pytest.mark.parametrize(("n", "us"), [(2048, 3.0), (4096, 4.0), (6144, 5.0), (10240, 7.0)])
def test_sums_lie_on_a_line_through_the_measured_ones(n: int, us: float) -> None:
    assert Speeds(sums={2048: 3.0, 6144: 5.0}).sum_us(n) == pytest.approx(us)
