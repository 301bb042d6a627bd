"""check-flags: the report on a command line, apart from the rules that it reports."""

import json

import pytest

from mlacli.cli.check_flags import judge

pytestmark = pytest.mark.usefixtures("fake_rules")

LINE = ("llama-cli", "--split_mode", "graph", "-rtr", "-ctv", "f16", "-p", "x", "-dev", "cpu,cpu")


def test_a_line_that_runs_as_asked(mlacli, golden):
    done = mlacli("check-flags", "--", "llama-cli", "-sm", "graph", "-dev", "cpu,cpu", "-fa")
    assert (done.code, done.err) == (0, "")
    golden("check-flags-supported", done.out)


def test_a_downgrade_exits_3_without_an_error_line(mlacli, golden):
    done = mlacli("check-flags", "--", *LINE)
    assert (done.code, done.err) == (3, "")
    golden("check-flags-downgraded", done.out)
    assert mlacli("check-flags", *LINE).out == done.out, "`--` may be left out"


def test_json(mlacli, golden):
    done = mlacli("check-flags", "--json", "--arch", "glm-dsa", *LINE)
    assert (done.code, done.err) == (3, "")
    golden("check-flags-json", done.out)
    report = json.loads(done.out)
    keys = "command program dialect arch arch_assumed commands split_mode flags plan error"
    assert list(report) == [*keys.split(), "exit_code"]
    assert report["split_mode"] == {"asked": "graph", "effective": "layer"}
    assert set(report["flags"][0]) == {"flag", "value", "verdict", "message", "hint"}


def test_every_mistake_is_in_the_report_and_the_first_is_the_error(mlacli, golden):
    done = mlacli(
        "check-flags",
        "llama-server",
        "-mx",
        "f",
        "--jinja",
        "-ub",
        "none",
        "--rpc",
        "512",
        "-c",
        "1",
    )
    assert done.code == 2
    golden("check-flags-refused", done.out)
    assert (
        done.err == "Error: llama-server is not supported: mlacli has no server (use run-model)\n"
    )
    assert "llama-server is not supported: mlacli has no server" in done.out


def test_flags_that_exclude_each_other(mlacli):
    done = mlacli("check-flags", "-p", "x", "-f", "y")
    assert done.code == 2 and "-p and -f exclude each other" in done.out


def test_a_rule_that_refuses_exits_2(mlacli):
    done = mlacli("check-flags", "-sm", "graph", "-fa", "off")
    assert done.code == 2
    assert done.err == "Error: -sm graph needs -fa on (drop it)\n"


def test_an_earlier_value_has_no_effect():
    report = judge(["-c", "1", "--ctx-size", "2"])
    assert [(v.flag, v.verdict) for v in report.verdicts] == [
        ("-c", "no effect"),
        ("--ctx-size", "supported"),
    ]
    assert report.exit_code == 0


def test_the_mode_that_nobody_asked_for():
    assert judge([]).effective_mode == "none"
    assert judge(["-dev", "cpu,cpu"]).effective_mode == "layer"
    assert judge([]).asked_mode is None


def test_no_line_is_a_usage_error(mlacli):
    done = mlacli("check-flags", "--json")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Error: no command line to judge (e.g. check-flags -- llama-cli")


def test_an_assumed_architecture_is_named_so(mlacli):
    assert "architecture: deepseek2 (assumed)\n" in mlacli("check-flags", "-ub", "64").out
    told = mlacli("check-flags", "--arch", "mistral4", "-ub", "64").out
    assert "architecture: mistral4\n" in told
    assert judge(["-ub", "64"]).as_dict()["arch_assumed"] is True
    assert judge(["-ub", "64"], "deepseek2").as_dict()["arch_assumed"] is False


def test_an_architecture_that_mlacli_does_not_run(mlacli):
    done = mlacli("check-flags", "--arch", "llama", "--", "llama-cli", "-p", "hi")
    assert done.code == 1 and "result: refused" in done.out
    assert done.err.startswith(
        "Error: architecture 'llama' is not supported (mlacli runs deepseek2"
    )


def test_a_script_of_several_commands_says_which_is_judged(mlacli, tmp_path):
    script = tmp_path / "run.sh"
    script.write_text("echo llama-cli\nllama-cli -ub 64\nnice -n 5 llama-server -c 1\n")
    done = mlacli("check-flags", "--json", "--file", str(script))
    assert done.code == 0
    assert done.err == "note: 2 commands found, only the first is judged: llama-cli -ub 64\n"
    commands = ["llama-cli -ub 64", "nice -n 5 llama-server -c 1"]
    assert json.loads(done.out)["commands"] == commands
    line = mlacli("check-flags", "llama-cli -ub 64; llama-server -c 1")
    assert line.code == 0 and line.err == done.err
    script.write_text("llama-cli -ub 64\n")
    assert mlacli("check-flags", "--file", str(script)).err == ""
