"""Bad arguments are refused before any work, with what was wrong and what is allowed."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import random_model

import hispec
from arguments import Options, ladder_text, parse_ladder, precise
from hispec import generate
from model import Config, ExitHead

GOOD = dict(prompt=[1, 2], max_new_tokens=4, exits=(1, 3), windows=(2, 4))
BAD = [
    (dict(prompt=[]), "empty"),
    (dict(prompt=[1, 11]), r"prompt.*11.*0\.\.10"),
    (dict(prompt=[-1]), r"prompt.*-1.*0\.\.10"),
    (dict(prompt=[1.5]), r"prompt.*whole numbers.*1\.5"),
    (dict(prompt=[1] * 64), "64 tokens.*context of 64"),
    (dict(max_new_tokens=-1), "max_new_tokens.*between 0 and .*64.*-1"),
    (dict(max_new_tokens=10**12), "max_new_tokens.*between 0 and .*64"),
    (dict(max_new_tokens=2.5), "max_new_tokens.*whole"),
    (dict(exits=(3, 1)), r"ascend.*from 0 on.*\(3, 1\)"),
    (dict(exits=(2, 2)), "ascend"),
    (dict(exits=(1, 5)), r"ascend.*0\.\.4.*\(1, 5\)"),
    (dict(exits=(-1, 2)), "ascend"),
    (dict(exits=None), "exits.*whole"),
    (dict(windows=(2,)), "one length for each of the 2 exits"),
    (dict(windows=(2, 0)), "windows.*at least 1"),
    (dict(windows=(2, 1.5)), "windows.*whole"),
    (dict(thresholds=(0.5,)), "one probability for each of the 2 exits"),
    (dict(thresholds=(0.5, 1.5)), "thresholds.*0 to 1"),
    (dict(thresholds=(-0.1, 0.5)), "thresholds.*0 to 1"),
    (dict(thresholds=(0.5, math.nan)), "thresholds.*0 to 1"),
    (dict(thresholds=0.5), r"thresholds must be a list of probabilities, got 0\.5"),
    (dict(top_k=-1), "top_k.*or 0 for all, got -1"),
    (dict(top_p=0), "top_p.*above 0 and at most 1, got 0"),
    (dict(top_p=1.1), "top_p"),
    (dict(top_p=math.nan), "top_p"),
    (dict(temperature=-0.1), "temperature"),
    (dict(temperature=math.nan), "temperature"),
    (dict(temperature=math.inf), "temperature"),
    (dict(seed=-1), "seed"),
    (dict(seed=2**63), "seed"),
    (dict(stop=[11]), r"stop.*11.*0\.\.10"),
    (dict(stop=5), "stop takes a list of whole numbers, got 5"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_arguments(monkeypatch, change, message):
    monkeypatch.setattr(hispec, "KVCache", None)  # any work at all would fail on this
    with pytest.raises(ValueError, match=message):
        generate(random_model(), **{**GOOD, **change})


def test_autocast_is_refused_in_one_line():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        generate(random_model(), [1], 4)


def test_distributions_are_as_precise_as_the_device_can():
    assert precise(torch.device("mps")) == torch.float32  # which has no float64
    logits = torch.tensor([1.0, 2.0])
    assert Options().distribution(logits).dtype == precise(logits.device) == torch.float64


LADDERS = [
    ("2(4)", (2,), (4,), (0.0,)),
    ("0(8) 8(6)", (0, 8), (8, 6), (0.0, 0.0)),
    ("1(1) 2(2 <0.2) 8(4)", (1, 2, 8), (1, 2, 4), (0.0, 0.2, 0.0)),
]


@pytest.mark.parametrize("text, exits, windows, thresholds", LADDERS)
def test_a_ladder_is_written_and_read(text, exits, windows, thresholds):
    assert ladder_text(exits, windows, thresholds) == text
    read = parse_ladder(text)
    assert (read.exits, read.windows, read.thresholds) == (exits, windows, thresholds)
    assert parse_ladder(f"  {text.replace(' <', '<').replace('(', ' ( ')} ") == read


@pytest.mark.parametrize("text", ["", "2", "2(4", "2(4) eight(6)"])
def test_a_ladder_that_is_none(text):
    with pytest.raises(ValueError, match="written as"):
        parse_ladder(text)


def test_arguments_of_any_integer_kind():
    def tokens(*arguments, **options):
        return generate(model, *arguments, **options).tokens

    model = random_model()
    plain = tokens([1, 2], 4)
    last = plain[-1:]
    ladder = dict(exits=range(1, 3), windows=[2, 2])
    stopped = plain[: plain.index(last[0]) + 1]
    assert tokens(torch.tensor([1, 2]), 4, **ladder, stop=iter(last)) == stopped
    ladder = dict(exits=torch.tensor([1]), windows=[2])
    assert tokens([1, 2], 4, **ladder, stop=torch.tensor(last)) == stopped
    small = np.array([2, 1], dtype=np.int8)[::-1]
    ladder = dict(exits=small[:1], windows=small[1:], seed=small[0])
    assert tokens(small, small[1] + 2, **ladder) == plain
    assert tokens(b"\x01\x02", torch.tensor(4), temperature=Fraction(0)) == plain
    assert tokens([1, 2], 0) == []
    assert tokens([1] * 63, 64) == tokens([1] * 63, 1)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dim=18), "multiple of n_heads"),
        (dict(n_kv_heads=3), "multiple of n_kv_heads"),
        (dict(n_layers=0), "n_layers must be a whole number of at least 1"),
        (dict(rope_theta=0.0), "rope_theta must be a number above 0"),
        (dict(head_dim=5), "even"),
    ],
)
def test_bad_configs(change, message):
    good = dict(vocab_size=11, dim=16, n_layers=5, n_heads=4, n_kv_heads=2, ffn_dim=24)
    with pytest.raises(ValueError, match=message):
        Config(**{**good, **change})


def test_bad_exits_and_draft_vocabularies():
    model = random_model()
    for exit in (0, 6, -1):
        with pytest.raises(ValueError, match="between 1 and 5"):
            model(torch.tensor([[1]]), exit=exit)
    for vocab in ([], [1, 1], [-1, 2], [11]):
        with pytest.raises(ValueError, match=r"0\.\.10"):
            ExitHead(model.config, vocab=vocab)
