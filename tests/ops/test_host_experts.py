"""Weights in host memory: the kernels on the CPU, copies as late as they may come; no GPU."""

from collections import Counter
from dataclasses import replace
from functools import partialmethod
from typing import Any

import numpy as np
import pytest
from kit.compare import nmse
from kit.golden_files import EXACT, FILES, golden
from kit.recorder import Recorder, recorded, recorder, step
from kit.simt import why_not
from kit.simt_host import device_of, simulated

from mlacli.errors import BackendError
from mlacli.loading import synthetic
from mlacli.loading.presets import PRESETS, type_name
from mlacli.loading.synthetic import SyntheticFile
from mlacli.parallel import host_stream, plan
from mlacli.parallel.shards import keep_raw
from mlacli.params import SamplingParams
from mlacli.sampling import Sampler

on_cpu = pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs here")
CMOE: dict[str, Any] = {"cpu_moe": True}
SMALL = replace(
    PRESETS["tiny"], layers=2, d=256, heads=2, q=0, F=256, f=256, experts=24, used=2, vocab=256
)
V2LITE = replace(PRESETS["v2lite"], layers=3)
Run = tuple[np.ndarray, np.ndarray, Any]


def run(**flags: Any) -> Run:
    """(decode of two tokens, prefill of nine, the first device) of a golden model."""
    tokens, _ = golden("v2lite")
    with (
        pytest.MonkeyPatch.context() as patch,
        simulated(patch, FILES["v2lite"], **EXACT, **flags) as engine,
    ):
        decoded = np.stack([engine.decode(token) for token in tokens[:2]])
        return decoded, engine.logits(tokens[:9]), device_of(engine)


@pytest.fixture(scope="module")
def on_device() -> Run:
    return run()


@on_cpu
@pytest.mark.parametrize(
    "flags",
    [CMOE, {"override_tensor": ("ffn_up_exps=CPU",)}, CMOE | {"device": "cuda0,cuda1"},
     CMOE | {"device": "cuda0,cuda0", "split_mode": "graph"}],
    ids=["all", "some", "two GPUs", "graph becomes layer"],
)  # fmt: skip
def test_results_are_those_of_experts_on_the_device(
    monkeypatch: pytest.MonkeyPatch, on_device: Run, flags: dict[str, Any]
) -> None:
    """Bit for bit, for chunks of two experts."""
    monkeypatch.setattr(host_stream, "SLOT_BYTES", 24 << 10)
    got = run(**flags)
    if "device" not in flags:  # the first of two GPUs has the layer without experts
        assert got[2].host_bytes and got[2].link.nbytes
    assert np.array_equal(got[0], on_device[0]) and np.array_equal(got[1], on_device[1])


@on_cpu
def test_what_could_not_be_locked_is_copied(on_device: Run) -> None:
    """Few tokens sum in another order: the shared expert comes after the routed ones."""
    got = run(mapped=False, **CMOE)
    assert nmse(got[0], on_device[0]) <= 1e-9 and np.array_equal(got[1], on_device[1])


class OfGpus(SyntheticFile):
    """Small, with its routed experts in a type without tiles; bytes drawn on the GPU or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, on_gpus: bool) -> None:
        def rare(quant: str, tensor: str, shape: tuple[int, ...], layers: int) -> str:
            named = "down_exps" in tensor or "gate_exps" in tensor or "up_exps" in tensor
            return "IQ3_XXS" if named else type_name(quant, tensor, shape, layers)

        monkeypatch.setattr(synthetic, "type_name", rare)
        super().__init__(SMALL, on_gpus=on_gpus)


@on_cpu
def test_experts_without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit in host memory, read there by few and some tokens, streamed for many."""
    monkeypatch.setattr(host_stream, "SLOT_BYTES", 512 << 10)
    monkeypatch.setattr(plan, "keep_raw", lambda shards, small: keep_raw(shards, True))
    found = []
    for on_gpus, mapped, flags in (
        (True, True, {}), (True, True, CMOE), (False, True, CMOE), (True, False, CMOE),
    ):  # fmt: skip
        with (
            pytest.MonkeyPatch.context() as patch,
            simulated(patch, OfGpus(patch, on_gpus), mapped, **EXACT, ctx_size=64,
                      check_tensors=True, **flags) as engine,
        ):  # fmt: skip
            device = device_of(engine)
            assert bool(device.host_bytes) == bool(flags)
            decoded = engine.decode(3)
            assert bool(device.link.nbytes) != mapped
            engine.rewind(0)
            some = engine.logits(list(range(9)))
            assert bool(device.link.nbytes) != mapped
            engine.rewind(0)
            many = engine.logits(list(range(24)))
            assert bool(device.link.nbytes) == bool(flags)
            found.append((decoded, some, many))
    assert np.isfinite(found[0][2]).all() and np.std(found[0][2]) > 0
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert np.array_equal(got, want)


