"""The grammar of a command line, by the real flag tables."""

import math
from dataclasses import fields

import pytest

from mlacli import flags
from mlacli.cli.words import walk
from mlacli.flag_values import choices
from mlacli.flags import COMMANDS, COMMON, ENVIRONMENT, GENERATION, LOADED, PLAN, to_params
from mlacli.params import ContextParams, ModelParams, SamplingParams, SplitParams

TABLE = COMMON + GENERATION


def values(*words, environ=None):
    line = walk(TABLE, words, environ)
    assert not line.problems, [p.error.message for p in line.problems]
    return line.values


def error(*words, table=TABLE):
    line = walk(table, words)
    assert line.problems
    e = line.problems[0].error
    return f"{e.message} ({e.hint})"


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["-ub", "128"], "ubatch_size", 128),
        (["-ub=128"], "ubatch_size", 128),
        (["--ubatch-size=128"], "ubatch_size", 128),
        (["--ubatch_size", "128"], "ubatch_size", 128),
        (["--ctx_size=64"], "ctx_size", 64),
        (["-n", "-1"], "predict", -1),
        (["-n", "-2"], "predict", -2),
        (["-p", "--model"], "prompt", "--model"),
        (["-p", "-n"], "prompt", "-n"),
        (["-p", "a=b"], "prompt", "a=b"),
        (["-p", ""], "prompt", ""),
        (["--prompt=a=b"], "prompt", "a=b"),
        (["-fa"], "flash_attn", True),
        (["-fa", "off"], "flash_attn", False),
        (["-fa", "AUTO"], "flash_attn", True),
        (["-fa", "0"], "flash_attn", False),
        (["-fa=off"], "flash_attn", False),
        (["--flash_attn", "1"], "flash_attn", True),
        (["-sm", "tensor"], "split_mode", "graph"),
        (["-ts", "3/1"], "tensor_split", (3.0, 1.0)),
        (["-ts", "1,,2"], "tensor_split", (1.0, 0.0, 2.0)),
        (["--margin", "512M"], "margin", 512 << 20),
        (["-dev", "CPU,cpu"], "device", ("cpu", "cpu")),
        (["-cmoe"], "cpu_moe", True),
        (["--prompt-ids", "1, 2 3"], "prompt_ids", (1, 2, 3)),
        (["-ngl", "all"], "gpu_layers", None),
        (["-ngl", "99"], "gpu_layers", 99),
        (["-s", "-1"], "seed", None),
        (["-s", "4294967295"], "seed", None),
        (["-ot", "a=CPU", "-ot", "b=CPU"], "override_tensor", ("a=CPU", "b=CPU")),
        (["--override-kv", "a.b=int:4"], "override_kv", (("a.b", 4),)),
        (["-l", "5-inf", "-l", "7+.5"], "logit_bias", ((5, -math.inf), (7, 0.5))),
        (["--samplers", "temp; top-k"], "samplers", ("temperature", "top_k")),
        (["--samplers", ""], "samplers", ()),
        (["--sampling-seq", "tk"], "sampling_seq", ("temperature", "top_k")),
        (["-r", "A", "-r", "B"], "reverse_prompt", ("A", "B")),
        (["--dry-sequence-breaker", "none"], "dry_sequence_breaker", ("",)),
        (["--chat-template-kwargs", '{"a": 1}'], "chat_template_kwargs", (("a", 1),)),
        (["--reasoning-format", "deepseek-legacy"], "reasoning_format", "none"),
    ],
)
def test_values(words, key, value):
    assert values(*words) == {key: value}


