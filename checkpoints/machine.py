"""Measure this machine and decoding on it: threads, memory, passes, steps.

Nothing is stored here: ladders.py keeps what was found, and bench.py and lab/ measure with this.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from arguments import LevelStats
from checkpoints.cores import cores
from hispec import Decoder, Step, generate
from model import Llama

WIDTH = 16  # positions: the widest pass that `limits` times


# ---- threads ------------------------------------------------------------------------------------


def best_threads(model: Llama) -> int:
    """The number of threads with which the CPU decodes fastest; of nearly equal ones, the fewest.

    Decoding one token at a time leaves little work to share, and threads that wait for each other
    can cost far more than they gain, above all if cores are few or shared.
    """
    best, shortest, threads = 1, math.inf, 1
    while threads <= cores():
        torch.set_num_threads(threads)
        seconds = seconds_of_few(model)
        if seconds < 0.95 * shortest:
            best, shortest = threads, seconds
        if seconds > 1.5 * shortest:
            break  # more threads would be even worse, and slow to measure
        threads *= 2
    return best


def seconds_of_few(model: Llama) -> float:
    """Seconds that greedy decoding of a few tokens takes: enough to tell settings apart."""
    generate(model, [0], 2)
    return min(generate(model, [0], 6).seconds for _ in range(3))


# ---- passes and steps ---------------------------------------------------------------------------


def timed(call: Callable, device: torch.device) -> float:
    """Seconds of one call: the fastest of twenty, since other work can only add to the time."""
    took = []
    for _ in range(20):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began)
    return min(took)


@torch.inference_mode()
def pass_seconds(
    step: Step, depth: int, widths: Sequence[int], context: int
) -> tuple[list[float], list[float]]:
    """Seconds of passes over each of `widths` positions that follow `context` others.

    The first list is for the layers up to `depth` (and its block, if the exit has one), the second
    includes its head.
    """
    model, longest = step.model, context + max(widths)
    exits = (depth,) if depth < model.config.n_layers else ()
    device = model.embed.weight.device
    with step.open(exits, longest) as cache:
        tokens = torch.zeros_like(cache.columns)
        step.segment(cache, tokens, 0, context)

        def layers(n: int) -> None:
            cache.rollback(context)
            step.segment(cache, tokens, 0, context + n)

        def whole(n: int) -> None:
            cache.rollback(context)
            step.run(cache, tokens, context + n, 0, n).argmax(-1)

        below, all_of_it = (
            [timed(partial(call, n), device) for n in widths] for call in (layers, whole)
        )
    return below, all_of_it


def limits(step: Step, context: int) -> dict:
    """What bounds greedy decoding here: how fast memory is read, and how long full passes take.

    A full pass reads each weight once, so greedy_tokens_per_second is what the memory allows. A
    model that fits into the processor's caches can be faster. Keys and values are not counted.
    pass_seconds: by the number of positions, head included. layer_seconds, head_seconds: for a pass
    over one position.
    """
    model, c = step.model, step.model.config
    layer = c.dim * c.head_dim * 2 * (c.n_heads + c.n_kv_heads) + 3 * c.dim * c.ffn_dim + 2 * c.dim
    weights = c.n_layers * layer + c.dim + c.vocab_size * c.dim
    size, speed = weights * model.embed.weight.itemsize, memory_speed(model)
    layers, whole = pass_seconds(step, c.n_layers, (1, 2, 4, 8, WIDTH), context)
    return {
        "bytes_per_second": speed,
        "pass_bytes": size,
        "greedy_tokens_per_second": speed / size,
        "pass_seconds": dict(zip(("1", "2", "4", "8", str(WIDTH)), whole, strict=True)),
        "layer_seconds": layers[0] / c.n_layers,
        "layers": c.n_layers,
        "head_seconds": max(0.0, whole[0] - layers[0]),
    }


@torch.inference_mode()
def memory_speed(model: Llama) -> float:
    """Bytes read per second, in the best of five runs of ten products of a matrix and a vector.

    The matrix is too large for most caches.
    """
    weight = model.embed.weight
    matrix = torch.ones(8192, 8192, device=weight.device, dtype=weight.dtype)
    fastest = math.inf
    for _ in range(6):  # the first warms up
        began = time.perf_counter()
        for _ in range(10):  # with one, a GPU's host would be timed
            product = matrix @ matrix[0]
        product[0].item()
        fastest = min(fastest, (time.perf_counter() - began) / 10)
    return matrix.nbytes / fastest


@dataclass
class Notes:
    """What was observed in one generation."""

    tokens: int = 0
    seconds: float = 0.0  # in all
    steps: list[float] = field(default_factory=list)  # of these, in each level's steps
    # the level that verified, how many drafts, how many it kept; without the prompt's own pass
    checks: list[tuple[int, int, int]] = field(default_factory=list)
    memory: int | None = None  # peak bytes of GPU memory, weights included


class Watched(Decoder):
    """A decoder that also takes notes. It is slower, since it waits for each step to time it."""

    def __init__(self, notes: Notes, *arguments):
        super().__init__(*arguments)
        self.notes, self.device = notes, self.tokens.device
        notes.steps = [0.0] * len(self.depths)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def run(self, k: int, base: int) -> torch.Tensor:
        began = time.perf_counter()
        logits = super().run(k, base)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.notes.steps[k] += time.perf_counter() - began
        return logits

    def draft(self, want: int) -> torch.Tensor | None:
        began = time.perf_counter()
        q = super().draft(want)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.notes.steps[0] += time.perf_counter() - began
        return q

    def report(self, k: int, base: int, drafts: list[int], kept: int) -> None:
        super().report(k, base, drafts, kept)
        if k > 0 and base > self.start:
            self.notes.checks.append((k, len(drafts), kept))

    def statistics(self) -> list[LevelStats]:
        if self.device.type == "cuda":
            self.notes.memory = torch.cuda.max_memory_allocated(self.device)
        return super().statistics()


def watch(decode: Callable, prompt: list[int], max_new_tokens: int, stop=()) -> Notes:
    """Decode with `generate`, or a partial of it, and note where the time goes."""
    notes = Notes()
    made = decode(prompt, max_new_tokens, stop=stop, decoder=partial(Watched, notes))
    notes.tokens, notes.seconds = len(made.tokens), made.seconds
    return notes


def what_was_seen(notes: list[Notes]) -> dict:
    """Sum up the share of time in each level's steps and outside, and how many drafts were kept.

    acceptance_by_position[k][i]: of level k's drafts that have an i-th token (from 0), the share
    whose i-th token was kept; a token after a rejected one is not. accepted_length[k]: drafts kept
    per verification.
    """
    total = sum(n.seconds for n in notes)
    shares = [sum(steps) / total for steps in zip(*(n.steps for n in notes), strict=True)]
    by_position, lengths = [], []
    for k in range(1, len(shares)):
        checks = [(drafts, kept) for n in notes for level, drafts, kept in n.checks if level == k]
        widest = max((drafts for drafts, _ in checks), default=0)
        by_position.append(
            [
                ratio(sum(kept > i for _, kept in checks), sum(drafts > i for drafts, _ in checks))
                for i in range(widest)
            ]
        )
        lengths.append(ratio(sum(kept for _, kept in checks), len(checks)))
    found = {"time_share": shares, "time_share_loop": 1 - sum(shares)}
    found["peak_bytes"] = max((n.memory for n in notes if n.memory is not None), default=None)
    if len(shares) > 1:
        found |= {"acceptance_by_position": by_position, "accepted_length": lengths}
    return found


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
