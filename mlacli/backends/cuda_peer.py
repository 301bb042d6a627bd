"""Own kernels between GPUs: memory that the others reach, and which kernel takes which message.

Short messages are pushed into the others' mail (kernels/reduce_peer.cu), long ones read where they
are (kernels/reduce_pull.cu). Without peer access the mail lies in page-locked host memory and long
messages travel in pieces. See kernels/include/peers.cuh for the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_group import (
    MOST_RANKS,
    REDUCE_TYPES,
    Group,
    Mail,
    bits,
    pointers,
    power_of_two,
)

if TYPE_CHECKING:
    from mlacli.backends.cuda_peer_memory import PeerMemory

# Messages of more floats are read where they are instead of pushed: measured on two GPUs
# (kernels/README.md); of more GPUs each is sent to all others, so the edge lies lower.
PUSHED = 192 << 10
_TABLE, _HEAD = 256, 1024  # bytes: a GPU's own words; these and the addresses of all mails
_POST = 16  # bytes before what Post reads of its own words (kernels/include/post.cuh)
ROOM = PUSHED  # floats of a rank's packets in an inbox
SENT = 16 << 10  # floats up to which a product sends its partial itself
CTAS, _FLAGS = 128, 2 * 16 * 128 * 4  # as in peers.cuh


class PeerWay:
    """The kernels of kernels/*_peer.cu and reduce_pull.cu on memory of their own."""

    def __init__(
        self, group: Group, max_floats: int, memory: PeerMemory, through_host: bool = False
    ) -> None:
        self.group, self.memory, self.through_host = group, memory, through_host
        self.stride = max_floats
        n = len(group.gpus)
        self.push_block, self.pull_block = 128, 512  # threads of a CTA
        self.products_send = not through_host
        self.shots = 1 if n <= 2 else 2  # of sums that are pulled
        self.pushed = PUSHED // max(1, n - 1)
        self.ctas = power_of_two(min(gpu.device.n_sm for gpu in group.gpus), CTAS)
        self.mail_bytes = _FLAGS + 2 * group.n_ranks * ROOM * 8 if n > 1 else 0
        self.alarm = memory.page(64)
        self.pages: list[Any] = []
        self.heads: list[int] = []  # of each GPU: own words, addresses, slots
        self.mails: list[int] = []
        self.nbytes: list[int] = []
        for gpu in group.gpus:
            slots = _HEAD + len(gpu.ranks) * self.stride * 4
            if through_host:
                self.pages.append(memory.page(self.mail_bytes))
            self.nbytes.append(slots if through_host else slots + self.mail_bytes)
            self.heads.append(memory.take(gpu.index, self.nbytes[-1]))
            self.mails.append(self.pages[-1].ptr if through_host else self.heads[-1] + slots)
        self.homes = sum(group.home(rank) << 4 * rank for rank in range(group.n_ranks))
        self.homes -= self.homes >> 63 << 64  # as a signed number
        self.own = [Array.dense(at, (_TABLE,), np.uint8) for at in self.heads]
        self.tables = [Array.dense(at + _TABLE, (_HEAD - _TABLE,), np.uint8) for at in self.heads]
        self.reset()

    # ---- memory -----------------------------------------------------------------------------

    def reset(self) -> None:
        firsts = [gpu.ranks[0] for gpu in self.group.gpus]
        partials = [self.slot(rank).ptr for rank in range(self.group.n_ranks)]
        words = [*self.mails, self.alarm.ptr, *partials, *(partials[rank] for rank in firsts)]
        for page in (self.alarm, *self.pages):
            page.bytes[:] = 0
        for gpu, own, table, mail in zip(
            self.group.gpus, self.own, self.tables, self.mails, strict=True
        ):
            self.memory.clear(gpu.index, own.ptr, own.nbytes)
            self.memory.write(gpu.index, table.ptr, np.array(words, np.uint64))
            post = self._post(gpu.ranks[0], mail + _FLAGS)
            self.memory.write(gpu.index, own.ptr + _POST, np.array(post, np.uint64))
            if not self.through_host and self.mail_bytes:
                self.memory.clear(gpu.index, mail, self.mail_bytes)

    def _post(self, rank: int, inbox: int) -> list[int]:
        """What products of the GPU of this rank need to know, from PeerOwn.apart on."""
        room, me = ROOM * 8, self.group.home(rank)
        words = [self.group.n_ranks * room, room, inbox, self.alarm.ptr]
        words.append(me + (self.group.limit_ms << 32))
        return words + [to + _FLAGS + rank * room for to in self.mails]

    def slot(self, rank: int) -> Array:
        gpu = self.group.home(rank)
        at = self.group.gpus[gpu].ranks.index(rank)
        return Array.dense(
            self.heads[gpu] + _HEAD + at * self.stride * 4, (self.stride,), np.float32
        )

    def stop(self) -> bool:
        """Kernels that wait look at the alarm now and then."""
        self.alarm.bytes[:4].view(np.int32)[0] = 1
        return True

    def close(self) -> None:
        self.memory.close()

    def failed(self) -> int | None:
        word = int(self.alarm.bytes[:4].view(np.int32)[0])
        return word - 1 if word else None

    # ---- sums -------------------------------------------------------------------------------

    def mail(self, rank: int, n: int) -> Mail | None:
        """Where a product sends the rank's partial of n floats itself; None: it fills the slot."""
        gpu = self.group.home(rank)
        if not self.products_send or n > SENT or len(self.group.gpus[gpu].ranks) > 1:
            return None
        return Mail(self.own[gpu], len(self.group.gpus))

    def lone(self) -> bool:
        """Whether every GPU has one rank, of its own number, that sends by itself."""
        return self.products_send and all(g.ranks == [i] for i, g in enumerate(self.group.gpus))

    def reduce_add(
        self, gpu: int, streams: Sequence[Array], held: Sequence[bool], n: int, rounded: bool,
        sent: bool = False,
    ) -> None:  # fmt: skip
        n_gpus = len(self.group.gpus)
        if sent:
            self._gather_sent(gpu, streams[0], held, n)
        elif n_gpus == 1 or n <= self.pushed:
            self._push(gpu, streams, held, 0, n, rounded)
        elif self.through_host:
            for first in range(0, n, ROOM):
                self._push(gpu, streams, held, first, min(ROOM, n - first), rounded)
        else:
            self._pull(gpu, streams, held, n, rounded)

    def _push(
        self, gpu: int, streams: Sequence[Array], held: Sequence[bool], first: int, n: int,
        rounded: bool,
    ) -> None:  # fmt: skip
        """The floats `first` to `first + n` of the message."""
        group, place = self.group, self.group.gpus[gpu]
        slots = Array.dense(self.heads[gpu] + _HEAD + 4 * first, (1,), np.float32)
        place.device.launch(
            "reduce_few", (self._push_ctas(n),), self.push_block, *pointers(streams, 4 * first),
            slots, self.tables[gpu], self.own[gpu], gpu, group.bits(gpu), bits(held),
            group.silent(held), n, self.homes, self.stride, ROOM,
            group.limit_ms, N_GPUS=len(group.gpus), N_RANKS=group.n_ranks, N_MINE=len(place.ranks),
            REDUCE_TYPE=REDUCE_TYPES[group.reduce_type] if rounded else 0,
        )  # fmt: skip

    def _gather_sent(self, gpu: int, stream: Array, held: Sequence[bool], n: int) -> None:
        """The GPU's own partial is in the mail already, from the launch before."""
        group, place = self.group, self.group.gpus[gpu]
        ctas = self._push_ctas(n)
        place.device.launch(
            "reduce_sent", (ctas,), -(-n // (64 * ctas)) * 32, stream, self.tables[gpu],
            self.own[gpu], gpu, bits(held), group.silent(held), n, self.homes, ROOM,
            group.limit_ms, N_GPUS=len(group.gpus), N_RANKS=group.n_ranks,
        )  # fmt: skip

    def _push_ctas(self, n: int) -> int:
        """The same in all forms of a sum, as CTAs of different GPUs look for each other."""
        most = CTAS if len(self.group.gpus) > 1 else 1 << 14
        return power_of_two(-(-n // (4 * self.push_block)), most)

    def _pull(
        self, gpu: int, streams: Sequence[Array], held: Sequence[bool], n: int, rounded: bool
    ) -> None:
        group, place = self.group, self.group.gpus[gpu]
        place.device.launch(
            "reduce_many", (self.ctas,), self.pull_block, *pointers(streams), self.tables[gpu],
            self.own[gpu], gpu, bits(held), n, group.limit_ms, N_GPUS=len(group.gpus),
            N_RANKS=group.n_ranks, N_MINE=len(place.ranks), SHOTS=self.shots,
            REDUCE_TYPE=REDUCE_TYPES[group.reduce_type] if rounded else 0,
        )  # fmt: skip

    # ---- gathers ----------------------------------------------------------------------------

    def gather(
        self, gpu: int, columns: Sequence[Array | None], widths: Sequence[int], out: Array
    ) -> None:
        """In pieces of whole rows, or of columns where a row has too many for an inbox."""
        group, place = self.group, self.group.gpus[gpu]
        most = min(ROOM, -(-max(widths) // 2) * 2)
        at_once = ROOM // most
        for t in range(0, len(out), at_once):
            n = min(at_once, len(out) - t)
            pieces = [None if y is None else y[t : t + n] for y in columns]
            for first in range(0, max(widths), most):
                left = [width > first for width in widths]
                pairs = n * (most // 2)
                place.device.launch(
                    "gather_few", (power_of_two(-(-pairs // 256), CTAS),), 256, out[t : t + n],
                    *pointers(pieces), self.tables[gpu], self.own[gpu], gpu, group.bits(gpu),
                    group.silent(left), n, first, most, *widths,
                    *([0] * (MOST_RANKS - len(widths))), self.homes, ROOM, group.limit_ms,
                    N_GPUS=len(group.gpus), N_RANKS=group.n_ranks,
                )  # fmt: skip
