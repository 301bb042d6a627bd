"""Products, norms and routing in float32 on GGUF bytes: any type, any GPU, any number of tokens.

The definition's arithmetic on the device. Weights that are repacked take cuda_matvec and cuda_gemm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mlacli.backends.cuda_acts import Chosen
from mlacli.backends.cuda_array import Array

if TYPE_CHECKING:
    from mlacli.backends.cuda_ops import CudaOps
    from mlacli.backends.cuda_weights import CudaWeight
    from mlacli.models.parts import Routing

_COLS = 8  # tokens that one pass over a weight row serves
_MOST_SHARED = 96 << 10  # bytes of shared memory that a CTA may take; two fit an SM


def product(ops: CudaOps, x: Array, w: CudaWeight, out: Array, add_: bool = False) -> None:
    """out [n, rows] = x w^T, or added to it."""
    _launch(ops, out, w, x, 1, w.shape[0], add_)


def heads(ops: CudaOps, x: Array, w: CudaWeight, y: Array) -> None:
    """y [n, h, out] = per head x[:, h] w[h]^T; x may be strided."""
    _launch(ops, y, w, x, w.shape[0], w.shape[1])


def _launch(
    ops: CudaOps, y: Array, w: CudaWeight, x: Array, batches: int, out: int, add_: bool = False
) -> None:
    n, shared = len(x), _staged(w.shape[-1])
    if n == 0:  # a ubatch whose logits nobody wants
        return
    args = (
        y, w.raw, x, n, out, w.shape[-1], w.skip, w.row_bytes, x.stride(0), y.stride(0),
        out * w.row_bytes, x.stride(1) if batches > 1 else 0, out, add_,
    )  # fmt: skip
    if n <= 2 and shared <= _MOST_SHARED:
        rows = 2 if out * batches >= 4096 else 1
        grid = (-(-out // (8 * rows)), n, batches)
        ops.run("matmul_vec_f32", grid, 256, *args, shared=shared, ROWS=rows, **_typed(w))
    else:
        grid = (-(-out // 8), -(-n // _COLS), batches)
        shared = _COLS * _staged(1024)
        ops.run("matmul_f32", grid, 256, *args, shared=shared, COLS=_COLS, **_typed(w))


def rms_norm(ops: CudaOps, x: Array, weight: Array, eps: float) -> Array:
    n, d = x.shape
    y = ops.new((n, d))
    if n:  # no rows of a ubatch whose logits nobody wants
        ops.run("rms_norm_f32", (n,), 256, y, x, weight, d, x.stride(0), eps)
    return y


def silu_mul(ops: CudaOps, gate: Array, up: Array) -> Array:
    y = ops.new(gate.shape)
    ops.run("silu_mul_f32", (-(-y.size // 256),), 256, y, gate, up, y.size)
    return y


def add(ops: CudaOps, a: Array, b: Array, into: Array | None = None) -> Array:
    y = ops.new(a.shape) if into is None else into
    ops.run("add_f32", (-(-y.size // 256),), 256, y, a, b, y.size)
    return y


def route(
    ops: CudaOps, scores: Array, bias: CudaWeight | None, routing: Routing, pos: Array,
    imposed: Array | None = None,
) -> Chosen:  # fmt: skip
    """The choice from gate scores [n, E]; tokens at pos -1 choose nobody.

    `imposed` ids [n, n_used] are taken instead (a test hook).
    """
    n, n_experts = scores.shape
    chosen = Chosen(ops.new((n, routing.n_used), np.int32), ops.new((n, routing.n_used)))
    ops.run(
        "route_f32", (n,), 32, chosen.ids, chosen.weights, scores,
        None if bias is None else bias.raw, pos, imposed, n_experts, routing.n_used,
        routing.n_groups, routing.n_groups_used, routing.sigmoid, routing.renormalise,
        routing.scale,
    )  # fmt: skip
    return chosen


def experts_up(
    ops: CudaOps, x: Array, chosen: Chosen, gate: CudaWeight, up: CudaWeight | None, h: Array
) -> None:
    """h [n, n_used, f] = silu(gate_e x) * up_e x of chosen experts; up None: gate holds both."""
    n, n_used = chosen.ids.shape
    held, f, d = gate.shape
    expert_bytes, up_raw = f * gate.row_bytes, None
    if up is None:
        f, up = f // 2, gate
        up_raw = gate.raw.reshape(-1)[f * gate.row_bytes :]
    ops.run(
        "experts_up_f32", (-(-f // 8), n * n_used), 256, h, gate.raw,
        up.raw if up_raw is None else up_raw, x, chosen.ids, n_used, f, d, gate.first, held,
        gate.row_bytes, up.row_bytes, expert_bytes, expert_bytes // gate.row_bytes * up.row_bytes,
        shared=_staged(d), WTYPE=gate.qtype.id, WTYPE_UP=up.qtype.id,
    )  # fmt: skip


def experts_down(
    ops: CudaOps, h: Array, chosen: Chosen, down: CudaWeight, out: Array, add_: bool
) -> None:
    """out [n, d] = weighted sum over chosen experts held here, or added to it."""
    (n, n_used), (held, d, f) = chosen.ids.shape, down.shape
    ops.run(
        "experts_down_f32", (-(-d // 8), n), 256, out, down.raw, h, chosen.ids, chosen.weights,
        n_used, f, d, down.first, held, down.skip, down.row_bytes, d * down.row_bytes, add_,
        shared=n_used * _staged(f), WTYPE=down.qtype.id, WTYPE_UP=down.qtype.id,
    )  # fmt: skip


def _typed(w: CudaWeight) -> dict[str, Any]:
    return {"WTYPE": w.qtype.id}


def _staged(n: int) -> int:
    """Shared bytes of a staged vector of n floats (kernels/include/staged.cuh)."""
    return 4 * 36 * -(-n // 32)
