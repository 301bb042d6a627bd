"""The sampler's kernel and its host code, run on the CPU (kit/simt.h)."""

from typing import Any

import pytest

pytest.importorskip("cupy", reason="needs CuPy to read kernels")

from kit import sampling_cases
from kit.launcher import Launcher
from kit.simt import why_not
from kit.simt_device import SimtDevice

from mlacli.backends import cuda_sampling
from mlacli.params import SamplingParams

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture
def ops() -> Launcher:
    return Launcher(SimtDevice())


@pytest.mark.parametrize("n_vocab", [41, 5003])
def test_tokens_are_those_of_the_sampler(ops: Any, n_vocab: int) -> None:
    assert sampling_cases.check(ops, n_vocab, ("", "ties"), 1) == 0


@pytest.mark.parametrize("widths, ended", [((600, 903), 4), ((70, 1100), 7), ((65, 64, 80), 2)])
def test_tokens_drawn_from_candidates_of_several_gpus(
    ops: Any, widths: tuple[int, ...], ended: int
) -> None:
    sampling_cases.check_apart(ops, widths, ended, ("", "ties", "equal"))


def test_banned_ids(ops: Any) -> None:
    sampling_cases.check_banned(ops, 1500)


def test_logits_that_are_not_finite(ops: Any) -> None:
    sampling_cases.check_not_finite(ops, 1500)


def test_chains_that_the_device_has() -> None:
    assert cuda_sampling.can_run(SamplingParams())
    assert cuda_sampling.can_run(SamplingParams(temp=0.0, top_k=0))
    assert not cuda_sampling.can_run(SamplingParams(top_k=0))
    assert not cuda_sampling.can_run(SamplingParams(top_k=1025))
    assert not cuda_sampling.can_run(SamplingParams(), n_banned=59)
