import torch
from common import random_model

from kvcache import KVCache

TEXT, TREE = [3, 1, 4], [4, 7, 2, 5, 9, 6, 8]
PARENTS = [-1, 0, 0, 1, 1, 2, 5]


def test_each_node_sees_its_own_path(work):
    assert work.furthest(random_model(), TEXT, TREE, PARENTS) < 1e-9
    assert work.depths(PARENTS) == [0, 1, 1, 2, 2, 2, 3]


@torch.inference_mode()
def test_a_kept_path_is_a_chain(work):
    model = random_model(1)
    for path in ([0], [0, 1, 4], [0, 2, 5, 6]):
        cache = KVCache(model, (), 20)
        work.read(model, cache.plan(0, 2), TEXT[:-1])
        work.read(model, work.plan(cache, 2, PARENTS), TREE)
        work.keep(cache, 2, path)
        (length,) = cache.lengths
        assert length == 2 + len(path)
        kept = TEXT[:-1] + [TREE[i] for i in path]
        plain = model(torch.tensor([[*kept, 10]]))[0, -1]
        assert torch.allclose(work.read(model, cache.plan(length, length + 1), [10])[0], plain)


def test_the_invariant(work):
    assert work.CHANGED == 2
