"""run-model: a prompt in, its continuation out.

stdout gets the text alone (ids for a file without tokenizer), stderr everything else.
"""

from __future__ import annotations

import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mlacli.cli import console
from mlacli.cli.flag_command import FlagCommand
from mlacli.cli.start import open_engines, prepared_model
from mlacli.cli.words import CommandLine
from mlacli.errors import ContextFull, MlacliError, UsageError

if TYPE_CHECKING:
    from mlacli.engine import Engine
    from mlacli.loading.tokenizer import Tokenizer

Prompt = str | tuple[int, ...]

_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"'": b"'", b'"': b'"', b"\\": b"\\"}


class Decoder(Protocol):
    """Ids to text, piece by piece."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class IdDecoder:
    """Ids as decimal numbers with spaces between: the output of a file without tokenizer."""

    def __init__(self) -> None:
        self._space = ""

    def push(self, token_id: int) -> str:
        piece, self._space = f"{self._space}{token_id}", " "
        return piece

    def flush(self) -> str:
        return ""


def run(line: CommandLine) -> None:
    prompt = read_prompt(line)  # before the heavy imports: a wrong line should fail at once
    from mlacli.sampling import Sampler

    prepared = prepared_model(line)
    tokenizer = prepared.tokenizer()
    ids = prompt_ids(prompt, tokenizer)
    for message in tokenizer.warnings if tokenizer else ():
        console.warning(message)
    check_prompt(ids, prepared.hparams.n_vocab, prepared.plan.n_ctx)
    eog_ids = tokenizer.eog_ids if tokenizer else frozenset()
    sampler = Sampler(prepared.params.sampling, eog_ids)
    if prepared.params.sampling.temp > 0:
        console.log(f"seed: {sampler.seed}")
    shown = ids if prompt_wanted(line) else ()
    with ExitStack() as stack:
        (engine,) = open_engines(stack, [prepared])
        made = False
        try:
            with console.TokenStream() as out:
                decoder: Decoder = tokenizer.stream() if tokenizer else IdDecoder()
                if shown and isinstance(prompt, str):
                    out.write(prompt)
                else:
                    out.write("".join(decoder.push(i) for i in shown))
                for token_id in engine.generate_ids(ids, line["predict"], sampler):
                    made = True
                    if token_id not in eog_ids:
                        out.write(decoder.push(token_id))
                out.write(decoder.flush())
        except KeyboardInterrupt:
            if made:
                report(engine, line["verbose"])
            raise
        report(engine, line["verbose"])


def report(engine: Engine, verbose: bool) -> None:
    """What is said after the text."""
    if verbose:
        console.attention(engine.attention_forms)
    if engine.context_full:
        console.note(f"stopped: the context of {engine.n_ctx} tokens is full")
    console.timings(engine.timings, engine.peak_memory())


def read_prompt(line: CommandLine) -> Prompt:
    """The prompt of -p, -f or --prompt-ids; UsageError when there is none."""
    given = line.values
    if "prompt_ids" in given:
        return tuple(given["prompt_ids"])
    if "prompt" in given:
        raw = given["prompt"].encode("utf-8", "surrogateescape")
        return _text(expand_escapes(raw) if escapes_wanted(line) else raw, "the prompt")
    if "file" in given:
        return read_prompt_file(given["file"])
    raise UsageError("no prompt", "give one with -p TEXT, -f FILE or --prompt-ids 1,2,3")


def escapes_wanted(line: CommandLine) -> bool:
    """-e and --no-escape: the last one counts, on by default."""
    return _last_of(line, "escape", "no_escape")


def prompt_wanted(line: CommandLine) -> bool:
    """--display-prompt and --no-display-prompt: the last one counts, on by default."""
    return _last_of(line, "display_prompt", "no_display_prompt")


def _last_of(line: CommandLine, yes: str, no: str) -> bool:
    asked = [key for key in line.typed if key in (yes, no)]
    return not asked or asked[-1] == yes


def expand_escapes(raw: bytes) -> bytes:
    r"""\n \r \t \' \" \\ and \xNN become one byte each; any other backslash stays."""

    def byte(m: re.Match[bytes]) -> bytes:
        return bytes([int(m[2], 16)]) if m[2] else _ESCAPES[m[1]]

    return re.sub(rb"\\(?:([nrt'\"\\])|x([0-9a-fA-F]{2}))", byte, raw)


def read_prompt_file(path: str) -> str:
    """The text of a file (`-` is stdin), without exactly one trailing newline."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as e:
        raise MlacliError(f"can't read the prompt file {path}: {e.strerror}", "check -f") from e
    return _text(raw.removesuffix(b"\n"), path)


def _text(raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        console.warning(f"{what} is no UTF-8 at byte {e.start}; such bytes become U+FFFD")
        return raw.decode("utf-8", "replace")


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
    if (top := max(ids)) >= n_vocab:
        raise UsageError(f"token id {top} is not in the vocabulary of {n_vocab}", "check the ids")
    if len(ids) > n_ctx:
        raise ContextFull(
            f"the prompt has {len(ids)} tokens, the context {n_ctx}",
            "give a larger -c or a shorter prompt",
        )


command = FlagCommand(
    "run-model",
    run,
    "Continues a prompt. The text goes to stdout; the plan, warnings, the effective configuration "
    "and timings go to stderr.",
)
