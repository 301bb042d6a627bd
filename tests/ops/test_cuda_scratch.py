"""A CUDA rank's planned scratch against what its ops take, on the recorder; no GPU.

Steps of many sizes at many depths; never more than planned, and not much less in the largest one.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from kit.recorder import Recorder, recorded, recorder

from mlacli.backends.cuda_sparse import tokens_at_once
from mlacli.devices import Device
from mlacli.engine import Engine
from mlacli.expanded_sizes import Sizes, scratch_bytes
from mlacli.flags import LOADED, library_values, to_params
from mlacli.loading import synthetic
from mlacli.loading.gguf_file import GgufFile
from mlacli.loading.presets import PRESETS, Preset, type_name
from mlacli.loading.synthetic import SyntheticFile
from mlacli.parallel import cuda_scratch, memory, plan
from mlacli.parallel.cuda_scratch import CudaScratch
from mlacli.parallel.cuda_sizes import Sums, most_score_bytes
from mlacli.parallel.memory import LOGIT_BYTES, most_logit_rows
from mlacli.parallel.shards import keep_raw
from mlacli.prepare import prepare

NAMES = ("v2lite", "glm47flash", "v3", "kimi_k2", "mistral4", "glm5")
MODELS = Path(__file__).parents[1] / "golden" / "models"
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "mla 1": {"mla_use": 1},
    "gap f32": {"graph_attn_precision": "f32"},
    "q8_0 rows": {"cache_type_k": "q8_0", "indexer_cache_type_k": "q8_0"},
    "bf16 rows": {"cache_type_k": "bf16", "indexer_cache_type_k": "bf16"},
    "f32 rows": {"cache_type_k": "f32"},
    "no dsa": {"no_dsa": True},
    "experts on the host": {"cpu_moe": True},
    "all on the host": {"gpu_layers": 0},
}


def cut(name: str) -> Preset:
    """A layer of the model's dense kind, if it has any, and one with experts."""
    dense = min(1, PRESETS[name].dense)
    return replace(PRESETS[name], dense=dense, layers=dense + 1)


