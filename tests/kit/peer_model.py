"""The one-shot sum of kernels/include/peers.cuh as a state machine, walked through in all orders.

A GPU's step: send its packets to every other GPU one by one, wait for every packet of theirs one by
one, end. GPUs take these moves in any order; two that don't touch each other's mail are not told
apart by the search, which keeps the states it has seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

State = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Protocol:
    """The kernels' protocol; the flags leave something out."""

    n_gpus: int
    inboxes: int = 2  # used in turn
    nods: bool = True  # a GPU without a partial says that it is there
    numbers: bool = True  # packets carry their step's number instead of just being there


def wrong_outcome(
    protocol: Protocol, sizes: tuple[int, ...], silent: tuple[int | None, ...] | None = None
) -> str:
    """What some order of moves leads to that shouldn't be; empty when all orders are right.

    `sizes`: packets of each step's message; `silent`: the GPU that has none in a step.
    """
    silent = silent or (None,) * len(sizes)
    n = protocol.n_gpus
    programs = [_program(protocol, gpu, sizes, silent) for gpu in range(n)]
    # State: each GPU's place in its program, and the mail {(to, inbox, from, packet): step}.
    todo: list[State] = [((0,) * n, frozenset())]
    seen = set(todo)
    while todo:
        places, mail = todo.pop()
        moved = False
        for gpu in range(n):
            if places[gpu] == len(programs[gpu]):
                continue
            kind, key, step = programs[gpu][places[gpu]]
            held = dict(mail)
            if kind == "send":
                held[key] = step
            else:
                found = held.get(key, 0)
                if kind == "nod" and found < step:
                    continue
                if kind == "take" and protocol.numbers and found != step:
                    if found > step:
                        return f"GPU {gpu} finds step {found} where it waits for step {step}"
                    continue
                if kind == "take" and not protocol.numbers:
                    if not found:
                        continue
                    if found != step:
                        return f"GPU {gpu} takes step {found} for step {step}"
            moved = True
            now = (*places[:gpu], places[gpu] + 1, *places[gpu + 1 :])
            state = (now, frozenset(held.items()))
            if state not in seen:
                seen.add(state)
                todo.append(state)
        left = [q[p:] for p, q in zip(places, programs, strict=True) if p < len(q)]
        if left and not moved:
            return f"nobody can move; the next would be {[moves[0] for moves in left]}"
    return ""


def _program(
    protocol: Protocol, gpu: int, sizes: tuple[int, ...], silent: tuple[int | None, ...]
) -> list[tuple[str, tuple[Any, ...], int]]:
    """A GPU's moves: (what, where, step)."""
    others = [g for g in range(protocol.n_gpus) if g != gpu]
    moves: list[tuple[str, tuple[Any, ...], int]] = []
    for step, (size, out) in enumerate(zip(sizes, silent, strict=True), 1):
        inbox = step % protocol.inboxes
        if out != gpu:
            moves += [("send", (g, inbox, gpu, i), step) for g in others for i in range(size)]
        elif protocol.nods:
            moves += [("send", (g, "flag", gpu), step) for g in others]
        if out is not None and out != gpu and protocol.nods:
            moves.append(("nod", (gpu, "flag", out), step))
        moves += [
            ("take", (gpu, inbox, g, i), step) for g in others if g != out for i in range(size)
        ]
    return moves
