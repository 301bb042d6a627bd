"""sweep-bench: order of measurements, room, and the lines of ik_llama.cpp's tool."""

import json
import re

import pytest

from mlacli.cli.sweep_bench import md_row, row_values
from mlacli.errors import UsageError
from mlacli.params import Params
from mlacli.sweep import SweepRow, sweep_shape

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


def test_jsonl_keys_are_those_of_the_original_and_the_attention_forms(mlacli, fake_model):
    done = mlacli(*FLAGS, "--output-format", "jsonl", "-n", "3", "-fa", "off")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert list(rows[0]) == [
        *("n_kv_max", "n_batch", "n_ubatch", "flash_attn", "n_gpu_layers", "n_threads"),
        *("n_threads_batch", "pp", "tg", "n_kv", "t_pp", "speed_pp", "t_tg", "speed_tg"),
        *("attention_prefill", "attention_decode"),  # ours
    ]
    assert (rows[0]["attention_prefill"], rows[0]["attention_decode"]) == ("toy form", "other form")
    assert [(r["pp"], r["tg"], r["n_kv"], r["flash_attn"]) for r in rows] == [
        (64, 3, n, 0) for n in (0, 64, 128, 192)
    ]


@pytest.mark.parametrize("words", [FLAGS, ("run-model", "-m", "toy.gguf", "-p", "hello")])
def test_verbose_says_which_attention_ran(mlacli, fake_model, words):
    line = "attention  prefill toy form, decode other form\n"
    assert line in mlacli(*words, "-v").err
    assert line not in mlacli(*words).err


def test_decode_comes_before_prefill_and_is_rewound(mlacli, fake_model):
    mlacli(*FLAGS, "-n", "2")
    assert fake_model.calls[0] == ("decode", 0), "one token warms up"
    row = fake_model.calls[6:11]
    assert row == [
        ("rewind", 64),
        ("decode", 64),
        ("decode", 65),
        ("rewind", 64),
        ("prefill", 64, 64),
    ]


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
        rows = list(sweep(engine, sweep_shape(256, 64, 4)))
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
    done = mlacli(*FLAGS, "--output-format", "csv")
    assert done.code == 2 and "--output-format: 'csv' is not one of md, jsonl" in done.err
