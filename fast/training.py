"""Attention in blocks, for training on a CPU."""

import math

import torch
from torch import Tensor

import model as plain
from fast.modules import replaced


def for_training(model: plain.Llama) -> None:
    """Let the model attend in blocks; compiled, this trains faster on a CPU."""
    model._modules = replaced(model, {plain.Attention: BlockAttention})._modules


class BlockAttention(plain.Attention):
    """Attention for training: see `attend_in_blocks`."""

    def forward(self, x: Tensor, rope: plain.Rope, plan=None, layer: int | None = None) -> Tensor:
        learns = self.training and torch.is_grad_enabled()  # else the fused kernel is faster
        if plan is not None or not learns or x.device.type != "cpu":
            return super().forward(x, rope, plan, layer)
        B, N, _ = x.shape
        x = self.qkv(x).view(B, N, -1, self.head_dim).transpose(1, 2)  # (B, H+2G, N, E)
        q, k, v = x.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = plain.rotate(self.q_norm(q), rope), plain.rotate(self.k_norm(k), rope)
        y = attend_in_blocks(q, k, v)
        return self.out(y.transpose(1, 2).reshape(B, N, -1))


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, size: int = 128) -> Tensor:
    """Causal attention (B, H, N, E) of queries (B, H, N, E) to keys and values (B, G, N, E).

    It uses plain products, of `size` queries at a time with the keys up to the last of these. To
    train on a CPU, compiled, it takes half as long as PyTorch's fused kernel and its gradient.
    """
    (B, H, N, E), G = q.shape, k.shape[1]
    q, blocks = (q * E**-0.5).reshape(B, G, H // G, N, E), []
    for start in range(0, N, size):
        stop = min(start + size, N)
        scores = q[:, :, :, start:stop].reshape(B, G, -1, E) @ k[:, :, :stop].transpose(2, 3)
        ahead = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).triu(start + 1)
        scores = scores.view(B, G, -1, stop - start, stop).masked_fill(ahead, -math.inf)
        weights = scores.softmax(-1).view(B, G, -1, stop)  # (B, G, H/G * n, stop)
        blocks.append((weights @ v[:, :, :stop]).view(B, H, stop - start, E))
    return torch.cat(blocks, 2)
