"""Changing a plain model: subclasses replace its modules and hold the same tensors."""

from torch import nn


def replaced(module: nn.Module, kinds: dict[type, type]) -> nn.Module:
    """The tree of modules, with classes replaced by subclasses as in `kinds`.

    A changed module is a copy that holds the same tensors; an unchanged one is the module itself.
    """
    below = {
        name: child if child is None else replaced(child, kinds)
        for name, child in module._modules.items()
    }
    kind = kinds.get(type(module), type(module))
    if kind is type(module) and below == module._modules:
        return module
    new: nn.Module = object.__new__(kind)
    new.__dict__.update(module.__dict__)
    new._modules = below
    return new
