"""The ops of one CUDA rank: shape check, pick kernel, launch. Float32 arithmetic throughout.

A decode step is captured into a CUDA graph once and replayed: tokens, positions and wanted rows
live in fixed device buffers, every other address comes from the arena.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cupy as cp
import numpy as np
from numpy.typing import NDArray

from mlacli.attention_forms import AttentionForm
from mlacli.backends.cuda_arena import Arena
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_kernels import Kernels
from mlacli.loading.quant_types import QType
from mlacli.ops import LayerCache, LayerWeights, Ops, Step
from mlacli.parallel.comm import Comm
from mlacli.params import ContextParams

if TYPE_CHECKING:
    from mlacli.models.parts import Routing, Temperature
    from mlacli.parallel.plan import RankPlan
    from mlacli.parallel.shards import Shard

Host = NDArray[Any]
_CACHE_TYPES = {"f32": ("float", np.float32), "f16": ("__half", np.float16),
                "bf16": ("__nv_bfloat16", np.uint16)}  # fmt: skip
_SPLITS = 32  # ranges of the cache that one head's decode attention is cut into
_COLS = 8  # tokens that one pass over a weight row serves
_MOST_SHARED = 96 << 10  # bytes of shared memory that a CTA may take; two fit an SM


@dataclass(frozen=True, slots=True, eq=False)
class CudaWeight:
    """GGUF bytes on the device [*leading, row bytes] of a shard of local `shape`."""

    name: str
    shape: tuple[int, ...]
    qtype: QType
    raw: Array
    skip: int = 0
    first: int = 0

    @property
    def row_bytes(self) -> int:
        return int(self.raw.shape[-1])


@dataclass(frozen=True, slots=True)
class Chosen:
    """Expert ids (int32) and weights [n, n_used] on the device."""

    ids: Array
    weights: Array


class CudaOps(Ops):
    """Ops on the current CUDA device; all its memory is `arena`."""

    def __init__(self, comm: Comm, context: ContextParams, plan: RankPlan, n_shards: int) -> None:
        self.comm, self.context, self.forms = comm, context, set()
        self.stream = cp.cuda.Stream(non_blocking=True)
        self.kernels = Kernels(self.stream)
        padding = 256 * (n_shards + 1024)
        self.arena = Arena(plan.device, plan.weights + plan.cache + plan.scratch + padding)
        self._half = int(context.graph_attn_precision == "f16")
        self._inputs: Any = None  # token, position and wanted row of a one-token step
        self._frequencies: Any = None
        self._base = 0  # where scratch begins
        self._layer = 0  # where a half layer's temporaries begin
        self._x: Any = None
        self._shapes: set[tuple[int, int]] = set()  # tokens and wanted rows whose kernels are there
        self._graphs: dict[int, tuple[Any, Array | None, set[AttentionForm]]] = {}

    # ---- steps ------------------------------------------------------------------------------

    def execute(
        self, tokens: Sequence[int], n_past: int, frequencies: Sequence[float],
        out_rows: Sequence[int], forward: Callable[[Step], Array | None],
    ) -> Host | None:  # fmt: skip
        with self.stream:
            if self._inputs is None:
                self._frequencies = self.put(np.array(frequencies))
                self._inputs = self.arena.take((3,), np.int32)
                self._base = self.arena.mark()
            if len(tokens) > 1:
                if (len(tokens), len(out_rows)) not in self._shapes:
                    self._shapes.add((len(tokens), len(out_rows)))
                    with self.kernels.prepared():
                        self._many(tokens, n_past, frequencies, out_rows, forward)
                logits = self._many(tokens, n_past, frequencies, out_rows, forward)
                return None if logits is None else self.get(logits)
            self.copy_in(self._inputs, np.array([tokens[0], n_past, 0], np.int32))
            if len(out_rows) not in self._graphs:
                self._graphs[len(out_rows)] = self._capture(n_past, len(out_rows), forward)
            graph, logits, forms = self._graphs[len(out_rows)]
            graph.launch(self.stream)
            self.forms |= forms
            return None if logits is None else self.get(logits)

    def _many(
        self, tokens: Sequence[int], n_past: int, frequencies: Sequence[float],
        out_rows: Sequence[int], forward: Callable[[Step], Array | None],
    ) -> Array | None:  # fmt: skip
        self.arena.rewind(self._base)
        return forward(self.step(tokens, n_past, frequencies, out_rows))

    def _capture(
        self, n_past: int, n_out: int, forward: Callable[[Step], Array | None]
    ) -> tuple[Any, Array | None, set[AttentionForm]]:
        """The graph of a one-token step, where it leaves its logits, and its attention forms."""

        def once() -> Array | None:
            self.arena.rewind(self._base)
            tokens, pos, wanted = (self._inputs[i : i + 1] for i in range(3))
            return forward(self._rotated(tokens, pos, 1, n_past + 1, wanted[:n_out]))

        with self.kernels.prepared():
            once()
        once()  # outside of the capture first: whatever fails, fails here
        self.stream.synchronize()
        self.stream.begin_capture()
        logits = once()
        return self.stream.end_capture(), logits, set(self.forms)

    def get(self, array: Array) -> Host:
        """A host copy, once everything launched before is done."""
        host = np.empty(array.shape, array.dtype)
        _copy(host.ctypes.data, array.ptr, array.nbytes, self.stream.ptr)
        self.stream.synchronize()
        return host

    def copy_in(self, array: Array, host: Host) -> None:
        """Fill `array` from `host`, which the caller may change once this returns."""
        host = np.ascontiguousarray(host)
        assert host.nbytes == array.nbytes, "a copy changes no sizes"
        if host.nbytes:
            _copy(array.ptr, host.ctypes.data, host.nbytes, self.stream.ptr)
            self.stream.synchronize()

    def step(
        self, tokens: Sequence[int], n_past: int, frequencies: Sequence[float],
        out_rows: Sequence[int],
    ) -> Step:  # fmt: skip
        n = len(tokens)
        at = np.arange(n_past, n_past + n)
        token_ids, pos, wanted = (self.put(np.asarray(a, np.int32)) for a in
                                  (tokens, at, list(out_rows)))  # fmt: skip
        return self._rotated(token_ids, pos, n, n_past + n, wanted)

    def _rotated(self, tokens: Array, pos: Array, n: int, n_kv: int, wanted: Any) -> Step:
        half = len(self._frequencies)
        cos, sin = self.new((n, half)), self.new((n, half))
        block = min(512, half)
        self.run("rope_table_f32", (n,), block, cos, sin, pos, self._frequencies, half)
        return Step(tokens, pos, cos, sin, n, n_kv, wanted)

    # ---- weights and cache ------------------------------------------------------------------

    def upload(self, pieces: Any, shard: Shard) -> CudaWeight:
        by_column = shard.axis == len(shard.shape) - 1
        return CudaWeight(
            shard.tensor, shard.shape, shard.qtype, self.put(pieces),
            skip=shard.start % shard.qtype.block if by_column else 0,
            first=shard.start if shard.axis == 0 else 0,
        )  # fmt: skip

    def download(self, w: CudaWeight) -> Any:
        return self.get(w.raw)

    def new_rows(self, n_ctx: int, width: int, cache_type: str, transposed: bool = False) -> Array:
        assert not transposed, "-fa off is refused on GPUs"
        return self.arena.take((n_ctx, width), _CACHE_TYPES[cache_type][1])

    # ---- products ---------------------------------------------------------------------------

    def embed(self, tokens: Array, w: CudaWeight) -> Array:
        n, d = len(tokens), w.shape[1]
        residual, self._x = self.new((n, d)), self.new((n, d))
        self._layer = self.arena.mark()
        self.run("embed_f32", (n,), 128, residual, tokens, w.raw, d, w.row_bytes, **_typed(w))
        return residual

    def matmul(self, x: Array, w: CudaWeight) -> Array:
        y = self.new((len(x), w.shape[0]))
        self._matmul(y, w, x, 1, w.shape[0])
        return y

    def heads_up(self, x: Array, w: CudaWeight) -> Array:
        h, out, _ = w.shape
        y = self.new((len(x), h, out))
        self._matmul(y, w, x, h, out)
        return y

    def _matmul(self, y: Array, w: CudaWeight, x: Array, batches: int, out: int) -> None:
        n, shared = len(x), _staged(w.shape[-1])
        if n == 0:  # a ubatch whose logits nobody wants
            return
        args = (
            y, w.raw, x, n, out, w.shape[-1], w.skip, w.row_bytes, x.stride(0), y.stride(0),
            out * w.row_bytes, x.stride(1) if batches > 1 else 0, out,
        )  # fmt: skip
        if n <= 2 and shared <= _MOST_SHARED:
            rows = 2 if out * batches >= 4096 else 1
            grid = (-(-out // (8 * rows)), n, batches)
            self.run("matmul_vec_f32", grid, 256, *args, shared=shared, ROWS=rows, **_typed(w))
        else:
            grid = (-(-out // 8), -(-n // _COLS), batches)
            shared = _COLS * _staged(1024)
            self.run("matmul_f32", grid, 256, *args, shared=shared, COLS=_COLS, **_typed(w))

    # ---- element-wise -----------------------------------------------------------------------

    def rms_norm(self, x: Array, w: CudaWeight, eps: float) -> Array:
        n, d = x.shape
        y = self.new((n, d))
        self.run("rms_norm_f32", (n,), 256, y, x, w.raw, d, x.stride(0), eps)
        return y

    def reduce_add_norm(
        self, partial: Array | None, residual: Array, norm: CudaWeight | None, eps: float
    ) -> tuple[Array, Array]:
        n, d = residual.shape
        whole = self.comm.all_reduce(partial)
        weight = None if norm is None else norm.raw
        self.run("add_rms_norm_f32", (n,), 256, residual, self._x, whole, weight, d, eps)
        self.arena.rewind(self._layer)  # the next half layer reuses this one's temporaries
        return residual, self._x

    def rope(self, x: Array, step: Step) -> Array:
        heads, half = x.shape[1] if x.ndim == 3 else 1, x.shape[-1] // 2
        y = self.new(x.shape)
        self.run(
            "rope_f32", (step.n, heads), 32, y, x, step.cos, step.sin, half, x.stride(0),
            x.stride(1) if x.ndim == 3 else 0,
        )  # fmt: skip
        return y

    def temper(self, q: Array, temperature: Temperature, step: Step) -> Array:
        y = self.new(q.shape)
        self.run(
            "temper_f32", (step.n,), 256, y, q, step.pos, q.shape[1], temperature.length,
            temperature.scale,
        )  # fmt: skip
        return y

    def silu_mul(self, gate: Array, up: Array) -> Array:
        y = self.new(gate.shape)
        self.run("silu_mul_f32", (-(-y.size // 256),), 256, y, gate, up, y.size)
        return y

    def add(self, a: Array, b: Array) -> Array:
        y = self.new(a.shape)
        self.run("add_f32", (-(-y.size // 256),), 256, y, a, b, y.size)
        return y

    def columns(self, x: Array, start: int, stop: int) -> Array:
        return x[..., start:stop]

    def rows(self, x: Array, wanted: Any) -> Array:
        y = self.new((len(wanted), x.shape[1]))
        if len(wanted):
            self.run("rows_f32", (len(wanted),), 256, y, x, wanted, x.shape[1])
        return y

    # ---- attention --------------------------------------------------------------------------

    def store(self, rows: Array, c_kv: Array, k_pe: Array, step: Step) -> None:
        r, p = c_kv.shape[1], k_pe.shape[1]
        self.run("store", (step.n,), 256, rows, c_kv, k_pe, step.pos, r, p, CACHE=self._cached)

    def split_heads(self, q: Array, k: int, p: int) -> tuple[Array, Array]:
        q = q.reshape(len(q), -1, k + p)
        return q[..., :k], q[..., k:]

    def attend_absorbed(
        self, q_lat: Array, q_pe: Array, kv: LayerCache, r: int, step: Step, scale: float,
        blockwise: bool,
    ) -> Array:  # fmt: skip
        assert blockwise, "whole score matrices are refused on GPUs"
        self.forms.add(AttentionForm("absorbed", True))
        n, h, p = q_pe.shape
        splits = max(1, min(_SPLITS, -(-256 // (n * h))))
        part, o = self.new((n, h, splits, r + 2)), self.new((n, h, r))
        self.run(
            "mla_decode_split", (splits, h, n), 256, part, q_lat, q_pe, kv.rows, step.pos, scale,
            R=r, P=p, CACHE=self._cached, HALF=self._half,
        )  # fmt: skip
        self.run("mla_combine_f32", (n * h,), 256, o, part, splits, r)
        return o

    @property
    def _cached(self) -> str:
        return _CACHE_TYPES[self.context.cache_type_k][0]

    # ---- routed experts ---------------------------------------------------------------------

    def route(
        self, x: Array, gate: CudaWeight, bias: CudaWeight | None, routing: Routing
    ) -> Chosen:
        n = len(x)
        scores = self.matmul(x, gate)
        chosen = Chosen(self.new((n, routing.n_used), np.int32), self.new((n, routing.n_used)))
        self.run(
            "route_f32", (n,), 32, chosen.ids, chosen.weights, scores,
            None if bias is None else bias.raw, gate.shape[0], routing.n_used, routing.n_groups,
            routing.n_groups_used, routing.sigmoid, routing.renormalise, routing.scale,
        )  # fmt: skip
        return chosen

    def moe_up(self, x: Array, chosen: Chosen, w: LayerWeights) -> Array:
        (n, n_used), merged = chosen.ids.shape, w.ffn_gate_up_exps
        gate = merged if merged is not None else w.ffn_gate_exps
        held, f, d = gate.shape
        expert_bytes, up, up_raw = f * gate.row_bytes, w.ffn_up_exps, None
        if merged is not None:
            f, up = f // 2, merged
            up_raw = merged.raw.reshape(-1)[f * merged.row_bytes :]
        h = self.new((n, n_used, f))
        self.run(
            "experts_up_f32", (-(-f // 8), n * n_used), 256, h, gate.raw,
            up.raw if up_raw is None else up_raw, x, chosen.ids, n_used, f, d, gate.first, held,
            gate.row_bytes, up.row_bytes, expert_bytes, expert_bytes // gate.row_bytes
            * up.row_bytes, shared=_staged(d), WTYPE=gate.qtype.id, WTYPE_UP=up.qtype.id,
        )  # fmt: skip
        return h

    def moe_down(self, h: Array, chosen: Chosen, w: LayerWeights) -> Array:
        down: CudaWeight = w.ffn_down_exps
        (n, n_used), (held, d, f) = chosen.ids.shape, down.shape
        y = self.new((n, d))
        self.run(
            "experts_down_f32", (-(-d // 8), n), 256, y, down.raw, h, chosen.ids, chosen.weights,
            n_used, f, d, down.first, held, down.skip, down.row_bytes, d * down.row_bytes,
            shared=n_used * _staged(f), WTYPE=down.qtype.id, WTYPE_UP=down.qtype.id,
        )  # fmt: skip
        return y

    # ---- plumbing ---------------------------------------------------------------------------

    def new(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """Scratch until the end of the half layer; its content is whatever was there."""
        return self.arena.take(shape, dtype)

    def put(self, host: Host) -> Array:
        """A device copy that stays where it is until the arena is rewound."""
        device = self.arena.take(host.shape, host.dtype)
        self.copy_in(device, host)
        return device

    def run(self, name: str, grid: tuple[int, ...], block: int, *args: Any, **defines: Any) -> None:
        self.kernels.launch(name, grid, block, *args, **defines)


def _typed(w: CudaWeight) -> dict[str, int]:
    return {"WTYPE": w.qtype.id}


def _staged(n: int) -> int:
    """Shared bytes of a staged vector of n floats (kernels/include/staged.cuh)."""
    return 4 * 36 * -(-n // 32)


def _copy(target: int, source: int, nbytes: int, stream: int) -> None:
    cp.cuda.runtime.memcpyAsync(target, source, nbytes, cp.cuda.runtime.memcpyDefault, stream)
