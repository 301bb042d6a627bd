"""Generation flags of run-model with the bundled model, in this process."""

import json
import re

import pytest

from mlacli.errors import MlacliError

SHORT = ["-n", "24", "-s", "7"]
MODES = (
    (),
    ("-dev", "cpu,cpu", "-sm", "layer"),
    ("-dev", "cpu,cpu", "-sm", "graph"),
    ("-dev", "cpu,cpu,cpu", "-sm", "graph", "-ts", "3,1,2"),
)


@pytest.mark.parametrize(
    "chain",
    [
        (),
        ("--repeat-penalty", "1.3", "--presence-penalty", "0.5", "--frequency-penalty", "0.2"),
        ("--dry-multiplier", "0.8", "--xtc-probability", "0.5", "--xtc-threshold", "0.05"),
        ("--typical", "0.7", "--top-n-sigma", "1.5", "--dynatemp-range", "0.5"),
        ("--mirostat", "1"),
        ("--mirostat", "2", "--mirostat-ent", "3"),
        ("--samplers", "temperature;min_p;xtc", "--xtc-probability", "0.4"),
        ("--sampling-seq", "tpk", "-l", "5-inf", "--ignore-eos"),
    ],
)
def test_a_seed_gives_the_same_text_on_every_rank_count(mlacli, chain):
    exact = ["-ctk", "f32", "-gap", "f32", "-p", "Once upon a time", *SHORT, *chain]
    texts = [mlacli("run-model", *exact, *mode) for mode in MODES]
    assert {done.code for done in texts} == {0}, texts[0].err
    assert len({done.out for done in texts}) == 1
    assert texts[0].out != mlacli("run-model", *exact[: -1 - len(chain)], "8", *chain).out


def test_penalties_change_the_text(mlacli):
    words = ["run-model", "-p", "The cat and the dog. " * 3, "-n", "30", "--temp", "0"]
    plain = mlacli(*words).out
    for chain in (["--repeat-penalty", "5"], ["--presence-penalty", "9", "--repeat-last-n", "-1"]):
        assert mlacli(*words, *chain).out != plain
    assert mlacli(*words, "--repeat-penalty", "5", "--repeat-last-n", "0").out == plain
    assert mlacli(*words, "--repeat-penalty", "5", "--samplers", "temperature").out == plain


def test_dry_keeps_a_repetition_from_going_on(mlacli):
    ids = "500,600,700,500,600"
    words = ["run-model", "--prompt-ids", ids, "-n", "1", "--temp", "0", "-l", "700+50"]
    words += ["--no-display-prompt"]
    repeated = mlacli(*words).out
    given = ["--dry-multiplier", "90", "--dry-sequence-breaker", "none"]
    assert mlacli(*words, *given).out != repeated
    assert mlacli(*words, *given, "--dry-allowed-length", "3").out == repeated
    assert mlacli(*words[:7], "--no-display-prompt").out != repeated, "the bias did it"


def test_a_grammar_by_text_and_by_file(mlacli, tmp_path):
    grammar = 'root ::= " " [0-9]{3} "!"'
    words = ["run-model", "-p", "I am", "--no-display-prompt", *SHORT]
    done = mlacli(*words, "--grammar", grammar)
    assert done.code == 0 and re.fullmatch(r" \d{3}!\n", done.out)
    path = tmp_path / "three.gbnf"
    path.write_text(grammar)
    assert mlacli(*words, "--grammar-file", str(path)).out == done.out


def test_a_json_schema_by_text_and_by_file(mlacli, tmp_path):
    schema = json.dumps({"enum": [{"a": [1, 2]}, {"b": None}]})
    words = ["run-model", "-p", "JSON:", "--no-display-prompt", "-n", "60", "-s", "1"]
    done = mlacli(*words, "-j", schema)
    assert done.code == 0 and json.loads(done.out) in ({"a": [1, 2]}, {"b": None})
    path = tmp_path / "schema.json"
    path.write_text(schema)
    assert mlacli(*words, "-jf", str(path)).out == done.out


