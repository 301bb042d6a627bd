"""Token ids against others', recorded by golden/tokenizers/record.py and record_libraries.py.

Weakest links. Pre "deepseek-v3": llama.cpp has no vocabulary with ids for it, so the ids are those
of DeepSeek's own tokenizer.json in the `tokenizers` library, which is our engine too; the cuts,
where an error would sit, are llama.cpp's (unicode.cpp compiled by itself, the expressions read out
of llama-vocab.cpp). Pre "default": cuts only. And llama.cpp's texts for the vocabularies do not do
without the cuts: cut by llama-bpe's rules they get the same ids in the vocabularies of qwen2,
deepseek-llm and deepseek-coder (tried). Pre "glm4", "chatglm-bpe" and "kimi-k2": the vocabularies
are trained for the purpose, not the models' own.

Known differences from llama.cpp, which cuts by simpler rules there than the models' own tokenizers:
"tekken" (capitals beyond A-Z, marks), "kimi-k2" (capitals, marks, rarer Han characters), and
"kimi-k2" without merges, where llama.cpp falls back to single characters. Under "glm4" as in all
that came before, the long s is no "s" in a contraction. Moonshot's code also cuts after 25,000
characters without (or of) white space; nothing else does.
"""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mlacli.errors import GgufError, MlacliError, UnsupportedFeature
from mlacli.loading.merges import ranked_merges
from mlacli.loading.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer
from mlacli.loading.tokenizer import _CHAR_TO_BYTE, Tokenizer, has_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "tokenizers"
VOCABULARIES = (
    *("gpt-2", "llama-bpe", "qwen2", "deepseek-llm", "deepseek-coder", "mpt"),
    *("deepseek-v3", "glm4", "tekken", "kimi-k2"),
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


# ---- recorded by llama.cpp


@cache
def golden(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


def golden_metadata(name: str) -> dict[str, Any]:
    """The file's metadata again; tokens that no text needs are placeholders."""
    known = golden(name)
    tokens = [f"<absent {i}>" for i in range(known["n_vocab"])]
    types = [NORMAL] * known["n_vocab"]
    for text, i in known["tokens"].items():
        tokens[i] = text
        types[i] = known["types"].get(text, NORMAL)
    return known["metadata"] | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": known["merges"],
    }


@cache
def golden_tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_metadata(golden_metadata(name))


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_the_recorded_ones(name: str) -> None:
    known, tokenizer = golden(name), golden_tokenizer(name)
    assert len(known["texts"]) == len(known["ids"]) >= 40
    for text, ids in zip(known["texts"], known["ids"], strict=True):
        assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["glm4", "tekken", "kimi-k2"])
def test_the_texts_tell_other_cuts_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the recorded ids change with any one class or rule."""
    known, ours = golden(name), PRE_TOKENIZERS[name]
    wrong = {
        "glm4": [(r"\p{N}{1,3}", r"\p{N}"), (r"\p{L}+", r"[\p{L}\p{M}]+"), (r"(?!\S)", "")],
        "tekken": [(r"\p{Lu}", "A-Z"), (r"\p{M}", ""), ("/]*", "]*"), (r"\s+(?!\S)|", "")],
        "kimi-k2": [(r"\p{Lu}", "A-Z"), (r"\p{M}", ""), (r"&&[^\p{Han}]", ""), ("{1,3}", "")],
    }[name]
    for right, other in wrong:
        (pattern,) = ours.patterns
        assert right in pattern
        changed = replace(ours, patterns=(pattern.replace(right, other),))
        monkeypatch.setitem(PRE_TOKENIZERS, name, changed)
        tokenizer = Tokenizer.from_metadata(golden_metadata(name))
        ids = [tokenizer.encode(text, False, False) for text in known["texts"]]
        unlike = sum(a != b for a, b in zip(ids, known["ids"], strict=True))
        assert unlike >= 2, right


def test_kimi_without_merges_has_the_same_ids() -> None:
    known, metadata = golden("kimi-k2"), golden_metadata("kimi-k2")
    del metadata["tokenizer.ggml.merges"]
    tokenizer = Tokenizer.from_metadata(metadata)
    for text, ids in zip(known["texts"], known["ids"], strict=True):
        assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, text
    assert tokenizer.warnings == golden_tokenizer("kimi-k2").warnings


@pytest.mark.parametrize("name", ["tekken", "kimi-k2"])
def test_differences_from_llama_cpp_are_counted(name: str) -> None:
    """The recording found all ids alike under llama.cpp's rules, and others under the true ones."""
    header = golden(name)
    n = header["passed_with_whole_vocabulary"].split()[0]
    assert int(n) > 10_000
    assert header["llama_cpp_same_ids_by_its_rules"] == f"{n} of {n} texts"
    assert int(header["llama_cpp_other_ids"].split()[0]) > 1000


