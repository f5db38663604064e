"""Give a Llama early exits that are good enough to draft and to filter.

    python train_exits.py --out DIR                              1. a small model, from scratch
    python train_exits.py --out DIR --model M --freeze-trunk     2. exit heads for a model M
    python train_exits.py --out DIR --model M --draft-head E     a draft head on exit E of M

Recipe 1 is LayerSkip's (arXiv 2404.16710): layers are skipped at random, deep ones more often, and
every exit is read through the final norm and output matrix. An exit learns from the text and, with
a share that grows to 4/5 half-way through, from the last layer's distribution. The first exit's
loss has weight 0.3, that of every other exit and of the last layer 1. Two things differ from the
paper: skipping fades out instead of in, since it costs little while the deep layers know little,
and matrices are trained with Muon.

Recipe 2 distils the full model into one ExitHead per exit: a light block, a norm, and the output
rows of the tokens that M uses most. The trunk never changes, so it reads each row of text only
once and its hidden states are kept while there is room; after that only the heads are computed.

A draft head (model.DraftHead) learns the whole distribution of an exit, or of the full model, from
the states that this exit has already computed. As in recipe 2 the trunk is frozen. The head is
trained on several drafts in a row, as decoding will ask for them. If M has such a head already, its
training continues. M is `tiny` unless you name another.

The text is Python's standard library, or any file or folder that --corpus names. Recipe 1 learns
its vocabulary from it. One twenty-eighth is held out for measuring. DIR receives model/, which
checkpoints.load reads; training.safetensors, from which --resume continues; learning.csv, what was
measured on held-out text along the way; and at the end agreement.csv: how often the exit after each
layer picks the full model's token, or, for a draft head, how often each of its drafts in a row is
the token that the exit picks.

This file knows nothing of drafting or verifying: it makes exits agree, and hispec.py turns
agreement into speed. lab/train.py builds on it: it trains all of a given model, with several
processes, on a larger corpus or on the model's own writing, and draws the table as a figure.
"""

import argparse
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import random
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import checkpoints
from checkpoints.console import Parser, check_exits, command, must_take_files
from checkpoints.files import describe, in_words, open_tensors, write_whole
from checkpoints.tokenizer import Tokenizer
from checkpoints.vocabulary import END, learn
from model import Config, DraftHead, ExitHead, Llama

try:
    from fast.training import for_training
except ModuleNotFoundError:  # without fast/, training on a CPU is slower
    for_training = None  # type: ignore[assignment]

# ---- settings -----------------------------------------------------------------------------------

DRAFT_WEIGHT = 0.3  # loss weight of the first exit; the last layer's is 1
EXIT_WEIGHT = 1.0  # loss weight of the other exits
MAX_DROP = 0.6  # probability that the last layer is skipped, at the start of the run
MAX_SHARE = 0.8  # greatest weight of the last layer's distribution in an exit's loss; rest: text
WARM_UP = 60  # steps in which the learning rate rises
DECAY = 0.45  # final share of the run, in which it falls to 0
DIVERGED = 2.0  # a run stops with an error at this many times the loss of uniform guessing
LONG = 8  # recipe 1: every sixth step's rows are this many times as long, to train far positions
WHOLE = 4  # recipe 2: all rows are this many times --context
KEPT = 4 * 2**30  # frozen trunk: bytes of its hidden states that are kept for the next epoch
DRAFTS = (1.0, 0.5, 0.25)  # draft head: the loss weights of its first draft, second draft, ...
HELD_OUT = 28  # one document in this many is never trained on
FEW = 400  # with fewer documents, each one's end is held out: chance might pick none, or too many
CUT = 500  # recipe 1: the text is cut once in this many characters
SAVE_EVERY = 180  # seconds


def options(description: str | None = __doc__) -> Parser:
    p = Parser(description=description)
    add = p.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    add("--model", metavar="M", help="a name, .gguf file or folder to start from")
    add("--freeze-trunk", action="store_true", help="recipe 2: train only heads at the exits of M")
    add("--draft-head", type=int, default=0, metavar="E", help="train only a draft head on exit E")
    add("--corpus", metavar="PATH", help="a text file or a folder (default: Python's library)")
    own = "default: M's own, or 1/16 and 1/4 of the depth; given none: no exit losses"
    add("--exits", type=int, nargs="*", metavar="E", help=f"shallow to deep ({own})")
    add("--steps", type=int, help="default: 1000 without --minutes")
    add("--minutes", type=float, help="a budget that the schedule adapts to, so that reruns differ")
    add("--batch", type=int, default=8192, help="tokens per step")
    add("--micro", type=int, default=2048, help="tokens per pass, for less memory or more speed")
    rows = f"tokens per row; {LONG} times as many in every sixth step, {WHOLE} times for exit heads"
    add("--context", type=int, default=128, help=rows)
    add("--lr", type=float, help="peak learning rate (default: 3e-3, 2e-3 for recipe 2)")
    add("--seed", type=int, default=0)
    where = "pays on GPUs, and on CPUs with AVX-512 BF16 or AMX"
    add("--bf16", action="store_true", help=f"compute in bfloat16; {where}")
    fuse = "fuse the operations of each layer and of the loss; needs a C++ compiler"
    add("--compile", action="store_true", help=fuse)
    add("--resume", action="store_true", help="continue DIR/training.safetensors")
    shape = p.add_argument_group("the model that recipe 1 makes")
    for name, default in dict(layers=32, dim=128, heads=2, kv_heads=1, ffn=384, vocab=2048).items():
        shape.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    heads = p.add_argument_group("new heads")
    heads.add_argument("--width", type=int, help="of an exit's SwiGLU (default: M's), 0: no block")
    heads.add_argument("--draft-vocab", type=int, default=8192, help="tokens a head may draft")
    return p


