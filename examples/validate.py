"""Every split of a model against one GPU: python examples/validate.py --dev cuda0,cuda1

Takes models of true width cut to three layers, weights drawn at random on the GPUs (the same ones
for every split), and runs -sm none, layer and graph on all counts of the GPUs, on 3, 4, 5 and 8
ranks and with odd shares. Each is held against one GPU, with that one's choices of experts and
cache rows imposed and with its own; then speed and memory are measured. Prints Markdown tables.
Exit code 1: something didn't run, or is beyond a bar.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from divergence import Apart, Case, imposed, noted, tokens

from mlacli.backends import cuda_rows
from mlacli.engine import Engine
from mlacli.flags import LOADED, library_values, to_params
from mlacli.kld_file import log_softmax
from mlacli.loading.drawn import Drawn
from mlacli.loading.gguf_file import TensorInfo
from mlacli.loading.presets import PRESETS, Preset
from mlacli.loading.synthetic import SyntheticFile
from mlacli.params import SamplingParams
from mlacli.prepare import prepare
from mlacli.sampling import AHEAD, Sampler

MODELS = ("v2lite", "v3", "glm47flash", "glm5", "mistral4")
SIZES = (1, 31, 32, 33, 127, 128, 129)  # tokens of a step
EDGES = (16384, 1024)  # numbers of cached rows that a step's tokens begin before and end behind
PREFILL, DECODED, REPEATS = 2048, 64, 3  # tokens that are timed, and how often
MEMORY_SHARE, MEMORY_BYTES = 0.03, 512 << 20  # by which plan and measurement may differ
# Random weights alone give scores and logits of spread 1: attention that averages thousands of
# rows, and next to no difference between tokens. With these, some dozen rows and tokens count.
SCORES, LOGITS = 2.0, 3.0


# ---- models and splits ----------------------------------------------------------------------


class Sharpened(SyntheticFile):
    """A preset's random weights; queries and the head are larger by factors of their spread."""

    factors: Mapping[str, float] = {}

    def _drawn(self, info: TensorInfo) -> Drawn | None:
        from mlacli.loading.drawn import source
        from mlacli.loading.presets import value_spread

        short = info.name.split(".")[-2]
        if short not in self.factors:
            return super()._drawn(info)
        spread = value_spread(info.name, info.shape) * self.factors[short]
        drawn = source(info.name, info.qtype, spread, self._seed)
        return Drawn.whole(drawn, (*info.shape[:-1], info.row_bytes))


@dataclass(frozen=True, slots=True)
class Split:
    """One way to run a model; `flags` as on the command line."""

    name: str
    devices: tuple[str, ...]
    mode: str
    shares: str = ""

    @property
    def flags(self) -> dict[str, Any]:
        shares = {"tensor_split": self.shares} if self.shares else {}
        return {"device": ",".join(self.devices), "split_mode": self.mode, **shares}


def cut(name: str) -> Preset:
    """Three layers of the model: one of its dense kind, if it has any, and routed ones."""
    return replace(PRESETS[name], name=name, dense=min(1, PRESETS[name].dense), layers=3)


def splits(gpus: Sequence[str], quick: bool) -> list[Split]:
    """The first is what the others are held against; GPUs are named again where they are few."""

    def named(n: int) -> tuple[str, ...]:
        return tuple(gpus[i % len(gpus)] for i in range(n))

    found = [Split("none", named(1), "none")]
    counts = sorted({2**i for i in range(1, 9) if 2**i <= len(gpus)} | {len(gpus)} - {1})
    for n in counts:
        found += [Split(f"{mode}, {n} GPUs", named(n), mode) for mode in ("layer", "graph")]
    ranks = [n for n in ((3,) if quick else (3, 5, 8)) if n not in counts]
    found += [Split(f"graph, {n} ranks", named(n), "graph") for n in ranks]
    if quick:
        return found
    found += [Split("layer, 3 stages", named(3), "layer")] if 3 not in counts else []
    found += [Split("graph, 4 ranks", named(4), "graph")] if 4 not in counts else []
    odd = (("graph", 2, "3,1"), ("graph", 2, "1,0"), ("graph", 4, "3,2,2,1"), ("layer", 2, "3,1"))
    return found + [Split(f"{mode}, -ts {ts}", named(n), mode, ts) for mode, n, ts in odd]


