"""Kullback-Leibler divergence and its statistics, as llama.cpp's perplexity tool counts them.

Pure arithmetic on logits and base log-probabilities; knows no engine and no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mlacli.kld_file import log_softmax

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int32]

_IGNORED = -16.0  # base log-probabilities up to it don't count


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Doubles) -> Estimate:
        """The error is 0 for up to ten values, too few to estimate one."""
        if not len(values):
            return cls(0.0, 0.0)
        mean = float(values.mean())
        variance = float((values * values).mean()) - mean * mean
        enough = variance > 0 and len(values) > 10
        return cls(mean, math.sqrt(variance / (len(values) - 1)) if enough else 0.0)

    def exp(self) -> Estimate:
        value = math.exp(self.value)
        return Estimate(value, value * self.error)


def nll(logits: Floats, targets: Ints) -> Doubles:
    """-log p [m] of each row's target."""
    log_p = log_softmax(logits)[np.arange(len(targets)), targets]
    return -log_p.astype(np.float64)


@dataclass(slots=True)
class Divergence:
    """What has been counted so far, one value per scored token."""

    _nll: list[Doubles] = field(default_factory=list)
    _nll_base: list[Doubles] = field(default_factory=list)
    _kld: list[Doubles] = field(default_factory=list)
    _same_top: list[NDArray[np.bool_]] = field(default_factory=list)

    def add(self, logits: Floats, base: Floats, targets: Ints) -> None:
        """Rows of logits [m, V] against base log-probabilities [m, V]."""
        log_p = log_softmax(logits)
        counts = base > _IGNORED
        terms = np.where(counts, np.exp(base) * (base - log_p), np.float32(0))
        at = np.arange(len(targets)), targets
        self._nll.append(-log_p[at].astype(np.float64))
        self._nll_base.append(-base[at].astype(np.float64))
        self._kld.append(terms.sum(-1, dtype=np.float64))
        self._same_top.append(logits.argmax(-1) == base.argmax(-1))

    @property
    def count(self) -> int:
        return sum(map(len, self._kld))

    @property
    def kld(self) -> Doubles:
        return np.concatenate(self._kld)

    @property
    def p_diff(self) -> Doubles:
        """p - p of the base, of each target."""
        return np.exp(-np.concatenate(self._nll)) - np.exp(-np.concatenate(self._nll_base))

    @property
    def log_ppl(self) -> Estimate:
        return Estimate.of(np.concatenate(self._nll))

    @property
    def log_ppl_base(self) -> Estimate:
        return Estimate.of(np.concatenate(self._nll_base))

    @property
    def covariance(self) -> float:
        """Of the two mean log perplexities; 0 for fewer than ten values."""
        if self.count < 10:
            return 0.0
        a, b = np.concatenate(self._nll), np.concatenate(self._nll_base)
        return float((a * b).mean() - a.mean() * b.mean()) / (self.count - 1)

    @property
    def correlation(self) -> float:
        """nan where one of them has no spread."""
        spread = self.log_ppl.error * self.log_ppl_base.error
        return self.covariance / spread if spread else math.nan

    @property
    def log_ratio(self) -> Estimate:
        """ln(PPL / base PPL)."""
        a, b = self.log_ppl, self.log_ppl_base
        return Estimate(a.value - b.value, _error(a.error, b.error, self.covariance))

    @property
    def ppl_difference(self) -> Estimate:
        """PPL - base PPL."""
        a, b = self.log_ppl.exp(), self.log_ppl_base.exp()
        covariance = a.value * b.value * self.covariance
        return Estimate(a.value - b.value, _error(a.error, b.error, covariance))

    @property
    def mean_kld(self) -> Estimate:
        return Estimate.of(self.kld)

    @property
    def mean_p_diff(self) -> Estimate:
        return Estimate.of(self.p_diff)

    @property
    def rms_p_diff(self) -> Estimate:
        square = Estimate.of(self.p_diff**2)
        root = math.sqrt(square.value)
        return Estimate(root, 0.5 / root * square.error if root else 0.0)

    @property
    def same_top(self) -> Estimate:
        """How often the likeliest token is the same."""
        n, share = self.count, float(np.concatenate(self._same_top).mean())
        return Estimate(share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else 0.0)


def percentile(values: Doubles, percent: float) -> float:
    """Between the two nearest values, linearly."""
    return float(np.percentile(values, percent))


def _error(a: float, b: float, covariance: float) -> float:
    """Of a difference of correlated values; rounding may leave the root's argument below 0."""
    return math.sqrt(max(0.0, a * a + b * b - 2 * covariance))
