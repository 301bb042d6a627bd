"""--mlock and --no-mmap: where weights lie, asked of the system."""

import ctypes
import errno
import os
from pathlib import Path

import numpy as np
import pytest

import mlacli
from mlacli.loading.page_lock import PageLock, _pages
from mlacli.prepare import bundled_model


def kilobytes(word: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(word))


def test_locked_bytes_are_locked():
    size = bundled_model().stat().st_size
    before = kilobytes("VmLck:")
    with mlacli.load(mlock=True) as engine:
        if engine.page_lock.problem:
            pytest.skip(f"the system lets this process lock less: {engine.page_lock.problem}")
        assert engine.page_lock.nbytes == sum(r.weights for r in engine.prepared.plan.ranks)
        assert (kilobytes("VmLck:") - before) * 1024 >= 0.9 * size
    with mlacli.load() as engine:
        assert engine.page_lock.nbytes == 0


def test_a_lock_that_fails_is_told_once_and_nothing_more_is_tried():
    calls = []

    def refused(address, n):
        calls.append(n.value)
        ctypes.set_errno(errno.ENOMEM)
        return -1

    lock = PageLock()
    lock._lock = refused
    for _ in range(3):
        lock(np.zeros(100, np.uint8))
    assert (lock.problem, lock.nbytes, calls) == (os.strerror(errno.ENOMEM), 0, [100])


def test_the_span_of_a_view():
    base = np.zeros((4, 6), np.uint16)
    start, stop = _pages(base[1:3, 2:4])
    assert start == base.ctypes.data + 16 and stop - start == 16
    lock = PageLock()
    lock(np.zeros(0, np.uint8))
    assert (lock.problem, lock.nbytes) == (None, 0)
    assert ctypes.sizeof(ctypes.c_void_p) == 8


def mapped(engine) -> int:
    """How many weight arrays lie in the mapped file."""
    path = str(engine.prepared.path)
    spans = [
        tuple(int(x, 16) for x in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(path)
    ]
    weights = engine._weights[0]
    held = [weights.token_embd, *weights.layers[0]._weights.values()]
    return sum(any(a <= w.raw.ctypes.data < b for a, b in spans) for w in held)


def test_without_a_map_weights_are_copies_that_compute_the_same():
    with mlacli.load(temp=0) as engine:
        assert mapped(engine) > 5
        expected = list(engine.generate_ids([1, 2, 3], 8))
    with mlacli.load(temp=0, no_mmap=True) as engine:
        assert mapped(engine) == 0
        assert list(engine.generate_ids([1, 2, 3], 8)) == expected