def test_escapes_hold_for_breakers(mlacli, monkeypatch):
    from mlacli.sampling import Sampler

    seen = []
    real = Sampler.for_tokenizer

    def spy(params, tokenizer):
        seen.append(params.dry_sequence_breaker)
        return real(params, tokenizer)

    monkeypatch.setattr(Sampler, "for_tokenizer", spy)
    words = ["run-model", "-p", "x", "-n", "1", "--dry-sequence-breaker", r"\n"]
    mlacli(*words)
    mlacli(*words, "--no-escape", "--dry-sequence-breaker", "none")
    mlacli(*words[:-2])
    assert seen == [("\n",), (r"\n", ""), ("\n", ":", '"', "*")]


def test_the_prompt_cache_is_written_once_and_taken_in_every_mode(mlacli, tmp_path):
    path = tmp_path / "cache.gguf"
    words = ["run-model", "-p", "Once upon a time there was", "-n", "12", "--temp", "0",
             "-ctk", "f32", "-gap", "f32", "--prompt-cache", str(path)]  # fmt: skip
    first = mlacli(*words)
    assert first.code == 0 and "prompt cache:" not in first.err
    written = path.read_bytes()
    for mode in MODES:
        again = mlacli(*words, *mode)
        assert again.out == first.out
        assert re.search(r"prompt cache: (\d+) of \1 tokens taken", again.err)
        assert re.search(r"prompt eval time = .* /     1 tokens", again.err)
        assert path.read_bytes() == written, "nothing new to keep"


def test_a_longer_prompt_is_kept_unless_read_only(mlacli, tmp_path):
    path = tmp_path / "cache.gguf"
    words = ["run-model", "-n", "2", "--temp", "0", "--prompt-cache", str(path)]
    mlacli(*words, "-p", "Once upon")
    before = path.read_bytes()
    more = mlacli(*words, "-p", "Once upon a time", "--prompt-cache-ro")
    assert path.read_bytes() == before and "tokens taken" in more.err
    mlacli(*words, "-p", "Once upon a time")
    assert len(path.read_bytes()) > len(before)


def test_the_whole_cache_is_kept_and_an_empty_prompt_goes_on_from_it(mlacli, tmp_path):
    path = tmp_path / "cache.gguf"
    words = ["run-model", "--temp", "0", "--prompt-cache", str(path), "--prompt-cache-all"]
    exact = ["-ctk", "f32", "-gap", "f32"]
    whole = mlacli("run-model", "-p", "Once upon", "-n", "13", "--temp", "0", *exact).out
    part = mlacli(*words, "-p", "Once upon", "-n", "6", *exact).out
    rest = mlacli(*words, "-p", "", "-n", "8", "--no-display-prompt", *exact).out
    assert whole.startswith(part.rstrip("\n"))
    kept_prompt = part.rstrip("\n")
    joined = kept_prompt[: len(whole) - len(rest)] + rest
    assert joined == whole, "the last token of a run is shown, not yet cached"


def test_a_prompt_cache_that_is_none_is_an_error(mlacli, tmp_path):
    path = tmp_path / "cache.gguf"
    path.write_bytes(b"GGUF, or so")
    done = mlacli("run-model", "-p", "x", "-n", "1", "--prompt-cache", str(path))
    assert done.code == 1 and done.out == ""
    path.write_bytes(b"")
    assert mlacli("run-model", "-p", "x", "-n", "1", "--prompt-cache", str(path)).code == 0
    assert path.stat().st_size > 0, "as llama.cpp, an empty file is none yet"


