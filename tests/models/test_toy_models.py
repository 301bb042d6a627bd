"""Random deepseek2 files of many makes, on uneven ranks, against the float64 reference.

The golden files have narrow experts; these have widths that several ranks share, quant blocks that
a cut runs through, and every optional part. Weakest link: tests/kit/reference.py is ours.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kit import reference
from kit.compare import nmse
from kit.toy_gguf import Toy, write_toy

import mlacli

WIDE = Toy(layers=3, heads=5, q=64, f=160, F=224, shared=2, groups=2, groups_used=1)
TOYS = {
    "wide": WIDE,
    "lite, softmax": replace(WIDE, q=0, sigmoid=False, biased=()),
    "K-quants": replace(WIDE, d=256, f=512, F=512, heads=8, r=256, q=256,
                        qtypes={"": "Q4_K", "attn_k_b": "Q8_0", "ffn_down_exps": "Q6_K"}),
    "i-quants": replace(WIDE, d=256, f=256, F=256, heads=8, r=256, q=256,
                        qtypes={"": "IQ4_XS", "attn_k_b": "IQ4_NL", "ffn_down_exps": "IQ2_XXS"}),
    "merged gate and up": replace(WIDE, merged=True, qtypes={"": "Q8_0"}),
    "kv_b of Q8_0": replace(WIDE, layout="kv_b", style="ik", qtypes={"": "Q8_0"}),
    "tied, MTP, bias on one layer": replace(WIDE, tied=True, mtp=1, biased=(2,)),
    "no shared experts": replace(WIDE, shared=0),
}  # fmt: skip
SPLITS = {
    "1": {},
    "3,2,1": {"device": "cpu,cpu,cpu", "split_mode": "graph", "tensor_split": "3,2,1"},
    "by id": {"device": "cpu,cpu,cpu", "split_mode": "graph", "expert_split": "id"},
    "by layer": {"device": "cpu,cpu", "split_mode": "graph", "expert_split": "layer"},
    "stages": {"device": "cpu,cpu", "split_mode": "layer", "tensor_split": "1,2"},
}
TOKENS = np.random.default_rng(3).integers(0, 80, 24).tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory):
    """name -> (path, float64 logits), each written once."""
    folder, made = tmp_path_factory.mktemp("toys"), {}

    def get(name: str) -> tuple[Path, np.ndarray]:
        if name not in made:
            path = write_toy(folder / f"{len(made)}.gguf", TOYS[name])
            made[name] = path, reference.forward(reference.load(path), TOKENS)
        return made[name]

    return get


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TOYS)
def test_logits_are_those_of_the_reference(files, name: str, split: str) -> None:
    path, want = files(name)
    exact = {"cache_type_k": "f32", "graph_attn_precision": "f32"}
    with mlacli.load(path, **exact, **SPLITS[split]) as engine:
        got = engine.logits(TOKENS)
    assert nmse(got, want) < (2e-4 if "kv_b" in name else 1e-9)  # k_b is requantised there
