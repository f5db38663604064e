"""Train exits that can see: give a Llama early exits good enough to draft and to filter.

    python train_exits.py --out DIR                             1. a small model, from scratch
    python train_exits.py --out DIR --model M --freeze-trunk    2. exit heads for M, all else kept
    python train_exits.py --out DIR --model M                   3. all of M, held close to itself

1 is LayerSkip's recipe (arXiv 2404.16710): layers are skipped at random, deep ones more often, and
the exits are read through the shared norm and output matrix. An exit learns the text and, in a
share that grows to 4/5 by half-way, the last layer's distribution; the first exit weighs 0.3 in the
loss, the others as much as the last layer. Two more changes: skipping fades out instead of in,
which is cheap while the deep layers know little, and matrices are trained with Muon. The text is
Python's own standard library, or that and all packages installed beside it; its vocabulary is
learned, and whole files are held out to measure on.
2 distils the full model into ExitHeads: one light block, a norm, the output rows of the tokens M
uses most. The trunk never changes, so while there is room for what it makes of a row, it reads it
once; after that only the heads are computed.
3 trains the trunk as 1 does, but the last layer learns the original's distribution and the exits
the last layer's, the first with full weight too.

With --unlikelihood recipe 3 also lets the model go on, greedily, with what it reads, and makes the
tokens of its loops unlikely (arXiv 1908.04319).

--self-distill trains 2 and 3 on M's own writing, which is what decoding will meet: a chat model is
shown the mark that begins a user's turn and writes the question too (Magpie, arXiv 2406.08464).
torchrun --nproc_per_node=N shares each step among N processes. DIR gets model/ (for
checkpoints.load), training.safetensors (for --resume), samples.safetensors with --self-distill,
corpus/ with installed packages, and at the end agreement.csv and agreement.png: how often each exit
picks the full model's token.

The file knows nothing of drafting or verifying: it makes exits agree, hispec.py turns agreement
into speed.
"""

import argparse
import copy
import datetime
import math
import os
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoints
from checkpoints.tokenizer import Tokenizer
from checkpoints.vocabulary import learn
from lab.agreement import measure, report
from lab.commands import command
from lab.corpus import (
    LONG,
    WHOLE,
    batch,
    encode_split,
    equal_parts,
    held_rows,
    own_loops,
    own_samples,
    read_corpus,
    shuffled,
)
from lab.installed import INSTALLED, installed_tokens, is_held_out
from lab.options import arguments, check_arguments
from lab.training import Run, add_heads, choose_exits
from model import Config, Llama

KEPT = 4 * 2**30  # bytes of a frozen trunk's hidden states that are kept for the next epoch
DRAFT_WEIGHT = 0.3  # loss weight of a new model's first exit; the last layer's is 1
EXIT_WEIGHT = 1.0  # of other exits
MAX_DROP, MAX_DROP_GIVEN = 0.6, 0.1  # how often the last layer is skipped at first: a new one, M's
MAX_SHARE = 0.8  # of the last layer's distribution, against the text, in what an exit learns
WARM_UP, DECAY = 60, 0.45  # steps in which the rate rises; share of the run in which it falls to 0
SAVE_EVERY = 180  # seconds


def main(argv: list[str] | None = None) -> None:
    """The whole run. Raises ValueError, before anything is written, for what cannot be trained."""
    args = arguments(argv, __doc__)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    args.device = torch.device(place)
    check_arguments(args, rank, world)
    if world > 1:
        patience = datetime.timedelta(hours=12)  # a run may be paused
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo", timeout=patience)
    try:
        train(args, rank, world)
    finally:
        if world > 1:
            dist.destroy_process_group()


