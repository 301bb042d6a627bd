"""Trains the tiny model: corpus, vocabulary and weights, all from scratch.

`python train.py --out build` on one data-centre GPU takes a few minutes; `--toy` runs the same code
on a CPU in about a minute, to try it out. The model is transformers' DeepseekV3ForCausalLM; only
the experts are computed another way while training (all of them, densely, which is faster at this
size), and the two ways are compared at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from corpus import HELDOUT_SEED, TRAIN_SEED, stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

BOS, EOS = "<|begin_of_text|>", "<|endoftext|>"
VOCAB_SIZE = 3072
CONTEXT = 1024
N_HELDOUT = 100
SEED = 20240607
BIAS_STEP = 1e-3  # how far one step moves the gate's balancing bias
LATER_STARTS = 0.3
SENTENCE_START = re.compile(r'(?:(?<=\.) |\n)(?=[A-Z"])')
PEAK_RATE = 2e-3
WARMUP = 200


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE vocabulary with GPT-2's pre-tokenizer, llama.cpp's `gpt-2`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def later_start(text: str, rng: random.Random) -> str:
    """Mostly the story itself, at times from a later sentence on: prompts begin anywhere."""
    if rng.random() > LATER_STARTS:
        return text
    cuts = [m.end() for m in SENTENCE_START.finditer(text) if text.count('"', 0, m.end()) % 2 == 0]
    return text[rng.choice(cuts[: len(cuts) * 2 // 3 + 1]) :] if cuts else text


def pack(tokenizer: Tokenizer, texts: list[str], length: int) -> np.ndarray[Any, Any]:
    """Rows of `length` + 1 tokens, each starting with a story; what does not fit is dropped."""
    rng = random.Random(SEED)
    texts = [later_start(text, rng) for text in texts]
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    rows: list[list[int]] = []
    row: list[int] = []
    for start in range(0, len(texts), 10_000):
        for encoding in tokenizer.encode_batch(texts[start : start + 10_000]):
            row += [bos, *encoding.ids, eos]
            if len(row) > length:
                rows.append(row[: length + 1])
                row = []
    return np.array(rows, dtype=np.int16)


def model_config(toy: bool) -> DeepseekV3Config:
    """The shape of the shipped model, or of the toy."""
    return DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64 if toy else 256,
        intermediate_size=128 if toy else 768,
        moe_intermediate_size=32 if toy else 128,
        num_hidden_layers=2 if toy else 5,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_shared_experts=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        num_nextn_predict_layers=0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.02,
    )


def dense_experts(
    self: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The experts' sum, with every expert computed for every token."""
    n_experts, double, width = self.gate_up_proj.shape
    gates = torch.zeros(
        hidden_states.shape[0], n_experts, device=index.device, dtype=torch.float32
    ).scatter(1, index, weights.float())
    both = hidden_states @ self.gate_up_proj.reshape(n_experts * double, width).T
    gate, up = both.view(-1, n_experts, 2, double // 2).unbind(2)
    inner = functional.silu(gate) * up * gates.to(gate.dtype)[:, :, None]
    down = self.down_proj.transpose(1, 2).reshape(-1, width)
    return (inner.reshape(hidden_states.shape[0], -1) @ down).to(hidden_states.dtype)


class Balance:
    """Counts each expert's tokens and moves the gates' biases against the imbalance."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.gates = [m for m in model.modules() if isinstance(m, modeling.DeepseekV3TopkRouter)]
        self.loads: dict[int, torch.Tensor] = {}
        for number, gate in enumerate(self.gates):
            exact = torch.autocast(next(gate.parameters()).device.type, enabled=False)
            gate.forward = exact(gate.forward)  # the router stays in float32
            gate.register_forward_hook(lambda _m, _i, out, n=number: self.count(n, out[2]))

    def count(self, number: int, chosen: torch.Tensor) -> None:
        n_experts = self.gates[number].e_score_correction_bias.numel()
        hits = functional.one_hot(chosen.detach(), n_experts)
        self.loads[number] = hits.sum(dim=(0, 1)).float()

    @torch.no_grad()
    def step(self, size: float) -> None:
        for number, gate in enumerate(self.gates):
            load = self.loads[number]
            gate.e_score_correction_bias += size * torch.sign(load.mean() - load)

    def shares(self) -> list[list[float]]:
        """Each expert's share of the last batch, by layer."""
        return [[round(float(v), 3) for v in load / load.sum()] for load in self.loads.values()]


def learning_rate(step: int, steps: int, peak: float) -> float:
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    model: DeepseekV3ForCausalLM,
    rows: torch.Tensor,
    *,
    steps: int,
    minutes: float,
    batch: int,
    device: str,
) -> dict[str, Any]:
    """Trains in place; with `steps` 0 as many as fit into `minutes`. Returns what to record."""
    balance = Balance(model)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(rows), generator=generator)
    position = 0
    planned = steps or 1_000_000
    begun = time.time()
    log: list[tuple[int, float]] = []
    step = 0
    average = torch.zeros((), device=device)
    while step < planned:
        if position + batch > len(order):
            order = torch.randperm(len(rows), generator=generator)
            position = 0
        chosen = rows[order[position : position + batch].to(rows.device)].to(device).long()
        position += batch
        rate = learning_rate(step, planned, PEAK_RATE)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            hidden = model.model(input_ids=chosen[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        loss = functional.cross_entropy(
            logits.float().view(-1, logits.shape[-1]), chosen[:, 1:].reshape(-1)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        balance.step(BIAS_STEP * rate / PEAK_RATE)
        average = 0.98 * average + 0.02 * loss.detach()
        step += 1
        if not steps and step == 60:  # the first steps tell how many fit
            if device == "cuda":
                torch.cuda.synchronize()
            warm, warm_step = time.time(), step
        if not steps and step == 160:
            if device == "cuda":
                torch.cuda.synchronize()
            each = (time.time() - warm) / (step - warm_step)
            planned = step + int((minutes * 60 - (time.time() - begun)) / each)
            print(f"{each * 1000:.1f} ms a step, {planned} steps planned", flush=True)
        if step % 500 == 0 or step == planned:
            smooth = float(average) / (1 - 0.98**step)
            log.append((step, round(smooth, 4)))
            print(f"{step} loss {smooth:.4f} {time.time() - begun:.0f} s", flush=True)
    print("expert shares of the last batch:", balance.shares())
    return {
        "steps": step,
        "batch_rows": batch,
        "row_tokens": rows.shape[1] - 1,
        "tokens_seen": step * batch * (rows.shape[1] - 1),
        "epochs": round(step * batch / len(rows), 2),
        "seconds": round(time.time() - begun, 1),
        "loss": log,
        "expert_shares": balance.shares(),
    }


@torch.no_grad()
def story_perplexity(
    model: DeepseekV3ForCausalLM, tokenizer: Tokenizer, texts: list[str], device: str
) -> tuple[float, int]:
    """exp of the mean loss over stories, each alone between BOS and EOS; and the tokens counted."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[0, *tokenizer.encode(text).ids, 1]], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        total += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(total / count), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--stories", type=int, default=60_000)
    parser.add_argument("--minutes", type=float, default=4.5, help="training time if --steps is 0")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="rows of 1024 tokens a step")
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.stories, arguments.steps, arguments.batch = 1000, 20, 2

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = True
    begun = time.time()
    texts = list(stories(TRAIN_SEED, arguments.stories, os.cpu_count() or 1))
    tokenizer = train_tokenizer(texts)
    rows = pack(tokenizer, texts, CONTEXT)
    characters = sum(map(len, texts))
    print(f"{characters} characters, {rows.size} tokens in {len(rows)} rows, ", end="")
    print(f"{time.time() - begun:.0f} s", flush=True)

    model = DeepseekV3ForCausalLM(model_config(arguments.toy)).to(device).train()
    size = sum(p.numel() for p in model.parameters())
    print(f"{size} parameters on {device}", flush=True)
    own_experts = modeling.DeepseekV3Experts.forward
    modeling.DeepseekV3Experts.forward = dense_experts
    record = train(
        model,
        torch.from_numpy(rows).to(device),
        steps=arguments.steps,
        minutes=arguments.minutes,
        batch=arguments.batch,
        device=device,
    )

    torch.backends.cuda.matmul.allow_tf32 = False
    model = model.float().eval()
    heldout = list(stories(HELDOUT_SEED, N_HELDOUT))
    dense, count = story_perplexity(model, tokenizer, heldout, device)
    modeling.DeepseekV3Experts.forward = own_experts
    own, count = story_perplexity(model, tokenizer, heldout, device)
    print(f"held-out perplexity {own:.5f} over {count} tokens, {dense:.5f} with dense experts")

    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.out, max_shard_size="14MB")
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    record |= {
        "stories": arguments.stories,
        "corpus_characters": characters,
        "corpus_tokens": int(rows.size),
        "parameters": size,
        "vocabulary": tokenizer.get_vocab_size(),
        "corpus_seed": TRAIN_SEED,
        "weight_seed": SEED,
        "heldout_perplexity_on_device": own,
        "heldout_perplexity_dense_experts": dense,
        "heldout_tokens": count,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
