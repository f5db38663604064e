"""Exercise 10, thirty minutes: what a draft head should look at.

python lecture/exercises/10_look_back.py

A draft head looks at exit 8's state one position before the newest token, and at that token, which
no layer has run yet (EAGLE, arXiv 2401.15077). Which of the two does it need? Here the head is as
small as can be. Its block adds nothing, so it is a single matrix, `fuse`, from both inputs to the
next state of exit 8, and least squares finds that matrix in a second.

(a) `before`: the stub gives the head the newest token's own state. The head is then right nearly
every time on existing text, but never when it drafts. Give it the state that decoding has.
(b) `look`: let the head see only the state, or only the token.

Before you run it, say what each of the two can know that the other cannot. And why is the second
draft in a row worse than the first? No state is missing when the matrix is fitted.
"""

import csv
import heapq
import json.decoder
import queue
import shelve
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from common import CODE, tiny
from torch import Tensor

from hispec import Step, generate
from model import DraftHead, Llama

EXIT = 8
LADDER = dict(exits=(0, EXIT), windows=(2, 4), draft_head=EXIT)
TO_LEARN, HELD_OUT = (csv, json.decoder, queue, shelve), (heapq, textwrap)
LOOKS = ("state", "token", "both")


def before(h: Tensor) -> Tensor:
    """For each token, the state that is there when the head drafts after it, from h (R, N, D).

    h[:, t] is exit 8's state at position t. The state before the first token is 0.
    """
    return h  # your turn (a)


def look(state: Tensor, token: Tensor, looks: str) -> tuple[Tensor, Tensor]:
    """State and token (R, N, D), with 0 for the one that the head must not see."""
    return state, token  # your turn (b): "state" is only the state, "token" only the token


def fit(model: Llama, ids: Tensor, h: Tensor, looks: str) -> DraftHead:
    """A head on exit 8 whose block adds nothing, fitted to tokens (R, N) and states (R, N, D)."""
    head = DraftHead(model.config).requires_grad_(False).eval()
    head.block.attn.out.weight.zero_()
    head.block.mlp.down.weight.zero_()
    head.out.norm.weight.copy_(model.norm.weight)  # exit 8 has no norm of its own
    state, token = head.state_norm(before(h)), head.token_norm(model.embed(ids))
    x = torch.cat(look(state, token, looks), dim=-1).flatten(0, 1).double()  # (R * N, 2D)
    y = F.rms_norm(h, h.shape[-1:]).flatten(0, 1).double()  # (R * N, D): the states' directions
    small = len(x) / 1000 * torch.eye(x.shape[1], dtype=x.dtype)  # a small ridge penalty
    head.fuse.weight.copy_(torch.linalg.solve(x.T @ x + small, x.T @ y).T)
    return head


def read(model: Llama, tokenizer, modules) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (R, N) of some modules' source, exit 8's states (R, N, D) and its choices (R, N)."""
    text = "".join(Path(module.__file__).read_text("utf-8") for module in modules)
    tokens = torch.tensor(tokenizer.encode(text))
    ids = tokens[: len(tokens) // 128 * 128].view(-1, 128)
    h = model.run(model.embed(ids), 0, EXIT)
    return ids, h, model.logits(h, EXIT).argmax(-1)


@torch.inference_mode()
def compare() -> dict[str, tuple[float, int, int]]:
    """For each of LOOKS: how often the head picks exit 8's token on held-out text; how many drafts
    exit 8 keeps when the head drafts, and of how many.
    """
    model, tokenizer = tiny()
    (ids, h, _), (new, new_h, choices) = (
        read(model, tokenizer, modules) for modules in (TO_LEARN, HELD_OUT)
    )
    prompt, step, found = tokenizer.chat([CODE]), Step(model), {}
    plain = generate(model, prompt, 48, fast=step)
    for looks in LOOKS:
        model.draft_heads[str(EXIT)] = fit(model, ids, h, looks)
        logits = model.draft_logits(model.draft(EXIT, before(new_h), new), EXIT)
        out = generate(model, prompt, 48, **LADDER, fast=step)
        assert out.tokens == plain.tokens
        agrees = (logits.argmax(-1) == choices).double().mean().item()
        found[looks] = agrees, out.levels[0].accepted, out.levels[0].proposed
    return found


def main() -> None:
    for looks, (agrees, accepted, proposed) in compare().items():
        print(f"{looks}: exit 8's token {agrees:.0%} of the time, {accepted} of {proposed} kept")


if __name__ == "__main__":
    main()
