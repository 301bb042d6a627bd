"""Hparams of deepseek2 files: both metadata styles, defaults, YaRN numbers, impossible values."""

import math
from dataclasses import replace

import pytest
from kit.toy_gguf import PRESETS, TOY, Toy, header_only, write_toy

from mlacli.errors import BadTensorShape, GgufError, MissingTensor, PlanError, UnsupportedFeature
from mlacli.loading.gguf_file import GgufFile
from mlacli.models import deepseek2
from mlacli.models.tensor_table import TensorSpec
from mlacli.parallel.tensor_uses import tensor_uses


@pytest.fixture
def hparams(tmp_path):
    """hparams(toy, **metadata): of a file of `toy`, keys written with __ for dots; None removes."""

    def read(toy=TOY, **metadata):
        toy = replace(toy, metadata={k.replace("__", "."): v for k, v in metadata.items()})
        return deepseek2.Hparams.from_gguf(GgufFile.open(write_toy(tmp_path / "a.gguf", toy)))

    return read


def of_preset(tmp_path, preset, **changes):
    file = GgufFile.open(header_only(tmp_path / "a.gguf", preset, **changes))
    return deepseek2.Hparams.from_gguf(file)


def uses_of(path, merge=False):
    file = GgufFile.open(path)
    hp = deepseek2.Hparams.from_gguf(file)
    return tensor_uses(deepseek2, hp, file.tensors, merge)


# --- sizes -----------------------------------------------------------------------------------


def test_both_metadata_styles_agree(hparams):
    """mainline's head_count_kv 1 with *_mla sizes, and ik's per-head sizes, mean the same model."""
    assert hparams(Toy(style="mainline")) == hparams(Toy(style="ik", layout="kv_b"))


@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_of_published_models(tmp_path, preset):
    """Every size comes back as the published model's."""
    toy, hp = PRESETS[preset], of_preset(tmp_path, preset)
    assert (hp.n_layer, hp.n_skipped, hp.n_vocab) == (toy.layers, toy.mtp, toy.vocab)
    assert (hp.d, hp.H, hp.q, hp.r, hp.k, hp.p, hp.v) == (
        toy.d, toy.heads, toy.q, toy.r, toy.k, toy.p, toy.v,
    )  # fmt: skip
    assert set(hp.F) == {toy.F} and set(hp.f) == {toy.f}
    assert (hp.E, hp.n_dense, hp.n_shared) == (toy.experts, toy.dense, toy.shared)
    assert hp.cache_width == 576 and hp.n_ctx_train == toy.n_ctx
    assert hp.routing.n_used == toy.used and hp.routing.sigmoid == toy.sigmoid
    assert (hp.routing.n_groups, hp.routing.n_groups_used) == (toy.groups, toy.groups_used)


@pytest.mark.parametrize("layers", [2, 26, 48])
def test_lite_is_known_by_tensor_presence(hparams, layers):
    """attn_q makes a model lite, whatever the layer count or a stray q_lora_rank says."""
    tiny = replace(TOY, layers=layers, dense=layers, d=32, F=32, experts=0, vocab=8)
    assert hparams(replace(tiny, q=0), attention__q_lora_rank=1536).q == 0
    assert hparams(replace(tiny, q=16)).q == 16


def test_lite_tensors(tmp_path):
    names = {use.spec.name for use in uses_of(write_toy(tmp_path / "a.gguf", Toy(q=0)))}
    assert "attn_q.weight" in names and not any(n.startswith("attn_q_") for n in names)


def test_mtp_blocks_are_skipped_whole(tmp_path):
    """The last nextn_predict_layers blocks are no layers, and none of their tensors is used."""
    path = write_toy(tmp_path / "a.gguf", Toy(mtp=2))
    uses = uses_of(path)
    assert {use.layer for use in uses} == {None, 0, 1}
    assert deepseek2.Hparams.from_gguf(GgufFile.open(path)).n_skipped == 2


