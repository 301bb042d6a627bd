"""The guard and the other flag rules, over every architecture name that the original knows."""

from types import MappingProxyType

import pytest

from mlacli.compat import MLA_ARCHS, check, guard, raise_first_error, settled
from mlacli.errors import UsageError
from mlacli.flags import COMMON, by_long_name, to_params
from mlacli.params import Params

# GGUF names of the architectures that ik_llama.cpp's graph mode takes at its PR 1821 (B 2.1).
GRAPH_CAPABLE = (
    "llama", "qwen3", "qwen3moe", "qwen3vl", "glm4moe", "mistral3", "command-r", "cohere2", "mimo2",
    "hunyuan-moe", "gpt-oss", "ernie4_5-moe", "minimax-m2", "seed_oss", "step35", "qwen35",
    "qwen35moe", "gemma4", "deepseek2", "glm-dsa", "mistral4",
)  # fmt: skip
OFFENDERS = {
    "-ncmoe": {"n_cpu_moe": 3},
    "-cmoe": {"cpu_moe": True},
    "-rtr": {"run_time_repack": True},
    "-muge": {"merge_up_gate_experts": True},
    "-ot": {"override_tensor": ("exps=CPU",)},
}
KEYS = {name: flag.key for flag in by_long_name(COMMON).values() for name in flag.names}


def params(*offenders: str, mode: str = "graph", **more: object) -> Params:
    values = {"split_mode": mode, "device": ("cpu", "cpu"), **more}
    typed = {"split_mode": "-sm"}
    for word in offenders:
        values |= OFFENDERS[word]
        typed[KEYS[word]] = word
    typed |= {key: word for word, key in reversed(KEYS.items()) if key in more}
    return to_params(values, MappingProxyType(typed))


@pytest.mark.parametrize("word", OFFENDERS)
@pytest.mark.parametrize("arch", GRAPH_CAPABLE)
def test_only_mla_architectures_are_downgraded(arch: str, word: str) -> None:
    found, findings = guard(arch, params(word))
    if arch in MLA_ARCHS:
        assert found.split.mode == "layer"
        (finding,) = findings
        assert (finding.level, finding.flag, finding.verdict) == ("warning", word, "downgraded")
        assert word in finding.message and word in finding.hint
    else:
        assert found.split.mode == "graph"
        assert findings == ()


def test_the_mla_architectures_are_those_three() -> None:
    assert set(MLA_ARCHS) == {"deepseek2", "glm-dsa", "mistral4"}


def test_one_warning_names_the_first_offender_in_the_originals_order() -> None:
    order = ["-ncmoe", "-rtr", "-muge", "-ot"]
    for i in range(len(order)):
        _, findings = guard("deepseek2", params(*reversed(order[i:])))
        assert [f.flag for f in findings] == [order[i]]


@pytest.mark.parametrize("mode", ["layer", "none", "auto"])
def test_other_modes_keep_their_flags(mode: str) -> None:
    found, findings = guard("deepseek2", params(*OFFENDERS, mode=mode))
    assert found.split.mode == mode
    assert findings == ()


def test_zero_layers_of_host_experts_are_no_offence() -> None:
    found, findings = guard("deepseek2", params(n_cpu_moe=0))
    assert found.split.mode == "graph" and findings == ()


@pytest.mark.parametrize(("key", "value"), [("flash_attn", False), ("mla_use", 0)])
def test_graph_mode_without_its_attention_is_a_usage_error(key: str, value: object) -> None:
    with pytest.raises(UsageError, match="-sm graph needs"):
        raise_first_error(check("deepseek2", params(**{key: value})))


def test_the_downgrade_comes_before_every_other_check() -> None:
    # -sm graph -fa off -mla 0 -cmoe runs in layer mode, where both are allowed.
    given = params("-cmoe", flash_attn=False, mla_use=0)
    downgraded, findings = guard("deepseek2", given)
    assert downgraded.split.mode == "layer" and len(findings) == 1
    assert not [f for f in check("deepseek2", downgraded) if f.level == "error"]
    assert [f.flag for f in check("deepseek2", given) if f.level == "error"] == ["-fa", "-mla"]


def attention(**given: object) -> Params:
    return params(mode="layer", **given)


@pytest.mark.parametrize("mla", range(4))
@pytest.mark.parametrize("flash_attn", [True, False])
def test_v_has_a_type_where_it_has_a_cache(mla: int, flash_attn: bool) -> None:
    given = {"mla_use": mla, "flash_attn": flash_attn}
    own = mla == 0 or (mla == 1 and not flash_attn)
    found = {f.flag: f for f in check("deepseek2", attention(**given, cache_type_v="f16"))}
    assert ("-ctv" in found) is not own
    if not own:
        assert found["-ctv"].verdict == "no effect"
        assert ("ik_llama.cpp" in found["-ctv"].message) is not flash_attn or mla == 1
    found = {f.flag: f for f in check("deepseek2", attention(**given, cache_type_v="q8_0"))}
    assert (found.get("-ctv") is not None and found["-ctv"].level == "error") is (
        own and not flash_attn
    )


def test_gap_and_amb_say_where_they_have_no_effect() -> None:
    def idle(mode: str = "layer", **given: object) -> list[str]:
        given |= {"graph_attn_precision": "f16", "attention_max_batch": 300}
        findings = check("deepseek2", params(mode=mode, **given))
        return [f.flag for f in findings if f.flag in ("-gap", "-amb")]

    for mla in range(4):
        assert idle(mla_use=mla, flash_attn=False) == ["-gap"]
        assert idle(mla_use=mla) == ([] if mla == 2 else ["-amb"])
    assert idle("graph", mla_use=2) == ["-amb"]


