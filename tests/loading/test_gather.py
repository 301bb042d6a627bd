"""Gathering undoes every cut byte for byte, and --check-tensors finds what was corrupted.

The tensors' bytes are random, so that a block taken from the wrong place can't pass.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from kit import toy_gguf
from kit.toy_gguf import QTYPES, Toy, write_toy

import mlacli
from mlacli.backends.numpy_ops import NumpyOps
from mlacli.cli import run
from mlacli.devices import Device
from mlacli.errors import BackendError, GgufError
from mlacli.loading import gather as module
from mlacli.loading.gather import by_tensor, check_tensors, first_difference, gather, whole_shard
from mlacli.loading.gguf_file import GgufFile
from mlacli.loading.weights import read_shard
from mlacli.models import ARCHS
from mlacli.parallel.plan import ShardPlan, plan_shards
from mlacli.params import ContextParams, ModelParams, SplitParams

GOLDEN = Path(__file__).parents[1] / "golden" / "models"

# Rows of 512 columns, so that shares of 32-column edges cut 256-blocks anywhere.
WIDE = Toy(
    layers=2, dense=1, d=256, heads=8, q=256, r=256, k=32, p=16, v=64, f=512, F=512, experts=3,
    shared=1, vocab=70,
)  # fmt: skip
SPLITS = {
    "none": SplitParams(mode="none"),
    "two": SplitParams(mode="graph", devices=("cpu",) * 2),
    "uneven": SplitParams(mode="graph", devices=("cpu",) * 3, tensor_split=(5, 2, 3)),
    "most hold nothing": SplitParams(
        mode="graph", devices=("cpu",) * 9, tensor_split=(50, 1, 1, 30, 1, 1, 1, 20, 1)
    ),
    "more than heads": SplitParams(mode="graph", devices=("cpu",) * 11),
    "by id": SplitParams(
        mode="graph", devices=("cpu",) * 3, expert_split="id", tensor_split=(1, 3, 3)
    ),
    "more than experts": SplitParams(mode="graph", devices=("cpu",) * 7, expert_split="id"),
    "by layer": SplitParams(mode="graph", devices=("cpu",) * 2, expert_split="layer"),
    "stages": SplitParams(mode="layer", devices=("cpu",) * 2),
}


def planned(file: GgufFile, split: SplitParams, merge: bool = False):
    model = ARCHS[file.arch]
    hp = model.Hparams.from_gguf(file)
    devices = tuple(Device(f"cpu{i}", "cpu", 1 << 34, 1 << 34) for i in range(len(split.devices)))
    return hp, plan_shards(
        model, file.arch, hp, file.tensors, ModelParams(merge_up_gate_experts=merge), split,
        ContextParams(n_ctx=256), devices, devices[0],
    )  # fmt: skip


def random_bytes(shape, qtype, rng, mean=0.0) -> np.ndarray:
    """Stands in for the kit's random_weight."""
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    return rng.integers(0, 256, (*shape[:-1], shape[-1] // block * size), np.uint8)


def held(file: GgufFile, plan: ShardPlan, hp) -> dict[tuple[int, str], np.ndarray]:
    """What the ranks' memory holds: copies, by rank and tensor."""
    return {(s.rank, s.tensor): read_shard(file, s, hp).copy() for s in plan.shards}


def gathered(file: GgufFile, plan: ShardPlan, hp) -> Iterator[tuple[str, np.ndarray]]:
    memory = held(file, plan, hp)
    for tensor, shards in by_tensor(plan).items():
        yield tensor, gather(shards, {s.rank: memory[s.rank, tensor] for s in shards})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory):
    """wide("Q4_K"): a file of that type, made once."""
    folder, made = tmp_path_factory.mktemp("gather"), {}

    def get(qtype: str, **changes) -> Path:
        key = f"{qtype}-{len(changes)}"
        if key not in made:
            toy = replace(WIDE, qtypes={"": qtype, "attn_k_b": "Q8_0"}, **changes)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(toy_gguf, "random_weight", random_bytes)
                made[key] = write_toy(folder / f"{key}.gguf", toy)
        return made[key]

    return get


FEW = ("uneven", "most hold nothing", "by id")  # the cuts that differ between types
CASES = [
    (qtype, split)
    for qtype in QTYPES
    for split in (SPLITS if qtype in ("F32", "BF16", "Q8_0", "Q4_K") else FEW)
]


@pytest.mark.parametrize("qtype, split", CASES)
def test_gathering_undoes_every_cut(wide, qtype: str, split: str) -> None:
    """Mirrored, row, column, head, expert and owner cuts, by the bytes that gguf's reader sees."""
    path = wide(qtype)
    file = GgufFile.open(path)
    hp, plan = planned(file, SPLITS[split])
    wanted = {t.name: t.data.tobytes() for t in gguf.GGUFReader(str(path)).tensors}
    found = {name: raw.tobytes() for name, raw in gathered(file, plan, hp)}
    assert found == wanted


def test_the_splits_cut_256_blocks_and_leave_ranks_empty(wide) -> None:
    """What the test above means to cover is really there."""
    file = GgufFile.open(wide("Q4_K"))
    _, plan = planned(file, SPLITS["uneven"])
    for word in ("attn_output", "ffn_down_exps", "ffn_down"):
        shards = by_tensor(plan)[f"blk.{1 if 'exps' in word else 0}.{word}.weight"]
        assert any(s.start % 256 for s in shards), word
    _, plan = planned(file, SPLITS["most hold nothing"])
    assert len(by_tensor(plan)["blk.0.ffn_down.weight"]) < len(plan.ranks)
    _, plan = planned(file, SPLITS["more than heads"])
    assert len(by_tensor(plan)["blk.0.attn_output.weight"]) == 8 < len(plan.ranks)


@pytest.mark.parametrize("split", ["two", "uneven", "most hold nothing", "more than heads"])
@pytest.mark.parametrize("qtype", ["F32", "Q8_0", "Q4_K"])
def test_two_ranges_of_merged_gate_and_up(wide, qtype: str, split: str) -> None:
    path = wide(qtype, merged=True)
    file = GgufFile.open(path)
    hp, plan = planned(file, SPLITS[split])
    name = "blk.1.ffn_gate_up_exps.weight"
    assert all(len(shard.ranges) == 2 for shard in by_tensor(plan)[name])
    assert dict(gathered(file, plan, hp))[name].tobytes() == bytes(file.data(file.tensors[name]))


def test_a_cut_block_comes_from_the_rank_of_its_first_column(wide) -> None:
    """The other rank's copy of it is not looked at."""
    file = GgufFile.open(wide("Q6_K"))
    hp, plan = planned(file, SPLITS["uneven"])
    shards = by_tensor(plan)["blk.0.ffn_down.weight"]
    raws = {s.rank: read_shard(file, s, hp).copy() for s in shards}
    cut = next(s for s in shards if s.start % 256)
    raws[cut.rank][:, : cut.qtype.nbytes] ^= 0xFF
    wanted = read_shard(file, whole_shard(shards), hp)
    np.testing.assert_array_equal(gather(shards, raws), wanted)


@pytest.mark.parametrize("layout", ["kv_b", "folded"])
@pytest.mark.parametrize("split", ["two", "uneven", "more than heads"])
def test_heads_of_the_other_layouts(tmp_path, layout: str, split: str) -> None:
    """k_b and v_b made from kv_b, or folded, are what a lone rank would make of all heads."""
    toy = replace(WIDE, layout=layout, qtypes={"": "Q8_0"})
    file = GgufFile.open(write_toy(tmp_path / "x.gguf", toy))
    hp, plan = planned(file, SPLITS[split])
    _, alone = planned(file, SPLITS["none"])
    want = dict(gathered(file, alone, hp))
    found = dict(gathered(file, plan, hp))
    assert found.keys() == want.keys()
    for name, raw in want.items():
        np.testing.assert_array_equal(found[name], raw, name)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "name",
    ["v3_q8", "v3_kv_b", "v3_folded", "glm47flash_q8", "v2lite", "glm_dsa", "mistral4"],
)
def test_check_passes_on_sound_memory(name: str, split: str, monkeypatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 1000)  # many chunks
    file = GgufFile.open(GOLDEN / f"{name}.gguf")
    hp, plan = planned(file, SPLITS[split])
    memory = held(file, plan, hp)
    checked = check_tensors(file, plan, hp, lambda s: memory[s.rank, s.tensor])
    assert checked.n_tensors == len({s.tensor for s in plan.shards})
    assert checked.nbytes == sum(rank.weights for rank in plan.ranks)


