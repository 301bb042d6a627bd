"""Where a prompt comes from: -p, -f, --prompt-ids or a pipe; and its token ids."""

from __future__ import annotations

import os
import re
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlacli.cli import console
from mlacli.cli.words import CommandLine
from mlacli.errors import ContextFull, MlacliError, UsageError

if TYPE_CHECKING:
    from mlacli.loading.tokenizer import Tokenizer

Prompt = str | tuple[int, ...]

_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"'": b"'", b'"': b'"', b"\\": b"\\"}


def read_prompt(line: CommandLine) -> Prompt | None:
    """The prompt of -p, -f or --prompt-ids, else what is piped in; None when there is none.

    A chat asked for by -cnv, and -i, take their turns from the pipe instead.
    """
    given = line.values
    if "prompt_ids" in given:
        return tuple(given["prompt_ids"])
    if "prompt" in given:
        return unescaped(line, given["prompt"], "the prompt")
    if "file" in given:
        return read_text_file(given["file"], "-f", "the prompt file")
    if not (line["conversation"] or takes_turns(line)) and stdin_is_given():
        return read_text_file("-", "the pipe")
    return None


def takes_turns(line: CommandLine) -> bool:
    """-i or -if."""
    return bool(line["interactive"] or line["interactive_first"])


def stdin_is_given() -> bool:
    """Whether stdin is a pipe or a file: no terminal, and not the null device."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def unescaped(line: CommandLine, text: str, what: str) -> str:
    r"""A text of the command line with \n and the like expanded, unless --no-escape."""
    raw = text.encode("utf-8", "surrogateescape")
    return decoded(expand_escapes(raw) if last_of(line, "escape", "no_escape") else raw, what)


def last_of(line: CommandLine, yes: str, no: str) -> bool:
    """Of two switches that undo each other the last one counts; the first is on by default."""
    asked = [key for key in line.typed if key in (yes, no)]
    return not asked or asked[-1] == yes


def expand_escapes(raw: bytes) -> bytes:
    r"""\n \r \t \' \" \\ and \xNN become one byte each; any other backslash stays."""

    def byte(m: re.Match[bytes]) -> bytes:
        return bytes([int(m[2], 16)]) if m[2] else _ESCAPES[m[1]]

    return re.sub(rb"\\(?:([nrt'\"\\])|x([0-9a-fA-F]{2}))", byte, raw)


def read_text_file(path: str, flag: str, what: str = "the file") -> str:
    """The text of a file (`-` is stdin), without exactly one trailing newline."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as e:
        raise MlacliError(f"can't read {what} {path}: {e.strerror}", f"check {flag}") from e
    return decoded(raw.removesuffix(b"\n"), "the pipe" if path == "-" else path)


def decoded(raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        console.warning(f"{what} is no UTF-8 at byte {e.start}; such bytes become U+FFFD")
        return raw.decode("utf-8", "replace")


def settled_texts(line: CommandLine) -> dict[str, Any]:
    """Sampling values that are read from files, or have escapes in them, by key."""
    found: dict[str, Any] = {}
    for key in ("grammar", "json_schema"):
        if f"{key}_file" in line.values:
            flag = line.typed[f"{key}_file"]
            found[key] = read_text_file(line.values[f"{key}_file"], flag)
    if "dry_sequence_breaker" in line.values:
        texts = line.values["dry_sequence_breaker"]
        found["dry_sequence_breaker"] = tuple(unescaped(line, t, "a breaker") for t in texts)
    return found


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """The prompt as ids, special tokens added and parsed; an empty one is [BOS] where used."""
    if not isinstance(prompt, str):
        return list(prompt)
    if tokenizer is None:
        raise UsageError("the file has no tokenizer", "give the prompt with --prompt-ids 1,2,3")
    ids = tokenizer.encode(prompt, add_special=True, parse_special=True)
    if not ids and tokenizer.add_bos and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id]
    if not ids:
        raise UsageError("the prompt is empty", "this vocabulary has no BOS to start from; give -p")
    return ids


def check_prompt(ids: list[int], n_vocab: int, n_ctx: int) -> None:
    """Refuses, before weights load, what the engine would refuse after."""
    if (top := max(ids, default=0)) >= n_vocab:
        raise UsageError(f"token id {top} is not in the vocabulary of {n_vocab}", "check the ids")
    if len(ids) > n_ctx:
        raise ContextFull(
            f"the prompt has {len(ids)} tokens, the context {n_ctx}",
            "give a larger -c or a shorter prompt",
        )
