"""What happens between flags and weights: guard first, then checks, mode, sizes, memory."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from kit.toy_gguf import TOY, Toy, header_only, write_toy

import mlacli.prepare as prepare_module
from mlacli.errors import (
    BackendError,
    GgufError,
    MemoryBudgetError,
    StrictDowngrade,
    UnsupportedFeature,
    UsageError,
)
from mlacli.flags import to_params
from mlacli.loading.gguf_file import GgufFile
from mlacli.prepare import prepare

G = 1 << 30


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("prepare") / "toy.gguf", Toy(n_ctx=2048))


@pytest.fixture(scope="module")
def v2lite(tmp_path_factory):
    return header_only(tmp_path_factory.mktemp("prepare") / "v2lite.gguf", "v2lite")


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """prepare() reads no weight byte, whatever it decides."""

    def refuse(self, info):
        raise AssertionError(f"{info.name} was read")

    monkeypatch.setattr(GgufFile, "data", refuse)


def ask(path, **values):
    """prepare() with `values` as given flags, spelled by their long names."""
    typed = {key: "--" + key.replace("_", "-") for key in values}
    return prepare(path, to_params(values, typed))


def verdicts(prepared):
    return [f.verdict for f in prepared.findings]


TWO = {"device": ("cpu", "cpu")}


# --- guard and checks ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [("n_cpu_moe", 3), ("cpu_moe", True), ("run_time_repack", True),
     ("merge_up_gate_experts", True), ("override_tensor", ("exps=CPU",))],
)  # fmt: skip
def test_guard_turns_graph_into_layer(toy, flag, value):
    """One warning that names the flag as typed; the plan is a layer plan."""
    found = ask(toy, split_mode="graph", **{flag: value}, **TWO)
    assert found.params.split.mode == "layer" == found.plan.mode
    warnings = [f for f in found.findings if f.level == "warning"]
    assert [f.verdict for f in warnings] == ["downgraded"]
    assert "--" + flag.replace("_", "-") in warnings[0].message
    assert [r.layers for r in found.plan.ranks] == [(0, 1), (1, 2)]


def test_guard_comes_before_the_attention_checks(toy):
    """With -cmoe the run is no graph run any more, so graph's own demands aren't cited."""
    for bad in ({"flash_attn": False}, {"mla_use": 0}):
        with pytest.raises(UsageError, match="-sm graph needs"):
            ask(toy, split_mode="graph", **bad, **TWO)
        assert ask(toy, split_mode="graph", cpu_moe=True, **bad, **TWO).plan.mode == "layer"


def test_guard_comes_before_the_one_device_warning(toy):
    """One device: alone it is reported as one rank, after the guard only the guard speaks."""
    assert verdicts(ask(toy, split_mode="graph")) == ["changed"]
    found = ask(toy, split_mode="graph", cpu_moe=True)
    assert [f.verdict for f in found.findings if f.level == "warning"] == ["downgraded"]


def test_flag_checks_come_before_the_file_is_understood(tmp_path):
    """A usage error is reported even when the metadata is broken too."""
    path = write_toy(tmp_path / "a.gguf", Toy(metadata={"attention.head_count": 0}))
    with pytest.raises(UsageError):
        ask(path, split_mode="graph", flash_attn=False, **TWO)
    with pytest.raises(GgufError, match="head_count is 0"):
        ask(path)


@pytest.mark.parametrize(
    "values",
    [{"split_mode": "graph", "cpu_moe": True, **TWO}, {"split_mode": "graph"}],
    ids=["guard", "one device"],
)
def test_strict_refuses_every_change(toy, values):
    """--strict: exit 3 instead of a warning."""
    assert ask(toy, **values).findings
    with pytest.raises(StrictDowngrade) as caught:
        ask(toy, strict=True, **values)
    assert caught.value.exit_code == 3 and "--strict" in caught.value.hint


def test_strict_says_what_would_run(toy):
    with pytest.raises(StrictDowngrade, match="so -sm layer takes its place"):
        ask(toy, split_mode="graph", cpu_moe=True, strict=True, **TWO)


def test_strict_lets_notes_pass(toy):
    """A flag without effect is no change of what was asked."""
    found = ask(toy, strict=True, cache_type_v="f16", run_time_repack=True)
    assert set(verdicts(found)) == {"no effect"} and len(found.findings) == 2


def test_unknown_architecture(tmp_path):
    path = write_toy(tmp_path / "a.gguf", Toy(metadata={"general.architecture": "llama"}))
    with pytest.raises(UnsupportedFeature, match="architecture 'llama' is not supported") as caught:
        ask(path)
    assert "deepseek2" in caught.value.hint


def test_guard_knows_other_mla_architectures(tmp_path):
    """On an architecture without MLA the guard is silent; the refusal is the architecture's."""
    path = write_toy(tmp_path / "a.gguf", Toy(metadata={"general.architecture": "qwen3moe"}))
    with pytest.raises(UnsupportedFeature):
        ask(path, split_mode="graph", cpu_moe=True, strict=True, **TWO)


