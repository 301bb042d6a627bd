"""Exports the trained model as GGUF files and writes the held-out text.

`python make_gguf.py --model build` writes build/tinytales-f32.gguf, the shipped
mlacli/bundled/tinytales-q8_0.gguf and heldout.txt.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from corpus import HELDOUT_SEED, stories
from export_gguf import export_gguf
from train import BOS, EOS, N_HELDOUT
from transformers import DeepseekV3ForCausalLM

HERE = Path(__file__).parent
SHIPPED = HERE.parents[1] / "mlacli" / "bundled" / "tinytales-q8_0.gguf"
HELDOUT = HERE / "heldout.txt"
NORMAL, CONTROL = 1, 3
GENERAL = {
    "general.type": "model",
    "general.description": "A deepseek2 model of seven million weights that tells short stories, "
    "trained on text from the grammar in examples/tiny_model",
    "general.license": "mit",
    "general.author": "the mlacli project",
    "general.size_label": "7M",
    "general.languages": ["en"],
    "general.tags": ["text-generation", "tiny"],
}


def tokenizer_metadata(path: Path) -> dict[str, Any]:
    """The GGUF keys of the vocabulary in a tokenizer.json."""
    bpe = json.loads(path.read_text(encoding="utf-8"))["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if t in (BOS, EOS) else NORMAL for t in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index(BOS),
        "tokenizer.ggml.eos_token_id": tokens.index(EOS),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "build")
    parser.add_argument("--shipped", type=Path, default=SHIPPED)
    arguments = parser.parse_args()

    HELDOUT.write_text("\n\n".join(stories(HELDOUT_SEED, N_HELDOUT)) + "\n", encoding="utf-8")
    model = DeepseekV3ForCausalLM.from_pretrained(arguments.model, dtype="float32")
    metadata = GENERAL | tokenizer_metadata(arguments.model / "tokenizer.json")
    for qtype, path in (
        ("f32", arguments.model / "tinytales-f32.gguf"),
        ("q8_0", arguments.shipped),
    ):
        export_gguf(
            model,
            model.config,
            path,
            qtype=qtype,
            tokenizer_metadata=metadata,
            name="Tiny Tales 7M",
        )
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
