"""Place: the ranks on one GPU that step together, and what they read of a step.

Each rank launches on a stream of its own. A step forks them from the first one's, every sum joins
and forks them, the step's end joins them; so all of it can be captured into one graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlacli.backends import cuda_sampling
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_device import Device, Host
from mlacli.ops import Step

if TYPE_CHECKING:
    from mlacli.backends.cuda_group import Mail
    from mlacli.backends.cuda_ops import CudaOps
    from mlacli.params import SamplingParams


class Place:
    """`ops` of `ranks`, for steps of at most `most` tokens; the first one's memory holds inputs."""

    def __init__(
        self, ranks: Sequence[int], ops: Sequence[CudaOps], most: int, frequencies: Host
    ) -> None:
        self.ranks, self.ops, self.most = tuple(ranks), tuple(ops), most
        self.device: Device = ops[0].device
        self.device.use()
        for one in ops:
            one.take_buffers(most)
        self._frequencies = ops[0].put(np.array(frequencies, np.float64))
        self.inputs = self.device.take((3 * most,), np.int32)  # tokens, positions, wanted rows
        self.sampler = cuda_sampling.new_state(self.device.take, self.inputs[:1], self.inputs[1:2])
        self._chain: tuple[Any, ...] = ()  # what the sampler's chain was made of
        self._bases: list[int] = []  # where the ranks' scratch begins
        self._n = 0  # real tokens of the step under way
        self.is_dry = False  # launches are only noted

    def settle(self) -> None:
        """Everything that stays has been taken."""
        self._bases = [one.device.mark() for one in self.ops]

    def fill(self, inputs: Host, n: int) -> None:
        """`inputs` [3, size] of a step of `n` real tokens."""
        self.device.use()
        size = inputs.shape[1]
        self.device.copy_in(self.inputs[: 3 * size], inputs.reshape(-1))
        self.expect(n)

    def expect(self, n: int) -> None:
        """A step of `n` real tokens follows."""
        self._n = n

    def begin(self, size: int, n_kv: int, n_out: int) -> Step:
        """The first launches of a step."""
        self.device.use()
        inputs = self.inputs[: 3 * size].reshape(3, size)
        for one, base in zip(self.ops, self._bases, strict=True):
            one.device.rewind(base)
            one.begin_step(self._n, inputs[1])
        half, first = len(self._frequencies), self.ops[0]
        cos, sin = first.new((size, half)), first.new((size, half))
        first.run(
            "rope_table_f32", (size,), min(512, half), cos, sin, inputs[1], self._frequencies, half
        )
        self.fork()
        wanted: Any = inputs[2, :n_out]
        return Step(inputs[0], inputs[1], cos, sin, size, n_kv, wanted)

    def fork(self) -> None:
        """What the ranks launch from now on follows what the first one has."""
        for other in self.ops[1:]:
            other.device.follow(self.device)

    def join(self) -> None:
        """What the first rank launches from now on follows what all have; for this thread."""
        self.device.use()
        for other in self.ops[1:]:
            self.device.follow(other.device)

    def set_chain(
        self, sampling: SamplingParams, seed: int, n_vocab: int, banned: Iterable[int]
    ) -> None:
        """The sampler's settings, where they aren't those already."""
        chain = sampling, seed, n_vocab, tuple(sorted(banned))
        if chain != self._chain:
            self.device.use()
            self.device.copy_in(self.sampler.chain, cuda_sampling.chain_words(*chain))
            self._chain = chain

    def sample(self, logits: Array, mail: Mail | None = None, first: int = 0) -> None:
        """The next step's token, drawn from logits [1, V]; with a mail, of columns from `first`."""
        self.device.use()
        cuda_sampling.next_token(self.ops[0], logits, self.sampler, mail, first)
