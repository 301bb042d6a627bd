"""The pairs of tokens that BPE joins, in the order in which it prefers them.

GGUF files list them. A vocabulary made for tiktoken has no list: there a token's id is its rank.
Must not know metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def listed_merges(
    lines: Iterable[str], ids: Mapping[str, int]
) -> tuple[list[tuple[str, str]], int]:
    """The pairs that lines like "left right" name, and how many lines name unknown tokens.

    A pair that is named twice counts where it comes first.
    """
    merges: dict[tuple[str, str], None] = {}
    n_unknown = 0
    for line in lines:
        at = line.find(" ", 1)
        left, right = line[:at], line[at + 1 :]
        if at > 0 and left in ids and right in ids and left + right in ids:
            merges[left, right] = None
        else:
            n_unknown += 1
    return list(merges), n_unknown


def ranked_merges(ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a third, ordered by its id.

    tiktoken ranks a pair by the joined token alone. The order here among the pairs of one token
    matters only where two of them overlap, as in a + aa + a.
    """
    merges = []
    for token in sorted(ids, key=ids.__getitem__):
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges
