"""Steps of CUDA ranks: captured once per bucket of tokens and form of attention, then replayed.

What changes from step to step (tokens, positions, wanted rows) lies in fixed device buffers. A
padded token has position -1: it writes no cache row, attends to nothing, is routed to nobody.
Whoever calls launches all graphs; rank threads run only where forwards are captured.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mlacli.attention_forms import AttentionForm
from mlacli.backends import cuda_sampling
from mlacli.backends.cuda_acts import Act
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_device import Host
from mlacli.backends.cuda_place import Place
from mlacli.ops import Step
from mlacli.parallel.cuda_sizes import FEW, bucket

if TYPE_CHECKING:
    from mlacli.backends.cuda_ops import CudaOps
    from mlacli.backends.cuda_together import Together
    from mlacli.params import SamplingParams

Forward = Callable[[Step], "Act | None"]
# Runs a function of the rank number on the ranks of a stage, in lockstep if there are several.
Runner = Callable[[Callable[[int], Any]], list[Any]]
_AHEAD = "ahead"  # steps of one token, by what begins their keys; of others it is their size
AT_ONCE = 8  # of them in a graph; longer runs replay it
FEW_SIZES = (1, FEW, 4 * FEW)  # tokens of steps whose kernels are compiled ahead, beside the most


@dataclass(slots=True)
class _Graph:
    """A captured step of a stage: one replay a place, and what else is known of it."""

    replays: list[Callable[[], None]]
    logits: Array | None  # on the first place
    sent: list[Array]
    forms: list[set[AttentionForm]]  # by rank


@dataclass(slots=True)
class Stage:
    """Places that step together: all of them under graph, one of one rank otherwise."""

    places: Sequence[Place]
    run: Runner
    together: Together | None = None  # the ranks of graph
    graphs: dict[tuple[Any, ...], _Graph] = field(default_factory=dict)
    compiled: set[tuple[Any, ...]] = field(default_factory=set)  # kinds that run without a graph
    logits: Array | None = None  # of the last step
    sent: list[Array] = field(default_factory=list)

    @property
    def ops(self) -> Iterator[CudaOps]:
        return (one for place in self.places for one in place.ops)

    def forward(
        self, forwards: Sequence[Forward], size: int, n_kv: int, n_out: int
    ) -> list[Array | None]:
        """The launches of one step; each place's logits."""
        steps: dict[int, tuple[CudaOps, Step]] = {}
        for place in self.places:
            step = place.begin(size, n_kv, n_out)
            steps |= {r: (one, step) for r, one in zip(place.ranks, place.ops, strict=True)}

        def one_rank(rank: int) -> Array | None:
            ops, step = steps[rank]
            ops.device.use()
            logits = forwards[rank](step)
            return None if logits is None else ops.f32(logits)

        found = dict(zip(sorted(steps), self.run(one_rank), strict=True))
        for place in self.places:
            place.join()
        return [found[place.ranks[0]] for place in self.places]

    def launch(
        self, key: tuple[Any, ...], launches: Callable[[], list[Array | None]], capture: bool = True
    ) -> None:
        """Run `launches`, as a graph if they may be captured.

        Copies out of host memory can't be: they are made beside the launches that need them.
        """
        size = 1 if key[0] == _AHEAD else key[0]
        if not capture or any(ops.makes_copies(size) for ops in self.ops):
            if key not in self.compiled:
                with self.prepared():
                    launches()
                self.compiled.add(key)
            self.logits, self.sent = launches()[0], self._sent
            return
        graph = self.graphs.get(key)
        if graph is None:
            graph = self.graphs[key] = self.captured(launches)
        for ops, forms in zip(self.ops, graph.forms, strict=True):
            ops.forms |= forms
        # All at one go outside of Python: a signal in between would leave GPUs waiting for others.
        replays = zip(self.places, graph.replays, strict=True)
        calls = [call for place, replay in replays for call in (place.device.use, replay)]
        deque(map(operator.call, calls), maxlen=0)
        self.logits, self.sent = graph.logits, graph.sent

    @contextmanager
    def prepared(self, report: Callable[[int, int], None] | None = None) -> Iterator[None]:
        """Inside, launches of all ranks are only noted; at the end, compiled."""
        with ExitStack() as stack:
            for ops in self.ops:
                stack.enter_context(_noting(ops, report))
            for place in self.places:
                place.is_dry = True
            try:
                yield
            finally:
                for place in self.places:
                    place.is_dry = False

    def captured(self, launches: Callable[[], list[Array | None]]) -> _Graph:
        """`launches` as graphs that none has been replayed of."""
        before = [ops.forms for ops in self.ops]
        for ops in self.ops:
            ops.forms = set()
        with self.prepared():
            launches()
        logits: list[Array | None] = []
        replays: list[Callable[[], None]] = []

        def capture(places: Sequence[Place]) -> None:
            """One graph a place, each within those before it."""
            if not places:
                logits.extend(launches())
                return
            places[0].device.use()
            replays.insert(0, places[0].device.capture(lambda: capture(places[1:])))

        capture(self.places)
        graph = _Graph(replays, logits[0], self._sent, [ops.forms for ops in self.ops])
        for ops, forms in zip(self.ops, before, strict=True):
            ops.forms = forms
        return graph

    @property
    def _sent(self) -> list[Array]:
        return list(self.places[0].ops[0].sent)


