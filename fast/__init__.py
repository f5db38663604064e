"""Faster steps, for generate(fast=...). The core does not need this folder.

    step_for(model, max_len)           a step for the model's device: packed on a CPU, else captured
    fast.cpu.prepare(model)            packs a model on a CPU, in place, and gives it its step
    fast.cuda.FixedStep(model, room)   passes of one shape, captured on CUDA
    fast.rounds.RoundStep(model, room) and whole rounds, captured
    fast.kernels.FusedLlama            a small model's layers in one kernel: FixedStep(fused=True)
    fast.training.for_training(model)  attention in blocks, for training on a CPU
    fast.parallel.start(device)        several processes share a model

Both kinds of step share layers.py. A plain model is changed by replacing its modules by subclasses
that compute the same. Each file is imported only when it is needed: on a CPU, no CUDA code.
"""

from typing import Any

from model import Llama


def step_for(model: Llama, max_len: int, compiled: bool = True) -> Any:
    """Return the fastest step for the model on its device.

    max_len: the longest sequence, in tokens, that a captured step has room for, prompt included.
    compiled: whether its layers are compiled before they are captured, which takes some seconds.
    """
    if model.embed.weight.is_cuda:
        from fast.rounds import RoundStep

        return RoundStep(model, max_len, compiled)
    from fast.cpu import prepare

    return prepare(model)
