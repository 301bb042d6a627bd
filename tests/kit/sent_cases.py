"""Products that send their partial (kernels/include/post.cuh), beside what they would store.

Inboxes of all GPUs are arrays of the one device there is; what the others send is there before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from kit.few_tokens import weight

from mlacli.backends import cuda_matvec as few
from mlacli.backends.cuda_group import Mail

TICKS = 1024  # a step, as in post.cuh
SPARE = 5  # packets beyond the message, which stay as they are
Case = tuple[int, int, int]  # GPUs, this one, sums that have ended


class Inboxes:
    """Two inboxes of `n` packets of every rank, and some, on each of several GPUs."""

    def __init__(
        self, ops: Any, rng: np.random.Generator, case: Case, n: int,
        parts: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """`parts` [GPUs, n]: what the others send."""
        self.n_gpus, self.me, ended = case
        self.ops, self.n, self.step = ops, n, ended + 1
        drawn = rng.standard_normal((self.n_gpus, n)).astype(np.float32)
        self.parts = drawn if parts is None else parts
        room = n + SPARE
        inboxes = np.zeros((self.n_gpus, 2, self.n_gpus, room), np.uint64)
        packets = self.parts.view(np.uint32).astype(np.uint64) | np.uint64(self.step << 32)
        inboxes[self.me, self.step % 2, :, :n] = packets
        inboxes[self.me, self.step % 2, self.me] = 0
        self.boxes = [ops.put(box) for box in inboxes]
        words = np.zeros(32, np.uint64)
        words[0] = TICKS * ended + TICKS // 2 * (self.n_gpus > 2)  # CTAs of a sum may have counted
        words[2:5] = 8 * room * self.n_gpus, 8 * room, self.boxes[self.me].ptr
        words[6] = self.me | 100 << 32
        self.alarm = ops.put(np.zeros(1, np.uint64))
        words[5] = self.alarm.ptr
        words[7 : 7 + self.n_gpus] = [box.ptr + 8 * room * self.me for box in self.boxes]
        self.words = ops.put(words)
        self.mail = Mail(self.words, self.n_gpus)

    def sent(self, to: list[int]) -> np.ndarray:
        """What these GPUs got, bit for bit the same; the others, and other places, nothing."""
        found = []
        for g, box in enumerate(self.boxes):
            packets = self.ops.get(box)
            mine = packets[self.step % 2, self.me]
            if g in to:
                assert (mine[: self.n] >> np.uint64(32) == self.step).all(), "the step's number"
                found.append(mine[: self.n].astype(np.uint32).view(np.float32))
                mine[: self.n] = 0
            if g != self.me:
                assert not packets.any(), "there is something else"
        assert all(np.array_equal(one, found[0]) for one in found)
        return found[0]


def check(ops: Any, rng: np.random.Generator, case: Case, stored: np.ndarray, launch: Any) -> None:
    """`launch` of a mail sends what is stored."""
    boxes = Inboxes(ops, rng, case, len(stored))
    launch(boxes.mail)
    np.testing.assert_array_equal(boxes.sent(list(range(boxes.n_gpus))), stored)
    assert ops.get(boxes.words)[0] // TICKS == case[2], "the sum counts the step"


def product(
    ops: Any, rng: np.random.Generator, case: Case, name: str, rows: int, n_in: int,
    skip: int = 0, geometry: Any = None,
) -> None:  # fmt: skip
    w = weight(ops, rng, name, (rows, n_in), skip)
    x, y = ops.put(rng.standard_normal((1, n_in)).astype(np.float32)), ops.new((1, rows))
    how = geometry or few.dense_geometry(ops, [w], 0)
    few.products(ops, [(w, y)], x, geometry=how)
    stored = ops.get(y)[0]
    launch = lambda mail: few.products(ops, [(w, mail)], x, geometry=geometry)  # noqa: E731
    check(ops, rng, case, stored, launch)


def experts(
    ops: Any, rng: np.random.Generator, case: Case, names: tuple[str, str | None],
    sizes: tuple[int, int, int] = (256, 64, 96), after_up: bool = False, geometry: Any = None,
) -> None:  # fmt: skip
    """Three slots, one of another rank's expert, and the shared expert."""
    d, f, fs = sizes
    down = weight(ops, rng, names[0], (7, d, f), first=1)
    shared = None if names[1] is None else weight(ops, rng, names[1], (d, fs))
    ids, weights = np.array([[3, 0, 7]], np.int32), rng.uniform(0.1, 1, (1, 3)).astype(np.float32)
    h = ops.put(rng.standard_normal((1, 3 * f + fs)).astype(np.float32))
    device_ids, device_weights, y = ops.put(ids), ops.put(weights), ops.new((1, d))

    def launch(out: Any) -> None:
        few.experts_down(
            ops, out, h, device_ids, device_weights, down, shared, after_up=after_up,
            geometry=geometry,
        )  # fmt: skip

    launch(y)
    check(ops, rng, case, ops.get(y)[0], launch)
