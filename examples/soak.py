"""Load, generate, cancel, close, again and again in one process: python examples/soak.py

    python examples/soak.py --cycles 1000 --dev cuda0,cuda1 --sm graph

Cycles end in turn by closing the generation, by closing the engine under it, by an interrupt while
it waits for the next token, and by running to the end. After the tenth cycle a GPU's memory may
grow by --gpu-mib at most (pages of 2 MiB, the last of them after 550 cycles on an H200; 16 MiB in
all), from halfway on by --late-mib, and the process by --rss-mib: else the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import mlacli

SETTLED = 10  # cycles after which nothing may grow
PROMPT = list(range(1, 13))


def cycle(i: int, model: str | None, flags: dict[str, str]) -> list[int]:
    """The ids that cycle `i` got before it was cancelled."""
    engine, ids = mlacli.load(model, **flags, temp=0, ctx_size=512), []
    with engine:
        tokens = engine.generate_ids(PROMPT, 16)
        for token_id in tokens:
            ids.append(token_id)
            if len(ids) > i % 12:
                break
        match i % 4:
            case 0:
                tokens.close()  # type: ignore[attr-defined]
            case 1:
                engine.close()
            case 2:
                with suppress(KeyboardInterrupt):
                    tokens.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
            case _:
                ids.extend(tokens)
    return ids


def rss() -> int:
    """Resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return 0


def used(gpus: Sequence[str]) -> list[int]:
    """Bytes in use on each GPU, by whomever."""
    if not gpus:
        return []
    from mlacli.backends.cuda_devices import device_memory

    return [total - free for total, free in map(device_memory, gpus)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--model", default=None, help="a file; default: the bundled model")
    parser.add_argument("--dev", default="cuda0")
    parser.add_argument("--sm", default="none")
    parser.add_argument("--comm", default="auto")
    parser.add_argument("--gpu-mib", type=float, default=24)
    parser.add_argument("--late-mib", type=float, default=4)
    parser.add_argument("--rss-mib", type=float, default=64)
    parser.add_argument("--seconds", type=float, default=0, help="end after that many")
    asked = parser.parse_args()
    flags = {"device": asked.dev, "split_mode": asked.sm, "comm": asked.comm}
    gpus = sorted({name for name in asked.dev.split(",") if name != "cpu"})
    start, seconds, wrong, n = time.perf_counter(), list[float](), 0, 0
    first: list[int] = []
    before, halfway = (rss(), used(gpus)), used(gpus)
    while n < asked.cycles:
        began = time.perf_counter()
        ids = cycle(n, asked.model, flags)
        seconds.append(time.perf_counter() - began)
        first = ids if len(ids) > len(first) else first
        wrong += ids != first[: len(ids)]
        n += 1
        if n == SETTLED:
            gc.collect()
            before = (rss(), used(gpus))
        if n == max(SETTLED, asked.cycles // 2):
            halfway = used(gpus)
        if n in (1, SETTLED) or n % 50 == 0:
            print(f"{n:5d}  {_ms(seconds)}  RSS {_mib(rss())}  {_of(gpus, used(gpus))}", flush=True)
        if asked.seconds and time.perf_counter() - start > asked.seconds:
            break
    gc.collect()
    grown = [now - then for now, then in zip(used(gpus), before[1], strict=True)]
    grown_rss = rss() - before[0]
    print(f"{n} cycles of {asked.dev} -sm {asked.sm}: median {_ms(seconds)}, {wrong} wrong answers")
    print(f"after the {SETTLED}th: RSS {_mib(grown_rss)} more, {_of(gpus, grown)}")
    late = [now - then for now, then in zip(used(gpus), halfway, strict=True)]
    print(f"from halfway: {_of(gpus, late)}")
    flat = grown_rss <= asked.rss_mib * 2**20 and max(grown, default=0) <= asked.gpu_mib * 2**20
    flat = flat and (n < asked.cycles or max(late, default=0) <= asked.late_mib * 2**20)
    raise SystemExit(bool(wrong) or not flat)


def _ms(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:6.1f} ms"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


def _of(gpus: Sequence[str], nbytes: Sequence[int]) -> str:
    return ", ".join(f"{name} {_mib(n)}" for name, n in zip(gpus, nbytes, strict=True))


if __name__ == "__main__":
    main()
