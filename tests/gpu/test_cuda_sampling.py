"""The sampler on a GPU draws the tokens that the Sampler draws."""

from typing import Any

import pytest
from kit import sampling_cases


@pytest.mark.parametrize("n_vocab", [300, 32003, 102400, 154880, 200001])
def test_tokens_are_those_of_the_sampler(ops: Any, n_vocab: int) -> None:
    kinds = ("", "flat", "ties", "equal", "peak")
    assert sampling_cases.check(ops, n_vocab, kinds, 4) <= 3  # of 140


def test_banned_ids(ops: Any) -> None:
    sampling_cases.check_banned(ops, 102400)


def test_logits_that_are_not_finite(ops: Any) -> None:
    sampling_cases.check_not_finite(ops, 102400)