def train(args: argparse.Namespace, rank: int, world: int) -> None:
    torch.manual_seed(args.seed)
    model, tokenizer, text, held = prepare(args, rank, world)
    if args.steps == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        return report(args, model.eval(), held, None)
    # bfloat16 computes in a copy: steps are too small for its 8 bits, float32 weights add them up
    work = copy.deepcopy(model).bfloat16() if args.bf16 else model
    given = args.model and not args.freeze_trunk
    original = copy.deepcopy(work).requires_grad_(False) if given else None
    run = Run(args, model, work, tokenizer)
    if args.resume:
        run.load()
    if rank == 0:
        print(
            f"{sum(p.numel() for p in run.params):,} parameters to train, "
            f"{len(text):,} tokens to train on, {len(held):,} held out, "
            f"exits {', '.join(map(str, model.exits)) or 'none'}",
            flush=True,
        )
    if args.compile:
        for layer in work.layers:
            layer.compile(dynamic=False)  # rows of two lengths: two programs
    reads: LayerSkip | FrozenTrunk
    losses: nn.Module
    if args.freeze_trunk:
        losses, reads = HeadLosses(work), FrozenTrunk(work, text, args, rank, world)
    else:
        losses = LayerSkipLosses(work, original, args.compile)
        reads = LayerSkip(work, text, args, rank, world)
    if world > 1:  # unused parameters: of skipped layers
        losses = DistributedDataParallel(losses, find_unused_parameters=not args.freeze_trunk)
    loop(args, run, losses, reads.pieces, held, rank, world)
    if rank == 0:
        written, _ = checkpoints.load(args.out / "model", args.device, work.embed.weight.dtype)
        report(args, written, held, original)


def loop(args, run: Run, losses, pieces, held: Tensor, rank: int, world: int) -> None:
    exits, first, began, saved_at = run.model.exits, run.step, time.time(), time.time()
    layout = "{percentage:3.0f} % |{bar:20}| {elapsed} < {remaining}{postfix}"
    bar = tqdm(total=1.0, disable=rank > 0, bar_format=layout)
    done = bar.n = bar.initial = run.progress(world)
    while done < 1:
        total: Any = 0
        step_pieces = pieces(run.step, done)
        for i, piece in enumerate(step_pieces):
            # DDP averages once a step
            losses.require_backward_grad_sync = i == len(step_pieces) - 1
            loss, stats = losses(*piece)
            (loss / len(step_pieces)).backward()
            total += stats / len(step_pieces)
        if world > 1:
            dist.all_reduce(total)
        loss, *agreement = (total / world).tolist()
        run.update(loss, rate=args.lr * min(1.0, (run.step + 1) / WARM_UP, (1 - done) / DECAY))
        done = run.progress(world)

        speed = args.batch * (run.step - first) / (time.time() - began)
        shown = " ".join(f"{exit}: {a:.0%}" for exit, a in zip(exits, agreement))
        said = f"step {run.step}, loss {loss:.3f}, agreement {shown}, {speed:,.0f} tokens/s"
        bar.set_postfix_str(said, False)
        bar.update(max(0.0, done - bar.n))
        if rank == 0 and (time.time() - saved_at > SAVE_EVERY or done >= 1):
            run.save()
            loss, agreement = measure(run.work, held_rows(held, 2 * args.context), depths=exits)
            shown = " ".join(f"{exit}: {agreement[exit - 1]:.1%}" for exit in exits)
            bar.write(f"step {run.step}: held-out loss {loss:.4f}, agreement {shown}")
            saved_at = time.time()
    bar.close()


# ---- recipes 1 and 3: every layer learns --------------------------------------------------------


