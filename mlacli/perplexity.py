"""Perplexity as llama.cpp's tool computes it, KL divergence to a base, and modes compared.

Yields numbers after every chunk and prints nothing. Logits are scored as they come from the engine,
ubatch by ubatch, so that a large vocabulary never meets a whole chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mlacli.errors import MemoryBudgetError, MlacliError, UsageError
from mlacli.kl_divergence import Divergence, Doubles, Floats, Ints, nll
from mlacli.kld_file import BaseFile, BaseWriter, log_softmax

if TYPE_CHECKING:
    from mlacli.engine import Engine
    from mlacli.parallel.plan import ShardPlan

_VALUES = 1 << 22  # logits that are scored at once
BEYOND_ROUNDING = 1e-3  # relative difference of two residual streams


@dataclass(frozen=True, slots=True)
class Chunks:
    """A text cut into windows of n_ctx tokens, and which of them count.

    Without a stride windows follow one another and the second half of each counts; BOS takes the
    place of each first token where the vocabulary wants one. With a stride they overlap, the last
    `stride` tokens of each count and no BOS is added, as there.
    """

    tokens: Ints
    n_ctx: int
    n_chunks: int
    bos: int | None = None
    stride: int = 0

    def window(self, i: int) -> tuple[list[int], int, Ints]:
        """(ids, first scored row, the tokens that follow the scored rows)."""
        start = i * (self.stride or self.n_ctx)
        stop = start + self.n_ctx
        ids = self.tokens[start:stop].tolist()
        if self.bos is not None and not self.stride:
            ids[0] = self.bos
        first = self.n_ctx - self.stride - 1 if self.stride else self.n_ctx // 2
        return ids, first, self.tokens[start + first + 1 : stop]


def cut(
    tokens: Sequence[int], n_ctx: int, bos: int | None, limit: int = -1, stride: int = 0
) -> Chunks:
    """All chunks of a text, at most `limit` (-1: no limit); two windows of text are needed."""
    if len(tokens) < 2 * n_ctx:
        raise MlacliError(
            f"the text has {len(tokens)} tokens, {2 * n_ctx} are needed for a window of {n_ctx}",
            "give a longer text, or a smaller -c",
        )
    if stride >= n_ctx:
        raise UsageError(
            f"a stride of {stride} is no smaller than the window of {n_ctx}",
            "give a smaller --ppl-stride",
        )
    n = -(-(len(tokens) - n_ctx) // stride) if stride else len(tokens) // n_ctx
    n_chunks = n if limit < 0 else min(n, limit)
    return Chunks(np.array(tokens, np.int32), n_ctx, n_chunks, bos, stride)


def check_logits_memory(plan: ShardPlan, n_vocab: int) -> None:
    """MemoryBudgetError when a ubatch's logits don't fit beside the plan, which counts one row.

    Two copies: a rank's own and the gathered ones.
    """
    last = plan.ranks[-1]
    need = last.resident + 2 * 4 * plan.n_ubatch * n_vocab
    if need > last.capacity:
        raise MemoryBudgetError(
            last.device, need, last.capacity,
            f"scoring needs the logits of all {plan.n_ubatch} tokens of a ubatch: lower -ub",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `count` tokens; `error` nan for too few."""

    count: int
    total: float  # of -log p
    squares: float

    def plus(self, values: Doubles) -> Perplexity:
        return Perplexity(
            self.count + len(values),
            self.total + float(values.sum()),
            self.squares + float((values * values).sum()),
        )

    @property
    def value(self) -> float:
        return math.exp(self.total / self.count)

    @property
    def error(self) -> float:
        mean = self.total / self.count
        variance = self.squares / self.count - mean * mean
        if variance <= 0 or self.count < 2:
            return math.nan
        return self.value * math.sqrt(variance / (self.count - 1))


NOTHING = Perplexity(0, 0.0, 0.0)


def _scored(engine: Engine, chunks: Chunks, i: int) -> Iterator[tuple[int, Floats, Ints]]:
    """(row number within the chunk, logits [m, V], targets [m]) until all scored rows are done."""
    ids, first, targets = chunks.window(i)
    engine.rewind(0)
    at = 0
    for logits in engine.stream_logits(ids, first):
        for rows, wanted in _blocks(logits, targets[at:]):
            yield at, rows, wanted
            at += len(rows)


