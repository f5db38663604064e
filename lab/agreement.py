"""How often depths pick the same token: on held-out text, greedy continuations, a bench's answers.

Knows nothing of drafting: hispec.py is what turns agreement into speed.
"""

import argparse
import math
import textwrap
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from checkpoints.files import describe, in_words, write_whole
from lab.corpus import held_rows, sample
from lab.prompts import Request
from model import Llama


@torch.no_grad()
def measure(
    model: Llama, rows: Tensor, start: int = 0, depths: tuple | None = None
) -> tuple[float, list[float]]:
    """On rows (B, N+1): the full model's loss, each depth's agreement with it, from start on."""
    n, total = model.config.n_layers, 0.0
    agree = torch.zeros(n + 1, dtype=torch.float64)
    for piece in rows.split(4):
        ids, target = piece[:, :-1], piece[:, start + 1 :]
        h, states = model.embed(ids.to(model.embed.weight.device)), []
        for i in range(n):
            h = model.run(h, i, i + 1)
            states.append(h)
        full = model.logits(states[-1][:, start:], n).float()  # (B, N-start, V)
        loss = F.cross_entropy(full.flatten(0, 1), target.flatten().to(full.device)).item()
        total += loss * len(piece) / len(rows)
        for exit in range(1, n) if depths is None else depths:
            read = model.read(states[exit - 1], exit)[:, start:]
            same = model.logits(read, exit).argmax(-1) == full.argmax(-1)
            agree[exit] += same.double().mean().item() * len(piece) / len(rows)
    return total, agree[1:-1].tolist()


def report(args: argparse.Namespace, model: Llama, held: Tensor, original: Llama | None) -> None:
    """Print and draw every layer's agreement, and what was kept of the original."""
    context, start = args.context, args.context // 2
    rows = held_rows(held, 2 * context)
    cold = torch.zeros(len(rows), dtype=torch.bool)
    loss, on_text = measure(model, rows)
    _, on_greedy = measure(model, sample(model, rows[:, :start], 2 * context + 1, cold), start - 1)
    print(f"\nheld-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
    print("agreement with the full model\nlayer   held-out text   greedy continuations")
    for exit, (a, b) in enumerate(zip(on_text, on_greedy), 1):
        print(f"{exit:5}   {a:13.1%}   {b:20.1%}{'   <- exit' if exit in model.exits else ''}")
    if original is not None:
        p, q = (log_probabilities(m, rows) for m in (original, model))
        kl, same = (p.exp() * (p - q)).sum(-1).mean(), (p.argmax(-1) == q.argmax(-1)).float().mean()
        was = math.exp(F.nll_loss(p.flatten(0, 1), rows[:, 1:].flatten().to(p.device)))
        print(
            f"kept of the original: agreement {same:.1%}, KL {kl:.4f} nats, "
            f"perplexity {was:.2f} -> {math.exp(loss):.2f}"
        )
    header = describe(args.model or "a new model", args.device, model.embed.weight.dtype)
    write_agreement(args.out, on_text, on_greedy, model.exits, header)


@torch.no_grad()
def log_probabilities(model: Llama, rows: Tensor) -> Tensor:
    """Of every next token (B, N, V), after each but the last of rows (B, N+1)."""
    device = model.embed.weight.device
    pieces = [model(r[:, :-1].to(device)).float().log_softmax(-1) for r in rows.split(4)]
    return torch.cat(pieces)


def write_agreement(
    folder: Path, on_text: list[float], on_greedy: list[float], exits: tuple[int, ...], header: dict
) -> None:
    """agreement.csv and agreement.png: by layer, with the setting they were measured in."""
    layers = range(1, len(on_text) + 1)
    setting = [in_words(header), header["command"]]
    lines = [
        *(f"# {line}" for line in setting),
        "layer,held_out_text,greedy_continuations",
        *(f"{i},{a},{b}" for i, a, b in zip(layers, on_text, on_greedy)),
    ]
    table = "\n".join(lines) + "\n"
    write_whole(folder / "agreement.csv", table)
    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(layers, on_text, label="held-out text")
    axes.plot(layers, on_greedy, label="greedy continuations")
    for exit in exits:
        axes.axvline(exit, color="grey", linestyle=":")
    axes.set(xlabel="exit after layer", ylabel="agreement with the full model", ylim=(0, 1))
    axes.legend()
    caption = [x for text in setting for x in textwrap.wrap(text, 110, break_on_hyphens=False)]
    figure.supxlabel("\n".join(caption), x=0.01, ha="left", fontsize=7, color="0.3")
    write_whole(folder / "agreement.png", lambda to: figure.savefig(to, format="png", dpi=150))


@torch.inference_mode()
def choices(model: Llama, exits: set[int], requests: list[Request]) -> dict[int, Tensor]:
    """What these exits and the full model predict along all greedy texts (N,), by depth."""
    predicted = defaultdict(list)
    for request in requests:
        ids = torch.tensor([request.prompt + request.greedy], device=model.embed.weight.device)
        h, first = model.embed(ids[:, :-1]), 0
        for depth in (*sorted(exits), model.config.n_layers):
            h, first = model.run(h, first, depth), depth
            read = model.read(h, depth)[0, len(request.prompt) - 1 :]
            predicted[depth].append(model.logits(read, depth).argmax(-1))
    return {depth: torch.cat(parts) for depth, parts in predicted.items()}


def level_agreement(choice: dict[int, Tensor], exits: tuple[int, ...]) -> dict:
    """How often the levels of a ladder predict the same token, from what `choices` found.

    agreement["4-8"] is the share of tokens on which the levels at depths 4 and 8 agree.
    false_rejects is the share of the draft's tokens refused by the level above it that the full
    model would keep.
    """
    # a look-up predicts nothing
    depths = (*(exit for exit in exits if exit > 0), max(choice))
    pairs = [(a, b) for i, a in enumerate(depths) for b in depths[i + 1 :]]
    draft, middle, full = choice[depths[0]], choice[depths[1]], choice[depths[-1]]
    refused = draft != middle
    same = {f"{a}-{b}": (choice[a] == choice[b]).double().mean().item() for a, b in pairs}
    out: dict = {"agreement": same}
    if len(depths) > 2:  # the two lowest exits
        out["false_rejects"] = ratio((refused & (draft == full)).sum().item(), refused.sum().item())
    return out


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
