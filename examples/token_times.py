"""How evenly tokens come: python examples/token_times.py --synthetic v2lite --dev cuda0

Decodes 1,000 tokens twice, drawn several a launch by the device and one a launch, and prints the
median, 99th percentile and longest time of a token, and where the longest ones were. The first
pass captures its graphs as it goes, as a first answer does; the second finds all of them there.
With --depth a prompt of as many random tokens comes first, timed likewise, in ubatches of --ub.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence

import numpy as np

from mlacli.engine import Engine
from mlacli.flags import LOADED, library_values, to_params
from mlacli.loading.presets import preset
from mlacli.loading.synthetic import SyntheticFile
from mlacli.params import SamplingParams
from mlacli.prepare import prepare
from mlacli.sampling import AHEAD, Sampler

GREEDY = Sampler(SamplingParams(temp=0.0))


def times(engine: Engine, n: int, at_once: int, first: int) -> Iterator[tuple[int, int, float]]:
    """(n_kv before it, tokens, seconds) of each launch."""
    engine.rewind(first)
    token, done = 1, 0
    while done < n:
        n_kv, began = engine.n_kv, time.perf_counter()
        ids = engine.decode_ahead(token, at_once, GREEDY) if at_once > 1 else []
        if not ids:
            ids = [int(engine.decode(token).argmax())]
        yield n_kv, len(ids), time.perf_counter() - began
        token, done = ids[-1], done + len(ids)


def line(found: Sequence[tuple[int, int, float]]) -> str:
    each = np.concatenate([np.full(n, seconds / n) for _, n, seconds in found]) * 1e3
    p50, p99 = np.percentile(each, [50, 99])
    longest = sorted(found, key=lambda one: one[2] / one[1], reverse=True)[:4]
    slow = ", ".join(f"{s / n * 1e3:.2f} at {n_kv} ({n})" for n_kv, n, s in longest)
    return f"p50 {p50:.3f}  p99 {p99:.3f} ms ({p99 / p50:.2f}x)  longest {slow}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--synthetic", default=None)
    parser.add_argument("--dev", default="cuda0")
    parser.add_argument("--sm", default="none")
    parser.add_argument("--comm", default="auto")
    parser.add_argument("--ub", type=int, default=512)
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--depth", type=int, default=0, help="rows cached before")
    asked = parser.parse_args()
    size = -(-(asked.depth + asked.n + AHEAD) // 256) * 256
    flags = {"device": asked.dev, "split_mode": asked.sm, "comm": asked.comm, "ctx_size": size}
    flags |= {"ubatch_size": asked.ub, "batch_size": max(2048, asked.ub)}
    where, passes = f"{asked.dev} -sm {asked.sm} {asked.depth}+{asked.n}", ("first", "second")
    params = to_params(library_values(LOADED, flags))
    file = SyntheticFile(preset(asked.synthetic), on_gpus=True) if asked.synthetic else asked.model
    with Engine(prepare(file, params)) as engine:
        engine.warm_up()
        n_vocab = engine.prepared.hparams.n_vocab
        prompt = np.random.default_rng(0).integers(0, n_vocab, asked.depth).tolist()
        for which in passes if prompt else ():
            engine.rewind(0)
            began = time.perf_counter()
            engine.prefill(prompt)
            rate = asked.depth / (time.perf_counter() - began)
            print(f"{where}, prompt, ubatches of {asked.ub}, {which} pass: {rate:.0f} t/s")
        for at_once in (AHEAD, 1) if asked.n else ():
            for which in passes:
                found = list(times(engine, asked.n, at_once, asked.depth))
                print(f"{where}, {at_once} a launch, {which} pass: {line(found)}", flush=True)


if __name__ == "__main__":
    main()
