"""Ten prompts continued by 64 tokens each, and a search for copied text.

Every run of 16 tokens in the samples is looked for in the whole training corpus, which is told
again from its seed. The corpus comes from a grammar with stock phrases, so now and then a run is
found: several sets of samples are made, and the first set without any goes into samples.md
together with the count over all sets. Exits with 1 when every set has one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import TRAIN_SEED, stories
from tokenizers import Tokenizer
from transformers import DeepseekV3ForCausalLM

HERE = Path(__file__).parent
RUN = 16
N_TOKENS = 64
BOS, EOS = 0, 1
PROMPTS = [
    "Once upon a time",
    "In the middle of the night",
    "The old clockmaker",
    "A small dragon named Otto",
    "On the last day of winter",
    "Lily wanted to learn to whistle, but",
    '"Where is my lantern?" asked',
    "The storm was over, and",
    "Nobody in the village",
    "The fox and the hen went down to the river",
]


@torch.no_grad()
def sample(
    model: DeepseekV3ForCausalLM, ids: list[int], temperature: float, seed: int
) -> list[int]:
    """`ids` continued by up to N_TOKENS, up to the end of the story; temperature 0 is greedy."""
    generator = torch.Generator().manual_seed(seed)
    out = list(ids)
    step = model(input_ids=torch.tensor([out]), use_cache=True)
    for _ in range(N_TOKENS):
        logits = step.logits[0, -1].double()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            chances = torch.softmax(logits / temperature, -1)
            token = int(torch.multinomial(chances, 1, generator=generator))
        if token == EOS:
            break
        out.append(token)
        step = model(
            input_ids=torch.tensor([[token]]), past_key_values=step.past_key_values, use_cache=True
        )
    return out


def hashes(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A 64-bit hash of each run of RUN tokens."""
    if len(ids) < RUN:
        return np.zeros(0, dtype=np.uint64)
    total = np.zeros(len(ids) - RUN + 1, dtype=np.uint64)
    for offset in range(RUN):
        total *= np.uint64(0x9E3779B97F4A7C15)
        total += ids[offset : offset + len(total)].astype(np.uint64) + np.uint64(1)
        total ^= total >> np.uint64(29)
    return total


def copied(
    tokenizer: Tokenizer, samples: list[list[int]], texts: Iterable[str]
) -> list[tuple[int, str]]:
    """(sample, text) of every run in the samples that is in the texts too."""
    runs = [hashes(np.array(s)) for s in samples]
    wanted = set(np.concatenate(runs).tolist())
    found: set[int] = set()
    for text in texts:
        own = hashes(np.array(tokenizer.encode(text).ids))
        found |= wanted.intersection(own.tolist())
    return [
        (number, tokenizer.decode(ids[start : start + RUN]))
        for number, (ids, own) in enumerate(zip(samples, runs, strict=True))
        for start in range(len(own))
        if int(own[start]) in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "build")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seeds", type=int, default=8, help="how many sets of samples")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()

    model = DeepseekV3ForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    count = json.loads((arguments.model / "training.json").read_text())["stories"]
    starts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    seeds = range(1, arguments.seeds + 1)
    samples = [
        sample(model, [BOS, *start], arguments.temperature, 100 * seed + number)[1:]
        for seed in seeds
        for number, start in enumerate(starts)
    ]
    runs = copied(tokenizer, samples, stories(TRAIN_SEED, count, arguments.processes))
    windows = sum(max(0, len(ids) - RUN + 1) for ids in samples)
    per_seed = dict.fromkeys(seeds, 0)
    for number, text in runs:
        seed = seeds[number // len(PROMPTS)]
        per_seed[seed] += 1
        print(f"seed {seed}, sample {number % len(PROMPTS) + 1}: {text!r}")
    print(f"{len(runs)} of {windows} runs are in the training text; by seed: {per_seed}")
    clean = [seed for seed in seeds if not per_seed[seed]]
    if not clean:
        sys.exit(1)

    chosen = samples[(clean[0] - 1) * len(PROMPTS) : clean[0] * len(PROMPTS)]
    lines = [
        "# Samples",
        "",
        f"Made by check_samples.py: {N_TOKENS} tokens each (fewer where the story ends), float32,",
        f"temperature {arguments.temperature}, no other sampler, seed {clean[0]}. None of their "
        f"runs of {RUN} tokens stands in the",
        f"training text of {count} stories. This is the first such set of {len(seeds)}; in all "
        f"sets together {len(runs)} of",
        f"{windows} runs ({100 * len(runs) / windows:.2f}%) do, stock phrases of the grammar with "
        "common words in them.",
        f"Sets without any: {len(clean)} of {len(seeds)}.",
        "",
    ]
    for start, prompt, ids in zip(starts, PROMPTS, chosen, strict=True):
        text = f"**{prompt}**{tokenizer.decode(ids[len(start) :])}".replace("\n", "  \n> ")
        lines += [f"> {text}", ""]
    (HERE / "samples.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
