"""read_shard against the dequantised whole tensor, for every type and every way of cutting."""

import math
from dataclasses import replace

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from kit.toy_gguf import QTYPES, Toy, write_toy

from mlacli.devices import Device
from mlacli.loading.gguf_file import GgufFile
from mlacli.loading.weights import from_float32, load_weights, read_shard, short_name, to_float32
from mlacli.models import deepseek2
from mlacli.parallel.plan import plan_shards
from mlacli.params import ContextParams, ModelParams, SplitParams

# One MoE layer whose rows fill 256-blocks everywhere: heads of 64 values and FFN ranges of 96
# columns cut those blocks. k_b has 32 columns, so it stays Q8_0 as in every file.
WIDE = Toy(
    layers=1, dense=0, d=256, heads=5, q=256, r=256, k=32, p=16, v=64, f=256, experts=3,
    shared=2, vocab=70,
)  # fmt: skip


def wide(qtype, **changes):
    # five heads of 64 would leave half a block at the end of attn_output's rows
    heads = 5 if gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[qtype]][0] <= 32 else 4
    qtypes = {"": qtype, "attn_k_b": "Q8_0", **changes.pop("qtypes", {})}
    return replace(WIDE, heads=heads, qtypes=qtypes, **changes)


def planned(file, split, merge=False):
    hp = deepseek2.Hparams.from_gguf(file)
    devices = tuple(Device(f"cpu{i}", "cpu", 1 << 34, 1 << 34) for i in range(len(split.devices)))
    plan = plan_shards(
        deepseek2, "deepseek2", hp, file.tensors, ModelParams(merge_up_gate_experts=merge), split,
        ContextParams(n_ctx=256), devices, devices[0],
    )  # fmt: skip
    return hp, plan


def graph(n, shares=(), expert_split="width"):
    return SplitParams(
        mode="graph", devices=("cpu",) * n, tensor_split=shares, expert_split=expert_split
    )


def whole_values(path):
    """Every tensor of the file as float32, by gguf's own reader."""
    return {
        t.name: np.asarray(dequantize(t.data, t.tensor_type), np.float32)
        for t in gguf.GGUFReader(str(path)).tensors
    }


def expected_slice(shard, whole):
    if shard.axis is None:
        return whole.reshape(shard.shape)
    whole = whole.reshape(
        [n if a != shard.axis else -1 for a, n in enumerate(shard.shape)]
    )  # folded tensors get their three axes
    index = np.concatenate([np.arange(*r) for r in shard.ranges])
    return np.take(whole, index, axis=shard.axis)


def local_values(raw, shard):
    """The shard's own columns: a block cut by the range is carried whole."""
    values = to_float32(raw, shard.qtype)
    skip = shard.start % shard.qtype.block if shard.axis == len(shard.shape) - 1 else 0
    return values[..., skip : skip + shard.shape[-1]]


def check_all(path, split):
    """Every shard's bytes number what the plan says and hold the right values; tensor names."""
    file = GgufFile.open(path)
    whole = whole_values(path)
    hp, plan = planned(file, split)
    for shard in plan.shards:
        raw = read_shard(file, shard, hp)
        assert raw.dtype == np.uint8 and raw.nbytes == shard.nbytes, shard
        np.testing.assert_array_equal(
            local_values(raw, shard), expected_slice(shard, whole[shard.sources[0]]), str(shard)
        )
    return {short_name(shard.tensor) for shard in plan.shards}


@pytest.mark.parametrize("qtype", QTYPES)
def test_every_type_in_every_cut(tmp_path, qtype):
    """Mirrored, by head (rows, leading axis, columns), by FFN width, by vocabulary; uneven."""
    path = write_toy(tmp_path / "a.gguf", wide(qtype))
    names = check_all(path, graph(3, (3, 2, 2)))
    assert names >= {"token_embd", "attn_q_a", "attn_q_b", "attn_v_b", "attn_output", "output",
                     "ffn_up_exps", "ffn_down_exps", "ffn_down_shexp"}  # fmt: skip


