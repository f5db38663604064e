"""The method and nothing else: no cache, no sampling, no statistics. hispec.py makes it fast.

python lecture/ladder.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from hispec import generate
from model import Config, Llama


def predict(model: Llama, seq: list[int], depth: int) -> list[int]:
    """For each position of seq, the next token that the model cut at `depth` expects."""
    return model(torch.tensor([seq]), depth)[0].argmax(-1).tolist()


def propose(model: Llama, seq: list[int], depths: list[int], windows: list[int], k: int, want: int):
    """Append at least `want` tokens to seq, as level k (the model cut at depths[k]) expects them.

    depths: the exits, then the full depth. windows: one for each exit.
    """
    goal = len(seq) + want
    while len(seq) < goal:
        base = len(seq)
        if k > 0:  # the level below drafts
            propose(model, seq, depths, windows, k - 1, min(windows[k - 1], goal - base))
        expected = predict(model, seq, depths[k])
        expected = expected[base - 1 :]  # for each draft, and for one token after them
        kept = 0
        while base + kept < len(seq) and seq[base + kept] == expected[kept]:
            kept += 1  # a draft is right
        seq[base + kept :] = [expected[kept]]  # corrects the first wrong draft, or adds a token


if __name__ == "__main__":
    torch.set_num_threads(1)  # the model is so small that threads would only wait for each other
    torch.manual_seed(0)
    model = Llama(Config(vocab_size=50, dim=32, n_layers=8, n_heads=4, n_kv_heads=2, ffn_dim=64))
    for weight in model.parameters():
        weight.data *= 5  # with the small initial weights every depth predicts the same token
    prompt, exits, windows = [3, 1, 4], [2, 4], [2, 4]
    text = list(prompt)
    with torch.no_grad():
        propose(model, text, [*exits, 8], windows, k=2, want=20)
    # the last level's own token may lie beyond what was asked for
    assert text[3:23] == generate(model, prompt, 20, exits=exits, windows=windows).tokens
    print(text[3:23])