# --- on the recorder: full width, no content ---------------------------------------------------


def test_decode_reads_the_experts_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured, no copies, each weight in one launch."""
    with recorded(monkeypatch, V2LITE, ctx_size=4096, **CMOE) as engine:
        device, launches = recorder(engine), step(engine, 1)
        read = Counter(shard.tensor for launch in launches for shard in launch.shards)
        on_host = {shard.tensor for shard in engine.prepared.plan.shards if shard.host}
        assert on_host and all(read[tensor] == 1 for tensor in on_host)
        assert device.copied == 0
        assert device.host_bytes == engine.prepared.plan.ranks[0].host


@pytest.mark.parametrize(("n", "copied"), [(9, False), (512, True)])
def test_many_tokens_copy_each_expert_once(
    monkeypatch: pytest.MonkeyPatch, n: int, copied: bool
) -> None:
    """Nine tokens of six choices each among 64 leave so many out that they read over the link."""
    with recorded(monkeypatch, V2LITE, ctx_size=4096, **CMOE) as engine:
        device, on_host = recorder(engine), engine.prepared.plan.ranks[0].host
        step(engine, n)
        device.copied = 0
        launches = step(engine, n)
        by_name = Counter(launch.name for launch in launches)
        assert by_name["moe_combine"] == 2
        if not copied:
            assert device.copied == 0 and by_name["gemm_experts_up"] == 2
        else:
            assert by_name["gemm_experts_up"] > 4, "several chunks a layer"
            assert 0.999 * on_host < device.copied / 2 < 1.001 * on_host  # step() takes two


def test_layers_off_the_gpu_come_once_for_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense weights as well, but for norms, routers and their kind, which are read in place."""
    with recorded(monkeypatch, V2LITE, ctx_size=4096, gpu_layers=0) as engine:
        device, on_host = recorder(engine), engine.prepared.plan.ranks[0].host
        engine.prefill([1] * 512)
        device.copied = 0
        engine.prefill([1] * 512)
        assert 0.995 * on_host < device.copied <= 1.001 * on_host
        device.copied = 0
        engine.prefill([1] * 128)
        dense = sum(s.bytes_on("cuda") for s in engine.prepared.plan.shards
                    if s.host and "_exps" not in s.tensor)  # fmt: skip
        assert device.copied <= 1.001 * (on_host - dense)


def test_what_can_not_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts do without, which is said; other weights don't."""
    monkeypatch.setattr(Recorder, "__init__", partialmethod(Recorder.__init__, mapped=False))
    with recorded(monkeypatch, V2LITE, ctx_size=4096, **CMOE) as engine:
        assert engine.load_problems == ["nothing is page-locked"]
    with pytest.raises(BackendError, match=r"output.weight can't stay in host memory"):
        recorded(monkeypatch, V2LITE, ctx_size=4096, override_tensor=("output.weight=CPU",))


def test_no_choice_is_drawn_ahead_where_steps_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched waits for the device, so several steps can't be one graph."""
    for mapped in (True, False):
        init = partialmethod(Recorder.__init__, mapped=mapped)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Recorder, "__init__", init)
            with recorded(patch, V2LITE, ctx_size=4096, **CMOE) as engine:
                assert engine._ranks.can_sample(SamplingParams(), ()) == mapped


@pytest.mark.parametrize("devices", ["cuda0", "cuda0,cuda1"])
def test_tokens_are_drawn_ahead(monkeypatch: pytest.MonkeyPatch, devices: str) -> None:
    """Decode with experts in host memory is captured, several steps at a time too."""
    with recorded(monkeypatch, V2LITE, ctx_size=4096, device=devices, **CMOE) as engine:
        engine.prefill([1] * 40)
        drawn = engine.decode_ahead(1, 4, Sampler(SamplingParams(seed=1)))
        assert len(drawn) >= 1
