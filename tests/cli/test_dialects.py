"""Every option of llama.cpp's and ik_llama.cpp's parsers has a verdict and takes its values."""

import runpy
from pathlib import Path

import pytest

from mlacli import dialects
from mlacli.cli.check_flags import judge
from mlacli.cli.words import Given, Idle, walk
from mlacli.flag_values import choices
from mlacli.flags import COMMANDS, ENVIRONMENT
from mlacli.flags_foreign import BY_NAME, FOREIGN

TABLES = {name: [f for _, flags in s for f in flags] for name, s in COMMANDS.items()}
OURS = {n: flag for flags in TABLES.values() for flag in flags for n in flag.names}
OPTIONS = [(name, option) for name in dialects.NAMES for option in dialects.dialect(name).options]
WORDS = [(name, word, o.values) for name, o in OPTIONS for word in o.names]
EXTRACTOR = Path(__file__).parents[1] / "golden" / "extract_dialects.py"

# Our flag is named like an option of that project that takes another number of values.
HOMONYMS = {("llama_cpp", "--log-jsonl")}


def test_how_many_options_there_are():
    """The numbers of the commits named in the data; they change when it is extracted anew."""
    found = {
        name: (dialects.dialect(name).commit[:9], sum(d == name for d, _ in OPTIONS))
        for name in dialects.NAMES
    }
    assert found == {"llama_cpp": ("0c1e57098", 353), "ik_llama_cpp": ("8337e4cd3", 308)}


def test_every_option_has_a_verdict():
    missing = sorted({word for _, word, _ in WORDS if word not in OURS and word not in BY_NAME})
    assert not missing, f"neither in flags.py nor in flags_foreign.py: {' '.join(missing)}"


def test_no_option_has_two_verdicts():
    both = sorted(set(OURS) & set(BY_NAME))
    assert not both, f"now in flags.py: take them out of flags_foreign.py: {' '.join(both)}"
    names = [n for rule in FOREIGN for n in rule.names]
    twice = sorted({n for n in names if names.count(n) > 1})
    assert not twice, f"twice in flags_foreign.py: {' '.join(twice)}"


def test_every_foreign_option_is_known_to_a_parser():
    unknown = sorted(n for n in BY_NAME if dialects.value_counts(n) is None)
    assert not unknown, f"in flags_foreign.py, but in no parser: {' '.join(unknown)}"


def test_every_rule_says_why_and_renames_to_what_exists():
    for rule in FOREIGN:
        assert rule.why, rule.names
        assert (rule.verdict == "renamed") == bool(rule.becomes), rule.names
        if rule.becomes:
            assert OURS[rule.becomes[0]], rule.names


def value_of(word):
    """A word that the option might be given; the parsers of ours must not mind."""
    flag = OURS.get(word)
    if flag is None:
        return "1"
    given = {"KV": "a=int:1", "LIST": "cpu", "RULES": "a=CPU", "JSON": "{}", "BIAS": "1+1"}
    given |= {"NAMES": "top_k", "LETTERS": "kt"}
    return given.get(flag.metavar) or (*choices(flag.parse), "1")[0]


@pytest.mark.parametrize("command", ["run-model", "sweep-bench"])
@pytest.mark.parametrize("name", dialects.NAMES)
def test_the_walker_takes_as_many_values_as_the_parser(name, command):
    """The flag behind every option is read as a flag, and its value as a value."""
    wrong = []
    table = tuple(TABLES[command])
    for dialect, word, n in WORDS:
        if dialect != name or word in ("-ub", "--ubatch-size"):
            continue
        line = walk(table, [word, *[value_of(word)] * n, "-ub", "64"], dialect=name)
        seen = [(i.flag.key if isinstance(i, Given) else i.word) for i in line.items]
        if len(seen) != 2 or seen[1] != "ubatch_size" or line.items[1].value != 64:
            wrong.append(f"{word} ({n}): {seen}")
        if word in OURS and (name, word) not in HOMONYMS:
            assert (OURS[word].parse is not None) == n, f"{word} takes {n} in {name}"
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("word", "mainline", "ik"),
    [
        ("-m", 1, 1),
        ("--mlock", 0, 0),
        ("--lora-scaled", 1, 2),
        ("--control-vector-layer-range", 2, 2),
        ("--color", 1, 0),
        ("-fit", 1, None),
        ("--fit", 1, 0),
        ("-fa", 1, 1),
        ("-ser", None, 1),
        ("-sp", 0, 0),
        ("--no-context-shift", 0, 0),
        ("--log-file", 1, 1),
        ("-ctkd", 1, 1),
        ("--spec-replace", None, 2),
    ],
)
def test_value_counts_read_by_hand_in_the_sources(word, mainline, ik):
    for name, n in (("llama_cpp", mainline), ("ik_llama_cpp", ik)):
        option = dialects.dialect(name).by_name.get(word)
        assert (option.values if option else None) == n, name


