"""One read for each verification, and one for each step of a level that has a threshold.

Level 0 judges nothing, so without a threshold it reads nothing. Greedy decoding has one level, its
last, which reads once a token.
"""

from contextlib import ExitStack
from unittest import mock

from torch import Tensor


def reads(work) -> int:
    count = 0

    def counting(real):
        def read(tensor):
            nonlocal count
            count += 1
            return real(tensor)

        return read

    with ExitStack() as stack:
        for name in ("item", "tolist"):
            put = mock.patch.object(Tensor, name, counting(getattr(Tensor, name)))
            stack.enter_context(put)
        work()
    return count


def expected(out, thresholds) -> int:
    calls = [level.calls for level in out.levels]
    verifications = sum(calls[1:]) if len(calls) > 1 else calls[0]
    return verifications + sum(c for c, t in zip(calls, thresholds) if t > 0)
