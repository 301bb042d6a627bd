"""Synthetic models: the same bytes each time, finite activations, experts chosen evenly."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mlacli.engine import Engine
from mlacli.errors import UsageError
from mlacli.flags import LOADED, library_values, to_params
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


def test_two_tensors_are_there_at_once_where_buffers_are_used_again() -> None:
    fresh, again = SyntheticFile(PRESETS["tiny"]), SyntheticFile(PRESETS["tiny"], copied=True)
    names = list(fresh.tensors)
    held = [again.data(again.tensors[name]) for name in names[:1]]
    for last, name in itertools.pairwise(names):
        held.append(again.data(again.tensors[name]))
        assert bytes(held[-2]) == bytes(fresh.data(fresh.tensors[last]))
    assert bytes(held[-1]) == bytes(fresh.data(fresh.tensors[names[-1]]))


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
