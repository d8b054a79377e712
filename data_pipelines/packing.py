"""Filling packs: first fit in the order given, over a bounded number of open packs. Knows nothing of samples."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

OPEN_PACKS = 16
"""Packs that wait for a sample that still fits. More fill better and cost more time; part of what defines the stream."""

Item = TypeVar("Item")


def fill(items: Iterable[tuple[Item, int]], budget: int) -> Iterator[tuple[Item, ...]]:
    """Group (item, tokens) into packs of at most `budget` tokens, each item exactly once.

    A pack is closed when it is full, or when it is the fullest while an item fits into none of `OPEN_PACKS`.
    """
    packs: list[list[Item]] = []
    used: list[int] = []
    for item, tokens in items:
        assert 0 < tokens <= budget, (tokens, budget)
        place = next((number for number, taken in enumerate(used) if taken + tokens <= budget), None)
        if place is None:
            if len(packs) == OPEN_PACKS:
                fullest = used.index(max(used))
                used.pop(fullest)
                yield tuple(packs.pop(fullest))
            place = len(packs)
            packs.append([])
            used.append(0)
        packs[place].append(item)
        used[place] += tokens
        if used[place] == budget:
            used.pop(place)
            yield tuple(packs.pop(place))
    yield from map(tuple, packs)