def test_mtp_blocks_may_be_absent(tmp_path):
    """A trunk-only file counts its MTP block in block_count and doesn't hold it."""
    path = write_toy(tmp_path / "a.gguf", Toy(metadata={"block_count": 3,
                                                        "nextn_predict_layers": 1}))  # fmt: skip
    assert {use.layer for use in uses_of(path)} == {None, 0, 1}


def test_per_layer_arrays(tmp_path):
    """feed_forward_length and expert_feed_forward_length may be arrays, one entry a block."""
    arrays = {
        "feed_forward_length": [96, 96, 7],
        "expert_feed_forward_length": [7, 64, 64],
        "attention.head_count": [4, 4, 4],
        "block_count": 3,
        "nextn_predict_layers": 1,
    }
    path = write_toy(tmp_path / "a.gguf", Toy(metadata=arrays))
    hp = deepseek2.Hparams.from_gguf(GgufFile.open(path))
    assert hp.F == (96, 96) and hp.f == (7, 64) and hp.H == 4
    assert hp.dims(1)["f"] == 64 and hp.dims(1)["s"] == 64
    assert len(uses_of(path)) == len(Toy().shapes())


def test_optional_keys_have_defaults(hparams):
    """Without the keys that old converters leave out: nothing dense, scale 1, no renormalising."""
    hp = hparams(
        Toy(dense=0),
        leading_dense_block_count=None,
        expert_weights_scale=None,
        expert_weights_norm=None,
        vocab_size=None,
        rope__freq_base=None,
    )
    assert (hp.n_dense, hp.routing.scale, hp.routing.renormalise) == (0, 1.0, False)
    assert hp.n_vocab == Toy().vocab and hp.rope.base == 10000.0


def test_required_keys_are_named(hparams):
    for name in ("block_count", "context_length", "embedding_length", "attention__head_count",
                 "attention__kv_lora_rank", "attention__layer_norm_rms_epsilon",
                 "attention__q_lora_rank", "attention__key_length_mla",
                 "attention__value_length_mla"):  # fmt: skip
        key = "deepseek2." + name.replace("__", ".")
        with pytest.raises(GgufError, match=f"metadata key {key} is missing"):
            hparams(**{name: None})


# --- routing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "vocab", "sigmoid"),
    [(2, 80, False), (47, 154880, True), (48, 154880, True), (47, 80, False), (46, 154880, False)],
)
def test_gate_default(tmp_path, layers, vocab, sigmoid):
    """Without expert_gating_func softmax; sigmoid for files of GLM-4.7-Flash alone."""
    for absent in (None, 0):
        hp = of_preset(
            tmp_path, "glm47flash", layers=layers, vocab=vocab, mtp=0,
            metadata={"expert_gating_func": absent},
        )  # fmt: skip
        assert hp.routing.sigmoid is sigmoid


def test_unknown_gate(hparams):
    with pytest.raises(UnsupportedFeature, match="expert_gating_func 3"):
        hparams(expert_gating_func=3)


# --- rope ------------------------------------------------------------------------------------


def test_yarn_of_v3(tmp_path):
    """mscale 1.36889 and softmax scale 0.135234, over the real head size of 192."""
    hp = of_preset(tmp_path, "v3", layers=4)
    assert hp.rope.mscale() == pytest.approx(1.36889, abs=5e-6)
    assert hp.softmax_scale == pytest.approx(0.135234, abs=5e-7)


def test_yarn_of_v2lite(tmp_path):
    hp = of_preset(tmp_path, "v2lite", layers=2)
    assert hp.rope.mscale() == pytest.approx(1.2608, abs=5e-5)
    assert hp.softmax_scale == pytest.approx(1.2608**2 / math.sqrt(192), rel=1e-4)


def test_yarn_frequencies(tmp_path):
    """Fast pairs keep their frequency, slow ones turn 40 times slower, those between are mixed."""
    got = of_preset(tmp_path, "v3", layers=4).rope.frequencies(64)
    plain = [10000.0 ** (-2 * i / 64) for i in range(32)]
    # dim(32) = 64 ln(4096 / 64 pi) / (2 ln 10000) = 10.47, dim(1) = 22.5: the ramp of pairs 10..23
    assert got[:11] == pytest.approx(plain[:11])
    assert got[23:] == pytest.approx([x / 40 for x in plain[23:]])
    for i in range(11, 23):
        kept = 1 - (i - 10) / 13
        assert got[i] == pytest.approx(plain[i] * (kept + (1 - kept) / 40))