@pytest.mark.parametrize(
    ("text", "tekken", "kimi"),
    [
        ("HelloWorld", "Hello World", "Hello World"),
        ("HTTPServer aB", "HTTPServer ␣a B", "HTTPServer ␣a B"),
        ("éÀ ΑΒγΔ", "é À ␣ΑΒγ Δ", "é À ␣ΑΒγ Δ"),  # llama.cpp: one word each
        ("ae\u0301b", "ae\u0301b", "ae\u0301b"),  # llama.cpp: before the mark
        ("ǅa", "ǅa", "ǅa"),
        ("aªʰB", "aªʰ B", "aªʰ B"),
        ("don't I'LL", "don 't ␣I 'LL", "don't ␣I'LL"),
        ("a'ſ", "a 'ſ", "a'ſ"),
        ("12345", "1 2 3 4 5", "123 45"),
        ("漢字aB", "漢字a B", "漢字 a B"),
        ("々〇⺀豈a", "々 〇 ⺀豈a", "々〇⺀豈 a"),
        ("?!/\n/", "?!/⏎/", "?!/⏎ /"),
    ],
)
def test_cuts_by_the_models_own_rules(text: str, tekken: str, kimi: str) -> None:
    for name, expected in (("tekken", tekken), ("kimi-k2", kimi)):
        cut = PRE_TOKENIZERS[name].build().pre_tokenize_str(text)
        pieces = [text[a:b].replace(" ", "␣").replace("\n", "⏎") for _, (a, b) in cut]
        assert pieces == expected.split(" "), name


@pytest.mark.parametrize("name", ["tekken", "kimi-k2"])
@pytest.mark.parametrize("unit", ["A", "a", "あ", "漢", "\u0301", " ", "aB", "1"])
def test_long_runs_of_one_class_are_cut_in_time(name: str, unit: str) -> None:
    build = PRE_TOKENIZERS[name].build()
    assert sum(b - a for _, (a, b) in build.pre_tokenize_str(unit * 20_000)) == 20_000 * len(unit)


@pytest.mark.parametrize("name", golden("cuts")["pre"])
def test_cuts_are_llama_cpps(name: str) -> None:
    """And those of every other pre-tokenizer are not: the texts tell all of them apart."""
    recorded = golden("cuts")["pre"][name]["pieces"]
    texts = ["".join(pieces) for pieces in recorded]
    assert len(texts) >= 100
    for other_name, other in PRE_TOKENIZERS.items():
        build = other.build()
        cuts = [[text[a:b] for _, (a, b) in build.pre_tokenize_str(text)] for text in texts]
        if other.patterns == PRE_TOKENIZERS[name].patterns:
            assert cuts == recorded
        else:
            alike = sum(a == b for a, b in zip(cuts, recorded, strict=True))
            assert alike < 0.9 * len(texts), other_name


@pytest.mark.parametrize("name", VOCABULARIES)
def test_end_of_generation_of_real_vocabularies(name: str) -> None:
    """The set recorded with the whole vocabulary; the lines below were checked by hand."""
    assert golden_tokenizer(name).eog_ids == frozenset(golden(name)["eog_ids"])
    texts = {golden_tokenizer(name).piece(i).decode() for i in golden_tokenizer(name).eog_ids}
    assert (
        texts
        == {
            "gpt-2": {"<|endoftext|>"},
            "llama-bpe": {"<|end_of_text|>", "<|eot_id|>"},
            "qwen2": {"<|endoftext|>", "<|im_end|>", "</s>"},
            "deepseek-llm": {EOS},
            "deepseek-coder": {EOS},
            "mpt": {"<|endoftext|>"},
            "deepseek-v3": {EOS},
            "glm4": {"<|endoftext|>", "<|user|>", "<|observation|>"},
            "tekken": {"</s>"},
            "kimi-k2": {"[EOS]", "<|im_end|>", "[EOT]", "[PAD]"},
        }[name]
    )


# ---- a toy vocabulary: all bytes, three merges, special tokens


