"""How often the exits pick the full model's token, on held-out text and on greedy texts."""

import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from checkpoints.files import in_words, write_whole
from lab.corpus import sample
from model import Llama
from train_exits import held_rows, measure


def agreement(model: Llama, held: Tensor, context: int) -> tuple[float, dict[str, list[float]]]:
    """Return the loss on held-out tokens (T,), and layers' agreement there and on greedy text."""
    rows, start = held_rows(held, 2 * context), max(1, context // 2)
    cold = torch.zeros(len(rows), dtype=torch.bool)
    loss, on_text = measure(model, rows)
    continued = sample(model, rows[:, :start], 2 * context + 1, cold)
    _, on_greedy = measure(model, continued, start=start - 1)
    return loss, {"held-out text": on_text, "greedy continuations": on_greedy}


def kept(original: Llama, model: Llama, held: Tensor, context: int) -> str:
    """In words, how much of the original a trained model has kept."""
    rows = held_rows(held, 2 * context)
    p, q = (log_probabilities(m, rows) for m in (original, model))
    kl, same = (p.exp() * (p - q)).sum(-1).mean(), (p.argmax(-1) == q.argmax(-1)).float().mean()
    target = rows[:, 1:].flatten().to(p.device)
    was, now = (F.nll_loss(logs.flatten(0, 1), target).exp() for logs in (p, q))
    said = f"agreement {same:.1%}, KL {kl:.4f} nats, perplexity {was:.2f} -> {now:.2f}"
    return f"kept of the original: {said}"


@torch.no_grad()
def log_probabilities(model: Llama, rows: Tensor) -> Tensor:
    """Log-probabilities (B, N, V) of the next token, after each but the last of rows (B, N+1)."""
    device = model.embed.weight.device
    pieces = [model(r[:, :-1].to(device)).float().log_softmax(-1) for r in rows.split(4)]
    return torch.cat(pieces)


def write_figure(
    folder: Path, header: dict, exits: tuple[int, ...], columns: dict[str, list[float]]
) -> None:
    """Draw agreement.png: the columns of agreement.csv by layer, with the setting below."""
    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    for name, column in columns.items():
        axes.plot(range(1, len(column) + 1), column, label=name)
    for exit in exits:
        axes.axvline(exit, color="grey", linestyle=":")
    axes.set(xlabel="exit after layer", ylabel="agreement with the full model", ylim=(0, 1))
    axes.legend()
    setting = in_words(header), header["command"]
    caption = [x for text in setting for x in textwrap.wrap(text, 110, break_on_hyphens=False)]
    # a dollar sign in a path must not begin a formula
    style = dict(ha="left", fontsize=7, color="0.3", parse_math=False)
    figure.supxlabel("\n".join(caption), x=0.01, **style)
    write_whole(folder / "agreement.png", lambda to: figure.savefig(to, format="png", dpi=150))
