"""Times products of every weight type on a GPU: python examples/bench_types.py

Decode (one token) and prefill (512) of dense and routed-expert products on random bytes, each
launch on other weights, so that none is in the L2 cache. Prints a Markdown table for
kernels/README.md: microseconds a launch, GGUF bytes a second, and the share of Q4_K's on the
same shape.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from mlacli.backends import cuda_experts
from mlacli.backends.cuda_acts import Act, Chosen
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_host_experts import HostExperts
from mlacli.backends.cuda_ops import CudaOps
from mlacli.backends.cuda_weights import CudaWeight
from mlacli.loading import quant_types
from mlacli.loading.quant_types import QType
from mlacli.loading.tiles import is_tiled, tiled_shape
from mlacli.ops import LayerWeights

TYPES = (
    "Q4_K", "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "IQ4_NL",
    "IQ4_XS", "MXFP4", "Q3_K", "Q2_K", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M",
    "IQ1_S",
)  # fmt: skip
POOL = 1 << 30  # random bytes that weights are slices of
COLD = 192 << 20  # bytes of weights that a graph reads at least
REPLAYS = 5


@dataclass(frozen=True, slots=True)
class Case:
    """`rows` x `cols` dense; or of `experts`, `used` by each token, gate, up and down."""

    label: str
    rows: int
    cols: int
    n: int = 1
    experts: int = 0
    used: int = 0

    def values(self) -> int:
        """Of the weights that a launch reads."""
        chosen = min(self.experts, self.n * self.used) if self.experts else 1
        return self.rows * self.cols * chosen * (3 if self.experts else 1)


CASES = (
    Case("2048x2048", 2048, 2048),
    Case("8192x2048", 8192, 2048),
    Case("2048x7168", 2048, 7168),
    Case("102400x2048", 102400, 2048),
    Case("6 of 64 experts 1536x2048", 1536, 2048, 1, 64, 6),
    Case("8192x2048, 512 tokens", 8192, 2048, 512),
    Case("6 of 64 experts, 512 tokens", 1536, 2048, 512, 64, 6),
)


class Products(CudaOps):
    """CudaOps without a model."""

    def __init__(self, device: Any) -> None:
        self.device, self.n_sm, self.capability = device, device.n_sm, device.capability
        self.host_experts = HostExperts(self)


class Bench:
    """Products on `device`, weights out of a pool of random bytes."""

    def __init__(self, device: Any) -> None:
        self.raw = False  # GGUF bytes whatever the type
        self.ops, self._at = Products(device), 0
        self._rng = np.random.default_rng(1)
        self._pool = device.take((POOL,), np.uint8)
        drawn = self._rng.integers(0, 256, 64 << 20, np.uint8)
        for at in range(0, POOL, drawn.size):
            device.copy_in(self._pool[at : at + drawn.size], drawn)

    def weight(self, name: str, shape: tuple[int, ...], q: QType) -> CudaWeight:
        tiled = not self.raw and is_tiled(name, shape, q)
        layout = tiled_shape(shape, q) if tiled else None
        nbytes = layout.nbytes if layout else int(np.prod(shape[:-1])) * q.row_bytes(shape[-1])
        if self._at + nbytes > POOL:
            self._at = 0
        held = self._pool[self._at : self._at + nbytes]
        self._at += -(-nbytes // 256) * 256
        return CudaWeight(name, shape, q, held, layout)

    def launches(self, case: Case, q: QType) -> Iterator[Callable[[], Any]]:
        """Functions that launch the case, enough of them to read COLD bytes of weights."""
        ops, n = self.ops, case.n
        x, y = self._values((n, case.cols)), self._values((n, max(case.rows, case.cols)))
        nbytes = case.values() // q.block * q.nbytes
        for _ in range(min(100, max(3, COLD // nbytes))):
            if not case.experts:
                w = self.weight("w", (case.rows, case.cols), q)
                yield lambda w=w: ops.products(Act(x.shape, x), [(w, y[:, : case.rows])])
                continue
            shape, e = (case.rows, case.cols), case.experts
            layer = LayerWeights({
                "ffn_gate_exps": self.weight("gate", (e, *shape), q),
                "ffn_up_exps": self.weight("up", (e, *shape), q),
                "ffn_down_exps": self.weight("down", (e, *shape[::-1]), q),
            })  # fmt: skip
            ids = np.argsort(self._rng.random((n, e)), -1)[:, : case.used].astype(np.int32)
            chosen = Chosen(ops.put(ids), self._values(ids.shape))
            yield lambda layer=layer, chosen=chosen: cuda_experts.experts(
                ops, Act(x.shape, x), chosen, layer, y[:, : case.cols], False
            )

    def _values(self, shape: tuple[int, ...]) -> Array:
        return self.ops.put(self._rng.standard_normal(shape, np.float32))

    def time_us(self, case: Case, q: QType) -> float:
        import cupy as cp

        device = self.ops.device
        mark = device.mark()
        all_of = list(self.launches(case, q))
        scratch = device.mark()

        def run() -> None:
            for one in all_of:
                one()
                device.rewind(scratch)

        replay, times = device.capture(run), []
        replay()
        for _ in range(REPLAYS):
            events = [cp.cuda.Event() for _ in range(2)]
            events[0].record(device.stream)
            replay()
            events[1].record(device.stream)
            events[1].synchronize()
            times.append(1e3 * cp.cuda.get_elapsed_time(*events))
        device.rewind(mark)
        return sorted(times)[REPLAYS // 2] / len(all_of)


def qtype(name: str) -> QType:
    return quant_types.from_id(GGMLQuantizationType[name].value, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--raw", action="store_true", help="types after Q4_K as GGUF stores them")
    args = parser.parse_args()
    import cupy as cp

    from mlacli.backends.cuda_device import CudaDevice

    device: Any = CudaDevice("cuda0", cp.cuda.runtime.memGetInfo()[0] - (4 << 30))
    bench, cases = Bench(device), [CASES[i] for i in args.cases]
    types = ["Q4_K", *(t for t in args.types if t != "Q4_K")]
    mark = device.mark()
    with device.prepared():
        for name in types:
            bench.raw = args.raw and name != "Q4_K"
            for case in cases:
                next(bench.launches(case, qtype(name)))()
                device.rewind(mark)
    name = cp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"{name}, {datetime.date.today()}: us, GB/s of GGUF bytes, share of Q4_K's")
    print("\n| type | " + " | ".join(case.label for case in cases) + " |")
    print("| --- " * (1 + len(cases)) + "|")
    of_q4_k: dict[Case, float] = {}
    for name in types:
        q, shown = qtype(name), []
        bench.raw = args.raw and name != "Q4_K"
        for case in cases:
            us = bench.time_us(case, q)
            rate = case.values() / q.block * q.nbytes / us / 1e3
            share = rate / of_q4_k.setdefault(case, rate)
            shown.append(f"{us:.1f}, {rate:.0f}, {share:.0%}")
        print(f"| {name} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
