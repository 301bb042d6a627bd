"""Sums and gathers among the CUDA ranks of -sm graph, whose forwards run in lockstep.

When all ranks have brought their partial, one of them launches the sum of each GPU, between joining
the streams of the ranks on it and forking them again. `Collectives` is how GPUs reach each other;
`SharedGpu` its form for ranks on one GPU alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mlacli.backends import cuda_sampling
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_device import Device
from mlacli.errors import RankError
from mlacli.parallel.lockstep import Lockstep

if TYPE_CHECKING:
    from mlacli.backends.cuda_acts import Act
    from mlacli.backends.cuda_group import Mail
    from mlacli.backends.cuda_ops import CudaOps
    from mlacli.backends.cuda_place import Place
    from mlacli.params import SamplingParams

TYPED_FROM = 33  # tokens whose partials are rounded to -grt's type: as numpy_ops.reduce_typed
_TYPES = {"f32": 0, "f16": 1, "bf16": 2, "q8_0": 3}  # of kernels/shared_gpu.cu
_MOST_RANKS = 63  # bits of `held`


class Collectives(Protocol):
    """What ranks ask of the way between their GPUs. Equal bits on all ranks, from run to run."""

    how: str  # p2p, nccl, host; or shared, for ranks on one GPU
    why: str

    def slot(self, rank: int) -> Array:
        """Where the rank's partial of the next sum is to be written, float32, dense."""
        ...

    def mail(self, rank: int, shape: tuple[int, ...]) -> Mail | None:
        """Where a product may send it by itself, as the last launch before the sum."""
        ...

    def lone(self) -> bool:
        """Whether every GPU has one rank, of its own number, that sends by itself."""
        ...

    def reduce_add(
        self, gpu_index: int, streams: list[Array], held: tuple[bool, ...], n_floats: int,
        rounded: bool | None = None, sent: bool = False,
    ) -> None:  # fmt: skip
        """Each of the residual streams [n, d] on this GPU += all partials, in rank order.

        `rounded` None: to the reduce type where rows are many. `sent`: this GPU's are in the mail.
        """
        ...

    def gather(
        self, gpu_index: int, columns: list[Array | None], widths: list[int], out: Array
    ) -> None:
        """out [n, V] = all ranks' columns [n, width] beside each other."""
        ...

    def check(self) -> None:
        """RankError when a GPU waited too long for another one."""
        ...

    def stop(self) -> bool:
        """Ends all waits: what runs will not be used. Whether all memory may be freed after it."""
        ...

    def reset(self) -> None:
        """Ready again after a failure, when no GPU runs anything any more."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Brought:
    """What a rank brings to a sum: its residual stream, and its partial, which nobody launched yet.

    `experts`: the ids that it chose since the last one.
    """

    stream: Array
    partial: Act | None
    experts: Array | None = None


class Together:
    """The ranks that step together: `places` and `collectives` are known once they are open."""

    places: Sequence[Place]
    collectives: Collectives

    def __init__(self, lockstep: Lockstep, widths: Sequence[int], compares: bool) -> None:
        """`widths`: vocabulary rows of each rank. `compares`: what must be equal on all ranks is

        read back after every sum, which no captured step can do.
        """
        self.lockstep, self.widths, self.compares = lockstep, list(widths), compares
        self._apart = False  # whether logits stay where they are computed

    def reduce(self, brought: Sequence[Brought]) -> None:
        held = tuple(one.partial is not None for one in brought)
        for gpu, place in enumerate(self.places):
            sent = [self._bring(place, rank, brought[rank]) for rank in place.ranks]
            place.join()
            streams = [brought[rank].stream for rank in place.ranks]
            self.collectives.reduce_add(gpu, streams, held, streams[0].size, sent=all(sent))
            place.fork()
        if self.compares and not self.places[0].is_dry:
            self._compare("residual streams", {r: one.stream for r, one in enumerate(brought)})
            ids = {r: one.experts for r, one in enumerate(brought) if one.experts is not None}
            self._compare("chosen experts", ids)

    def _bring(self, place: Place, rank: int, one: Brought) -> bool:
        """Launches a rank's partial, if it has one; whether that goes into the mail."""
        if one.partial is None:
            return False
        place.device.use()
        mail = self.collectives.mail(rank, one.stream.shape)
        if mail is not None and one.partial.send is not None:
            one.partial.send(mail)
            return True
        assert one.partial.run is not None, "partials are products that nobody asked for yet"
        slot = self.collectives.slot(rank)[: one.stream.size]
        one.partial.run(slot.reshape(*one.stream.shape), False)
        return False

    def _compare(self, what: str, of_rank: Mapping[int, Array]) -> None:
        """RankError when ranks differ in what all of them computed."""
        found: dict[int, bytes] = {}
        for place in self.places:
            place.join()
            found |= {
                r: place.device.get(of_rank[r]).tobytes() for r in place.ranks if r in of_rank
            }
            place.fork()
        first = next(iter(found.values()), b"")
        for rank, same in found.items():
            if same != first:
                raise RankError(rank, ValueError(f"its {what} are not those of the first rank"))

    def draws_apart(self, sampling: SamplingParams) -> bool:
        """Whether a token can be drawn without joining the logits."""
        return self.collectives.lone() and cuda_sampling.can_exchange(sampling, self.widths)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, what gather gives to a rank are its own columns."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    def sample(self, columns: Sequence[Array | None]) -> None:
        """The next step's token of each place, drawn from its rank's columns and the others'."""
        for (rank, place), own in zip(enumerate(self.places), columns, strict=True):
            mail = self.collectives.mail(rank, (1, 1))
            assert mail is not None and own is not None, "draws_apart() was asked"
            place.sample(own, mail, sum(self.widths[:rank]))

    def gather(self, brought: Sequence[tuple[Array | None, int]]) -> list[Array]:
        """Of each rank its columns, and how many rows there are; for each rank the logits."""
        n = brought[0][1]
        found: dict[int, Array] = {}
        if self._apart:
            return [columns for columns, _ in brought if columns is not None]
        for gpu, place in enumerate(self.places):
            place.join()
            out = place.device.take((n, sum(self.widths)), np.float32)
            columns = [brought[rank][0] for rank in place.ranks]
            if n:  # a ubatch whose logits nobody wants
                self.collectives.gather(gpu, columns, self.widths, out)
            place.fork()
            found |= dict.fromkeys(place.ranks, out)
        return [found[rank] for rank in range(len(brought))]


