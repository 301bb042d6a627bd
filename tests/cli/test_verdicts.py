"""check-flags by the real rules: foreign lines, variables, devices, and the plan of a model."""

import json
import re

import pytest
from kit.toy_gguf import write_toy

from mlacli.cli.check_flags import judge


def test_a_bad_file_exits_1(mlacli, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"this is no model")
    done = mlacli("check-flags", "-m", str(path), "-ub", "64")
    assert done.code == 1 and "-ub" in done.out, "the flags are judged all the same"
    assert done.err.startswith("Error: ")
    assert mlacli("check-flags", "-m", str(tmp_path / "missing.gguf")).code == 1
    assert mlacli("check-flags", "--arch", "deepseek2", "-m", str(path)).code == 0


def verdicts(*words, **given):
    return {v.flag: v.verdict for v in judge(words, **given).verdicts}


def test_a_foreign_run_that_differs_exits_3():
    report = judge(["llama-cli", "-s", "7", "--temp", "0.5"])
    assert report.verdicts[0].verdict == "changes results" and report.exit_code == 3
    assert judge(["llama-cli", "-s", "7", "--temp", "0"]).exit_code == 0
    assert judge(["llama-cli", "-s", "-1"]).exit_code == 0
    assert judge(["mlacli", "run-model", "-s", "7"]).exit_code == 0, "our own seeds are ours"
    assert verdicts("llama-cli", "-ngl", "99") == {"-ngl": "changed"}, "asked for GPUs, runs on cpu"
    assert verdicts("llama-cli", "-ngl", "0")["-ngl"] != "changed"
    assert verdicts("llama-cli", "-ngl", "99", "-dev", "cpu")["-ngl"] != "changed"


def test_a_device_that_is_not_there_exits_1_and_vram_plans_for_it():
    words = ["llama-cli", "-dev", "cuda98,cuda99"]
    report = judge(words)
    assert (report.exit_code, report.verdicts[0].verdict) == (1, "refused")
    assert "cuda98 is not available" in report.verdicts[0].message
    assert judge(words, vram=(1 << 40, 1 << 40)).exit_code == 0


def test_variables_count_and_words_win():
    report = judge(
        ["LLAMA_ARG_CTX_SIZE=128", "llama-cli", "-c", "64"],
        environ={"LLAMA_ARG_UBATCH": "32", "LLAMA_ARG_CTX_SIZE": "7", "LLAMA_ARG_HOST": "::"},
    )
    assert [(v.flag, v.value, v.verdict, v.message) for v in report.verdicts] == [
        ("LLAMA_ARG_CTX_SIZE", "128", "no effect", "-c wins over it"),
        ("LLAMA_ARG_UBATCH", "32", "supported", ""),
        ("LLAMA_ARG_HOST", "::", "no effect", "mlacli has no server"),
        ("-c", "64", "supported", ""),
    ]
    assert report.exit_code == 0


def test_the_two_projects_differ_in_how_many_values_an_option_takes():
    words = ["--lora-scaled", "f.gguf", "0.5", "--color", "-ub", "64"]
    assert "0.5" not in verdicts(*words, dialect="ik_llama_cpp")
    mainline = verdicts("llama-cli", *words[:2], "--color", "on", "-ub", "64", dialect="llama_cpp")
    assert mainline == {"--lora-scaled": "refused", "--color": "no effect", "-ub": "supported"}
    report = judge(["llama-cli", "-rtr", "--color", "-ub", "64"])
    assert report.called.dialect == "ik_llama_cpp", "told by -rtr"
    assert [v.value for v in report.verdicts] == [None, None, "64"]
    report = judge(["llama-cli", "--log-jsonl", "-ub", "64"], dialect="llama_cpp")
    assert report.verdicts[0].verdict == "refused", "a switch there, a file here"
    assert report.verdicts[1].verdict == "supported"


def test_renamed_and_neutral_values():
    report = judge(["llama-cli", "-smf16", "--offline", "-np", "1", "-fit", "off"])
    assert [v.verdict for v in report.verdicts[:1]] == ["no effect"], "-grt acts under graph only"
    assert {v.verdict for v in report.verdicts} == {"no effect"} and report.exit_code == 0
    assert verdicts("--log-disable") == {"--log-disable": "renamed"}
    assert verdicts("--cfg-scale", "1.1") == {"--cfg-scale": "refused"}


