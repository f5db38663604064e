"""Unlikelihood: the loss of the tokens in a model's own loops, and what training makes of it."""

import pytest
import test_train_exits
import torch
from conftest import random_model
from test_train_exits import SPEED, train

import checkpoints
import train_exits
from lab.corpus import encode, held_rows, own_loops, read_corpus

corpus, trunk = test_train_exits.corpus, test_train_exits.trunk  # the fixtures


def test_tokens_of_loops_are_made_unlikely():
    """The loss against its formula; its gradient lowers their probability."""
    model, rows = random_model(), torch.randint(11, (3, 9))
    loops = torch.zeros(3, 9)
    loops[:, 5:7] = 2.0
    losses = train_exits.LayerSkipLosses(model)
    total, stats = losses(rows, frozenset(), {}, 1.0, loops)
    p = model(rows[:, :-1]).softmax(-1).gather(2, rows[:, 1:, None]).squeeze(2)
    assert total.item() == pytest.approx(-2 * torch.log1p(-p[:, 4:6]).sum().item() / (3 * 8))
    assert stats.tolist() == [total.item()]
    total.backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 1e-3 * weight.grad / weight.grad.norm()
    after = model(rows[:, :-1]).softmax(-1).gather(2, rows[:, 1:, None]).squeeze(2)
    assert after[:, 4:6].log1p().sum() < p[:, 4:6].log1p().sum()


def test_a_model_is_taught_to_leave_its_loops(tmp_path, corpus, trunk):
    """On the loops it began with, against the same training without."""
    before, tokenizer = checkpoints.load(trunk, "cpu", torch.float32)
    rows = held_rows(encode(tokenizer, read_corpus(corpus)), 64)
    own, inside = own_loops(before, rows)
    probable = []
    for weight in (0, 10):
        options = f"--model {trunk} --exits 1 2 {SPEED} --context 32 --steps 40 --lr 2e-3"
        model, _ = train(tmp_path / str(weight), corpus, f"{options} --unlikelihood {weight}")
        with torch.no_grad():
            p = model(own[:, :-1]).softmax(-1).gather(2, own[:, 1:, None]).squeeze(2)
        probable.append(p[inside[:, 1:]].mean().item())
    assert probable[1] < 0.8 * probable[0]
