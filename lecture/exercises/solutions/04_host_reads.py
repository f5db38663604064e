"""One read for each verification, and one for each step of a level that has a threshold.

Level 0 verifies nothing, so without a threshold it reads nothing. Greedy decoding has only one
level, the last, which reads once per token.
"""

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Reads(TorchFunctionMode):
    """Counts the host reads made inside its `with` block."""

    count = 0

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.count += function in (Tensor.item, Tensor.tolist)
        return function(*arguments, **(options or {}))


def reads(work) -> int:
    with Reads() as mode:
        work()
    return mode.count


def expected(out, thresholds) -> int:
    calls = [level.calls for level in out.levels]
    verifications = sum(calls[1:]) if len(calls) > 1 else calls[0]
    return verifications + sum(c for c, t in zip(calls, thresholds) if t > 0)