def toy(special: dict[str, int] | None = None, **keys: Any) -> dict[str, Any]:
    """Metadata with BOS 256, EOS 257 and after them `special` (text to type)."""
    special = {BOS: CONTROL, EOS: CONTROL} | (special or {})
    merged = ["he", "ll", "hell"]
    tokens = [*_CHAR_TO_BYTE, *special, *merged]
    types = [NORMAL] * 256 + list(special.values()) + [NORMAL] * 3
    metadata = {
        "model": "gpt2",
        "pre": "deepseek-v3",
        "tokens": tokens,
        "token_type": types,
        "merges": ["h e", "l l", "he ll"],
        "bos_token_id": 256,
        "eos_token_id": 257,
    } | keys
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}


def ids_of(metadata: dict[str, Any], *texts: str) -> list[int]:
    return [metadata["tokenizer.ggml.tokens"].index(text) for text in texts]


def test_attributes() -> None:
    tokenizer = Tokenizer.from_metadata(toy())
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.eos_id) == (261, 256, 257)
    assert tokenizer.eog_ids == {257}
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.warnings) == (False, False, ())


def test_bos_and_eos_are_added_as_the_file_says() -> None:
    metadata = toy(add_bos_token=True, add_eos_token=True)
    tokenizer = Tokenizer.from_metadata(metadata)
    hello = ids_of(metadata, "hell", "o")
    assert tokenizer.encode("hello") == [256, *hello, 257]
    assert tokenizer.encode("hello", add_special=False) == hello
    assert tokenizer.encode("") == [256, 257]
    assert Tokenizer.from_metadata(toy()).encode("hello") == hello
    # llama-bpe adds BOS unless the file says no
    assert Tokenizer.from_metadata(toy(pre="llama3")).encode("") == [256]
    assert Tokenizer.from_metadata(toy(pre="llama3", add_bos_token=False)).encode("") == []
    assert Tokenizer.from_metadata(toy(pre="tekken")).encode("hell") == [256, *hello[:1]]


def test_a_text_that_brings_its_own_bos_is_warned_about_once() -> None:
    metadata = toy(add_bos_token=True, add_eos_token=True)
    tokenizer = Tokenizer.from_metadata(metadata)
    tokenizer.encode("hello")
    assert tokenizer.warnings == ()
    for _ in range(2):
        ids = tokenizer.encode(f"{BOS}hello{EOS}")
        assert ids == [256, 256, *ids_of(metadata, "hell", "o"), 257, 257]
    assert len(tokenizer.warnings) == 2
    assert "two BOS" in tokenizer.warnings[0]
    assert "two EOS" in tokenizer.warnings[1]


def test_control_tokens_are_cut_out_only_when_asked_and_user_defined_always() -> None:
    metadata = toy({"<think>": USER_DEFINED, "<|User|>": CONTROL, "<unk>": UNKNOWN})
    tokenizer = Tokenizer.from_metadata(metadata)
    user, think, unk, hell = ids_of(metadata, "<|User|>", "<think>", "<unk>", "hell")
    text = "<|User|>hell<think><unk>"
    assert tokenizer.encode(text) == [user, hell, think, unk]
    plain = tokenizer.encode(text, parse_special=False)
    assert think in plain
    assert user not in plain
    assert unk not in plain
    assert tokenizer.decode(plain) == text
    # an answer shows user-defined tokens and hides the others
    assert tokenizer.decode([user, hell, think, unk]) == "hell<think>"
    assert tokenizer.piece(user) == b"<|User|>"


def test_special_tokens_longest_first_not_leftmost_first() -> None:
    metadata = toy({"ab": USER_DEFINED, "bcd": USER_DEFINED, "  ": USER_DEFINED})
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("abcd") == ids_of(metadata, "a", "bcd")
    assert tokenizer.encode("abc") == ids_of(metadata, "ab", "c")
    assert tokenizer.encode("   ") == ids_of(metadata, "  ", "Ġ")


def test_ignore_merges_takes_a_whole_piece() -> None:
    """ "hell" has its merge taken away: only some pre-tokenizers still find the token."""
    merges = ["h e", "l l"]
    whole = ("llama-bpe", "glm4", "glm5", "tekken", "kimi-k2")
    for pre in (*whole, "qwen2", "chatglm-bpe"):
        parts = ["hell"] if pre in whole else ["he", "ll"]
        metadata = toy(pre=pre, merges=merges)
        tokenizer = Tokenizer.from_metadata(metadata)
        assert tokenizer.encode("hell", add_special=False) == ids_of(metadata, *parts)


