"""bench_ops.py without a GPU: what it records on the recorder, its fit and its table."""

from dataclasses import replace

import pytest
from kit.example_scripts import example
from kit.recorder import Recorder, active_bytes, recorded, recorder

from mlacli.loading.presets import PRESETS


@pytest.fixture(scope="module")
def bench():
    return example("bench_ops")


@pytest.mark.parametrize("n", [1, 64])
def test_a_step_is_recorded_with_its_bytes(bench, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    model = replace(PRESETS["v2lite"], layers=3)
    with recorded(monkeypatch, model, ctx_size=1024) as engine:
        device = recorder(engine)
        arena = Recorder("cuda0", 1 << 40, device)
        launches = bench.recorded_step(engine, n, 512, arena)
        hp = engine.prepared.hparams
        tensors = {t for one in launches for t in one.tensors} - {"cache"}
        assert tensors == {shard.tensor for shard in engine.prepared.plan.shards}
        least = sum(active_bytes(shard, hp, n) for shard in engine.prepared.plan.shards)
        assert least <= sum(one.nbytes for one in launches) < 1.1 * least + 20e6
    found = bench.rows(launches, lambda of: 2.0 + of[0].nbytes / 4e6)
    assert sum(row.count for row in found) == len(launches)
    assert any("ffn_down_exps" in row.what and row.count == 2 for row in found)
    table = bench.markdown(found, 4e6)
    assert table.startswith("| kernel |") and "TB/s" in table


def test_the_fit_finds_what_made_the_times(bench) -> None:
    row = lambda kernel, nbytes: bench.Row(kernel, "", 3, 1.5 + nbytes / 4.2e6, nbytes)  # noqa: E731
    found = [row("a", 1e6), row("a", 8e6), row("a", 30e6), row("b", 5e6)]
    (kernel, (a, rate)), *others = bench.fits(found).items()
    assert kernel == "a" and not others
    assert a == pytest.approx(1.5) and rate == pytest.approx(4.2e6)
