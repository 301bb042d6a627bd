"""How each `tokenizer.ggml.pre` cuts text into the pieces that BPE works on.

A pre-tokenizer is a list of expressions applied one after another: each one cuts every piece that
the one before left into its matches and the gaps between them. Names and flags are llama.cpp's;
where its expression only comes near a model's own (tekken, kimi-k2), ours is the model's.
Must not know vocabularies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlacli.errors import UnsupportedFeature

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """The expressions (Oniguruma) and what llama.cpp's name switches on besides them."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is taken whole
    add_bos: bool = False  # where the file has no add_bos_token
    bos_from_file_only: bool = False  # no default where the file has no bos_token_id
    ranked: bool = False  # where the file has no merges, token ids are ranks

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The same as an object of the `tokenizers` library, with bytes as GPT-2's characters."""
        from tokenizers import Regex, pre_tokenizers

        cuts = [pre_tokenizers.Split(Regex(p), "isolated") for p in self.patterns]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*cuts, to_bytes])


def _char_class(ranges: str) -> str:
    """`[...]` for hexadecimal code points and ranges of them, separated by blanks."""
    ends = (r.partition("-") for r in ranges.split())
    return "[" + "".join(rf"\x{{{lo}}}-\x{{{hi or lo}}}" for lo, _, hi in ends) + "]"


_CASED = _char_class("""
41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A
38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF
1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D
1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4
1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F
2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D A680-A69B A722-A76F
A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3
104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
""")  # letters with case, as deepseek-llm froze them
_MARKS = _char_class("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
_CJK = _char_class("4E00-9FA5 800-4E00 AC00-D7FF")
_KANJI_KANA = _char_class("4E00-9FA5 3040-309F 30A0-30FF")
_ASCII_MARK = r"[!-/:-@\[-`{-~]"

_SUFFIX = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA_BPE = "|".join((_SUFFIX, _WORD, r"\p{N}{1,3}", _REST))
_QWEN2 = "|".join((_SUFFIX, _WORD, r"\p{N}", _REST))
_DEEPSEEK_V3 = "|".join(
    (
        _ASCII_MARK + "[A-Za-z]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        _SPACES,
    )
)


def _camel_case(but: str = "", suffix: str = "") -> str:
    """Words that also end before a capital: capitals then small letters, at least one of either.

    Letters without case and marks are both; `but` is taken out of both.
    """
    capital = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    small = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}{capital}*{small}+{suffix}|{lead}{capital}+{small}*{suffix}"


_TEKKEN = "|".join((_camel_case(), r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES))
_KIMI_K2 = "|".join(
    (
        r"\p{Han}+",
        # the long s is there because Moonshot's (?i:'s) matches it
        _camel_case(r"&&[^\p{Han}]", rf"(?:{_SUFFIX}|'\x{{17F}})?"),
        r"\p{N}{1,3}",
        _REST,
    )
)

DEFAULT = PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}"))

PRE_TOKENIZERS = {
    "default": DEFAULT,
    "llama-bpe": PreTokenizer((_LLAMA_BPE,), ignore_merges=True, add_bos=True),
    "gpt-2": PreTokenizer((_GPT2,)),
    "qwen2": PreTokenizer((_QWEN2,)),
    "deepseek-llm": PreTokenizer(
        # \z: at a `$` Oniguruma would also stop before a newline
        (r"[\r\n]", rf"\s?{_CASED}+", rf"\s?{_MARKS}+", r"\s+\z", rf"{_CJK}+", r"\p{N}+")
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", rf"{_CJK}+", r"\p{N}")),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", rf"{_KANJI_KANA}+", _DEEPSEEK_V3)),
    "glm4": PreTokenizer((_LLAMA_BPE,), ignore_merges=True, bos_from_file_only=True),
    "chatglm-bpe": PreTokenizer((_LLAMA_BPE,), bos_from_file_only=True),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "kimi-k2": PreTokenizer((_KIMI_K2,), ignore_merges=True, ranked=True),
}

# Names that llama.cpp treats exactly as one above, expressions and flags. Its names for encoder
# models with the gpt-2 expression (jina-v2-*, roberta-bpe, ...) are left out: they add separators.
_ALIASES = {
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "gpt-2": "phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling",
    "glm4": "glm5",
    "qwen2": "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open",
    "deepseek-v3": "joyai-llm hunyuan-dense hy_v4",
}
_CANONICAL = {alias: name for name, many in _ALIASES.items() for alias in many.split()}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer that `tokenizer.ggml.pre` names, aliases included."""
    found = PRE_TOKENIZERS.get(_CANONICAL.get(name, name))
    if found is None:
        raise UnsupportedFeature(
            f"tokenizer.ggml.pre is {name!r}, a pre-tokenizer that mlacli does not have",
            "supported: " + ", ".join((*PRE_TOKENIZERS, *_CANONICAL)),
        )
    return found
