"""Token v is kept with probability min(q, p). Missing from p is the positive part of p - q.

A draw from p distributes the rejected share as p, so a token that q favours is written too often:
it has its full share already. At temperature 0 both p and q are certain of one token each. A
rejected draft then differs from p's token, and the residual is p itself.
"""

import torch


def off(q, p) -> float:
    kept = torch.minimum(q, p)
    return float((kept + (1 - kept.sum()) * p - p).abs().sum() / 2)


def replacement(q, p):
    return (p - q).clamp(min=0)
