"""Checks glm4, tekken and kimi-k2 against other tokenizers and records what CI can compare.

    pip install --target ORACLES llama-cpp-python==0.3.36 mistral-common==1.13.1 tiktoken==0.14.0 \\
        pillow pycountry
    PYTHONPATH=ORACLES python tests/golden/tokenizers/record_libraries.py \\
        /tmp/sdist/llama_cpp_python-0.3.36

The argument is llama-cpp-python's unpacked source distribution, for llama.cpp's own texts. 10,000
random texts in many scripts more, and all code points that Python's Unicode knows; ids must be
equal in every text; it stops at the first difference.

- glm4: a vocabulary trained here, written as GGUF and tokenized by llama.cpp.
- tekken: the vocabulary in mistral-common, whose own Tekkenizer (on tiktoken) is the oracle.
- kimi-k2: a vocabulary trained here, as GGUF with the merges that llama.cpp's converter would
  write, and without merges; tiktoken with Moonshot's published expression is the oracle of both.

For the last two llama.cpp cuts texts by other rules than the models' own. They are stated below,
and with them in place of ours the ids are llama.cpp's too, in all texts: there is no other
difference. How many texts it touches is in the header of the fixtures.
"""

from __future__ import annotations

import ctypes
import datetime
import random
import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import gguf
import llama_cpp
import mistral_common
import tiktoken
import tokenizers
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from record import SEPARATOR, record_vocabulary
from tokenizers import models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from mlacli.loading import pre_tokenizers
from mlacli.loading.merges import ranked_merges
from mlacli.loading.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from mlacli.loading.tokenizer import _CHAR_TO_BYTE, Tokenizer

N_RANDOM, N_RECORDED, N_TRAINED = 10_000, 295, 6000
TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
CONTROL = {
    "glm4": ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"],
    "kimi-k2": ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_middle|>", "[EOT]", "[PAD]"],
}
# tokenization_kimi.py of moonshotai/Kimi-K2-Instruct
_KIMI_LETTERS = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
)
_KIMI_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
MOONSHOT = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?" + "{}*{}+".format(*_KIMI_LETTERS) + _KIMI_END,
        r"[^\r\n\p{L}\p{N}]?" + "{}+{}*".format(*_KIMI_LETTERS) + _KIMI_END,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# What llama.cpp does instead. Tekken: every letter but a-z counts as a capital, every one but A-Z
# as a small one, and marks are no part of a word. Kimi: capitals don't matter, marks are no part of
# a word, fewer characters are Han, and a token whose merges don't lead to it is not found.
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_HAN = (
    r"\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2EBEF}\x{F900}-\x{FAFF}"
    r"\x{2F800}-\x{2FA1F}"
)
LLAMA_CPP = {
    "tekken": replace(
        PRE_TOKENIZERS["tekken"],
        patterns=(
            f"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + pre_tokenizers._SPACES,
        ),
    ),
    "kimi-k2": replace(
        PRE_TOKENIZERS["kimi-k2"],
        patterns=(
            rf"[{_HAN}]+|{_LEAD}[\p{{L}}&&[^{_HAN}]]+(?:{pre_tokenizers._SUFFIX})?|"
            r"\p{N}{1,3}|" + pre_tokenizers._REST,
        ),
        ignore_merges=False,
    ),
}


def main(root: Path) -> None:
    llama_cpp_root = root / "vendor/llama.cpp"
    commit = re.search(r"ggml-org/llama\.cpp@(\w+)", (root / "CHANGELOG.md").read_text())
    assert commit is not None
    theirs = f"llama.cpp {commit.group(1)} in llama-cpp-python {llama_cpp.__version__}"
    path = llama_cpp_root / "models/ggml-vocab-llama-bpe.gguf.inp"
    texts = [text for text in path.read_bytes().decode().split(SEPARATOR) if text]
    words = tekken_words()
    texts += random_texts("libraries", words, N_RANDOM) + every_code_point()
    corpus = random_texts("training", words, 2 * N_RANDOM) + every_code_point()
    names = [name for several in CONTROL.values() for name in several]  # no tokens twice
    corpus = [text for text in corpus if not any(name in text for name in names)]
    header = {"recorded": datetime.date.today().isoformat()}
    header |= {"command": f"python tests/golden/tokenizers/record_libraries.py {root}"}
    with tempfile.TemporaryDirectory() as folder:
        record_glm4(Path(folder), corpus, texts, header | {"oracle": theirs})
        record_kimi_k2(Path(folder), corpus, texts, header, theirs)
        record_tekken(Path(folder), texts, header, theirs)