@pytest.mark.parametrize("seed", range(60))
def test_one_flipped_bit_anywhere_is_found_and_named(wide, seed: int, monkeypatch) -> None:
    """Any byte of any shard on any rank: mirrored copies and blocks carried twice among them."""
    monkeypatch.setattr(module, "_refuse_non_finite", lambda *_: None)  # the bytes are random
    monkeypatch.setattr(module, "_CHUNK", 4096)
    rng = np.random.default_rng(seed)
    file = GgufFile.open(wide("Q4_K"))
    hp, plan = planned(file, list(SPLITS.values())[seed % len(SPLITS)])
    memory = held(file, plan, hp)
    shard = plan.shards[int(rng.integers(len(plan.shards)))]
    raw = memory[shard.rank, shard.tensor].reshape(-1)
    if shard.axis == len(shard.shape) - 1 and shard.start % 256 and seed % 2:
        at = int(rng.integers(shard.qtype.nbytes))  # in a block that is another rank's
    else:
        at = int(rng.integers(len(raw)))
    raw[at] ^= 1 << int(rng.integers(8))
    with pytest.raises(BackendError) as caught:
        check_tensors(file, plan, hp, lambda s: memory[s.rank, s.tensor])
    words = caught.value.message.split()
    assert words[:5] == ["tensor", shard.tensor, "on", "rank", str(shard.rank)]
    byte = int(words[words.index("byte") + 1].rstrip(":"))
    in_file = bytes(file.data(file.tensors[shard.tensor]))[byte]
    assert f"{raw[at]:#04x} in memory, {in_file:#04x} in the file" in caught.value.message


