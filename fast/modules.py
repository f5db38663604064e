"""How a plain model is changed: subclasses in place of its modules, with the same tensors."""

from torch import nn


def replaced(module: nn.Module, kinds: dict[type, type]) -> nn.Module:
    """The tree of modules with subclasses in place of classes.

    What changes is a copy that holds the same tensors; what does not is the module itself.
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