def record_glm4(folder: Path, corpus: list[str], texts: list[str], header: dict) -> None:
    metadata = trained("glm4", corpus) | {"tokenizer.ggml.eos_token_id": N_TRAINED}
    metadata |= {"tokenizer.ggml.eot_token_id": N_TRAINED + 3}
    metadata |= {"tokenizer.ggml.eom_token_id": N_TRAINED + 5}
    path = write_gguf(folder, "glm4", metadata)
    expected = llama_cpp_ids(path, texts)
    record(path, metadata, texts, expected, header)
    chat = ["[gMASK]<sop><|user|>\nHello<|assistant|>", "<sop>[gMASK]"]
    ours = [Tokenizer.from_metadata(metadata).encode(text) for text in chat]
    assert ours == llama_cpp_ids(path, chat, special=True)
    # glm4 and chatglm-bpe differ in one flag, which shows where merges don't lead to a token
    merges = metadata["tokenizer.ggml.merges"]
    metadata |= {"tokenizer.ggml.merges": [m for i, m in enumerate(merges) if i % 10]}
    both = []
    for name in ("glm4", "chatglm-bpe"):
        metadata |= {"tokenizer.ggml.pre": name}
        both.append(llama_cpp_ids(write_gguf(folder, name, metadata), texts))
        assert_same(metadata, texts, both[-1])
    assert both[0] != both[1]


def record_kimi_k2(
    folder: Path, corpus: list[str], texts: list[str], header: dict, llama: str
) -> None:
    without = trained("kimi-k2", corpus)
    tokens = without["tokenizer.ggml.tokens"]
    without |= {"tokenizer.ggml.bos_token_id": N_TRAINED}
    without |= {"tokenizer.ggml.eos_token_id": N_TRAINED + 1}
    ranks = {bytes_of(token): i for i, token in enumerate(tokens[:N_TRAINED])}
    moonshot = tiktoken.Encoding("kimi", pat_str=MOONSHOT, mergeable_ranks=ranks, special_tokens={})
    expected = [moonshot.encode_ordinary(text) for text in texts]
    metadata = without | {"tokenizer.ggml.merges": converted_merges(tokens[:N_TRAINED])}
    path = write_gguf(folder, "kimi-k2", metadata)
    theirs = llama_cpp_ids(path, texts)
    del without["tokenizer.ggml.merges"]
    assert_same(without, texts, expected)
    header |= {"oracle": f"tiktoken {version('tiktoken')}, Moonshot's expression"}
    header |= compared("kimi-k2", metadata, texts, expected, theirs, llama)
    record(path, metadata, texts, expected, header)


def record_tekken(folder: Path, texts: list[str], header: dict, llama: str) -> None:
    tekken = Tekkenizer.from_file(TEKKEN)
    n_special, n_vocab = tekken.num_special_tokens, tekken.n_words
    special = [tekken.id_to_piece(i) for i in range(n_special)]
    ranks = {as_characters(b): i for b, i in tekken._tekken_token2id_nospecial.items()}
    tokens = [*special, *sorted(ranks, key=ranks.__getitem__)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * n_special + [1] * (n_vocab - n_special),
        # what llama.cpp's converter writes for Mistral's own format
        "tokenizer.ggml.merges": [" ".join(pair) for pair in ranked_merges(ranks)],
        "tokenizer.ggml.bos_token_id": tekken.bos_id,
        "tokenizer.ggml.eos_token_id": tekken.eos_id,
    }
    path = write_gguf(folder, "tekken", metadata)
    expected = [tekken.encode(text, bos=False, eos=False) for text in texts]
    header |= {"oracle": f"mistral-common {version('mistral-common')}, {TEKKEN.name}"}
    theirs = llama_cpp_ids(path, texts)
    header |= compared("tekken", metadata, texts, expected, theirs, llama)
    assert Tokenizer.from_metadata(metadata).encode("a") == tekken.encode("a", bos=True, eos=False)
    record(path, metadata, texts, expected, header)


