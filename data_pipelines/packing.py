"""Packs that are alike: within a token budget, and of equal cost, so that any of them may meet in a step on any number of ranks.

Cost is linear in tokens plus something that grows faster (attention). Packs of equal tokens differ in that excess as soon as lengths are
mixed, so it is balanced first, long items before short ones (Graham 1969), and short items, which have hardly any, then level the tokens.
Knows nothing of samples.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FILL = 0.99
"""How full packs are made where lengths differ: the rest is room to balance costs in. Part of what defines the stream."""
EXCESS_WEIGHT = 100.0
"""Weight of the squared excess of a pack beside its squared tokens, where excess is counted in mean costs; 100 to 300 do best."""


def balance(tokens: Sequence[int], costs: Sequence[float], budget: int) -> list[list[int]]:
    """Group items 0 .. n - 1 into packs of at most `budget` tokens, each item exactly once. Costs are positive.

    Greedy descent on the sum over packs of tokens^2 + EXCESS_WEIGHT * excess^2, tokens relative to their mean, excess to the mean cost.
    Items of about the same length are taken in the order given, so a shuffled order gives other packs. A pack is added where an item
    fits into none.
    """
    sizes, cost = np.asarray(tokens, np.float64), np.asarray(costs, np.float64)  # (n,)
    assert not len(sizes) or 0 < sizes.min() <= sizes.max() <= budget, budget
    uneven = len(set(tokens)) > 1  # items of one length fill packs alike, up to a last one
    number = max(-(-sum(tokens) // budget), round(sum(tokens) / (FILL * budget)) if uneven else 0)
    excess = cost - (cost / sizes).min(initial=np.inf) * sizes if len(sizes) else cost
    pull = sizes / max(sizes.sum(), 1) ** 2  # (n,) how much an item minds the tokens of a pack
    push = EXCESS_WEIGHT * excess / max(cost.sum(), 1e-30) ** 2
    used: NDArray[np.float64] = np.zeros(len(sizes))
    load: NDArray[np.float64] = np.zeros(len(sizes))  # of packs, of which there are at most n
    packs: list[list[int]] = [[] for _ in range(number)]
    for item in sorted(range(len(sizes)), key=lambda i: -_length_class(tokens[i])):
        open_packs = slice(0, len(packs))
        score = np.where(used[open_packs] + sizes[item] <= budget, used[open_packs] * pull[item] + load[open_packs] * push[item], np.inf)
        place = int(score.argmin())
        if score[place] == np.inf:
            place = len(packs)
            packs.append([])
        packs[place].append(item)
        used[place] += sizes[item]
        load[place] += excess[item]
    return [pack for pack in packs if pack]


def _length_class(tokens: int) -> int:
    """`tokens` rounded down to three binary digits: lengths that differ by less than a quarter count as equal."""
    shift = max(tokens.bit_length() - 3, 0)
    return tokens >> shift << shift
