"""Shared by the tests: random models, random cases, and a second, naive greedy decoder as the
oracle.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import Config, ExitHead, Llama

settings.register_profile("repo", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("repo")
if not torch.cuda.is_available():  # before triton is imported: its kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # the models are so small that threads only hinder each other


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_model(seed: int = 0, *, scale: float = 20, **shape) -> Llama:
    """A float64 Llama whose random weights are large enough that its exits disagree."""
    torch.manual_seed(seed)
    defaults = dict(
        vocab_size=11, dim=16, n_layers=5, n_heads=4, n_kv_heads=2, ffn_dim=24, max_seq_len=64
    )
    model = Llama(Config(**{**defaults, **shape}))
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(scale)
    return model.double().eval()


@dataclass
class Case:
    """One call of generate: a model and the arguments that go with it."""

    model: Llama
    prompt: list[int]
    max_new_tokens: int
    exits: tuple[int, ...]
    windows: tuple[int, ...]
    stop: tuple[int, ...]
    thresholds: tuple[float, ...] = ()

    @property
    def arguments(self) -> dict:
        return dict(
            exits=self.exits, windows=self.windows, thresholds=self.thresholds, stop=self.stop
        )


@st.composite
def cases(draw, levels=st.integers(1, 4), shapes=st.just({})) -> Case:  # noqa: B008, a strategy is no mutable default
    """Random models and ladders of 1 to 4 levels, some with look-ups (exit 0) and exit heads.

    shapes: further arguments of the models' Config.
    """
    n_levels = draw(levels)
    vocab, layers = draw(st.sampled_from([2, 3, 11, 40])), draw(st.integers(n_levels, 6))
    exits = tuple(sorted(draw(st.permutations(range(layers)))[: n_levels - 1]))
    model = random_model(
        draw(st.integers(0, 10**6)),
        vocab_size=vocab,
        n_layers=layers,
        n_kv_heads=draw(st.sampled_from([1, 2, 4])),
        tie_embeddings=draw(st.booleans()),
        max_seq_len=draw(st.sampled_from([24, 64])),
        **draw(shapes),
    )
    for exit in exits:
        if exit and draw(st.booleans()):
            ids = draw(st.none() | st.lists(st.integers(0, vocab - 1), min_size=1, unique=True))
            head = ExitHead(model.config, width=draw(st.sampled_from([0, 3])), vocab=ids)
            if head.block is not None:
                torch.nn.init.normal_(head.block.attn.out.weight)
                torch.nn.init.normal_(head.block.mlp.down.weight)
            model.exit_heads[str(exit)] = head.double()
    tokens = st.integers(0, vocab - 1)
    return Case(
        model=model,
        prompt=draw(st.lists(tokens, min_size=1, max_size=20)),
        max_new_tokens=draw(st.integers(0, 24)),
        exits=exits,
        windows=tuple(draw(st.integers(1, 5)) for _ in exits),
        stop=tuple(draw(st.sets(tokens, max_size=1))),
        thresholds=tuple(draw(st.sampled_from([0.0, 0.0, 0.3, 0.9])) for _ in exits),
    )


@torch.no_grad()
def greedy(case: Case) -> list[int]:
    """Plain decoding without a cache or hispec.py: it runs the whole sequence again for every
    token.
    """
    ids = list(case.prompt)
    while len(ids) < min(len(case.prompt) + case.max_new_tokens, case.model.config.max_seq_len):
        ids.append(int(case.model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in case.stop:
            break
    return ids[len(case.prompt) :]


def module(name, lines=30):
    """A made-up module, whose lines are words and occur in no other."""
    return "".join(
        f"def {name}_number(value):  # returns what {name} has at {i}\n" for i in range(lines)
    )


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages, next to a standard library of three files of which one is held out."""
    from lab.installed import is_held_out

    library, site = tmp_path / "lib", tmp_path / "site-packages"
    held = next(f"held{i}.py" for i in range(1000) if is_held_out(f"held{i}.py"))
    files = {library / name: module(name[:-3]) for name in ("json.py", "queue.py", held)}
    for name in ("plain/code.py", "plain/deep/code.py", "networkx/graph.py", "plain/tests/code.py"):
        files[site / name] = module(name.replace("/", "_")[:-3])
    graph, code = files[site / "networkx/graph.py"], files[site / "plain/code.py"]
    files |= {
        site / "_alpha/graph.py": graph
        + module("alpha", 5),  # a copy of a held-out file, in a file that is read earlier
        site / "vendor/queue.py": files[library / "queue.py"],
        site / "vendor/code.py": code.replace("\n", "\n    ") + module("vendor", 5),
        site / "table/codes.py": "CODES = [\n"
        + "".join(f"    0x{i:04x}, {i}, {i * i},\n" for i in range(200))
        + "]\n",
        site / "table/line.py": module("line") + "NAMES = '" + "word " * 100 + "'\n",
        site / "table/made.py": "# This file was automatically generated from made.yaml.\n"
        + module("made"),
    }
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    (site / "plain" / "bad.py").write_bytes(b"name = '\xff\xfe'  # not UTF-8")
    (tmp_path / "outside.py").write_text(module("outside"), "utf-8")
    (site / "plain" / "link.py").symlink_to(tmp_path / "outside.py")
    paths = {"stdlib": str(library), "purelib": str(site)}
    monkeypatch.setattr("sysconfig.get_paths", lambda: paths)
    return site


def byte_tokenizer(settings=None):
    """A tokenizer whose tokens are bytes."""
    import tiktoken

    from checkpoints.tokenizer import Tiktoken, Tokenizer

    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("b", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(Tiktoken(encoding, {}), settings or {})
