"""Turns typed by a person, with line editing and history; or read from a pipe, one a line."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from mlacli.cli import console

_KEPT = 1000  # lines of history


class LineInput:
    """Reads turns from stdin; `prompt` is shown on a terminal alone."""

    def __init__(self, prompt: str, *, multiline: bool, simple: bool) -> None:
        self.prompt, self.multiline = prompt, multiline
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._history: Path | None = None
        self._editor = self.is_terminal and not simple and self._begin_editing()

    def _begin_editing(self) -> bool:
        """Arrow keys and history, by the standard library; False where it lacks them."""
        try:
            import readline
        except ImportError:
            return False
        self._history = history_file()
        readline.set_history_length(_KEPT)
        readline.set_auto_history(False)
        if self._history is not None:
            with suppress(OSError):
                readline.read_history_file(self._history)
        return True

    def read(self) -> str | None:
        """The next turn; None at the end of the input."""
        lines: list[str] = []
        while (line := self._line(bool(lines))) is not None:
            more = line.endswith("\\")
            lines.append(line.removesuffix("\\"))
            if more == self.multiline:
                break
        if not lines:
            return None
        text = "\n".join(lines)
        self._remember(text)
        return text

    def _line(self, continued: bool) -> str | None:
        if not self.is_terminal:
            raw = sys.stdin.readline()
            return raw.removesuffix("\n") if raw else None
        try:
            return input("  " if continued else self.prompt)
        except EOFError:
            console.end_line()
            return None

    def _remember(self, text: str) -> None:
        if not self._editor or not text.strip():
            return
        import readline

        readline.add_history(text.replace("\n", " "))
        if self._history is not None:
            with suppress(OSError):
                self._history.parent.mkdir(parents=True, exist_ok=True)
                self._history.touch(mode=0o600)
                readline.write_history_file(self._history)


def history_file() -> Path | None:
    """$MLACLI_HISTORY, an empty one meaning none; else in the user's state directory."""
    given = os.environ.get("MLACLI_HISTORY")
    if given is not None:
        return Path(given) if given else None
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "mlacli" / "history"
