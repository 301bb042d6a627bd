"""--grammar and --json-schema: which tokens may follow, by the llguidance library.

GBNF (llama.cpp's grammars) is turned into llguidance's own language; JSON schemas it reads itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlacli.errors import MlacliError, UsageError

if TYPE_CHECKING:
    from mlacli.loading.tokenizer import Tokenizer


# Between the parts of a JSON text, as in llama.cpp: a model may not put off its end for ever.
_BLANKS: Any = {"whitespace_pattern": r"( |\n{1,2}[ \t]{0,20})"}


class TokenGrammar:
    """A grammar over a vocabulary, and how far the text has come in it."""

    def __init__(self, tokenizer: Tokenizer, gbnf: str | None, json_schema: str | None) -> None:
        from llguidance import LLMatcher, grammar_from

        try:
            source = (
                grammar_from("gbnf", gbnf)
                if gbnf is not None
                else LLMatcher.grammar_from_json_schema(json_schema or "{}", _BLANKS)
            )
        except ValueError as e:
            raise UsageError(f"the grammar can't be read: {e}", "see llama.cpp's grammars") from e
        if problem := LLMatcher.validate_grammar(source):
            what = "JSON schema" if gbnf is None else "grammar"
            raise UsageError(
                f"the {what} can't be used: {_first_line(problem)}",
                "correct it; llama.cpp's grammars/README.md describes both",
            )
        self._source, self._vocabulary = source, _vocabulary(tokenizer)
        self._n = tokenizer.n_vocab
        self.begin()

    def begin(self) -> None:
        """Back to the start of the grammar."""
        from llguidance import LLMatcher

        self._matcher = LLMatcher(self._vocabulary, self._source)
        self._check()

    def allowed(self) -> NDArray[np.bool_]:
        """Whether each token [n_vocab] may follow, end tokens where the text may end."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(words, bitorder="little")[: self._n].astype(np.bool_)

    def accept(self, token_id: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise MlacliError(
                f"the grammar failed: {_first_line(self._matcher.get_error())}",
                "it may be too complex; simplify it",
            )


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), text)


def _vocabulary(tokenizer: Tokenizer) -> Any:
    """The tokenizer as llguidance wants it; special tokens are marked by a byte no text has."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Adapter:
        def __init__(self) -> None:
            self.eos_token_id = min(tokenizer.eog_ids, default=0)
            self.bos_token_id = tokenizer.bos_id
            ids = range(tokenizer.n_vocab)
            self.special_token_ids = [i for i in ids if tokenizer.is_hidden(i)]
            self.tokens = [b"\xff" * tokenizer.is_hidden(i) + tokenizer.piece(i) for i in ids]

        def __call__(self, text: str) -> list[int]:
            if not isinstance(text, str):
                raise TypeError("text, not bytes")
            return tokenizer.encode(text, add_special=False, parse_special=False)

    ends = sorted(tokenizer.eog_ids) or None
    return LLTokenizer(TokenizerWrapper(Adapter()), n_vocab=tokenizer.n_vocab, eos_token=ends)
