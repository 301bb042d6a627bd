"""What the commands print. stdout carries the result alone, stderr everything else.

The only file that knows rich, imported when a table or a progress bar is drawn; NO_COLOR and
streams that are no terminal are rich's business. What stderr gets goes through `logs` too.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self, TextIO

from mlacli.cli.logs import INFO, TRACE, WARNING, logs
from mlacli.errors import one_line

__all__ = ["INFO", "TRACE", "WARNING"]

if TYPE_CHECKING:
    from rich.progress import Progress

_CELL = 300  # characters of a table's cell
_WIDE = 24  # characters of a configuration value; longer ones shift their own remark only
_LONG = 200  # rows; drawing more takes rich seconds


class Finding(Protocol):
    """The part of a `compat.Finding` that is printed."""

    @property
    def level(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def hint(self) -> str: ...


class Checked(Protocol):
    """The part of `engine.checked` that is printed."""

    @property
    def n_tensors(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class Timings(Protocol):
    """The part of `engine.timings` that is printed; seconds and token counts."""

    @property
    def load_s(self) -> float: ...
    @property
    def prompt_s(self) -> float: ...
    @property
    def n_prompt(self) -> int: ...
    @property
    def decode_s(self) -> float: ...
    @property
    def n_decoded(self) -> int: ...
    @property
    def ttft_s(self) -> float: ...
    @property
    def sample_s(self) -> float: ...
    @property
    def n_sampled(self) -> int: ...


def result(text: str) -> None:
    """One line or block of the result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def open_logs(file: str | None, jsonl: str | None, verbosity: int | None) -> None:
    """Begins --log-file and --log-jsonl anew and sets -lv; MlacliError for a bad path."""
    logs.open(file, jsonl, verbosity)


def close_logs() -> None:
    logs.close()


def log(text: str, level: int = INFO) -> None:
    if level <= logs.verbosity:
        print(text, file=sys.stderr, flush=True)
        logs.line(text)


def event(kind: str, **values: object) -> None:
    """One object of --log-jsonl, whatever the verbosity."""
    logs.event(kind, **values)


def note(text: str, hint: str = "") -> None:
    event("note", message=text, hint=hint)
    log(one_line(f"note: {text} ({hint})" if hint else f"note: {text}"))


def warning(text: str, hint: str = "") -> None:
    event("warning", message=text, hint=hint)
    log(one_line(f"warning: {text} ({hint})" if hint else f"warning: {text}"), WARNING)


def error(message: str, hint: str, code: int) -> None:
    """The one `Error:` line that ends a run; no verbosity hides it."""
    event("error", message=message, hint=hint, exit_code=code)
    text = f"Error: {message} ({hint})" if hint else f"Error: {message}"
    log(one_line(text), 0)


def findings(found: Iterable[Finding]) -> None:
    """Warnings and notes of the guard, one line each."""
    for f in found:
        (note if f.level == "note" else warning)(f.message, f.hint)


def effective(rows: Iterable[tuple[str, str, str]]) -> None:
    """The configuration that really runs: name, value, note."""
    rows = [(name, one_line(x, _CELL), one_line(y, _CELL)) for name, x, y in rows]
    event("configuration", **{n: {"value": v, "note": r} for n, v, r in rows})
    names = max((len(r[0]) for r in rows), default=0)
    values = max((len(r[1]) for r in rows if r[2] and len(r[1]) <= _WIDE), default=0)
    log("configuration:")
    for name, value, remark in rows:
        log(f"  {name:<{names}}  {value:<{values}}  {remark}".rstrip())