@pytest.mark.parametrize("qtype", ["F32", "BF16", "Q8_0", "Q4_K", "IQ4_XS"])
@pytest.mark.parametrize("expert_split", ["id", "layer"])
def test_whole_experts(tmp_path, qtype, expert_split):
    """Experts dealt out by id (three over two ranks) and a layer's experts on one rank."""
    path = write_toy(tmp_path / "a.gguf", wide(qtype))
    check_all(path, graph(2, (), expert_split))


@pytest.mark.parametrize("qtype", ["F16", "Q8_0", "Q6_K"])
def test_merged_gate_up_takes_two_ranges(tmp_path, qtype):
    """A file's merged ffn_gate_up_exps: gate rows of the range, then up rows of the same range."""
    path = write_toy(tmp_path / "a.gguf", wide(qtype, merged=True))
    assert "ffn_gate_up_exps" in check_all(path, graph(3))
    file = GgufFile.open(path)
    _, plan = planned(file, graph(3))
    for shard in plan.shards:
        if "gate_up" in shard.tensor:
            (gate, gate_end), (up, up_end) = shard.ranges
            assert (up - gate, up_end - gate_end) == (WIDE.f, WIDE.f) and shard.is_copy


def test_columns_cut_within_a_256_block(tmp_path):
    """ffn_down of 512 Q6_K columns on 3 ranks: each carries whole blocks, the middle one both."""
    path = write_toy(tmp_path / "a.gguf", wide("Q6_K"))
    file = GgufFile.open(path)
    hp, plan = planned(file, graph(3))
    found = [s for s in plan.shards if "ffn_down_shexp" in s.tensor]
    assert [s.ranges for s in found] == [((0, 192),), ((192, 352),), ((352, 512),)]
    assert [s.nbytes for s in found] == [256 * 210, 256 * 2 * 210, 256 * 210]
    for shard in found:
        assert read_shard(file, shard, hp).shape == (256, shard.nbytes // 256)


def test_views_of_the_file_are_not_copies(tmp_path):
    """Rows and whole tensors stay pages of the file; only what the plan calls derived is copied."""
    path = write_toy(tmp_path / "a.gguf", wide("Q8_0"))
    file = GgufFile.open(path)
    hp, plan = planned(file, graph(2))
    for shard in plan.shards:
        assert not shard.is_copy
        assert np.shares_memory(
            read_shard(file, shard, hp), np.frombuffer(file._parts[0], np.uint8)
        )


@pytest.mark.parametrize("qtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "IQ4_XS"])
@pytest.mark.parametrize("n", [1, 3])
def test_k_b_and_v_b_out_of_kv_b(tmp_path, qtype, n):
    """k_b is Q8_0 of the transposed keys (its own type when kv_b is a float), v_b keeps bytes."""
    toy = wide(qtype, layout="kv_b", style="ik")
    path = write_toy(tmp_path / "a.gguf", toy)
    file, heads = GgufFile.open(path), toy.heads
    kv_b = whole_values(path)["blk.0.attn_kv_b.weight"].reshape(heads, 32 + 64, 256)
    info = file.tensors["blk.0.attn_kv_b.weight"]
    kv_raw = np.frombuffer(file.data(info), np.uint8).reshape(heads, 96, -1)
    hp, plan = planned(file, graph(n))
    keys, values = [], []
    for shard in plan.shards:
        if "_k_b" not in shard.tensor and "_v_b" not in shard.tensor:
            continue
        raw = read_shard(file, shard, hp)
        assert raw.nbytes == shard.nbytes and raw.shape[:-1] == shard.shape[:-1]
        assert shard.sources == ("blk.0.attn_kv_b.weight",)
        if "_v_b" in shard.tensor:
            assert shard.qtype.name == qtype
            values.append(raw)
        else:
            assert shard.is_copy
            assert shard.qtype.name == (qtype if qtype in ("F32", "F16", "BF16") else "Q8_0")
            keys.append(to_float32(raw, shard.qtype))
    np.testing.assert_array_equal(np.concatenate(values), kv_raw[:, 32:])
    transposed = np.ascontiguousarray(kv_b[:, :32].transpose(0, 2, 1))
    if qtype not in ("F32", "F16", "BF16"):
        q8 = gguf.GGMLQuantizationType.Q8_0
        transposed = dequantize(quantize(transposed, q8), q8)
    np.testing.assert_array_equal(np.concatenate(keys), transposed)


def test_k_b_of_odd_key_size_is_float32(tmp_path):
    """24 columns don't fill Q8_0 blocks, so k_b out of a quantised kv_b is stored as F32."""
    toy = Toy(layers=1, k=24, p=8, layout="kv_b", style="ik", qtypes={"attn_kv_b": "Q8_0"})
    path = write_toy(tmp_path / "a.gguf", toy)
    file = GgufFile.open(path)
    hp, plan = planned(file, graph(2))
    found = [s for s in plan.shards if "attn_k_b" in s.tensor]
    assert [s.qtype.name for s in found] == ["F32", "F32"]
    kv_b = whole_values(path)["blk.0.attn_kv_b.weight"].reshape(4, 24 + 32, 32)
    got = np.concatenate([to_float32(read_shard(file, s, hp), s.qtype) for s in found])
    np.testing.assert_array_equal(got, kv_b[:, :24].transpose(0, 2, 1))


@pytest.mark.parametrize("n", [1, 3])
def test_folded_tensors_are_recognised_by_shape(tmp_path, n):
    """2-D k_b [H*r, k] and v_b [H*v, r] beside kv_b: read as three axes, kv_b left alone."""
    toy = replace(wide("Q8_0"), layout="folded", style="ik")
    path = write_toy(tmp_path / "a.gguf", toy)
    check_all(path, graph(n))
    _, plan = planned(GgufFile.open(path), graph(n))
    folded = [s for s in plan.shards if "_k_b" in s.tensor or "_v_b" in s.tensor]
    assert all(len(s.shape) == 3 and s.sources == (s.tensor,) for s in folded)
    assert not any("kv_b" in s.tensor for s in plan.shards)
    for name, rows in (("attn_k_b", toy.r), ("attn_v_b", toy.v)):
        shapes = [s.shape for s in folded if name in s.tensor]
        assert sum(shape[0] for shape in shapes) == toy.heads and shapes[0][1] == rows


@pytest.mark.parametrize("qtype", ["F16", "Q8_0", "Q4_K"])
def test_muge_merges_gate_and_up(tmp_path, qtype):
    """-muge: one tensor per layer, gate rows above up rows, bytes as planned and called derived."""
    path = write_toy(tmp_path / "a.gguf", wide(qtype))
    file, whole = GgufFile.open(path), whole_values(path)
    hp, plan = planned(file, SplitParams(mode="none"), merge=True)
    names = [s.tensor for s in plan.shards]
    assert "blk.0.ffn_gate_exps.weight" not in names and "blk.0.ffn_up_exps.weight" not in names
    shard = plan.shards[names.index("blk.0.ffn_gate_up_exps.weight")]
    raw = read_shard(file, shard, hp)
    assert raw.nbytes == shard.nbytes and shard.is_copy and plan.ranks[0].derived == shard.nbytes
    both = [whole[f"blk.0.ffn_{side}_exps.weight"] for side in ("gate", "up")]
    np.testing.assert_array_equal(to_float32(raw, shard.qtype), np.concatenate(both, axis=1))


def test_muge_leaves_different_types_apart(tmp_path):
    """Gate and up of two types can't be one tensor: both stay."""
    path = write_toy(tmp_path / "a.gguf", wide("Q8_0", qtypes={"ffn_up_exps": "Q4_0"}))
    _, plan = planned(GgufFile.open(path), SplitParams(mode="none"), merge=True)
    assert not any("gate_up" in s.tensor for s in plan.shards)
    assert any("ffn_up_exps" in s.tensor for s in plan.shards)


def test_tied_output_is_the_embedding(tmp_path):
    """Without output.weight the head is cut from token_embd's rows."""
    path = write_toy(tmp_path / "a.gguf", wide("Q8_0", tied=True))
    file = GgufFile.open(path)
    hp, plan = planned(file, graph(3))
    found = [s for s in plan.shards if s.tensor == "output.weight"]
    assert all(s.sources == ("token_embd.weight",) for s in found)
    rows = np.concatenate([to_float32(read_shard(file, s, hp), s.qtype) for s in found])
    np.testing.assert_array_equal(rows, whole_values(path)["token_embd.weight"])


class Recorder:
    """An Ops that keeps what it is handed."""

    def __init__(self):
        self.held = {}
        self.ended = False

    def begin_upload(self, shards):
        self.wanted = [shard.tensor for shard in shards]

    def upload(self, raw, shard):
        assert not self.ended and shard.tensor in self.wanted
        self.held[shard.tensor] = raw.nbytes
        return shard.tensor

    def end_upload(self):
        self.ended = True


def test_load_weights_reads_the_plan_and_nothing_else(tmp_path):
    """Bytes handed to each rank add up to its plan; weights land under their GGUF names."""
    path = write_toy(tmp_path / "a.gguf", Toy(layers=3, biased=(2,), mtp=1))
    file = GgufFile.open(path)
    for split in (graph(3), SplitParams(mode="layer", devices=("cpu",) * 3)):
        hp, plan = planned(file, split)
        for rank in plan.ranks:
            ops, told = Recorder(), []
            weights = load_weights(file, plan, rank.rank, hp, ops, told.append)
            assert sum(ops.held.values()) == rank.weights == sum(told)
            assert ops.ended
            assert list(weights.layers) == list(range(*rank.layers))
            assert not any(name.startswith("blk.3.") for name in ops.held)
            last = weights.layers[rank.layers[1] - 1]
            assert last.attn_output == f"blk.{rank.layers[1] - 1}.attn_output.weight"
            if rank.layers[1] == 3:
                assert last.exp_probs_b == "blk.2.exp_probs_b.bias"
                assert weights.output == "output.weight"
    assert weights.token_embd is None  # the last pipeline stage embeds nothing
    assert plan.ranks[1].layers == (1, 2)


def test_rank_without_heads_holds_no_attention(tmp_path):
    """Five ranks, four heads: the fifth has FFN weights only."""
    path = write_toy(tmp_path / "a.gguf", Toy(F=320, f=160))
    file = GgufFile.open(path)
    hp, plan = planned(file, graph(5))
    weights = load_weights(file, plan, 4, hp, Recorder())
    assert weights.layers[0].attn_output is None and weights.layers[0].attn_kv_a_mqa is None
    assert weights.layers[0].ffn_down is not None and weights.layers[1].ffn_down_exps is not None


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_round_trip(name):
    """from_float32 and to_float32 are the gguf package's, F32 exact."""
    from mlacli.loading.quant_types import from_id

    kind = gguf.GGMLQuantizationType[name]
    qtype = from_id(kind.value, "x")
    values = np.random.default_rng(0).standard_normal((3, 2, 64), np.float32)
    raw = from_float32(values, qtype)
    assert raw.dtype == np.uint8 and raw.shape == (3, 2, qtype.row_bytes(64))
    got = to_float32(raw, qtype)
    own = values.astype(np.float16) if name == "F16" else values if name == "F32" else None
    np.testing.assert_array_equal(
        got, dequantize(quantize(values, kind), kind) if own is None else own.astype(np.float32)
    )
    assert math.isclose(float(np.abs(got).max()), float(np.abs(values).max()), rel_tol=0.2)


def test_short_names():
    assert short_name("blk.12.attn_q_b.weight") == "attn_q_b"
    assert short_name("blk.3.exp_probs_b.bias") == "exp_probs_b"
    assert short_name("output_norm.weight") == "output_norm"
