"""The same steps, faster: what generate(fast=...) takes. The core does not need this folder.

    prepare(model)             packs a model on a CPU, in place, and gives it its step
    step_for(model, max_len)   a step for the model's device: packed on a CPU, captured on CUDA
    for_training(model)        attention in blocks, for training on a CPU

layers.py holds what both kinds of step share, cpu.py packed weights, cuda.py captured graphs. A
plain model is changed by replacing its modules by subclasses that compute the same.
"""

from fast.cpu import PackedStep, for_training, prepare
from fast.cuda import FixedStep
from model import Llama

__all__ = ["FixedStep", "PackedStep", "for_training", "prepare", "step_for"]


def step_for(model: Llama, max_len: int, compiled: bool = True) -> PackedStep | FixedStep:
    """The fastest step for the model where it is.

    max_len: the longest sequence that a captured step has room for, prompt included, in tokens.
    compiled: whether its layers are compiled before they are captured, which takes some seconds.
    """
    if model.embed.weight.is_cuda:
        return FixedStep(model, max_len, compiled)
    return prepare(model)
