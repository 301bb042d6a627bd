"""Which way sums between GPUs go, as far as that is known before anything is loaded.

`p2p`, `nccl` and `host` are those of cuda_collectives.py, which also tries the one that it takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlacli.backends.cuda_group import MOST_HERE, MOST_RANKS
from mlacli.errors import BackendError, UnsupportedFeature

if TYPE_CHECKING:
    from mlacli.devices import Device

WAYS = ("p2p", "nccl", "host")  # in the order of preference
MOST_ON_ONE = 63  # ranks where one GPU has all of them: bits of `held` in kernels/shared_gpu.cu


def way_of_sums(asked: str, devices: Sequence[Device]) -> str:
    """The way between ranks on `devices`, which all take part under -sm graph; "" on one GPU.

    GPUs that needn't exist take NCCL's under auto, which needs the most memory. An error where they
    are too many, or can't go the way that was `asked` for.
    """
    on_gpu = Counter(device.name for device in devices)
    check_counts(tuple(on_gpu.values()))
    if len(on_gpu) == 1:
        return ""
    if any(device.kind == "planned" for device in devices):
        return "nccl" if asked == "auto" else asked
    indices = [int(name.removeprefix("cuda")) for name in on_gpu]
    if asked == "auto":
        return next(way for way in WAYS if not obstacle(way, indices))
    if reason := obstacle(asked, indices):
        raise not_possible(asked, reason)
    return asked


def check_counts(on_gpu: Sequence[int]) -> None:
    """UnsupportedFeature for more ranks, so many on each GPU, than sums take."""
    n, most = sum(on_gpu), max(on_gpu)
    if len(on_gpu) == 1 and n > MOST_ON_ONE:
        raise UnsupportedFeature(
            f"{n} ranks on one GPU: their sums take at most {MOST_ON_ONE}",
            "name it fewer times in -dev",
        )
    if len(on_gpu) > 1 and (n > MOST_RANKS or most > MOST_HERE):
        raise UnsupportedFeature(
            f"{n} ranks on {len(on_gpu)} GPUs: sums between GPUs take at most "
            f"{MOST_RANKS} ranks, {MOST_HERE} on a GPU",
            "name each GPU fewer times in -dev",
        )


def not_possible(asked: str, reason: str) -> BackendError:
    return BackendError(f"--comm {asked} is not possible: {reason}", (
        "use --comm auto" if asked != "auto" else "use one GPU, or -sm layer"
    ))  # fmt: skip


def obstacle(way: str, devices: Sequence[int]) -> str:
    """What keeps GPUs of these indices from summing that way; empty when nothing is known."""
    if way == "p2p":
        from mlacli.backends.cuda_peer_memory import without_access

        return without_access(devices)
    if way == "nccl":
        from mlacli.backends.cuda_nccl import why_not

        return why_not() or ("NCCL takes a GPU once" if len(set(devices)) < len(devices) else "")
    return ""
