"""Several CUDA ranks: golden models on one GPU named several times, and on two GPUs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kit.compare import nmse, row_nmse
from kit.golden_files import EXACT, FILES, golden

import mlacli
from mlacli.backends.cuda_devices import device_count
from mlacli.backends.cuda_sources import debugging
from mlacli.engine import Engine
from mlacli.flags import LOADED, library_values, to_params
from mlacli.loading.presets import PRESETS
from mlacli.loading.synthetic import SyntheticFile
from mlacli.params import SamplingParams
from mlacli.prepare import prepare
from mlacli.sampling import Sampler

# As tests/gpu/test_cuda_models.py: float16 activations of prefill, nearly float32 of decode.
ACTIVATIONS, DECODE = 2e-5, 1e-8
two_gpus = pytest.mark.skipif(device_count() < 2, reason="needs two GPUs")
SPLITS: dict[str, dict[str, Any]] = {
    "2 ranks": {"device": "cuda0,cuda0", "split_mode": "graph"},
    "3 ranks": {"device": "cuda0,cuda0,cuda0", "split_mode": "graph"},
    "5 ranks": {"device": ",".join(["cuda0"] * 5), "split_mode": "graph"},
    "8 ranks": {"device": ",".join(["cuda0"] * 8), "split_mode": "graph"},
    "-ts 3,1": {"device": "cuda0,cuda0", "split_mode": "graph", "tensor_split": "3,1"},
    "experts by id": {"device": "cuda0,cuda0", "split_mode": "graph", "expert_split": "id"},
    "experts by layer": {"device": "cuda0,cuda0", "split_mode": "graph", "expert_split": "layer"},
    "2 stages": {"device": "cuda0,cuda0", "split_mode": "layer"},
}
ON_TWO: dict[str, dict[str, Any]] = {
    "graph": {"device": "cuda0,cuda1", "split_mode": "graph"},
    "graph backwards": {"device": "cuda1,cuda0", "split_mode": "graph", "tensor_split": "3,2"},
    "4 ranks": {"device": "cuda0,cuda1,cuda0,cuda1", "split_mode": "graph"},
    "layer": {"device": "cuda0,cuda1", "split_mode": "layer"},
    "layer backwards": {"device": "cuda1,cuda0", "split_mode": "layer", "tensor_split": "1,2"},
    "nccl": {"device": "cuda0,cuda1", "split_mode": "graph", "comm": "nccl"},
    "host": {"device": "cuda0,cuda1", "split_mode": "graph", "comm": "host"},
}
NAMES = ("v2lite", "v3", "glm47flash", "mistral4", "glm_dsa", "real_rows")


def check(name: str, **flags: Any) -> None:
    """Decode and prefill against transformers' logits; the same bits again; sampling ahead."""
    tokens, want = golden(name)
    with mlacli.load(FILES[name], **EXACT, **flags) as engine:
        many = engine.logits(tokens)
        engine.rewind(0)
        singly = np.stack([engine.decode(token) for token in tokens])
        again = engine.logits(tokens)
        engine.rewind(0)
        singly_again = np.stack([engine.decode(token) for token in tokens])
        prefill = np.median(row_nmse(many, want))  # a row may choose another expert
        print(f"{name} {flags}: prefill {prefill:.1e}, decode {nmse(singly, want):.1e}")
        assert prefill <= ACTIVATIONS
        assert nmse(singly, want) <= DECODE
        assert np.array_equal(many, again) and np.array_equal(singly, singly_again)
        engine.rewind(0)
        sampler, drawn = Sampler(SamplingParams(seed=7, temp=0.8, top_k=40)), [tokens[0]]
        for _ in range(8):
            drawn.append(sampler.next(engine.decode(drawn[-1]), engine.n_kv))
        engine.rewind(0)
        ahead = engine.decode_ahead(tokens[0], 8, sampler)
        assert ahead == drawn[1:] or debugging()  # which compares the ranks step by step


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_ranks_on_one_gpu(name: str, split: str) -> None:
    check(name, **SPLITS[split])


@two_gpus
@pytest.mark.parametrize("split", ON_TWO)
@pytest.mark.parametrize("name", NAMES)
def test_ranks_on_two_gpus(name: str, split: str) -> None:
    check(name, **ON_TWO[split])


@two_gpus
@pytest.mark.parametrize("device", ["cuda0,cuda1", "cuda0,cuda1,cuda0"])
def test_every_way_of_sums_gives_the_same_tokens(device: str) -> None:
    """Own kernels add in one order whatever memory they go through; NCCL has one of its own."""
    tokens, _ = golden("v3")
    greedy, texts, logits, sums = Sampler(SamplingParams(temp=0.0)), {}, {}, {}
    for way in ("p2p", "host", "nccl"):
        with mlacli.load(
            FILES["v3"], **EXACT, device=device, split_mode="graph", comm=way
        ) as engine:
            sums[way], logits[way] = engine.sums, engine.logits(tokens)
            engine.rewind(0)
            texts[way] = engine.decode_ahead(tokens[0], 8, greedy)
            beside = engine.memory_beside()
            print(f"{way}: {beside}")
            assert all(abs(of.since) <= 512 << 20 for of in beside.values())
            assert all((of.nccl > 0) == (way == "nccl") for of in beside.values())
    assert sums == {way: f"{way} (asked for)" for way in sums}
    assert np.array_equal(logits["host"], logits["p2p"])
    assert np.median(row_nmse(logits["nccl"], logits["p2p"])) <= ACTIVATIONS
    assert texts["p2p"] == texts["host"] == texts["nccl"]


@two_gpus
@pytest.mark.parametrize("spoiled", ["", "stream", "experts"])
def test_debugging_compares_the_ranks_of_two_gpus(
    monkeypatch: pytest.MonkeyPatch, spoiled: str
) -> None:
    """Whole models agree after every sum; a difference in one bit, or of one order, is found."""
    from mlacli.backends.cuda_ops import CudaOps
    from mlacli.errors import RankError

    monkeypatch.setenv("MLACLI_DEBUG", "1")
    route, reduce_ = CudaOps.route, CudaOps.reduce_add_norm

    def reducing(ops: Any, *args: Any) -> Any:
        found = reduce_(ops, *args)
        if spoiled == "stream" and ops.peers.rank == 1 and not ops.device.noting:
            last = ops.stream[0, -1:]
            ops.device.copy_in(last, np.nextafter(ops.device.get(last), np.float32(9)))
        return found

    def routing(ops: Any, *args: Any) -> Any:
        chosen = route(ops, *args)
        if spoiled == "experts" and ops.peers.rank == 1 and not ops.device.noting:
            ops.device.copy_in(chosen.ids, ops.device.get(chosen.ids)[:, ::-1])
        return chosen

    monkeypatch.setattr(CudaOps, "reduce_add_norm", reducing)
    monkeypatch.setattr(CudaOps, "route", routing)
    tokens, want = golden("v3")
    # By width the second rank has no experts: there is nothing to choose.
    flags = {"device": "cuda0,cuda1", "split_mode": "graph", "expert_split": "id"}
    with mlacli.load(FILES["v3"], **EXACT, **flags) as engine:
        if spoiled:
            what = {"stream": "residual streams", "experts": "chosen experts"}[spoiled]
            with pytest.raises(RankError, match=f"rank 1 failed.*{what} are not those"):
                engine.logits(tokens)
            return
        assert np.median(row_nmse(engine.logits(tokens), want)) <= ACTIVATIONS
        engine.rewind(0)
        assert nmse(engine.decode(tokens[0]), want[0]) <= DECODE


@two_gpus
@pytest.mark.parametrize("split", ["width", "id", "layer"])
@pytest.mark.parametrize("name", ["v3", "v2lite", "glm_dsa"])
def test_products_that_send_their_partials_change_no_bit(name: str, split: str) -> None:
    tokens, found = golden(name)[0], []
    with mlacli.load(FILES[name], **EXACT, **ON_TWO["graph"], expert_split=split) as engine:
        engine.decode(tokens[0])
        steps, way = engine._ranks._steps, engine._ranks._together.collectives.way
        if way.mail(0, 1024) is None:
            pytest.skip("the GPUs don't reach each other's memory")
        for way.products_send in (True, False):
            for stage in steps.stages:
                stage.graphs.clear()
            engine.rewind(0)
            ahead = engine.decode_ahead(tokens[0], 8, Sampler(SamplingParams(temp=0.0)))
            engine.rewind(0)
            found.append((ahead, np.stack([engine.decode(token) for token in tokens])))
    (sent, a), (stored, b) = found
    assert np.array_equal(a, b) and sent == stored


@pytest.mark.parametrize("split", ["2 ranks", "2 stages", "none"])
def test_ubatches_that_begin_before_the_last_one_ends(split: str) -> None:
    """Three in a row, with logits of the last token or of all."""
    tokens, want = golden("v3")
    flags = SPLITS.get(split, {"device": "cuda0"}) | {"ubatch_size": 16}
    with mlacli.load(FILES["v3"], **EXACT, **flags) as engine:
        for _ in range(3):
            engine.rewind(0)
            last, every = engine.prefill(tokens)[0], engine.logits(tokens)
            assert nmse(last, want[-1]) <= ACTIVATIONS
            assert np.median(row_nmse(every, want)) <= ACTIVATIONS


