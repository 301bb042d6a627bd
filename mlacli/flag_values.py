"""From a word to a value: one parser per kind of flag value, each raising UsageError.

No click, no flag names: `flags.py` says which flag takes which kind and adds the name to the error.
"""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mlacli.errors import UsageError
from mlacli.params import SAMPLERS

Parse = Callable[[str], Any]


def close(word: str, known: Iterable[str]) -> str:
    """'did you mean ...?', or nothing when no known word is near."""
    found = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"did you mean {found[0]}?" if found else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """'did you mean ...?', or the list of what is known."""
    known = list(known)
    return close(word, known) or "known: " + ", ".join(known)


def _bad(kind: str, word: str, hint: str) -> UsageError:
    return UsageError(f"{word!r} is not {kind}", hint)


def integer(low: int | None = None, high: int | None = None) -> Parse:
    """A parser for integers of at least `low` and at most `high`."""

    def parse(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            raise _bad("an integer", word, "give a whole number") from None
        if low is not None and value < low:
            raise _bad(f"at least {low}", word, f"give a number from {low} on")
        if high is not None and value > high:
            raise _bad(f"at most {high}", word, f"give a number from {low} to {high}")
        return value

    return parse


def number(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        raise _bad("a number", word, "give a number such as 0.8") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise _bad("a finite number", word, "give a number such as 0.8")
    return value


def positive(word: str) -> float:
    value = number(word)
    if value <= 0:
        raise _bad("above 0", word, "1 switches it off")
    return value


def not_negative(word: str) -> float:
    value = number(word)
    if value < 0:
        raise _bad("0 or more", word, "0 switches it off")
    return value


@dataclass(frozen=True, slots=True)
class Choice:
    """A parser for one of `words`; `aliases` map other spellings."""

    words: tuple[str, ...]
    aliases: Mapping[str, str] = field(hash=False)

    def __call__(self, word: str) -> str:
        low = self.aliases.get(word.lower(), word.lower())
        if low not in self.words:
            raise _bad("one of " + ", ".join(self.words), word, close(word, self.words))
        return low


def choice(*words: str, **aliases: str) -> Choice:
    return Choice(words, MappingProxyType(aliases))


def choices(parse: Parse | None) -> tuple[str, ...]:
    """The words that a parser takes, where they can be listed."""
    if parse is split_mode:
        return (*_MODES.words, *_MODES.aliases)
    if parse is cache_type:
        return _CACHE_TYPES.words
    if parse is on_off:
        return ("on", "off", "auto")
    return (*parse.words, *parse.aliases) if isinstance(parse, Choice) else ()


_MODES = choice("none", "layer", "graph", "auto", tensor="graph")
_CACHE_TYPES = choice("f32", "f16", "bf16", "q8_0")


def split_mode(word: str) -> str:
    """none | layer | graph | auto; mainline's `tensor` means graph."""
    low = word.lower()
    if low in ("row", "attn"):
        raise UsageError(
            f"split mode {word!r} is not supported", "use -sm graph (tensor parallel) or -sm layer"
        )
    return _MODES(word)


def compared_modes(word: str) -> tuple[str, ...]:
    """Two or three different split modes."""
    modes = tuple(split_mode(part.strip()) for part in word.split(","))
    if "auto" in modes or len(modes) < 2 or len(set(modes)) < len(modes):
        raise _bad("a list of different split modes", word, "write it as none,layer,graph")
    return modes


def cache_type(word: str) -> str:
    low = word.lower()
    if re.fullmatch(r"(i?q|tq|mxfp|nvfp)\d.*", low) and low != "q8_0":
        raise UsageError(f"cache type {word!r} is not supported", "the nearest is q8_0")
    return _CACHE_TYPES(word)


def on_off(word: str) -> bool:
    low = word.lower()
    if low not in ("on", "off", "auto", "1", "0"):
        raise _bad("on, off or auto", word, "use -fa on or -fa off")
    return low in ("on", "auto", "1")


def size(word: str) -> int:
    """Bytes from a number with K, M, G or T (powers of 1024); G when no unit is given."""
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", word.strip().lower())
    if not m:
        raise _bad("a memory size", word, "write it as 24G or 512M")
    return int(float(m[1]) * 1024 ** ("kmgt".index(m[2] or "g") + 1))


def sizes(word: str) -> tuple[int, ...]:
    return tuple(size(part) for part in word.split(","))


def shares(word: str) -> tuple[float, ...]:
    """Proportions separated by `,` or `/`; an empty entry is 0."""
    values = tuple(number(part) if part.strip() else 0.0 for part in re.split(r"[,/]", word))
    if any(v < 0 for v in values):
        raise _bad("a list of non-negative shares", word, "write it as 3,1")
    if not any(values):
        raise _bad("a list with a non-zero share", word, "leave -ts out for equal shares")
    return values


def devices(word: str) -> tuple[str, ...]:
    names = tuple(part.strip().lower() for part in word.split(","))
    for name in names:
        if not re.fullmatch(r"cpu|cuda\d+", name):
            raise _bad("a device", name, "devices are cpu and cuda0, cuda1, ...; e.g. -dev cpu,cpu")
    return names


def layers(word: str) -> int | None:
    """A layer count; `all`, `auto` and negative numbers mean every layer."""
    if word.lower() in ("all", "auto"):
        return None
    value: int = integer()(word)
    return None if value < 0 else value


def rows_kept(word: str) -> int | None:
    """A count from 1 on; -1 means the file's, as in ik_llama.cpp."""
    value: int = integer(-1)(word)
    if value == 0:
        raise _bad("at least 1", word, "--no-dsa attends to all rows; -1 is the file's number")
    return None if value < 0 else value


def override_kv(word: str) -> tuple[str, Any]:
    """KEY=TYPE:VALUE with TYPE int, float, bool or str."""
    m = re.fullmatch(r"([^=]+)=(int|float|bool|str):(.*)", word, re.DOTALL)
    if not m:
        raise _bad("KEY=TYPE:VALUE", word, "e.g. deepseek2.expert_used_count=int:4")
    key, kind, text = m[1], m[2], m[3]
    if kind == "bool":
        if text not in ("true", "false"):
            raise _bad("true or false", text, "write KEY=bool:true")
        return key, text == "true"
    parsers: dict[str, Parse] = {"int": integer(), "float": number, "str": str}
    return key, parsers[kind](text)


def placement(word: str) -> str:
    """REGEX=DEVICE rules, separated at every comma as in llama.cpp; the word itself."""
    for rule in word.split(","):
        pattern, equals, device = rule.partition("=")
        if not pattern or not equals:
            raise _bad("REGEX=DEVICE", rule, "e.g. exps=CPU; a comma begins the next rule")
        if not re.fullmatch(r"cpu|cuda\d+", device, re.IGNORECASE):
            raise _bad("a device", device, "devices are CPU and CUDA0, CUDA1, ...; e.g. exps=CPU")
        try:
            with warnings.catch_warnings(action="ignore"):
                re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as e:
            raise _bad("a regular expression", pattern, f"correct it: {e}") from None
    return word


def token_ids(word: str) -> tuple[int, ...]:
    parts = [p for p in re.split(r"[,\s]+", word.strip()) if p]
    if not parts:
        raise _bad("a list of token ids", word, "write it as 1,2,3")
    return tuple(integer(0)(p) for p in parts)


def text(word: str) -> str:
    return word


def seed(word: str) -> int | None:
    value: int = integer(-1)(word)
    return None if value in (-1, 0xFFFFFFFF) else value & 0xFFFFFFFF


_ALIASES = {
    "nucleus": "top_p", "typ": "typ_p", "typical": "typ_p", "typical_p": "typ_p",
    "temp": "temperature",
}  # fmt: skip
_NOT_HERE = ("infill", "adaptive_p", "tfs_z", "tfs")
_LETTERS = dict(zip("edskypmxt", SAMPLERS, strict=True))


def sampler_names(word: str) -> tuple[str, ...]:
    """Names of samplers in the order they run, separated by `;`; llama.cpp's other spellings too.

    An empty word is the empty chain: every token by its own probability.
    """
    names = [part.strip().lower().replace("-", "_") for part in word.split(";") if part.strip()]
    names = [_ALIASES.get(name, name) for name in names]
    for name in names:
        if name not in SAMPLERS:
            there = "a sampler that mlacli has" if name in _NOT_HERE else "a sampler"
            raise _bad(there, name, nearest(name, SAMPLERS))
    return tuple(names)


def sampler_letters(word: str) -> tuple[str, ...]:
    """The same from one letter each."""
    for letter in word:
        if letter not in _LETTERS:
            known = ", ".join(f"{k} {name}" for k, name in _LETTERS.items())
            raise _bad("a sampler's letter", letter, f"letters are {known}")
    return tuple(_LETTERS[letter] for letter in word)


def logit_bias(word: str) -> tuple[int, float]:
    """(token id, bias) from ID+X or ID-X; X may be inf."""
    m = re.fullmatch(r"\s*(\d+)\s*([+-])\s*(\d+(?:\.\d*)?|\.\d+|inf)\s*", word.lower())
    if not m or word.strip().endswith("+inf"):
        raise _bad("a token id and its bias", word, "write 15043+1.5, or 15043-inf to forbid it")
    return int(m[1]), float(m[2] + m[3])


def breaker(word: str) -> str:
    """The text; `none` is the empty one, which breaks nothing."""
    return "" if word == "none" else word


def json_object(word: str) -> tuple[tuple[str, Any], ...]:
    """The pairs of a JSON object."""
    try:
        found = json.loads(word)
    except ValueError as e:
        raise _bad("a JSON object", word, f"correct it: {e}") from None
    if not isinstance(found, dict):
        raise _bad("a JSON object", word, 'e.g. {"enable_thinking": false}')
    return tuple(found.items())