def test_the_word_after_a_bare_fa_is_left_alone():
    assert values("-fa", "-ub", "64") == {"flash_attn": True, "ubatch_size": 64}
    assert "unexpected word 'yes' (-fa takes on, off or auto)" in error("-fa", "yes")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-mx", "file"], "unknown flag -mx (did you mean -m?)"),
        (["-mfile.gguf"], "unknown flag -mfile.gguf"),
        (["-ub128"], "unknown flag -ub128 (did you mean -ub?)"),
        (["--ctx-sise", "5"], "unknown flag --ctx-sise (did you mean --ctx-size?)"),
        (["--zzz"], "unknown flag --zzz (--help lists the flags)"),
        (["hello"], "unexpected word 'hello'"),
        (["--"], "unknown flag --"),
        (["-"], "unexpected word '-'"),
        (["-ub"], "-ub needs a value (write -ub N)"),
        (["-ub", "many"], "-ub: 'many' is not an integer"),
        (["-b", "0"], "-b: '0' is not at least 1"),
        (["-mla", "4"], "-mla: '4' is not at most 3"),
        (["--strict=1"], "--strict takes no value"),
        (["-fa=maybe"], "-fa: 'maybe' is not on, off or auto"),
        (["-sm", "row"], "-sm: split mode 'row' is not supported (use -sm graph"),
        (["-sm", "grahp"], "(did you mean graph?)"),
        (["-gap", "bf16"], "-gap: 'bf16' is not one of f16, f32"),
        (["-grt", "fp16"], "-grt: 'fp16' is not one of"),
        (["-ctk", "q4_0"], "-ctk: cache type 'q4_0' is not supported (the nearest is q8_0)"),
        (["-ctv", "iq4_nl"], "-ctv: cache type 'iq4_nl' is not supported (the nearest is q8_0)"),
        (["-ctv", "fp16"], "'fp16' is not one of f32, f16, bf16, q8_0 (did you mean f16?)"),
        (["-ts", "0,0"], "-ts: '0,0' is not a list with a non-zero share"),
        (["--temp", "nan"], "--temp: 'nan' is not a finite number"),
        (["-dev", "gpu0"], "-dev: 'gpu0' is not a device"),
        (["-p", "a", "-f", "b"], "-p and -f exclude each other"),
        (["--lora", "x"], "--lora is not supported: there are no adapters (merge the adapter"),
        (["--adaptive_target", "0.5"], "--adaptive_target is not supported"),
        (["--repeat-penalty", "0"], "--repeat-penalty: '0' is not above 0"),
        (["--samplers", "top_k;tfs_z"], "'tfs_z' is not a sampler that mlacli has"),
        (["--sampling-seq", "kf"], "'f' is not a sampler's letter"),
        (["-l", "5*3"], "-l: '5*3' is not a token id and its bias"),
        (["--chat-template-kwargs", "[1]"], "is not a JSON object"),
        (["-hf", "a/b"], "-hf is not supported: nothing is downloaded (download the file"),
        (["-nrep", "2"], "-nrep is a flag of mlacli sweep-bench"),
        (["-offlin"], "unknown flag -offlin (did you mean --offline?)"),
    ],
)
def test_errors(words, text):
    assert text in error(*words)


def test_a_refused_flag_takes_its_values_along():
    line = walk(TABLE, ["--rpc", "512", "--lora-scaled", "f", "0.5", "--no-jinja", "-ub", "64"])
    assert [(p.word, p.text) for p in line.problems] == [
        ("--rpc", "512"),
        ("--lora-scaled", "f 0.5"),
        ("--no-jinja", None),
    ]
    assert line.values == {"ubatch_size": 64}


def test_typed_words_and_repeats():
    line = walk(
        TABLE, ["--ctx_size", "1", "-e", "--no-escape", "-c", "2", "-ot", "a=CPU", "-ot", "b=CPU"]
    )
    assert line.values["ctx_size"] == 2
    assert line.typed == {
        "escape": "-e",
        "no_escape": "--no-escape",
        "ctx_size": "-c",
        "override_tensor": "-ot",
    }
    assert line.repeated() == ["-c is given 2 times; the last one counts (2)"]
    params = to_params(line.values, line.typed)
    assert params.spelled("override_tensor") == "-ot"
    assert params.spelled("threads") == "--threads"


def test_the_environment_comes_before_the_words():
    environ = {"LLAMA_ARG_CTX_SIZE": "512", "LLAMA_ARG_N_PREDICT": "7", "LLAMA_ARG_BATCH": ""}
    assert values("-c", "1024", environ=environ) == {"ctx_size": 1024, "predict": 7}
    line = walk(TABLE, ["-c", "1024"], environ)
    assert line.repeated() == []
    assert line.notes() == ["-c wins over LLAMA_ARG_CTX_SIZE=512"]
    environ = {"LLAMA_ARG_OVERRIDE_TENSOR": "a=CPU"}
    assert values("-ot", "b=CPU", environ=environ) == {"override_tensor": ("b=CPU",)}
    line = walk(TABLE, [], {"LLAMA_ARG_CTX_SIZE": "x"})
    assert line.problems[0].error.message == "LLAMA_ARG_CTX_SIZE: 'x' is not an integer"