class Peers:
    """The others, as one rank sees them; called in lockstep."""

    def __init__(self, together: Together, rank: int, device: Device) -> None:
        self.together, self.rank, self.device = together, rank, device
        self.n_reductions = 0

    def reduce_add(self, mine: Brought) -> None:
        """stream += the sum of all ranks' partials."""
        self.n_reductions += 1
        self.together.lockstep.meet(self.rank, mine, self.together.reduce)
        self.device.use()  # the last to come has launched for every GPU

    def gather(self, columns: Array | None, n: int) -> Array:
        """All ranks' columns [n, V]."""
        found = self.together.lockstep.meet(self.rank, (columns, n), self.together.gather)
        self.device.use()
        return found[self.rank]


class SharedGpu:
    """Collectives of ranks on one GPU: an ordinary kernel on memory that all of them see."""

    how, why = "shared", "all ranks are on one GPU"

    def __init__(self, ops: Sequence[CudaOps], most: int, reduce_type: str) -> None:
        """For steps of at most `most` tokens; the residual streams of `ops` stay where they are."""
        assert len(ops) <= _MOST_RANKS
        self.ops, self._type = ops, _TYPES[reduce_type]
        shape = (most * ops[0].hp.d,)
        self._slots = [rank.device.take(shape, np.float32) for rank in ops]
        self._streams = [rank.stream for rank in ops]
        self._at = [ops[0].put(np.array([x.ptr for x in of], np.int64))
                    for of in (self._slots, self._streams)]  # fmt: skip

    def slot(self, rank: int) -> Array:
        return self._slots[rank]

    def mail(self, rank: int, shape: tuple[int, ...]) -> Mail | None:
        return None

    def lone(self) -> bool:
        return False

    def reduce_add(
        self, gpu_index: int, streams: list[Array], held: tuple[bool, ...], n_floats: int,
        rounded: bool | None = None, sent: bool = False,
    ) -> None:  # fmt: skip
        known = zip(streams, self._streams, strict=True)
        assert all(stream.ptr == at.ptr for stream, at in known), "streams don't move"
        type_ = self._type if len(streams[0]) >= TYPED_FROM else 0
        self.ops[0].run(
            "add_partials", (-(-n_floats // 256),), 256, *self._at, n_floats, len(streams),
            sum(has << rank for rank, has in enumerate(held)), TYPE=type_,
        )  # fmt: skip

    def gather(
        self, gpu_index: int, columns: list[Array | None], widths: list[int], out: Array
    ) -> None:
        first = 0
        for own, width in zip(columns, widths, strict=True):
            if own is not None:
                grid = (-(-width // 256), len(out))
                self.ops[0].run("join_columns", grid, 256, out, own, width, sum(widths), first)
            first += width

    def check(self) -> None:
        """Nobody waits for anybody."""

    def stop(self) -> bool:
        return True

    def reset(self) -> None:
        """Nothing is counted."""

    def close(self) -> None:
        """Its memory is the arenas'."""