@pytest.mark.parametrize("name", dialects.NAMES)
def test_check_flags_has_a_verdict_for_every_option(name):
    for dialect, word, n in WORDS:
        if dialect == name:
            report = judge(["llama-cli", word, *[value_of(word)] * n], "deepseek2", dialect=name)
            own = [v for v in report.verdicts if v.flag == word]
            assert own and own[0].verdict not in ("unknown", "bad value"), (word, own)


def test_without_effect_means_that_a_run_takes_it():
    table = tuple(TABLES["run-model"])
    for rule in FOREIGN:
        for word in rule.names:
            n = dialects.value_counts(word)[0]
            line = walk(table, [word, *["x"] * n])
            assert (line.problems == []) == (rule.verdict != "refused"), word
            if rule.verdict == "no effect":
                assert isinstance(line.items[0], Idle)
                assert line.notes() == [f"{word} has no effect: {rule.why}"]
            elif rule.verdict == "renamed":
                assert line.notes() == [f"{word} is {rule.why}"]
                assert line.given[0].flag is OURS[rule.becomes[0]]


def test_variables_are_named_as_in_llama_cpp():
    for _, option in OPTIONS:
        flag = next((OURS[n] for n in option.names if n in OURS), None)
        if flag and option.env and "--log-jsonl" not in flag.names:
            assert option.env == flag.env and ENVIRONMENT[flag.env] == flag.key


CPP = r"""
    add_opt(common_arg(
        {"-a", "--aa"}, "N", string_format("with, commas (%d) and {braces}", f(1, 2)),
        [](common_params & params, int value) { params.a = value; }  // add_opt(common_arg({"-no"}
    ).set_examples({X}).set_env("LLAMA_ARG_A"));
    add_opt(common_arg({"--b"}, {"--no-b"}, "help", [](common_params & p, bool v) { p.b = v; }));
    add_opt(common_arg({"--c"}, "help", [](common_params &) {}));
    add_opt(common_arg({"--d"}, "X", "Y", "help",
        [](common_params &, const std::string &, const std::string &) {}));
"""
IK = """
    get_env("LLAMA_ARG_A", params.a);
bool gpt_params_find_arg(int argc) {
    if (arg == "-a" || arg == "--aa") {
        CHECK_ARG
        params.a = std::stoi(argv[i]);
        return true;
    }
    if (arg == "--b") {
        return true;
    }
    if (arg == "--c") {
        CHECK_ARG
        f(argv[i]);
        CHECK_ARG
        return true;
    }
}
"""
LOG = """
inline bool log_param_single_parse(x) { if (param == "--log-new") { } }
inline bool log_param_pair_parse(x) { if (param == "--log-file") { } }
"""


def test_the_extractor():
    script = runpy.run_path(str(EXTRACTOR))
    assert list(script["llama_cpp"](script["without_comments"](CPP))) == [
        (["-a", "--aa"], 1, "LLAMA_ARG_A"),
        (["--b", "--no-b"], 0, ""),
        (["--c"], 0, ""),
        (["--d"], 2, ""),
    ]
    assert list(script["ik_llama_cpp"](IK, LOG)) == [
        (["-a", "--aa"], 1, "LLAMA_ARG_A"),
        (["--b"], 0, ""),
        (["--c"], 2, ""),
        (["--log-new"], 0, ""),
        (["--log-file"], 1, ""),
    ]