def test_the_first_of_two_equal_merges_counts() -> None:
    metadata = toy(merges=["h e", "e l", "l l", "he ll", "h e"], tokens=[*toy_tokens(), "el"])
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], NORMAL]
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("hell") == ids_of(metadata, "hell")


def test_ranked_merges_are_all_ways_to_make_a_token_by_its_id() -> None:
    ids = {"b": 0, "a": 1, "c": 2, "bc": 3, "ab": 4, "abc": 5, "bd": 6}
    assert ranked_merges(ids) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def test_only_kimi_does_without_merges_and_by_normal_tokens_alone() -> None:
    without = toy({"ll": CONTROL}, pre="kimi-k2", tokens=[*_CHAR_TO_BYTE, BOS, EOS, "ll", "he"])
    without["tokenizer.ggml.token_type"] = [NORMAL] * 256 + [CONTROL] * 3 + [NORMAL]
    for merges in ({}, {"tokenizer.ggml.merges": []}):
        del without["tokenizer.ggml.merges"]
        without |= merges
        tokenizer = Tokenizer.from_metadata(without)
        ids = tokenizer.encode("hell", parse_special=False)
        assert ids == ids_of(without, "he", "l", "l")
        assert tokenizer.warnings == ()
        without["tokenizer.ggml.merges"] = []
    for pre in set(PRE_TOKENIZERS) - {"kimi-k2"}:
        with pytest.raises(GgufError, match=r"no tokenizer\.ggml\.merges"):
            Tokenizer.from_metadata(toy(pre=pre, merges=None))


def toy_tokens() -> list[str]:
    return toy()["tokenizer.ggml.tokens"]


def test_merges_of_unknown_tokens_are_left_out_with_a_warning() -> None:
    metadata = toy(merges=["h e", "x y", "noblank", "l l", "he ll"])
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("hellxy") == ids_of(metadata, "hell", "x", "y")
    assert [w for w in tokenizer.warnings if w.startswith("2 of tokenizer.ggml.merges")]


def test_missing_bytes_are_warned_about() -> None:
    tokens = ["[a]" if token == "a" else token for token in toy_tokens()]
    tokenizer = Tokenizer.from_metadata(toy(tokens=tokens))
    assert [w for w in tokenizer.warnings if w.startswith("1 bytes have no token")]
    assert tokenizer.decode(tokenizer.encode("banana")) == "bnn"


# ---- text and back


def random_text(rng: random.Random) -> str:
    """Letters, marks, blanks, emoji and any other code point, control characters included."""
    pools = [
        "az AZ 09",
        "\n\r\t\x00\x7f\u00a0\u3000",
        "äß€…",
        "你好か한",
        "🦙👩‍🚀🇩🇪",
        "e\u0301\u200d",
    ]
    text = ""
    for _ in range(rng.randint(0, 12)):
        if rng.random() < 0.3:
            code = rng.randrange(0x110000 - 0x800)
            text += chr(code + 0x800 * (code >= 0xD800))
        else:
            text += "".join(rng.choices(rng.choice(pools), k=rng.randint(1, 6)))
    return text


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_decode_undoes_encode(pre: str) -> None:
    rng = random.Random(f"round trip {pre}")
    tokenizer = Tokenizer.from_metadata(toy(pre=pre, add_bos_token=True))
    for _ in range(100):
        text = random_text(rng)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_stream_holds_back_unfinished_characters() -> None:
    tokenizer = Tokenizer.from_metadata(toy())
    ids = tokenizer.encode("a🦙é!")
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["a", "", "", "", "🦙", "", "é", "!"]
    assert stream.flush() == ""


def test_stream_of_broken_utf8_equals_decode() -> None:
    rng = random.Random("broken")
    tokenizer = Tokenizer.from_metadata(toy())
    broken = 0
    for _ in range(300):
        ids = rng.choices(range(256), k=rng.randint(1, 9))
        stream = tokenizer.stream()
        pushed = "".join(map(stream.push, ids)) + stream.flush()
        assert pushed == tokenizer.decode(ids) == bytes_of(ids).decode("utf-8", "replace")
        broken += "\ufffd" in pushed
    assert broken > 100
    stream = tokenizer.stream()
    assert stream.push(tokenizer.encode("🦙")[0]) == ""
    assert stream.flush() == "\ufffd"