def record(
    path: Path, metadata: dict, texts: list[str], expected: list[list[int]], header: dict
) -> None:
    tokenizer = assert_same(metadata, texts, expected)
    header |= {"passed_with_whole_vocabulary": f"{len(texts)} of {len(texts)} texts"}
    some, ids = texts[:N_RECORDED], expected[:N_RECORDED]
    record_vocabulary(path, tokenizer, metadata, some, ids, header)


def assert_same(metadata: dict, texts: list[str], expected: list[list[int]]) -> Tokenizer:
    tokenizer = Tokenizer.from_metadata(metadata)
    for text, ids in zip(texts, expected, strict=True):
        ours = tokenizer.encode(text, add_special=False, parse_special=False)
        assert ours == ids, (metadata["tokenizer.ggml.pre"], text, pieces(tokenizer, ours, ids))
        assert tokenizer.decode(ids) == text
    return tokenizer


def pieces(tokenizer: Tokenizer, *several: list[int]) -> list[list[bytes]]:
    return [[tokenizer.piece(i) for i in ids] for ids in several]


def compared(
    name: str,
    metadata: dict,
    texts: list[str],
    expected: list[list[int]],
    theirs: list[list[int]],
    llama: str,
) -> dict:
    """Header lines; with llama.cpp's rules in place of ours all ids must be llama.cpp's."""
    with mock.patch.dict(PRE_TOKENIZERS, {name: LLAMA_CPP[name]}):
        assert_same(metadata, texts, theirs)
    unlike = sum(a != b for a, b in zip(expected, theirs, strict=True))
    print(f"{name}: llama.cpp has other ids in {unlike} of {len(texts)} texts, by its rules all")
    return {
        "llama_cpp": llama,
        "llama_cpp_other_ids": f"{unlike} of {len(texts)} texts",
        "llama_cpp_same_ids_by_its_rules": f"{len(texts)} of {len(texts)} texts",
    }


# ---- vocabularies


def trained(name: str, corpus: list[str]) -> dict:
    """Metadata with N_TRAINED tokens of byte-level BPE, the bytes first, then control tokens.

    Trained on pieces cut without regard to what is in them: a token for whatever a pre-tokenizer
    should have cut makes a missing cut show in the ids.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=N_TRAINED, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = PreTokenizer((r"[\s\S]{1,12}",)).build()
    made.train_from_iterator(corpus, trainer)
    ids = made.get_vocab()
    assert sorted(ids.values()) == list(range(N_TRAINED))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [*sorted(ids, key=ids.__getitem__), *CONTROL[name]],
        "tokenizer.ggml.token_type": [1] * N_TRAINED + [3] * len(CONTROL[name]),
        "tokenizer.ggml.merges": converted_merges(sorted(ids, key=ids.__getitem__)),
    }


def converted_merges(tokens: list[str]) -> list[str]:
    """One pair for each token: the two parts that plain BPE of lower ranks leaves of it."""
    ranks: dict[tuple[str, str], int] = {}
    known, merges = set(tokens), []
    for token in tokens:
        if len(token) == 1:
            continue
        parts = list(token)
        while len(parts) > 2:
            pairs = zip(parts, parts[1:])  # noqa: B905, RUF007
            rank, at = min((ranks.get(pair, len(tokens)), i) for i, pair in enumerate(pairs))
            if rank == len(tokens):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2 and known.issuperset(parts):
            ranks[parts[0], parts[1]] = len(merges)
            merges.append(" ".join(parts))
    return merges


def as_characters(raw: bytes) -> str:
    return "".join(_BYTE_TO_CHAR[byte] for byte in raw)


def bytes_of(token: str) -> bytes:
    return b"".join(_CHAR_TO_BYTE[c] for c in token)


_BYTE_TO_CHAR = {raw[0]: c for c, raw in _CHAR_TO_BYTE.items()}


# ---- llama.cpp


def write_gguf(folder: Path, name: str, metadata: dict) -> Path:
    path = folder / f"ggml-vocab-{name}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@llama_cpp.llama_log_callback
def _quiet(*_: object) -> None:
    pass


def llama_cpp_ids(path: Path, texts: Iterable[str], special: bool = False) -> list[list[int]]:
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, path
    vocab = llama_cpp.llama_model_get_vocab(model)
    answer = []
    for text in texts:
        raw = text.encode()
        ids = (llama_cpp.llama_token * (len(raw) + 8))()
        n = llama_cpp.llama_tokenize(vocab, raw, len(raw), ids, len(ids), special, special)
        assert n >= 0, text
        answer.append(list(ids[:n]))
    llama_cpp.llama_model_free(model)
    return answer


# ---- texts


def tekken_words() -> list[str]:
    """What Tekken's tokens spell: parts of words of many languages, and of code."""
    tekken = Tekkenizer.from_file(TEKKEN)
    spelled = (raw.decode(errors="ignore") for raw in tekken._tekken_token2id_nospecial)
    return [word for word in spelled if word]


