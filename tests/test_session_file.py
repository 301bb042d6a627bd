"""--prompt-cache's file: saved in one mode, loaded in every other, bit by bit."""

from pathlib import Path

import numpy as np
import pytest

import mlacli
from mlacli import session_file
from mlacli.errors import GgufError, MlacliError

MODELS = Path(__file__).parent / "golden" / "models"
MODES = {
    "none": {},
    "layer": {"device": "cpu,cpu", "split_mode": "layer"},
    "graph": {"device": "cpu,cpu", "split_mode": "graph"},
    "graph of 3, uneven": {
        "device": "cpu,cpu,cpu", "split_mode": "graph", "tensor_split": "5,1,2",
    },
}  # fmt: skip
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 3, 23, 8, 46]


def rows(engine, n):
    """(layer, part) -> the first n cached rows, once for every rank that has them."""
    found = {}
    for ops, cache in zip(engine._ranks.ops, engine._caches, strict=True):
        for layer in cache.rows:
            for name, held, _, _ in session_file._parts(engine.prepared, cache, layer):
                found.setdefault((layer, name), []).append(ops.read_rows(held, n).copy())
    return found


def continued(engine, path=None, prompt=PROMPT):
    taken = engine.load_session(path, prompt) if path else 0
    return taken, list(engine.generate_ids(prompt, 6, reuse=taken > 0))


@pytest.mark.parametrize("model", ["v3", "glm_dsa", "mistral4"])
@pytest.mark.parametrize("cache_type", ["f32", "f16", "bf16", "q8_0"])
def test_rows_come_back_bit_by_bit(tmp_path, model, cache_type):
    flags = {"cache_type_k": cache_type, "indexer_cache_type_k": cache_type, "temp": 0}
    path = str(tmp_path / "cache.gguf")
    with mlacli.load(MODELS / f"{model}.gguf", **flags) as engine:
        engine.prefill(PROMPT)
        engine.save_session(path)
        saved = rows(engine, len(PROMPT))
    assert any(name == "index" for _, name in saved) == (model == "glm_dsa")
    with mlacli.load(MODELS / f"{model}.gguf", **flags) as engine:
        assert engine.load_session(path, PROMPT) == len(PROMPT) == engine.n_kv
        for key, (found,) in rows(engine, len(PROMPT)).items():
            np.testing.assert_array_equal(found, saved[key][0], str(key))


@pytest.mark.parametrize("model", ["v3", "glm_dsa"])
@pytest.mark.parametrize("writer", MODES)
def test_every_mode_loads_what_any_mode_saved(tmp_path, model, writer):
    exact = {"cache_type_k": "f32", "indexer_cache_type_k": "f32", "temp": 0,
             "graph_attn_precision": "f32"}  # fmt: skip
    path = str(tmp_path / "cache.gguf")
    with mlacli.load(MODELS / f"{model}.gguf", **exact, **MODES[writer]) as engine:
        expected = continued(engine)[1]
        engine.rewind(len(PROMPT))
        engine.save_session(path)
        saved = rows(engine, len(PROMPT))
    for mode in MODES.values():
        with mlacli.load(MODELS / f"{model}.gguf", **exact, **mode) as engine:
            engine.load_session(path, PROMPT)
            for key, held in rows(engine, len(PROMPT)).items():
                for found in held:
                    np.testing.assert_array_equal(found, saved[key][0], str(key))
            assert continued(engine, path) == (len(PROMPT), expected)
            assert engine.timings.n_prompt == 1, "but for the last token all rows were there"


@pytest.mark.parametrize(
    ("saver", "loader"),
    [({"mla_use": 0}, {"mla_use": 0, "device": "cpu,cpu"}),
     ({}, {"mla_use": 1, "flash_attn": "off"}), ({"mla_use": 1, "flash_attn": "off"}, {})],
)  # fmt: skip
def test_other_attention_forms(tmp_path, saver, loader):
    path = str(tmp_path / "cache.gguf")
    exact = {"cache_type_k": "f32", "cache_type_v": "f32", "temp": 0}
    with mlacli.load(MODELS / "v3.gguf", **exact, **saver) as engine:
        engine.prefill(PROMPT)
        engine.save_session(path)
    with mlacli.load(MODELS / "v3.gguf", **exact, **loader) as engine:
        expected = continued(engine)[1]
        assert continued(engine, path) == (len(PROMPT), expected)


