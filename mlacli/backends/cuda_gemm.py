"""Products of tiled weights with many tokens (prefill), and what goes with them.

Activations are float16 of value / 16, in rows that begin at multiples of 8 (`rows16`). Sums are
float32. Each function launches kernels and returns; counts stay on the device.
- rows16: memory for them; to16, to32: float32 rows as such and back
- norm16: a norm as float32 and float16
- products: up to three weights with one input, stored, or added to float32 rows
- heads: one product per head; gated: SwiGLU; route_scores: the router's product
- sort, experts: routed experts, grouped by expert
- _form: how a dense product's work is cut, among few CTAs or, of few tokens, clusters of them
- fits: whether a weight's type and the device allow it; else use the plain kernels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlacli.backends.cuda_array import Array
from mlacli.parallel.cuda_sizes import slot_tile

if TYPE_CHECKING:
    from mlacli.backends.cuda_acts import Chosen
    from mlacli.backends.cuda_weights import CudaWeight

_THREADS = 256
_ROWS = 256  # weight rows of a work item; half of them when gated
_WIDTHS = (32, 64, 96, 128)  # tokens of a work item
_LEAST_STAGES, _MOST_STAGES = 2, 8
_STAGES_OF_TWO = 4  # that each of two CTAs of an SM needs
# Bytes of shared memory that a CTA may have, by compute capability.
_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
_STORE, _ADD, _HALF = range(3)  # OUT of gemm.cu
SIXTEENTH = 16.0  # what a product of such activations is to be multiplied with


@dataclass(frozen=True, slots=True)
class Form:
    """How a product runs: include/gemm_stage.cuh's PARTS, CTAS and MOST, and what its kernels take.

    An item is 128 * parts rows and `tokens` tokens; `cluster` CTAs share its columns, 0: it has one
    CTA, which takes further items.
    """

    tokens: int
    most: int = 128  # tokens that a stage has room for
    parts: int = 2
    ctas: int = 1  # that fit an SM
    cluster: int = 0


_WHOLE = Form(128)


@dataclass(frozen=True, slots=True)
class Sorted:
    """Slots in order of their expert and tiles of them: kernels/moe_sort.cu."""

    slots: Array
    tiles: Array
    ends: Array
    first: int
    held: int
    tile: int  # slots of one at most


def fits(ops: Any, *weights: CudaWeight) -> bool:
    """Whether these functions take the weights on this device, together in one launch."""
    if ops.device.capability < 80 or any(w.layout is None for w in weights):
        return False
    return _stages(ops, weights) >= _LEAST_STAGES


# ---- activations ----------------------------------------------------------------------------


def rows16(ops: Any, n: int, width: int) -> Array:
    """Room for [n, width] float16 activations."""
    padded: Array = ops.new((n, -(-width // 8) * 8), "f2")
    return padded[:, :width]


def to16(ops: Any, x: Array) -> Array:
    """float32 rows [n, width] as float16 of value / 16."""
    (n, width), y = x.shape, rows16(ops, *x.shape)
    ops.run("rows_f16", (n,), _THREADS, y, x, width, y.stride(0), x.stride(0))
    return y


def to32(ops: Any, x16: Array) -> Array:
    """The float32 values of float16 rows."""
    y: Array = ops.new(x16.shape)
    ops.run("rows_from_f16", (len(x16),), _THREADS, y, x16, x16.shape[1], x16.stride(0))
    return y


def norm16(
    ops: Any, x: Array, w: CudaWeight, eps: float, add: Array | None = None,
    keep: bool = False,
) -> tuple[Array | None, Array]:  # fmt: skip
    """(y as float32 if `keep`, y as float16): rms_norm of x [n, d], times w.

    With `add`, x += add first.
    """
    (n, d), y16 = x.shape, rows16(ops, *x.shape)
    y = ops.new((n, d)) if keep else None
    ops.run(
        "rms_norm_f16", (n,), _THREADS, y16, y, x, add, w.raw, d,
        y16.stride(0), x.stride(0), eps,
    )  # fmt: skip
    return y, y16


# ---- dense products -------------------------------------------------------------------------


def products(
    ops: Any, pairs: Sequence[tuple[CudaWeight, Array]], x16: Array, scale: float = SIXTEENTH,
    add: bool = False,
) -> None:  # fmt: skip
    """y = scale * w x16^T for up to three (w [out, in], y [n, out]) of the same `in`.

    y float32 (`add`: added to) or float16. A 3-D w counts as its heads' rows one after another.
    """
    types = {w.qtype.id for w, _ in pairs}
    together = [pairs] if len(types) <= 2 else [[pair] for pair in pairs]  # three would spill
    for part in together:
        _dense(ops, [(w, y, 1, 0) for w, y in part], x16, 0, 1, scale, add)


def heads(ops: Any, w: CudaWeight, y: Array, x16: Array, scale: float = SIXTEENTH) -> None:
    """y[:, h] = scale * w[h] x16[:, h]^T: w [h, out, in], y [n, h, out], x16 [n, h, in]."""
    h = w.shape[0]
    _dense(ops, [(w, y, h, y.stride(1))], x16, x16.stride(1), h, scale, False)


def _dense(
    ops: Any, pairs: Sequence[tuple[CudaWeight, Array, int, int]], x16: Array, xb: int,
    batches: int, scale: float, add: bool,
) -> None:  # fmt: skip
    n, cols, weights = len(x16), x16.shape[-1], [pair[0] for pair in pairs]
    assert x16.ptr % 16 == 0 and x16.stride(0) % 8 == 0 and xb % 8 == 0, "unaligned activations"
    assert all(w.shape[-1] == cols for w in weights), "weights and input differ in columns"
    assert len({y.dtype for _, y, *_ in pairs}) == 1 <= len(pairs) <= 3
    args: list[Any] = []
    all_rows, steps = [], []
    for w, y, lead, yb in pairs:
        shape = w.layout
        assert shape is not None
        rows = w.shape[-2] if lead > 1 else int(np.prod(w.shape[:-1]))
        assert lead > 1 or len(w.shape) == 2 or w.shape[-2] % 16 == 0, "heads are padded"
        tiles = shape.all_row_tiles // lead
        args += [y, w.tiles, rows, tiles, shape.n_col_tiles, w.skip, y.stride(0), yb]
        all_rows.append(rows)
        steps.append(shape.n_col_tiles)
    for _ in range(3 - len(pairs)):
        args += [None, None, 0, 1, 1, 0, 0, 0]
    types = [w.qtype.id for w in weights] + [-1] * (3 - len(weights))
    out = _HALF if pairs[0][1].dtype == np.float16 else _ADD if add else _STORE
    form = _form(ops, weights, n, all_rows * batches, min(steps), max(steps))
    n_items = batches * sum(-(-rows // (128 * form.parts)) for rows in all_rows)
    _launch(
        ops, "gemm_split" if form.cluster else "gemm", form, n_items * -(-n // form.tokens),
        weights, *args, x16, n, cols, batches, x16.stride(0), xb, scale,
        Q0=types[0], Q1=types[1], Q2=types[2], OUT=out, TOKENS=form.tokens,
    )  # fmt: skip


def gated(ops: Any, gate: CudaWeight, up: CudaWeight, x16: Array) -> Array:
    """silu(gate x) * up x as float16 activations [n, out]."""
    (n, cols), rows, shape = x16.shape, gate.shape[0], gate.layout
    assert shape is not None and up.layout is not None and gate.shape == up.shape
    assert shape.n_col_tiles == up.layout.n_col_tiles, "gate and up are cut alike"
    h, steps = rows16(ops, n, rows), shape.n_col_tiles
    form = _form(ops, (gate, up), n, [2 * rows], steps, steps)
    how = {"GATED": 1} if form.cluster else {}
    _launch(
        ops, "gemm_gated_split" if form.cluster else "gemm_gated", form,
        -(-rows // (64 * form.parts)) * -(-n // form.tokens), (gate, up), h, gate.tiles, up.tiles,
        x16, n, rows, shape.n_row_tiles, steps, cols, gate.skip, h.stride(0), x16.stride(0),
        Q0=gate.qtype.id, Q1=up.qtype.id, TOKENS=form.tokens, **how,
    )  # fmt: skip
    return h


# ---- routed experts -------------------------------------------------------------------------


def route_scores(ops: Any, x: Array, gate: CudaWeight) -> Array:
    """The router's product x gate^T [n, E] in float32; gate a float32 weight [E, d]."""
    (n, d), n_experts = x.shape, gate.shape[0]
    y: Array = ops.new((n, n_experts))
    ctas, cluster = (-(-n // 16), -(-n_experts // 64)), 1
    while cluster < 8 and 2 * cluster * 128 <= d and _fills(ops, ctas[0] * ctas[1], 2 * cluster):
        cluster *= 2
    ring = 3 if cluster == 1 and _shared(ops) > 128 << 10 else 2
    how = {"CLUSTER": cluster} if cluster > 1 else {}
    ops.run(
        "route_scores_f32", (*ctas, cluster), 512, y, gate.raw, x, n, n_experts, d, x.stride(0),
        shared=4 * ring * (16 + 64) * 132, RING=ring, **how,
    )  # fmt: skip
    return y


def sort(ops: Any, ids: Array, first: int, held: int, tile: int = 128) -> Sorted:
    """Where each chosen slot stands among its expert's; experts first .. first + held - 1."""
    n_slots, most = ids.size, ids.size // tile + held
    slots, tiles = ops.new((n_slots,), "i4"), ops.new((most, 4), "i4")
    ends = ops.new((4,), "i4")
    shared = 132 * held + 4 * n_slots
    staged = shared + 4 * n_slots <= _shared(ops) - 1024
    assert staged or shared <= _shared(ops) - 1024, "too many tokens for one sort"
    ops.run(
        "moe_sort", (1,), 1024, slots, tiles, ends, ids, n_slots, first, held, tile,
        int(staged), shared=shared + 4 * n_slots * staged,
    )  # fmt: skip
    return Sorted(slots, tiles, ends, first, held, tile)


def experts(
    ops: Any, x16: Array, chosen: Chosen, gate: CudaWeight, up: CudaWeight | None,
    down: CudaWeight, y: Array, add: bool,
) -> None:  # fmt: skip
    """y [n, d] (+)= sum over a token's chosen experts of weight * down silu(gate x) * up x.

    `up` None: gate holds the rows of gate and up. Experts that aren't held add nothing.
    """
    h, part = expert_rows(ops, chosen, gate, up, down)
    expert_products(ops, x16, chosen, gate, up, down, h, part)
    combine(ops, part, chosen, gate.first, gate.shape[0], y, add)


def expert_rows(
    ops: Any, chosen: Chosen, gate: CudaWeight, up: CudaWeight | None, down: CudaWeight
) -> tuple[Array, Array]:
    """Room for what expert_products() makes: h, and the part of each slot."""
    n_slots, f = chosen.ids.size, gate.shape[1] // (2 if up is None else 1)
    return rows16(ops, n_slots, f), rows16(ops, n_slots, down.shape[1])


def expert_products(
    ops: Any, x16: Array, chosen: Chosen, gate: CudaWeight, up: CudaWeight | None,
    down: CudaWeight, h: Array, part: Array,
) -> None:  # fmt: skip
    """part[slot] = down silu(gate x) * up x, of slots whose experts these weights hold."""
    held, n_used = gate.shape[0], chosen.ids.shape[1]
    order = sort(ops, chosen.ids, gate.first, held, slot_tile(chosen.ids.size, held))
    experts_up(ops, x16, order, n_used, gate, up, h)
    experts_down(ops, h, order, down, part)


def experts_up(
    ops: Any, x16: Array, order: Sorted, n_used: int, gate: CudaWeight, up: CudaWeight | None,
    h: Array,
) -> None:  # fmt: skip
    """h, in the order of `order`: silu(gate x) * up x of the experts that it is of."""
    (held, rows, d), shape = gate.shape, gate.layout
    f, other = (rows, up) if up is not None else (rows // 2, gate)
    assert shape is not None and other.layout is not None
    assert shape.n_col_tiles == other.layout.n_col_tiles, "gate and up are cut alike"
    assert up is not None or f % 16 == 0, "merged gate and up rows share a tile"
    form = _grouped(ops, order.tile, gate, other)
    _launch(
        ops, "gemm_experts_up", form, _most_tiles(order) * -(-f // (_ROWS // 2)), (gate, other), h,
        gate.tiles, other.tiles, x16, order.slots, order.tiles, order.ends, n_used, f,
        shape.n_row_tiles, 0 if up is not None else f // 16, shape.n_col_tiles, held, d, gate.skip,
        h.stride(0), x16.stride(0), Q0=gate.qtype.id, Q1=other.qtype.id, GATED=1,
    )  # fmt: skip


def experts_down(ops: Any, h: Array, order: Sorted, down: CudaWeight, part: Array) -> None:
    """part, by slot: down h of the experts that `order` is of."""
    (held, d, f), shape = down.shape, down.layout
    assert shape is not None
    form = _grouped(ops, order.tile, down)
    _launch(
        ops, "gemm_experts_down", form, _most_tiles(order) * -(-d // _ROWS), (down,), part,
        down.tiles, h, order.slots, order.tiles, order.ends, d, shape.n_row_tiles,
        shape.n_col_tiles, held, f, down.skip, part.stride(0), h.stride(0), Q0=down.qtype.id, Q1=-1,
    )  # fmt: skip


def combine(
    ops: Any, part: Array, chosen: Chosen, first: int, held: int, y: Array, add: bool
) -> None:
    """y [n, d] (+)= sum over a token's slots, of experts first .. first + held - 1."""
    n, n_used = chosen.ids.shape
    ops.run(
        "moe_combine", (n,), 256, y, part, chosen.ids, chosen.weights, n_used, part.shape[1],
        first, held, int(add), part.stride(0),
    )  # fmt: skip


def _most_tiles(order: Sorted) -> int:
    return min(order.slots.size, len(order.tiles))


# ---- launches -------------------------------------------------------------------------------


def _tile_bytes(w: CudaWeight) -> int:
    """Bytes of one tile of a weight in a stage (StagedTile in kernels/include/gemm_stage.cuh)."""
    shape = w.layout
    assert shape is not None
    n = shape.all_row_tiles * shape.n_col_tiles
    each = sum(nbytes for name, (_, nbytes) in shape.planes.items() if name != "d") // n
    return each + shape.planes["d"][1] * 4 // n


def _shared(ops: Any) -> int:
    return _SHARED.get(ops.device.capability, 99) << 10


def _stages(ops: Any, weights: Sequence[CudaWeight], form: Form = _WHOLE) -> int:
    # of a CTA: two of an SM need a kilobyte each beside it, and alignment and more
    room = _shared(ops) // form.ctas - (2048 if form.ctas == 1 else 3072)
    return min(_MOST_STAGES, room // _stage_bytes(weights, form))


def _stage_bytes(weights: Sequence[CudaWeight], form: Form) -> int:
    return 128 * form.most + 8 * form.parts * max(_tile_bytes(w) for w in weights)


def _grouped(ops: Any, tile: int, *weights: CudaWeight) -> Form:
    """The form of routed experts' products by tiles of so many slots."""
    two = Form(tile, tile, ctas=2)
    one_type = len({w.qtype.id for w in weights}) == 1  # two would spill
    fit = ops.device.capability == 90 and tile == 32 and one_type
    return two if fit and _stages(ops, weights, two) >= _STAGES_OF_TWO else Form(tile, tile)


def _fills(ops: Any, n_items: int, cluster: int, ctas: int = 1) -> bool:
    """Whether clusters for so many items are on the device all at once.

    They lie within groups of SMs of uneven sizes: on an H200's 132 SMs 128 CTAs don't fit by fours.
    """
    sms: int = ops.device.n_sm * 10 // 11 if cluster > 2 else ops.device.n_sm
    return bool(ops.device.capability == 90) and n_items * cluster <= sms * ctas


def _form(
    ops: Any, weights: Sequence[CudaWeight], n: int, rows: Sequence[int], least: int, steps: int
) -> Form:
    """How a dense product of weights with so many `rows` is cut: what takes the least time.

    Its stages are `steps`, of the shortest weight `least`.
    """

    def items(form: Form) -> int:
        return sum(-(-r // (128 * form.parts)) for r in rows) * -(-n // form.tokens)

    def cost(form: Form) -> float:  # microseconds; an H200, 2026-11-22, in graphs
        if not form.cluster:
            waves: int = -(-items(form) // ops.device.n_sm)
            return 2 + waves * steps * (0.43 + 0.00375 * form.tokens)
        alone, share = items(form) * form.cluster / ops.device.n_sm, -(-steps // form.cluster)
        if form.parts == 2:
            return 3.8 + share * (0.33 + 0.0066 * form.tokens) * (1.2 if alone > 0.7 else 1)
        crowd = 1 if alone < 0.7 else 1.75 if alone < 1 else 2
        return 3.7 + share * (0.2 + 0.0028 * form.tokens) * crowd

    forms = [Form(tokens) for tokens in _WIDTHS]
    forms += [Form(w, w, 1, 2, cluster) for w in (32, 64) for cluster in (2, 4)]
    forms += [Form(w, w, 2, 1, cluster) for w in _WIDTHS for cluster in (2, 4)]
    forms = [form for form in forms if _allowed(ops, weights, form, items(form), least)]
    return min(forms, key=cost)


def _allowed(ops: Any, weights: Sequence[CudaWeight], form: Form, n_items: int, steps: int) -> bool:
    if not form.cluster:
        return True
    few = _STAGES_OF_TWO if form.ctas == 2 else _LEAST_STAGES
    fits = _stages(ops, weights, form) >= min(few, -(-steps // form.cluster))
    return fits and steps >= form.cluster and _fills(ops, n_items, form.cluster, form.ctas)


def _launch(
    ops: Any, name: str, form: Form, n_items: int, weights: Sequence[CudaWeight], *args: Any,
    **defines: int,
) -> None:  # fmt: skip
    stages = _stages(ops, weights, form)
    assert stages >= _LEAST_STAGES, "see fits()"
    if form.cluster:  # enough to have all of a CTA's under way
        longest = max(w.layout.n_col_tiles for w in weights if w.layout is not None)
        stages = min(stages, -(-longest // form.cluster) + 3)
    threads = _THREADS + (128 if ops.device.capability == 90 else 0)  # that copy, for wgmma
    shared = 16 * stages + stages * _stage_bytes(weights, form)
    ctas = min(ops.device.n_sm * form.ctas, n_items)
    for key, value, usual in (("MOST", form.most, 128), ("CTAS", form.ctas, 1)):
        if value != usual:
            defines[key] = value
    if form.cluster:
        ctas = n_items * form.cluster
        shared = max(shared, 4 * form.tokens * (128 * form.parts + 4))
        defines |= {"CLUSTER": form.cluster, "PARTS": form.parts}
    ops.run(name, (ctas,), threads, *args, shared=1024 + shared, STAGES=stages, **defines)
