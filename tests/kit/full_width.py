"""Full-width models of few layers with random weights and random cache rows, on CPU and GPU.

No file and no disk: presets of mlacli.loading.presets, cut. Vocabulary and, where named below, the
number of experts are cut too: products stay as wide as they are, NumPy has fewer bytes to unpack.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from mlacli.backends import cuda_rows
from mlacli.engine import Engine
from mlacli.flags import LOADED, library_values, to_params
from mlacli.loading.presets import PRESETS, Preset
from mlacli.loading.synthetic import SyntheticFile
from mlacli.prepare import prepare

EXPERTS = {"v3": 32, "glm5": 32, "mistral4": 32}
VOCAB = 4096


def cut(name: str) -> Preset:
    """One layer of the model's dense kind, if it has any, and two with experts."""
    whole = PRESETS[name]
    dense, experts = min(1, whole.dense), EXPERTS.get(name, whole.experts)
    return replace(whole, dense=dense, layers=dense + 2, experts=experts, vocab=VOCAB)


def opened(preset: Preset, device: str, **flags: Any) -> Engine:
    params = to_params(library_values(LOADED, {"device": device} | flags))
    engine = Engine(prepare(SyntheticFile(preset), params))
    if device == "cpu":
        _unpack(engine)
    return engine


def _unpack(engine: Engine) -> None:
    """All experts as float32 now, by several threads: one after another takes most of the time."""
    cache = engine._ops(0).cache
    weights = [
        w
        for layer in engine._weights[0].layers.values()
        for w in (layer.ffn_gate_exps, layer.ffn_up_exps, layer.ffn_down_exps)
        if w is not None
    ]
    wanted = [(w, e) for w in weights for e in range(w.shape[0])]
    if 4 * sum(int(np.prod(w.shape)) for w in weights) > cache.budget // 2:
        return
    with ThreadPoolExecutor() as pool:
        unpacked = pool.map(lambda one: one[0].float32(one[1]), wanted)
        for (w, e), values in zip(wanted, unpacked, strict=True):
            cache._experts[w.name, e] = values
            cache.used += values.nbytes


def fill(engines: tuple[Engine, Engine], n: int, seed: int) -> None:
    """The same n random rows of spread 1 in the caches of a CPU and a GPU engine.

    Real rows are as large: a normed latent, and a key part that is a product of a normed row.
    """
    rng = np.random.default_rng(seed)
    cpu, gpu = (engine._caches[0] for engine in engines)
    device = engines[1]._ops(0).device
    pairs = [(layer.rows, gpu.rows[il].rows) for il, layer in cpu.rows.items()]
    pairs += [(rows, gpu.index_rows[il]) for il, rows in cpu.index_rows.items()]
    for here, there in pairs:
        values = rng.standard_normal((n, here.width), np.float32)
        here.write(np.arange(n), values)
        if n:
            cuda_rows.write(device, there, values)
    for engine in engines:
        engine.n_kv = n