def test_every_flag_has_a_variable():
    """Words, switches and repeated flags alike: what the variable says is what the flag says."""
    for flag in TABLE:
        given = {"KV": "a.b=int:1", "SHARES": "1,1", "LIST": "cpu", "RULES": "a=CPU"}
        given |= {"JSON": "{}", "BIAS": "1+1", "NAMES": "top_k", "LETTERS": "kt"}
        text = given.get(flag.metavar)
        text = text or (choices(flag.parse) or ("1",))[0]
        words = [flag.names[0], text] if flag.parse else [flag.names[0]]
        assert values(environ={flag.env: text if flag.parse else "on"}) == values(*words), flag
    assert values(environ={"LLAMA_ARG_CPU_MOE": "0"}) == {}
    assert values(environ={"LLAMA_ARG_ESCAPE": "off"}) == {"no_escape": True}
    line = walk(TABLE, [], {"LLAMA_ARG_CPU_MOE": "maybe"})
    assert "neither on nor off" in line.problems[0].error.message


def test_variables_of_what_mlacli_has_not():
    line = walk(TABLE, [], {"LLAMA_ARG_HOST": "0.0.0.0", "LLAMA_ARG_NUMA": "distribute"})
    assert not line.problems and len(line.notes()) == 2, "a container sets them for all programs"
    line = walk(TABLE, [], {"LLAMA_ARG_ROPE_SCALE": "2"})
    assert line.problems[0].error.message.startswith("LLAMA_ARG_ROPE_SCALE is not supported")
    assert "neither mlacli nor" in walk(TABLE, [], {"LLAMA_ARG_XYZ": "1"}).notes()[0]
    said = walk(TABLE, [], {"LLAMA_ARG_CTXSIZE": "1"}).notes()
    assert said == ["LLAMA_ARG_CTXSIZE has no effect: did you mean LLAMA_ARG_CTX_SIZE?"]


@pytest.mark.parametrize(
    ("name", "text", "refused"),
    [
        ("LLAMA_ARG_NO_KV_OFFLOAD", "1", True),
        ("LLAMA_ARG_KV_OFFLOAD", "0", True),
        ("LLAMA_ARG_KV_OFFLOAD", "1", False),
        ("LLAMA_ARG_EMBEDDINGS", "0", False),
        ("LLAMA_ARG_EMBEDDINGS", "1", True),
    ],
)
def test_switches_by_variable(name, text, refused):
    assert bool(walk(TABLE, [], {name: text}).problems) == refused


def test_a_word_wins_over_the_variable_of_a_flag_that_excludes_it():
    line = walk(TABLE, ["-f", "x"], {"LLAMA_ARG_PROMPT": "y"})
    assert not line.problems and line.values == {"file": "x"}
    assert line.notes() == ["LLAMA_ARG_PROMPT has no effect: -f wins over it"]


def test_defaults_of_what_was_not_given():
    line = walk(TABLE, [])
    assert line["predict"] == -1
    assert line["no_display_prompt"] is False
    assert line["model"] is None


def test_tables_agree_with_the_parameter_groups():
    """A default is written in the table for --help and in params for the library: once each."""
    defaults = {}
    for group in (ModelParams, SplitParams, ContextParams, SamplingParams):
        for f in fields(group):
            if f.name != "override_kv":
                defaults[f.name] = getattr(group(), f.name)
    reached = set()
    for flag in LOADED + GENERATION + PLAN:
        name = flags._RENAMED.get(flag.key, flag.key)
        if name in defaults:
            reached.add(name)
            if not flag.repeats and name != "devices":  # by the machine
                assert (flag.default if flag.parse else False) == defaults[name], flag.names
    assert reached == set(defaults), "a parameter that no flag sets"


def test_every_name_is_in_one_table_once():
    for name, sections in COMMANDS.items():
        names = [n for _, table in sections for flag in table for n in flag.names]
        assert len(names) == len(set(names)), name
    assert set(ENVIRONMENT.values()) <= {
        flag.key for s in COMMANDS.values() for _, t in s for flag in t
    }
