"""Small models under compute-sanitizer: prefill in several ubatches, then captured decode.

kernels/README.md has the command. Without the sanitizer these are ordinary tests against NumPy.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kit import reference
from kit.compare import nmse
from kit.toy_gguf import Toy, write_toy

import mlacli

pytestmark = pytest.mark.sanitize
EXACT = {"cache_type_k": "f32", "graph_attn_precision": "f32"}
SMALL = Toy(d=256, heads=3, q=0, r=256, k=64, p=32, v=64, F=256, f=256, sigmoid=False)
NARROW = {"attn_k_b": "Q8_0", "attn_output": "Q5_1"}  # rows that 256-blocks don't fill
TOYS = {
    "lite": replace(SMALL, qtypes={"": "Q4_K", "ffn_down_exps": "Q6_K", **NARROW}),
    "groups": replace(
        SMALL, q=256, sigmoid=True, groups=4, groups_used=2, qtypes={"": "IQ4_XS", **NARROW}
    ),
    "odd": Toy(qtypes={"": "Q5_0", "attn_q_b": "F16"}, heads=5, vocab=77),
    "mistral4": replace(SMALL, arch="mistral4", q=256, dense=0, qtypes={"": "BF16"}),
}


@pytest.mark.parametrize("name", TOYS)
def test_prefill_and_decode(name: str, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf", TOYS[name])
    tokens = np.random.default_rng(3).integers(0, TOYS[name].vocab, 37).tolist()
    want = reference.forward(reference.load(path), tokens)
    with mlacli.load(path, device="cuda0", **EXACT, ctx_size=256, ubatch_size=17) as engine:
        got = [engine.prefill(tokens[:35])[0], *(engine.decode(token) for token in tokens[35:])]
    assert nmse(np.stack(got), want[-3:]) <= 1e-6
