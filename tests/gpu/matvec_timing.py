"""Times of the few-token kernels: graphs of launches over weights that don't fit L2. Not a test."""

import sys
import time

import cupy as cp
import numpy as np
from kit import few_tokens as ft
from kit.kernel_ops import GpuOps
from kit.tiled import qtype_of

from mlacli.backends import cuda_matvec as few
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_matvec import Geometry
from mlacli.loading.tiles import tiled_shape
from mlacli.models.parts import Routing

OPS = GpuOps()
RNG = np.random.default_rng(0)
POOL = cp.random.default_rng(0).integers(0, 2**32, 400 << 18, dtype=cp.uint32)  # 400 MB
LAUNCHES = 100


def fake(name, shape, at=0):
    """A weight whose tiles are random bytes `at` into the pool; its tiles' bytes."""
    q = qtype_of(name)
    size = tiled_shape(shape, q).nbytes
    assert at + size <= POOL.nbytes, (shape, at, size)
    return ft.Held(shape, q, None, tiles=Array.dense(POOL.data.ptr + at, (size,), np.uint8))


class Weights:
    """Takes weights one after another from the pool, around and around."""

    def __init__(self):
        self.at = 0

    def take(self, name, shape):
        size = -(-tiled_shape(shape, qtype_of(name)).nbytes // 256) * 256
        if self.at + size > POOL.nbytes:
            self.at = 0
        w = fake(name, shape, self.at)
        self.at += size
        return w


def time_us(launch):
    """Microseconds of one of LAUNCHES launches in a graph; launch(i) launches the i-th."""
    stream = OPS.stream
    with stream:
        stream.begin_capture()
        for i in range(LAUNCHES):
            launch(i)
        graph = stream.end_capture()
        best = []
        for _ in range(6):
            a, b = cp.cuda.Event(), cp.cuda.Event()
            a.record(stream)
            graph.launch(stream)
            b.record(stream)
            b.synchronize()
            best.append(cp.cuda.get_elapsed_time(a, b) * 1e3 / LAUNCHES)
    return float(np.median(best[1:]))


def nbytes(*ws):
    return sum(w.tiles.nbytes for w in ws)


CASES = []


def dense(label, segments, n_in, geometry, n=1, add=False, normed=True):
    count = max(2, min(LAUNCHES, (150 << 20) // sum(tiled_shape((r, n_in), qtype_of(t)).nbytes for t, r in segments)))
    taker = Weights()
    sets = [[taker.take(t, (r, n_in)) for t, r in segments] for _ in range(count)]
    x = OPS.put(RNG.standard_normal((n, n_in)).astype(np.float32))
    outs = [OPS.new((n, r)) for _, r in segments]
    norm = (ft.vector(OPS, np.ones(n_in, np.float32)), 1e-6) if normed else None

    def launch(i):
        ws = sets[i % count]
        few.products(OPS, list(zip(ws, outs)), x, norm, add, geometry)

    CASES.append((label, geometry, nbytes(*sets[0]), launch))


def pair(label, t, rows, n_in, geometry, n=1):
    count = max(2, min(LAUNCHES, (150 << 20) // (2 * tiled_shape((rows, n_in), qtype_of(t)).nbytes)))
    taker = Weights()
    sets = [[taker.take(t, (rows, n_in)) for _ in range(2)] for _ in range(count)]
    x = OPS.put(RNG.standard_normal((n, n_in)).astype(np.float32))
    h, norm = OPS.new((n, rows)), (ft.vector(OPS, np.ones(n_in, np.float32)), 1e-6)

    def launch(i):
        few.gated(OPS, *sets[i % count], h, x, norm, geometry)

    CASES.append((label, geometry, nbytes(*sets[0]), launch))


def experts(label, E, K, d, f, fs, types, shared, geometry, up, with_shared=True):
    gate, up_w = fake(types[0], (E, f, d)), fake(types[1], (E, f, d), 150 << 20)
    down = fake(types[2], (E, d, f))
    taker = Weights()
    sets = [[taker.take(shared[0], (fs, d)), taker.take(shared[1], (fs, d)), taker.take(shared[2], (d, fs))] for _ in range(12)]
    x = OPS.put(RNG.standard_normal((1, d)).astype(np.float32))
    h, y = OPS.put(np.zeros((1, K * f + fs), np.float32)), OPS.put(np.zeros((1, d), np.float32))
    norm = (ft.vector(OPS, np.ones(d, np.float32)), 1e-6)
    ids = [OPS.put(RNG.permutation(E)[None, :K].astype(np.int32)) for _ in range(20)]
    weights = OPS.put(np.full((1, K), 0.1, np.float32))

    def launch(i):
        s = sets[i % 12]
        if up:
            few.experts_up(OPS, h, ids[i % 20], x, gate, up_w, (s[0], s[1]) if with_shared else None, norm, geometry)
        else:
            few.experts_down(OPS, y, h, ids[i % 20], weights, down, s[2], True, False, geometry)

    s = sets[0]
    size = (nbytes(gate, up_w) * K // E + (nbytes(s[0], s[1]) if with_shared else 0)) if up else nbytes(down) * K // E + nbytes(s[2])
    CASES.append((label, geometry, size, launch))


def route(label, E, d, routing):
    gates = [ft.Held((E, d), qtype_of("F32"), None, raw=Array.dense(POOL.data.ptr + i * (8 << 20), (E, 4 * d), np.uint8)) for i in range(40)]
    x = OPS.put(RNG.standard_normal((1, d)).astype(np.float32))
    norm = (ft.vector(OPS, np.ones(d, np.float32)), 1e-6)
    ids, weights, scores = OPS.new((1, routing.n_used), np.int32), OPS.new((1, routing.n_used)), OPS.new((1, E))
    counter = OPS.put(np.zeros(1, np.int32))
    CASES.append((label, None, 4 * E * d, lambda i: few.route(OPS, ids, weights, scores, counter, gates[i % 40], x, routing, norm)))


def route_gated(label, E, d, fs, t, routing, geometry):
    gates = [ft.Held((E, d), qtype_of("F32"), None, raw=Array.dense(POOL.data.ptr + i * (8 << 20), (E, 4 * d), np.uint8)) for i in range(40)]
    x = OPS.put(RNG.standard_normal((1, d)).astype(np.float32))
    norm = (ft.vector(OPS, np.ones(d, np.float32)), 1e-6)
    ids, weights, h = OPS.new((1, routing.n_used), np.int32), OPS.new((1, routing.n_used)), OPS.new((1, fs))
    taker = Weights()
    sets = [[taker.take(t, (fs, d)), taker.take(t, (fs, d))] for _ in range(20)]
    CASES.append((label, geometry, 4 * E * d + nbytes(*sets[0]), lambda i: few.route_gated(OPS, ids, weights, h, gates[i % 40], sets[i % 20], x, routing, norm, geometry=geometry)))


def run():
    start = time.time()
    with OPS.kernels.prepared():
        for _, _, _, launch in CASES:
            launch(0)
    print(f"{len(CASES)} cases, compiled {OPS.kernels.n_compiled} in {OPS.kernels.compile_s:.1f} s")
    last = ""
    for label, g, size, launch in CASES:
        us = time_us(launch)
        how = "" if g is None else f"w{g.warps} a{g.ahead} c{g.ctas} m{g.per_sm}" if isinstance(g, Geometry) else f"p{g.parts}+{g.parts_shared} a{g.ahead} c{g.ctas}"
        print(f"{'' if label == last else label:28s} {how:18s} {us:7.2f} us {size / us / 1e3:6.0f} GB/s  {size / 1e6:6.2f} MB  fit {1.2 + size / 4.3e6:6.2f}", flush=True)
        last = label
    print(f"total {time.time() - start:.1f} s")


def first():
    G, D = Geometry, few.DownGeometry
    for g in (G(8, 4), G(16, 2), G(16, 2, 1, 1), G(16, 2, 2, 2), G(8, 4, 2, 2), G(8, 4, 1, 1), G(8, 2, 2, 2), G(4, 8, 3, 2)):
        dense("q|kv_a 3648x2048 Q4_K", [("Q4_K", 3072), ("Q4_K", 576)], 2048, g)
    for g in (G(8, 4), G(16, 2), G(16, 2, 2), G(4, 8)):
        dense("o 2048x2048 Q4_K", [("Q4_K", 2048)], 2048, g, add=True, normed=False)
    for g in (G(8, 4, 1, 1), G(8, 4, 2, 2), G(8, 4, 3, 3), G(8, 2, 3, 3), G(8, 4, 2, 8), G(4, 4, 4, 4), G(4, 4, 5, 5), G(4, 8, 3, 3), G(16, 2, 1, 1), G(16, 2, 2, 2), G(4, 2, 8, 8)):
        dense("head 102400x2048 Q6_K", [("Q6_K", 102400)], 2048, g)
    for g in (G(8, 4, 1, 1), G(8, 4, 2, 2), G(8, 2, 2, 2), G(8, 2, 3, 3), G(8, 1, 4, 4), G(4, 4, 3, 3), G(4, 4, 4, 4), G(4, 2, 6, 6), G(16, 2, 1, 1), G(16, 1, 2, 2)):
        pair("pair 10944x2048 Q4_K", "Q4_K", 10944, 2048, g)
    for g in (G(8, 4), G(16, 2), G(16, 4)):
        dense("down 2048x10944 Q8_0", [("Q8_0", 2048)], 10944, g, add=True, normed=False)
    for g in (G(6, 2), G(6, 2, 3, 3), G(6, 2, 2, 2), G(3, 4, 4, 4), G(12, 1, 2, 2), G(12, 1, 1, 1)):
        dense("q_b 5120x768 Q4_K", [("Q4_K", 5120)], 768, g)
    for g in (G(8, 4), G(16, 2)):
        dense("q_a|kv_a 1344x2048 Q4_K", [("Q4_K", 768), ("Q4_K", 576)], 2048, g)
    for g in (G(16, 4, 1), G(16, 4, 1, 1), G(20, 4, 1)):
        dense("o 2048x5120 Q4_K", [("Q4_K", 2048)], 5120, g, add=True, normed=False)
    for g in (G(8, 4, 1, 1), G(8, 4, 2, 2), G(8, 2, 2, 2), G(8, 2, 3, 3), G(4, 4, 3, 3), G(4, 4, 4, 4), G(16, 2, 1, 1), G(16, 1, 2, 2), G(8, 4)):
        experts("V2L up", 64, 6, 2048, 1408, 2816, ("Q4_K", "Q4_K", "Q5_0"), ("Q4_K", "Q4_K", "Q6_K"), g, True)
    for g in (D(2, 4), D(2, 4, 3)):
        experts("V2L down", 64, 6, 2048, 1408, 2816, ("Q4_K", "Q4_K", "Q5_0"), ("Q4_K", "Q4_K", "Q6_K"), g, False)
    for g in (G(8, 4, 1, 1), G(8, 4, 2, 2), G(8, 2, 3, 3), G(4, 4, 3, 3), G(16, 2, 1, 1)):
        experts("GLM up", 64, 4, 2048, 1536, 1536, ("Q4_K", "Q4_K", "Q6_K"), ("Q4_K", "Q4_K", "Q6_K"), g, True)
    for g in (D(3, 3), D(6, 6)):
        experts("GLM down", 64, 4, 2048, 1536, 1536, ("Q4_K", "Q4_K", "Q6_K"), ("Q4_K", "Q4_K", "Q6_K"), g, False)
    for g in (G(8, 4, 1, 1), G(8, 4, 2, 2), G(8, 2, 2, 2)):
        route_gated("route+shared V2L", 64, 2048, 2816, "Q4_K", Routing(6, False), g)
        route_gated("route+shared GLM", 64, 2048, 1536, "Q4_K", Routing(4, True, 1, 1, True), g)
    for g in (G(8, 4, 1, 1), G(8, 4, 2, 2), G(8, 2, 2, 2), G(8, 2, 3, 3), G(4, 4, 4, 4), G(16, 2, 1, 1)):
        experts("V2L up routed", 64, 6, 2048, 1408, 2816, ("Q4_K", "Q4_K", "Q5_0"), ("Q4_K", "Q4_K", "Q6_K"), g, True, False)
    route("route 64x2048", 64, 2048, Routing(6, False))


def check():
    """Every type at real sizes against float64."""
    types = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")

    def all_cases():
        for name in types:
            n_in = 1024 if qtype_of(name).block == 256 else 1000 if qtype_of(name).block == 1 else 992
            for n in (1, 3, 8):
                yield f"{name} n={n}", lambda name=name, n=n, n_in=n_in: ft.products(OPS, np.random.default_rng(n), n, n_in, [(name, 205)], normed=n != 3, add=n == 3)
        yield "mix", lambda: ft.products(OPS, RNG, 1, 2048, [("Q4_K", 3072), ("Q8_0", 576), ("Q5_1", 40)], normed=True)
        yield "skip", lambda: ft.products(OPS, RNG, 1, 1376, [("Q6_K", 300)], skip=160)
        yield "rt2", lambda: ft.products(OPS, RNG, 1, 2048, [("Q6_K", 5000)], normed=True, geometry=Geometry(8, 2, 1, 1))
        yield "rt4", lambda: ft.products(OPS, RNG, 4, 512, [("Q6_K", 5000)], normed=True, geometry=Geometry(8, 1, 1))
        yield "big x", lambda: ft.products(OPS, RNG, 1, 2048, [("Q4_K", 64)], scale=1e5)
        yield "small x", lambda: ft.products(OPS, RNG, 1, 2048, [("Q4_K", 64)], scale=1e-6)
        yield "gated", lambda: ft.gated(OPS, RNG, 1, 2048, 1000, "Q4_K", "Q5_K")
        yield "gated 5", lambda: ft.gated(OPS, RNG, 5, 2048, 1000, "Q6_K", "Q6_K")
        yield "experts", lambda: max(ft.experts(OPS, RNG, ft.Experts(("Q4_K", "Q4_K", "Q5_0"), ("Q4_K", "Q5_K", "Q6_K"), d=512, f=352, fs=768, n_used=6)))
        yield "experts n", lambda: max(ft.experts(OPS, RNG, ft.Experts(("Q4_K", "Q4_K", "Q6_K"), ("Q4_K", "Q5_K", "Q8_0"), n=5, d=512, f=320, fs=512, skip=160, n_used=4, first=2, held=4, padded=True, add=True)))
        for n in (1, 5):
            yield f"route+shared {n}", lambda n=n: ft.route(OPS, np.random.default_rng(n), n, 2048, 64, Routing(6, False), shared="Q4_K")
            yield f"route+shared 40 {n}", lambda n=n: ft.route(OPS, np.random.default_rng(n), n, 1024, 40, Routing(4, True, 1, 1, True, 1.8), shared="Q8_0", bias=True, padded=n > 1, imposed=n > 1)
        yield "merged", lambda: max(ft.experts(OPS, RNG, ft.Experts(("Q4_K", "", "Q5_0"), None, d=512, f=96)))
        yield "uneven", lambda: max(ft.experts(OPS, RNG, ft.Experts(("Q4_K", "", "F16"), None, d=512, f=90)))
        for r, e, d, kw in ((Routing(6, False), 64, 2048, {}), (Routing(8, True, 8, 4, True, 2.5), 256, 7168, dict(bias=True)), (Routing(6, False, 8, 3, False, 16.0), 160, 5120, {}), (Routing(4, True, 1, 1, True, 1.8), 64, 2048, dict(bias=True, imposed=True))):
            for n in (1, 5):
                yield f"route {e} n={n}", lambda r=r, e=e, d=d, kw=kw, n=n: ft.route(OPS, RNG, n, d, e, r, padded=n > 1, **kw)

    import traceback
    start, bad = time.time(), 0
    # compile everything in parallel: a dry run that launches nothing
    with OPS.kernels.prepared():
        for label, case in all_cases():
            try:
                case()
            except AssertionError:
                pass
    OPS.held.clear()
    print(f"compiled {OPS.kernels.n_compiled} in {OPS.kernels.compile_s:.1f} s, {time.time() - start:.1f} s")
    for label, case in all_cases():
        try:
            e = case()
            wrong = not e <= 1e-9
            bad += wrong
            print(f"{label:16s} {e:.2e} {'WRONG' if wrong else ''}", flush=True)
        except Exception:
            bad += 1
            print(label, "FAILED", traceback.format_exc()[-600:], flush=True)
        OPS.held.clear()
    print(f"{bad} wrong, {time.time() - start:.1f} s")


if __name__ == "__main__":
    for word in sys.argv[1:]:
        globals()[word]()
        if word == "first":
            run()