def test_timings_and_the_memory_table(mlacli):
    done = mlacli(
        "run-model", "-p", "Once upon a time", "-n", "5", "-s", "1", "--log-jsonl", "/dev/null"
    )
    lines = done.err.splitlines()
    at = next(i for i, line in enumerate(lines) if "load time" in line)
    assert [re.sub(r"[\d.]+", "N", line).split("=")[0].strip() for line in lines[at : at + 7]] == [
        "load time", "prompt eval time", "eval time", "sampling time", "total time",
        "first token", "peak memory",
    ]  # fmt: skip
    assert re.search(r"  eval time = +[\d.]+ ms / +4 runs", done.err)
    assert re.search(r"sampling time = +[\d.]+ ms / +5 runs", done.err)
    assert lines[at + 7].split() == [
        "memory", "[MiB]", "total", "free", "self", "model", "context", "compute", "unaccounted",
    ]  # fmt: skip
    name, _, _, own, model, context, compute, _ = lines[at + 9].split()
    assert name == "cpu"
    assert float(own) == pytest.approx(float(model) + float(context) + float(compute), abs=1)
    quiet = mlacli("run-model", "-p", "Once", "-n", "5", "--no-perf")
    assert "load time" not in quiet.err and "memory [MiB]" not in quiet.err


def test_the_memory_table_of_gpus_adds_up():
    from types import SimpleNamespace as Of

    from mlacli.devices import Device
    from mlacli.parallel.plan_report import memory_rows

    rank = Of(device="cuda0", weights=3 << 30, cache=1 << 30, scratch=0, dequant=0, total=4 << 30,
              host=0)  # fmt: skip
    plan = Of(ranks=[rank, rank])
    columns, rows = memory_rows(plan, [Device("cuda0", "cuda", 80 << 30, 70 << 30)])
    row = dict(zip(columns[1:], map(float, rows[0][1:]), strict=True))
    assert len(rows) == 1
    assert row["self"] == row["model"] + row["context"] + row["compute"] == 8 << 10
    assert row["total"] == row["free"] + row["self"] + row["unaccounted"]


def test_what_is_measured_beside_the_plan():
    from mlacli.parallel.memory_watch import Beside
    from mlacli.parallel.plan_report import beside_lines

    (line, other) = beside_lines({
        "cuda0": Beside(500 << 20, 14 << 20, 470 << 20), "cuda1": Beside(500 << 20, -1 << 20, 0),
    })  # fmt: skip
    assert line.startswith("cuda0 beside the plan: 500 MiB in use before loading")
    assert "14 MiB more since" in line and line.endswith("NCCL took 470 MiB")
    assert "-1.0 MiB more since" in other and "NCCL" not in other


def test_warm_up_by_default_and_not(mlacli, fake_model):
    mlacli("run-model", "-p", "x")
    assert fake_model.calls[:2] == [("turn", None), ("warm",)]
    fake_model.calls.clear()
    mlacli("run-model", "-p", "x", "--no-warmup")
    assert ("warm",) not in fake_model.calls
    assert mlacli("run-model", "-p", "x", "--warmup", "--no-warmup").code == 2


def test_mlock_that_fails_is_a_warning(mlacli, fake_model, monkeypatch):
    engine = fake_model.engine_class
    plain = engine.__init__

    def refused(self, *given):
        plain(self, *given)
        self.page_lock.problem = "Cannot allocate memory"

    monkeypatch.setattr(engine, "__init__", refused)
    done = mlacli("run-model", "-p", "x", "--mlock")
    assert done.code == 0
    assert "warning: not all weights could be locked in memory: Cannot allocate memory" in done.err


def test_the_library_takes_the_chain_too():
    import mlacli

    with mlacli.load(sampling_seq="kt", top_k=1) as engine:
        greedy = "".join(engine.generate("Once", 8, temp=0))
        assert "".join(engine.generate("Once", 8)) == greedy
        assert "".join(engine.generate("Once", 8, temp=5, grammar='root ::= "a"*')).strip("a") == ""
        with pytest.raises(MlacliError):
            list(engine.generate("Once", 8, repeat_penalty=-1))
        with pytest.raises(MlacliError, match="grammar_file"):
            list(engine.generate("Once", 8, grammar_file="x"))
