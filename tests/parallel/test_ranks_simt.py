"""CUDA ranks without a GPU: whole golden models, kernels on the CPU, launches on the recorder.

The plain kernels (capability 7.5) are few enough to compile here; `-m slow` adds those of tiles.
"""

import signal
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kit.compare import nmse
from kit.golden_files import EXACT, FILES, golden
from kit.recorder import recorded, recorder, step
from kit.simt import why_not
from kit.simt_gpu import simulated

import mlacli
from mlacli.backends import cuda_weights
from mlacli.backends.cuda_place import Place
from mlacli.backends.cuda_steps import Stage
from mlacli.backends.cuda_together import SharedGpu
from mlacli.errors import MlacliError, RankError, UnsupportedFeature
from mlacli.loading.presets import PRESETS
from mlacli.params import SamplingParams
from mlacli.sampling import Sampler

needs_simt = pytest.mark.skipif(bool(why_not()), reason=why_not())
# Sums in other orders, in float32: see test_cuda_models.DECODE and ACTIVATIONS.
DECODE, MANY = 1e-8, 2e-5
SPLITS: dict[str, dict[str, Any]] = {  # the first four always, the rest under -m slow
    "2 ranks": {"device": "cuda0,cuda0", "split_mode": "graph"},
    "-ts 3,0,1": {"device": "cuda0,cuda0,cuda0", "split_mode": "graph", "tensor_split": "3,0,1"},
    "2 stages": {"device": "cuda0,cuda1", "split_mode": "layer"},
    "3 ranks on 2 GPUs": {"device": "cuda0,cuda1,cuda0", "split_mode": "graph"},
    "3 ranks": {"device": "cuda0,cuda0,cuda0", "split_mode": "graph"},
    "experts by id": {"device": "cuda0,cuda0", "split_mode": "graph", "expert_split": "id"},
    "experts by layer": {"device": "cuda0,cuda0", "split_mode": "graph", "expert_split": "layer"},
    "2 stages on one": {"device": "cuda0,cuda0", "split_mode": "layer"},
}


def of_split(name: str, n: int, **flags: Any) -> tuple[np.ndarray, np.ndarray]:
    """(logits of `n` tokens in one step, of the same one by one)."""
    tokens = golden(name)[0][:n]
    with mlacli.load(FILES[name], **EXACT, **flags) as engine:
        many = engine.logits(tokens)
        engine.rewind(0)
        return many, np.stack([engine.decode(token) for token in tokens])


@needs_simt
@pytest.mark.parametrize(
    "split",
    [pytest.param(x, marks=pytest.mark.slow if i > 3 else ()) for i, x in enumerate(SPLITS)],
)
def test_every_split_gives_the_logits(monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    simulated(monkeypatch, capability=75)
    want = golden("v3")[1][:2]
    for got in of_split("v3", 2, **SPLITS[split]):
        print(f"{split}: {nmse(got, want):.1e}")
        assert nmse(got, want) <= DECODE


@needs_simt
@pytest.mark.slow
@pytest.mark.parametrize("name, n_ranks, mode", [
    ("v3", 2, "graph"), ("v2lite", 5, "graph"), ("glm47flash", 7, "graph"),
    ("mistral4", 3, "graph"), ("glm_dsa", 2, "graph"), ("glm_dsa", 2, "layer"),
])  # fmt: skip
def test_kernels_of_tiles(
    monkeypatch: pytest.MonkeyPatch, name: str, n_ranks: int, mode: str
) -> None:
    """7 ranks share 5 heads; an indexer's choice is handed to the stage that reuses it."""
    simulated(monkeypatch)
    want = golden(name)[1]
    n = 34 if name == "glm_dsa" else 10
    many, singly = of_split(name, n, device=",".join(["cuda0"] * n_ranks), split_mode=mode)
    print(f"{name}: {nmse(many, want[:n]):.1e} {nmse(singly, want[:n]):.1e}")
    assert np.median([nmse(a, b) for a, b in zip(many, want, strict=False)]) <= MANY
    assert nmse(singly, want[:n]) <= DECODE


@needs_simt
@pytest.mark.slow
@pytest.mark.parametrize("split", ["width", "id", "layer"])
@pytest.mark.parametrize("name", ["v3", "v2lite"])
def test_products_that_send_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, name: str, split: str
) -> None:
    simulated(monkeypatch)
    flags = {"device": "cuda0,cuda1", "split_mode": "graph", "expert_split": split}
    tokens, found = golden(name)[0][:3], []
    for send in (True, False):
        with mlacli.load(FILES[name], **EXACT, **flags) as engine:
            engine.decode(1)
            engine.rewind(0)
            way: Any = engine._ranks._together.collectives
            before, way.products_send = way.n_sent, send
            for stage in engine._ranks._steps.stages:
                stage.graphs.clear()
            found.append(np.stack([engine.decode(token) for token in tokens]))
            assert (way.n_sent > before) == send
    assert np.array_equal(*found)


