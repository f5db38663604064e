"""On a CPU's own step a position has the same bits in any company: which pass, which place in it."""

from functools import cache

import pytest
import torch
from conftest import random_model

import checkpoints
import kvcache
import operators
from hispec import step
from kvcache import KVCache
from model import ExitHead, Llama
from operators import can_pack

MIXED = [[5, 1, 16, 3, 2, 8], [16, 1, 1, 9, 4], [7, 2, 13, 1]]  # a position in other places
EVERY = [[2, 16, 3, 15, 4], [14, 5, 13, 6], [7, 12, 8, 11, 1], [10, 9, 10, 9]]  # all in few passes

needs_packing = pytest.mark.skipif(
    not (can_pack(torch.float32) and can_pack(torch.bfloat16)),
    reason="without oneDNN's packed products equal bits are not promised",
)


@cache
def model_of(name: str, dtype: torch.dtype) -> tuple[Llama, tuple[int, ...]]:
    """tiny; or four layers of SmolLM2's shape, with a block and a reduced vocabulary at exit 1."""
    if name == "tiny":
        return checkpoints.load("tiny", "cpu", dtype)[0], (2, 8)
    shape = dict(n_layers=4, dim=576, n_heads=9, n_kv_heads=3, ffn_dim=1536, vocab_size=2000)
    model = random_model(2, scale=3, max_seq_len=128, **shape)
    model.exit_heads["1"] = ExitHead(model.config, vocab=list(range(0, 2000, 3)), width=1536)
    for weight in (
        model.exit_heads["1"].block.attn.out.weight,
        model.exit_heads["1"].block.mlp.down.weight,
    ):
        torch.nn.init.normal_(weight, std=0.05)
    model.requires_grad_(False)
    return model.to(dtype).eval().pack(), (1, 3)


@torch.inference_mode()
def bits(
    model: Llama, exits: tuple[int, ...], sizes: list[int], length: int = 70
) -> dict[str, torch.Tensor]:
    """Hidden states, keys, values, and every level's logits, of passes with sizes in turn."""
    depths, tokens = (*exits, model.config.n_layers), torch.zeros(256, dtype=torch.long)
    ids = torch.arange(length) * 37 % model.config.vocab_size
    tokens[:length] = ids
    cache = KVCache(model, exits, length)
    logits: list[list[torch.Tensor]] = [[] for _ in depths]
    step(model, cache, depths, tokens, 1, len(exits), 1)
    at, turn = 1, 0
    while at < length:
        n = min(sizes[turn % len(sizes)], length - at)
        for k in range(len(depths)):
            logits[k].append(step(model, cache, depths, tokens, at + n, k, n))
        at, turn = at + n, turn + 1
    kept = {"keys": cache.keys, "values": cache.values}
    kept |= {f"hidden {depth}": h for depth, h in cache.hidden.items()}
    kept = {name: t[..., :length, :] for name, t in kept.items()}
    return kept | {f"logits {depth}": torch.cat(rows) for depth, rows in zip(depths, logits)}


@cache
def one_by_one(name: str, dtype: torch.dtype, threads: int) -> dict[str, torch.Tensor]:
    model, exits = model_of(name, dtype)
    return bits(model, exits, [1], 70 if threads == 1 else 42)


def different(name: str, dtype: torch.dtype, sizes: list[int], threads: int) -> list[str]:
    """What has other bits than in passes over one position."""
    model, exits = model_of(name, dtype)
    alone = one_by_one(name, dtype, threads)
    mine = bits(model, exits, sizes, alone["keys"].shape[-2])
    assert all(torch.isfinite(t[t > -torch.inf]).all() for t in mine.values())
    return [part for part in alone if not torch.equal(alone[part], mine[part])]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "SmolLM2's shape"])
def test_a_position_has_the_same_bits_in_any_pass(threads, name, dtype):
    # two threads wait for each other where cores are shared: fewer passes, but all widths
    passes = [*([n] for n in range(2, 17)), *MIXED] if threads == 1 else EVERY
    found = {str(sizes): different(name, dtype, sizes, threads) for sizes in passes}
    assert {sizes: parts for sizes, parts in found.items() if parts} == {}


@needs_packing
def test_eval_mode_again_keeps_what_is_packed():
    model, exits = model_of("SmolLM2's shape", torch.float32)
    alone, together = bits(model.eval(), exits, [1]), bits(model, exits, [7])
    assert [part for part in alone if not torch.equal(alone[part], together[part])] == []


def test_float64_has_the_same_bits_too():
    """On no fast path, and so padded: what property tests of packed models lean on."""
    for sizes in ([2], [3], [5], [7], [13], MIXED[0]):
        assert different("tiny", torch.float64, sizes, 1) == [], sizes


@pytest.mark.parametrize("room", [operators, kvcache], ids=["products", "attention"])
def test_rows_in_ones_are_caught(monkeypatch, room):
    """Plain float32 products and attention take another kernel for one row than for many."""
    name, dtype = "tiny", torch.float32
    monkeypatch.setattr(room, "ROWS", 1)
    model, exits = model_of(name, dtype)
    monkeypatch.setattr(model, "pad", 1 if room is operators else model.pad)
    alone = bits(model, exits, [1])
    together = [bits(model, exits, [n]) for n in (2, 3, 5, 8, 13)]
    if all(torch.equal(alone[part], mine[part]) for mine in together for part in alone):
        pytest.skip("this machine rounds one row as it rounds many")


def test_a_sum_that_onednn_cuts_is_caught(monkeypatch):
    monkeypatch.setattr(operators, "LONGEST", 10**6)
    model_of.cache_clear()
    caught = []
    for dtype in (torch.float32, torch.bfloat16):
        model, exits = model_of("SmolLM2's shape", dtype)
        alone = bits(model, exits, [1])
        for n in (2, 4, 5, 8, 16):
            mine = bits(model, exits, [n])
            caught += [part for part in alone if not torch.equal(alone[part], mine[part])]
    model_of.cache_clear()
    if not caught:
        pytest.skip("this machine's oneDNN does not cut the sums of these shapes")