def test_linear_scaling_keeps_magnitude(hparams):
    """Positions are divided by the factor; neither rotation nor scale changes size."""
    hp = hparams(rope__scaling__type="linear", rope__scaling__factor=4.0)
    plain = hparams()
    assert hp.rope.mscale() == 1.0 and hp.softmax_scale == plain.softmax_scale
    assert hp.rope.frequencies(16) == pytest.approx([x / 4 for x in plain.rope.frequencies(16)])


def test_old_and_absent_scaling_keys(hparams):
    """rope.scale_linear stands in for the factor; type none and factor 0 mean unscaled."""
    assert hparams(rope__scale_linear=4.0).rope.factor == 4.0
    assert hparams(rope__scaling__type="none", rope__scaling__factor=4.0).rope.factor == 1.0
    assert hparams(rope__scaling__factor=0.0).rope.factor == 1.0
    assert hparams().rope.n_ctx_orig == TOY.n_ctx


def test_attn_factors_enter_the_scale(hparams):
    """Both keys of the attention factor multiply mscale."""
    hp = hparams(rope__scaling__attn_factor=0.5, rope__scaling__yarn_attn_factor=3.0)
    assert hp.softmax_scale == pytest.approx(1.5**2 / math.sqrt(48))


def test_unknown_rope_scaling(hparams):
    with pytest.raises(UnsupportedFeature, match="rope scaling 'longrope'"):
        hparams(rope__scaling__type="longrope")


# --- impossible values -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("attention__head_count", 0, "head_count is 0"),
        ("attention__head_count", [4, 2], "head_count differs"),
        ("attention__head_count", [4], "1 entries for 2 layers"),
        ("block_count", 0, "block_count is 0"),
        ("block_count", 4_294_967_295, "block_count"),
        ("nextn_predict_layers", 2, "all 2 blocks are MTP"),
        ("embedding_length", 0, "embedding_length is 0"),
        ("context_length", 0, "context_length is 0"),
        ("attention__kv_lora_rank", 0, "kv_lora_rank is 0"),
        ("attention__q_lora_rank", 0, "q_lora_rank is 0"),
        ("attention__value_length_mla", 0, "value_length is 0"),
        ("attention__layer_norm_rms_epsilon", 0.0, "layer_norm_rms_epsilon is 0"),
        ("attention__layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon is nan"),
        ("rope__dimension_count", 48, "48 reaches the key length 48"),
        ("rope__dimension_count", 64, "64 reaches the key length 48"),
        ("rope__dimension_count", 15, "rope.dimension_count 15 is odd"),
        ("rope__dimension_count", 0, "rope.dimension_count is 0"),
        ("rope__freq_base", 0.0, "rope base 0"),
        ("rope__scaling__factor", -1.0, "scaling factor -1"),
        ("rope__scaling__yarn_beta_fast", 0.0, "beta"),
        ("rope__scaling__yarn_beta_slow", -1.0, "beta"),
        ("expert_used_count", 0, "expert_used_count 0"),
        ("expert_used_count", 9, "expert_used_count 9 is not within 1..8"),
        ("expert_group_count", 3, "8 experts don't divide into 3 groups"),
        ("expert_group_used_count", 2, "2 of 1 expert groups"),
        ("expert_count", "many", "expert_count is 'many'"),
    ],
)
def test_impossible_values(hparams, key, value, named):
    """Each is a GgufError that names the key's value, before any tensor is looked at."""
    with pytest.raises(GgufError, match=named) as caught:
        hparams(**{key: value, "rope__scaling__type": "yarn"})
    assert caught.value.hint


def test_more_experts_used_than_the_groups_hold(hparams):
    with pytest.raises(GgufError, match="expert_used_count 3 exceeds"):
        hparams(expert_used_count=3, expert_group_count=4, expert_group_used_count=1)