@needs_simt
@pytest.mark.parametrize("device, mode", [
    ("cuda0,cuda0", "graph"), ("cuda0,cuda1,cuda0", "graph"), ("cuda0,cuda1", "layer"),
])  # fmt: skip
def test_drawing_ahead_is_drawing_step_by_step(
    monkeypatch: pytest.MonkeyPatch, device: str, mode: str
) -> None:
    """Each GPU draws from logits of its own."""
    simulated(monkeypatch, capability=75)
    seen = []
    draw = Place.sample
    monkeypatch.setattr(Place, "sample", lambda place, x: (seen.append((place, x)), draw(place, x)))
    sampler = Sampler(SamplingParams(seed=7, temp=0.8, top_k=40))
    with mlacli.load(FILES["v3"], device=device, split_mode=mode, **EXACT) as engine:
        ahead = engine.decode_ahead(3, 4, sampler)
        engine.rewind(0)
        singly = [3]
        for _ in ahead:
            singly.append(sampler.next(engine.decode(singly[-1]), engine.n_kv))
    assert len(ahead) == 4 and singly[1:] == ahead
    for place, logits in seen:
        arena = place.device
        assert 0 <= logits.ptr - arena._base < arena.nbytes


@needs_simt
def test_replays_run_in_the_caller_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated(monkeypatch, capability=75)
    with mlacli.load(FILES["v3"], device="cuda0,cuda0", split_mode="graph", **EXACT) as engine:
        first = engine.decode(1)
        engine.rewind(0)

        def refuse(fn: Any) -> Any:
            raise AssertionError("a rank thread was asked to work")

        monkeypatch.setattr(engine._ranks.group, "run", refuse)
        assert np.array_equal(engine.decode(1), first)


@needs_simt
@pytest.mark.parametrize("mode, device", [("graph", "cuda0,cuda1,cuda0"), ("layer", "cuda0,cuda1")])
def test_tensors_come_back_as_they_are_in_the_file(
    monkeypatch: pytest.MonkeyPatch, mode: str, device: str
) -> None:
    simulated(monkeypatch, capability=75)
    flags = {"device": device, "split_mode": mode}
    with mlacli.load(FILES["v3_kv_b"], **EXACT, **flags) as engine:
        shards = engine.prepared.plan.shards
        assert engine.check_tensors().n_tensors == len({shard.tensor for shard in shards})
        held = engine._weights[1].layers[1].ffn_gate_inp.raw
        spoiled = engine._ops(1).device.get(held)
        spoiled.reshape(-1)[3] ^= 1
        engine._ops(1).device.copy_in(held, spoiled)
        with pytest.raises(MlacliError, match="ffn_gate_inp"):
            engine.check_tensors()


@needs_simt
@pytest.mark.parametrize("spoiled", ["", "stream", "experts"])
def test_debugging_compares_the_ranks_after_every_sum(
    monkeypatch: pytest.MonkeyPatch, spoiled: str
) -> None:
    from mlacli.backends.cuda_ops import CudaOps

    simulated(monkeypatch, capability=75)
    monkeypatch.setenv("MLACLI_DEBUG", "1")
    attend, route = CudaOps.latent_attention, CudaOps.route

    def attending(ops: Any, *args: Any) -> Any:
        if spoiled == "stream" and ops.peers.rank == 1:
            last = ops.stream[0, -1:]
            ops.device.copy_in(last, np.nextafter(ops.device.get(last), np.float32(9)))
        return attend(ops, *args)

    def routing(ops: Any, *args: Any) -> Any:
        chosen = route(ops, *args)
        if spoiled == "experts" and ops.peers.rank == 1:
            ops.device.copy_in(chosen.ids, ops.device.get(chosen.ids)[:, ::-1])
        return chosen

    monkeypatch.setattr(CudaOps, "latent_attention", attending)
    monkeypatch.setattr(CudaOps, "route", routing)
    flags = {"device": "cuda0,cuda0", "split_mode": "graph", "expert_split": "id"}
    with mlacli.load(FILES["v3"], **EXACT, **flags) as engine:
        if not spoiled:
            assert nmse(engine.decode(golden("v3")[0][0]), golden("v3")[1][0]) <= DECODE
            assert not engine.decode_ahead(3, 4, Sampler(SamplingParams(temp=0)))
            return
        with pytest.raises(RankError, match=r"rank 1 failed.*not those of the first rank"):
            engine.decode(3)


def cut(name: str, routed: int) -> Any:
    dense = min(1, PRESETS[name].dense)
    return replace(PRESETS[name], dense=dense, layers=dense + routed)