def depths(engine: Engine, n: int) -> Iterator[int]:
    """Where steps of `n` tokens may begin: both sides of an indexer's bound, one chunk and more."""
    last = engine.n_ctx - n
    yield from {at for at in (0, last * 3 // 4, last, 2048 - n) if 0 <= at <= last}


def used(engine: Engine, sizes: tuple[int, ...], wanted: int) -> int:
    """Most bytes of scratch over steps of `sizes` tokens, the last `wanted` with logits."""
    device, (stage,) = recorder(engine), engine._ranks.steps(()).stages
    for n in sizes:
        for at in depths(engine, n):
            engine.n_kv = at
            stage.graphs.clear()  # each step from the start
            for _ in engine.stream_logits([1] * n, max(0, n - wanted)):
                pass
    return device.peak - device.loaded


def sizes_up_to(n_ubatch: int) -> tuple[int, ...]:
    """All kinds of buckets: exact, padded, on both sides of FEW and of EXPAND_FROM."""
    found = {1, 8, 9, 96, 127, 128, 300, n_ubatch}
    return tuple(sorted(n for n in found if n <= n_ubatch))


def check(
    monkeypatch: pytest.MonkeyPatch, model: Any, n_ctx: int, n_ubatch: int, **flags: Any
) -> tuple[int, int]:
    """(bytes used, bytes planned)."""
    flags |= {"ctx_size": n_ctx, "ubatch_size": n_ubatch}
    with recorded(monkeypatch, model, **flags) as engine:
        wanted = most_logit_rows(engine.prepared.hparams.n_vocab)
        found = used(engine, sizes_up_to(n_ubatch), wanted)
        return found, engine.prepared.plan.ranks[0].scratch


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_no_step_takes_more_than_planned(
    monkeypatch: pytest.MonkeyPatch, name: str, mode: str
) -> None:
    if mode == "no dsa" and PRESETS[name].indexer is None:
        return
    every = itertools.product((4096, 65536), (64, 512, 2048))
    for n_ctx, n_ubatch in every if mode == "default" else ((65536, 512),):
        taken, planned = check(monkeypatch, cut(name), n_ctx, n_ubatch, **MODES[mode])
        print(f"{name} {mode} -c {n_ctx} -ub {n_ubatch}: {taken / 2**20:.1f} of "
              f"{planned / 2**20:.1f} MiB")  # fmt: skip
        assert taken <= planned
        if mode == "default":
            assert planned <= 1.3 * taken


@pytest.mark.parametrize("mode", ["default", "mla 1", "gap f32"])
@pytest.mark.parametrize("name", NAMES)
def test_halves_stay_within_the_plan_without_logits(
    monkeypatch: pytest.MonkeyPatch, name: str, mode: str
) -> None:
    """Logits of hundreds of rows would hide what the layers take."""
    monkeypatch.setattr(cuda_scratch, "most_logit_rows", lambda n_vocab: 1)
    for n_ubatch in (1, 16, 512):
        flags = {"ctx_size": 16384, "ubatch_size": n_ubatch, **MODES[mode]}
        with recorded(monkeypatch, cut(name), **flags) as engine:
            planned = engine.prepared.plan.ranks[0].scratch
            taken = used(engine, sizes_up_to(n_ubatch), 1)
        assert taken <= planned
        if n_ubatch == 512 and mode != "default":  # parts of which depend on the SMs and n_kv
            assert planned <= 1.05 * taken


RARE = {
    "all weights": lambda name: True,
    "k_b and v_b": lambda name: "k_b" in name or "v_b" in name,
    "output": lambda name: name == "output.weight",
    "attn_q_b and indexer": lambda name: "q_b" in name or "indexer" in name,
    "shared up": lambda name: "up_shexp" in name,
    "attn_output": lambda name: "attn_output" in name,
    "dense and shared down": lambda name: "ffn_down." in name or "down_shexp" in name,
    "routed gate and up": lambda name: "gate_exps" in name or "up_exps" in name,
    "routed down": lambda name: "down_exps" in name,
}

UNPACKED_MOST = ("output", "routed gate and up")  # where what is unpacked is most of the scratch


@pytest.mark.parametrize("qtype", ["F32", "IQ3_S"])
@pytest.mark.parametrize("which", RARE)
@pytest.mark.parametrize("name", ["v2lite", "glm5"])
def test_weights_that_are_not_in_tiles(
    monkeypatch: pytest.MonkeyPatch, name: str, which: str, qtype: str
) -> None:
    """The plain kernels take float32 copies beside the float16 ones; others unpack parts."""

    def mixed(quant: str, tensor: str, shape: tuple[int, ...], layers: int) -> str:
        is_rare = len(shape) > 1 and RARE[which](tensor)
        is_rare = is_rare and (qtype == "F32" or shape[-1] % 256 == 0)
        return qtype if is_rare else type_name(quant, tensor, shape, layers)

    monkeypatch.setattr(synthetic, "type_name", mixed)
    monkeypatch.setattr(plan, "keep_raw", lambda shards, small: keep_raw(shards, True))
    flags = MODES["gap f32"] if which == "all weights" else {}
    for n_ubatch in (8, 256):
        taken, planned = check(monkeypatch, cut(name), 4096, n_ubatch, **flags)
        assert taken <= planned
        if qtype != "F32" and n_ubatch == 256 and which in UNPACKED_MOST:
            assert planned <= 1.1 * taken


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("qtype", ["F32", "IQ3_S"])
def test_experts_in_host_memory_that_are_not_in_tiles(
    monkeypatch: pytest.MonkeyPatch, qtype: str, mapped: bool
) -> None:
    """Chunks of them are unpacked; few tokens may have to wait for those that they chose."""

    def mixed(quant: str, tensor: str, shape: tuple[int, ...], layers: int) -> str:
        return qtype if "_exps" in tensor else type_name(quant, tensor, shape, layers)

    monkeypatch.setattr(synthetic, "type_name", mixed)
    monkeypatch.setattr(cuda_scratch, "most_logit_rows", lambda n_vocab: 1)
    init = partialmethod(Recorder.__init__, mapped=mapped)
    monkeypatch.setattr(Recorder, "__init__", init)
    wide = replace(cut("v2lite"), f=1536)
    for n_ubatch in (8, 256):
        flags = {"ctx_size": 4096, "ubatch_size": n_ubatch, "cpu_moe": True}
        with recorded(monkeypatch, wide, **flags) as engine:
            taken = used(engine, sizes_up_to(n_ubatch), 1)
            assert taken <= engine.prepared.plan.ranks[0].scratch


@pytest.mark.parametrize("capability", [75, 80, 89, 100, 120])
@pytest.mark.parametrize("name", ["glm47flash", "glm5"])
def test_other_devices(monkeypatch: pytest.MonkeyPatch, name: str, capability: int) -> None:
    """None expands, the oldest has no tiles, some have little shared memory."""
    for cache_type in ("f16", "f32"):
        flags = {"capability": capability, "cache_type_k": cache_type}
        taken, planned = check(monkeypatch, cut(name), 4096, 512, **flags)
        assert taken <= planned


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.gguf")), ids=lambda path: path.stem)
def test_toy_models(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    for n_ubatch in (1, 24, 256):
        taken, planned = check(monkeypatch, GgufFile.open(path), 512, n_ubatch)
        assert taken <= planned


@pytest.mark.parametrize("first", [0, 100, 1500, 2047])
def test_a_ubatch_that_wants_many_logits_is_cut(
    monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """In equal parts, each of whose rows fit; one that wants few is left whole."""
    monkeypatch.setattr(memory, "LOGIT_BYTES", 4 * PRESETS["v2lite"].vocab * 700)
    with recorded(monkeypatch, cut("v2lite"), ctx_size=4096, ubatch_size=2048) as engine:
        found = [len(logits) for logits in engine.stream_logits([1] * 2048, first)]
        assert engine.n_kv == 2048 and sum(found) == 2048 - first
        assert max(found) <= 700
        assert len(found) == (3 if 2048 - first > 700 else 1)


def test_the_bound_of_logits() -> None:
    assert 4 * 129280 * most_logit_rows(129280) <= LOGIT_BYTES < 4 * 129280 * 1024
    assert most_logit_rows(1 << 40) == 1


def test_bounds_never_shrink_with_the_context() -> None:
    """Else the largest context that fits would be no boundary."""
    sizes, contexts = Sizes(20, 512, 192, 64, 256), range(256, 1 << 18, 256)
    expanded = [scratch_bytes(sizes, 512, n_ctx) for n_ctx in contexts]
    scores = [most_score_bytes(512, n_ctx) for n_ctx in contexts]
    assert expanded == sorted(expanded) and scores == sorted(scores)
    for n_ctx, nbytes in zip(contexts, scores, strict=True):
        assert 4 * tokens_at_once(512, n_ctx) * n_ctx <= nbytes


def planned_on(capability: int, **flags: Any) -> CudaScratch:
    params = to_params(library_values(LOADED, flags))
    params = replace(params, split=replace(params.split, vram=(141 << 30,)))
    found = prepare(SyntheticFile(cut("v3")), params)
    shards = found.plan.shards
    return CudaScratch(found.hparams, found.params.context, shards, capability, Sums())


def test_devices_that_do_not_expand_take_absorbed_attention_of_all_tokens() -> None:
    flags: dict[str, Any] = {"ctx_size": 8192, "ubatch_size": 2048}
    hopper, other = planned_on(90, **flags), planned_on(100, **flags)
    assert hopper.nbytes(8192) < other.nbytes(8192)
    absorbed = planned_on(90, mla_use=1, **flags)
    assert absorbed.nbytes(8192) == other.nbytes(8192)
    assert Device("gpu0", "planned", 1, 1).capability == 90


def test_a_search_over_contexts_is_quick() -> None:
    scratch = planned_on(90)
    start = time.process_time()
    for n_ctx in range(256, 256 * 101, 256):
        scratch.nbytes(n_ctx)
    assert time.process_time() - start < 0.5  # of a hundred
