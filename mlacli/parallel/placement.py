"""Which weights stay in host memory: -ot, -ncmoe, -cmoe and -ngl on a plan's shards.

A GPU computes with all of them: those in host memory come to it over the link. Pure data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlacli.errors import UsageError
from mlacli.parallel.host_stream import is_routed

if TYPE_CHECKING:
    from mlacli.parallel.shards import Part, Shard
    from mlacli.params import ModelParams

_HOST = "cpu"


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors whose name `pattern` is found in go to `device`: cpu, or cudaN."""

    pattern: str
    device: str

    def takes(self, shard: Shard) -> bool:
        names = (shard.tensor, *shard.sources)
        return any(re.search(self.pattern, name) for name in names)

    def __str__(self) -> str:
        return f"{self.pattern}={self.device.upper()}"


def rules(words: Sequence[str], devices: Sequence[str] | None = None) -> tuple[Rule, ...]:
    """The rules of all -ot, in order; UsageError where one pattern goes to two devices.

    Or where a rule names none of `devices`, if they are given.
    """
    found: list[Rule] = []
    for text in (text for word in words for text in word.split(",")):
        pattern, _, device = text.partition("=")
        found.append(Rule(pattern, device.lower()))
    for i, rule in enumerate(found):
        other = next((r for r in found[:i] if r.pattern == rule.pattern), rule)
        if other.device != rule.device:
            raise UsageError(f"-ot: {other} and {rule} contradict each other", "keep one of them")
    known = None if devices is None else {_HOST, *map(_cuda_name, devices)}
    for rule in found:
        if known is not None and rule.device not in known:
            raise UsageError(
                f"-ot {rule}: the run has no device {rule.device.upper()}",
                "devices are " + ", ".join(sorted(d.upper() for d in known)),
            )
    return tuple(found)


class Placement:
    """The flags, ready to be asked where a shard lies."""

    def __init__(self, params: ModelParams, n_host_layers: int, devices: Sequence[str]) -> None:
        """Layers before `n_host_layers` are off the GPUs; `devices` are those of the run."""
        self.rules = rules(params.override_tensor, devices)
        self._n_host_layers = n_host_layers
        self._n_layers = 1 << 30 if params.cpu_moe else params.n_cpu_moe
        self._flag = "-cmoe" if params.cpu_moe else f"-ncmoe {params.n_cpu_moe}"

    def on_host(self, shard: Shard, device: str) -> bool:
        """Whether `shard`, whose layer `device` computes, stays in host memory."""
        own, rule = _cuda_name(device), self.rule_of(shard)
        flagged = is_routed(shard.tensor) and shard.layer is not None
        flagged = flagged and (shard.layer or 0) < self._n_layers
        if rule is None:
            off = shard.layer is not None and shard.layer < self._n_host_layers
            return flagged or off
        if rule.device == _HOST:
            return True
        if rule.device != own:
            raise UsageError(
                f"-ot {rule}: {shard.tensor} can't lie on {rule.device.upper()}, as its layer is "
                f"computed on {own.upper()}",
                "shares of -ts decide which GPU computes a layer",
            )
        if flagged:
            raise UsageError(
                f"-ot {rule} and {self._flag} contradict each other about {shard.tensor}",
                f"leave {self._flag} out and end -ot with exps=CPU: the first match wins",
            )
        return False

    def rule_of(self, shard: Shard) -> Rule | None:
        """The first rule that takes it."""
        return next((rule for rule in self.rules if rule.takes(shard)), None)


def placed(
    shards: Sequence[Shard], parts: Sequence[Part], placement: Placement
) -> tuple[Shard, ...]:
    """The same shards, those of GPUs marked that stay in host memory."""
    device = {part.rank: part.device for part in parts}
    return tuple(
        replace(shard, host=True)
        if device[shard.rank].kind != "cpu" and placement.on_host(shard, device[shard.rank].name)
        else shard
        for shard in shards
    )


def without_effect(found: Sequence[Rule], shards: Sequence[Shard]) -> Iterator[tuple[Rule, str]]:
    """(rule, why) of those that decide about no tensor."""
    deciding, matching = set(), set()
    for shard in shards:
        taken = [rule for rule in found if rule.takes(shard)]
        matching.update(taken)
        deciding.update(taken[:1])
    for rule in found:
        if rule not in matching:
            yield rule, "no tensor's name matches it"
        elif rule not in deciding:
            yield rule, "all that it matches are taken by rules before it"


def _cuda_name(device: str) -> str:
    """The name that -ot knows a device by: those of --vram count as GPUs."""
    return device.replace("gpu", "cuda")
