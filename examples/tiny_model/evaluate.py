"""Perplexity of the held-out text, by transformers or by llama.cpp, in ways others can repeat.

stories: heldout.txt is cut at its blank lines; each story alone is BOS + tokens + EOS, and the loss
is averaged over all predicted tokens of all stories, EOS counted. chunks_N: llama.cpp's way, as in
`llama-perplexity -c N`: the whole file is one text, cut into chunks of N tokens (the rest dropped),
the first token of each replaced by BOS, and the second half of each chunk is scored.

`python evaluate.py --model build`, or `--gguf FILE` with llama-cpp-python installed; the figures go
into results.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
BOS, EOS = 0, 1
CHUNKS = (256, 512)
Logits = Callable[[list[int]], np.ndarray[Any, Any]]


def losses(logits: np.ndarray[Any, Any], targets: list[int]) -> np.ndarray[Any, Any]:
    """-log p of each target under its row of logits, in float64."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    chosen = rows[np.arange(len(targets)), targets]
    return np.log(np.exp(rows).sum(axis=1)) - chosen


def perplexity(
    run: Logits, windows: list[list[int]], start: Callable[[int], int]
) -> dict[str, float]:
    """Over the tokens that follow position `start(length)` and later ones of each window."""
    total, count = 0.0, 0
    for ids in windows:
        first = start(len(ids))
        part = losses(run(ids)[first : len(ids) - 1], ids[first + 1 :])
        total += float(part.sum())
        count += len(part)
    return {"perplexity": round(math.exp(total / count), 6), "tokens": count}


def figures(run: Logits, encode: Callable[[str], list[int]]) -> dict[str, Any]:
    """All three perplexities of heldout.txt."""
    text = (HERE / "heldout.txt").read_text(encoding="utf-8")
    stories = [[BOS, *encode(story), EOS] for story in text.strip().split("\n\n")]
    out: dict[str, Any] = {"stories": perplexity(run, stories, lambda n: 0)}
    whole = [BOS, *encode(text)]
    for size in CHUNKS:
        starts = range(0, len(whole) - size + 1, size)
        chunks = [[BOS, *whole[s + 1 : s + size]] for s in starts]
        out[f"chunks_{size}"] = perplexity(run, chunks, lambda n: n // 2)
    return out


def with_transformers(folder: Path) -> dict[str, Any]:
    """transformers' own class, float32 on the CPU."""
    import torch
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    @torch.no_grad()
    def run(ids: list[int]) -> np.ndarray[Any, Any]:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()

    return figures(run, lambda text: tokenizer.encode(text).ids) | {
        "by": f"transformers {version('transformers')}, torch {version('torch')}, float32, CPU",
    }


def with_llama_cpp(path: Path, folder: Path) -> dict[str, Any]:
    """llama.cpp on the CPU with its default settings, and whether it cuts the text alike."""
    from llama_cpp import Llama

    model = Llama(
        str(path), n_ctx=1024, n_batch=1024, n_ubatch=1024, logits_all=True, verbose=False
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return list(model.tokenize(text.encode(), add_bos=False, special=False))

    def run(ids: list[int]) -> np.ndarray[Any, Any]:
        model.reset()
        model.eval(ids)
        return np.array(model.scores[: len(ids)])

    text = (HERE / "heldout.txt").read_text(encoding="utf-8")
    return figures(run, encode) | {
        "tokens_equal_tokenizers": encode(text) == tokenizer.encode(text).ids,
        "adds_bos": model.tokenize(b"x", add_bos=True)[0] == BOS,
        "by": f"llama-cpp-python {version('llama-cpp-python')}, CPU",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "build")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--name", help="the key in results.json")
    arguments = parser.parse_args()
    if arguments.gguf:
        found = with_llama_cpp(arguments.gguf, arguments.model)
        data = arguments.gguf.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        found |= {"file": arguments.gguf.name, "bytes": len(data), "sha256": digest}
    else:
        found = with_transformers(arguments.model)
    found["date"] = time.strftime("%Y-%m-%d")
    print(json.dumps(found, indent=1))

    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    training = json.loads((arguments.model / "training.json").read_text(encoding="utf-8"))
    results["training"] = training
    results[arguments.name or ("llama.cpp" if arguments.gguf else "transformers")] = found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
