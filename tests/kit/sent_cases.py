"""Products that send their partial by themselves (kernels/include/post.cuh), beside what they store.

Inboxes of all GPUs are arrays of the one device there is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from kit.few_tokens import weight

from mlacli.backends import cuda_matvec as few
from mlacli.backends.cuda_group import Mail

TICKS = 1024  # a step, as in post.cuh
SPARE = 5  # packets beyond the message, which stay as they are


class Inboxes:
    """Two inboxes of `n` packets and some on each of several GPUs, after `ended` sums."""

    def __init__(self, ops: Any, n_gpus: int, n: int, ended: int) -> None:
        self.ops, self.n, self.step = ops, n, ended + 1
        self.boxes = [ops.put(np.zeros((2, n + SPARE), np.uint64)) for _ in range(n_gpus)]
        words = np.zeros(32, np.uint64)
        words[0] = TICKS * ended + TICKS // 2 * (n_gpus > 2)  # CTAs of a sum may have counted
        words[2] = 8 * (n + SPARE)
        words[3 : 3 + n_gpus] = [box.ptr for box in self.boxes]
        self.mail = Mail(ops.put(words), n_gpus)

    def sent(self) -> np.ndarray:
        """What all GPUs got, bit for bit the same, and nothing but that."""
        found = []
        for box in self.boxes:
            packets = self.ops.get(box)
            now = packets[self.step % 2]
            assert not packets[1 - self.step % 2].any(), "the other inbox is in use"
            assert not now[self.n :].any(), "beyond the message"
            assert (now[: self.n] >> np.uint64(32) == self.step).all(), "all carry the step's number"
            found.append(now[: self.n].astype(np.uint32).view(np.float32))
        assert all(np.array_equal(one, found[0]) for one in found)
        return found[0]


def products(
    ops: Any, rng: np.random.Generator, name: str, rows: int, n_in: int, n_gpus: int, ended: int,
    skip: int = 0, geometry: Any = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(sent, stored) of one token's product."""
    w = weight(ops, rng, name, (rows, n_in), skip)
    x = ops.put(rng.standard_normal((1, n_in)).astype(np.float32))
    boxes, y = Inboxes(ops, n_gpus, rows, ended), ops.new((1, rows))
    few.products(ops, [(w, boxes.mail)], x, geometry=geometry)
    few.products(ops, [(w, y)], x, geometry=geometry or few.dense_geometry(ops, [w], 0))
    return boxes.sent(), ops.get(y)[0]


def experts(
    ops: Any, rng: np.random.Generator, names: tuple[str, str | None], n_gpus: int, ended: int,
    sizes: tuple[int, int, int] = (256, 64, 96), after_up: bool = False, geometry: Any = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(sent, stored) of three slots, one of another rank's expert, and of the shared expert."""
    d, f, fs = sizes
    down = weight(ops, rng, names[0], (7, d, f), first=1)
    shared = None if names[1] is None else weight(ops, rng, names[1], (d, fs))
    ids, weights = np.array([[3, 0, 7]], np.int32), rng.uniform(0.1, 1, (1, 3)).astype(np.float32)
    h = ops.put(rng.standard_normal((1, 3 * f + fs)).astype(np.float32))
    device_ids, device_weights = ops.put(ids), ops.put(weights)
    boxes, y = Inboxes(ops, n_gpus, d, ended), ops.new((1, d))
    for out in (boxes.mail, y):
        few.experts_down(
            ops, out, h, device_ids, device_weights, down, shared, after_up=after_up,
            geometry=geometry,
        )  # fmt: skip
    return boxes.sent(), ops.get(y)[0]