def checked(found: Checked) -> None:
    """What --check-tensors found in order."""
    log(f"checked {found.n_tensors} tensors, {found.nbytes / 2**30:.2f} GiB")


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    to_stderr: bool = False,
    turn: bool = False,
) -> None:
    """An aligned table, numbers to the right: rich's on a terminal, plain lines elsewhere.

    `turn`: on a terminal too narrow for it, rows become columns.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    cells = [[one_line(cell, _CELL) for cell in row] for row in rows]
    lines = _plain_lines(columns, cells)
    if to_stderr:
        if logs.verbosity < INFO:
            return
        for line in lines:
            logs.line(line)
    if not stream.isatty() or len(cells) > _LONG:
        stream.write("".join(line + "\n" for line in lines))
    elif turn and max(map(len, lines)) > shutil.get_terminal_size().columns:
        turned = [list(row) for row in zip(columns, *cells, strict=True)]
        _rich_table(stream, turned[0], turned[1:])
    else:
        _rich_table(stream, columns, cells)
    stream.flush()


def _plain_lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    right = _numeric_columns(columns, rows)
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    return [
        "  ".join(
            f"{cell:>{w}}" if r else f"{cell:<{w}}"
            for cell, w, r in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in (columns, ["-" * w for w in widths], *rows)
    ]


def _rich_table(stream: TextIO, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name, numbers in zip(columns, _numeric_columns(columns, rows), strict=True):
        drawn.add_column(name, justify="right" if numbers else "left")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    Console(file=stream).print(drawn)


def _numeric_columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    """For each column, whether every cell that says something starts with a digit."""
    said = [[row[i] for row in rows if row[i] not in ("", "-")] for i in range(len(columns))]
    return [bool(cells) and all(c[0].isdigit() for c in cells) for cells in said]


class LoadProgress:
    """Counts bytes read, on a terminal only; rank threads may call it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, done: int, total: int) -> None:
        if not self._stream.isatty() or not total or logs.verbosity < INFO:
            return
        with self._lock:
            if self._bar is None:
                self._bar = self._open(total)
            self._bar.update(self._bar.task_ids[0], completed=done)

    def _open(self, total: int) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        columns = (TextColumn("loading"), BarColumn(), DownloadColumn(binary_units=True))
        bar = Progress(*columns, console=Console(file=self._stream), transient=True)
        bar.add_task("loading", total=total)
        bar.start()
        return bar

    def close(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None


class StatusLine:
    """One line on stderr that is written over, on a terminal only; clear it before a result."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.clear()

    def show(self, text: str) -> None:
        if self._stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\x1b[K" + text[:width])
            self._stream.flush()
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown = False


Thoughts = Literal["dimmed", "stderr", "hidden"]
_DIM, _PLAIN = "\x1b[2m", "\x1b[22m"


def has_styles(stream: TextIO) -> bool:
    """Whether text on this stream can be dimmed."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def gap() -> None:
    """An empty line between the text and what is said about it, where both share a terminal."""
    if sys.stdout.isatty() and sys.stderr.isatty() and logs.verbosity >= INFO:
        print(file=sys.stderr, flush=True)


def end_line() -> None:
    """A terminal's cursor to the next line, after a key that ended the input."""
    sys.stdout.write("\n")
    sys.stdout.flush()


class TokenStream:
    """Pieces to stdout as they come; the text ends with a newline however the run ends.

    `thoughts` go the way it says: dimmed before the text, to stderr, or nowhere.
    """

    def __init__(self, stream: TextIO | None = None, thoughts: Thoughts = "hidden") -> None:
        self._stream = stream or sys.stdout
        self._last = ""
        self._thoughts, self._thinking = thoughts, False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        if kind is None or not issubclass(kind, OSError):
            self.close()

    def write(self, piece: str) -> None:
        if piece:
            self._end_thought("\n\n")
            self._stream.write(piece)
            self._stream.flush()
            self._last = piece[-1]

    def thought(self, piece: str) -> None:
        """A piece of what the model thinks before it answers."""
        if self._thoughts == "dimmed":
            self._stream.write(piece if self._thinking else _DIM + piece)
            self._stream.flush()
        elif self._thoughts == "stderr":
            sys.stderr.write(piece)
            sys.stderr.flush()
        self._thinking = True

    def _end_thought(self, space: str) -> None:
        if self._thinking and self._thoughts == "dimmed":
            self._stream.write(_PLAIN + space)
        elif self._thinking and self._thoughts == "stderr":
            sys.stderr.write("\n")
        self._thinking = False

    def forget(self) -> None:
        """What follows begins a line by itself: a person ended this one."""
        self._stream.flush()
        self._last = ""

    def close(self) -> None:
        self._end_thought("\n")
        if self._last not in ("", "\n"):
            self._stream.write("\n")
        self._last = ""
        self._stream.flush()


def attention(forms: Mapping[str, str]) -> None:
    """The form that attention took in each phase."""
    log("attention  " + ", ".join(f"{phase} {form}" for phase, form in forms.items() if form))


def timings(t: Timings, peak_memory: int) -> None:
    """Load, prompt, decode and memory in llama.cpp's words, one line each."""
    event(
        "timings",
        load_s=t.load_s,
        prompt_s=t.prompt_s,
        n_prompt=t.n_prompt,
        decode_s=t.decode_s,
        n_decoded=t.n_decoded,
        ttft_s=t.ttft_s,
        sample_s=t.sample_s,
        n_sampled=t.n_sampled,
        peak_memory=peak_memory,
    )
    total = t.prompt_s + t.decode_s + t.sample_s
    log(f"       load time = {t.load_s * 1e3:10.2f} ms")
    log(_timing("prompt eval", t.prompt_s, t.n_prompt, "token"))
    log(_timing("       eval", t.decode_s, t.n_decoded, "run"))
    log(_timing("   sampling", t.sample_s, t.n_sampled, "run"))
    log(f"      total time = {total * 1e3:10.2f} ms / {t.n_prompt + t.n_decoded:5d} tokens")
    if t.ttft_s:
        log(f"     first token = {t.ttft_s * 1e3:10.2f} ms after the start of the prompt")
    log(f"     peak memory = {peak_memory / 2**20:10.2f} MiB resident")


def _timing(what: str, seconds: float, n: int, unit: str) -> str:
    line = f"{what} time = {seconds * 1e3:10.2f} ms / {n:5d} {unit + 's':<6}"
    if not n or seconds <= 0:
        return line.rstrip()
    return f"{line} ({seconds * 1e3 / n:8.2f} ms per token, {n / seconds:8.2f} tokens per second)"