def check(args: argparse.Namespace, writes: bool = True) -> None:
    """Fill in defaults. ValueError if an option is wrong, before a model or text is read.

    writes: whether this process will write to --out.
    """
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.draft_head:
        if args.freeze_trunk or args.exits is not None:
            raise ValueError("--draft-head trains one head alone: no --freeze-trunk, no --exits")
        args.model = args.model or "tiny"
    if args.steps is None and args.minutes is None:
        args.steps = 1000
    if args.lr is None:
        args.lr = 2e-3 if args.freeze_trunk else 3e-3
    for name in ("steps", "minutes", "batch", "micro", "context", "lr", "draft_vocab"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if args.exits is not None:
        check_exits(args.exits, 1, None if args.model else args.layers)
    if args.freeze_trunk and args.exits == []:
        raise ValueError("--freeze-trunk trains exits only, and --exits names none")
    if args.batch < LONG * args.context:
        raise ValueError(f"--batch must hold {LONG} x --context tokens, got {args.batch}")
    file = args.out / "training.safetensors"
    if file.exists() and not args.resume:
        raise ValueError(f"{args.out} holds a run already: --resume continues it")
    if args.resume and not file.exists():
        raise ValueError(f"nothing to resume: {file} does not exist")
    if writes:
        must_take_files(args.out)
        if args.bf16 and args.device.type == "cpu" and (times := bfloat16_takes()) > 2:
            print(f"--bf16: products in bfloat16 take {times:.0f} times as long on this processor")


def bfloat16_takes() -> float:
    """Return how many times as long a matrix product takes in bfloat16 as in float32 here."""
    fastest = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, times = torch.ones(256, 256, dtype=dtype), []
        for _ in range(4):
            began = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - began)
        fastest[dtype] = min(times)
    return fastest[torch.bfloat16] / fastest[torch.float32]


# ---- data ---------------------------------------------------------------------------------------

# folders of the standard library that hold no text worth learning
NO_TEXT = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


def read_corpus(path: str | Path | None) -> dict[str, str]:
    """Name -> text, for every UTF-8 file under path, or for every 32,768 characters of one file.

    path None: the standard library without its tests and character tables, about 11 MB.
    Raises ValueError if there is no text.
    """
    if path is not None and not Path(path).exists():
        raise ValueError(f"no corpus at {path}")
    root, skip = Path(path or sysconfig.get_paths()["stdlib"]), set() if path else NO_TEXT
    if root.is_file():
        text = root.read_text("utf-8", errors="replace")
        return {f"{root.name}:{i}": text[i : i + 2**15] for i in range(0, len(text), 2**15)}
    documents = {}
    for file in sorted(root.rglob("*" if path else "*.py")):
        name = file.relative_to(root)
        if not skip & set(name.parts) and (found := read_file(file)) is not None:
            documents[name.as_posix()] = found
    if not any(documents.values()):
        raise ValueError(f"the corpus is empty: {root} has no UTF-8 text")
    return documents


def read_file(file: Path) -> str | None:
    """A file's text, or None if it is not text or cannot be read; the latter is reported."""
    try:
        return file.read_text("utf-8") if file.is_file() else None
    except UnicodeDecodeError:  # a test of bad encodings, or not text at all
        return None
    except OSError as error:
        print(f"left out of the corpus: {error}")
        return None


