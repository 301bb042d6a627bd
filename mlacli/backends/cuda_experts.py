"""Routed and shared experts of a layer: which kernels take them, and in which order.

Few tokens take both in one pair of launches where all lie in tiles on the device. Else the shared
ones follow the routed ones, which come as they lie: in tiles, as GGUF bytes, or in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mlacli.backends import cuda_gemm as gemm
from mlacli.backends import cuda_matvec as matvec
from mlacli.backends import cuda_raw as raw
from mlacli.backends.cuda_acts import Act, Chosen
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_group import Mail
from mlacli.backends.cuda_host_experts import Routed
from mlacli.ops import LayerWeights
from mlacli.parallel.cuda_sizes import FEW

if TYPE_CHECKING:
    from mlacli.backends.cuda_ops import CudaOps


Sender = Callable[[Mail], None]


def sender(ops: CudaOps, x: Act, chosen: Chosen | None, w: LayerWeights) -> Sender | None:
    """Sends routed and shared experts of one token; None where no single launch ends them."""
    merged, down, n = w.ffn_gate_up_exps, w.ffn_down_exps, len(x)
    gate, up = (w.ffn_gate_exps, w.ffn_up_exps) if merged is None else (merged, None)
    shared = (w.ffn_gate_shexp, w.ffn_up_shexp, w.ffn_down_shexp)
    if chosen is None or not matvec.sends(n, gate, up, down, *shared):
        return None
    if ops.host_experts.are_fetched(n, (gate, up, down)):
        return None
    routed, both = (gate, up, down), None if w.ffn_down_shexp is None else shared

    def launch(mail: Mail) -> None:
        _few(ops, x, chosen, routed, both, mail, False)

    return launch


def experts(
    ops: CudaOps, x: Act, chosen: Chosen | None, w: LayerWeights, y: Array, add: bool
) -> None:
    """y [n, d] (+)= routed and shared experts."""
    merged, down, n = w.ffn_gate_up_exps, w.ffn_down_exps, len(x)
    gate, up = (w.ffn_gate_exps, w.ffn_up_exps) if merged is None else (merged, None)
    shared = (w.ffn_gate_shexp, w.ffn_up_shexp, w.ffn_down_shexp)
    fetched = chosen is not None and ops.host_experts.are_fetched(n, (gate, up, down))
    beside = n <= FEW and not fetched and chosen is not None and w.ffn_down_shexp is not None
    beside = beside and matvec.takes(gate, up, down, *shared)
    late = w.ffn_down_shexp is not None and not beside  # shared ones follow
    if fetched or (late and (n <= FEW or not matvec.takes(*shared))):
        ops.f32(x)  # before y, which may be the stream that its norm would be taken of
    if chosen is not None and ops.host_experts.arrive(n, (gate, up, down)):
        ops.host_experts.many(x, chosen, (gate, up, down), y, add)
    elif chosen is not None and fetched:
        if not add:
            ops.device.copy_in(y, np.zeros(y.shape, np.float32))
        for here, weights in ops.host_experts.fetched(chosen, (gate, up, down)):
            _readable(ops, x, here, weights, None, y, True)
    elif chosen is not None:
        both = shared if beside else None
        _readable(ops, x, chosen, (gate, up, down), both, y, add)
    if late:
        gated = ops.gated(x, *shared[:2])
        ops.products(gated, [(w.ffn_down_shexp, y)], add=add or chosen is not None)


def _readable(
    ops: CudaOps, x: Act, chosen: Chosen, routed: Routed, shared: Routed | None, y: Array,
    add: bool,
) -> None:  # fmt: skip
    """y [n, d] (+)= routed experts that kernels can read; few tokens may take shared ones."""
    gate, up, down = routed
    if not matvec.takes(gate, up, down):
        raw.experts(ops, x, chosen, gate, up, down, y, add)
    elif len(x) > FEW:
        gemm.experts(ops, ops.f16(x), chosen, gate, up, down, y, add)
    else:
        _few(ops, x, chosen, routed, shared, y, add)


def _few(
    ops: CudaOps, x: Act, chosen: Chosen, routed: Routed, shared: Routed | None,
    y: Array | Mail, add: bool,
) -> None:  # fmt: skip
    (gate, up, down), (n, n_used) = routed, chosen.ids.shape
    width = n_used * down.shape[2] + (0 if shared is None else shared[0].shape[0])
    h = ops.new((n, width))
    values, norm = ops.unnormed(x)
    first = None if shared is None else shared[:2]
    matvec.experts_up(ops, h, chosen.ids, values, gate, up, first, norm)
    last = None if shared is None else shared[2]
    matvec.experts_down(ops, y, h, chosen.ids, chosen.weights, down, last, add=add, after_up=True)
