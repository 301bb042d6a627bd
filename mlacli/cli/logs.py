"""Where log lines go besides stderr: --log-file as text, --log-jsonl as events; and -lv.

One `Logs` for the process, opened when a command line is read and closed when it ends.
"""

from __future__ import annotations

import json
import time
from typing import TextIO

from mlacli.errors import MlacliError

WARNING, INFO, TRACE = 2, 3, 4  # llama.cpp's levels; 1 is errors, 0 the result alone


class Logs:
    """The two log files, None where not asked for, and the highest level that is shown."""

    def __init__(self) -> None:
        self.verbosity = INFO
        self._text: TextIO | None = None
        self._jsonl: TextIO | None = None

    def open(self, file: str | None, jsonl: str | None, verbosity: int | None) -> None:
        self.close()
        self.verbosity = INFO if verbosity is None else verbosity
        self._text = _opened(file, "--log-file")
        self._jsonl = _opened(jsonl, "--log-jsonl")

    def close(self) -> None:
        for stream in (self._text, self._jsonl):
            if stream is not None:
                stream.close()
        self._text = self._jsonl = None
        self.verbosity = INFO

    def line(self, text: str) -> None:
        """A line as stderr got it."""
        if self._text is not None:
            self._text.write(text + "\n")
            self._text.flush()

    def event(self, kind: str, **values: object) -> None:
        """One JSON object: `time` in seconds since 1970, `event`, and what belongs to it."""
        if self._jsonl is not None:
            head = {"time": round(time.time(), 3), "event": kind}
            self._jsonl.write(json.dumps(head | values, ensure_ascii=False, default=str) + "\n")
            self._jsonl.flush()


def _opened(path: str | None, flag: str) -> TextIO | None:
    if path is None:
        return None
    try:
        return open(path, "w", encoding="utf-8", errors="backslashreplace")
    except OSError as e:
        raise MlacliError(f"can't write {path}: {e.strerror}", f"check {flag}") from e


logs = Logs()
