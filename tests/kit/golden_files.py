"""The golden models, the splits they run under, and logits of a run: shared by the model tests."""

from pathlib import Path

import numpy as np

import mlacli

MODELS = Path(__file__).parents[1] / "golden" / "models"
FILES = {path.stem: path for path in sorted(MODELS.glob("*.gguf"))}
EXACT = {"cache_type_k": "f32", "indexer_cache_type_k": "f32", "graph_attn_precision": "f32"}
SPLITS = {
    "1 rank": {},
    "2 ranks": {"device": "cpu,cpu", "split_mode": "graph"},
    "3 ranks": {"device": "cpu,cpu,cpu", "split_mode": "graph"},
    "5 ranks": {"device": "cpu,cpu,cpu,cpu,cpu", "split_mode": "graph"},
    "8 ranks": {"device": ",".join(["cpu"] * 8), "split_mode": "graph"},
    "-ts 3,1": {"device": "cpu,cpu", "split_mode": "graph", "tensor_split": "3,1"},
    "-ts 1,0": {"device": "cpu,cpu", "split_mode": "graph", "tensor_split": "1,0"},
    "experts by id": {"device": "cpu,cpu,cpu", "split_mode": "graph", "expert_split": "id"},
    "experts by layer": {"device": "cpu,cpu,cpu", "split_mode": "graph", "expert_split": "layer"},
    "2 stages": {"device": "cpu,cpu", "split_mode": "layer"},
}


def golden(name: str, which: str = "logits") -> tuple[list[int], np.ndarray]:
    """(tokens, float32 logits [n, V]); the other layouts of v3 hold the same weights."""
    data = np.load(MODELS / f"{'v3' if name in ('v3_kv_b', 'v3_folded') else name}.npz")
    return data["tokens"].tolist(), data[which]


def logits(path: Path, tokens: list[int], **flags: object) -> np.ndarray:
    with mlacli.load(path, **flags) as engine:
        return engine.logits(tokens)
