"""Steps of full-width models on the recorder: launches, bytes, addresses, memory; no GPU, no CuPy.

What is counted here was measured nowhere; kernels/README.md has the measurements.
"""

import time
from collections import Counter
from dataclasses import replace

import pytest
from kit.recorder import active_bytes, predicted_us, recorded, recorder, step

from mlacli.backends.cuda_sources import signatures
from mlacli.loading.presets import PRESETS, Preset

NAMES = ("v2lite", "glm47flash", "v3", "kimi_k2", "mistral4", "glm5")
FLAGS = {"glm5": {"no_dsa": True}}


def cut(name: str, routed: int) -> Preset:
    """One layer of the model's dense kind, if it has any, and `routed` with experts."""
    dense = min(1, PRESETS[name].dense)
    return replace(PRESETS[name], dense=dense, layers=dense + routed)


def decode_launches(monkeypatch: pytest.MonkeyPatch, name: str, routed: int) -> list:
    with recorded(monkeypatch, cut(name, routed), ctx_size=4096, **FLAGS.get(name, {})) as engine:
        return step(engine, 1)


@pytest.mark.parametrize("name", NAMES)
def test_launches_a_layer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    few, many = (decode_launches(monkeypatch, name, routed) for routed in (1, 2))
    a_layer, rest = len(many) - len(few), 2 * len(few) - len(many)
    counts = Counter(x.name for x in many) - Counter(x.name for x in few)
    print(f"{name}: {a_layer} launches a layer, {rest} beside: {dict(counts)}")
    assert a_layer <= (12 if PRESETS[name].q else 11)
    assert rest - (a_layer if cut(name, 1).dense else 0) <= 6


@pytest.mark.parametrize("name", NAMES)
def test_a_decode_step_reads_each_weight_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with recorded(monkeypatch, cut(name, 2), ctx_size=4096, **FLAGS.get(name, {})) as engine:
        launches, hp, plan = step(engine, 1), engine.prepared.hparams, engine.prepared.plan
        read = Counter(shard.tensor for launch in launches for shard in launch.shards)
        wanted = {shard.tensor for shard in plan.shards}
        assert read.keys() == wanted, wanted ^ read.keys()
        big = {shard.tensor for shard in plan.shards if shard.nbytes > 1 << 20}
        assert {tensor: read[tensor] for tensor in big} == dict.fromkeys(big, 1)
        total = sum(active_bytes(shard, hp, 1) for shard in plan.shards)
        for n_kv in (0, 16384):
            us = predicted_us(launches, engine, n_kv)
            print(f"{name} cut: {total / 1e6:.0f} MB a token, {us:.0f} us at n_kv {n_kv}")


@pytest.mark.parametrize("n", [1, 2, 33, 512])
@pytest.mark.parametrize("name", NAMES)
def test_scratch_stays_within_the_plan(monkeypatch: pytest.MonkeyPatch, name: str, n: int) -> None:
    """Every pointer of every launch is checked by the recorder on the way."""
    with recorded(monkeypatch, cut(name, 1), ctx_size=4096, **FLAGS.get(name, {})) as engine:
        device, rank = recorder(engine), engine.prepared.plan.ranks[0]
        loaded, reads = device.loaded, device.n_reads
        device.peak = 0  # compiling ahead tried steps of other sizes
        launches = step(engine, n)
        assert launches and device.n_reads == reads + 2  # the logits, once a step
        used = device.peak - loaded
        print(f"{name} n {n}: {used / 2**20:.1f} of {rank.scratch / 2**20:.1f} MiB of scratch")
        assert used <= rank.scratch


@pytest.mark.parametrize("n", [33, 39])
@pytest.mark.parametrize("name", NAMES)
def test_ubatches_that_want_no_logits(monkeypatch: pytest.MonkeyPatch, name: str, n: int) -> None:
    """Two ubatches of 16 before one of 1 or 7: no launch is empty."""
    preset, flags = cut(name, 1), FLAGS.get(name, {})
    with recorded(monkeypatch, preset, ctx_size=4096, ubatch_size=16, **flags) as engine:
        launches = step(engine, n)
    assert sum(x.name.startswith("embed") for x in launches) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_is_launched_compiles(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In the very variants that a model needs, which a list of variants may miss."""
    pytest.importorskip("cupy", reason="needs CuPy's NVRTC (pip install 'mlacli[cuda13]')")
    from mlacli.backends.cuda_compile import Unit, compiled

    with recorded(monkeypatch, cut(name, 1), ctx_size=4096, **FLAGS.get(name, {})) as engine:
        for n in (1, 2, 33, 512):
            step(engine, n)
        wanted = recorder(engine).units
    units = {Unit.of(signatures()[kernel][0], dict(defines)) for kernel, defines in wanted}
    start = time.perf_counter()
    for unit in units:
        compiled(unit, "sm_90a")
    print(f"{name}: {len(units)} units, {time.perf_counter() - start:.1f} s one after another")


def test_the_recorder_finds_what_was_rewound_and_what_is_too_long() -> None:
    from kit.recorder import Recorder

    device = Recorder("cuda0", 1 << 20)
    kept = device.take((64,), "f4")
    mark = device.mark()
    gone = device.take((64,), "f4")
    device.launch("add_f32", (1,), 64, kept, kept, gone, 64)
    device.rewind(mark)
    again = device.take((64,), "f4")
    with pytest.raises(AssertionError, match="argument 2 of add_f32 was rewound"):
        device.launch("add_f32", (1,), 64, kept, again, gone, 64)
    with pytest.raises(AssertionError, match="too long"):
        device.launch("add_f32", (1,), 64, kept, kept, again.dense(again.ptr, (65,), "f4"), 64)
    with pytest.raises(AssertionError, match="points at no array"):
        device.launch("add_f32", (1,), 64, kept, kept, kept.dense(kept.ptr + 300, (1,), "f4"), 1)
    with pytest.raises(AssertionError, match="reads back"):
        device.capture(lambda: device.get(kept))