def split(documents: dict[str, str]) -> tuple[list[str], list[str]]:
    """The texts to train on and those held out: whole documents, or each one's end if few."""
    if len(documents) < FEW:
        cuts = [(text, len(text) - len(text) // HELD_OUT) for text in documents.values()]
        return [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]
    held = {name for name in documents if is_held_out(name)}
    return [documents[n] for n in documents if n not in held], [documents[n] for n in held]


def is_held_out(name: str) -> bool:
    """Decide by a hash of the name, so that a file stays held out when others come and go."""
    return digest(name) % HELD_OUT == 0


def digest(name: str) -> int:
    return int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16)


def encode(tokenizer: Tokenizer, texts: list[str], cut: bool = False) -> Tensor:
    """All texts as one row of token ids (T,), each followed by END if the tokenizer has one.

    cut: cut each text at random places, and encode the pieces separately. A prompt may end in the
    middle of a word, whose beginning is then spelled with other tokens than in the whole word, and
    a model can continue from there only if it has seen such endings.
    """
    end = [tokenizer.special[END]] if END in tokenizer.special else []
    rng = random.Random(0)
    rows: list[list[int]] = [[]]
    for text in texts:
        places = sorted(rng.randrange(len(text)) for _ in range(len(text) // CUT if cut else 0))
        pieces = [text[i:j] for i, j in itertools.pairwise([0, *places, len(text)])]
        rows.append([id for piece in pieces for id in tokenizer.encode(piece)] + end)
    return torch.cat([torch.tensor(row, dtype=torch.int32) for row in rows])


def shuffled(i: int, n: int, seed: int) -> int:
    """The i-th window of n, in an order that is shuffled again each epoch."""
    return int(permutation(n, seed * 1_000_003 + i // n)[i % n])


@functools.lru_cache(2)  # a step may end one epoch and begin the next
def permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def batch(text: Tensor, step: int, rows: int, context: int, seed: int) -> Tensor:
    """A step's rows (rows, context+1): shuffled windows, at an offset drawn again each epoch."""
    windows = (len(text) - 1) // context - 1
    out = []
    for i in range(step * rows, (step + 1) * rows):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + i // windows)
        offset = int(torch.randint(context, (1,), generator=rng))
        start = shuffled(i, windows, seed) * context + offset
        out.append(text[start : start + context + 1])
    return torch.stack(out).long()


def held_rows(text: Tensor, context: int, n: int = 16) -> Tensor:
    """n rows (n, context+1), evenly spread over the text."""
    starts = torch.linspace(0, len(text) - context - 1, n).long().tolist()
    return torch.stack([text[s : s + context + 1] for s in starts]).long()


# ---- recipe 1: every layer learns ---------------------------------------------------------------


class LayerSkip:
    """One pass through the layers, some of them skipped, read at every exit."""

    def __init__(self, model: Llama, text: Tensor, args: argparse.Namespace):
        self.model, self.text, self.args = model, text, args
        self.depth, self.names = model.config.n_layers, ["last layer", *exit_names(model)]
        self.weights = {e: EXIT_WEIGHT if i else DRAFT_WEIGHT for i, e in enumerate(model.exits)}
        self.max_drop = MAX_DROP
        self.cross_entropies = cross_entropies
        if args.compile:
            self.cross_entropies = torch.compile(cross_entropies, dynamic=False)

    def gradients(self, run: "Run", done: float) -> Tensor:
        """Add up the gradients of one step. Returns (1 + exits, 2): one row for each of `names`.

        The last layer's loss and how often it picks the text's token; then each exit's loss and how
        often it picks the last layer's token.
        """
        rows = self.rows(run.step)
        skipped = draw_skips(self.depth, self.max_drop * (1 - done), run.step, self.args.seed)
        loss = functools.partial(self.loss, skipped=skipped, share=self.share(done))
        return run.backward(loss, run.mine(rows), len(rows), self.args.micro // (rows.shape[1] - 1))

    def rows(self, step: int) -> Tensor:
        context = self.args.context * (LONG if step % 6 == 5 else 1)
        return batch(self.text, step, self.args.batch // context, context, self.args.seed)

    def share(self, done: float) -> float:
        """The weight of the last layer's distribution in an exit's loss; the text has the rest."""
        return MAX_SHARE * min(1.0, 2 * done)

    def loss(self, rows: Tensor, skipped: frozenset[int], share: float) -> tuple[Tensor, Tensor]:
        """The mean loss of rows (R, N+1) of token ids, and the table of `gradients` for them."""
        rows = rows.to(self.args.device)
        ids, target = rows[:, :-1], rows[:, 1:].flatten()  # (R, N), (R*N,)
        logits, states = self.run(ids, skipped)
        total = self.last_loss(logits, ids, target)
        stats = [total.detach(), (logits.detach().argmax(-1) == target).float().mean()]
        for exit, weight in self.weights.items():
            loss, agrees = self.exit_loss(states[exit], exit, logits.detach(), target, share)
            total = total + weight * loss
            stats += [loss.detach(), agrees]
        return total, torch.stack(stats).view(-1, 2)

    def run(self, ids: Tensor, skipped: frozenset[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The last layer's logits (R*N, V) for ids (R, N), and the exits' states (R, N, D)."""
        h, states = self.model.embed(ids), {}
        for i in range(self.depth):
            if i not in skipped:
                h = self.model.run(h, i, i + 1)
            if i + 1 in self.weights:
                states[i + 1] = h
        return self.model.logits(h, self.depth).flatten(0, 1).float(), states

    def last_loss(self, logits: Tensor, ids: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target)

    def measure(self, held: Tensor) -> tuple[float, list[float]]:
        """On held-out rows (B, N+1): the loss, and the agreement for each of `names[1:]`."""
        return measure(self.model, held, depths=self.model.exits)

    def exit_loss(
        self, h: Tensor, exit: int, full: Tensor, target: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        """An exit's loss and agreement, from its h (R, N, D) and the last logits (R*N, V)."""
        logits = self.model.logits(self.model.exit_block(h, exit), exit).flatten(0, 1)  # (R*N, V)
        text, soft = self.cross_entropies(logits, full.softmax(-1), target)
        agrees = (logits.detach().argmax(-1) == full.argmax(-1)).float().mean()
        return (1 - share) * text + share * soft, agrees


def cross_entropies(logits: Tensor, goal: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Compare logits (M, V) with the tokens target (M,), and with the distributions goal (M, V)."""
    logp = logits.float().log_softmax(-1)
    return F.nll_loss(logp, target), -(goal * logp).sum(-1).mean()


def exit_names(model: Llama) -> list[str]:
    return [f"exit {exit}" for exit in model.exits]


def draw_skips(n_layers: int, drop: float, step: int, seed: int) -> frozenset[int]:
    """The layers this step skips.

    Layer l of L is skipped with probability drop * (2^(l / (L-1)) - 1) (LayerSkip, equation 2).
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
    growth = torch.exp(torch.arange(n_layers) * math.log(2) / (n_layers - 1)) - 1  # 0 .. 1
    skipped = torch.rand(n_layers, generator=rng) < drop * growth
    return frozenset(skipped.nonzero().flatten().tolist())


# ---- recipe 2: the trunk is frozen, heads learn -------------------------------------------------


class FrozenTrunk:
    """Trains exit heads on a frozen trunk, whose states are computed once per row and kept."""

    whole = WHOLE  # a row has this many times --context tokens

    def __init__(self, model: Llama, text: Tensor, args: argparse.Namespace):
        self.model, self.args, self.names = model, args, ["mean", *exit_names(model)]
        self.depths = (*model.exits, model.config.n_layers)  # the heads learn from states there
        length = self.whole * args.context
        self.rows = text[: len(text) // length * length].view(-1, length)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.room = KEPT
        self.against = torch.compile(against, dynamic=False) if args.compile else against

    def gradients(self, run: "Run", done: float) -> Tensor:
        """Add up the gradients of one step. Returns (1 + exits, 2): one row for each of `names`.

        The mean loss and agreement, then each exit's loss and agreement with the full model.
        """
        length = self.rows.shape[1]
        n = self.args.batch // length
        numbers = range(run.step * n, (run.step + 1) * n)
        rows = torch.tensor([shuffled(i, len(self.rows), self.args.seed) for i in numbers])
        return run.backward(self.loss, run.mine(rows), n, self.args.micro // length)

    def loss(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of the rows numbered (R,), and the table of `gradients` for them.

        The loss is the cross-entropy of the exit's distribution with the full model's, both over
        the tokens that the exit may draft.
        """
        model, losses, stats = self.model, [], []
        read = zip(*map(self.read, rows.tolist()))
        states, choices = (torch.stack(each).to(self.args.device) for each in read)
        *hidden, last = states.unbind(2)  # (R, N, D) each
        heads: Any = model.exit_heads
        vocab = heads[str(model.exits[0])].vocab  # one for all exits
        with torch.no_grad():
            goal = exit_logits(model, self.depths[-1], last, vocab).float().softmax(-1)
        for exit, h in zip(model.exits, hidden, strict=True):
            logits = heads[str(exit)].known(model.exit_block(h, exit), model.head)
            loss, best = self.against(logits, goal)
            agrees = ((best if vocab is None else vocab[best]) == choices).float().mean()
            losses.append(loss)
            stats.append(torch.stack([loss.detach(), agrees]))
        table = torch.stack(stats)
        return torch.stack(losses).mean(), torch.cat([table.mean(0, keepdim=True), table])

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """What `run` returns for the row of this number. It is kept, on the CPU, if there is room.

        Rows are run one at a time, so that their last bits do not depend on each other.
        """
        if row in self.kept:
            return self.kept[row]
        states, choices = self.run(self.rows[row])
        made = states.cpu(), choices.cpu()
        size = sum(t.nbytes for t in made)
        if size <= self.room:
            self.kept[row] = made
            self.room -= size
        return made

    @torch.no_grad()
    def run(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """States (N, K, D) of tokens ids (N,) at `depths`, and the last depth's choices (N,)."""
        model, first, states = self.model, 0, []
        h = model.embed(ids[None].long().to(self.args.device))  # (1, N, D)
        for depth in self.depths:
            h, first = model.run(h, first, depth), depth
            states.append(h[0])
        logits = model.logits(model.exit_block(h, depth), depth)[0]
        return torch.stack(states, 1), logits.argmax(-1)

    def measure(self, held: Tensor) -> tuple[float, list[float]]:
        return measure(self.model, held, depths=self.model.exits)


def add_heads(model: Llama, text: Tensor, args: argparse.Namespace) -> None:
    """Give the model a new head at each exit. text: the tokens (T,) it will be trained on."""
    vocab = None
    if model.config.vocab_size > args.draft_vocab:
        vocab = common_choices(model, text, args)
    width = model.config.dim if args.width is None else args.width
    h = model.embed(held_rows(text, WHOLE * args.context, 8).to(args.device))
    for first, exit in zip((0, *model.exits), model.exits):
        h = model.run(h, first, exit)
        head = ExitHead(model.config, width, vocab).to(args.device)
        equalise_norms(head, h, model.head)
        model.exit_heads[str(exit)] = head


@torch.no_grad()
def common_choices(model: Llama, text: Tensor, args: argparse.Namespace) -> list[int]:
    """The ids of the tokens that are most frequent in the text and the model's choices together."""
    counts = torch.bincount(text.long(), minlength=model.config.vocab_size)
    for row in held_rows(text, args.context, 128).split(8):
        choice = model(row[:, :-1].to(args.device)).argmax(-1).cpu().flatten()
        counts += torch.bincount(choice, minlength=len(counts))
    order = counts.argsort(descending=True, stable=True)[: args.draft_vocab]
    return sorted(order[counts[order] > 0].tolist())


@torch.no_grad()
def equalise_norms(head: ExitHead, h: Tensor, output: nn.Linear) -> None:
    """Start a head's norms so that all coordinates of h (B, N, D) leave them equally large.

    The last norm is also scaled so that the logits have standard deviation 1.
    """
    scale = equaliser(h)
    head.norm.weight.copy_(scale)
    if head.block is not None:
        head.block.attn_norm.weight.copy_(scale)
        head.block.mlp_norm.weight.copy_(scale)
    head.norm.weight.div_(head.known(h, output).std())


def equaliser(h: Tensor) -> Tensor:
    """The weight (D,) of a norm that makes all coordinates of h (B, N, D) equally large.

    A few coordinates of a trunk's hidden states are tens of times larger than the rest, and would
    drown them out.
    """
    return F.rms_norm(h, h.shape[-1:]).square().mean((0, 1)).clamp(min=1e-6).rsqrt()


# ---- a draft head: the trunk is frozen, one head looks back -------------------------------------


class LookBack(FrozenTrunk):
    """Trains a draft head to predict its exit's choices, in several drafts one after the other.

    The first draft is made from the exit's true states. For each further one the head's own output
    replaces a state that decoding does not have yet, so the head has to learn from that too (HASS,
    arXiv 2408.15766; EAGLE-3, 2503.01840). It attends to exactly what it will see in decoding
    (`Chain`). One thing is approximated: the tokens come from the text, while decoding drafts its
    own.
    """

    whole = 1

    def __init__(self, model: Llama, text: Tensor, args: argparse.Namespace):
        super().__init__(model, text, args)
        self.exit, self.depths = args.draft_head, (args.draft_head,)
        self.head: Any = model.draft_heads[str(self.exit)]
        self.names = ["mean", *(f"draft {i + 1}" for i in range(len(DRAFTS)))]

    def loss(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        read = zip(*map(self.read, rows.tolist()))
        states, choices = (torch.stack(each).to(self.args.device) for each in read)
        return self.drafts(self.rows[rows], states[:, :, 0], choices)

    def drafts(self, ids: Tensor, h: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of rows ids (R, N), with the exit's states h (R, N, D) and choices (R, N).

        Also returns (1 + drafts, 2): the mean loss and agreement, then each draft's. The loss is
        the cross-entropy with the exit's distribution, over the tokens that the head may draft.
        """
        model, head, table, state = self.model, self.head, [], h
        with torch.no_grad():
            goal = exit_logits(model, self.exit, h, head.out.vocab).float().softmax(-1)
        embedded = model.embed(ids.long().to(h.device))
        rope, chain = model.rope(torch.arange(ids.shape[1], device=h.device)), Chain()
        for i in range(len(DRAFTS)):
            # a state belongs to the position before its token's; the first token has none
            state = head(F.pad(state[:, :-1], (0, 0, 1, 0)), embedded, rope, chain)
            logits = head.out.known(state, model.head)[:, i:]  # (R, N - i, known)
            loss, best = self.against(logits, goal[:, i:])
            best = best if head.out.vocab is None else head.out.vocab[best]
            table.append(torch.stack([loss, (best == choices[:, i:]).float().mean()]))
        weights = h.new_tensor(DRAFTS, dtype=torch.float32)
        mean = weights @ torch.stack(table) / weights.sum()  # (2,)
        return mean[0], torch.stack([mean, *table]).detach()

    @torch.no_grad()
    def measure(self, held: Tensor) -> tuple[float, list[float]]:
        tables: Any = 0
        for ids in held[:, :-1]:
            states, choices = self.run(ids)
            tables = tables + self.drafts(ids[None], states[None, :, 0], choices[None])[1]
        (loss, _), *drafts = (tables / len(held)).tolist()
        return loss, [agreement for _, agreement in drafts]


class Chain:
    """What several drafts in a row may attend to, when begun at every position of a text at once.

    It takes the place of a pass's plan. Draft i (from 0) at position p sees the keys computed from
    true states up to position p - i, and one key at each later position up to p: that of draft 1,
    of draft 2, and so on, the last being its own.
    """

    def __init__(self):
        self.written: list[tuple[Tensor, Tensor]] = []  # each draft's keys and values (R, G, N, E)

    def write(self, layer: None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add a draft's keys and values; return all drafts' so far, (R, G, drafts * N, E)."""
        self.written.append((k, v))
        keys, values = zip(*self.written)
        return torch.cat(keys, 2), torch.cat(values, 2)

    @property
    def mask(self) -> Tensor:
        """(N, drafts * N): whether the newest draft at a position may attend to each key."""
        keys, last = self.written[0][0], len(self.written) - 1
        at = torch.arange(keys.shape[2], device=keys.device)
        behind = at[:, None] - at  # (N, N): how far a key's position is before the draft's
        guesses = [behind == last - i for i in range(1, last + 1)]
        return torch.cat([behind >= last, *guesses], 1)


def against(logits: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of logits with distributions, both (R, N, V), and the likeliest tokens."""
    logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), goal.flatten(0, 1)), logits.argmax(-1)


def exit_logits(model: Llama, exit: int, h: Tensor, vocab: Tensor | None) -> Tensor:
    """An exit's logits (..., known) from h (..., D), for vocab: the tokens that it may draft."""
    if str(exit) in model.exit_heads:
        head: Any = model.exit_heads[str(exit)]
        return head.known(model.exit_block(h, exit), model.head)
    return F.linear(model.norm(h), model.head.weight if vocab is None else model.head.weight[vocab])


@torch.no_grad()
def add_draft_head(model: Llama, text: Tensor, args: argparse.Namespace) -> None:
    """Give the model a draft head, for the tokens that its exit may draft, or for common ones.

    If the model has this draft head already, it is trained further.
    """
    exit, vocab = str(args.draft_head), None
    if exit in model.draft_heads:
        model.draft_heads[exit].requires_grad_(True)
        return
    reads: Any = model.exit_heads[exit] if exit in model.exit_heads else model
    if reads is not model:
        vocab = None if reads.vocab is None else reads.vocab.tolist()
    elif model.config.vocab_size > args.draft_vocab:
        vocab = common_choices(model, text, args)
    head = DraftHead(model.config, vocab).to(args.device)
    embedded = model.embed(held_rows(text, args.context, 8).to(args.device))
    head.token_norm.weight.copy_(equaliser(embedded))
    head.state_norm.weight.copy_(equaliser(model.run(embedded, 0, args.draft_head)))
    head.out.norm.weight.copy_(reads.norm.weight / 2)  # smaller logits: it begins unsure
    model.draft_heads[exit] = head


# ---- a step, a checkpoint -----------------------------------------------------------------------


class Run:
    """What a step changes and a checkpoint holds. All randomness comes from the seed and step."""

    writes = True  # whether this process writes files and prints

    def __init__(self, args: argparse.Namespace, model: Llama, tokenizer: Tokenizer | None):
        self.args, self.model, self.tokenizer = args, model, tokenizer
        # bfloat16 has too few bits to add up small steps: a copy computes, the float32 weights add
        self.work = copy.deepcopy(model).bfloat16() if args.bf16 else model
        if for_training is not None:
            for_training(self.work)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.params = list(trained.values())
        self.working = [p for p in self.work.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(trained)
        # heads are saved in the dtype they computed in, the trunk as it was loaded
        if args.freeze_trunk:
            model.exit_heads = self.work.exit_heads
        if args.draft_head:
            exit = str(args.draft_head)
            model.draft_heads[exit] = self.work.draft_heads[exit]
        self.step, self.spent, self.began = 0, 0.0, time.time()
        self.learned: list[list[float]] = []  # [tokens, held-out loss, agreements ...] so far
        asked = ["model", "freeze_trunk", "draft_head", "bf16", "batch", "context", "seed"]
        asked += ["draft_vocab"]
        asked += ["self_distill", "unlikelihood"]  # options of lab/train.py
        vocabulary = [tokenizer.spell(id) for id in range(tokenizer.n_vocab)] if tokenizer else []
        self.kind = {  # what a checkpoint must share to be continued
            **{key: getattr(args, key, 0) for key in asked},
            "corpus": args.corpus and str(Path(args.corpus)),
            "config": dataclasses.asdict(model.config),
            "exits": list(model.exits),
            "trained": [list(p.shape) for p in self.params],
            "vocabulary": hashlib.sha256(repr(vocabulary).encode()).hexdigest(),
        }
        if args.compile:
            for layer in self.work.layers:
                layer.compile(dynamic=False)  # rows of two lengths: two programs

    def progress(self) -> float:
        """The share, 0 to 1, of the steps or minutes that is done."""
        done = self.step / self.args.steps if self.args.steps else 0.0
        if self.args.minutes:
            done = max(done, (self.spent + time.time() - self.began) / 60 / self.args.minutes)
        return min(1.0, done)

    def mine(self, rows: Tensor) -> Tensor:
        """The rows of a step that this process computes: all of them, except in lab/train.py."""
        return rows

    def backward(self, loss: Callable, rows: Tensor, of: int, most: int) -> Tensor:
        """Add up the gradients of the mean loss over a step's `of` rows, of which these are a part.

        loss: gives the mean loss and the stats of a piece of rows. most: rows in a piece. Returns
        these rows' share of the mean stats.
        """
        total: Any = 0
        for piece in rows.split(max(1, most)):
            value, stats = loss(piece)
            share = len(piece) / of
            (share * value).backward()
            total = total + share * stats
        return total

    def update(self, loss: float, rate: float) -> None:
        """Take an optimizer step. Raises ValueError, before any change, if training diverges."""
        for p, w in zip(self.params, self.working):
            # skipped layers have no gradient, and do not change
            p.grad = None if w.grad is None else w.grad.to(p.dtype)
        norm = nn.utils.clip_grad_norm_(self.params, 1.0).item()
        if not (math.isfinite(norm) and loss < DIVERGED * math.log(self.model.config.vocab_size)):
            said = f"loss {loss:.3g}, gradient norm {norm:.3g}"
            raise ValueError(f"diverged at step {self.step}: {said}; lower --lr")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        with torch.no_grad():
            for p, w in zip(self.params, self.working):
                p.grad = w.grad = None
                if p is not w:
                    w.copy_(p)
        self.step += 1

    def save(self) -> None:
        """Write each file as a whole; training.safetensors comes last, since --resume trusts it."""
        frozen = self.args.freeze_trunk or self.args.draft_head
        shipped = self.model if frozen else self.work
        checkpoints.save(shipped, self.tokenizer, self.args.out / "model")
        tensors = {f"weights.{i}": p.detach() for i, p in enumerate(self.params)}
        for o, optimizer in enumerate(self.optimizers):
            for i, p in enumerate(optimizer.param_groups[0]["params"]):
                for key, value in optimizer.state[p].items():
                    tensors[f"optimizer.{o}.{i}.{key}"] = value
        elapsed = self.spent + time.time() - self.began
        run = {"kind": self.kind, "step": self.step, "elapsed": elapsed, "learned": self.learned}
        about = {"run": json.dumps(run)}
        file = self.args.out / "training.safetensors"
        write_whole(file, lambda to: save_file(tensors, to, metadata=about))

    def load(self) -> None:
        """Continue where `save` left off. ValueError if the saved run is of another kind."""
        with open_tensors(self.args.out / "training.safetensors") as file:
            saved = json.loads(file.metadata()["run"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        for key, now in json.loads(json.dumps(self.kind)).items():
            if (was := saved["kind"].get(key)) != now:
                said = f"its {key} is {was}, asked is {now}"
                raise ValueError(f"{self.args.out} holds a run of another kind: {said}")
        with torch.no_grad():
            for i, (p, w) in enumerate(zip(self.params, self.working)):
                p.copy_(tensors[f"weights.{i}"])
                w.copy_(p)
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, o, i, key = name.split(".")
                optimizer = self.optimizers[int(o)]
                p = optimizer.param_groups[0]["params"][int(i)]
                optimizer.state[p][key] = value if key == "step" else value.to(p.device)
        self.step, self.spent = saved["step"], saved["elapsed"]
        self.learned = saved.get("learned", [])


def make_optimizers(trained: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of a trunk's layers and of a draft head, AdamW for everything else."""
    inside = {name: name.startswith(("layers.", "draft_heads.")) for name in trained}
    matrices = [p for name, p in trained.items() if p.ndim == 2 and inside[name]]
    others = [p for name, p in trained.items() if p.ndim != 2 or not inside[name]]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    if not matrices:
        return [adamw]
    return [torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), adamw]


# ---- the loop -----------------------------------------------------------------------------------


def loop(args: argparse.Namespace, run: Run, recipe: Any, held: Tensor) -> None:
    """Train until the steps or the minutes are used up, saving and measuring now and then."""
    first, began, saved_at = run.step, time.time(), time.time()
    layout = "{percentage:3.0f} % |{bar:20}| {elapsed} < {remaining}{postfix}"
    bar = tqdm(total=1.0, disable=not run.writes, bar_format=layout)
    done = bar.n = bar.initial = run.progress()
    while done < 1:
        stats = recipe.gradients(run, done).tolist()
        rate = args.lr * min(1.0, (run.step + 1) / WARM_UP, (1 - done) / DECAY)
        run.update(stats[0][0], rate)
        done = run.progress()
        speed = args.batch * (run.step - first) / (time.time() - began)
        losses = [f"{name} {loss:.3f} ({a:.0%})" for name, (loss, a) in zip(recipe.names, stats)]
        bar.set_postfix_str(f"step {run.step}, {', '.join(losses)}, {speed:,.0f} tokens/s", False)
        bar.update(max(0.0, done - bar.n))
        if run.writes and (time.time() - saved_at > SAVE_EVERY or done >= 1):
            loss, agreement = recipe.measure(held_rows(held, 2 * args.context))
            names = recipe.names[1 : 1 + len(agreement)]
            shown = " ".join(f"{name}: {a:.1%}" for name, a in zip(names, agreement))
            bar.write(f"step {run.step}: held-out loss {loss:.4f}, agreement {shown}")
            run.learned.append([run.step * args.batch, loss, *agreement])
            run.save()
            rows = [["tokens", "loss", *names], *run.learned]
            lines = "".join(",".join(map(str, row)) + "\n" for row in rows)
            write_whole(args.out / "learning.csv", lines)
            saved_at = time.time()
    bar.close()


@torch.no_grad()
def measure(
    model: Llama, rows: Tensor, start: int = 0, depths: tuple[int, ...] | None = None
) -> tuple[float, list[float]]:
    """On rows (B, N+1), from position `start` on: the full model's loss, and how often exits at
    these depths (by default after every layer) pick its token.
    """
    L, total = model.config.n_layers, 0.0
    depths = tuple(range(1, L)) if depths is None else depths
    agreement = torch.zeros(len(depths), dtype=torch.float64)
    for piece in rows.split(4):
        ids, target = piece[:, :-1].to(model.embed.weight.device), piece[:, start + 1 :].flatten()
        h, states, share = model.embed(ids), {}, len(piece) / len(rows)
        for i in range(L):
            h = states[i + 1] = model.run(h, i, i + 1)
        full = model.logits(h[:, start:], L).float()  # (B, N-start, V)
        total += share * F.cross_entropy(full.flatten(0, 1), target.to(full.device)).item()
        for i, exit in enumerate(depths):
            logits = model.logits(model.exit_block(states[exit], exit)[:, start:], exit)
            agreement[i] += share * (logits.argmax(-1) == full.argmax(-1)).double().mean().item()
    return total, agreement.tolist()


def report(
    folder: Path, header: dict, exits: tuple, loss: float, columns: dict[str, list[float]],
    row: str = "layer", exit: str = "the full model",
) -> None:  # fmt: skip
    """Write agreement.csv and print it as a table. columns: name -> the agreement of every layer.

    For a draft head, `row` is "draft" and `exit` names the exit that its drafts agree with.
    """
    layers = list(enumerate(zip(*columns.values()), 1))
    names = [name.replace("-", "_").replace(" ", "_") for name in columns]
    lines = [f"# {in_words(header)}", f"# {header['command']}", ",".join([row, *names])]
    lines += [",".join(map(str, [layer, *shares])) for layer, shares in layers]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "agreement.csv", "\n".join(lines) + "\n")
    print(f"\nheld-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
    print(f"agreement with {exit}", "   ".join([row, *columns]), sep="\n")
    for layer, shares in layers:
        said = [f"{share:{len(name)}.1%}" for name, share in zip(columns, shares)]
        print("   ".join([f"{layer:5}", *said, "<- exit" if layer in exits else ""]).rstrip())


def report_drafts(args: argparse.Namespace, header: dict, model: Llama, held: Tensor) -> None:
    """The same report for a draft head: how often each draft in a row agrees with the exit."""
    loss, agreement = LookBack(model, held, args).measure(held_rows(held, 2 * args.context))
    columns = {"held-out text": agreement}
    report(args.out, header, (), loss, columns, "draft", f"exit {args.draft_head}")


# ---- main ---------------------------------------------------------------------------------------


def new_model(args: argparse.Namespace, tokenizer: Tokenizer) -> Llama:
    shape = (tokenizer.n_vocab, args.dim, args.layers, args.heads, args.kv_heads, args.ffn)
    return Llama(Config(*shape)).to(args.device)


def choose_exits(model: Llama, args: argparse.Namespace) -> None:
    """Give the model the exits asked for; else it keeps its own, or gets 1/16 and 1/4 of its depth.

    A draft head can read any exit, and leaves the exits as they are.
    """
    depth, longest = model.config.n_layers, model.config.max_seq_len
    if LONG * args.context > longest:
        raise ValueError(f"{LONG} x --context must fit the model's {longest}, got {args.context}")
    if args.draft_head:
        if not 1 <= args.draft_head <= depth:
            raise ValueError(f"--draft-head must be an exit in 1..{depth}, got {args.draft_head}")
        return
    own = model.exits or sorted({-(-depth // 16), -(-depth // 4)})
    model.exits = tuple(own if args.exits is None else args.exits)
    check_exits(model.exits, 1, depth)


def prepare(model: Llama, text: Tensor, held: Tensor, args: argparse.Namespace) -> None:
    """Add new heads, and mark the parameters to train. ValueError if the text is too short."""
    need, kept = 2 * LONG * args.context + 2, 2 * args.context + 1
    if len(text) < need or len(held) < kept:
        found = f"{len(text)} tokens to train on and {len(held)} held out"
        raise ValueError(f"the corpus is too short: {found}, at least {need} and {kept} are needed")
    model.train().requires_grad_(not (args.freeze_trunk or args.draft_head))
    if args.freeze_trunk:
        add_heads(model, text, args)
    if args.draft_head:
        add_draft_head(model, text, args)


def main(argv: list[str] | None = None) -> None:
    """Train and report. Raises ValueError, before anything is written, if it cannot be trained."""
    args = options().parse_args(argv)
    if bool(args.model) != args.freeze_trunk and not args.draft_head:
        raise ValueError("--freeze-trunk and --model M go together; lab/train.py trains all of M")
    if "WORLD_SIZE" in os.environ:
        raise ValueError("several processes share a run with torchrun ... -m lab.train")
    check(args)
    torch.manual_seed(args.seed)
    texts, held_out = split(read_corpus(args.corpus))
    if args.model:
        model, tokenizer = checkpoints.load(args.model, args.device, torch.float32, plain=True)
        if tokenizer is None:
            raise ValueError(f"{args.model} has no tokenizer, so it cannot read a text")
    else:
        tokenizer = learn(texts, args.vocab)
        model = new_model(args, tokenizer)
    choose_exits(model, args)
    text, held = encode(tokenizer, texts, cut=not args.model), encode(tokenizer, held_out)
    prepare(model, text, held, args)
    run = Run(args, model, tokenizer)
    if args.resume:
        run.load()
    recipe = LookBack if args.draft_head else FrozenTrunk if args.freeze_trunk else LayerSkip
    loop(args, run, recipe(run.work, text, args), held)
    written, _ = checkpoints.load(args.out / "model", args.device, run.work.embed.weight.dtype)
    header = describe(args.model or "a new model", args.device, written.embed.weight.dtype)
    if args.draft_head:
        return report_drafts(args, header, written, held)
    loss, agreement = measure(written, held_rows(held, 2 * args.context))
    report(args.out, header, written.exits, loss, {"held-out text": agreement})


if __name__ == "__main__":
    command(main, "stopped: --resume continues from the last checkpoint, if there is one yet")
