"""-ot, -ncmoe and -cmoe on a plan: what stays on the host, what it costs, what is refused."""

import json
from dataclasses import replace

import pytest
from kit.toy_gguf import Toy, header_only, write_toy

from mlacli.cli import run
from mlacli.devices import Device
from mlacli.errors import MemoryBudgetError, UsageError
from mlacli.loading.gguf_file import GgufFile
from mlacli.models import deepseek2
from mlacli.parallel import host_stream
from mlacli.parallel.host_stream import SLOTS, Stored, chunk_experts, ring_slot_bytes, slot_offsets
from mlacli.parallel.plan import ShardPlan, check_memory, plan_shards
from mlacli.parallel.plan_report import memory_rows, plan_as_dict, plan_rows, shard_rows
from mlacli.params import ContextParams, ModelParams, SplitParams

G = 1 << 30
HOST = Device("host", "cpu", 64 * G, 48 * G)
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@pytest.fixture(scope="module")
def v2lite(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    return GgufFile.open(header_only(tmp_path_factory.mktemp("plans") / "a.gguf", "v2lite"))


def plan_of(
    file: GgufFile, n_gpus: int = 1, host: Device = HOST, mode: str = "layer", **flags: object
) -> ShardPlan:
    devices = [Device(f"cuda{i}", "cuda", 80 * G, 80 * G) for i in range(n_gpus)]
    return plan_shards(
        deepseek2, "deepseek2", deepseek2.Hparams.from_gguf(file), file.tensors,
        ModelParams(**flags), SplitParams(mode=mode), ContextParams(n_ctx=4096), devices, host,
    )  # fmt: skip


def on_host(plan: ShardPlan) -> set[str]:
    return {shard.tensor for shard in plan.shards if shard.host}


def experts(layers: range, words: tuple[str, ...] = EXPERTS) -> set[str]:
    return {f"blk.{i}.{word}.weight" for i in layers for word in words}


@pytest.mark.parametrize("n_gpus", [1, 2])
@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ({"cpu_moe": True}, experts(range(1, 27))),
        ({"n_cpu_moe": 3}, experts(range(1, 3))),  # layer 0 has no experts
        ({"n_cpu_moe": 999}, experts(range(1, 27))),
        ({"override_tensor": ("exps=CPU",)}, experts(range(1, 27))),
        ({"override_tensor": (r"blk\.[2-4]\.=CUDA0,exps=CPU",)},
         experts(range(1, 2)) | experts(range(5, 27))),
        ({"override_tensor": ("ffn_up_exps=cpu", r"blk\.7\.attn_output=CPU")},
         experts(range(1, 27), ("ffn_up_exps",)) | {"blk.7.attn_output.weight"}),
    ],
    ids=["all", "three", "many", "ot", "exceptions", "mixed"],
)  # fmt: skip
def test_what_stays_on_the_host(v2lite, n_gpus, flags, want):
    plan = plan_of(v2lite, n_gpus, **flags)
    assert on_host(plan) == want


def test_bytes_move_from_the_gpu_to_the_host(v2lite):
    all_there, plan = plan_of(v2lite), plan_of(v2lite, cpu_moe=True)
    moved = sum(shard.bytes_on("cuda") for shard in plan.shards if shard.host)
    (rank,), (before,) = plan.ranks, all_there.ranks
    assert rank.host == moved > 8 * G and rank.weights == before.weights - moved
    layer = [Stored(s.shape, s.qtype, s.tiled) for s in plan.shards if s.host and s.layer == 1]
    assert rank.scratch == before.scratch + SLOTS * ring_slot_bytes([layer])
    check_memory(plan)


def test_more_than_the_host_has(v2lite):
    small = replace(HOST, free=8 * G)
    with pytest.raises(MemoryBudgetError, match="host") as caught:
        check_memory(plan_of(v2lite, host=small, cpu_moe=True))
    assert "-ncmoe" in caught.value.hint
    check_memory(plan_of(v2lite, host=small, n_cpu_moe=12))
    check_memory(plan_of(v2lite, host=small))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"override_tensor": ("exps=CUDA1",)}, "the run has no device CUDA1"),
        ({"override_tensor": ("exps=CPU", "exps=CUDA0")}, "exps=CPU and exps=CUDA0 contradict"),
        ({"override_tensor": (r"blk\.3\.=CUDA0",), "cpu_moe": True}, "and -cmoe contradict"),
        ({"override_tensor": (r"blk\.3\.=CUDA0",), "n_cpu_moe": 4}, "and -ncmoe 4 contradict"),
    ],
)
def test_what_is_refused(v2lite, flags, message):
    with pytest.raises(UsageError, match=message):
        plan_of(v2lite, **flags)


def test_another_gpu_than_the_layer_s(v2lite):
    plan_of(v2lite, 2, override_tensor=(r"blk\.3\.=CUDA0",))
    with pytest.raises(UsageError, match="can't lie on CUDA1, as its layer is computed on CUDA0"):
        plan_of(v2lite, 2, override_tensor=(r"blk\.3\.=CUDA1",))


def test_ngl_and_a_rule_of_ot(v2lite):
    """A rule for a tensor wins over a count of layers."""
    devices = [Device("cuda0", "cuda", 80 * G, 80 * G)]
    plan = plan_shards(
        deepseek2, "deepseek2", deepseek2.Hparams.from_gguf(v2lite), v2lite.tensors,
        ModelParams(override_tensor=("attn=CUDA0",)), SplitParams(mode="none", n_gpu_layers=25),
        ContextParams(n_ctx=4096), devices, HOST,
    )  # fmt: skip
    assert {name.split(".")[1] for name in on_host(plan)} == {"0", "1"}
    assert not any("attn" in name for name in on_host(plan))


def test_the_plan_says_it(v2lite):
    plan = plan_of(v2lite, cpu_moe=True)
    columns, ((*_, held, have),) = plan_rows(plan)
    assert columns[-2] == "in host memory" and "GiB" in held and "47.00 GiB" in have
    assert "in host memory" not in plan_rows(plan_of(v2lite))[0]
    assert plan_as_dict(plan)["ranks"][0]["bytes"]["host"] == plan.ranks[0].host
    assert memory_rows(plan, ())[1][-1][0] == "host"
    marked = {row[1] for row in shard_rows(plan)[1] if row[5].endswith(", in host memory")}
    assert marked == on_host(plan)


def test_rules_without_effect_warn(tmp_path, capsys):
    path = write_toy(tmp_path / "a.gguf", Toy())
    rules = "exps=CPU,ffn_up_exps=CUDA0,nothing=CPU"
    assert run(["plan", "-m", str(path), "--vram", "8G", "-ot", rules, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["ranks"][0]["bytes"]["host"] > 0
    assert "ffn_up_exps=CUDA0 places nothing: all that it matches are taken" in err
    assert "nothing=CPU places nothing: no tensor's name matches it" in err
    assert "exps=CPU places nothing" not in err.replace("ffn_up_exps=CUDA0", "")


def test_chunks(v2lite, monkeypatch):
    plan = plan_of(v2lite, cpu_moe=True)
    layer = [Stored(s.shape, s.qtype, s.tiled) for s in plan.shards if s.host and s.layer == 1]
    one = slot_offsets(layer, 1)[-1]
    for most in (1, one, 5 * one, 63 * one, 64 * one, 1 << 40):
        monkeypatch.setattr(host_stream, "SLOT_BYTES", most)
        n = chunk_experts(layer)
        assert 1 <= n <= 64 and (n == 1 or slot_offsets(layer, n)[-1] <= most)
        assert -(-64 // n) == -(-64 // min(64, max(1, most // one)))
