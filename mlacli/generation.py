"""Generation: the half of an Engine that chooses tokens. Knows neither ranks nor weights."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlacli.errors import UsageError
from mlacli.flags import library_values, to_params
from mlacli.flags_generation import PROMPT, SAMPLING
from mlacli.params import Params, SamplingParams
from mlacli.sampling import AHEAD, Sampler
from mlacli.timings import Timings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mlacli.loading.tokenizer import Tokenizer

    Floats = NDArray[np.float32]

SAMPLING_FLAGS = (
    *(flag for flag in SAMPLING if not flag.key.endswith("_file")),
    *(flag for flag in PROMPT if flag.key == "ignore_eos"),
)


class Generation(ABC):
    """Tokens and text from a model that an Engine holds; `_ids` are those of the cache."""

    params: Params
    timings: Timings
    context_full: bool
    n_ctx: int
    n_kv: int
    _ids: list[int]
    _turn: int  # grows with each rewind: a generation that lost its cache notices

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer | None: ...

    @abstractmethod
    def prefill(self, ids: Sequence[int], all_rows: bool = False) -> Floats: ...

    @abstractmethod
    def decode(self, token_id: int) -> Floats: ...

    @abstractmethod
    def decode_ahead(self, token_id: int, n: int, sampler: Sampler) -> list[int]: ...

    @abstractmethod
    def rewind(self, n_kv: int) -> None: ...

    def generate_ids(
        self, prompt_ids: Sequence[int], n_predict: int = -1, sampler: Sampler | None = None,
        reuse: bool = False,
    ) -> Iterator[int]:  # fmt: skip
        """Token ids after the prompt, from an empty cache, the end-of-generation one included.

        `reuse` keeps the rows of cached tokens with which the prompt begins; `timings` count the
        others.

        Ends after `n_predict` tokens (negative: no limit) or at a full context, which sets
        `context_full`.
        """
        sampler = sampler or Sampler.for_tokenizer(self.params.sampling, self.tokenizer)
        sampler.begin(prompt_ids)
        eog_ids = frozenset() if sampler.params.ignore_eos else self._eog_ids()
        self.context_full = False
        known = self._n_known(prompt_ids) if reuse else 0
        self.timings = Timings(load_s=self.timings.load_s, n_prompt=len(prompt_ids) - known)
        start = time.perf_counter()
        self.rewind(known)
        logits = self.prefill(prompt_ids[known:])[-1]
        self.timings.prompt_s = time.perf_counter() - start
        n, here = 0, (self._turn, self.n_kv)
        ahead: list[int] = []  # drawn on the device, not yet handed out
        try:
            while n_predict < 0 or n < n_predict:
                if ahead:
                    token_id = ahead.pop(0)
                else:
                    began = time.perf_counter()
                    token_id = sampler.next(logits, self.n_kv)
                    self.timings.sample_s += time.perf_counter() - began
                self.timings.n_sampled += 1
                if n == 0:
                    self.timings.ttft_s = time.perf_counter() - start
                n += 1
                yield token_id
                if token_id in eog_ids or n == n_predict:
                    return
                if (self._turn, self.n_kv) != here:
                    raise UsageError(
                        "another call used the engine during this generation",
                        "finish one generation before the next, or load two engines",
                    )
                if ahead:
                    continue
                if self.n_kv == self.n_ctx:
                    self.context_full = True
                    return
                began = time.perf_counter()
                most = self.n_ctx - self.n_kv if n_predict < 0 else n_predict - n
                ahead = self.decode_ahead(token_id, self._n_ahead(most), sampler)
                if not ahead:
                    logits = self.decode(token_id)
                here = self._turn, self.n_kv
                self.timings.decode_s += time.perf_counter() - began
                self.timings.n_decoded += max(1, len(ahead))
        finally:
            if ahead and (self._turn, self.n_kv) == here:
                self.rewind(self.n_kv - len(ahead))
                self.timings.n_decoded -= len(ahead)

    def _n_ahead(self, most: int) -> int:
        """Tokens to draw at one go: a power of two, less than 50 ms of work, `most` at most."""
        a_token = self.timings.decode_s / max(1, self.timings.n_decoded)
        n = AHEAD
        while n > 1 and (n > most or n * a_token > 0.05):
            n //= 2
        return n

    def generate(
        self, prompt: str | Sequence[int], n_predict: int = -1, **sampling: Any
    ) -> Iterator[str]:
        """Text pieces after the prompt; `sampling` by long flag name (temp=0, top_k=40, ...)."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise UsageError("the file has no tokenizer", "use generate_ids")
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        sampler = Sampler.for_tokenizer(self._sampling(sampling), tokenizer)
        stream = tokenizer.stream()
        for token_id in self.generate_ids(ids, n_predict, sampler):
            if token_id not in tokenizer.eog_ids:
                yield stream.push(token_id)
        yield stream.flush()

    def _n_known(self, prompt_ids: Sequence[int]) -> int:
        """Tokens that the prompt shares with the cache, at least one of its own left to compute."""
        most = min(len(self._ids), len(prompt_ids) - 1)
        return next((i for i in range(most) if self._ids[i] != prompt_ids[i]), max(0, most))

    def _sampling(self, given: dict[str, Any]) -> SamplingParams:
        """The sampling parameters with those of one call in place of the engine's."""
        values = library_values(SAMPLING_FLAGS, given)
        settled = to_params(values).sampling
        names = ("samplers" if key == "sampling_seq" else key for key in values)
        return replace(self.params.sampling, **{name: getattr(settled, name) for name in names})

    def _eog_ids(self) -> frozenset[int]:
        return self.tokenizer.eog_ids if self.tokenizer else frozenset()