def test_a_flag_of_another_command():
    report = judge(["llama-cli", "-nrep", "3", "-ub", "64"])
    assert [(v.flag, v.value, v.verdict) for v in report.verdicts] == [
        ("-nrep", "3", "refused"),
        ("-ub", "64", "supported"),
    ]
    assert report.verdicts[0].message == "-nrep is a flag of mlacli sweep-bench"


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["-c", "64"], 0),
        (["-c", "64", "-sm", "graph", "-dev", "cpu,cpu"], 0),
        (["-c", "64", "-sm", "graph", "-dev", "cpu,cpu", "-cmoe"], 3),
        (["-c", "2000000000"], 1),
        (["-c", "64", "-dev", "cuda0"], 1),
        (["-sm", "graph", "-mla", "0", "-dev", "cpu,cpu"], 2),
        (["-mx", "5"], 2),
        (["--mlock", "--numa", "distribute", "-gr", "-smf16"], 0),
        (["-s", "1"], 0),
    ],
)
def test_the_exit_code_is_that_of_a_run(mlacli, tmp_path, flags, code):
    """A run with --strict ends as check-flags says, as far as mlacli's own flags go."""
    model = str(write_toy(tmp_path / "toy.gguf"))
    line = ["run-model", "-m", model, *flags]
    judged = mlacli("check-flags", "--", "mlacli", *line)
    assert judged.code == code, judged.out
    run = mlacli(*line, "--prompt-ids", "1,2", "-n", "1", "--strict")
    assert run.code == code, run.err
    if code in (1, 2):
        assert re.sub(r"[\d.]+", "N", judged.err) == re.sub(r"[\d.]+", "N", run.err)


def test_the_plan_of_a_model(mlacli, tmp_path):
    line = ["llama-cli", "-m", str(write_toy(tmp_path / "toy.gguf")), "-c", "64"]
    done = mlacli("check-flags", "--vram", "2G,2G", *line)
    assert done.code == 0 and "split mode: layer" in done.out
    assert "plan: fits: gpu0 needs 0.00 of 1.00 GiB, gpu1 needs" in done.out
    small = mlacli("check-flags", "--json", "--vram", "1G,2G", *line)
    report = json.loads(small.out)
    assert (small.code, report["exit_code"], report["plan"]["fits"]) == (1, 1, False)
    gpu0 = report["plan"]["devices"][0]
    assert gpu0["device"] == "gpu0" and gpu0["need"] > gpu0["have"] == 0
    assert report["error"]["message"] in small.err


@pytest.mark.parametrize("count", ["-1", "auto", "all", "0"])
def test_layers_on_gpus_that_nobody_counts_are_no_change(count):
    report = judge(["llama-cli", "-ngl", count])
    assert (report.exit_code, report.verdicts[0].verdict) == (0, "no effect")
    assert report.verdicts[0].message == "all layers are on the CPU"


def test_layers_on_gpus_differ_for_foreign_programs_alone():
    foreign, own = judge(["llama-cli", "-ngl", "99"]), judge(["mlacli", "run-model", "-ngl", "99"])
    assert (foreign.exit_code, own.exit_code) == (3, 0)
    assert foreign.verdicts[0].message == own.verdicts[0].message == "all layers are on the CPU"


def test_graph_with_one_share_exits_3_as_a_strict_run(mlacli, tmp_path):
    line = ["run-model", "-m", str(write_toy(tmp_path / "toy.gguf")), "-c", "64"]
    line += ["-dev", "cpu,cpu", "-ts", "1,0", "-sm", "graph"]
    assert mlacli("check-flags", "--", "mlacli", *line).code == 3
    assert mlacli(*line, "--prompt-ids", "1,2", "-n", "1", "--strict").code == 3


def test_a_context_beyond_training_is_warned_of(tmp_path):
    words = ["llama-cli", "-m", str(write_toy(tmp_path / "toy.gguf")), "-c", "4096"]
    report = judge(words)
    assert report.exit_code == 0
    said = {v.flag: (v.verdict, v.message) for v in report.verdicts}["-c"]
    assert said[0] == "warned" and "exceeds the training context" in said[1]


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ("blk.(=CPU", "is not a regular expression"),
        ("foo", "'foo' is not REGEX=DEVICE"),
        ("x=CUDA9x", "'CUDA9x' is not a device"),
        ("a=CPU,", "'' is not REGEX=DEVICE"),
        ("a=CPU,b", "'b' is not REGEX=DEVICE"),
        ("a{9999999999999}=CPU", "is not a regular expression"),
    ],
)
def test_placement_rules_are_parsed(rules, why):
    report = judge(["-ot", rules])
    assert (report.exit_code, report.verdicts[0].verdict) == (2, "bad value")
    assert why in report.verdicts[0].message and report.verdicts[0].hint


@pytest.mark.parametrize("rules", [r"blk\.(1|2)\.ffn_.*_exps=CPU,b=CUDA10", "[[:a:]]=cpu"])
def test_placement_rules_of_llama_cpp(rules, recwarn):
    assert judge(["-ot", rules]).exit_code == 0 and not recwarn.list


@pytest.mark.parametrize("program", ["llama-server", "./llama-quantize"])
def test_a_program_that_mlacli_lacks_is_the_error(mlacli, program):
    done = mlacli("check-flags", "--", program, "--port", "1", "--rpc", "x", "-ub", "none")
    assert done.code == 2 and done.err.startswith(f"Error: {program.strip('./')} is not supported")
