"""Text to token ids and back, from a GGUF file's `tokenizer.ggml.*` metadata.

Byte-level BPE (model "gpt2") as llama.cpp does it: special tokens are cut out first, the text
between them is pre-tokenized and merged by the `tokenizers` library. Must not know files, models
or chat templates. Never prints: what a user should hear is in `warnings`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from mlacli.errors import GgufError, MlacliError, UnsupportedFeature
from mlacli.loading.merges import listed_merges, ranked_merges
from mlacli.loading.pre_tokenizers import DEFAULT, PreTokenizer, pre_tokenizer

if TYPE_CHECKING:
    import tokenizers

_PREFIX = "tokenizer.ggml."
_FALCON_ID = 11  # llama.cpp's bos and eos where a BPE file names none; dates from Falcon


class TokenType(IntEnum):
    """GGUF's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Texts that end a generation, whatever the file says about their type.
_EOG_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
    *("<｜end▁of▁sentence｜>", "[e~["),
)

# Texts by which a fill-in-the-middle token is known where the file has no id for it. The last
# three also end a generation.
_FIM_TEXTS = {
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> "
    "<|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> "
    "<|code_suffix|> <|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> "
    "<|code_middle|> <|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
_OLD_FIM_KEYS = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}

# OpenAI's harmony format: text of the answer, always shown.
_HARMONY_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether the file brings a vocabulary; without one only token ids can be run."""
    return metadata.get(_PREFIX + "model", "none") not in ("none", "no_vocab")


class Tokenizer:
    """A vocabulary with its merges; `from_metadata` makes one.

    `warnings` may grow by one in `encode`: a text that itself begins with BOS (or ends with EOS)
    gets a second one, as in llama.cpp.
    """

    def __init__(
        self, vocabulary: _Vocabulary, bpe: tokenizers.Tokenizer, pre: PreTokenizer
    ) -> None:
        self._texts = vocabulary.texts
        self._warnings = vocabulary.warnings
        self._bpe = bpe
        self.n_vocab = len(vocabulary.texts)
        self.add_bos = vocabulary.flag("add_bos_token", pre.add_bos)
        self.add_eos = vocabulary.flag("add_eos_token", False)
        default = None if pre.bos_from_file_only else _FALCON_ID
        self.bos_id = vocabulary.bos_or_eos("bos", self.add_bos, default)
        self.eos_id = vocabulary.bos_or_eos("eos", self.add_eos, _FALCON_ID)
        self.eog_ids = vocabulary.end_of_generation(self.eos_id)
        # only now: finding the ids above may have turned tokens into control tokens
        self._types = vocabulary.types
        self._hidden = vocabulary.hidden
        special = vocabulary.hidden | vocabulary.user_defined
        # stable, so that of equally long ones the lower id comes first
        by_length = sorted(special, key=lambda i: (-len(self._texts[i].encode()), i))
        self._special = [(self._texts[i], i) for i in by_length]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that the keys `tokenizer.ggml.*` describe."""
        model = metadata.get(_PREFIX + "model")
        if model != "gpt2":
            raise UnsupportedFeature(
                f"{_PREFIX}model is {model!r}, mlacli has 'gpt2' (byte-level BPE) only",
                "give token ids instead of text, or use a file with a gpt2 vocabulary",
            )
        vocabulary = _Vocabulary(metadata)
        name = metadata.get(_PREFIX + "pre") or ""
        if not isinstance(name, str):
            raise GgufError(f"{_PREFIX}pre is {name!r}, not a string", "convert the model again")
        if not name:
            vocabulary.warnings.append(
                f"the file has no {_PREFIX}pre; text is cut by llama.cpp's 'default' rules, which "
                "can lower the quality of the output: convert the model again"
            )
        pre = pre_tokenizer(name) if name else DEFAULT
        return cls(vocabulary, vocabulary.bpe(pre), pre)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should be told, each once."""
        return tuple(self._warnings)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        `add_special` adds BOS and EOS where the model asks for them; with `parse_special` False
        the names of control tokens are plain text (user-defined tokens are found all the same).
        Half a surrogate pair becomes U+FFFD.
        """
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        ids: list[int] = []
        for part in self._partition(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._bpe.encode(part, add_special_tokens=False).ids
        if add_special and self.add_bos and self.bos_id is not None:
            self._warn_if(ids[:1] == [self.bos_id], "begins with the BOS token", "two BOS tokens")
            ids.insert(0, self.bos_id)
        if add_special and self.add_eos and self.eos_id is not None:
            self._warn_if(ids[-1:] == [self.eos_id], "ends with the EOS token", "two EOS tokens")
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Control and unknown tokens yield nothing, user-defined ones their text, as in llama.cpp
        when it prints an answer. Blanks before punctuation stay (llama.cpp's detokenize removes
        them for some vocabularies, its output of an answer does not).
        """
        return b"".join(map(self._shown, ids)).decode("utf-8", "replace")

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token, which may be a part of a character; special tokens by name.

        Nothing for ids past the vocabulary: models pad their output, a sampler may pick such a row.
        """
        if token_id < 0:
            raise MlacliError(f"there is no token {token_id}", "ids start at 0")
        if token_id >= self.n_vocab:
            return b""
        text, kind = self._texts[token_id], self._types[token_id]
        if token_id in self._hidden or kind == TokenType.USER_DEFINED:
            return text.encode()
        if kind == TokenType.BYTE:
            return bytes.fromhex(text[3:5])
        if kind != TokenType.NORMAL:
            return b""
        return b"".join(_CHAR_TO_BYTE.get(c) or c.encode() for c in text)

    def stream(self) -> StreamDecoder:
        """A decoder to feed tokens as they are generated."""
        return StreamDecoder(self)

    def is_hidden(self, token_id: int) -> bool:
        """Whether it is a control or unknown token, which an answer doesn't show."""
        return token_id in self._hidden

    def _shown(self, token_id: int) -> bytes:
        return b"" if token_id in self._hidden else self.piece(token_id)

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        """`text` with special tokens replaced by their ids; between them non-empty strings.

        Longest token first over the whole text (not leftmost first), as llama.cpp does.
        """
        parts: list[str | int] = [text] if text else []
        for name, token_id in self._special:
            if name not in text or (token_id in self._hidden and not parse_special):
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                first, *others = part.split(name)
                cut += [first] if first else []
                for other in others:
                    cut += [token_id, other] if other else [token_id]
            parts = cut
        return parts

    def _warn_if(self, doubled: bool, what: str, result: str) -> None:
        message = f"the text already {what} that the model adds by itself: there are now {result}"
        if doubled and message not in self._warnings:
            self._warnings.append(message)


class StreamDecoder:
    """Text of a growing token sequence; all it returns, joined, equals `decode` of all tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; an unfinished character is held back."""
        return self._utf8.decode(self._tokenizer._shown(token_id))

    def flush(self) -> str:
        """U+FFFD if the sequence ended inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)


class _Vocabulary:
    """The checked metadata while a `Tokenizer` is built from it.

    `types` and `hidden` start as the file has them; `end_of_generation` corrects tokens that look
    like control tokens and are not marked so, as llama.cpp does.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.warnings: list[str] = []
        self._metadata = metadata
        texts = self._list("tokens", str)
        self.texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
        self.ids = {text: i for i, text in enumerate(self.texts)}
        if len(self.ids) != len(self.texts):
            twice = next(t for i, t in enumerate(self.texts) if self.ids[t] != i)
            raise GgufError(
                f"{_PREFIX}tokens has the token {twice!r} more than once",
                "the file is damaged, or its converter is faulty: convert the model again",
            )
        normal: list[int] = [TokenType.NORMAL] * len(self.texts)
        types = self._list("token_type", int) if _PREFIX + "token_type" in metadata else normal
        if len(types) < len(self.texts):
            raise GgufError(
                f"{_PREFIX}token_type has {len(types)} entries for {len(self.texts)} tokens",
                "the file is damaged: fetch or convert it again",
            )
        self.types = list(types[: len(self.texts)])
        unseen = (TokenType.CONTROL, TokenType.UNKNOWN)
        self.hidden = {i for i, kind in enumerate(self.types) if kind in unseen}
        for i, kind in enumerate(self.types):
            if kind == TokenType.BYTE and not re.fullmatch("<0x[0-9A-Fa-f]{2}>", self.texts[i]):
                raise GgufError(
                    f"{_PREFIX}tokens: byte token {i} is {self.texts[i]!r}, not like <0x0A>",
                    "the file is damaged: fetch or convert it again",
                )

    @property
    def user_defined(self) -> set[int]:
        return {i for i, kind in enumerate(self.types) if kind == TokenType.USER_DEFINED}

    def flag(self, name: str, default: bool) -> bool:
        value = self._metadata.get(_PREFIX + name, default)
        if not isinstance(value, bool):
            raise GgufError(f"{_PREFIX}{name} is {value!r}, not a bool", "convert the model again")
        return value

    def special_id(self, name: str) -> int | None:
        """The id under `<name>_token_id`, or None if the file has no such key."""
        key = f"{_PREFIX}{name}_token_id"
        value = self._metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.texts):
            raise GgufError(
                f"{key} is {value!r}, the vocabulary has ids 0 to {len(self.texts) - 1}",
                "correct the key in the file, for instance with gguf-py's gguf_set_metadata.py",
            )
        return value

    def bos_or_eos(self, name: str, added: bool, default: int | None) -> int | None:
        """The id from the file, else `default`, but None if the vocabulary is too small for it."""
        found = self.special_id(name)
        if found is not None:
            return found
        key = f"{_PREFIX}{name}_token_id"
        if default is not None and default < len(self.texts):
            if added or name == "eos":
                self.warnings.append(
                    f"the file has no {key}; token {default} ({self.texts[default]!r}) is "
                    "taken, as in llama.cpp, which is seldom right"
                )
            return default
        if added:
            raise GgufError(
                f"{name.upper()} is to be added to every text, and there is no {key}",
                f"add that key, or set {_PREFIX}add_{name}_token to false",
            )
        return None

    def end_of_generation(self, eos_id: int | None) -> frozenset[int]:
        """The tokens that end an answer; marks control tokens that the file forgot to mark."""
        fim = {name: self._fim_id(name) for name in _FIM_TEXTS}
        ends = {fim["fim_pad"], fim["fim_rep"], fim["fim_sep"]}
        for text in _EOG_TEXTS:
            if text in self.ids:
                ends.add(self.ids[text])
                self.hidden.add(self.ids[text])
        for text in _HARMONY_TEXTS:
            self._make_user_defined(text)
        ends |= {eos_id, self.special_id("eot"), self.special_id("eom")}
        names = {self.texts[i] for i in ends if i is not None}
        harmony = "<|return|>" in names and names & {"<|call|>", "<|calls|>"}
        solar = "<|flush|>" in names and names & {"<|call|>", "<|calls|>"}
        if "<|end|>" in names and (harmony or solar):  # there it only ends a part of the answer
            ends.discard(self.ids["<|end|>"])
            self._make_user_defined("<|end|>")
        return frozenset(i for i in ends if i is not None)

    def bpe(self, pre: PreTokenizer) -> tokenizers.Tokenizer:
        """The `tokenizers` object that encodes text without special tokens."""
        import tokenizers
        from tokenizers import models

        if pre.ranked and not self._metadata.get(_PREFIX + "merges"):
            normal = (i for i, kind in enumerate(self.types) if kind == TokenType.NORMAL)
            merges = ranked_merges({self.texts[i]: i for i in normal})
        else:
            merges, n_unknown = listed_merges(self._list("merges", str), self.ids)
            if n_unknown:
                self.warnings.append(
                    f"{n_unknown} of {_PREFIX}merges name tokens that are not in the vocabulary; "
                    "they are left out"
                )
        n_missing = sum(c not in self.ids for c, byte in _CHAR_TO_BYTE.items() if byte in _IN_UTF8)
        if n_missing:
            self.warnings.append(
                f"{n_missing} bytes have no token in {_PREFIX}tokens; encoding drops them"
            )
        model = models.BPE(self.ids, merges, ignore_merges=pre.ignore_merges)
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = pre.build()
        return made

    def _fim_id(self, name: str) -> int | None:
        """From the file, else the lowest id with one of the texts, which becomes control."""
        for key in (_OLD_FIM_KEYS.get(name, name), name):
            found = self.special_id(key)
            if found is not None:
                return found
        by_text = [self.ids[text] for text in _FIM_TEXTS[name].split() if text in self.ids]
        self.hidden.update(sorted(by_text)[:1])
        return min(by_text, default=None)

    def _make_user_defined(self, text: str) -> None:
        if text in self.ids:
            self.types[self.ids[text]] = TokenType.USER_DEFINED
            self.hidden.discard(self.ids[text])

    def _list(self, name: str, kind: type) -> Sequence[Any]:
        value = self._metadata.get(_PREFIX + name)
        if value is None:
            raise GgufError(
                f"the file has no {_PREFIX}{name}, which a gpt2 vocabulary needs",
                "convert the model again, or give token ids instead of text",
            )
        if not isinstance(value, list | tuple) or not all(isinstance(v, kind) for v in value):
            raise GgufError(
                f"{_PREFIX}{name} is not a list of {kind.__name__}",
                "the file is damaged, or its converter is faulty",
            )
        return value


def _char_to_byte() -> dict[str, bytes]:
    """GPT-2's printable stand-in for each byte: itself, or U+0100 onwards for the others."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {
        chr(256 + i): bytes([b]) for i, b in enumerate(others)
    }


_CHAR_TO_BYTE = _char_to_byte()
_IN_UTF8 = bytes({*range(0xC0), *range(0xC2, 0xF5)})  # no text has any of the other 13
