"""What a run chooses (experts, and rows under DSA), and runs that are made to choose the same.

`of_numpy` records the NumPy backend's choices with the scores behind them; `Judge` imposes them on
a CUDA engine and holds its own choices against those scores. By name of the weight that chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from mlacli.backends import numpy_dsa
from mlacli.backends.numpy_ops import NumpyOps

SURE = 8  # standard deviations that an error of one score or of a limit may have


@dataclass
class Choice:
    """Ids [n, count]; what each could have been chosen by [n, of all], -inf: it couldn't."""

    ids: np.ndarray
    scores: np.ndarray
    lead: np.ndarray  # [n]: by how much a chosen group leads the rest; inf without groups
    spread: np.ndarray  # [n]: how far a score moves when what it is made of moves by all of itself


Choices = dict[str, Choice]


@contextmanager
def of_numpy() -> Iterator[Choices]:
    """Inside, forwards of NumPy engines of one rank note their choices; the last one's stay."""
    found: Choices = {}
    route, choose, select = NumpyOps.route, NumpyOps.choose_rows, NumpyOps.dsa_select

    def noted_route(self: Any, x: Any, gate: Any, bias: Any, routing: Any) -> Any:
        chosen = route(self, x, gate, bias, routing)
        logits = self.matmul(x, gate)
        found[gate.name] = _experts(
            chosen.ids, logits, None if bias is None else self._dense(bias), routing
        )
        return chosen

    def noted_choose(self: Any, x: Any, q_a: Any, w: Any, *rest: Any) -> Any:
        self._choosing = w.indexer_attn_k.name
        return choose(self, x, q_a, w, *rest)

    def noted_select(
        self: Any, q: Any, weights: Any, rows: Any, step: Any, top_k: int, imposed: Any = None
    ) -> Any:
        chosen = select(self, q, weights, rows, step, top_k, imposed)
        w = weights / np.float32(np.sqrt(q.shape[1] * q.shape[2]))
        scores = numpy_dsa.index_scores(q, w, rows.read(0, step.n_kv))
        spread = np.full(len(scores), scores.std(), np.float64)
        scores[step.pos[:, None] < np.arange(step.n_kv)] = -np.inf
        lead = np.full(len(scores), np.inf)
        found[self._choosing] = Choice(chosen, scores, lead, spread)
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NumpyOps, "route", noted_route)
        patch.setattr(NumpyOps, "choose_rows", noted_choose)
        patch.setattr(NumpyOps, "dsa_select", noted_select)
        yield found


def _experts(ids: np.ndarray, logits: np.ndarray, bias: Any, routing: Any) -> Choice:
    logits = logits.astype(np.float64)
    if routing.sigmoid:
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    last = np.take_along_axis(scores, ids[:, -1:], -1)[:, 0]
    spread = last * (1 - last) * logits.std()  # the slope of softmax and sigmoid alike
    scores = scores if bias is None else scores + bias
    lead = np.full(len(scores), np.inf)
    if routing.n_groups > 1:
        grouped = scores.reshape(len(scores), routing.n_groups, -1)
        best = np.sort(grouped, -1)[..., -2 if routing.sigmoid else -1 :].sum(-1)
        order = -np.sort(-best, -1)
        lead = order[:, routing.n_groups_used - 1] - order[:, routing.n_groups_used]
        kept = best >= order[:, routing.n_groups_used - 1, None]
        scores = np.where(kept[..., None], grouped, -np.inf).reshape(scores.shape)
    return Choice(ids, scores, lead, spread)


@dataclass
class Judge:
    """Imposes `wanted` on a CUDA engine's next forwards, inside `imposing`."""

    wanted: Choices
    own: dict[str, np.ndarray] = field(default_factory=dict)  # what it would have chosen
    n_other: int = 0  # of those, how many are not as wanted; check() counts

    @contextmanager
    def imposing(self, engine: Any) -> Iterator[None]:
        """Uncaptured, as the hooks ask for; each choice is made twice, once without hook."""
        from mlacli.backends.cuda_mla import Attention
        from mlacli.backends.cuda_ops import CudaOps

        ops = engine._ops(0)
        route, choose = CudaOps.route, Attention.choose

        def twice(make: Callable[[], Any], name: str, ids: Callable[[Any], Any]) -> Any:
            given, ops.imposed = ops.imposed, {}
            mark = ops.device.mark()
            own = make()
            if own is not None:
                self.own[name] = ops.device.get(ids(own))
            ops.device.rewind(mark)
            ops.imposed = given
            return make()

        def noted_route(self_: Any, x: Any, gate: Any, *rest: Any) -> Any:
            if len(x) > 8:
                ops.f32(x)  # kept by x: it must not be rewound
            make = lambda: route(self_, x, gate, *rest)  # noqa: E731
            return twice(make, gate.name, lambda chosen: chosen.ids)

        def noted_choose(self_: Any, x: Any, q_a: Any, w: Any, *rest: Any) -> Any:
            for act in (x, q_a):
                if len(act) > 8:
                    ops.f32(act)
            make = lambda: choose(self_, x, q_a, w, *rest)  # noqa: E731
            return twice(make, w.indexer_attn_k.name, lambda chosen: chosen)

        engine.watch = lambda layer, residual: None
        ops.imposed = {name: choice.ids for name, choice in self.wanted.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CudaOps, "route", noted_route)
            patch.setattr(Attention, "choose", noted_choose)
            yield
        engine.watch, ops.imposed = None, {}

    def decoded(self, engine: Any, tokens: list[int]) -> np.ndarray:
        """Logits of the tokens one by one, from an empty cache, with the wanted choices."""
        ops, logits = engine._ops(0), []
        engine.watch = lambda layer, residual: None
        for i, token in enumerate(tokens):
            ops.imposed = {name: one.ids[i : i + 1] for name, one in self.wanted.items()}
            logits.append(engine.decode(token))
        engine.watch, ops.imposed = None, {}
        return np.stack(logits)

    def check(self, error: float) -> str:
        """Own choices differ only where scores with a relative error of sqrt(`error`) may.

        What is chosen instead must score within the bound of the worst that was to be chosen, or
        the groups must be that close. In words: how many differ.
        """
        assert self.own.keys() == self.wanted.keys()
        self.n_other, n_all, closest = 0, 0, 0.0
        for name, want in self.wanted.items():
            bounds = SURE * np.sqrt(error) * want.spread
            for t, (ids, own) in enumerate(zip(want.ids, self.own[name], strict=False)):
                ids = ids[np.isfinite(want.scores[t, ids])]
                limit, bound = want.scores[t, ids].min(), bounds[t]
                other = np.setdiff1d(own[own >= 0], ids)
                self.n_other, n_all = self.n_other + len(other), n_all + len(ids)
                assert len(np.intersect1d(own, ids)) + len(other) == len(ids), (name, t, own, ids)
                if not len(other) or want.lead[t] <= 2 * bound:  # of two scores
                    continue
                behind = limit - want.scores[t, other].min()
                closest = max(closest, behind / bound)
                assert behind <= bound, (name, t, other, behind, bound)
        return f"{self.n_other} of {n_all} choices differ, by {closest:.2f} of the bound at most"
