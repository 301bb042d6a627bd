"""The sampler chain on host logits: the definition that device samplers must agree with.

Stages, order and defaults are llama.cpp's (`sampling_stages`). A filter keeps a set of ids, an edit
changes logits, and the draw runs through the kept ids in ascending order, so that nothing sorts
but what must. Random numbers depend on (seed, position) alone. Knows no engine.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mlacli.errors import MlacliError
from mlacli.params import SamplingParams
from mlacli.sampling_stages import (
    ON_DEVICE,
    STAGES,
    Breakers,
    Ids,
    Logits,
    Turn,
    min_p,
    mirostat_kept,
    probabilities,
    stage_is_on,
    temperature,
    top_k,
    top_p,
)

if TYPE_CHECKING:
    from mlacli.loading.tokenizer import Tokenizer

__all__ = ["Sampler", "min_p", "probabilities", "top_k", "top_p", "uniform"]

_DRAW, _XTC = 0, 1  # words of a position's random block
AHEAD = 32  # tokens that a device draws at one go


class Grammar(Protocol):
    """What may follow; `grammar.TokenGrammar` is one."""

    def begin(self) -> None: ...
    def allowed(self) -> NDArray[np.bool_]: ...
    def accept(self, token_id: int) -> None: ...


def uniform(seed: int, position: int, word: int = _DRAW) -> float:
    """A number in [0, 1) that depends on (seed, position, word) alone.

    The top 53 bits of a word of the Philox4x64-10 block with key (seed, 0) and counter
    (position + 1, 0, 0, 0): NumPy steps the counter before its first block.
    """
    words = np.random.Philox(key=[seed, 0], counter=[position, 0, 0, 0]).random_raw(word + 1)
    return float(int(words[word]) >> 11) * 2.0**-53


@dataclass(slots=True)
class _Past:
    """What earlier choices leave behind: the tokens so far, and mirostat's surprise limit."""

    tokens: list[int] = field(default_factory=list)
    limit: float = 0.0


class Sampler:
    """The next token id from logits; `seed` is the one in use, drawn if none was given.

    Penalties, DRY, mirostat and grammars look at what came before: `begin` tells the prompt, and
    `next` adds its own choices.
    """

    def __init__(
        self,
        params: SamplingParams,
        eog_ids: frozenset[int] = frozenset(),
        breakers: Breakers | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        self.params, self.grammar = params, grammar
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self._breakers: Breakers = breakers or {}
        self._bias: dict[int, float] = {}
        for token_id, bias in params.logit_bias:
            self._bias[token_id] = self._bias.get(token_id, 0.0) + bias
        if params.ignore_eos:
            self._bias |= dict.fromkeys(eog_ids, -math.inf)
        forbidden = sorted(i for i, bias in self._bias.items() if bias == -math.inf)
        self.banned = np.array(forbidden, dtype=np.intp)  # what a device may not draw
        self.stages = () if params.mirostat else tuple(
            name for name in params.samplers if stage_is_on(name, params)
        )  # fmt: skip
        self.begin(())

    @classmethod
    def for_tokenizer(cls, params: SamplingParams, tokenizer: Tokenizer | None) -> Self:
        """A sampler that knows the tokenizer's end tokens, and what DRY and grammars need of it."""
        if tokenizer is None:
            if (params.grammar, params.json_schema) != (None, None):
                raise MlacliError("a grammar needs a tokenizer", "the file has none: leave it out")
            return cls(params)
        breakers, grammar = None, None
        if "dry" in params.samplers and stage_is_on("dry", params):
            from mlacli.dry_breakers import dry_breakers

            breakers = dry_breakers(tokenizer, params.dry_sequence_breaker)
        if (params.grammar, params.json_schema) != (None, None):
            from mlacli.grammar import TokenGrammar

            grammar = TokenGrammar(tokenizer, params.grammar, params.json_schema)
        return cls(params, tokenizer.eog_ids, breakers, grammar)

    @property
    def on_host(self) -> tuple[str, ...]:
        """What of this chain a device sampler can't do; empty: top-k, top-p, min-p, temp alone."""
        found = [name for name in self.stages if name not in ON_DEVICE]
        usual = tuple(name for name in ON_DEVICE if stage_is_on(name, self.params))
        if not self.params.mirostat and not found and self.stages != usual:
            found.append("samplers in another order")
        extra = {
            "mirostat": self.params.mirostat,
            "dynatemp": self.params.dynatemp_range > 0,
            "logit bias": any(bias != -math.inf for bias in self._bias.values()),
            "grammar": self.grammar,
        }
        return (*found, *(name for name, on in extra.items() if on))

    def begin(self, tokens: Sequence[int]) -> None:
        """Starts a text over: `tokens` are what was there before the first choice."""
        self._past = _Past(list(tokens), 2 * self.params.mirostat_ent)
        if self.grammar is not None:
            self.grammar.begin()

    def candidates(self, logits: Logits, position: int = 0) -> tuple[Ids, NDArray[np.float64]]:
        """Ids that pass the chain, ascending, and the probability of each."""
        ids: Ids = np.flatnonzero(logits > -np.inf)
        chance = uniform(self.seed, position, _XTC) if "xtc" in self.stages else 1.0
        turn = Turn(self.params, self._past.tokens, self._breakers, chance)
        for name in self.stages:
            logits, ids = STAGES[name].apply(logits, ids, turn)
        if self.params.mirostat:
            logits, ids = temperature(logits, ids, turn)
            ids = mirostat_kept(logits, ids, self._past.limit, self.params)
        return ids, probabilities(logits[ids])

    def next(self, logits: Logits, position: int) -> int:
        """The id that follows; `position` is its place in the context and keys the random number.

        temp <= 0 takes the largest logit, of equals the lowest id.
        """
        logits = self._allowed(logits, position)
        if self.params.temp <= 0 and "temperature" in self.stages and not self.on_host:
            chosen = int(np.argmax(logits))  # no filter of these drops it
        else:
            ids, share = self.candidates(logits, position)
            reached = np.cumsum(share)
            drawn = uniform(self.seed, position) * reached[-1]
            place = min(int(np.searchsorted(reached, drawn, "right")), ids.size - 1)
            chosen = int(ids[place])
            if self.params.mirostat:
                surprise = -math.log2(share[place])
                error = surprise - self.params.mirostat_ent
                self._past.limit -= self.params.mirostat_lr * error
        self._past.tokens.append(chosen)
        if self.grammar is not None:
            self.grammar.accept(chosen)
        return chosen

    def _allowed(self, logits: Logits, position: int) -> Logits:
        """The logits with biases, and -inf for what the grammar forbids; MlacliError for NaN."""
        best = logits[np.argmax(logits)]  # argmax finds a NaN first
        if not np.isfinite(best):
            raise MlacliError(
                f"the logits at position {position} hold {best}",
                "the file is damaged or a number overflowed; try -ctk f32 -gap f32",
            )
        if not self._bias and self.grammar is None:
            return logits
        logits = logits.copy()
        for token_id, bias in self._bias.items():
            if token_id < logits.size:
                logits[token_id] += bias
        if self.grammar is not None:
            allowed = self.grammar.allowed()
            logits[: allowed.size][~allowed[: logits.size]] = -np.inf
            logits[allowed.size :] = -np.inf
        if not np.isfinite(logits.max()):
            raise MlacliError(
                f"no token may follow at position {position}",
                "the grammar, -l or --ignore-eos forbid all of them",
            )
        return logits
