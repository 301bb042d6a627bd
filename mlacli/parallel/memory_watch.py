"""Memory as it is measured beside what the plan counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlacli import devices

if TYPE_CHECKING:
    from mlacli.parallel.plan import ShardPlan


@dataclass(frozen=True, slots=True)
class Beside:
    """Bytes of a GPU in use beside a plan: before its model was loaded, and what came since.

    NCCL's are part of what the plan counts, where it is the way of sums that the plan expected.
    """

    before: int  # CUDA's context, other programs
    since: int  # kernels, and what memory is rounded up to
    nccl: int  # what NCCL took for itself


class MemoryWatch:
    """Bytes in use on the devices of a plan, as they grow from here on."""

    def __init__(self, plan: ShardPlan) -> None:
        self._planned: dict[str, int] = {}
        for rank in plan.ranks:
            self._planned[rank.device] = self._planned.get(rank.device, 0) + rank.total
        on_gpu = {rank.device for rank in plan.ranks if rank.kind == "cuda"}
        self._before = {
            name: devices.bytes_in_use(name) if name in on_gpu else 0 for name in self._planned
        }

    def added(self) -> dict[str, int]:
        """By device; of the CPU, all that this process has."""
        return {name: devices.bytes_in_use(name) - had for name, had in self._before.items()}

    def beside(self, nccl: Mapping[str, tuple[int, int]]) -> dict[str, Beside]:
        """Of each GPU; `nccl`: what NCCL holds, and what of that it had when this watch began."""
        found = {}
        for name, used in self.added().items():
            if name != "cpu":
                holds, had = nccl.get(name, (0, 0))
                since = used + had - self._planned[name]
                found[name] = Beside(self._before[name] - had, since, holds)
        return found