def bytes_of(ids: list[int]) -> bytes:
    return b"".join([*_CHAR_TO_BYTE.values()][i] for i in ids)


def test_half_a_surrogate_pair_becomes_a_replacement_character() -> None:
    tokenizer = Tokenizer.from_metadata(toy())
    assert tokenizer.decode(tokenizer.encode("a\udc80b")) == "a\ufffdb"


def test_pieces_by_type() -> None:
    metadata = toy({"<0x0a>": BYTE, "<spare>": UNUSED, "▁x": NORMAL, "öl": USER_DEFINED})
    tokenizer = Tokenizer.from_metadata(metadata)
    texts = ("<0x0a>", "<spare>", "▁x", "öl", "Ġ", "hell", EOS)
    pieces = [tokenizer.piece(i) for i in ids_of(metadata, *texts)]
    assert pieces == [b"\n", b"", "▁x".encode(), "öl".encode(), b" ", b"hell", EOS.encode()]


def test_ids_past_the_vocabulary_are_shown_as_nothing() -> None:
    """A model with padded output rows may pick one; the generation goes on."""
    tokenizer = Tokenizer.from_metadata(toy())
    first, *rest = tokenizer.encode("é")
    assert tokenizer.decode([261, first, 999_999, *rest, 261]) == "é"
    stream = tokenizer.stream()
    assert [stream.push(i) for i in (first, 261, *rest, 261)] == ["", "", "é", ""]
    assert tokenizer.piece(261) == b""
    with pytest.raises(MlacliError, match="no token -1"):
        tokenizer.decode([-1])


# ---- end of generation


def eog_texts(special: dict[str, int], **keys: Any) -> set[str]:
    metadata = toy(special, **keys)
    tokens = metadata["tokenizer.ggml.tokens"]
    return {tokens[i] for i in Tokenizer.from_metadata(metadata).eog_ids} - {EOS}


def test_glm_turns_end_only_where_metadata_says_so() -> None:
    glm = {"<|user|>": CONTROL, "<|observation|>": CONTROL}
    assert eog_texts(glm) == set()
    assert eog_texts(glm, eot_token_id=258, eom_token_id=259) == set(glm)


def test_known_texts_end_whatever_their_type_and_count_as_control() -> None:
    metadata = toy({"<|im_end|>": NORMAL, "[EOT]": USER_DEFINED})
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.eog_ids == {257, 258, 259}
    assert tokenizer.encode("<|im_end|>[EOT]") == [258, 259]
    assert 259 not in tokenizer.encode("[EOT]", parse_special=False)
    assert tokenizer.decode([258, 259]) == ""


def test_fill_in_the_middle_tokens() -> None:
    fim = dict.fromkeys(["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"], NORMAL)
    assert eog_texts(fim) == {"<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"}
    # an id in the file wins over the text
    assert eog_texts(fim, fim_pad_token_id=0) == {"!", "<|repo_name|>", "<|file_sep|>"}
    tokenizer = Tokenizer.from_metadata(toy(fim))
    assert tokenizer.encode("<|fim_prefix|>") == [261]
    assert 261 not in tokenizer.encode("<|fim_prefix|>", parse_special=False)
    assert 261 not in Tokenizer.from_metadata(toy(fim, prefix_token_id=0)).encode("<|fim_prefix|>")


def test_harmony_answers_have_several_parts() -> None:
    harmony = dict.fromkeys(["<|end|>", "<|return|>", "<|call|>", "<|channel|>"], CONTROL)
    assert eog_texts(harmony) == {"<|return|>", "<|call|>"}
    assert Tokenizer.from_metadata(toy(harmony)).decode([258, 261]) == "<|end|><|channel|>"
    assert eog_texts({"<|end|>": CONTROL}) == {"<|end|>"}


# ---- defaults, warnings, errors


def test_missing_pre_warns_and_cuts_by_the_default_rules() -> None:
    tokenizer = Tokenizer.from_metadata(toy(pre=None))
    assert len(tokenizer.warnings) == 1
    assert "no tokenizer.ggml.pre" in tokenizer.warnings[0]
    cuts = [piece for piece, _ in tokenizer._bpe.pre_tokenizer.pre_tokenize_str("a12345?!b")]
    assert cuts == ["a", "123", "45", "?!", "b"]


