"""Ratios, overtakings, result files and the picture of sweep-bench."""

import re

import pytest

from mlacli.errors import MlacliError, UsageError
from mlacli.plot import check_plot, draw
from mlacli.sweep_compare import Overtaking, Point, compare
from mlacli.sweep_files import read_series


def points(*speeds):
    return [Point(i * 64, pp, tg) for i, (pp, tg) in enumerate(speeds)]


MD = """\
|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |
|-------|--------|--------|----------|----------|----------|----------|
|    64 |     16 |      0 |    0.077 |   833.33 |    0.102 |   157.00 |
|    64 |     16 |     64 |    0.079 |   811.11 |   failed |      nan |
"""
SAVED = [Point(0, 833.33, 157.0), Point(64, 811.11, None)]


def test_ratios_and_where_one_overtakes_the_other():
    none = points((10, 4), (8, 4), (8, 4), (8, None))
    graph = points((5, 8), (8, 8), (12, 2), (4, 2))
    (c,) = compare({"none": none, "graph": graph})
    assert (c.name, c.n_kv) == ("graph/none", (0, 64, 128, 192))
    assert c.pp == (0.5, 1.0, 1.5, 0.5) and c.tg == (2.0, 2.0, 0.5, None)
    assert c.overtakings(c.pp) == [
        Overtaking(128, "graph", "none"),
        Overtaking(192, "none", "graph"),
    ]
    assert c.overtakings(c.tg) == [Overtaking(128, "none", "graph")]


def test_three_modes_are_three_pairs_at_common_depths():
    series = {m: points(*[(1, 1)] * n) for m, n in (("none", 3), ("layer", 2), ("graph", 3))}
    found = compare(series)
    assert [c.name for c in found] == ["layer/none", "graph/none", "graph/layer"]
    assert [len(c.n_kv) for c in found] == [2, 3, 2]


def test_saved_results_are_read_in_all_formats(tmp_path):
    csv_text = (
        "n_kv_max,n_kv,speed_pp,speed_tg,split_mode\n9,0,833.33,157.0,none\n9,64,811.11,,none\n"
    )
    jsonl = (
        '{"n_kv": 0, "speed_pp": 833.33, "speed_tg": 157.0}\n'
        '{"n_kv": 64, "speed_pp": 811.11, "speed_tg": null, "split_mode": ""}\n'
        '{"compare": "graph/none", "n_kv": []}\n'
    )
    noise = "main: n_kv_max = 128\n\n"  # ik_llama.cpp's stdout begins so
    texts = {"a.md": MD, "b.csv": csv_text, "c.jsonl": jsonl, "d.txt": noise + MD}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert read_series(tmp_path / name) == {name[0]: SAVED}, name


def test_a_table_of_several_modes_becomes_several_lines(tmp_path):
    lines = MD.splitlines()
    lines = [
        a + b for a, b in zip(lines, ("   MODE |", "--------|", " none |", " graph |"), strict=True)
    ]
    after = [
        "",
        "|   N_KV | S_PP graph/none |",
        "|--------|-----------------|",
        "|      0 |    1.00 |",
    ]
    (tmp_path / "both.md").write_text("\n".join(lines + after))
    assert read_series(tmp_path / "both.md") == {"both none": SAVED[:1], "both graph": SAVED[1:]}


@pytest.mark.parametrize(
    "text", ["", "hello\nyou\n", "| a | b |\n|---|---|\n| 1 | 2 |\n", '{"a": 1}\n']
)
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "x.md").write_text(text)
    with pytest.raises(MlacliError, match=r"x\.md (is no result of sweep-bench|has no rows)"):
        read_series(tmp_path / "x.md")
    with pytest.raises(MlacliError, match="can't read"):
        read_series(tmp_path / "absent.md")


def test_the_plot_script_of_the_original_can_read_the_table():
    """As it does: regex separator, second line skipped, first and last column dropped."""
    head, *rows = [re.split(r"\s*\|\s*", x) for i, x in enumerate(MD.splitlines()) if i != 1]
    assert head[1:-1] == ["PP", "TG", "N_KV", "T_PP s", "S_PP t/s", "T_TG s", "S_TG t/s"]
    assert all(len(row) == len(head) for row in rows)
    [float(row[i]) for row in rows for i in (3, 5, 7)]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_with_labels_and_units(tmp_path, suffix):
    pytest.importorskip("matplotlib", reason="the extra mlacli[plot] is not installed")
    path = tmp_path / f"p.{suffix}"
    draw({"none": SAVED, "graph": points((5, 8), (6, 7), (7, 6))}, path)
    if suffix == "png":
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        return
    text = path.read_text()
    for word in ("N_KV, tokens in the cache", "tokens per second", "none", "graph", "S_TG"):
        assert f">{word}" in text or word in text, word
    assert "#0072b2" in text and "#d55e00" in text
    draw({"none": SAVED, "graph": points((5, 8), (6, 7), (7, 6))}, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text


def test_what_would_fail_at_the_end_is_refused_at_the_start(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"can't draw p\.gif"):
        check_plot(tmp_path / "p.gif")
    with pytest.raises(MlacliError, match="there is no folder"):
        check_plot(tmp_path / "no" / "p.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MlacliError, match="matplotlib") as caught:
        check_plot(tmp_path / "p.png")
    assert caught.value.hint == "pip install 'mlacli[plot]'"
