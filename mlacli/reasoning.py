"""Cuts an answer into the thought at its start and the rest, as it streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

Kind = Literal["thought", "answer"]
TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


class ThoughtSplitter:
    """Feeds text pieces through; `prompt` is what stands before, and may have opened a thought.

    A thought counts only where the answer begins with it; blanks around both parts are dropped.
    """

    def __init__(self, prompt: str = "") -> None:
        opened = next((tags for tags in TAGS if prompt.rstrip().endswith(tags[0])), None)
        self._kind: Kind | None = "thought" if opened else None  # None: nothing told yet
        self._close = opened[1] if opened else ""
        self._held = ""
        self._started = False  # whether the current part has shown anything

    def push(self, piece: str) -> Iterator[tuple[Kind, str]]:
        """What the piece completes; the beginning of a tag is held back."""
        self._held += piece
        if self._kind is None:
            self._begin()
        if self._kind == "thought":
            before, tag, after = self._held.partition(self._close)
            if tag:
                yield from self._out("thought", before.rstrip())
                self._kind, self._held, self._started = "answer", after, False
            else:
                shown = before[: len(before) - _begun(before, self._close)].rstrip()
                self._held = before[len(shown) :]  # blanks may be the thought's last
                yield from self._out("thought", shown)
        if self._kind == "answer":
            held, self._held = self._held, ""
            yield from self._out("answer", held)

    def flush(self) -> Iterator[tuple[Kind, str]]:
        """What was held back when the text ends."""
        held, self._held = self._held, ""
        yield from self._out(self._kind or "answer", held)

    def _begin(self) -> None:
        text = self._held.lstrip()
        for opening, closing in TAGS:
            if text.startswith(opening):
                self._kind, self._close = "thought", closing
                self._held = text[len(opening) :]
                return
        if text and not any(opening.startswith(text) for opening, _ in TAGS):
            self._kind, self._started = "answer", True  # no thought: blanks stay as they are

    def _out(self, kind: Kind, text: str) -> Iterator[tuple[Kind, str]]:
        if not self._started:
            text = text.lstrip()
        if text:
            self._started = True
            yield kind, text


def _begun(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
