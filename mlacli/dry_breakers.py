"""DRY's sequence breakers as token sequences: every way in which a text can begin inside a token.

As in llama.cpp (after KoboldCpp): a token that holds the whole text breaks alone; one that ends in
the text's beginning breaks together with the tokens of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlacli.loading.tokenizer import Tokenizer

_LONGEST_TEXT, _LONGEST_TAIL = 40, 20


def dry_breakers(
    tokenizer: Tokenizer, texts: Sequence[str]
) -> Mapping[int, tuple[tuple[int, ...], ...]]:
    """First token id -> the ids that follow it, once for each way the texts can be written."""
    found: dict[int, dict[tuple[int, ...], None]] = {}
    pieces = [tokenizer.piece(i) for i in range(tokenizer.n_vocab)]
    for text in filter(None, texts):
        raw = text.encode()[:_LONGEST_TEXT]
        rests: dict[int, tuple[int, ...]] = {}
        for token_id, piece in enumerate(pieces):
            for n in _overlaps(piece, raw):
                if n not in rests:
                    rest = raw[n:].decode("utf-8", "replace")
                    ids = tokenizer.encode(rest, add_special=False, parse_special=False)
                    rests[n] = tuple(ids[:_LONGEST_TAIL]) if rest else ()
                found.setdefault(token_id, {})[rests[n]] = None
    return {token_id: tuple(tails) for token_id, tails in found.items()}


def _overlaps(piece: bytes, text: bytes) -> Iterator[int]:
    """How many bytes of `text` the token covers: all, or its beginning at the token's end."""
    if text in piece:
        yield len(text)
        return
    for n in range(min(len(piece), len(text) - 1), 0, -1):
        if piece.endswith(text[:n]):
            yield n