@pytest.mark.parametrize("reduce_type", ["f16", "bf16", "q8_0"])
def test_rounded_partials_are_those_of_numpy_ranks(reduce_type: str) -> None:
    """As near to them as to the logits without rounding: a value may round the other way."""
    tokens, exact = golden("v3")
    runs = []
    for device in ("cpu,cpu", "cuda0,cuda0"):
        flags = {"device": device, "split_mode": "graph", "graph_reduce_type": reduce_type}
        with mlacli.load(FILES["v3"], **EXACT, **flags) as engine:
            runs.append(engine.logits(tokens))
    apart, rounded = (np.median(row_nmse(runs[1], to)) for to in (runs[0], exact))
    print(f"{reduce_type}: {apart:.1e} from NumPy ranks, {rounded:.1e} from float32")
    assert apart <= max(ACTIVATIONS, rounded)


@pytest.mark.parametrize("split", ["2 ranks", "2 stages"])
def test_tensors_come_back_as_they_are_in_the_file(split: str) -> None:
    for name in ("v3", "v3_kv_b", "glm_dsa"):
        with mlacli.load(FILES[name], check_tensors=True, **SPLITS[split]) as engine:
            assert engine.checked is not None


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_random_weights_are_the_same_whatever_the_split(n_ranks: int) -> None:
    """GPUs draw their parts, across blocks that ranks share; NumPy draws the whole."""
    small = replace(PRESETS["mistral4"], layers=1, experts=4, vocab=2048)
    device, mode = ",".join(["cuda0"] * n_ranks), "graph" if n_ranks > 1 else "none"
    flags = {"device": device, "split_mode": mode, "check_tensors": True}
    prepared = prepare(SyntheticFile(small, on_gpus=True), to_params(library_values(LOADED, flags)))
    with Engine(prepared) as engine:
        assert engine.checked is not None


@pytest.mark.parametrize("n_stages", [2, 4])
def test_ubatches_under_way_in_all_stages_give_the_bits_of_one_gpu(n_stages: int) -> None:
    """More ubatches than may be under way; the last one's logits, and those of a token after it."""
    small = replace(PRESETS["v2lite"], layers=4, experts=8, vocab=2048)
    tokens, found = np.random.default_rng(3).integers(0, 2048, 40 * 16 + 3).tolist(), []
    for device, mode in (("cuda0", "none"), (",".join(["cuda0"] * n_stages), "layer")):
        flags = {"device": device, "split_mode": mode, "ubatch_size": 16, "ctx_size": 1024}
        params = to_params(library_values(LOADED, flags))
        with Engine(prepare(SyntheticFile(small, on_gpus=True), params)) as engine:
            found.append(np.stack([engine.prefill(tokens)[0], engine.decode(7)]))
            assert len(engine.prepared.plan.ranks) == (1 if mode == "none" else n_stages)
    assert np.array_equal(*found) and np.ptp(found[0]) > 0


def test_memory_in_use_is_what_the_plan_says() -> None:
    with mlacli.load(None, **SPLITS["3 ranks"]) as engine:
        engine.prefill([1, 2, 3])
        used = engine.memory()["cuda0"]
        planned = sum(rank.total for rank in engine.prepared.plan.ranks)
    assert planned <= used <= planned + (512 << 20)


def test_a_closed_engine_leaves_the_gpu_free() -> None:
    """After the second one: the first two load kernels and fill what the driver keeps for itself.

    Six engines one after another kept 4 MiB after the second, 2 of them given back in between.
    """
    import cupy as cp

    free = []
    for _ in range(4):
        engine = mlacli.load(FILES["v3"], **SPLITS["3 ranks"])
        engine.prefill([1, 2, 3])
        engine.close()  # and still referred to
        free.append(cp.cuda.runtime.memGetInfo()[0])
    print("MiB kept:", *((free[0] - n) / 2**20 for n in free))
    assert free[3] >= free[1] - (8 << 20)  # its arena, or kernels loaded anew, would be more


@pytest.mark.parametrize("split", ["2 ranks", "2 stages"])
def test_a_failing_rank_ends_all_and_leaves_the_gpu_usable(
    split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlacli.backends.cuda_ops import CudaOps
    from mlacli.errors import RankError

    tokens, _ = golden("v3")
    with mlacli.load(FILES["v3"], **SPLITS[split]) as engine:
        want = engine.logits(tokens)
        attend, calls = CudaOps.latent_attention, []

        def failing(self: Any, *args: Any) -> Any:
            calls.append(self)
            if self is engine._ops(1) and len(calls) > 12:  # not in the dry run
                raise ValueError("boom")
            return attend(self, *args)

        monkeypatch.setattr(CudaOps, "latent_attention", failing)
        with pytest.raises((RankError, ValueError), match="boom"):
            for n in range(9, 40):
                engine.rewind(0)
                engine.prefill(tokens[:n])
        monkeypatch.undo()
        assert np.array_equal(engine.logits(tokens), want)
