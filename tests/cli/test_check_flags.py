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
    keys = "command program dialect arch split_mode flags plan error exit_code"
    assert list(report) == keys.split()
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
        "-amb",
        "512",
        "-c",
        "1",
    )
    assert done.code == 2
    golden("check-flags-refused", done.out)
    assert done.err == "Error: unknown flag -mx (did you mean -m?)\n"
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