def opened(preset: Preset, split: Split) -> Engine:
    """The model with room for every step; its weights depend on the preset alone."""
    flags = {"ctx_size": EDGES[0] + PREFILL + 256, "ubatch_size": PREFILL} | split.flags
    file = Sharpened(preset, on_gpus=True)
    prepared = prepare(file, to_params(library_values(LOADED, flags)))
    hp = prepared.hparams
    scores = SCORES / (hp.softmax_scale * (hp.k + hp.p) ** 0.5)
    file.factors = {"attn_q": scores, "attn_q_b": scores, "output": LOGITS}
    return Engine(prepared)


@contextmanager
def clock(what: str) -> Iterator[None]:
    """Says on stderr how long it takes."""
    start = time.perf_counter()
    try:
        yield
    finally:
        sys.stderr.write(f" {what} {time.perf_counter() - start:.1f} s,")
        sys.stderr.flush()


# ---- logits ---------------------------------------------------------------------------------


def cases(engine: Engine, quick: bool) -> list[Case]:
    """Few tokens first: each step overwrites rows that only those of more tokens don't need."""
    found, n_vocab = [], engine.prepared.hparams.n_vocab
    for edge in EDGES[1:2] if quick else EDGES:
        for n in SIZES[::3] if quick else SIZES:
            n_kv = max(0, edge - (n + 1) // 2)
            engine.n_kv = n_kv
            with noted(engine, n) as choices:
                logits = engine.prefill(tokens(n, n_kv, n_vocab), all_rows=True)
            found.append(Case(n, n_kv, choices, logits, np.exp(log_softmax(logits))))
    return found


def compared(engine: Engine, found: Sequence[Case]) -> tuple[Apart, Apart]:
    """(with choices imposed, with its own)."""
    both = Apart(), Apart()
    with ThreadPoolExecutor() as pool:
        for case in found:
            engine.n_kv = case.n_kv
            with imposed(engine, case.choices):
                both[0].add(engine.prefill(case.tokens, all_rows=True), case, pool)
            engine.n_kv = case.n_kv
            both[1].add(engine.prefill(case.tokens, all_rows=True), case, pool)
    return both


class CachedRows:
    """Random rows of spread 1, as large as real ones, for the caches of every rank."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int, int], Any] = {}

    def fill(self, engine: Engine, n: int) -> None:
        for ops, cache in zip(engine._ranks.ops, engine._caches, strict=True):
            device: Any = getattr(ops, "device")  # noqa: B009 - of CUDA's ops alone
            device.use()
            of_layers = [("rows", il, kept.rows) for il, kept in cache.rows.items()]
            of_layers += [("keys", il, rows) for il, rows in cache.index_rows.items()]
            for kind, il, rows in of_layers:
                cuda_rows.write(device, rows, self._of(kind, il, n, rows.width))
        engine.n_kv = n

    def _of(self, kind: str, layer: int, n: int, width: int) -> Any:
        key = kind, layer, width
        if key not in self._rows:
            rng = np.random.default_rng([layer, kind == "keys"])
            self._rows[key] = rng.standard_normal((n, width), np.float32).astype(np.float16)
        return self._rows[key]


# ---- speed and memory -----------------------------------------------------------------------


def speeds(engine: Engine, n_kv: int) -> tuple[float, float]:
    """(prefill, decode) in tokens a second after `n_kv` cached rows; the median of a few."""
    greedy, prompt = (
        Sampler(SamplingParams(temp=0.0)),
        tokens(PREFILL, 1, engine.prepared.hparams.n_vocab),
    )

    def decode() -> None:
        done, token = 0, 1
        while done < DECODED:
            ahead = engine.decode_ahead(token, min(AHEAD, DECODED - done), greedy)
            done, token = done + len(ahead), ahead[-1]

    def seconds(run: Callable[[], object]) -> float:
        taken = []
        for _ in range(1 + REPEATS):
            engine.n_kv, start = n_kv, time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])  # the first one captures

    return PREFILL / seconds(lambda: engine.prefill(prompt)), DECODED / seconds(decode)


def memory(engine: Engine) -> dict[str, tuple[int, int]]:
    """Device -> bytes (planned, added since before the engine was opened)."""
    used, planned = engine.memory(), dict.fromkeys(engine.memory(), 0)
    for rank in engine.prepared.plan.ranks:
        planned[rank.device] += rank.total
    return {name: (planned[name], used[name]) for name in used}


def off_plan(planned: int, used: int) -> bool:
    return abs(used - planned) > max(MEMORY_SHARE * planned, MEMORY_BYTES)


# ---- tables ---------------------------------------------------------------------------------

HEAD = (
    "split", "choices imposed: KL, most", "free: KL, most", f"prefill {PREFILL} at 0 / {EDGES[0]}",
    f"decode at 0 / {EDGES[0]}", "GiB by GPU, planned / used", "",
)  # fmt: skip


def row(split: Split, engine: Engine, found: Sequence[Case]) -> tuple[str, str]:
    """(a line of the table, what is wrong)."""
    with clock("comparing"):
        by_rule, free = compared(engine, found)
    with clock("timing"):
        rates = [speeds(engine, n_kv) for n_kv in (0, EDGES[0])]
    cells = [" / ".join(f"{rate[j]:,.0f}" for rate in rates) for j in (0, 1)]
    held = memory(engine)
    off = [name for name, both in held.items() if off_plan(*both)]
    wrong = [by_rule.beyond, f"memory of {', '.join(off)}" if off else ""]
    if not all(map(np.isfinite, free.kl)):
        wrong.append("logits not finite")
    shown = ", ".join(f"{a / 2**30:.2f} / {b / 2**30:.2f}" for a, b in held.values())
    problem = "; ".join(filter(None, wrong))
    line = [split.name, str(by_rule), str(free), *cells, shown, problem or "ok"]
    return "| " + " | ".join(line) + " |", problem


def about(found: Sequence[Case]) -> str:
    """That the logits say something: their spread, and how many tokens they leave open."""
    last = np.stack([case.logits[-1] for case in found]).astype(np.float64)
    log_p = log_softmax(last)
    left = np.exp(-(np.exp(log_p) * log_p).sum(-1))
    return (
        f"logits of spread {last.std():.2f}; perplexity of a distribution "
        f"{left.min():,.0f} to {left.max():,.0f} of {last.shape[1]:,} tokens"
    )


def validated(name: str, gpus: Sequence[str], quick: bool, part: tuple[int, int] = (1, 1)) -> bool:
    """Prints the table of one model; whether all of it is as it should be.

    `part` i of n: the first split, and of the others every n-th.
    """
    preset, rows, found, good = cut(name), CachedRows(), list[Case](), True
    first, *others = splits(gpus, quick)
    for split in (first, *others[part[0] - 1 :: part[1]]):
        sys.stderr.write(f"{name}, {split.name}:")
        try:
            with clock("opening"):
                engine = opened(preset, split)
            with engine:
                with clock("filling"):
                    rows.fill(engine, EDGES[0])
                if not found:
                    with clock("choosing"):
                        found = cases(engine, quick)
                    print(f"\n{name}: 3 layers; {about(found)}\n")
                    print("| " + " | ".join(HEAD) + " |")
                    print("| --- " * len(HEAD) + "|")
                    rows.fill(engine, EDGES[0])
                if split is first and part[0] > 1:
                    continue
                line, problem = row(split, engine, found)
            print(line, flush=True)
            good = good and not problem
        except Exception as e:  # whatever it is, the other splits are still to be seen
            traceback.print_exc()
            print(f"| {split.name} | " + "| " * (len(HEAD) - 2) + f"failed: {e} |", flush=True)
            if not found:
                return False
            good = False
        sys.stderr.write("\n")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dev", default="", help="GPUs, each once: cuda0,cuda1; all by default")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--quick", action="store_true", help="few splits and steps")
    parser.add_argument("--part", default="1/1", help="2/3: the second of three parts")
    args = parser.parse_args()
    import cupy as cp

    n = cp.cuda.runtime.getDeviceCount()
    gpus = args.dev.split(",") if args.dev else [f"cuda{i}" for i in range(n)]
    kind = cp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    words = shlex.join(["python", "examples/validate.py", *sys.argv[1:]])
    print(f"{len(gpus)} x {kind}, {datetime.date.today()}, `{words}`")
    part, n_parts = (int(word) for word in args.part.split("/"))
    good = [validated(name, gpus, args.quick, (part, n_parts)) for name in args.models]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
