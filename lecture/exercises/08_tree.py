"""Exercise 8, forty minutes: a draft that is a tree, on the cache.

python lecture/exercises/08_tree.py

A draft is a chain: each token follows the one before. Make it a tree, so that the second-best token
is tried as well and one pass checks every branch. `parents[i]` is the node that node i follows.
Node 0 is the text's last token, which no layer has run yet; its parent is -1.

A pass is described by a `Plan` (kvcache.py), in which positions and slots are separate. Two nodes
of the same depth have the same position but need a slot each: node i gets slot `first + i`. Four
things are left to you:

(a) `depths`: how far is node i from node 0? Its position, hence its rotation, is first + depth.
(b) `plan`: which slots may a node attend to? All of the text, itself, and its ancestors.
(c) `keep`: the full model has chosen a path from node 0 down. Later passes must find it in
consecutive slots, as if it had been a chain.
(d) `CHANGED`: which of the three invariants of lecture/ladder.md does not hold for a cache with a
tree in it?
"""

import torch
from common import random_model
from torch import Tensor

from kvcache import KVCache, Plan
from model import Llama

CHANGED = 0  # your turn (d): 1, 2 or 3


def depths(parents: list[int]) -> list[int]:
    """The number of ancestors of each node."""
    return list(range(len(parents)))  # your turn (a): this is a chain


def plan(cache: KVCache, first: int, parents: list[int]) -> Plan:
    """The pass over a tree of n nodes whose node 0 is at position `first`."""
    n = len(parents)
    positions = first + torch.tensor(depths(parents))  # (n,)
    slots = torch.arange(first, first + n)  # (n,)
    mask = torch.ones(n, first + n, dtype=torch.bool)  # (n, T), T slots
    mask[:, first:] = mask[:, first:].tril()  # your turn (b): this is a chain
    return Plan(cache, positions, slots, mask)


def keep(cache: KVCache, first: int, path: list[int]) -> None:
    """Of the tree that begins at `first`, keep the nodes on this path, from node 0 down."""
    cache.lengths = [first + len(path)] * len(cache.lengths)  # your turn (c): is that enough?


def read(model: Llama, plan: Plan, ids: list[int]) -> Tensor:
    """Logits (n, V) of one pass of these n tokens through the whole model."""
    L = model.config.n_layers
    return model.logits(model.run(model.embed(torch.tensor([ids])), 0, L, plan)[0], L)


@torch.inference_mode()
def furthest(model: Llama, text: list[int], tree: list[int], parents: list[int]) -> float:
    """The largest difference between a tree's logits and those of each path read as plain text."""
    cache, first = KVCache(model, (), len(text) + len(tree)), len(text) - 1
    read(model, cache.plan(0, first), text[:-1])
    logits, far = read(model, plan(cache, first, parents), tree), 0.0
    for node in range(len(tree)):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        plain = model(torch.tensor([text[:-1] + [tree[i] for i in path]]))[0, -1]
        far = max(far, float((plain - logits[node]).abs().max()))
    return far


def main() -> None:
    text, tree = [3, 1, 4], [4, 7, 2, 5, 9, 6]
    for name, parents in (("chain", [-1, 0, 1, 2, 3, 4]), ("tree", [-1, 0, 0, 1, 1, 2])):
        far = furthest(random_model(), text, tree, parents)
        print(f"{name}: logits differ from each path's own by up to {far:.1e}")


if __name__ == "__main__":
    main()
