"""Tables and progress on a terminal and elsewhere."""

import io

import pytest

from mlacli.cli import console

COLUMNS, ROWS = ("device", "total"), [("cpu", "1.5 GiB"), ("cuda0", "12.0 GiB")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """terminal() makes stdout say that it is a terminal of 80 columns, and returns it."""

    def make() -> Terminal:  # in the test's own phase: pytest sets stdout anew between phases
        stream = Terminal()
        monkeypatch.setattr("sys.stdout", stream)
        for name, value in {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}.items():
            monkeypatch.setenv(name, value)
        return stream

    return make


def test_a_table_in_a_file_is_plain_lines(capsys):
    console.table(COLUMNS, ROWS)
    assert capsys.readouterr().out == (
        "device     total\n"
        "------  --------\n"
        "cpu      1.5 GiB\n"
        "cuda0   12.0 GiB\n"
    )  # fmt: skip


def test_an_empty_table_is_its_header(capsys):
    console.table(COLUMNS, [])
    assert capsys.readouterr().out == "device  total\n------  -----\n"


def test_a_table_too_wide_for_the_terminal_is_turned(terminal):
    out = terminal()
    console.table([f"column {i}" for i in range(12)], [["x" * 10] * 12], turn=True)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 + 11
    assert max(map(len, lines)) <= 80
    assert "…" not in out.getvalue()


def test_a_table_that_fits_the_terminal_is_not_turned(terminal):
    out = terminal()
    console.table(COLUMNS, ROWS, turn=True)
    assert [line.split()[0] for line in out.getvalue().splitlines()][2:] == ["cpu", "cuda0"]


def test_a_long_value_does_not_push_the_remarks(capsys):
    rows = [("model", "/a/" + "long/" * 20, "Tiny"), ("context", "256", "given")]
    console.effective([*rows, ("attention", "-mla 3 -fa on", "block-wise")])
    assert capsys.readouterr().err.splitlines()[2:] == [
        "  context    256            given",
        "  attention  -mla 3 -fa on  block-wise",
    ]


def test_progress_is_for_terminals():
    plain, tty = io.StringIO(), Terminal()
    for stream in (plain, tty):
        with console.LoadProgress(stream) as progress:
            for done in (1, 2, 3):
                progress(done << 20, 3 << 20)
    assert plain.getvalue() == ""
    assert "loading" in tty.getvalue()


def test_a_stream_ends_its_line_once():
    out = io.StringIO()
    with console.TokenStream(out) as stream:
        stream.write("a")
        stream.write("")
    assert out.getvalue() == "a\n"
    with pytest.raises(ValueError, match="x"), console.TokenStream(out) as stream:
        stream.write("b")
        raise ValueError("x")
    assert out.getvalue() == "a\nb\n"


def test_a_status_line_is_for_terminals_and_leaves_nothing():
    plain, tty = io.StringIO(), Terminal()
    for stream in (plain, tty):
        with console.StatusLine(stream) as status:
            status.show("N_KV 512 of 4096 done")
            status.clear()
            status.clear()
            status.show("x" * 500)
    assert plain.getvalue() == ""
    shown = tty.getvalue()
    assert "\r\x1b[KN_KV 512 of 4096 done\r\x1b[K\r\x1b[Kxxx" in shown
    assert shown.endswith("\r\x1b[K") and shown.count("x") < 500
