"""Synthetic models: the same bytes each time, finite activations, experts chosen evenly."""

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from kit.toy_gguf import QTYPES

from mlacli.engine import Engine
from mlacli.errors import UsageError
from mlacli.flags import LOADED, library_values, to_params
from mlacli.loading import drawn, quant_types
from mlacli.loading.presets import PRESETS, preset
from mlacli.loading.synthetic import SyntheticFile
from mlacli.prepare import prepare

SMALL = {"d": 256, "heads": 2, "F": 256, "f": 256, "vocab": 512, "layers": 4, "dense": 1}


def test_a_seed_gives_the_same_bytes_in_any_order() -> None:
    first, again, other = (SyntheticFile(PRESETS["tiny"], seed=seed) for seed in (1, 1, 2))
    names = [n for n in first.tensors if "norm" not in n]
    want = {name: bytes(first.data(first.tensors[name])) for name in names}
    for name in reversed(names):
        assert bytes(again.data(again.tensors[name])) == want[name]
        assert bytes(other.data(other.tensors[name])) != want[name]
    name = "blk.1.ffn_up_exps.weight"
    assert b"".join(p.tobytes() for p in first.pieces(first.tensors[name])) == want[name]
    assert want[name] != want["blk.2.ffn_up_exps.weight"]


CUTS = (
    np.s_[:], np.s_[1:3], np.s_[:, 3:70], np.s_[..., 36:108], np.s_[2:, 1:, 144:], np.s_[None, 1:],
)  # fmt: skip


@pytest.mark.parametrize("short", [0, 1 << 30])  # all stretch by stretch, or all at once
@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_K", "IQ1_M", "Q2_K", "MXFP4"])
def test_a_slice_alone_is_that_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, name: str, short: int
) -> None:
    monkeypatch.setattr(drawn, "_SHORT", short)
    qtype = quant_types.from_id(GGMLQuantizationType[name].value, name)
    shape = 4, 77, qtype.row_bytes(512)
    whole = drawn.Drawn.whole(drawn.source("w", qtype, 0.1, 1), shape)
    want = np.concatenate(list(whole.pieces())).reshape(shape)
    for cut in CUTS:
        assert np.array_equal(np.asarray(whole[cut]), want[cut])
    assert np.array_equal(
        np.asarray(whole.reshape(-1, 7, shape[2])[3:5]), want.reshape(-1, 7, shape[2])[3:5]
    )
    values = dequantize(want.reshape(-1, shape[2]), GGMLQuantizationType(qtype.id))
    assert 0.05 < np.std(values) < 0.2 and abs(np.mean(values)) < 0.01


def test_every_type_has_scales() -> None:
    for name in QTYPES:
        qtype = quant_types.from_id(GGMLQuantizationType[name].value, name)
        if name in ("TQ1_0", "TQ2_0", "NVFP4"):
            continue
        some = drawn.source("w", qtype, 0.02, 3).draw(0, 512 * qtype.nbytes)
        values = dequantize(some.reshape(-1, qtype.nbytes), GGMLQuantizationType(qtype.id))
        assert 0.01 < np.std(values) < 0.03, name


@pytest.mark.parametrize("name", ["v2lite", "glm47flash", "v3", "kimi_k2", "mistral4", "glm5"])
def test_experts_are_chosen_evenly(name: str) -> None:
    """Each layer sees most of its experts, and none of them much more often than the others."""
    full = PRESETS[name]
    small = replace(full, **SMALL, q=full.q and 256, experts=min(64, full.experts))
    params = to_params(library_values(LOADED, {"ctx_size": 512, "device": "cpu"}))
    chosen = []
    with Engine(prepare(SyntheticFile(small), params)) as engine:
        ops = engine._ops(0)
        route = ops.route

        def watched(*args, **more):
            found = route(*args, **more)
            chosen.append(np.bincount(found.ids.ravel(), minlength=small.experts))
            return found

        ops.route = watched
        logits = engine.logits(np.random.default_rng(0).integers(0, 512, 400).tolist())
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 10
    assert len(chosen) == SMALL["layers"] - small.dense
    for counts in chosen:
        assert (counts > 0).mean() > 0.9 and counts.max() < 6 * counts.mean()


def test_presets_by_word() -> None:
    assert preset("v3").layers == 61 and preset("v3:8").layers == 8 and preset("v3:8").dense == 3
    assert preset("v3:8").name == "v3:8"
    for bad in ("v4", "v3:3", "v3:62", "v3:x", "v3:-1"):
        with pytest.raises(UsageError):
            preset(bad)