def assigned() -> dict[str, list[str]]:
    """The characters of each general category, but for surrogates and private ones."""
    kinds: dict[str, list[str]] = {}
    for code in range(1, 0x110000):
        kinds.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    for kind in ("Cn", "Cs", "Co"):
        kinds.pop(kind, None)
    return kinds


def every_code_point() -> list[str]:
    """Each one alone, doubled, and beside small and capital letters, digits, marks and Han."""
    characters = [c for kind in assigned().values() for c in kind]
    blocks = [characters[i : i + 50] for i in range(0, len(characters), 50)]
    return ["".join(f"\n {c}a{c}1{c}A{c}{c} 漢{c}!" for c in block) for block in blocks]


def random_texts(seed: str, words: list[str], n: int) -> list[str]:
    """Words of many scripts, single characters, camel case, numbers, contractions and blanks."""
    rng = random.Random(seed)
    kinds = assigned()
    snippets = [
        *("'s", "'T", "'re", "'VE", "'ll", "'LL'D", "'ſ", "don't", "I'M", "’s", "camelCase"),
        "HTTPServer",
        *("éÀ", "ÀÉa", "ǅa", "ǅ", "Straße", "ŒUVRE", "iOS", "ΑΒγ", "жЩ", "ﬁn", "aʰB", "ªº", "ⓐⒶ"),
        *("  ", "\r\n", " \n ", "\n\n", "\t", "   x", "\u00a0", "\u3000", " \u2003a", "\u0085"),
        *("0", "12", "1234567", "٣٤٥٦", "Ⅷ", "½", "x2y", "3.14", "//", "/*\n/", "://", "?!\n\n/"),
        *("々", "〇", "〆", "⺀", "〻", "你好", "日本語カタカナ", "漢字a", "A漢", "豈", "𠀀"),
        *("𮯰", "가나다"),
        *("e\u0301", "A\u0308b", "\u0301", " \u0301a", "हिन्दी", "நிக்", "เที่ยว"
          "👩\u200d🚀", "🇩🇪", "\u200b", "\ufeff"),
        *("<|im_end|>", "[EOS]", "<sop>", "[INST]"),
    ]  # fmt: skip
    texts = []
    for _ in range(n):
        text = ""
        for _ in range(rng.randint(1, 14)):
            which = rng.random()
            if which < 0.5:
                word = rng.choice(words)
                text += rng.choice((word, word, word.title(), word.upper(), word + " "))
            elif which < 0.65:
                kind = kinds[rng.choice(sorted(kinds))]
                text += "".join(rng.choices(kind, k=rng.randint(1, 3)))
            elif which < 0.7:
                text += rng.choice((*"aAéÉ漢あ -=0\n", "ab")) * rng.randint(2, 40)
            else:
                text += rng.choice(snippets)
        texts.append(text)
    return texts


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
