"""Routed experts of one rank that lie in host memory: how they come to the device.

Few tokens: kernels read the chosen experts where they lie, over the link. Many: all of a layer are
copied, chunk by chunk, through a ring on the device, ahead of the products. What could not be
page-locked is never read by kernels: few tokens wait for copies of the experts that they chose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mlacli.backends import cuda_gemm as gemm
from mlacli.backends import cuda_matvec as matvec
from mlacli.backends import cuda_plain as plain
from mlacli.backends import cuda_raw as raw
from mlacli.backends.cuda_acts import Act, Chosen
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_weights import CudaWeight
from mlacli.loading.tiles import HEADER, tiled_shape
from mlacli.parallel.cuda_sizes import FEW
from mlacli.parallel.host_stream import (
    SLOTS,
    Stored,
    chunk_experts,
    ring_slot_bytes,
    slot_offsets,
    streams,
)

if TYPE_CHECKING:
    from mlacli.backends.cuda_ops import CudaOps

Routed = tuple[CudaWeight, CudaWeight | None, CudaWeight]  # gate, up (None: in gate), down
Copies = list[tuple[int, int, int]]  # to, from, bytes


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Neighbouring experts of a layer: what is copied, and the weights in the slot afterwards."""

    copies: Copies
    weights: Routed


class HostExperts:
    """What `ops` has to copy in a step, in which order."""

    def __init__(self, ops: CudaOps) -> None:
        self.ops = ops
        self._layers: dict[int, list[CudaWeight]] = {}  # by layer, while weights are uploaded
        self._chunks: list[_Chunk] = []  # of a step, in order
        self._first: dict[str, int] = {}  # of a layer's chunks, by the name of its down weight
        self._ring: list[Array] = []

    def add(self, layer: int | None, w: CudaWeight) -> None:
        """A routed weight, wherever it lies."""
        assert layer is not None, "experts belong to a layer"
        self._layers.setdefault(layer, []).append(w)

    def take_buffers(self) -> None:
        """Takes the ring, once all weights are there."""
        layers = {
            i: _in_order(ws) for i, ws in sorted(self._layers.items())
            if any(w.block is not None for w in ws)
        }  # fmt: skip
        stored = {i: [_stored(w) for w in ws if w is not None] for i, ws in layers.items()}
        size = ring_slot_bytes(stored.values())
        self._ring = [self.ops.device.take((size,), np.uint8) for _ in range(SLOTS if size else 0)]
        for i, routed in layers.items():
            self._first[routed[2].name] = len(self._chunks)
            n_experts, at_once = routed[0].shape[0], chunk_experts(stored[i])
            for first in range(0, n_experts, at_once):
                slot = self._ring[len(self._chunks) % SLOTS]
                held = min(at_once, n_experts - first)
                self._chunks.append(_chunk(routed, slot, [range(first, first + held)], first))

    # ---- which way ----------------------------------------------------------------------------

    @property
    def reachable(self) -> bool:
        """Whether kernels can read all experts where they lie."""
        return all(w.reachable for ws in self._layers.values() for w in ws)

    def copies_in(self, n: int) -> bool:
        """Whether a step of `n` tokens makes copies, and can't be captured for it."""
        return bool(self._chunks) and (not self.reachable or self._streams(n))

    def begin(self, n: int) -> None:
        """A step of `n` tokens follows: start the first copies, if it makes any ahead."""
        if self._chunks and self._streams(n):
            for i in range(min(SLOTS, len(self._chunks))):
                self.ops.device.link.copy(i, self._chunks[i].copies)

    def arrive(self, n: int, routed: Routed) -> bool:
        """Whether a layer's experts come by copies made ahead, for `n` tokens: many()."""
        return routed[2].name in self._first and self._streams(n)

    def are_fetched(self, n: int, routed: Routed) -> bool:
        """Whether they come by copies of those that were chosen: fetched()."""
        there = all(w is None or w.reachable for w in routed)
        return not there and not self.arrive(n, routed)

    def _streams(self, n: int) -> bool:
        hp = self.ops.hp
        return n > FEW and (not self.reachable or streams(n, hp.routing.n_used, hp.E))

    # ---- many tokens --------------------------------------------------------------------------

    def many(self, x: Act, chosen: Chosen, routed: Routed, y: Array, add: bool) -> None:
        """y [n, d] (+)= routed experts, of copies that are made ahead."""
        ops, (gate, up, down), device = self.ops, routed, self.ops.device
        if matvec.takes(gate, up, down):
            products = gemm.expert_products
        elif raw.takes(ops, gate, gate if up is None else up, down):
            products = raw.expert_products
        else:
            values, held = ops.f32(x), ops.new((*chosen.ids.shape, down.shape[2]))
            for number, weights in self._arriving(routed):
                plain.experts_up(ops, values, chosen, *weights[:2], held)
                plain.experts_down(ops, held, chosen, weights[2], y, add or number > 0)
            return
        x16, (h, part) = ops.f16(x), gemm.expert_rows(ops, chosen, gate, up, down)
        mark = device.mark()
        for _, weights in self._arriving(routed):
            device.rewind(mark)
            products(ops, x16, chosen, *weights, h, part)
        gemm.combine(ops, part, chosen, gate.first, gate.shape[0], y, add)

    def _arriving(self, routed: Routed) -> Iterator[tuple[int, Routed]]:
        """(number, weights) of a layer's chunks, each while its slot holds it."""
        start, link = self._first[routed[2].name], self.ops.device.link
        n_experts, at = routed[0].shape[0], start
        while n_experts:
            chunk, slot = self._chunks[at], at % SLOTS
            link.wait(slot)
            yield at - start, chunk.weights
            link.release(slot)
            if at + SLOTS < len(self._chunks):
                link.copy(slot, self._chunks[at + SLOTS].copies)
            n_experts -= chunk.weights[0].shape[0]
            at += 1

    # ---- few tokens, whose experts kernels can't read -------------------------------------------

    def fetched(self, chosen: Chosen, routed: Routed) -> Iterator[tuple[Chosen, Routed]]:
        """The choice and the weights, for as many launches as the ring takes to hold them all.

        Waits for the device, to learn what was chosen. Scratch taken inside is given back.
        """
        ops, device = self.ops, self.ops.device
        first, n_experts = routed[0].first, routed[0].shape[0]
        at_once = chunk_experts([_stored(w) for w in routed if w is not None])
        ids = device.get(chosen.ids) - first
        inside = (ids >= 0) & (ids < n_experts)
        wanted = list(range(1)) if device.noting else [int(e) for e in np.unique(ids[inside])]
        device.link.release(0)
        own = ops.new(chosen.ids.shape, np.int32)
        mark = device.mark()
        for start in range(0, len(wanted), at_once):
            device.rewind(mark)
            experts = wanted[start : start + at_once]
            places = np.full(n_experts, -1, np.int32)
            places[experts] = range(len(experts))
            device.copy_in(own, np.where(inside, places[np.where(inside, ids, 0)], -1))
            runs = [range(e, e + 1) for e in experts]
            chunk = _chunk(routed, self._ring[0], runs, 0, at_once)
            device.link.copy(0, chunk.copies)
            device.link.wait(0)
            yield Chosen(own, chosen.weights), chunk.weights
            device.link.release(0)


