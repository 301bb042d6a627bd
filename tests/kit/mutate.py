"""Damaged GGUF files: a seed gives one mutant of a base file, and a name for what was done to it.

Takes a file apart by the format's rules alone, changes a few parts, and puts it together again, so
that a lie in one field is not hidden by a shift of all others. Imports nothing from mlacli.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_U32, _F32 = 4, 6
HUGE = (0, 1, 2, 3, 7, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63,
        2**64 - 1)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 1e30, 3e38, -3e38, float("inf"), float("-inf"),
          float("nan"), 0.5, 1.5)  # fmt: skip
TEXTS = (
    b"", b"\x00", b"\n", b"a\nError: b", b"\x1b[31mred\x1b[0m\x07", b"\xff\xfe\x80", b"x" * 70000,
    "\u202egnp\u2028".encode(), "é".encode() * 3000, b"%s{0}\\n", b"../../etc", b"\r\x08\x7f",
    b"\xed\xa0\x80", b"\xc2\x9b31m",
)  # fmt: skip


@dataclass
class Pair:
    """A key and its value's bytes, array and string lengths included."""

    key: bytes
    kind: int
    value: bytes


@dataclass
class Entry:
    """A line of the tensor directory; `dims` innermost first."""

    name: bytes
    dims: list[int]
    kind: int
    offset: int


@dataclass
class Parts:
    """A GGUF file in pieces. None for a count: the true one."""

    pairs: list[Pair]
    entries: list[Entry]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    n_entries: int | None = None
    n_pairs: int | None = None
    done: list[str] = field(default_factory=list)

    def bytes(self) -> bytes:
        n_entries = len(self.entries) if self.n_entries is None else self.n_entries
        n_pairs = len(self.pairs) if self.n_pairs is None else self.n_pairs
        out = self.magic + struct.pack("<IQQ", self.version, n_entries, n_pairs)
        for pair in self.pairs:
            out += _text(pair.key) + struct.pack("<I", pair.kind) + pair.value
        for e in self.entries:
            out += _text(e.name) + struct.pack("<I", len(e.dims))
            out += struct.pack(f"<{len(e.dims)}Q", *e.dims) + struct.pack("<IQ", e.kind, e.offset)
        return out + bytes(-len(out) % 32) + self.data

    def arch(self) -> str:
        pair = self.pair("general.architecture")
        return pair.value[8:].decode("utf-8", "replace") if pair else "deepseek2"

    def pair(self, key: str) -> Pair | None:
        return next((p for p in self.pairs if p.key.decode("utf-8", "replace").endswith(key)), None)


def _text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def take_apart(raw: bytes) -> Parts:
    """The pieces of a sound file of alignment 32."""
    at = 24

    def take(n: int) -> bytes:
        nonlocal at
        at += n
        return raw[at - n : at]

    def text() -> bytes:
        return take(struct.unpack("<Q", take(8))[0])

    def value(kind: int) -> bytes:
        start = at
        if kind == _STRING:
            text()
        elif kind == _ARRAY:
            item, count = struct.unpack("<IQ", take(12))
            for _ in range(count if item == _STRING else 0):
                text()
            take(0 if item == _STRING else _SIZES[item] * count)
        else:
            take(_SIZES[kind])
        return raw[start:at]

    n_entries, n_pairs = struct.unpack("<QQ", raw[8:24])
    pairs = []
    for _ in range(n_pairs):
        key, kind = text(), struct.unpack("<I", take(4))[0]
        pairs.append(Pair(key, kind, value(kind)))
    entries = []
    for _ in range(n_entries):
        name, n = text(), struct.unpack("<I", take(4))[0]
        dims = list(struct.unpack(f"<{n}Q", take(8 * n)))
        entries.append(Entry(name, dims, *struct.unpack("<IQ", take(12))))
    return Parts(pairs, entries, raw[at + -at % 32 :])


# ---- mutations: each changes the parts and says what it did ----------------------------------

Mutation = Callable[[Parts, Random], str]


def header(parts: Parts, r: Random) -> str:
    word = r.choice(("magic", "version", "n_entries", "n_pairs"))
    if word == "magic":
        parts.magic = r.choice((b"GGML", b"FUGG", b"\0\0\0\0", b"ggjt"))
        return f"magic {parts.magic!r}"
    true = {"version": 3, "n_entries": len(parts.entries), "n_pairs": len(parts.pairs)}[word]
    number = r.choice((*HUGE, true - 1, true + 1))
    setattr(parts, word, number & 0xFFFFFFFF if word == "version" else number)
    return f"{word} {number}"