def _blocks(logits: Floats, targets: Ints) -> Iterator[tuple[Floats, Ints]]:
    """Pieces of at most _VALUES logits; rows without a target (the last of a window) are left."""
    step = max(1, _VALUES // logits.shape[-1])
    for a in range(0, min(len(logits), len(targets)), step):
        wanted = targets[a : a + step]
        rows = logits[a : a + step][: len(wanted)]
        yield rows, wanted[: len(rows)]


def perplexity(
    engine: Engine, chunks: Chunks, writer: BaseWriter | None = None
) -> Iterator[Perplexity]:
    """The estimate after each chunk; scored rows go to `writer` too."""
    so_far = NOTHING
    for i in range(chunks.n_chunks):
        for _, logits, targets in _scored(engine, chunks, i):
            so_far = so_far.plus(nll(logits, targets))
            if writer is not None:
                writer.write(logits)
        yield so_far


def base_chunks(base: BaseFile, n_vocab: int, bos: int | None, limit: int = -1) -> Chunks:
    """The chunks of a base file; MlacliError where it is of another vocabulary."""
    if base.n_vocab != n_vocab:
        raise MlacliError(
            f"{base.path} is of a vocabulary of {base.n_vocab} tokens, the model has {n_vocab}",
            "compare models of one vocabulary",
        )
    tokens = np.asarray(base.tokens).reshape(-1)
    if (bad := tokens[(tokens < 0) | (tokens >= n_vocab)]).size:
        raise MlacliError(f"{base.path} names token {bad[0]}, there are {n_vocab}", "it is damaged")
    n_chunks = base.n_chunks if limit < 0 else min(limit, base.n_chunks)
    return Chunks(tokens, base.n_ctx, n_chunks, bos)


def check_same_text(base: BaseFile, tokens: Sequence[int]) -> None:
    """MlacliError when `tokens` don't begin as those of the base file do."""
    theirs = np.asarray(base.tokens).reshape(-1)
    ours = np.array(tokens[: len(theirs)], np.int32)
    if len(ours) < len(theirs):
        raise MlacliError(
            f"{base.path} has {len(theirs)} tokens, the text only {len(ours)}",
            "it is of another text or tokenizer; leave -f out to use its own tokens",
        )
    if (ours != theirs).any():
        i = int((ours != theirs).argmax())
        raise MlacliError(
            f"{base.path} has token {theirs[i]} at position {i}, the text {ours[i]}",
            "it is of another text or tokenizer; leave -f out to use its own tokens",
        )


def kl_divergence(engine: Engine, base: BaseFile, chunks: Chunks) -> Iterator[Divergence]:
    """What is counted after each chunk (one object, growing)."""
    counted = Divergence()
    for i in range(chunks.n_chunks):
        for at, logits, targets in _scored(engine, chunks, i):
            counted.add(logits, base.log_probs(i, at, at + len(logits)), targets)
        yield counted


@dataclass(slots=True)
class Compared:
    """One mode against the first; `layers`: layer -> largest relative difference, 0 = same bits."""

    mode: str
    ppl: Perplexity = NOTHING
    divergence: Divergence = field(default_factory=Divergence)
    max_logit_diff: float = 0.0
    layers: dict[int, float] = field(default_factory=dict)

    def first_layer(self, above: float = 0.0) -> int | None:
        """The first layer whose residual stream differs by more than `above`."""
        return min((layer for layer, diff in self.layers.items() if diff > above), default=None)

    def see(self, layer: int, ours: Any, theirs: Any) -> None:
        """Residuals [n, d] of this mode and of the first after `layer`."""
        diff = 0.0
        if not np.array_equal(ours, theirs):
            norm = float(np.linalg.norm(theirs.astype(np.float64)))
            diff = float(np.linalg.norm(ours.astype(np.float64) - theirs)) / max(norm, 1e-30)
            diff = math.inf if math.isnan(diff) else diff
        self.layers[layer] = max(self.layers.get(layer, 0.0), diff)


def compare(engines: Sequence[Engine], chunks: Chunks) -> Iterator[list[Compared]]:
    """Every mode against the first, ubatch by ubatch; the list grows with each chunk.

    One ubatch's residual streams of the first mode are kept: n_layer * n_ubatch * d floats.
    """
    found = [Compared(str(engine.params.split.mode)) for engine in engines]
    kept: dict[int, Any] = {}
    engines[0].watch = lambda layer, x: kept.update({layer: np.array(x)})
    for engine, one in zip(engines[1:], found[1:], strict=True):
        engine.watch = lambda layer, x, one=one: one.see(layer, np.asarray(x), kept[layer])
    for i in range(chunks.n_chunks):
        ids, first, targets = chunks.window(i)
        for engine in engines:
            engine.rewind(0)
        streams = [engine.stream_logits(ids, first) for engine in engines]
        at = 0
        while at < len(targets):
            outs = []
            for engine, stream in zip(engines, streams, strict=True):
                engine.take_turn()
                outs.append(next(stream))
            _count(found, outs, targets[at:])
            at += len(outs[0])
        yield found


def _count(found: list[Compared], outs: list[Floats], targets: Ints) -> None:
    """One ubatch of every mode."""
    base = [(rows, log_softmax(rows)) for rows, _ in _blocks(outs[0], targets)]
    for one, logits in zip(found, outs, strict=True):
        pieces = zip(_blocks(logits, targets), base, strict=True)
        for (rows, wanted), (base_rows, base_log_p) in pieces:
            one.ppl = one.ppl.plus(nll(rows, wanted))
            one.divergence.add(rows, base_log_p, wanted)
            diff = np.abs(rows - base_rows).max()  # np.maximum: a nan must not be lost
            one.max_logit_diff = float(np.maximum(one.max_logit_diff, diff))
