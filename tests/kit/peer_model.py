"""The one-shot sum of kernels/include/peers.cuh as a state machine, walked through in all orders.

A GPU's step: send its packets to every other GPU one by one, wait for every packet of theirs one by
one, end. Where products send, a GPU has two programs that run beside each other: the product waits
for the sum before and sends to all, itself too; the sum, which begins when the product has waited,
takes what comes and ends when the product has ended. GPUs take these moves in any order; two that
don't touch each other's mail are not told apart by the search, which keeps the states it has seen.
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
    sending: tuple[int, ...] = ()  # GPUs whose products send by themselves
    waits: bool = True  # which they do when the sum before has ended


def wrong_outcome(
    protocol: Protocol, sizes: tuple[int, ...], silent: tuple[int | None, ...] | None = None
) -> str:
    """What some order of moves leads to that shouldn't be; empty when all orders are right.

    `sizes`: packets of each step's message; `silent`: the GPU that has none in a step.
    """
    silent = silent or (None,) * len(sizes)
    owners, programs = [], []
    for gpu in range(protocol.n_gpus):
        for program in _programs(protocol, gpu, sizes, silent):
            owners.append(gpu)
            programs.append(program)
    n = len(programs)
    # State: the place in each program, and the mail {(to, inbox, from, packet): step}.
    todo: list[State] = [((0,) * n, frozenset())]
    seen = set(todo)
    while todo:
        places, mail = todo.pop()
        moved = False
        for at, gpu in enumerate(owners):
            if places[at] == len(programs[at]):
                continue
            kind, key, step = programs[at][places[at]]
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
            now = (*places[:at], places[at] + 1, *places[at + 1 :])
            state = (now, frozenset(held.items()))
            if state not in seen:
                seen.add(state)
                todo.append(state)
        left = [q[p:] for p, q in zip(places, programs, strict=True) if p < len(q)]
        if left and not moved:
            return f"nobody can move; the next would be {[moves[0] for moves in left]}"
    return ""


Move = tuple[str, tuple[Any, ...], int]  # (what, where, step)


def _programs(
    protocol: Protocol, gpu: int, sizes: tuple[int, ...], silent: tuple[int | None, ...]
) -> list[list[Move]]:
    """A GPU's moves, of its products and of its sums."""
    if gpu not in protocol.sending:
        return [_program(protocol, gpu, sizes, silent)]
    gpus, product, sums = range(protocol.n_gpus), list[Move](), list[Move]()
    for step, (size, out) in enumerate(zip(sizes, silent, strict=True), 1):
        inbox = step % protocol.inboxes
        if protocol.waits:
            product.append(("nod", (gpu, "sum"), step - 1))
        product.append(("send", (gpu, "begun"), step))
        if out != gpu:
            product += [("send", (g, inbox, gpu, i), step) for g in gpus for i in range(size)]
        product.append(("send", (gpu, "product"), step))
        nods = [("send", (g, "flag", gpu), step) for g in gpus if g != gpu]
        if out == gpu:  # nothing was sent: an ordinary sum, which waits first
            sums += [("nod", (gpu, "product"), step), *nods]
        sums.append(("nod", (gpu, "begun"), step))
        sums += [("take", (gpu, inbox, g, i), step) for g in gpus if g != out for i in range(size)]
        sums.append(("nod", (gpu, "product"), step))
        if out is not None and out != gpu:
            sums.append(("nod", (gpu, "flag", out), step))
        sums.append(("send", (gpu, "sum"), step))
    return [product, sums]


def _program(
    protocol: Protocol, gpu: int, sizes: tuple[int, ...], silent: tuple[int | None, ...]
) -> list[Move]:
    """The moves of a GPU whose sums send what products left in its memory."""
    others = [g for g in range(protocol.n_gpus) if g != gpu]
    moves: list[Move] = []
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
