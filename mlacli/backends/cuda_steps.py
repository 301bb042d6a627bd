"""Steps of one CUDA rank: captured once per bucket of tokens and form of attention, then replayed.

What changes from step to step (tokens, positions, wanted rows) lies in fixed device buffers. A
padded token has position -1: it writes no cache row, attends to nothing, is routed to nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlacli.attention_forms import AttentionForm
from mlacli.backends import cuda_sampling
from mlacli.backends.cuda_acts import Act
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_device import Device, Host
from mlacli.ops import Step
from mlacli.parallel.cuda_sizes import FEW, bucket

if TYPE_CHECKING:
    from mlacli.backends.cuda_ops import CudaOps
    from mlacli.params import SamplingParams

Forward = Callable[[Step], "Act | None"]


@dataclass(slots=True)
class _Graph:
    """A captured step: run it, where it leaves its logits, and its attention forms."""

    replay: Callable[[], None]
    logits: Array | None
    forms: set[AttentionForm]


class Steps:
    """The steps of `ops`, at most `most` tokens each."""

    def __init__(self, ops: CudaOps, device: Device, most: int, frequencies: Host) -> None:
        self.ops, self.device, self.most = ops, device, most
        self._frequencies = ops.put(np.array(frequencies, np.float64))
        self._inputs = device.take((3 * most,), np.int32)  # tokens, positions, wanted rows
        self._sampler = cuda_sampling.new_state(device.take, self._inputs[:1], self._inputs[1:2])
        self._chain: tuple[Any, ...] = ()  # what the sampler's chain was made of
        self._base = device.mark()  # where scratch begins
        self._graphs: dict[tuple[Any, ...], _Graph] = {}

    @property
    def n_captured(self) -> int:
        return len(self._graphs)

    def run(
        self, tokens: Sequence[int], n_past: int, out_rows: Sequence[int], forward: Forward,
        capture: bool,
    ) -> Host | None:  # fmt: skip
        """Logits [n_out, V] of one step."""
        n, n_kv = len(tokens), n_past + len(tokens)
        size = bucket(n, self.most)
        inputs = np.zeros((3, size), np.int32)
        inputs[0, :n], inputs[1] = tokens, -1
        inputs[1, :n], inputs[2, : len(out_rows)] = range(n_past, n_kv), out_rows
        self.device.copy_in(self._inputs[: 3 * size], inputs.reshape(-1))
        self.ops.begin_step(n, self._inputs[size : 2 * size])

        def launches() -> Array | None:
            return self._forward(forward, size, n_kv, len(out_rows))

        if not capture:
            with self.device.prepared():
                launches()
            return self._fetch(launches())
        graph = self._graph((size, len(out_rows), *self.ops.step_kind(n, n_kv)), launches)
        graph.replay()
        return self._fetch(graph.logits)

    def compile(
        self, forward: Forward, n_ctx: int, report: Callable[[int, int], None] | None
    ) -> int:
        """How many kernels of all kinds of steps had to be compiled, which is done at once."""
        before, forms, self.ops.forms = self.device.n_compiled, self.ops.forms, set()
        kinds: dict[tuple[Any, ...], tuple[int, int]] = {}
        sizes = (1, FEW, 4 * FEW, self.most)  # of one token, few and many
        for n in sorted({bucket(min(n, self.most), self.most) for n in sizes}):
            for n_kv in (n, n_ctx):
                kinds.setdefault((n, *self.ops.step_kind(n, n_kv)), (n, n_kv))
        with self.device.prepared(report):
            for n, n_kv in kinds.values():
                self.ops.begin_step(n, self._inputs[n : 2 * n])
                self._forward(forward, n, n_kv, 1)
        self.ops.forms = forms
        return self.device.n_compiled - before

    def run_ahead(
        self, token: int, n_past: int, n_steps: int, sampling: SamplingParams, seed: int,
        banned: Iterable[int], n_vocab: int, forward: Forward,
    ) -> list[int]:  # fmt: skip
        """`n_steps` tokens after `token`, each drawn on the device from the logits before it."""
        chain = sampling, seed, n_vocab, tuple(sorted(banned))
        if chain != self._chain:
            self.device.copy_in(self._sampler.chain, cuda_sampling.chain_words(*chain))
            self._chain = chain
        self.device.copy_in(self._inputs[:3], np.array([token, n_past, 0], np.int32))
        self.ops.begin_step(1, self._inputs[1:2])

        def launches() -> None:
            for _ in range(n_steps):
                logits = self._forward(forward, 1, n_past + n_steps, 1)
                assert logits is not None, "the last stage samples"
                cuda_sampling.next_token(self.ops, logits, self._sampler)

        kinds = {self.ops.step_kind(1, n_past + i + 1) for i in range(n_steps)}
        assert len(kinds) == 1, "the engine asks n_ahead()"
        self._graph(("ahead", n_steps, *kinds.pop()), launches).replay()
        ring = self.device.get(self._sampler.ring)
        return cuda_sampling.produced(ring, n_past + 1, n_steps)

    def n_ahead(self, n_past: int, most: int) -> int:
        """How many steps after `n_past` are of one kind, `most` at most."""
        kind = self.ops.step_kind(1, n_past + 1)
        return next(
            (i for i in range(1, most) if self.ops.step_kind(1, n_past + i + 1) != kind), most
        )

    def _forward(self, forward: Forward, size: int, n_kv: int, n_out: int) -> Array | None:
        self.device.rewind(self._base)
        inputs = self._inputs[: 3 * size].reshape(3, size)
        half = len(self._frequencies)
        cos, sin = self.ops.new((size, half)), self.ops.new((size, half))
        self.ops.run(
            "rope_table_f32", (size,), min(512, half), cos, sin, inputs[1], self._frequencies, half
        )
        wanted: Any = inputs[2, :n_out]
        step = Step(inputs[0], inputs[1], cos, sin, size, n_kv, wanted)
        logits = forward(step)
        return None if logits is None else self.ops.f32(logits)

    def _graph(self, key: tuple[Any, ...], launches: Callable[[], Array | None]) -> _Graph:
        graph = self._graphs.get(key)
        if graph is None:
            before, self.ops.forms = self.ops.forms, set()
            with self.device.prepared():
                launches()
            logits: list[Array | None] = []
            replay = self.device.capture(lambda: logits.append(launches()))
            graph = self._graphs[key] = _Graph(replay, logits[0], self.ops.forms)
            self.ops.forms = before
        self.ops.forms |= graph.forms
        return graph

    def _fetch(self, logits: Array | None) -> Host | None:
        if logits is None:
            self.device.synchronize()
            return None
        return self.device.get(logits)
