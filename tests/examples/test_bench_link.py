"""bench_link.py without a GPU: the bytes that it counts, on the recorder."""

from dataclasses import replace

import pytest
from kit.example_scripts import example
from kit.recorder import recorded

from mlacli.loading.presets import PRESETS


def test_bytes_of_the_experts_that_a_step_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = example("bench_link")
    with recorded(monkeypatch, replace(PRESETS["v2lite"], layers=3), cpu_moe=True) as engine:
        on_host = sum(s.bytes_on("cuda") for s in engine.prepared.plan.shards if s.host)
        load, decode, prefill = bench.lines(engine, 55e9, [96])
    assert f"{on_host / 1e9:.2f} GB in host memory" in load
    assert f"t/s, {on_host * 6 / 64 / 1e6:.0f} MB at " in decode and decode.endswith("of the link")
    assert prefill.startswith("prefill 96: ") and f"{on_host / 1e6:.0f} MB" in prefill
