"""sweep-bench: order of measurements, room, and the lines of ik_llama.cpp's tool."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

from mlacli.cli.sweep_output import md_row, row_values
from mlacli.errors import RankError, UsageError
from mlacli.params import Params
from mlacli.sweep import SweepRow, sweep_shape

MODEL = str(Path(__file__).parents[1] / "golden" / "models" / "v3.gguf")
FLAGS = ("sweep-bench", "-m", "toy.gguf", "-ub", "64", "-t", "2")


def numbers(line):
    return [float(cell) for cell in line.strip("|").split("|")]


def test_markdown_lines_are_those_of_the_original(mlacli, fake_model):
    done = mlacli(*FLAGS)
    assert done.code == 0
    head, rule, *rows = done.out.splitlines()
    assert head == "|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |"
    assert rule == "|-------|--------|--------|----------|----------|----------|----------|"
    assert [numbers(row)[:3] for row in rows] == [[64, 16, n] for n in (0, 64, 128, 192)]
    assert (
        "main: n_kv_max = 256, n_batch = 2048, n_ubatch = 64, flash_attn = 1, "
        "n_gpu_layers = -1, n_threads = 2, n_threads_batch = 2\n"
    ) in done.err


def test_a_row_has_the_widths_and_decimals_of_the_original():
    row = SweepRow(512, 128, 1024, 1.3052, 2.0714)
    assert md_row(row) == "|   512 |    128 |   1024 |    1.305 |   392.28 |    2.071 |    61.79 |"
    assert row_values(row) == {
        "pp": 512,
        "tg": 128,
        "n_kv": 1024,
        "t_pp": 1.3052,
        "speed_pp": 392.277046,
        "t_tg": 2.0714,
        "speed_tg": 61.793956,
    }


def test_jsonl_keys_are_those_of_the_original(mlacli, fake_model):
    done = mlacli(*FLAGS, "--output-format", "jsonl", "-n", "3", "-fa", "off")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert list(rows[0]) == [
        *("n_kv_max", "n_batch", "n_ubatch", "flash_attn", "n_gpu_layers", "n_threads"),
        *("n_threads_batch", "pp", "tg", "n_kv", "t_pp", "speed_pp", "t_tg", "speed_tg"),
        *("split_mode", "step_p50", "step_p99", "memory", "failed"),
        *("attention_prefill", "attention_decode", "config"),
    ]
    assert (rows[0]["attention_prefill"], rows[0]["attention_decode"]) == ("toy form", "other form")
    assert rows[0]["config"]["context"] == "256 (given)"
    assert rows[0]["memory"] == {"cpu": 32 << 20} and rows[0]["failed"] is None
    assert 0 < rows[0]["step_p50"] <= rows[0]["step_p99"] <= rows[0]["t_tg"] + 1e-6
    assert [(r["pp"], r["tg"], r["n_kv"], r["flash_attn"]) for r in rows] == [
        (64, 3, n, 0) for n in (0, 64, 128, 192)
    ]


def test_verbose_says_how_evenly_tokens_came(mlacli, fake_model):
    lines = [x for x in mlacli(*FLAGS, "-v").err.splitlines() if "for 99 of 100" in x]
    assert len(lines) == 4
    assert re.match(r"N_KV 0, -sm \w+: a token took [\d.]+ ms, at most [\d.]+ ms \(", lines[0])
    assert not any("for 99 of" in x for x in mlacli(*FLAGS).err.splitlines())


@pytest.mark.parametrize("words", [FLAGS, ("run-model", "-m", "toy.gguf", "-p", "hello")])
def test_verbose_says_which_attention_ran(mlacli, fake_model, words):
    line = "attention  prefill toy form, decode other form\n"
    assert line in mlacli(*words, "-v").err
    assert line not in mlacli(*words).err


def test_decode_comes_before_prefill_and_is_rewound(mlacli, fake_model):
    mlacli(*FLAGS, "-n", "2")
    assert fake_model.calls[:2] == [("turn", None), ("decode", 0)], "one token warms up"
    row = fake_model.calls[8:14]
    assert row == [
        ("turn", None),
        ("rewind", 64),
        ("decode", 64),
        ("decode", 65),
        ("rewind", 64),
        ("prefill", 64, 64),
    ]


def test_what_captured_a_graph_is_timed_again(mlacli, fake_model, monkeypatch):
    plain = fake_model.engine_class.prefill

    def capturing(self, ids):
        if self.n_kv == 64 and not self.n_captured:
            self.n_captured = 1
        return plain(self, ids)

    monkeypatch.setattr(fake_model.engine_class, "prefill", capturing)
    assert len(mlacli(*FLAGS, "-n", "2").out.splitlines()) == 2 + 4
    counts = [len([c for c in fake_model.calls if c == ("prefill", n, 64)]) for n in (64, 128)]
    assert counts == [2, 1]


def test_repetitions_average_the_first_row_only(mlacli, fake_model):
    done = mlacli(*FLAGS, "-n", "2", "-nrep", "3", "-wb")
    assert len(done.out.splitlines()) == 2 + 4
    first = [c for c in fake_model.calls if c[0] == "prefill" and c[1] == 0]
    assert len(first) == 3 + 1  # and the batch that warms up
    assert len([c for c in fake_model.calls if c == ("prefill", 64, 64)]) == 1


def test_the_same_random_tokens_in_every_run(fake_model):
    from mlacli.sweep import sweep

    def prompts():
        seen = []
        prepared = fake_model.prepare("x", Params())
        engine = fake_model.engine(prepared, lambda done, total: None)
        prefill = engine.prefill
        engine.prefill = lambda ids: (seen.append(tuple(ids)), prefill(ids))[1]
        rows = list(sweep([engine], sweep_shape(256, 64, 4)))
        return seen, [(r.pp, r.tg, r.n_kv) for r in rows]

    assert prompts() == prompts()
    assert len(set(prompts()[0])) == 4


def test_a_row_without_room_ends_the_run_with_a_note(mlacli, fake_model):
    fake_model.n_ctx = 250
    done = mlacli(*FLAGS)
    assert done.code == 0
    assert [numbers(x)[2] for x in done.out.splitlines()[2:]] == [0, 64, 128]
    assert (
        "note: stopped before N_KV 192: a row needs 64 tokens of the context of 250\n" in done.err
    )


@pytest.mark.parametrize(
    ("n_ctx", "n_ubatch", "n_predict", "tg", "depths", "skipped"),
    [
        (1024, 512, -1, 128, [0, 512], None),
        (1024, 512, 0, 128, [0, 512], None),
        (1024, 512, 600, 600, [0], 512),
        (1000, 512, 5, 5, [0], 512),
        (512, 512, -1, 128, [0], None),
        (8, 2, -1, 1, [0, 2, 4, 6], None),
    ],
)
def test_shape(n_ctx, n_ubatch, n_predict, tg, depths, skipped):
    shape = sweep_shape(n_ctx, n_ubatch, n_predict)
    assert (shape.tg, list(shape.depths), shape.skipped) == (tg, depths, skipped)


def test_no_room_for_any_row():
    with pytest.raises(UsageError, match="a row of 600 tokens does not fit a context of 512"):
        sweep_shape(512, 512, 600)


def test_the_output_is_flushed_and_speeds_are_consistent(mlacli, fake_model):
    for line in mlacli(*FLAGS).out.splitlines()[4:]:
        assert re.fullmatch(r"\|( *\d+ \|){3}( *\d+\.\d{3} \| *\d+\.\d\d \|){2}", line), line


def test_unknown_formats_are_refused(mlacli):
    done = mlacli(*FLAGS, "--output-format", "xml")
    assert done.code == 2 and "--output-format: 'xml' is not one of md, jsonl, csv" in done.err


def test_csv_has_the_keys_of_jsonl_as_columns(mlacli, fake_model):
    done = mlacli(*FLAGS, "--output-format", "csv", "--sweep-memory")
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert [r["n_kv"] for r in rows] == ["0", "64", "128", "192"]
    assert float(rows[0]["speed_pp"]) > 0 and rows[0]["failed"] == ""
    assert (rows[0]["rss_hwm_mib"], rows[0]["vram_delta_mib"]) == ("64.0", "")
    assert None not in rows[0], "as many cells as titles"


def test_memory_columns_are_those_of_the_original(mlacli, fake_model):
    head, rule, first, *_ = mlacli(*FLAGS, "--sweep-memory").out.splitlines()
    assert head.endswith(" | S_TG t/s |    RSS HWM | VRAM delta |")
    assert rule.endswith("-|----------|------------|------------|")
    assert len(head) == len(rule)
    assert first.endswith(" |       64.0 |        n/a |")
    row = json.loads(
        mlacli(*FLAGS, "--sweep-memory", "--output-format", "jsonl").out.splitlines()[0]
    )
    keys = list(row)
    assert keys[keys.index("speed_tg") + 1 :][:2] == ["rss_hwm_mib", "vram_delta_mib"]
    assert (row["rss_hwm_mib"], row["vram_delta_mib"]) == (64.0, None)


def test_stride_skips_rows_but_neither_cache_nor_random_tokens(mlacli, fake_model, monkeypatch):
    seen = []
    engine = fake_model.engine_class
    plain = engine.prefill
    monkeypatch.setattr(
        engine, "prefill", lambda self, ids: (seen.append(list(ids)), plain(self, ids))[1]
    )
    every = mlacli(*FLAGS)
    all_ids, seen[:] = list(seen), []
    third = mlacli(*FLAGS, "--sweep-stride", "3")
    assert [numbers(x)[2] for x in third.out.splitlines()[2:]] == [0, 192]
    assert len(every.out.splitlines()) == 2 + 4
    assert seen == all_ids


def failing(monkeypatch, engine, name, at):
    """Engine.`name` that fails when it is called at depth `at`."""
    plain = getattr(engine, name)

    def call(self, ids):
        if self.n_kv == at:
            raise RankError(1, ValueError("out of order"))
        return plain(self, ids)

    monkeypatch.setattr(engine, name, call)


def test_a_row_whose_decode_fails_is_written_so_and_the_sweep_goes_on(
    mlacli, fake_model, monkeypatch
):
    failing(monkeypatch, fake_model.engine_class, "decode", 64 + 3)
    done = mlacli(*FLAGS)
    rows = done.out.splitlines()[2:]
    assert done.code == 1 and len(rows) == 4
    assert re.fullmatch(
        r"\|    64 \|     16 \|     64 \| +\d+\.\d+ \| +\d+\.\d+ \|   failed \|      nan \|",
        rows[1],
    )
    assert "Error: 1 of 4 rows failed, the first with: decode: rank 1 failed" in done.err
    assert all("failed" not in row for row in (rows[0], *rows[2:]))


def test_a_prefill_that_fails_ends_the_sweep(mlacli, fake_model, monkeypatch):
    failing(monkeypatch, fake_model.engine_class, "prefill", 128)
    done = mlacli(*FLAGS, "--output-format", "jsonl", "--sweep-stride", "3")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [r["n_kv"] for r in rows] == [0, 128] and done.code == 1
    assert rows[1]["t_pp"] is None and "out of order" in rows[1]["failed"]


def test_compare_needs_devices_and_different_modes(mlacli):
    done = mlacli(*FLAGS, "--compare", "none,graph")
    assert done.code == 2 and "--compare needs several devices" in done.err
    for words in ("none", "none,none", "none,auto", "none,row"):
        assert mlacli(*FLAGS, "--compare", words).code == 2, words
    done = mlacli(*FLAGS, "--compare", "none,graph", "-sm", "graph")
    assert done.code == 2 and "exclude each other" in done.err


def test_compare_alternates_the_modes(mlacli, fake_model):
    done = mlacli(*FLAGS, "-dev", "cpu,cpu", "--compare", "none,graph", "--output-format", "jsonl")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(r["n_kv"], r["split_mode"]) for r in rows[:-1]] == [
        (n, mode) for n in (0, 64, 128, 192) for mode in ("none", "graph")
    ]
    assert rows[-1]["compare"] == "graph/none" and rows[-1]["n_kv"] == [0, 64, 128, 192]
    turns = [c[1] for c in fake_model.calls if c[0] == "turn"]
    assert turns == ["none", "graph"] * 5
    table = mlacli(*FLAGS, "-dev", "cpu,cpu", "--compare", "none,graph").out.splitlines()
    assert table[0].endswith("|   MODE |") and table[2].endswith("|   none |")
    assert "|  N_KV | PAIR       |     S_PP |     S_TG |" in table


def test_a_mode_that_would_run_as_another_is_not_compared(mlacli):
    words = ("-dev", "cpu,cpu", "--compare", "none,graph", "-rtr", "-c", "512")
    done = mlacli("sweep-bench", "-m", MODEL, *words)
    assert done.code == 2
    assert "Error: --compare: -sm graph would run as -sm layer" in done.err


def test_three_modes_of_a_real_model(mlacli):
    words = ("-c", "256", "-ub", "96", "-n", "2", "-dev", "cpu,cpu", "-t", "2")
    done = mlacli("sweep-bench", "-m", MODEL, *words, "--compare", "none,layer,graph")
    assert done.code == 0
    rows = [line.split("|")[1:-1] for line in done.out.splitlines()[2 : 2 + 6]]
    assert [(int(row[2]), row[-1].strip()) for row in rows] == [
        (n, mode) for n in (0, 96) for mode in ("none", "layer", "graph")
    ]
    pairs = ("layer/none", "graph/none", "graph/layer")
    lines = done.out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("|  N_KV"))
    ratios = [line.strip("|").split("|") for line in lines[at + 2 : at + 8]]
    assert [(int(row[0]), row[1].strip()) for row in ratios] == [
        (n, pair) for n in (0, 96) for pair in pairs
    ]
    assert all(float(cell) > 0 for row in ratios for cell in row[2:])
    assert max(map(len, lines)) <= 80
    said = [line for line in done.out.splitlines() if line.startswith(("S_PP: ", "S_TG: "))]
    assert len(said) >= 6 and all("ahead of" in x or "overtakes" in x for x in said)


def test_synthetic_weights_need_no_file(mlacli):
    words = ("--synthetic", "tiny:2", "-c", "256", "-ub", "128", "-n", "2")
    done = mlacli("sweep-bench", *words)
    assert done.code == 0 and len(done.out.splitlines()) == 4, done.err
    assert "synthetic tiny:2 q4_k_m" in done.err
    done = mlacli("sweep-bench", "--synthetic", "tiny", "-m", "x.gguf")
    assert done.code == 2 and "leave -m out" in done.err
    done = mlacli("sweep-bench", "--synthetic", "v2lit")
    assert done.code == 2 and "did you mean v2lite?" in done.err


def test_compiling_is_shown_apart_from_loading(mlacli, fake_model):
    assert "compiled" not in mlacli(*FLAGS).err
    fake_model.kernels = 21
    assert "compiled 21 kernels in 1.2 s\n" in mlacli(*FLAGS).err


def test_what_came_out_worse_when_loading_is_a_warning(mlacli, fake_model):
    fake_model.load_problems = ["5 of 9 MiB of host memory could not be page-locked"]
    done = mlacli(*FLAGS)
    assert done.code == 0 and "warning: 5 of 9 MiB of host memory could not" in done.err