def test_default_bos_and_eos_are_llama_cpps_and_warned_about() -> None:
    tokenizer = Tokenizer.from_metadata(toy(bos_token_id=None, eos_token_id=None))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (11, 11)
    assert len(tokenizer.warnings) == 1  # BOS is not added to texts: of no consequence
    assert "eos_token_id; token 11 (',')" in tokenizer.warnings[0]
    tokenizer = Tokenizer.from_metadata(toy(bos_token_id=None, add_bos_token=True))
    assert tokenizer.encode("") == [11]
    assert "bos_token_id; token 11" in tokenizer.warnings[0]


@pytest.mark.parametrize("pre", ["glm4", "glm5", "chatglm-bpe"])
def test_glm_has_no_bos_unless_told(pre: str) -> None:
    tokenizer = Tokenizer.from_metadata(toy(pre=pre, bos_token_id=None))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.warnings) == (None, 257, ())
    assert tokenizer.encode("") == []
    assert Tokenizer.from_metadata(toy(pre=pre)).bos_id == 256
    with pytest.raises(GgufError, match="BOS is to be added to every text"):
        Tokenizer.from_metadata(toy(pre=pre, bos_token_id=None, add_bos_token=True))


def test_a_vocabulary_too_small_for_the_defaults_has_neither() -> None:
    small = {"tokens": ["a", "b"], "token_type": None, "merges": [], "pre": "gpt-2"}
    small |= {"bos_token_id": None, "eos_token_id": None}
    tokenizer = Tokenizer.from_metadata(toy(**small))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eog_ids) == (None, None, frozenset())
    assert tokenizer.encode("ab") == [0, 1]
    with pytest.raises(GgufError, match="BOS is to be added to every text"):
        Tokenizer.from_metadata(toy(**small, add_bos_token=True))


def test_empty_tokens_get_a_name() -> None:
    tokenizer = Tokenizer.from_metadata(toy(tokens=[*toy_tokens()[:260], ""], merges=[]))
    assert tokenizer.piece(260) == b"[EMPTY_260]"


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("llama3", "llama-bpe"),
        ("llama-v3", "llama-bpe"),
        ("deepseek-r1-qwen", "qwen2"),
        ("megrez", "qwen2"),
        ("phi-2", "gpt-2"),
        ("gigachat", "gpt-2"),
        ("joyai-llm", "deepseek-v3"),
        ("glm5", "glm4"),
        ("hunyuan-dense", "deepseek-v3"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert pre_tokenizer(alias) is PRE_TOKENIZERS[name]


@pytest.mark.parametrize("name", ["gpt-4o", "bloom", "kimi", "no-such-thing"])
def test_other_pre_tokenizers_are_refused_with_the_list(name: str) -> None:
    with pytest.raises(UnsupportedFeature, match=f"tokenizer.ggml.pre is '{name}'") as caught:
        Tokenizer.from_metadata(toy(pre=name))
    for supported in ("llama-bpe", "gpt-2", "qwen2", "deepseek-coder", "deepseek-r1-qwen"):
        assert supported in caught.value.hint


@pytest.mark.parametrize("model", ["llama", "bert", "t5", None])
def test_other_vocabularies_are_refused(model: str | None) -> None:
    with pytest.raises(UnsupportedFeature, match=r"tokenizer\.ggml\.model"):
        Tokenizer.from_metadata(toy(model=model))


def test_has_tokenizer() -> None:
    assert has_tokenizer(toy())
    assert has_tokenizer(toy(model="llama"))
    assert not has_tokenizer({})
    assert not has_tokenizer(toy(model="none"))
    assert not has_tokenizer(toy(model="no_vocab"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"merges": "h e"}, "tokenizer.ggml.merges is not a list of str"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is not a list of str"),
        ({"tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens has the token 'a' more than once"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type has 1 entries for 261 tokens"),
        ({"token_type": [BYTE] * 261}, "byte token 0 is '!'"),
        ({"bos_token_id": 261}, "bos_token_id is 261, the vocabulary has ids 0 to 260"),
        ({"eos_token_id": -1}, "eos_token_id is -1, the vocabulary has ids 0 to 260"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"eot_token_id": 300}, "eot_token_id is 300"),
        ({"eom_token_id": 300}, "eom_token_id is 300"),
        ({"fim_pad_token_id": 300}, "fim_pad_token_id is 300"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes', not a bool"),
        ({"pre": 3}, "pre is 3, not a string"),
    ],
)
def test_damaged_metadata(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(GgufError, match=message) as caught:
        Tokenizer.from_metadata(toy(**keys))
    assert caught.value.hint