@contextmanager
def _noting(ops: CudaOps, report: Callable[[int, int], None] | None) -> Iterator[None]:
    with ops.device.prepared(report):
        yield
        ops.device.use()  # on which what was noted is now loaded


class Steps:
    """Steps of at most `most` tokens through all stages, one after another."""

    def __init__(self, stages: Sequence[Stage], most: int) -> None:
        self.stages, self.most, self.at_once = tuple(stages), most, AT_ONCE
        self.last = self.stages[-1].places[0]
        self._kind = self.last.ops[0].step_kind  # alike on all ranks

    @property
    def n_captured(self) -> int:
        """Graphs so far, of all stages."""
        return sum(len(stage.graphs) for stage in self.stages)

    def run(
        self, tokens: Sequence[int], n_past: int, out_rows: Sequence[int],
        forwards: Sequence[Forward], capture: bool,
    ) -> Callable[[], Host]:  # fmt: skip
        """Launches one step; its logits [n_out, V], to be asked for once."""
        n, n_kv, n_out = len(tokens), n_past + len(tokens), len(out_rows)
        size = bucket(n, self.most)
        inputs = np.zeros((3, size), np.int32)
        inputs[0, :n], inputs[1] = tokens, -1
        inputs[1, :n], inputs[2, :n_out] = range(n_past, n_kv), out_rows
        key = (size, n_out, *self._kind(n, n_kv))
        before: Stage | None = None
        for stage in self.stages:
            for place in stage.places:
                place.fill(inputs, n)
            if before is not None:
                _hand_over(before, stage, size)
            launches = partial(stage.forward, forwards, size, n_kv, n_out)
            stage.launch(key, launches, capture)
            before = stage
        logits = self.stages[-1].logits
        assert logits is not None, "the last stage has logits"
        self.last.device.use()
        return self.last.device.fetch(logits)

    def compile(
        self, forwards: Sequence[Forward], n_ctx: int, report: Callable[[int, int], None] | None
    ) -> int:
        """How many kernels of all kinds of steps had to be compiled, which is done at once."""
        return sum(self._compile(stage, forwards, n_ctx, report) for stage in self.stages)

    def _compile(
        self, stage: Stage, forwards: Sequence[Forward], n_ctx: int,
        report: Callable[[int, int], None] | None,
    ) -> int:  # fmt: skip
        before = sum(ops.device.n_compiled for ops in stage.ops)
        forms = [ops.forms for ops in stage.ops]
        for ops in stage.ops:
            ops.forms = set()
        kinds: dict[tuple[Any, ...], tuple[int, int]] = {}
        for n in sorted({bucket(min(n, self.most), self.most) for n in (*FEW_SIZES, self.most)}):
            for n_kv in (n, n_ctx):
                kinds.setdefault((n, *self._kind(n, n_kv)), (n, n_kv))
        with stage.prepared(report):
            for n, n_kv in kinds.values():
                for place in stage.places:
                    place.expect(n)
                stage.forward(forwards, n, n_kv, 1)
        for ops, those in zip(stage.ops, forms, strict=True):
            ops.forms = those
        return sum(ops.device.n_compiled for ops in stage.ops) - before

    def run_ahead(
        self, token: int, n_past: int, n_steps: int, sampling: SamplingParams, seed: int,
        banned: Iterable[int], n_vocab: int, forwards: Sequence[Forward],
    ) -> list[int]:  # fmt: skip
        """`n_steps` tokens after `token`, each drawn on the device from the logits before it.

        Every place of the last stage draws the same.
        """
        banned = list(banned)
        for stage in self.stages:
            for place in stage.places:
                place.set_chain(sampling, seed, n_vocab, banned)
                place.fill(np.array([[token], [n_past], [0]], np.int32), 1)
        kinds = {self._kind(1, n_past + i + 1) for i in range(n_steps)}
        assert len(kinds) == 1, "the engine asks n_ahead()"
        kind, n_kv = kinds.pop(), n_past + n_steps
        if len(self.stages) == 1:
            left = n_steps
            while left:  # in graphs of two sizes alone: each of them has to be captured
                n = self.at_once if left >= self.at_once else 1
                self.stages[0].launch(
                    *self._ahead(self.stages[0], n, forwards, n_kv, kind, sampling)
                )
                left -= n
        else:
            for _ in range(n_steps):
                self._through_stages(forwards, n_kv, kind, sampling)
        self.last.device.use()
        ring = self.last.device.get(self.last.sampler.ring)
        return cuda_sampling.produced(ring, n_past + 1, n_steps)

    def capture_ahead(
        self, forwards: Sequence[Forward], sampling: SamplingParams, n_ctx: int
    ) -> None:
        """Captures all that `run_ahead` replays, so that no token waits for it."""
        sizes = (1, self.at_once) if len(self.stages) == 1 else (1,)
        for stage in self.stages:
            if any(ops.makes_copies(1) for ops in stage.ops):
                continue
            for n_kv in (1 << i for i in range(n_ctx.bit_length())):  # one of each kind at least
                for n in sizes:
                    kind = self._kind(1, n_kv)
                    key, launches = self._ahead(stage, n, forwards, n_kv, kind, sampling)
                    if key not in stage.graphs:
                        for place in stage.places:
                            place.expect(1)
                        stage.graphs[key] = stage.captured(launches)

    def _ahead(
        self, stage: Stage, n: int, forwards: Sequence[Forward], n_kv: int, kind: tuple[Any, ...],
        sampling: SamplingParams,
    ) -> tuple[tuple[Any, ...], Callable[[], list[Array | None]]]:  # fmt: skip
        """The key and the launches of a stage's part in `n` steps; `n` is 1 where others follow."""
        if stage is not self.stages[-1]:
            return (1, 1, *kind), partial(stage.forward, forwards, 1, n_kv, 1)
        apart = stage.together is not None and stage.together.draws_apart(sampling)
        launches = partial(self._drawn, stage, forwards, n_kv, n, apart)
        return (_AHEAD, n, apart, *kind), launches

    def _drawn(
        self, stage: Stage, forwards: Sequence[Forward], n_kv: int, n_steps: int,
        apart: bool = False,
    ) -> list[Array | None]:  # fmt: skip
        """`n_steps` steps of the last stage, each with the draw of the next one's token.

        `apart`: from logits that are not joined.
        """
        found: list[Array | None] = []
        for _ in range(n_steps):
            if apart and stage.together is not None:
                with stage.together.apart():
                    found = stage.forward(forwards, 1, n_kv, 1)
                stage.together.sample(found)
                continue
            found = stage.forward(forwards, 1, n_kv, 1)
            for place, logits in zip(stage.places, found, strict=True):
                assert logits is not None, "the last stage samples"
                place.sample(logits)
        return found

    def _through_stages(
        self, forwards: Sequence[Forward], n_kv: int, kind: tuple[Any, ...],
        sampling: SamplingParams,
    ) -> None:  # fmt: skip
        """One step; the token that the last stage draws goes back to the others."""
        others = self.stages[:-1]
        before: Stage | None = None
        for stage in self.stages:
            if before is not None:
                _hand_over(before, stage, 1)
            stage.launch(*self._ahead(stage, 1, forwards, n_kv, kind, sampling))
            before = stage
        for stage in others:
            (place,) = stage.places
            place.device.use()
            place.device.follow(self.last.device)
            place.device.pull(place.inputs[:2], self.last.inputs[:2], self.last.device)

    def n_ahead(self, n_past: int, most: int) -> int:
        """How many steps after `n_past` are of one kind, `most` at most."""
        kind = self._kind(1, n_past + 1)
        return next((i for i in range(1, most) if self._kind(1, n_past + i + 1) != kind), most)


def _hand_over(before: Stage, stage: Stage, size: int) -> None:
    """What `before` sent in this step lies where `stage` looks for it."""
    (source,), (target,) = before.places, stage.places
    target.device.use()
    target.device.follow(source.device)
    for sent, received in zip(before.sent, target.ops[0].received(size), strict=False):
        target.device.pull(received, sent, source.device)
    source.device.use()
    source.device.follow(target.device)  # its next step must not overwrite what is being read
    target.device.use()