def scalar(parts: Parts, r: Random) -> str:
    """A number that is too small, too large, or no number."""
    pair = r.choice([p for p in parts.pairs if p.kind in _SIZES])
    if pair.kind in (6, 12):
        number: float = r.choice(FLOATS)
        pair.value = struct.pack("<f" if pair.kind == 6 else "<d", number)
    else:
        size = _SIZES[pair.kind]
        old = int.from_bytes(pair.value, "little")
        number = r.choice((*HUGE, old + 1, max(0, old - 1), 2 * old, old // 2))
        pair.value = (int(number) % (1 << 8 * size)).to_bytes(size, "little")
    return f"{_shown(pair.key)} = {number}"


def retyped(parts: Parts, r: Random) -> str:
    """A value of another type than the key has."""
    pair = r.choice(parts.pairs)
    pair.kind, pair.value = r.choice(
        (
            (_STRING, _text(r.choice(TEXTS))),
            (_U32, struct.pack("<I", r.choice((0, 1, 2**32 - 1)))),
            (5, struct.pack("<i", -1)),
            (11, struct.pack("<q", -(2**63))),
            (_F32, struct.pack("<f", r.choice(FLOATS))),
            (12, struct.pack("<d", r.choice(FLOATS))),
            (7, bytes([r.choice((0, 1, 2, 255))])),
            (_ARRAY, struct.pack("<IQ", _U32, 0)),
            (_ARRAY, struct.pack("<IQ3I", _U32, 3, 1, 2, 2**32 - 1)),
            (_ARRAY, struct.pack("<IQ2f", _F32, 2, float("nan"), 0.5)),
            (_ARRAY, struct.pack("<IQ", _STRING, 2) + _text(b"a") + _text(b"\xff")),
            (r.choice((13, 99, 2**32 - 1)), pair.value),
        )
    )
    return f"{_shown(pair.key)} of type {pair.kind}"


def array_lie(parts: Parts, r: Random) -> str:
    """An array whose type or count is not what follows."""
    pair = r.choice(parts.pairs)
    item = r.choice((0, 4, 6, 7, 10, _STRING, _ARRAY, 13, 2**32 - 1))
    count = r.choice(HUGE)
    pair.kind, pair.value = _ARRAY, struct.pack("<IQ", item, count) + r.randbytes(r.choice((0, 24)))
    return f"{_shown(pair.key)} = array of {count} of type {item}"


def text_value(parts: Parts, r: Random) -> str:
    pair = r.choice([p for p in parts.pairs if p.kind == _STRING])
    if r.random() < 0.3:
        length = r.choice(HUGE)
        pair.value = struct.pack("<Q", length) + pair.value[8:]
        return f"{_shown(pair.key)} says it has {length} bytes"
    text = r.choice(TEXTS)
    pair.value = _text(text)
    return f"{_shown(pair.key)} = {_shown(text)}"


def keys(parts: Parts, r: Random) -> str:
    at = r.randrange(len(parts.pairs))
    pair, what = parts.pairs[at], r.choice(("gone", "twice", "renamed"))
    if what == "gone":
        del parts.pairs[at]
    elif what == "twice":
        parts.pairs.append(pair)
    else:
        text = r.choice(TEXTS)
        parts.pairs[at] = Pair(text, pair.kind, pair.value)
        return f"{_shown(pair.key)} renamed to {_shown(text)}"
    return f"{_shown(pair.key)} {what}"


def hparams(parts: Parts, r: Random) -> str:
    """A likely number in a place where it makes no sense."""
    key, value = r.choice(
        [(name, n) for name in (
            "block_count", "context_length", "embedding_length", "head_count", "key_length_mla",
            "value_length_mla", "key_length", "q_lora_rank", "kv_lora_rank", "dimension_count",
            "expert_count", "expert_used_count", "expert_shared_count", "expert_group_count",
            "expert_group_used_count", "leading_dense_block_count", "nextn_predict_layers",
            "expert_feed_forward_length", "feed_forward_length", "expert_gating_func",
            "head_count_kv", "vocab_size", "split.count", "split.no", "split.tensors.count",
            "general.alignment", "rope.scaling.original_context_length",
            "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "indexer.head_count",
            "indexer.key_length", "indexer.top_k", "temperature_length",
        ) for n in (*HUGE[:11], 4, 5, 16, 17, 33, 64, 4096)]
        + [(name, x) for name in (
            "layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor",
            "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_ext_factor",
            "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast", "expert_weights_scale",
            "rope.scaling.yarn_beta_slow", "rope.scale_linear", "temperature_scale",
        ) for x in FLOATS]
    )  # fmt: skip
    raw = struct.pack("<f", value) if isinstance(value, float) else struct.pack("<I", value)
    kind = _F32 if isinstance(value, float) else _U32
    pair = parts.pair(key)
    if pair is None:
        whole = (
            key
            if key.partition(".")[0] in ("split", "general", "tokenizer")
            else f"{parts.arch()}.{key}"
        )
        parts.pairs.append(Pair(whole.encode(), kind, raw))
    else:
        pair.kind, pair.value = kind, raw
    return f"{key} = {value}"


def per_layer(parts: Parts, r: Random) -> str:
    """A per-layer array of the wrong length or with strange entries."""
    key = r.choice(("head_count", "head_count_kv", "feed_forward_length",
                    "expert_feed_forward_length", "expert_used_count", "block_count",
                    "indexer.types"))  # fmt: skip
    numbers = [r.choice((0, 1, 2, 32, 64, 2**31, 2**32 - 1)) for _ in range(r.choice((0, 1, 2, 3)))]
    pair = parts.pair(key)
    if pair is not None:
        pair.kind = _ARRAY
        pair.value = struct.pack(f"<IQ{len(numbers)}I", _U32, len(numbers), *numbers)
    return f"{key} = {numbers}"


def vocabulary(parts: Parts, r: Random) -> str:
    """Fewer, more, equal or strange tokens; merges and types that don't go with them."""
    word = r.choice(("tokens", "merges", "token_type", "model", "pre"))
    pair = parts.pair(f"tokenizer.ggml.{word}")
    if pair is None:
        return "nothing"
    if word in ("model", "pre"):
        pair.value = _text(r.choice((*TEXTS, b"none", b"llama", b"bert", b"gpt-2", b"default")))
    elif word == "token_type":
        numbers = [
            r.choice((0, 1, 2, 3, 4, 5, 6, 7, -1, 2**31 - 1)) for _ in range(r.randrange(40))
        ]
        pair.value = struct.pack(f"<IQ{len(numbers)}i", 5, len(numbers), *numbers)
    else:
        texts = [r.choice((b"a b", b" ", b"a", *TEXTS)) for _ in range(r.randrange(40))]
        pair.value = struct.pack("<IQ", _STRING, len(texts)) + b"".join(map(_text, texts))
    return f"tokenizer.ggml.{word} changed"


def entry(parts: Parts, r: Random) -> str:
    """One line of the tensor directory changed."""
    e = r.choice(parts.entries)
    what = r.choice(("name", "dims", "dim", "kind", "offset", "gone", "twice", "swapped"))
    if what == "name":
        e.name = r.choice((*TEXTS, b"blk.99.attn_norm.weight", b"output.weight", b"blk.0.x.weight"))
    elif what == "dims":
        e.dims = [r.choice((*HUGE, 32, 64)) for _ in range(r.choice((0, 1, 2, 3, 4, 5, 9)))]
    elif what == "dim":
        i = r.randrange(len(e.dims))
        e.dims[i] = r.choice((*HUGE, e.dims[i] + 1, 2 * e.dims[i], e.dims[i] // 2, e.dims[i] + 32))
    elif what == "kind":
        e.kind = r.choice((*range(42), 133, 144, 212, 999, 2**31, 2**32 - 1))
    elif what == "offset":
        e.offset = r.choice((*HUGE, e.offset + 32, e.offset + 1, max(0, e.offset - 32)))
    elif what == "gone":
        parts.entries.remove(e)
    elif what == "twice":
        parts.entries.append(e)
    else:
        other = r.choice(parts.entries)
        e.dims, other.dims = other.dims, e.dims
    return f"tensor {_shown(e.name)}: {what} {e.dims} {e.kind} {e.offset}"


def resized(parts: Parts, r: Random) -> str:
    """The same dimension in every tensor that has it, and so without contradiction."""
    old = r.choice(sorted({n for e in parts.entries for n in e.dims}))
    new = r.choice((1, 2, 3, 16, 31, 32, 33, 48, 64, 4096, 2**20, 2**31))
    for e in parts.entries:
        e.dims = [new if n == old else n for n in e.dims]
    for pair in parts.pairs:
        if pair.kind == _U32 and pair.value == struct.pack("<Q", old)[:4]:
            pair.value = struct.pack("<I", new)
    return f"{old} is {new} everywhere"


def weights(parts: Parts, r: Random) -> str:
    """Random bytes, NaN or infinity where weights were."""
    data = bytearray(parts.data)
    for _ in range(r.choice((1, 50))):
        at = int(r.random() * (len(data) // 4)) * 4
        nan, infinite = struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))
        data[at : at + 4] = r.choice((nan, infinite, b"\xff" * 4, r.randbytes(4)))
    parts.data = bytes(data)
    return "weights"


def shortened(parts: Parts, r: Random) -> str:
    n = r.choice((0, 1, 31, len(parts.data) - 1, int(r.random() * len(parts.data))))
    parts.data = parts.data[:n]
    return f"{n} bytes of weights"


MUTATIONS: tuple[Mutation, ...] = (
    header, scalar, scalar, retyped, array_lie, text_value, keys, hparams, hparams, hparams,
    per_layer, vocabulary, entry, entry, entry, resized, weights, shortened,
)  # fmt: skip


def mutant(base: bytes, seed: int) -> tuple[str, bytes]:
    """(what was done, the file) of this seed: one to three mutations, some raw damage."""
    r = Random(seed)
    parts = take_apart(base)
    done = []
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        if parts.pairs and parts.entries and parts.data:
            done.append(r.choice(MUTATIONS)(parts, r))
    raw = bytearray(parts.bytes())
    how, start = r.random(), len(raw) - len(parts.data)
    if how < 0.08 and start > 32:
        for _ in range(r.choice((1, 1, 2, 8))):
            at = r.randrange(start)
            raw[at] ^= 1 << r.randrange(8)
            done.append(f"bit flipped in byte {at}")
    elif how < 0.12:
        n = r.choice((r.randrange(start + 1), r.randrange(len(raw) + 1)))
        raw = raw[:n]
        done.append(f"cut off at {n}")
    return "; ".join(done), bytes(raw)


def _shown(raw: bytes) -> str:
    return repr(raw[:40])