def test_the_first_differing_byte_is_named() -> None:
    a = np.zeros((3, 4, 5), np.uint8)
    b = a.copy()
    assert first_difference(a, b) is None
    b[2, 3, 4] = 1
    assert first_difference(a, b) == 59
    b[1, 0, 2] = 1
    assert first_difference(a, b) == 22
    assert first_difference(a[0, 0], b[1, 0]) == 2


FLAGS = {
    "mirrored": ("blk.0.attn_norm.weight", {"split_mode": "graph"}),
    "head rows": ("blk.1.attn_q_b.weight", {"split_mode": "graph"}),
    "columns": ("blk.1.attn_output.weight", {"split_mode": "graph"}),
    "derived": ("blk.1.attn_k_b.weight", {"split_mode": "graph"}),
    "experts by id": ("blk.1.ffn_up_exps.weight", {"split_mode": "graph", "expert_split": "id"}),
    "vocabulary": ("output.weight", {"split_mode": "graph"}),
    "stage": ("blk.1.ffn_norm.weight", {"split_mode": "layer"}),
}


@pytest.mark.parametrize("command", ["run-model", "sweep-bench"])
def test_the_commands_say_what_they_checked(command: str, capsys) -> None:
    words = ["-m", str(GOLDEN / "v3_q8.gguf"), "-c", "256", "-ub", "128", "--check-tensors"]
    words += ["--prompt-ids", "1,2", "-n", "1"] if command == "run-model" else ["-n", "1"]
    assert run([command, *words, "-dev", "cpu,cpu", "-sm", "graph"]) == 0
    err = capsys.readouterr().err
    assert re.search(r"^checked \d\d tensors, 0\.\d\d GiB$", err, re.MULTILINE)
    assert run(["plan", "-m", str(GOLDEN / "v3_q8.gguf"), "--check-tensors"]) == 2  # reads none


@pytest.mark.parametrize("what", FLAGS)
def test_the_engine_checks_what_the_ranks_hold(what: str, monkeypatch) -> None:
    """A byte that changes on its way into rank 1's memory."""
    tensor, flags = FLAGS[what]
    plain = NumpyOps.upload

    def upload(self, raw, shard):
        if shard.tensor == tensor and shard.rank == 1:
            raw = raw.copy()
            raw.reshape(-1)[-1] ^= 0x10
        return plain(self, raw, shard)

    path = GOLDEN / "v3_kv_b.gguf"
    with mlacli.load(path, device="cpu,cpu", check_tensors=True, **flags) as engine:
        assert engine.checked.nbytes == sum(r.weights for r in engine.prepared.plan.ranks)
    monkeypatch.setattr(NumpyOps, "upload", upload)
    with pytest.raises(BackendError, match=f"tensor {tensor} on rank 1 differs"):
        mlacli.load(path, device="cpu,cpu", check_tensors=True, **flags)
    with mlacli.load(path, device="cpu,cpu", **flags) as engine:
        assert engine.checked is None


@pytest.mark.parametrize(
    "tensor, raw, shown",
    [
        ("blk.1.ffn_norm.weight", np.float32(np.nan).tobytes(), "nan in row 0, column 3"),
        ("blk.0.attn_output.weight", np.float16(np.inf).tobytes(), "in row 0, column 0"),
        ("blk.1.ffn_down_exps.weight", np.float16(np.nan).tobytes(), "nan in row 0, column 0"),
    ],
)
def test_weights_that_are_not_finite_are_named(tmp_path, tensor, raw, shown) -> None:
    path = write_toy(
        tmp_path / "x.gguf", Toy(qtypes={"attn_output": "Q8_0", "ffn_down_exps": "Q8_0"})
    )
    info = GgufFile.open(path).tensors[tensor]
    with path.open("r+b") as out:
        out.seek(info.offset + (12 if len(info.shape) == 1 else 0))
        out.write(raw)
    with pytest.raises(GgufError, match=f"tensor {tensor} holds .*{shown}"):
        mlacli.load(path, check_tensors=True)
    with pytest.raises(GgufError, match=f"tensor {tensor} holds .*{shown}"):
        mlacli.load(path, check_tensors=True, device="cpu,cpu,cpu", split_mode="graph")
