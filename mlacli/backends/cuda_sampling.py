"""Sampling on a CUDA device: launches of kernels/sample.cu, with sampling.py's chain and numbers.

One launch turns logits into the next token id where the next step's embed reads it, writes it to a
ring that the host reads after several steps, and advances the position. The chain lies in device
memory, so one captured step serves all settings. Chains without top-k (or one of more than 1024),
unless greedy, run on the host: they would sort the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_group import Mail
from mlacli.errors import MlacliError

if TYPE_CHECKING:
    from mlacli.params import SamplingParams

RING = 64  # tokens; a power of two above the steps of one launch
_MOST = 1024  # candidates, kernels/sample.cu
_WORDS, _HEAD = 64, 6  # of the chain in device memory


@dataclass(frozen=True, slots=True)
class SamplerState:
    """What a step's end and the next one's start share: token [1] and pos [1], the ring, the chain.

    Before a step pos is the position of its token; after `next_token`, that of the drawn one.
    """

    token: Array
    pos: Array
    ring: Array
    chain: Array


def can_run(params: SamplingParams, n_banned: int = 0) -> bool:
    """Whether the device has this chain: greedy, or one that starts with a top-k of 1 to 1024."""
    return n_banned <= _WORDS - _HEAD and (params.temp <= 0 or 1 <= params.top_k <= _MOST)


def new_state(take: Any, token: Array, pos: Array) -> SamplerState:
    """`take(shape, dtype)` as Arena.take; token and pos: a one-token step's own inputs."""
    return SamplerState(token, pos, take((RING,), np.int32), take((_WORDS,), np.int64))


def chain_words(
    params: SamplingParams, seed: int, n_vocab: int, banned: Iterable[int] = ()
) -> NDArray[np.int64]:
    """The chain as kernels/sample.cu reads it; `banned` as the Sampler's eog ids under ignore_eos.

    Copy it to SamplerState.chain before the first step of a generation.
    """
    ids = sorted(banned)
    assert can_run(params, len(ids)), "the engine asks can_run"
    words = np.zeros(_WORDS, np.int64)
    lowest = math.log(params.min_p) if params.min_p > 0 else -math.inf
    words[:3].view(np.float64)[:] = params.temp, params.top_p, lowest
    philox: Any = np.random.Philox(key=[seed, 0]).state  # its key: NumPy rounds seeds from 2^63 on
    words[3:4].view(np.uint64)[0] = philox["state"]["key"][0]
    words[4], words[5] = min(params.top_k, n_vocab), len(ids)
    words[_HEAD : _HEAD + len(ids)] = ids
    return words


def next_token(
    ops: Any, logits: Array, state: SamplerState, mail: Mail | None = None, first: int = 0
) -> None:
    """One launch: draws from logits [V] or [1, V], which it may overwrite.

    With a mail logits are this GPU's columns, from id `first` on: see can_exchange.
    """
    cluster = 8 if ops.capability >= 90 else 1
    sends = {} if mail is None else {"SEND_TO": mail.n_gpus}
    ops.run(
        "sample", (cluster,), 1024, state.token, state.pos, state.ring, logits, state.chain,
        logits.size, RING, first, None if mail is None else mail.words, CLUSTER=cluster, **sends,
    )  # fmt: skip


def can_exchange(params: SamplingParams, widths: Sequence[int]) -> bool:
    """Whether GPUs with that many columns each can draw from candidates that they exchange."""
    k = 1 if params.temp <= 0 else params.top_k
    return k <= min(widths) and k * len(widths) <= _MOST


def produced(ring: NDArray[np.int32], first: int, count: int) -> list[int]:
    """The tokens at positions first .. first + count - 1 from a host copy of the ring."""
    assert count <= RING, "older tokens are overwritten"
    ids = [int(ring[at % RING]) for at in range(first, first + count)]
    if -1 in ids:
        raise MlacliError(
            f"the logits at position {first + ids.index(-1)} hold NaN or infinity",
            "the file is damaged or a number overflowed; try -ctk f32 -gap f32",
        )
    return ids