def _in_order(weights: Sequence[CudaWeight]) -> Routed:
    """A layer's routed weights as kernels take them."""

    def named(word: str) -> CudaWeight | None:
        return next((w for w in weights if f".ffn_{word}_exps." in w.name), None)

    merged, gate, down = named("gate_up"), named("gate"), named("down")
    first = gate if merged is None else merged
    assert first is not None and down is not None, "a layer has all its experts' weights"
    return first, named("up") if merged is None else None, down


def _stored(w: CudaWeight) -> Stored:
    return Stored(w.shape, w.qtype, w.layout is not None, w.skip)


def _chunk(
    routed: Routed, slot: Array, runs: Sequence[range], first: int, held: int | None = None
) -> _Chunk:
    """The experts of `runs`, one run after another, in `slot`; the first is known as `first`.

    `held`: a chunk of so many, the last of them empty.
    """
    weights = [w for w in routed if w is not None]
    n = held or sum(len(run) for run in runs)
    offsets = slot_offsets([_stored(w) for w in weights], n)
    copies: Copies = []
    found: list[CudaWeight] = []
    for w, at, end in zip(weights, offsets, offsets[1:], strict=False):
        there = slot[at:end]
        layout = None
        if w.layout is not None:
            layout = tiled_shape((n, *w.shape[1:]), w.qtype, w.skip)
            copies.append((there.ptr, w.held.ptr, HEADER))
            held_array = there[: layout.nbytes]
            planes = [(layout.planes[name][0], start, nbytes // w.shape[0])
                      for name, (start, nbytes) in w.layout.planes.items() if nbytes]  # fmt: skip
        else:
            per_expert = w.held.nbytes // w.shape[0]
            held_array = there[: n * per_expert].reshape(n, *w.held.shape[1:])
            planes = [(0, 0, per_expert)]
        for to, start, per_expert in planes:
            place = 0
            for run in runs:
                source = w.held.ptr + start + run.start * per_expert
                copies.append((there.ptr + to + place * per_expert, source, len(run) * per_expert))
                place += len(run)
        where = w.first + first if held is None else 0
        found.append(
            replace(w, shape=(n, *w.shape[1:]), held=held_array, layout=layout, first=where,
                    block=None)
        )  # fmt: skip
    up = found[1] if len(found) == 3 else None
    return _Chunk(copies, (found[0], up, found[-1]))
