"""The second invariant: below its length a segment holds what a fresh prefill would hold.

A tree's slots hold several continuations at once, as no prefill of one text does. The invariant
holds again once a path is kept. The price is that rolling back is no longer free: the kept path has
to move. Each layer still processes each kept position once, and each rejected node at most once.
"""

import torch

from kvcache import Plan

CHANGED = 2


def depths(parents) -> list[int]:
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def plan(cache, first, parents):
    n = len(parents)
    seen = torch.eye(n, dtype=torch.bool)  # itself
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    text = torch.ones(n, first, dtype=torch.bool)
    positions, slots = first + torch.tensor(depths(parents)), torch.arange(first, first + n)
    return Plan(cache, positions, slots, torch.cat([text, seen], 1))


def keep(cache, first, path) -> None:
    slots = first + torch.tensor(path)
    for stored in (cache.keys, cache.values):
        stored[:, :, :, first : first + len(path)] = stored[:, :, :, slots]
    cache.lengths = [first + len(path)] * len(cache.lengths)
