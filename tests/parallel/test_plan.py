"""The plan as data: every tensor once, ranges complete, pairs equal, bytes and memory right."""

import json
import math
import os
import time
from collections import defaultdict
from pathlib import Path

import pytest
from kit.toy_gguf import header_only

from mlacli.cli import run
from mlacli.devices import Device
from mlacli.errors import MemoryBudgetError, UsageError
from mlacli.flags import to_params
from mlacli.loading.gguf_file import GgufFile, Metadata
from mlacli.models import deepseek2
from mlacli.parallel.memory import cache_row_bytes, scratch_bytes
from mlacli.parallel.plan import plan_shards
from mlacli.parallel.plan_report import plan_as_dict, plan_rows, shard_rows
from mlacli.params import ContextParams, ModelParams, SplitParams
from mlacli.prepare import prepare

GOLDEN = Path(__file__).parents[1] / "golden" / "plans"
G = 1 << 30
EXPERT_SPLITS = ("width", "layer", "id")

MIRRORED = {"token_embd", "output_norm", "attn_norm", "ffn_norm", "ffn_gate_inp", "exp_probs_b"}
WITH_HEADS = {"attn_q_a", "attn_q_a_norm", "attn_kv_a_mqa", "attn_kv_a_norm"}
AXIS = {
    "output": 0, "attn_q": 0, "attn_q_b": 0, "attn_k_b": 0, "attn_v_b": 0, "attn_output": 1,
    "ffn_gate": 0, "ffn_up": 0, "ffn_down": 1,
    "ffn_gate_shexp": 0, "ffn_up_shexp": 0, "ffn_down_shexp": 1,
    "ffn_gate_exps": 1, "ffn_up_exps": 1, "ffn_down_exps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """model(preset, **changes) -> (file, hparams), written once."""
    folder, made = tmp_path_factory.mktemp("plans"), {}

    def get(preset, **changes):
        key = preset, tuple(changes.items())
        if key not in made:
            file = GgufFile.open(header_only(folder / f"{len(made)}.gguf", preset, **changes))
            made[key] = file, deepseek2.Hparams.from_gguf(file)
        return made[key]

    return get


def gpus(*gib):
    return tuple(Device(f"gpu{i}", "planned", int(n * G), int(n * G)) for i, n in enumerate(gib))


HOST = Device("host", "cpu", 64 * G, 48 * G)


def plan_of(file_hp, devices, mode="graph", context=None, **split):
    file, hp = file_hp
    return plan_shards(
        deepseek2, "deepseek2", hp, file.tensors, ModelParams(), SplitParams(mode=mode, **split),
        context or ContextParams(n_ctx=4096), devices, HOST,
    )  # fmt: skip


def word(tensor):
    return tensor.split(".")[2 if tensor.startswith("blk.") else 0]


def by_tensor(plan):
    found = defaultdict(list)
    for shard in plan.shards:
        found[shard.tensor].append(shard)
    return found


def trunk(file, hp):
    skipped = tuple(f"blk.{hp.n_layer + i}." for i in range(hp.n_skipped))
    return {name for name in file.tensors if not name.startswith(skipped)}


def check_graph(file_hp, plan, expert_split):
    """Every rule of a graph plan over several ranks, tensor by tensor."""
    file, hp = file_hp
    ranks = [r.rank for r in plan.ranks]
    with_heads = [r.rank for r in plan.ranks if r.heads[0] < r.heads[1]]
    found = by_tensor(plan)
    assert found.keys() == trunk(file, hp)
    for name, shards in found.items():
        info, holders = file.tensors[name], [s.rank for s in shards]
        assert holders == sorted(set(holders)), "one shard a rank, in rank order"
        experts = "_exps" in name
        if word(name) in MIRRORED | WITH_HEADS:
            assert holders == (ranks if word(name) in MIRRORED else with_heads), name
        if word(name) in MIRRORED | WITH_HEADS or (experts and expert_split == "layer"):
            assert all(s.axis is None and s.shape == info.shape for s in shards)
            assert all(s.nbytes == info.nbytes for s in shards)
            if experts:
                assert holders == [shards[0].layer % len(ranks)]
            continue
        axis = 0 if experts and expert_split == "id" else AXIS[word(name)]
        check_ranges(shards, info, axis)
    check_pairs(hp, plan, expert_split)


def check_ranges(shards, info, axis):
    """Disjoint, complete, in rank order; bytes add up; columns on 32-edges with whole blocks."""
    at = 0
    for s in shards:
        ((start, stop),) = s.ranges
        assert s.axis == axis and start == at < stop and s.qtype == info.qtype
        at = stop
        assert s.shape == (*info.shape[:axis], stop - start, *info.shape[axis + 1 :])
        if axis == len(info.shape) - 1:
            assert start % 32 == 0 and (stop % 32 == 0 or stop == info.shape[-1])
            block = info.qtype.block
            n_blocks = math.ceil(stop / block) - start // block
            assert s.nbytes == info.n_rows * n_blocks * info.qtype.nbytes
        else:
            assert s.nbytes * info.shape[axis] == info.nbytes * (stop - start)
    assert at == info.shape[axis]
    if axis < len(info.shape) - 1:
        assert sum(s.nbytes for s in shards) == info.nbytes


def check_pairs(hp, plan, expert_split):
    """What one rank multiplies in turn has matching ranges."""
    held = {(s.rank, s.tensor): s.ranges for s in plan.shards}
    q = "attn_q_b" if hp.q else "attn_q"
    for r in plan.ranks:
        first, last = r.heads
        for layer in range(hp.n_layer):

            def of(name, rank=r.rank, layer=layer):
                return held.get((rank, f"blk.{layer}.{name}.weight"))

            if first == last:
                assert of(q) is of("attn_k_b") is of("attn_v_b") is of("attn_output") is None
            else:
                assert of("attn_k_b") == of("attn_v_b") == ((first, last),)
                assert of(q) == ((first * (hp.k + hp.p), last * (hp.k + hp.p)),)
                assert of("attn_output") == ((first * hp.v, last * hp.v),)
            for kind in ("", "_shexp", "_exps"):
                assert of("ffn_gate" + kind) == of("ffn_up" + kind) == of("ffn_down" + kind)


# Bytes of each plane that 16 rows x 64 columns take on a GPU (kernels/include/tile_layout.cuh).
PLANES = {
    "F16": (2048,), "Q4_0": (512, 64), "Q5_0": (512, 128, 64), "Q8_0": (1024, 64),
    "Q4_K": (512, 64, 16), "Q6_K": (512, 256, 64, 8),
}  # fmt: skip


def on_gpu(shard):
    """Bytes of a shard in tiles; vectors, float32 and the embedding stay as in the file."""
    name, block = shard.qtype.name, shard.qtype.block
    if len(shard.shape) == 1 or name == "F32" or shard.tensor == "token_embd.weight":
        return shard.nbytes
    start = shard.ranges[0][0] % block if shard.axis == len(shard.shape) - 1 else 0
    columns = -(-(start + shard.shape[-1]) // max(64, block)) * max(64, block)
    n = math.prod(shard.shape[:-2]) * -(-shard.shape[-2] // 16) * columns // 64
    return 256 + sum(-(-n * size // 256) * 256 for size in PLANES[name])


def check_bytes(plan):
    """Sums of the ranks are the sums of the shards, and the shares add up to 1."""
    found = by_tensor(plan)
    for r in plan.ranks:
        own = list(plan.of_rank(r.rank))
        assert r.weights == sum(on_gpu(s) for s in own)
        shared = sum(on_gpu(s) for s in own if s.axis is None and len(found[s.tensor]) > 1)
        assert r.mirrored == shared and r.derived == 0
        assert r.total == r.weights + r.cache + r.scratch + r.dequant
    assert sum(r.achieved for r in plan.ranks) == pytest.approx(1)


# --- graph -----------------------------------------------------------------------------------

SMALL = {
    "v2lite": {"layers": 4},
    "glm47flash": {"layers": 4},
    "v3": {"layers": 5},
    "kimi_k2": {"layers": 3},
}


@pytest.mark.parametrize("expert_split", EXPERT_SPLITS)
@pytest.mark.parametrize("n", [2, 3, 5, 7, 8, 24])
@pytest.mark.parametrize("preset", SMALL)
def test_graph_covers_every_tensor_once(model, preset, n, expert_split):
    """Equal shares, up to more ranks than heads (24 over 16 and 20)."""
    source = model(preset, **SMALL[preset])
    plan = plan_of(source, gpus(*[80] * n), expert_split=expert_split)
    assert [r.device for r in plan.ranks] == [f"gpu{i}" for i in range(n)]
    check_graph(source, plan, expert_split)
    check_bytes(plan)
    heads = [r.heads[1] - r.heads[0] for r in plan.ranks]
    assert sum(heads) == source[1].H and max(heads) - min(heads) <= 1
    assert all((r.cache > 0) == (h > 0) for r, h in zip(plan.ranks, heads, strict=True))


@pytest.mark.parametrize("expert_split", EXPERT_SPLITS)
def test_one_rank_holds_everything_whole(model, expert_split):
    source = model("v2lite", **SMALL["v2lite"])
    plan = plan_of(source, gpus(80), expert_split=expert_split)
    assert {s.tensor for s in plan.shards} == trunk(*source)
    assert all(s.axis is None for s in plan.shards)
    in_file = sum(info.nbytes for info in source[0].tensors.values())
    assert sum(s.nbytes for s in plan.shards) == in_file
    assert in_file < plan.ranks[0].weights < 1.03 * in_file
    check_bytes(plan)
    assert plan.ranks[0].mirrored == 0 and plan.ranks[0].achieved == 1.0


@pytest.mark.parametrize("expert_split", EXPERT_SPLITS)
@pytest.mark.parametrize(
    ("shares", "heads", "idle"),
    [
        ((3, 1), [12, 4], ()),
        ((1, 0), [16], ("gpu1",)),
        ((0, 1), [16], ("gpu0",)),
        ((0, 1, 1), [8, 8], ("gpu0",)),
        ((1, 0, 3), [4, 12], ("gpu1",)),
        ((1,), [16], ("gpu1", "gpu2")),  # missing entries are 0
        ((15, 1, 1), [14, 1, 1], ()),
        ((100, 1), [16, 0], ()),  # a share that rounds to no head still takes part elsewhere
    ],
)
def test_uneven_shares(model, shares, heads, idle, expert_split):
    """Devices of share 0 hold nothing; the others get what they asked, rounded to heads."""
    source = model("v2lite", **SMALL["v2lite"])
    n = max(len(shares), 3 if len(shares) == 1 else 0)
    plan = plan_of(source, gpus(*[80] * n), tensor_split=shares, expert_split=expert_split)
    assert [r.heads[1] - r.heads[0] for r in plan.ranks] == heads
    assert plan.idle == idle
    assert [r.asked for r in plan.ranks] == [x / sum(shares) for x in shares if x]
    check_bytes(plan)
    if len(heads) > 1:
        check_graph(source, plan, expert_split)
    else:
        assert all(s.axis is None for s in plan.shards)
        assert {s.tensor for s in plan.shards} == trunk(*source)


def test_achieved_share_is_near_the_asked_one(model):
    """What is cut follows -ts closely; what is mirrored doesn't count."""
    plan = plan_of(model("v3", layers=61), gpus(*[80] * 3), tensor_split=(4, 2, 2))
    for r in plan.ranks:
        assert r.achieved == pytest.approx(r.asked, abs=0.01)
        assert r.mirrored < 0.05 * r.weights


def test_owned_experts_are_not_mirrored(model):
    """--expert-split layer: whole experts on one rank count as its share, not as copies."""
    plan = plan_of(model("v2lite", layers=5), gpus(80, 80), expert_split="layer")
    width = plan_of(model("v2lite", layers=5), gpus(80, 80))
    assert [r.mirrored for r in plan.ranks] == [r.mirrored for r in width.ranks]
    assert sum(s.nbytes for s in plan.shards) == sum(s.nbytes for s in width.shards)
    assert [r.experts for r in plan.ranks] == ["64 in 2 layers", "64 in 2 layers"]


@pytest.mark.parametrize(
    ("preset", "n", "widths"),
    [
        ("v2lite", 4, [352] * 4),
        ("v2lite", 8, [192] * 4 + [160] * 4),
        ("glm47flash", 4, [384] * 4),
        ("glm47flash", 8, [192] * 8),
    ],
)
def test_widths_that_256_blocks_dont_divide(model, preset, n, widths):
    """F = 1408 and 1536 (Q6_K down) on 4 and 8 ranks: cuts on 32 columns, nobody left out."""
    file, hp = source = model(preset, **SMALL[preset])
    plan = plan_of(source, gpus(*[80] * n))
    name = "blk.2.ffn_down_exps.weight"
    shards = by_tensor(plan)[name]
    assert [s.shape[-1] for s in shards] == widths
    assert file.tensors[name].qtype.name == ("Q6_K" if hp.f[2] % 256 == 0 else "Q8_0")
    if hp.f[2] % 256 == 0:  # a cut block is carried whole by both sides
        assert sum(s.nbytes for s in shards) >= file.tensors[name].nbytes
    check_graph(source, plan, "width")


@pytest.mark.parametrize(
    ("heads", "n", "counts"),
    [(5, 2, [3, 2]), (5, 3, [2, 2, 1]), (5, 8, [1] * 5 + [0] * 3), (20, 8, [3] * 4 + [2] * 4)],
)
def test_odd_head_counts(model, heads, n, counts):
    """Five and twenty heads on any number of ranks, one head being the unit."""
    source = model("glm47flash", layers=2, heads=heads)
    plan = plan_of(source, gpus(*[80] * n))
    assert [r.heads[1] - r.heads[0] for r in plan.ranks] == counts
    check_graph(source, plan, "width")


def test_heads_narrower_than_a_column_edge(model):
    """v = 24: heads are dealt out by four, so that attn_output is cut on 32-column edges."""
    source = model("v2lite", layers=2, v=24, heads=20)
    plan = plan_of(source, gpus(80, 80, 80))
    assert [r.heads for r in plan.ranks] == [(0, 8), (8, 16), (16, 20)]
    check_graph(source, plan, "width")


def test_more_ranks_than_experts(model):
    source = model("v2lite", layers=2, experts=4, used=2)
    plan = plan_of(source, gpus(*[80] * 6), expert_split="id")
    assert [r.experts for r in plan.ranks][3:] == ["3..3 whole", "none", "none"]
    check_graph(source, plan, "id")


def test_merged_gate_up_is_cut_in_both_halves(model):
    """Each rank takes its rows of the gate half and the same rows of the up half."""
    source = model("v2lite", layers=2, merged=True)
    plan = plan_of(source, gpus(80, 80, 80))
    shards = by_tensor(plan)["blk.1.ffn_gate_up_exps.weight"]
    down = by_tensor(plan)["blk.1.ffn_down_exps.weight"]
    for s, d in zip(shards, down, strict=True):
        ((a, b),) = d.ranges
        assert s.ranges == ((a, b), (1408 + a, 1408 + b)) and s.shape == (64, 2 * (b - a), 2048)
    assert sum(s.nbytes for s in shards) == source[0].tensors[shards[0].tensor].nbytes


def test_derived_tensors_are_in_the_plan(model):
    """kv_b only: k_b and v_b are cut per head, k_b as Q8_0 and counted as built at load."""
    file, hp = model("v2lite", layers=2, layout="kv_b", style="ik")
    plan = plan_of((file, hp), gpus(80, 80))
    for rank in plan.ranks:
        own = {s.tensor: s for s in plan.of_rank(rank.rank)}
        k_b, v_b = own["blk.0.attn_k_b.weight"], own["blk.0.attn_v_b.weight"]
        assert k_b.shape == (8, 512, 128) and k_b.qtype.name == "Q8_0"
        assert v_b.shape == (8, 128, 512) and v_b.qtype == file.tensors[v_b.sources[0]].qtype
        assert rank.derived == 2 * on_gpu(k_b) == 2 * (256 + 8 * 512 * 128 // 32 * 34)
    rows = shard_rows(plan)[1]
    assert any(
        row[1] == "blk.0.attn_k_b.weight"
        and row[2:4] == ("8x512x128", "Q8_0")
        and row[5:] == ("heads 8..15", "blk.0.attn_kv_b.weight")
        for row in rows
    )


# --- layer and none --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 40])
def test_layer_mode_holds_every_tensor_once(model, n):
    """Stages follow one another; embedding on the first, head on the last, nothing cut."""
    file, hp = source = model("glm47flash", layers=4)
    plan = plan_of(source, gpus(*[80] * n), "layer")
    found = by_tensor(plan)
    assert found.keys() == trunk(file, hp)
    assert all(len(shards) == 1 and shards[0].axis is None for shards in found.values())
    assert all(s.nbytes == file.tensors[s.tensor].nbytes for s in plan.shards)
    edges = [edge for r in plan.ranks for edge in r.layers]
    assert edges[0] == 0 and edges[-1] == 4 and edges[1:-1:2] == edges[2:-1:2]
    assert len(plan.ranks) == min(n, 4) and len(plan.idle) == max(0, n - 4)
    assert found["token_embd.weight"][0].rank == 0
    last = len(plan.ranks) - 1
    assert found["output.weight"][0].rank == found["output_norm.weight"][0].rank == last
    for s in plan.shards:
        if s.layer is not None:
            first, end = plan.ranks[s.rank].layers
            assert first <= s.layer < end
    check_bytes(plan)


def test_layer_mode_obeys_shares(model):
    plan = plan_of(model("v2lite"), gpus(80, 80, 80), "layer", tensor_split=(2, 0, 1))
    assert [r.layers for r in plan.ranks] == [(0, 18), (18, 27)] and plan.idle == ("gpu1",)


def test_layer_mode_caches_its_own_layers(model):
    source = model("v2lite")
    plan = plan_of(source, gpus(80, 80), "layer", ContextParams(n_ctx=1024, cache_type_k="f16"))
    assert [r.cache for r in plan.ranks] == [14 * 1024 * 1152, 13 * 1024 * 1152]


def test_none_uses_the_main_device(model):
    plan = plan_of(model("v2lite"), gpus(80, 80), "none", main_gpu=1)
    assert [r.device for r in plan.ranks] == ["gpu1"] and plan.idle == ("gpu0",)
    assert plan.ranks[0].layers == (0, 27)


@pytest.mark.parametrize("mode", ["layer", "none"])
@pytest.mark.parametrize(
    ("ngl", "host"), [(99, 0), (27, 0), (26, 1), (20, 7), (1, 26), (0, 27), (None, 0)]
)
def test_layers_off_the_gpus_stay_in_host_memory(model, mode, ngl, host):
    """-ngl counts from the last layer; what it leaves out, the first GPU reads over the link."""
    plan = plan_of(model("v2lite"), gpus(80, 80), mode, n_gpu_layers=ngl)
    assert {s.layer for s in plan.shards if s.host} == set(range(host))
    assert all(s.host for s in plan.shards if s.layer is not None and s.layer < host)
    assert all(s.rank == 0 for s in plan.shards if s.host)
    assert sum(b - a for a, b in (r.layers for r in plan.ranks)) == 27
    assert plan.ranks[0].layers[0] == 0 and plan.ranks[-1].layers[1] == 27
    tops = {s.tensor: s.rank for s in plan.shards if s.layer is None}
    assert tops["token_embd.weight"] == 0 and tops["output.weight"] == len(plan.ranks) - 1
    if mode == "layer" and 0 < host < 26:  # the layers on GPUs are shared evenly
        assert plan.ranks[0].layers[1] - host == -(-(27 - host) // 2)


def test_graph_with_layers_off_the_gpus_is_refused(model):
    with pytest.raises(UsageError, match="-ngl 20 leaves 7 of 27") as caught:
        plan_of(model("v2lite"), gpus(80, 80), n_gpu_layers=20)
    assert "-sm layer" in caught.value.hint
    assert len(plan_of(model("v2lite"), gpus(80, 80), n_gpu_layers=27).ranks) == 2


# --- shares ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["graph", "layer"])
def test_more_shares_than_devices(model, mode):
    with pytest.raises(UsageError, match="-ts has 3 shares for 2 devices") as caught:
        plan_of(model("v2lite"), gpus(80, 80), mode, tensor_split=(1, 1, 1))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("gib", "asked"),
    [
        ((80, 80, 80), [1 / 3] * 3),
        ((80, 77), [0.5, 0.5]),  # within 5% of the largest
        ((80, 75), [80 / 155, 75 / 155]),
        ((80, 80, 24), [80 / 184, 80 / 184, 24 / 184]),
    ],
)
def test_shares_by_memory(model, gib, asked):
    """Without -ts: equal when memories are within 5%, else proportional to total memory."""
    plan = plan_of(model("v2lite"), gpus(*gib))
    assert [r.asked for r in plan.ranks] == pytest.approx(asked)


def test_shares_don_t_follow_free_memory(model):
    """The same devices get the same plan, whatever else runs on them."""
    busy = (Device("cuda0", "cuda", 80 * G, 5 * G), Device("cuda1", "cuda", 80 * G, 79 * G))
    plan = plan_of(model("v2lite"), busy)
    assert [r.asked for r in plan.ranks] == [0.5, 0.5]
    assert [r.heads for r in plan.ranks] == [(0, 8), (8, 16)]


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache_type", "row"), [("f32", 2304), ("f16", 1152), ("bf16", 1152), ("q8_0", 612)]
)
def test_cache_bytes(model, cache_type, row):
    """Latent rows of 576 values, whole on each rank with heads (behaviour of the original, 4.8)."""
    source = model("v2lite")
    context = ContextParams(n_ctx=1000, cache_type_k=cache_type)
    assert cache_row_bytes(source[1], context) == row
    plan = plan_of(source, gpus(*[80] * 20), context=context)
    assert plan.n_ctx == 1024
    assert [r.cache for r in plan.ranks] == [27 * 1024 * row] * 16 + [0] * 4


def test_started_q8_0_block_of_a_row_counts(model):
    """r + p = 528 fills 16.5 blocks."""
    hp = model("v2lite", layers=2, p=16)[1]
    assert cache_row_bytes(hp, ContextParams(cache_type_k="q8_0")) == 17 * 34


@pytest.mark.parametrize(
    ("mla", "flash_attn", "row"),
    [
        *((mla, True, 576 * 4) for mla in (1, 2, 3)),
        (1, False, 576 * 4 + 512 * 2),  # and values of type -ctv, transposed
        *((mla, False, 576 * 4) for mla in (2, 3)),
        *((0, fa, 16 * (192 * 4 + 128 * 2)) for fa in (True, False)),
    ],
)
def test_cache_bytes_of_each_attention_form(model, mla, flash_attn, row):
    """Keys are float32 here and values f16, of 16 heads with 128 + 64 and 128 values."""
    source = model("v2lite")
    context = ContextParams(n_ctx=512, cache_type_k="f32", mla=mla, flash_attn=flash_attn)
    assert cache_row_bytes(source[1], context) == row
    plan = plan_of(source, gpus(80, 80), "layer", context)
    assert [r.cache for r in plan.ranks] == [n * 512 * row for n in (14, 13)]


def prepared(source, **values):
    params = to_params(values, {key: "--" + key for key in values})
    return prepare(source[0].path, params)


@pytest.mark.parametrize(
    ("preset", "mode", "gib"),
    [("v2lite", "graph", (10, 10)), ("v2lite", "layer", (16, 5)), ("v2lite", "none", (16,)),
     ("glm47flash", "graph", (80, 80, 24)), ("v3", "graph", (80,) * 8)],
)  # fmt: skip
@pytest.mark.parametrize(
    "form", [{}, {"mla_use": 0}, {"mla_use": 1, "flash_attn": False, "attention_max_batch": 0}]
)
def test_n_ctx_fits_is_the_largest(model, preset, mode, gib, form):
    """-c of n_ctx_fits is accepted, one step of 256 more (even one token) is refused."""
    if mode == "graph" and form:
        form = {"mla_use": 1}
    source = model(preset)
    vram = tuple(n * G for n in gib)
    ask = {"vram": vram, "split_mode": mode, **form}
    fits = prepared(source, **ask).plan.n_ctx_fits
    assert fits % 256 == 0 and fits > 0
    full = prepared(source, **ask, ctx_size=fits).plan
    assert full.n_ctx == full.n_ctx_fits == fits
    assert all(r.resident <= r.capacity == n - G for r, n in zip(full.ranks, vram, strict=True))
    for more in (1, 256):
        with pytest.raises(MemoryBudgetError, match=r"device gpu\d needs .* GiB, has") as caught:
            prepared(source, **ask, ctx_size=fits + more)
        assert caught.value.need > caught.value.have
        assert f"-c {fits}" in caught.value.hint


def test_refusal_says_how_much_is_needed(model):
    """Weights alone don't fit: the device, GiB needed and had, and no context is offered."""
    with pytest.raises(MemoryBudgetError, match="device gpu0 needs") as caught:
        prepared(model("v3"), vram=(80 * G,) * 4, split_mode="graph")
    e = caught.value
    assert e.device == "gpu0" and e.have == 79 * G
    assert f"needs {e.need / G:.2f} GiB, has 79.00 GiB" in e.message
    assert e.need > 435e9 / 4 and "-c" not in e.hint.split() and e.exit_code == 1


def test_margin_stays_free(model):
    """--margin comes off every device."""
    source = model("v2lite")
    wide = prepared(source, vram=(24 * G,), margin=0).plan
    narrow = prepared(source, vram=(24 * G,), margin=8 * G).plan
    assert wide.ranks[0].capacity - narrow.ranks[0].capacity == 8 * G
    lost = wide.n_ctx_fits - narrow.n_ctx_fits
    assert lost == pytest.approx(8 * G / (27 * 1152), abs=256)


def test_ranks_on_one_device_share_its_memory(model):
    """Two ranks on one device of 20 GiB: their needs add up against one capacity."""
    source = model("v2lite")
    one = Device("cuda0", "cuda", 20 * G, 20 * G)
    plan = plan_of(source, (one, one), context=ContextParams(n_ctx=512), margin=0)
    alone = plan_of(source, gpus(20, 20), context=ContextParams(n_ctx=512), margin=0)
    assert len(plan.ranks) == 2 and plan.idle == ()
    free = 20 * G - sum(r.total - r.cache for r in plan.ranks)
    assert plan.n_ctx_fits == free // (2 * 27 * 1152) // 256 * 256 < alone.n_ctx_fits


def test_cpu_weights_are_pages_of_the_file(model):
    """CPU ranks needn't hold the mapped weights; float32 copies take half of what is free."""
    cpu = Device("cpu", "cpu", 8 * G, 6 * G)
    plan = plan_of(model("v2lite"), (cpu, cpu), context=ContextParams(n_ctx=256))
    for r in plan.ranks:
        assert r.capacity == 5 * G and r.dequant == 5 * G // 4
        assert r.resident == r.cache + r.scratch + r.dequant
    tiny = plan_of(model("v2lite", layers=1, dense=1), (cpu,), "none")
    assert tiny.ranks[0].dequant == sum(
        4 * math.prod(s.shape) for s in tiny.shards if s.qtype.name != "F32"
    )


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def untouched(monkeypatch):
    """Fails when a weight byte is asked for, or the vocabulary decoded."""

    def refuse(self, info):
        raise AssertionError(f"{info.name} was read")

    value = Metadata._value

    def no_vocab(cursor, kind, key):
        assert not key.startswith("tokenizer."), key
        return value(cursor, kind, key)

    monkeypatch.setattr(GgufFile, "data", refuse)
    monkeypatch.setattr(Metadata, "_value", staticmethod(no_vocab))


def test_v3_is_planned_in_no_time(tmp_path, capsys, untouched):
    """400 GB with 129,280 tokens and as many merges, by the real command: under 2 s, no weight."""
    path = header_only(tmp_path / "v3.gguf", "v3", with_vocab=True)
    assert path.stat().st_size > 400e9
    words = ["plan", "-m", str(path), "-sm", "graph", "--vram", ",".join(["80G"] * 8), "--json"]
    start = time.process_time()
    assert run(words) == 0
    assert time.process_time() - start < 4.0  # generous: a busy machine counts twice
    found = json.loads(capsys.readouterr().out)
    assert found["split_mode"] == "graph" and len(found["ranks"]) == 8
    assert sum(r["bytes"]["weights"] for r in found["ranks"]) > 400e9


def test_plan_refuses_by_exit_code(model, capsys):
    """Memory is exit 1, too many -ts entries exit 2; each one line naming numbers."""
    path = str(model("v3")[0].path)
    assert run(["plan", "-m", path, "-sm", "graph", "--vram", "80G,80G"]) == 1
    assert "has 79.00 GiB" in capsys.readouterr().err
    assert run(["plan", "-m", path, "-sm", "graph", "--vram", "80G,80G", "-ts", "1,1,1"]) == 2
    assert "3 shares for 2 devices" in capsys.readouterr().err


def test_rows_for_people(model):
    """One row a rank, one row a shard, as many cells as columns."""
    plan = plan_of(model("v2lite", layers=2), gpus(80, 80, 80), tensor_split=(100, 1, 1))
    for columns, rows in (plan_rows(plan), shard_rows(plan)):
        assert all(len(row) == len(columns) for row in rows)
    columns, rows = plan_rows(plan)
    assert len(rows) == 3
    assert dict(zip(columns, rows[2], strict=True))["heads"] == "none"
    assert len(shard_rows(plan)[1]) == len(plan.shards)


GOLDENS = {
    "v2lite-24g": ("v2lite", {"vram": (24 * G,)}),
    "v2lite-cache-q8_0-layer": (
        "v2lite",
        {"vram": (16 * G, 8 * G), "split_mode": "layer", "cache_type_k": "q8_0", "ctx_size": 32768},
    ),
    "v3-8x80g-graph": ("v3", {"vram": (80 * G,) * 8, "split_mode": "graph"}),
    "glm47flash-80g-80g-24g-graph": (
        "glm47flash",
        {"vram": (80 * G, 80 * G, 24 * G), "split_mode": "graph", "ctx_size": 8192},
    ),
    "v2lite-80g-80g-24g-graph-id": (
        "v2lite",
        {"vram": (80 * G, 80 * G, 24 * G), "split_mode": "graph", "expert_split": "id"},
    ),
    "kimi_k2-8x141g-graph-layer": (
        "kimi_k2",
        {"vram": (141 * G,) * 8, "split_mode": "graph", "expert_split": "layer"},
    ),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_plans(model, name):
    """`plan --json` of published models: its keys are an interface. UPDATE_GOLDEN=1 rewrites."""
    preset, values = GOLDENS[name]
    text = json.dumps(plan_as_dict(prepared(model(preset), **values).plan), indent=2) + "\n"
    path = GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_a_plan_that_does_not_fit_is_printed_before_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = header_only(tmp_path / "v3.gguf", "v3")
    code = run(["plan", "-m", str(path), "--vram", "80G,80G", "-sm", "graph", "-c", "4096"])
    out, err = capsys.readouterr()
    assert code == 1
    assert out.splitlines()[2].split()[:2] == ["0", "gpu0"]
    assert err.splitlines()[-1].startswith("Error: device gpu0 needs ")


def test_scratch_never_shrinks_with_the_context(model):
    """Else the largest context that fits would be no boundary: -amb trades heads for depth."""
    hp = model("v2lite")[1]
    for mla, fa in ((0, False), (1, False), (2, True), (3, True)):
        context = ContextParams(mla=mla, flash_attn=fa, attention_max_batch=128)
        sizes = [scratch_bytes(hp, context, n, (0, 16), (0, 0), 1) for n in range(256, 65536, 256)]
        assert sizes == sorted(sizes)
        assert (sizes[2] == sizes[-1]) is (mla == 3)  # block-wise: 512 tokens, whatever the depth