def test_no_architecture(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    with pytest.raises(GgufError, match="names no architecture"):
        ask(path)


def test_types_that_cannot_be_unpacked_are_named(tmp_path):
    """I32 is a GGUF type, but no weight's."""
    path = tmp_path / "a.gguf"
    write_toy(path)
    raw = bytearray(path.read_bytes())
    name = b"blk.0.attn_output.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8  # past the name, n_dims and two sizes
    assert raw[at : at + 4] == b"\0\0\0\0"  # F32
    raw[at] = 26
    path.write_bytes(raw)
    with pytest.raises(UnsupportedFeature, match=r"blk.0.attn_output.weight has type I32"):
        ask(path)


def test_override_kv_reaches_the_hparams(toy):
    found = ask(toy, override_kv=(("deepseek2.expert_used_count", 4),))
    assert found.hparams.routing.n_used == 4


def test_a_refused_file_is_closed(toy, monkeypatch):
    """No map stays open behind an error."""
    closed = []
    close = GgufFile.close
    monkeypatch.setattr(GgufFile, "close", lambda self: closed.append(1) or close(self))
    with pytest.raises(UsageError):
        ask(toy, flash_attn=False, split_mode="graph")
    assert closed == [1]


# --- devices and mode ------------------------------------------------------------------------


def test_default_mode(toy):
    """none on one device, layer on several, described ones included."""
    assert ask(toy).plan.mode == "none"
    assert ask(toy, **TWO).plan.mode == "layer"
    assert ask(toy, vram=(8 * G, 8 * G)).plan.mode == "layer"
    assert ask(toy, vram=(8 * G,)).plan.mode == "none"


def test_auto_takes_the_fastest_that_fits(v2lite, toy):
    """-sm auto: on GPUs by the plan's bytes and the sums' time; a tiny model stays on one."""
    found = ask(v2lite, split_mode="auto", vram=(24 * G, 24 * G))
    assert found.plan.mode == "graph" == found.params.split.mode
    assert len(found.plan.ranks) == 2
    assert ask(v2lite, split_mode="auto", vram=(24 * G,)).plan.mode == "none"
    assert ask(toy, split_mode="auto", vram=(24 * G, 24 * G)).plan.mode == "none"
    assert ask(toy, split_mode="auto", **TWO).plan.mode == "none"
    with pytest.raises(MemoryBudgetError):
        ask(v2lite, split_mode="auto", vram=(6 * G,))


def test_auto_takes_no_mode_that_other_flags_forbid(v2lite):
    """Neither -sm graph's guard nor its checks speak up: another mode is taken."""
    for flags in ({"mla_use": 0}, {"flash_attn": False}, {"gpu_layers": 5}):
        found = ask(v2lite, split_mode="auto", vram=(32 * G, 32 * G), ctx_size=4096, **flags)
        assert found.plan.mode == "none"
        assert not [f for f in found.findings if "-sm" in f.message]


def test_auto_minds_the_context(v2lite):
    """What fits alone with a short context may need two devices with a long one."""
    wanted = {"split_mode": "auto", "vram": (14 * G, 14 * G), "flash_attn": False}
    assert ask(v2lite, **wanted, ctx_size=4096).plan.mode == "none"
    assert ask(v2lite, **wanted, ctx_size=163840).plan.mode == "layer"


@pytest.mark.parametrize("mode", ["none", "layer", "graph"])
def test_main_gpu_beyond_the_devices(toy, mode):
    with pytest.raises(UsageError, match="-mg 2 names no device: there are 2"):
        ask(toy, split_mode=mode, main_gpu=2, **TWO)


def test_absent_gpu(toy):
    with pytest.raises(BackendError, match="device cuda99 is not available"):
        ask(toy, device=("cuda99",))


# --- sizes -----------------------------------------------------------------------------------


def test_memory_is_refused_before_anything_loads(v2lite, monkeypatch):
    """On the CPU too: what must fit is the cache and the scratch, and the message has numbers."""
    monkeypatch.setattr(prepare_module, "host_memory", lambda: (2 * G, 2 * G))
    monkeypatch.setattr("mlacli.devices.host_memory", lambda: (2 * G, 2 * G))
    with pytest.raises(MemoryBudgetError, match=r"device cpu needs .* GiB, has 1\.00 GiB"):
        ask(v2lite, ctx_size=163840)
    assert ask(v2lite, ctx_size=1024).plan.n_ctx == 1024


def test_context_default(v2lite, toy):
    """-c absent or 0: the smaller of the training context and what fits."""
    assert ask(v2lite, vram=(80 * G,)).plan.n_ctx == 163840
    tight = ask(v2lite, vram=(14 * G,), ctx_size=0)
    assert tight.plan.n_ctx == tight.plan.n_ctx_fits < 163840
    assert tight.params.context.n_ctx == tight.plan.n_ctx
    assert ask(toy).plan.n_ctx == 2048


@pytest.mark.parametrize(("asked", "n_ctx"), [(1, 256), (256, 256), (257, 512), (1000, 1024)])
def test_context_is_rounded_up_to_256(toy, asked, n_ctx):
    found = ask(toy, ctx_size=asked)
    assert found.plan.n_ctx == n_ctx == found.params.context.n_ctx
    assert found.plan.ranks[0].cache == n_ctx * 2 * 48 * 2


@pytest.mark.parametrize(
    ("batch", "ubatch", "n_ctx", "settled"),
    [
        (2048, 512, 2048, (2048, 512)),
        (256, 512, 2048, (256, 256)),  # ubatch to batch
        (2048, 512, 256, (256, 256)),  # both to the context
        (4096, 4096, 1024, (1024, 1024)),
        (1, 1, 512, (1, 1)),
    ],
)
def test_batches_are_clipped(toy, batch, ubatch, n_ctx, settled):
    context = ask(toy, batch_size=batch, ubatch_size=ubatch, ctx_size=n_ctx).params.context
    assert (context.n_batch, context.n_ubatch) == settled


def test_context_beyond_training_warns(toy):
    """Asked for more than trained: a warning, and the run goes on."""
    found = ask(toy, ctx_size=4096)
    assert found.plan.n_ctx == 4096
    assert [f.level for f in found.findings] == ["warning"]
    assert "4096 exceeds the training context of 2048" in found.findings[0].message
    assert verdicts(found) == ["warned"]
    assert verdicts(ask(toy, ctx_size=4096, strict=True)) == ["warned"]
    assert ask(toy, ctx_size=2048).findings == ()


def test_rounding_is_no_context_beyond_training(tmp_path):
    """A training context of 300 is rounded to 512 rows; nobody asked for more than trained."""
    path = write_toy(tmp_path / "a.gguf", replace(TOY, n_ctx=300))
    for values in ({}, {"ctx_size": 300}):
        found = ask(path, **values)
        assert found.plan.n_ctx == 512 and found.findings == ()


# --- what is reported ------------------------------------------------------------------------


def test_effective_rows(toy):
    """Name, value and note of everything that will run."""
    found = ask(toy, split_mode="graph", expert_split="id", ctx_size=300, **TWO)
    rows = {name: (value, note) for name, value, note in found.effective}
    assert rows["model"] == (str(toy), "toy")
    assert rows["architecture"] == ("deepseek2", "")
    assert rows["split mode"] == ("graph", "experts by id")
    assert rows["devices"] == ("cpu,cpu", "")
    assert rows["context"][0] == "512" and "trained with 2048" in rows["context"][1]
    assert rows["batch"][0] == "512 / 512"
    forms = "prefill expanded block-wise (absorbed block-wise under 128 tokens), decode absorbed"
    assert rows["attention"] == ("-mla 3 -fa on", f"{forms} block-wise; -gap f16")
    assert rows["cache type"] == ("f16", "latent rows") and rows["reduce type"][0] == "f32"
    assert all(len(row) == 3 for row in found.effective)


def test_effective_attention_is_what_runs(toy):
    """-fa off has no -gap, -mla 2 is 3 under graph, a small -amb is lifted."""

    def rows(**values):
        found = {name: (value, note) for name, value, note in ask(toy, **values).effective}
        return *found["attention"], *found["cache type"]

    one = rows(mla_use=1, flash_attn=False, cache_type_k="q8_0", attention_max_batch=64)
    assert one[0] == "-mla 1 -fa off"
    assert one[1] == "prefill absorbed whole-matrix, decode absorbed whole-matrix; -amb 128"
    assert one[2:] == ("q8_0 / f16", "latent rows / their transposed values")
    assert rows(mla_use=0)[3] == "keys per head / values per head"
    assert rows(mla_use=2)[1].endswith("decode absorbed whole-matrix; -gap f16; -amb 256")
    assert rows(mla_use=2, split_mode="graph", **TWO) == rows(split_mode="graph", **TWO)


def test_effective_rows_name_what_is_idle_and_without_effect(tmp_path):
    """Idle devices, skipped MTP blocks and flags without effect each have their line."""
    path = write_toy(tmp_path / "a.gguf", Toy(mtp=1))
    found = ask(
        path, split_mode="graph", vram=(8 * G, 4 * G), tensor_split=(0.0, 1.0), cache_type_v="f16"
    )
    rows = {name: (value, note) for name, value, note in found.effective}
    assert rows["devices"] == ("gpu1", "idle: gpu0")
    assert rows["architecture"][1] == "1 MTP blocks skipped"
    assert rows["--cache-type-v"][0] == "no effect"
    assert ask(path).plan.ranks[0].device == "cpu"


def test_threads_are_divided(toy):
    found = ask(toy, threads=5, split_mode="graph", **TWO)
    rows = {name: (value, note) for name, value, note in found.effective}
    assert found.n_threads == 5 and rows["threads"] == ("5", "2 a rank")


def test_speed_is_predicted_on_the_cpu_only(toy, v2lite):
    assert ask(toy).predicted_tps > 0
    assert ask(v2lite, vram=(80 * G,)).predicted_tps is None


def test_a_file_without_tokenizer_is_prepared(toy):
    assert ask(toy).tokenizer() is None


def test_the_predicted_speed_tells_a_hopeless_run_from_a_quick_one(tmp_path: Path) -> None:
    """A whole DeepSeek-V3 is under one token a second on any CPU, a toy far above."""
    huge = prepare(header_only(tmp_path / "v3.gguf", "v3"), to_params({"ctx_size": 256}))
    assert huge.predicted_tps is not None and huge.predicted_tps < 1
    small = prepare(write_toy(tmp_path / "toy.gguf"), to_params({}))
    assert small.predicted_tps is not None and small.predicted_tps > 50


def test_small_products_get_one_thread_and_large_ones_all_cores(tmp_path: Path) -> None:
    small = prepare(write_toy(tmp_path / "toy.gguf"), to_params({}))
    large = prepare(header_only(tmp_path / "v3.gguf", "v3"), to_params({"ctx_size": 256}))
    assert small.n_threads == 1
    assert large.n_threads == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "n_gpus, values, said",
    [
        (2, {}, True),
        (0, {}, False),
        (2, {"device": ("cpu",)}, False),
        (2, {"vram": (1 << 34,)}, False),
    ],
)
def test_gpus_without_cupy_are_not_passed_over_in_silence(toy, monkeypatch, n_gpus, values, said):
    monkeypatch.setattr("mlacli.prepare.idle_gpus", lambda: n_gpus)
    found = [f for f in ask(toy, **values).findings if "CuPy" in f.message]
    assert len(found) == said
    assert not said or (found[0].level == "warning" and "mlacli[cuda13]" in found[0].hint)
