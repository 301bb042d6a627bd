"""The ops of one CUDA rank: which kernels compute each op, in which form, on which memory.

Every step is a captured graph, one per bucket of tokens and form of attention; what changes from
step to step (tokens, positions, wanted rows) lies in fixed device buffers. Knows no CuPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlacli.attention_forms import AttentionForm
from mlacli.backends import cuda_plain as plain
from mlacli.backends import cuda_weights
from mlacli.backends.cuda_acts import Act, Chosen
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_device import Device, Host
from mlacli.backends.cuda_weights import CudaWeight
from mlacli.ops import LayerCache, LayerWeights, Ops, Step
from mlacli.parallel.comm import Comm
from mlacli.params import ContextParams

if TYPE_CHECKING:
    from mlacli.models.indexer import Indexer
    from mlacli.models.parts import Routing
    from mlacli.parallel.shards import Shard

_CACHE_TYPES = {"f32": ("float", np.float32), "f16": ("__half", np.float16),
                "bf16": ("__nv_bfloat16", np.uint16)}  # fmt: skip
_SPLITS = 32  # ranges of the cache that one head's decode attention is cut into
FEW = 8  # tokens that decode's products take in one pass


@dataclass(slots=True)
class _Graph:
    """A captured step: run it, where it leaves its logits, and its attention forms."""

    replay: Callable[[], None]
    logits: Array | None
    forms: set[AttentionForm]


class CudaOps(Ops):
    """Ops on `device`, whose arena holds all their memory."""

    def __init__(self, comm: Comm, context: ContextParams, device: Device) -> None:
        self.comm, self.context, self.device, self.forms = comm, context, device, set()
        self._half = int(context.graph_attn_precision == "f16")
        self._inputs: Any = None  # tokens, positions and wanted rows of a step
        self._frequencies: Any = None
        self._base = 0  # where scratch begins
        self._layer = 0  # where a half layer's temporaries begin
        self._pos: Any = None  # of the step under way
        self._graphs: dict[tuple[int, ...], _Graph] = {}

    # ---- steps ------------------------------------------------------------------------------

    def execute(
        self, tokens: Sequence[int], n_past: int, frequencies: Sequence[float],
        out_rows: Sequence[int], forward: Callable[[Step], Act | None], capture: bool = True,
    ) -> Host | None:  # fmt: skip
        n, most = len(tokens), self.context.n_ubatch
        if self._inputs is None:
            self._frequencies = self.put(np.array(frequencies))
            self._inputs = self.device.take((3 * most,), np.int32)
            self._base = self.device.mark()
        bucket = _bucket(n, most)
        inputs = np.zeros((3, bucket), np.int32)
        inputs[0, :n], inputs[1] = tokens, -1
        inputs[1, :n], inputs[2, : len(out_rows)] = range(n_past, n_past + n), out_rows
        self.device.copy_in(self._inputs[: 3 * bucket].reshape(3, bucket), inputs)

        def launches() -> Array | None:
            self.device.rewind(self._base)
            logits = forward(self._step(bucket, n_past + n, len(out_rows)))
            return None if logits is None else self.f32(logits)

        if not capture:
            return self._host_or_none(launches())
        key = (bucket, len(out_rows))
        if key not in self._graphs:
            self._graphs[key] = self._capture(launches)
        graph = self._graphs[key]
        graph.replay()
        self.forms |= graph.forms
        return self._host_or_none(graph.logits)

    def _capture(self, launches: Callable[[], Array | None]) -> _Graph:
        with self.device.prepared():
            launches()
        launches()  # outside of the capture first: whatever fails, fails here
        logits: list[Array | None] = []
        replay = self.device.capture(lambda: logits.append(launches()))
        return _Graph(replay, logits[0], set(self.forms))

    def _host_or_none(self, logits: Array | None) -> Host | None:
        if logits is None:
            self.device.synchronize()
            return None
        return self.device.get(logits)

    def _step(self, n: int, n_kv: int, n_out: int) -> Step:
        """The step in the input buffers, padded to `n` tokens."""
        tokens, self._pos, wanted = (
            self._inputs[0, :n],
            self._inputs[1, :n],
            self._inputs[2, :n_out],
        )
        half = len(self._frequencies)
        cos, sin = self.new((n, half)), self.new((n, half))
        block = min(512, half)
        self.run("rope_table_f32", (n,), block, cos, sin, self._pos, self._frequencies, half)
        return Step(tokens, self._pos, cos, sin, n, n_kv, wanted)

    def host(self, x: Act) -> Host:
        return self.device.get(self.f32(x))

    # ---- weights and cache ------------------------------------------------------------------

    def begin_upload(self, shards: Sequence[Shard]) -> None:
        cuda_weights.begin(self.device, shards)

    def upload(self, pieces: Any, shard: Shard) -> CudaWeight:
        return cuda_weights.upload(self.device, pieces, shard, tiled=False)

    def end_upload(self) -> None:
        self.device.end_sends()

    def download(self, w: CudaWeight) -> Any:
        return cuda_weights.download(self.device, w)

    def new_rows(self, n_ctx: int, width: int, cache_type: str, transposed: bool = False) -> Array:
        assert not transposed, "-fa off is refused on GPUs"
        return self.device.take((n_ctx, width), _CACHE_TYPES[cache_type][1])

    # ---- the residual stream ----------------------------------------------------------------

    def embed(self, tokens: Array, w: CudaWeight) -> Act:
        n, d = len(tokens), w.shape[1]
        residual = self.new((n, d))
        self._layer = self.device.mark()
        self.run("embed_f32", (n,), 128, residual, tokens, w.raw, d, w.row_bytes, WTYPE=w.qtype.id)
        return Act((n, d), residual)

    def rms_norm(self, x: Act, w: CudaWeight, eps: float) -> Act:
        return Act(x.shape, normed=(self.f32(x), w.raw, eps))

    def reduce_add_norm(
        self, partial: Act | None, residual: Act, norm: CudaWeight | None, eps: float
    ) -> tuple[Act, Act]:
        stream = self.f32(residual)
        if partial is not None and partial.run is not None:
            partial.run(stream)
        elif partial is not None:
            plain.add(self, stream, self.f32(partial), into=stream)
        self.device.rewind(self._layer)  # the next half layer reuses this one's temporaries
        residual = Act(residual.shape, stream)
        return residual, residual if norm is None else self.rms_norm(residual, norm, eps)

    def rows(self, x: Act, wanted: Any) -> Act:
        assert x.normed is not None, "the last norm is taken of the wanted rows alone"
        stream, weight, eps = x.normed
        y = self.new((len(wanted), x.shape[1]))
        if len(wanted):
            self.run("rows_f32", (len(wanted),), 256, y, stream, wanted, x.shape[1])
        return Act(y.shape, normed=(y, weight, eps))

    def logits(self, x: Act, output: CudaWeight | None) -> Act:
        assert output is not None, "several GPUs are refused"
        return self.matmul(x, output)

    # ---- products ---------------------------------------------------------------------------

    def matmul(self, x: Act, w: CudaWeight) -> Act:
        """Pending: it may yet add into the residual stream."""

        def run(into: Array | None) -> Array:
            y = plain.product(self, self.f32(x), w)
            return y if into is None else plain.add(self, into, y, into=into)

        return Act((len(x), w.shape[0]), run=run)

    def project(self, x: Act, q: CudaWeight, kv_a: CudaWeight, r: int) -> tuple[Act, Act, Act]:
        kv = plain.product(self, self.f32(x), kv_a)
        return self.matmul(x, q), _held(kv[:, :r]), _held(kv[:, r:])

    def gated(self, x: Act, gate: CudaWeight, up: CudaWeight) -> Act:
        both = [plain.product(self, self.f32(x), w) for w in (gate, up)]
        return _held(plain.silu_mul(self, *both))

    # ---- attention --------------------------------------------------------------------------

    def latent_attention(
        self, q: Act, c_kv: Act, k_pe: Act, w: LayerWeights, kv: LayerCache, step: Step, hp: Any,
        chosen: Any = None,
    ) -> Act:  # fmt: skip
        self.forms.add(AttentionForm("absorbed", True))
        normed = plain.rms_norm(self, self.f32(c_kv), w.attn_kv_a_norm.raw, hp.eps)
        self.run(
            "store", (step.n,), 256, kv.rows, normed, self._rotated(self.f32(k_pe), step), step.pos,
            hp.r, hp.p, CACHE=self._cached,
        )  # fmt: skip
        queries = self.f32(q)
        if hp.temperature is not None:
            plain_q, queries = queries, self.new(queries.shape)
            self.run(
                "temper_f32", (step.n,), 256, queries, plain_q, step.pos, queries.shape[1],
                hp.temperature.length, hp.temperature.scale,
            )  # fmt: skip
        queries = queries.reshape(step.n, -1, hp.k + hp.p)
        q_lat = plain.heads(self, queries[..., : hp.k], w.attn_k_b)
        q_pe = self._rotated(queries[..., hp.k :], step)
        n, h, _ = q_pe.shape
        splits = max(1, min(_SPLITS, -(-256 // (n * h))))
        part, o = self.new((n, h, splits, hp.r + 2)), self.new((n, h, hp.r))
        self.run(
            "mla_decode_split", (splits, h, n), 256, part, q_lat, q_pe, kv.rows, step.pos,
            hp.softmax_scale, R=hp.r, P=hp.p, CACHE=self._cached, HALF=self._half,
        )  # fmt: skip
        self.run("mla_combine_f32", (n * h,), 256, o, part, splits, hp.r)
        return _held(plain.heads(self, o, w.attn_v_b).reshape(n, -1))

    def choose_rows(
        self, x: Act, q_a: Act, w: LayerWeights, rows: Any, step: Step, indexer: Indexer
    ) -> Any:
        raise AssertionError("prepare.py refuses sparse attention on GPUs")

    def _rotated(self, x: Array, step: Step) -> Array:
        """x [n, p] or [n, h, p] with pairs (2i, 2i+1) rotated."""
        heads, half = x.shape[1] if x.ndim == 3 else 1, x.shape[-1] // 2
        y = self.new(x.shape)
        self.run(
            "rope_f32", (step.n, heads), 32, y, x, step.cos, step.sin, half, x.stride(0),
            x.stride(1) if x.ndim == 3 else 0,
        )  # fmt: skip
        return y

    @property
    def _cached(self) -> str:
        return _CACHE_TYPES[self.context.cache_type_k][0]

    # ---- routed experts ---------------------------------------------------------------------

    def route(self, x: Act, gate: CudaWeight, bias: CudaWeight | None, routing: Routing) -> Chosen:
        return plain.route(self, plain.product(self, self.f32(x), gate), bias, routing, self._pos)

    def experts(self, x: Act, chosen: Chosen | None, w: LayerWeights) -> Act | None:
        y = None
        if chosen is not None:
            merged = w.ffn_gate_up_exps
            gate, up = (w.ffn_gate_exps, w.ffn_up_exps) if merged is None else (merged, None)
            h = plain.experts_up(self, self.f32(x), chosen, gate, up)
            y = plain.experts_down(self, h, chosen, w.ffn_down_exps)
        if w.ffn_down_shexp is not None:
            h = self.f32(self.gated(x, w.ffn_gate_shexp, w.ffn_up_shexp))
            shared = plain.product(self, h, w.ffn_down_shexp)
            y = shared if y is None else plain.add(self, y, shared)
        return None if y is None else _held(y)

    # ---- plumbing ---------------------------------------------------------------------------

    @property
    def n_sm(self) -> int:
        return self.device.n_sm

    @property
    def capability(self) -> int:
        return self.device.capability

    def f32(self, x: Act) -> Array:
        """The float32 values of `x`, computed now if nobody asked before."""
        if x.f32 is None:
            if x.run is not None:
                x.f32, x.run = x.run(None), None
            else:
                assert x.normed is not None
                x.f32 = plain.rms_norm(self, *x.normed)
        return x.f32

    def new(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """Scratch until the end of the half layer; its content is whatever was there."""
        return self.device.take(shape, dtype)

    def put(self, host: Host) -> Array:
        """A device copy that stays where it is until the arena is rewound."""
        device = self.device.take(host.shape, host.dtype)
        self.device.copy_in(device, host)
        return device

    def run(self, name: str, grid: tuple[int, ...], block: int, *args: Any, **how: Any) -> None:
        self.device.launch(name, grid, block, *args, **how)


def _held(array: Array) -> Act:
    return Act(array.shape, array)


def _bucket(n: int, most: int) -> int:
    """The number of tokens that a step of `n` is padded to, so that few graphs serve all."""
    if n <= FEW:
        return n
    size = 16
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return min(size, most)
