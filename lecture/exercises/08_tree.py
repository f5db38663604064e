"""Exercise 8, forty minutes: a draft that is a tree, on the cache.

python lecture/exercises/08_tree.py

A draft is a chain: each token stands behind the last. Let it be a tree, so that the second-best
token is tried as well, and one pass checks every branch. `parents[i]` is the node that node i
stands behind. Node 0 is the text's last token, which no layer has read yet; its parent is -1.

In the cache a position was a slot. Two nodes of the same depth now have the same position, and need
a slot each. `place_tree` gives node i the slot `first + i`. Four things are left to you:

(a) `depths`: how far node i is from node 0; its position, hence its rotation, is first + depth.
(b) `sees`: which nodes a node attends to: itself, and those it stands behind.
(c) `keep`: the full model has chosen a path from node 0 down. What follows shall find it in the
slots behind each other, as if it had been a chain.
(d) `CHANGED`: which of the three invariants in section 5 of the README can no longer be said of a
cache that holds a tree?
"""

import torch
import torch.nn.functional as F
from common import random_model
from torch import Tensor

from kvcache import ROWS, KVCache, up_to_chunk
from model import Llama

CHANGED = 0  # your turn (d): 1, 2 or 3


def depths(parents: list[int]) -> list[int]:
    """How many nodes stand above each."""
    return list(range(len(parents)))  # your turn (a): this is a chain


def sees(parents: list[int]) -> Tensor:
    """(n, n), true where node i (row) attends to node j (column)."""
    n = len(parents)
    return torch.ones(n, n, dtype=torch.bool).tril()  # your turn (b): this is a chain


class TreeCache(KVCache):
    """The cache of the project; a pass over a tree keeps position and slot apart."""

    slots_at: Tensor | None = None  # (n,), where a tree's pass writes; None in an ordinary pass

    def place_tree(self, first: int, parents: list[int]) -> None:
        """Begin a pass over a tree whose node 0 stands at position `first`."""
        n = len(parents)
        self.slots_at = self.columns[first : first + n]
        end = up_to_chunk(first + n)
        self.begin(first + torch.tensor(depths(parents)), [(n, end)])
        hidden = torch.ones(n, end, dtype=torch.bool)  # what a node does not see
        hidden[:, :first] = False
        hidden[:, first : first + n] = ~sees(parents)
        rows = hidden.repeat_interleave(self.group, dim=0)  # (n * H/G, end)
        rows = F.pad(rows, (0, 0, 0, -len(rows) % ROWS))
        mask = torch.zeros_like(rows, dtype=self.keys.dtype).masked_fill_(rows, -torch.inf)
        self.parts = [(self.views[end], mask)]

    def place(self, first: int, last: int) -> None:
        self.slots_at = None
        super().place(first, last)

    def write(self, layer: int, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        slots = self.at if self.slots_at is None else self.slots_at
        self.keys[layer].index_copy_(2, slots, k)
        self.values[layer].index_copy_(2, slots, v)
        return [(*seen[layer], mask) for seen, mask in self.parts]


def keep(cache: TreeCache, first: int, path: list[int]) -> None:
    """Keep of the tree placed at `first` the nodes on this path, from node 0 down."""
    cache.lengths = [first + len(path)] * len(cache.lengths)  # your turn (c): is that enough?


def read(model: Llama, cache: TreeCache, ids: list[int]) -> Tensor:
    """Logits (n, V) of a pass that has been placed, over these tokens."""
    L = model.config.n_layers
    return model.logits(cache.run(model, torch.tensor(ids), 0, L), L)


@torch.inference_mode()
def furthest(model: Llama, text: list[int], tree: list[int], parents: list[int]) -> float:
    """How far a tree's logits are from those of each path read as a plain text, at most."""
    cache, first = TreeCache(model, (), len(text) + len(tree)), len(text) - 1
    cache.place(0, first)
    read(model, cache, text[:-1])
    cache.place_tree(first, parents)
    logits, far = read(model, cache, tree), 0.0
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