# --- tensors ---------------------------------------------------------------------------------


def test_tied_output(tmp_path):
    """Without output.weight the head comes from token_embd."""
    uses = uses_of(write_toy(tmp_path / "a.gguf", Toy(tied=True)))
    output = next(use for use in uses if use.name == "output.weight")
    assert output.sources == ("token_embd.weight",)


def file_without(path, *names, renamed=(), shapes=()):
    """A toy file whose table lacks `names`, or has them under another name or shape."""

    class Bent(Toy):
        def shapes(self):
            found = {n: s for n, s in super().shapes().items() if n not in names}
            return found | dict(renamed) | dict(shapes)

    return write_toy(path, Bent())


@pytest.mark.parametrize(
    "name",
    ["token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight", "blk.1.attn_q_b.weight",
     "blk.0.ffn_down.weight", "blk.1.ffn_gate_inp.weight", "blk.1.ffn_up_exps.weight",
     "blk.1.ffn_down_shexp.weight"],
)  # fmt: skip
def test_missing_tensor_is_named(tmp_path, name):
    path = file_without(tmp_path / "a.gguf", name)
    with pytest.raises(MissingTensor, match=f"tensor {name} is missing"):
        uses_of(path)


def test_missing_k_b_and_kv_b(tmp_path):
    """Both are named: either would do."""
    path = file_without(tmp_path / "a.gguf", "blk.0.attn_k_b.weight")
    with pytest.raises(MissingTensor, match=r"attn_k_b.* is missing, and so is .*attn_kv_b"):
        uses_of(path)


def test_score_bias_is_optional_per_layer(tmp_path):
    uses = uses_of(write_toy(tmp_path / "a.gguf", Toy(layers=4, biased=(2,))))
    assert [use.layer for use in uses if use.spec.name == "exp_probs_b.bias"] == [2]


@pytest.mark.parametrize("name", ["blk.0.attn_sinks.weight", "blk.2.attn_norm.weight", "extra"])
def test_stranger_is_named(tmp_path, name):
    """A tensor nobody asked for means the file is of another kind, so it isn't just dropped."""
    path = file_without(tmp_path / "a.gguf", renamed={name: (32,)}.items())
    with pytest.raises(PlanError, match=f"tensor {name} is not part"):
        uses_of(path)


def test_known_extras_are_ignored(tmp_path):
    """rope_freqs and an attn_kv_b beside attn_k_b are no strangers."""
    extra = {"rope_freqs.weight": (8,), "blk.0.attn_kv_b.weight": (4 * 64, 32)}
    path = file_without(tmp_path / "a.gguf", renamed=extra.items())
    names = {use.name for use in uses_of(path)}
    assert names.isdisjoint(extra) and len(names) == len(TOY.shapes())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q_b.weight", (4 * 48, 64)),
        ("blk.0.attn_output.weight", (64, 96)),
        ("blk.0.attn_k_b.weight", (4, 32, 64)),
        ("blk.1.ffn_down_exps.weight", (8, 64, 32)),
        ("blk.1.ffn_up_exps.weight", (8 * 64, 64)),  # folded, which only per-head tensors may be
        ("output.weight", (81, 64)),
        ("output_norm.weight", (32,)),
    ],
)
def test_wrong_shape_is_named(tmp_path, name, shape):
    """The tensor, its shape and the shape that the metadata asks for."""
    path = file_without(tmp_path / "a.gguf", shapes={name: shape}.items())
    with pytest.raises(BadTensorShape, match=f"tensor {name} has shape") as caught:
        uses_of(path)
    assert str(list(shape)) in caught.value.message
    assert str(list(TOY.shapes()[name])) in caught.value.message


def test_symbolic_shapes():
    """The table's letters are arithmetic over dims()."""
    spec = TensorSpec("x", "H*(k+p), 2*f, d")
    assert spec.sizes({"H": 3, "k": 4, "p": 2, "f": 5, "d": 7}) == (18, 10, 7)