@pytest.mark.parametrize(
    ("given", "runs", "warned"),
    [(0, 0, False), (1, 128, True), (127, 128, True), (128, 128, False)],
)
def test_a_small_amb_is_lifted_where_it_acts(given: int, runs: int, warned: bool) -> None:
    asked = attention(attention_max_batch=given, flash_attn=False)
    assert settled(asked).context.attention_max_batch == runs
    found = [(f.flag, f.verdict) for f in check("deepseek2", asked)]
    assert (("-amb", "changed") in found) is warned
    elsewhere = attention(attention_max_batch=given)
    assert settled(elsewhere) == elsewhere
    assert [f.verdict for f in check("deepseek2", elsewhere)] == ["no effect"]


def test_mla_2_is_3_under_graph() -> None:
    two = params(mla_use=2, attention_max_batch=5)
    assert settled(two).context.mla == 3
    assert {(f.flag, f.verdict) for f in check("deepseek2", two)} == {
        ("-mla", "no effect"), ("-amb", "no effect")
    }  # fmt: skip
    assert settled(attention(mla_use=2)).context.mla == 2


def test_gpus_never_hold_whole_score_matrices() -> None:
    on_gpu = attention(device=("cuda0",), mla_use=2)
    assert settled(on_gpu).context.mla == 3
    found = {f.flag: f.message for f in check("deepseek2", on_gpu)}
    assert found["-mla"] == "it runs as -mla 3 here"
    assert settled(attention(device=("cuda0",), mla_use=1)).context.mla == 1


@pytest.mark.parametrize("given", [{"flash_attn": False}, {"mla_use": 0}])
def test_gpus_lack_the_other_forms(given: dict[str, object]) -> None:
    errors = [f for f in check("deepseek2", attention(device=("cuda0",), **given))
              if f.level == "error"]  # fmt: skip
    assert len(errors) == 1 and "on GPUs" in errors[0].message


def test_flags_that_mean_nothing_on_cpu_say_so() -> None:
    notes = {f.flag: f for f in check("deepseek2", params(*OFFENDERS, mode="layer"))}
    assert set(notes) == set(OFFENDERS) - {"-muge"}
    assert {(f.level, f.verdict) for f in notes.values()} == {("note", "no effect")}
    assert all("on the CPU" in f.message and "effect" not in f.message for f in notes.values())


@pytest.mark.parametrize("where", [{"vram": (1 << 36,)}, {"device": ("cuda0",)}])
def test_placement_runs_on_gpus(where: dict[str, object]) -> None:
    """Only repacking is a note: a GPU's weights always are."""
    given = [flag for flag in OFFENDERS if flag != "-cmoe"]
    (note,) = check("deepseek2", params(*given, mode="layer", **where))
    assert (note.flag, note.verdict) == ("-rtr", "no effect") and "for the GPU" in note.message


@pytest.mark.parametrize(
    ("rules", "message"),
    [("exps=CUDA1", "-ot exps=CUDA1: the run has no device CUDA1"),
     (r"a{2}\.b=CPU,a{2}\.b=CUDA0", "contradict each other")],
)  # fmt: skip
def test_rules_that_can_t_be_obeyed(rules: str, message: str) -> None:
    for where in ({"vram": (1 << 36,)}, {"device": ("cuda0",)}):
        found = check("deepseek2", params(mode="layer", override_tensor=(rules,), **where))
        (error,) = [f for f in found if f.level == "error"]
        assert message in error.message and error.flag == "-ot"


def test_all_layers_and_some_layers_contradict_each_other() -> None:
    found = check("deepseek2", params("-cmoe", "-ncmoe", mode="layer", device=("cuda0",)))
    (error,) = [f for f in found if f.level == "error"]
    assert error.message == "-cmoe and -ncmoe 3 contradict each other"


def test_graph_on_one_device_warns() -> None:
    (finding,) = check("deepseek2", params(device=("cpu",)))
    assert (finding.level, finding.flag, finding.verdict) == ("warning", "-sm", "changed")


def test_flags_of_another_mode_are_reported_without_effect() -> None:
    given = {"main_gpu": 1, "cache_type_v": "f16", "gpu_layers": 3}
    assert [f.flag for f in check("deepseek2", params(**given))] == ["-ctv", "-mg", "-ngl"]
    given = {"expert_split": "id", "graph_reduce_type": "f16"}
    found = check("deepseek2", params(mode="layer", **given))
    assert [f.flag for f in found] == ["--expert-split", "-grt"]


@pytest.mark.parametrize("where", [{}, {"vram": (1 << 36, 1 << 36)}])
def test_graph_with_one_share_warns(where: dict[str, object]) -> None:
    def changed(*shares: float) -> list[str]:
        found = check("deepseek2", params(tensor_split=shares, **where))
        return [f.hint for f in found if f.verdict == "changed"]

    assert changed(1.0, 0.0) == changed(1.0) == ["give several devices a share in -ts"]
    assert changed(3.0, 1.0) == []


def test_layers_on_gpus_are_one_finding() -> None:
    (finding,) = check("deepseek2", params(mode="none", device=("cpu",), gpu_layers=99))
    assert (finding.flag, finding.verdict) == ("-ngl", "no effect")
    assert finding.message == "all layers are on the CPU"