@pytest.mark.parametrize("name", ["v2lite", "v3", "glm47flash", "mistral4"])
def test_launches_a_layer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Two sums a layer more than one rank alone, on the GPU's first rank; none on the others."""
    found = []
    for routed in (1, 2):
        flags = {"device": "cuda0,cuda0", "split_mode": "graph", "ctx_size": 4096}
        with recorded(monkeypatch, cut(name, routed), **flags) as engine:
            found.append([Counter(x.name for x in step(engine, 1, rank)) for rank in (0, 1)])
    first, second = (few_many[1] - few_many[0] for few_many in zip(*found, strict=True))
    alone = 12 if PRESETS[name].q else 11
    print(f"{name}: {first.total()} and {second.total()} launches a layer")
    assert first["add_partials"] == 2 and second["add_partials"] == 0
    assert first.total() == second.total() + 2 <= alone + 2


def test_blocks_that_ranks_share_are_read_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all experts they are gigabytes, and the host needs them to give tensors back only."""
    asked = []
    monkeypatch.setattr(cuda_weights, "edge_blocks", lambda raw, qtype: asked.append(raw.shape))
    flags = {"device": "cuda0,cuda0,cuda0", "split_mode": "graph", "ctx_size": 4096}
    few = replace(cut("mistral4", 1), experts=8)
    with recorded(monkeypatch, few, **flags) as engine:
        down = engine._weights[1].layers[0].ffn_down_exps
        assert down.edges is not None and not asked
        down.edges()
        assert len(asked) == 1 and asked[0][:2] == (8, 4096)


@pytest.mark.parametrize("reduce_type, n, rounded", [
    ("f16", 32, 0), ("f16", 33, 1), ("bf16", 33, 2), ("q8_0", 33, 3), ("f32", 512, 0),
])  # fmt: skip
def test_partials_of_many_tokens_are_rounded(
    monkeypatch: pytest.MonkeyPatch, reduce_type: str, n: int, rounded: int
) -> None:
    """How is tested in tests/kernels/test_shared_gpu.py."""
    flags = {"device": "cuda0,cuda0", "split_mode": "graph", "ctx_size": 4096}
    with recorded(monkeypatch, cut("v2lite", 1), graph_reduce_type=reduce_type, **flags) as engine:
        sums = [x for x in step(engine, n) if x.name == "add_partials"]
    assert [dict(x.defines) for x in sums] == [{"TYPE": rounded}] * 4


@pytest.mark.parametrize("name", ["v2lite", "v3", "glm47flash", "mistral4"])
@pytest.mark.parametrize("n", [1, 33, 512])
def test_scratch_stays_within_the_plan(monkeypatch: pytest.MonkeyPatch, name: str, n: int) -> None:
    flags = {"device": "cuda0,cuda0,cuda0", "split_mode": "graph", "ctx_size": 4096}
    with recorded(monkeypatch, cut(name, 1), **flags) as engine:
        engine.prefill([1] * n)
        for rank in engine.prepared.plan.ranks:
            device = recorder(engine, rank.rank)
            used = device.peak - device.loaded
            print(f"{name} n {n}: {used / 2**20:.1f} of {rank.scratch / 2**20:.1f} MiB")
            assert used <= rank.scratch


def test_a_cpu_beside_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated(monkeypatch)
    with pytest.raises(UnsupportedFeature, match="computes no layers beside a GPU"):
        mlacli.load(FILES["v3"], device="cpu,cuda0", split_mode="layer")


def test_after_a_step_that_was_broken_off_gpus_count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("reset", "stop"):
        monkeypatch.setattr(SharedGpu, name, lambda self, name=name: calls.append(name) or True)
    flags = {"device": "cuda0,cuda0", "split_mode": "graph"}
    with recorded(monkeypatch, cut("v2lite", 1), **flags) as engine:
        engine.decode(1)
        with monkeypatch.context() as broken:
            broken.setattr(Stage, "launch", lambda *args: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                engine.decode(1)
        assert (engine.n_kv, calls) == (1, [])
        for _ in range(2):
            engine.decode(1)
        assert (engine.n_kv, calls) == (3, ["reset"])
    assert calls == ["reset", "stop"]


@pytest.mark.parametrize(
    "device, mode", [("cuda0", "none"), ("cuda0,cuda0", "graph"), ("cuda0,cuda1", "layer")]
)
def test_after_a_warm_up_no_token_waits_for_a_capture(
    monkeypatch: pytest.MonkeyPatch, device: str, mode: str
) -> None:
    """Also where decode goes from its kernel for few rows to the one for many, at 513."""
    with recorded(
        monkeypatch, cut("v2lite", 1), device=device, split_mode=mode, ctx_size=1024
    ) as engine:
        engine.warm_up()
        ready = engine.n_captured
        engine.n_kv = 501
        for _ in range(4):
            engine.decode_ahead(0, 9, Sampler(SamplingParams(temp=0)))
        assert engine.n_kv > 520
        assert engine.n_captured == ready