class LayerSkip:
    """What each step of recipes 1 and 3 reads: rows of text, layers to skip, exits to train."""

    def __init__(self, model: Llama, text: Tensor, args: argparse.Namespace, rank: int, world: int):
        self.model, self.text, self.args, self.rank, self.world = model, text, args, rank, world

    def pieces(self, step: int, done: float) -> list[tuple]:
        """The arguments of LayerSkipLosses, a tuple for each pass; the model's own text in one."""
        args, exits = self.args, self.model.exits
        context = args.context * (LONG if step % 6 == 5 else 1)
        local = max(1, args.batch // context // self.world)  # rows a step for each process
        rows = batch(self.text, step, local * self.world, context, args.seed)
        rows = rows[self.rank * local : (self.rank + 1) * local].to(args.device)
        drop = (MAX_DROP_GIVEN if args.model else MAX_DROP) * (1 - done)
        skipped = draw_skips(self.model.config.n_layers, drop, step, args.seed)
        # a given model knows its text already: its first exit may weigh as much as the others
        weights = {
            exit: EXIT_WEIGHT if i or args.model else DRAFT_WEIGHT for i, exit in enumerate(exits)
        }
        share = 1.0 if args.model else MAX_SHARE * min(1.0, 2 * done)
        parts = rows.chunk(equal_parts(local, args.micro // context))
        pieces: list[tuple] = [(piece, skipped, weights, share) for piece in parts]
        if args.unlikelihood:
            own, inside = own_loops(self.model, rows[:, : args.context + 1])
            loops = args.unlikelihood * inside.to(args.device)
            pieces.append((own.to(args.device), frozenset(), weights, share, loops))
        return pieces


class LayerSkipLosses(nn.Module):
    """One pass through the layers, read at every exit asked for.

    forward(rows, skipped, weights, share, loops): rows (B, N+1) of token ids; the layers to skip;
    the loss weight of each exit; how much of an exit's goal is the last layer's distribution, the
    rest being the text; weights (B, N+1) of tokens that shall be unlikely, if that is all the last
    layer learns. Returns the loss, and without gradient (1 + len(weights),): the last layer's loss,
    then each exit's agreement with it.
    """

    def __init__(self, model: Llama, original: Llama | None = None, compiled: bool = False):
        super().__init__()
        self.model = model
        self.exit_losses = torch.compile(exit_losses, dynamic=False) if compiled else exit_losses
        # in a list, so that it is no submodule: nothing to train or to share
        self.original = [original]

    def forward(
        self, rows: Tensor, skipped: frozenset[int], weights: dict[int, float], share: float,
        loops: Tensor | None = None,
    ):  # fmt: skip
        model, ids, target = self.model, rows[:, :-1], rows[:, 1:].flatten()  # (B, N), (B*N,)
        depth = model.config.n_layers
        h, hidden = model.embed(ids), {}  # (B, N, D)
        for i in range(depth):
            if i not in skipped:
                h = model.run(h, i, i + 1)
            if i + 1 in weights:
                hidden[i + 1] = h
        logits = model.logits(h, depth).flatten(0, 1).float()  # (B*N, V)
        with torch.no_grad():
            goal, choice = logits.softmax(-1), logits.argmax(-1)
        if loops is not None:
            chosen = logits.softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
            last = -(loops[:, 1:].flatten() * torch.log1p(-chosen.clamp(max=0.999))).mean()
        elif self.original[0] is None:
            last = F.cross_entropy(logits, target)
        else:
            with torch.no_grad():
                kept = self.original[0](ids).flatten(0, 1).float().softmax(-1)
            last = F.cross_entropy(logits, kept)
        total, stats = last, [last.detach()]
        for exit, weight in weights.items():
            read = model.logits(model.read(hidden[exit], exit), exit).flatten(0, 1)  # (B*N, V)
            stats.append((read.detach().argmax(-1) == choice).float().mean())
            text, soft = self.exit_losses(read, goal, target)
            total = total + weight * ((1 - share) * text + share * soft)
        return total, torch.stack(stats)


def exit_losses(logits: Tensor, goal: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies of logits (M, V): with the text's tokens (M,), with laws goal (M, V)."""
    logp = logits.float().log_softmax(-1)
    return F.nll_loss(logp, target), -(goal * logp).sum(-1).mean()


def draw_skips(n_layers: int, drop: float, step: int, seed: int) -> frozenset[int]:
    """The layers this step skips: the same in every process.

    Layer l of L is skipped with probability drop * (2^(l / (L-1)) - 1) (LayerSkip, equation 2).
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
    growth = torch.exp(torch.arange(n_layers) * math.log(2) / (n_layers - 1)) - 1  # 0 .. 1
    skipped = torch.rand(n_layers, generator=rng) < drop * growth
    return frozenset(skipped.nonzero().flatten().tolist())


# ---- recipe 2: the trunk is frozen, heads learn -------------------------------------------------


class FrozenTrunk:
    """What a frozen trunk makes of the text: computed once a row, kept while there is room."""

    def __init__(self, model: Llama, text: Tensor, args: argparse.Namespace, rank: int, world: int):
        self.model, self.args, self.rank, self.world = model, args, rank, world
        length = WHOLE * args.context
        # samples are as long: each is one row
        self.rows = text[: len(text) // length * length].view(-1, length)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.room = KEPT

    def pieces(self, step: int, done: float) -> list[tuple[Tensor, Tensor]]:
        """The arguments of HeadLosses, a tuple for each pass, equally many rows in each."""
        length = self.rows.shape[1]
        local = max(1, self.args.batch // length // self.world)
        drawn = range(
            step * local * self.world + self.rank, (step + 1) * local * self.world, self.world
        )
        states, choices = zip(
            *(self.read(shuffled(i, len(self.rows), self.args.seed)) for i in drawn)
        )
        n = equal_parts(local, self.args.micro // length)
        pairs = zip(torch.stack(states).chunk(n), torch.stack(choices).chunk(n), strict=True)
        return [(s.to(self.args.device), c.to(self.args.device)) for s, c in pairs]

    @torch.no_grad()
    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Hidden states (N, K+1, D) at the exits and the last layer, and the full model's choices
        (N,).

        One row at a time, so that its last bits do not depend on its neighbours.
        """
        if row in self.kept:
            return self.kept[row]
        model, first, states = self.model, 0, []
        h = model.embed(self.rows[None, row].long().to(self.args.device))  # (1, N, D)
        for depth in (*model.exits, model.config.n_layers):
            h, first = model.run(h, first, depth), depth
            states.append(h[0])
        made = torch.stack(states, 1).cpu(), model.logits(h[0], depth).argmax(-1).cpu()
        size = sum(t.nbytes for t in made)
        if size <= self.room:
            self.kept[row] = made
            self.room -= size
        return made


class HeadLosses(nn.Module):
    """forward(states, choices), from FrozenTrunk, in rows: (B, N, K+1, D) and (B, N).

    Returns the mean over the exits of the cross-entropy between the full model's distribution and
    the exit's, and without gradient (1 + K,): the same, then each exit's agreement with the full
    model. What an exit cannot say is not held against it: the distributions are those among the
    tokens it knows.
    """

    def __init__(self, model: Llama):
        super().__init__()
        self.heads: Any = model.exit_heads
        self.model = [model]  # in a list, so that only the heads are trained and shared

    def forward(self, states: Tensor, choices: Tensor):
        (model,) = self.model
        exits, losses, stats = model.exits, [], []
        *hidden, last = states.unbind(2)  # (B, N, D) each
        # one vocabulary for all exits
        matrix, vocab = model.head.weight, self.heads[str(exits[0])].vocab
        with torch.no_grad():
            rows = matrix if vocab is None else matrix[vocab]
            # (B*N, len(vocab))
            goal = F.linear(model.norm(last), rows).float().softmax(-1).flatten(0, 1)
        for exit, h in zip(exits, hidden, strict=True):
            known = self.heads[str(exit)].known(model.read(h, exit), model.head)
            logits = known.float().flatten(0, 1)
            best = logits.detach().argmax(-1)
            stats.append(
                ((best if vocab is None else vocab[best]) == choices.flatten()).float().mean()
            )
            losses.append(F.cross_entropy(logits, goal))
        loss = torch.stack(losses).mean()
        return loss, torch.stack([loss.detach(), *stats])


# ---- model and text -----------------------------------------------------------------------------


def prepare(args, rank: int, world: int) -> tuple[Llama, Tokenizer | None, Tensor, Tensor]:
    """The model, marked what to train; its tokenizer; tokens (T,) to train on and held out."""
    documents: dict[str, str] = {}
    installed = args.corpus == INSTALLED and not args.self_distill
    if not installed and not args.self_distill:
        documents = read_corpus(args.corpus)
    model: Llama | None = None
    tokenizer: Any = None
    if args.model:
        model, tokenizer = checkpoints.load(args.model, args.device, torch.float32)
        if tokenizer is None and not args.self_distill:
            raise ValueError(f"{args.model} has no tokenizer: only --self-distill can train it")
    if installed:
        tokenizer, text, held = installed_tokens(
            args, tokenizer, read_corpus, encode_split, rank, world
        )
    elif not args.model:
        texts = [text for name, text in documents.items() if not is_held_out(name)]
        tokenizer = learn(texts, args.vocab)
    if model is None:
        shape = (tokenizer.n_vocab, args.dim, args.layers, args.heads, args.kv_heads, args.ffn)
        model = Llama(Config(*shape)).to(args.device)
    choose_exits(model, args)
    if LONG * args.context > (longest := model.config.max_seq_len):
        raise ValueError(f"{LONG} x --context must fit the model's {longest}, got {args.context}")
    if args.self_distill:
        text, held = own_samples(model, tokenizer, args, rank, world)
    elif not installed:
        text, held = encode_split(tokenizer, documents)
    need, kept = 2 * LONG * args.context + 2, 2 * args.context + 1
    if len(text) < need or len(held) < kept:
        raise ValueError(
            f"the corpus is too short: {len(text)} tokens to train on and {len(held)} held out, "
            f"at least {need} and {kept} are needed"
        )
    model.train().requires_grad_(not args.freeze_trunk)
    if args.freeze_trunk:
        add_heads(model, text, args)
    return model, tokenizer, text, held


if __name__ == "__main__":
    command(main, "stopped: --resume continues from the last checkpoint, if there is one yet")