def test_heads_keys_and_latent_rows_are_not_the_same_thing(tmp_path):
    path = str(tmp_path / "cache.gguf")
    with mlacli.load(MODELS / "v3.gguf") as engine:
        engine.prefill(PROMPT)
        engine.save_session(path)
    with mlacli.load(MODELS / "v3.gguf", mla_use=0) as engine:
        with pytest.raises(MlacliError, match="holds no keys of layer 0"):
            engine.load_session(path, PROMPT)
        assert engine.n_kv == 0


def test_only_a_common_beginning_is_taken(tmp_path):
    path = str(tmp_path / "cache.gguf")
    with mlacli.load(MODELS / "v3.gguf", temp=0) as engine:
        engine.prefill(PROMPT)
        engine.save_session(path)
        other = [*PROMPT[:4], 77, *PROMPT[5:]]
        assert engine.load_session(path, other) == 4
        assert engine.load_session(path, PROMPT[:3]) == 3
        assert engine.load_session(path, [1]) == 0
        assert engine.load_session(path, [*PROMPT, 1, 2]) == len(PROMPT)
        assert session_file.tokens(path, engine.prepared) == PROMPT


def test_another_models_file_is_refused(tmp_path):
    path = str(tmp_path / "cache.gguf")
    with mlacli.load(MODELS / "v3.gguf") as engine:
        engine.prefill(PROMPT)
        engine.save_session(path)
    others = [("v2", {}), ("v3", {"override_kv": "deepseek2.expert_used_count=int:1"})]
    for model, flags in others:
        with (
            mlacli.load(MODELS / f"{model}.gguf", **flags) as engine,
            pytest.raises(MlacliError, match="another model or other settings"),
        ):
            engine.load_session(path, PROMPT)
    with mlacli.load(MODELS / "v3.gguf") as engine:
        with pytest.raises(MlacliError, match="no prompt cache"):
            engine.load_session(str(MODELS / "v3.gguf"), PROMPT)
        with pytest.raises(MlacliError, match="can't write"):
            engine.save_session(str(tmp_path / "missing" / "cache.gguf"))


@pytest.mark.parametrize("at", range(0, 2000, 37))
def test_a_damaged_file_is_an_error_or_does_no_harm(tmp_path, at, saved_file):
    raw = bytearray(saved_file)
    path = tmp_path / "damaged.gguf"
    with mlacli.load(MODELS / "v3.gguf") as engine:
        for broken in (raw[: at * 7 % len(raw)], raw[:at] + b"\xff\xff\xff" + raw[at + 3 :]):
            path.write_bytes(broken)
            try:
                engine.load_session(str(path), PROMPT)
            except (GgufError, MlacliError) as e:
                assert e.message


@pytest.fixture(scope="module")
def saved_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("session") / "cache.gguf"
    with mlacli.load(MODELS / "v3.gguf") as engine:
        engine.prefill(PROMPT)
        engine.save_session(str(path))
    return path.read_bytes()


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "cache.gguf"
    with mlacli.load(MODELS / "v3.gguf") as engine:
        engine.prefill(PROMPT)
        engine.save_session(str(path))
        before = path.read_bytes()

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", full)
        with pytest.raises(MlacliError, match="No space"):
            engine.save_session(str(path))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_second_turn_computes_only_what_is_new():
    with mlacli.load(MODELS / "v3.gguf", temp=0, cache_type_k="f32") as engine:
        answer = list(engine.generate_ids(PROMPT, 5))
        longer = [*PROMPT, *answer, 1, 2]
        again = list(engine.generate_ids(longer, 5, reuse=True))
        assert engine.timings.n_prompt == 3, "the last answered token was never computed"
        assert again == list(engine.generate_ids(longer, 5))
        assert engine.timings.n_prompt == len(longer)


def test_warming_up_leaves_no_trace():
    with mlacli.load(MODELS / "v3.gguf", temp=0) as engine:
        engine.warm_up()
        assert engine.n_kv == 0 and not engine.attention_forms["decode"]
        assert engine.timings.n_decoded == 0 and engine.timings.load_s > 0
        warm = list(engine.generate_ids(PROMPT, 5))
    with mlacli.load(MODELS / "v3.gguf", temp=0) as engine:
        assert list(engine.generate_ids(PROMPT, 5)) == warm
