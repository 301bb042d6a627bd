"""validate.py without a GPU: its splits, its arithmetic, weights that no split changes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace as Of

import numpy as np
import pytest
from kit.example_scripts import example
from kit.simt import why_not
from kit.simt_gpu import simulated

from mlacli.kld_file import log_softmax
from mlacli.loading.presets import PRESETS


@pytest.fixture(scope="module")
def validate():
    return example("validate")


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_all_counts_of_ranks_and_gpus_are_there(validate, n: int) -> None:
    gpus = [f"cuda{i}" for i in range(n)]
    found = validate.splits(gpus, quick=False)
    assert found[0].mode == "none" and found[0].devices == ("cuda0",)
    assert len({split.name for split in found}) == len(found)
    graph = {len(split.devices) for split in found if split.mode == "graph"}
    assert graph >= {2, 3, 4, 5, 8} and {x.shares for x in found} >= {"3,1", "1,0", "3,2,2,1"}
    assert all(set(split.devices) <= set(gpus) for split in found)
    assert any(set(split.devices) == set(gpus) for split in found if split.mode == "graph")
    real = {(x.mode, len(x.devices)) for x in found if len(set(x.devices)) == len(x.devices)}
    assert real >= {(mode, m) for m in (2, 4, 8) if m <= n for mode in ("layer", "graph")}


def test_steps_are_on_both_sides_of_every_edge(validate) -> None:
    for edge in validate.EDGES[:2]:
        for n in validate.SIZES:
            first = edge - (n + 1) // 2
            assert first < edge <= first + n
        starts = [edge - (n + 1) // 2 for n in validate.SIZES]
        assert starts == sorted(starts, reverse=True)  # none needs rows that one before overwrote


def case_of(validate, logits: np.ndarray):
    return validate.Case(len(logits), 0, {}, logits, np.exp(log_softmax(logits)))


@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_divergence_is_that_of_its_definition(validate, size: float) -> None:
    rng = np.random.default_rng(3)
    want = (3 * rng.standard_normal((9, 5000))).astype(np.float32)
    got = (want + size * rng.standard_normal(want.shape)).astype(np.float32)
    apart = validate.Apart()
    with ThreadPoolExecutor() as pool:
        apart.add(got, case_of(validate, want), pool)
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in map(np.float64, (want, got)))
    assert np.allclose(apart.kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-3, atol=1e-14)
    assert apart.most == pytest.approx(float(abs(got - want).max()))
    assert bool(apart.beyond) == (size == 1.0)


def test_what_is_not_finite_is_beyond_the_bar(validate) -> None:
    want = np.ones((2, 16), np.float32)
    got = want.copy()
    got[1, 3] = np.nan
    apart = validate.Apart()
    with ThreadPoolExecutor() as pool:
        apart.add(got, case_of(validate, want), pool)
    assert apart.beyond


def test_memory_is_held_to_a_share_or_half_a_gibibyte(validate) -> None:
    gib = 1 << 30
    assert not validate.off_plan(10 * gib, 10 * gib + (511 << 20))
    assert validate.off_plan(10 * gib, 10 * gib + (513 << 20))
    assert validate.off_plan(10 * gib, 9 * gib) and not validate.off_plan(100 * gib, 98 * gib)


def test_weights_are_drawn_alike_for_every_split(validate) -> None:
    """A rank's part is cut out of the tensor; only queries and the head have other spreads."""
    preset = replace(validate.cut("v2lite"), d=512, F=512, f=256, heads=2, experts=4, vocab=512)
    plain = validate.SyntheticFile(preset, on_gpus=True)
    file = validate.Sharpened(preset, on_gpus=True)
    file.factors = {"attn_q": 2.0, "output": 3.0}
    for name, info in file.tensors.items():
        whole = np.asarray(file.rows(info))
        some = (Ellipsis, slice(0, 128), slice(None))
        assert whole.ndim < 2 or np.array_equal(np.asarray(file.rows(info)[some]), whole[some])
        same = np.array_equal(whole, np.asarray(plain.rows(info)))
        assert same != (name.split(".")[-2] in file.factors)
    assert PRESETS["v2lite"].layers == 27


def test_a_split_that_fails_ends_in_a_row_and_a_failure(validate, monkeypatch, capsys) -> None:
    """The others are still run."""
    opened = []

    def broken(preset, split):
        opened.append(split.name)
        raise ValueError("boom")

    monkeypatch.setattr(validate, "opened", broken)
    assert validate.validated("v2lite", ["cuda0"], True) is False
    assert "failed: boom" in capsys.readouterr().out and opened == ["none"]

    class Engine(Of):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    def partly(preset, split):
        if split.mode == "graph":
            return broken(preset, split)
        return Engine(n_kv=0)

    monkeypatch.setattr(validate, "opened", partly)
    monkeypatch.setattr(validate.CachedRows, "fill", lambda *given: None)
    found = [case_of(validate, np.ones((1, 8), np.float32))]
    monkeypatch.setattr(validate, "cases", lambda engine, quick: found)
    monkeypatch.setattr(validate, "row", lambda split, *rest: (f"| {split.name} |", ""))
    assert validate.validated("v2lite", ["cuda0", "cuda1"], False) is False
    out = capsys.readouterr().out
    assert "| layer, -ts 3,1 |" in out and out.count("failed: boom") == 8
    opened.clear()
    for part in (1, 2, 3):
        validate.validated("v2lite", ["cuda0", "cuda1"], False, (part, 3))
    assert len(opened) == 8 and capsys.readouterr().out.count("| none |") == 1


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.parametrize("name", ["v2lite", "glm5"])
def test_choices_are_imposed_on_every_rank(validate, monkeypatch, name: str) -> None:
    """Kernels on the CPU: two ranks choose as one does, or as they are told, even if told wrong."""
    simulated(monkeypatch, capability=75)
    monkeypatch.setattr(validate, "EDGES", (24, 20))
    monkeypatch.setattr(validate, "SIZES", (1, 3))
    monkeypatch.setattr(validate, "PREFILL", 8)
    small = replace(PRESETS["tiny"], d=128, heads=2, q=64, r=32, k=32, p=32, v=32, F=64, f=32,
                    vocab=96, experts=8, name=name)  # fmt: skip
    if name == "glm5":
        small = replace(small, arch="glm-dsa", indexer=(2, 64, 16))
    one, two = validate.splits(["cuda0", "cuda1"], quick=True)[::2]
    rows = validate.CachedRows()
    with validate.opened(small, one) as engine:
        rows.fill(engine, 24)
        found = validate.cases(engine, quick=False)
        n_choices = 2 + 3 * (name == "glm5")
        assert [len(case.choices) for case in found] == [n_choices] * len(found)
    with validate.opened(small, two) as engine:
        rows.fill(engine, 24)
        told, free = validate.compared(engine, found)
        assert not told.beyond and max(told.kl) < 1e-6 and max(free.kl) < 1e-6
        rows.fill(engine, 24)
        wrong = [replace(case, choices=_others(case.choices)) for case in found]
        told, free = validate.compared(engine, wrong)
        assert told.beyond and min(told.kl) > 1e-5 and max(free.kl) < 1e-6


def _others(choices):
    """Experts and rows that weren't chosen."""
    return {k: (ids + 1) % (24 if "indexer" in k else 8) for k, ids in choices.items()}
