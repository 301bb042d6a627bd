"""Sums over GPUs of partials that products send by themselves, bit for bit those of NumPy."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from kit.few_tokens import weight
from kit.launcher import Launcher

from mlacli.backends import cuda_matvec as few
from mlacli.errors import RankError

cupy = pytest.importorskip("cupy", reason="needs CuPy (pip install 'mlacli[cuda13]')")

from mlacli.backends.cuda_collectives import Collectives, GpuPlace  # noqa: E402
from mlacli.backends.cuda_device import CudaDevice  # noqa: E402
from mlacli.backends.cuda_devices import device_count, use_device  # noqa: E402

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(device_count() < 2, reason="needs two CUDA GPUs"),
]

MOST = 7168
SPIN = (
    'extern "C" __global__ void spin(long long ns) { long long a, b;'
    'asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(a));'
    'do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(b)); while (b - a < ns); }'
)
Sum = tuple[int, tuple[bool, bool], tuple[bool, bool]]  # floats, who holds a part, who sends it


class Rig:
    """Two GPUs with a product of each size, whose values are known, and a residual stream."""

    def __init__(self, order: Sequence[int] = (0, 1)) -> None:
        self.ops = []
        for gpu in order:
            use_device(f"cuda{gpu}")
            self.ops.append(Launcher(CudaDevice(f"cuda{gpu}", 64 << 20)))
        self.places = [GpuPlace(ops.device, [rank]) for rank, ops in enumerate(self.ops)]
        self.comm = Collectives(self.places, "p2p", "f32", MOST)
        rng = np.random.default_rng(3)
        self.want = rng.standard_normal(MOST).astype(np.float32)
        self.streams, self.products, self.values = [], [], []
        for ops in self.ops:
            ops.device.use()
            self.streams.append(ops.put(self.want))
            x = ops.put(rng.standard_normal((1, 256)).astype(np.float32))
            mine = {n: (weight(ops, rng, "Q4_K", (n, 256)), x) for n in (36, 2048, MOST)}
            self.products.append(mine)
            self.values.append({n: self.stored(ops, n, *both) for n, both in mine.items()})

    @staticmethod
    def stored(ops: Launcher, n: int, w: Any, x: Any) -> np.ndarray:
        y = ops.new((1, n))
        with ops.device.prepared():
            few.products(ops, [(w, y)], x)
        few.products(ops, [(w, y)], x)
        return ops.get(y)[0]

    def captured(self, sums: Sequence[Sum]) -> list[Any]:
        replays = []
        for g, ops in enumerate(self.ops):

            def launches(g: int = g, ops: Launcher = ops) -> None:
                for n, held, sending in sums:
                    w, x = self.products[g][n]
                    mail = self.comm.mail(g, (1, n))
                    assert mail is not None
                    sent = held[g] and sending[g]
                    if held[g]:
                        out = mail if sent else self.comm.slot(g)[:n].reshape(1, n)
                        few.products(ops, [(w, out)], x)
                    self.comm.reduce_add(g, [self.streams[g][:n]], held, n, sent=sent)

            ops.device.use()
            with ops.device.prepared():
                launches()
            replays.append(ops.device.capture(launches))
        return replays

    def run(self, replays: Sequence[Any], sums: Sequence[Sum]) -> None:
        for ops, replay in zip(self.ops, replays, strict=True):
            ops.device.use()
            replay()
        for n, held, _ in sums:
            parts = [of[n] for of, holds in zip(self.values, held, strict=True) if holds]
            total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
            self.want[:n] += total

    def check(self) -> None:
        for ops in self.ops:
            ops.device.use()
            ops.device.synchronize()
        self.comm.check()
        for g, ops in enumerate(self.ops):
            ops.device.use()
            got = ops.get(self.streams[g])
            wrong = np.flatnonzero(got != self.want)
            assert not len(wrong), f"GPU {g}: {len(wrong)} wrong, the first at {wrong[0]}"


BOTH = (True, True)
MIXED: list[Sum] = [
    (2048, BOTH, BOTH), (MOST, BOTH, BOTH), (36, BOTH, (True, False)), (2048, (True, False), BOTH),
    (2048, (False, True), BOTH), (MOST, BOTH, (False, True)), (36, BOTH, BOTH),
    (MOST, BOTH, (False, False)), (2048, (True, False), BOTH),
]  # fmt: skip


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_sums_of_what_products_sent_are_numpys(order: tuple[int, int]) -> None:
    """Beside products that fill slots, GPUs without a partial; replayed in any order."""
    rig = Rig(order)
    lists = [MIXED, MIXED[:1], MIXED[1:4], MIXED[3:]]
    graphs = [(rig.captured(sums), sums) for sums in lists]
    rng = np.random.default_rng(1)
    for _ in range(4):
        for _ in range(40):
            rig.run(*graphs[rng.integers(len(graphs))])
        rig.check()
    rig.comm.close()


def test_a_late_gpu_is_waited_for() -> None:
    rig = Rig()
    graph = rig.captured(MIXED)
    wait = cupy.RawKernel(SPIN, "spin")
    for late in (0, 1, 0):
        rig.ops[late].device.use()
        with rig.ops[late].device.stream:
            wait((1,), (1,), (np.int64(20_000_000),))
        for _ in range(3):
            rig.run(graph, MIXED)
        rig.check()
    rig.comm.close()


def test_a_dead_gpu_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLACLI_SPIN_MS", "300")
    rig = Rig()
    sums: list[Sum] = [(2048, BOTH, BOTH)] * 5
    graph = rig.captured(sums)
    rig.run(graph, sums)
    rig.check()
    start = time.perf_counter()
    rig.ops[0].device.use()
    graph[0]()
    rig.ops[0].device.synchronize()
    assert 0.25 < time.perf_counter() - start < 2, "one limit, not one a sum"
    with pytest.raises(RankError, match=r"rank 1 .*no message from cuda1 within 0\.3 s"):
        rig.comm.check()
    rig.comm.reset()
    for g, ops in enumerate(rig.ops):
        ops.device.use()
        ops.device.copy_in(rig.streams[g], rig.want)
    rig.run(graph, sums)
    rig.check()
    rig.comm.close()
