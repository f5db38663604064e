"""Train exits that can see: give a Llama early exits good enough to draft and to filter.

    python train_exits.py --out DIR                             1. a small model, from scratch
    python train_exits.py --out DIR --model M --freeze-trunk    2. exit heads for M, whose own output stays as it is
    python train_exits.py --out DIR --model M                   3. all of M, held close to the original

1 is LayerSkip's recipe (arXiv 2404.16710): layers are skipped at random, deep ones more often, and the exits are
read through the shared norm and output matrix. Every step trains the ladder's exits and one more depth. An exit
learns the text and, in a share that grows to 4/5 by half-way, the last layer's distribution; the first exit weighs
0.3 in the loss, the others as much as the last layer. Two more changes: skipping fades out instead of in, which is
cheap while the deep layers know little, and matrices are trained with Muon. The text is Python's own standard
library; its vocabulary is learned, and whole files are held out to measure on.
2 distils the full model into ExitHeads: one light block, a norm, the output rows of the tokens M uses most. The
trunk never changes, so it reads each row once; after that only the heads are computed.
3 trains the trunk as 1 does, but the last layer learns the original's distribution and the exits the last layer's,
the first with full weight too.

--self-distill trains 2 and 3 on M's own writing, which is what decoding will meet: a chat model is shown the mark
that begins a user's turn and writes the question too (Magpie, arXiv 2406.08464). torchrun --nproc_per_node=N shares
each step among N processes. DIR gets model/ (for checkpoints.load), training.safetensors (for --resume), with
--self-distill samples.safetensors, and at the end agreement.csv and agreement.png: how often each layer's exit
picks the full model's token.

The file knows nothing of drafting or verifying: it makes exits agree, hispec.py turns agreement into speed.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import os
import sysconfig
import textwrap
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoints
from checkpoints.files import describe, in_words, write_whole
from checkpoints.tokenizer import Tokenizer
from checkpoints.vocabulary import END, learn
from model import Config, ExitHead, Llama

HELD_OUT = 28  # one document in so many is never trained on
LONG = 8  # every sixth step reads rows so many times as long, that far positions are trained too
WHOLE = 4  # samples, and the rows a frozen trunk reads, have so many times --context
KEPT = 4 * 2**30  # bytes of a frozen trunk's hidden states that are kept for the next epoch
SIDE_BY_SIDE = 64  # samples written at once
ASK = 64  # a question of the model's own has at most so many tokens
DRAFT_WEIGHT, EXIT_WEIGHT = 0.3, 1.0  # loss weights of a new model's first exit, of other exits; the last layer's is 1
EXTRA_WEIGHT = 0.1  # loss weight of the one depth outside the ladder that each step trains
MAX_DROP, MAX_DROP_GIVEN = 0.6, 0.1  # how often the deepest layer is skipped at first: a new trunk's, a trained one's
MAX_SHARE = 0.8  # of the last layer's distribution, against the text, in what an exit learns
WARM_UP, DECAY = 60, 0.45  # steps in which the learning rate rises; share of the run in which it falls to 0
SAVE_EVERY = 180  # seconds
DIVERGED = 2.0  # times the loss of uniform guessing


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    if world > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    try:
        train(args, rank, world)
    except ValueError as error:
        raise SystemExit(f"train_exits: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("\nstopped: --resume continues from the last checkpoint") from None
    finally:
        if world > 1:
            dist.destroy_process_group()


def train(args: argparse.Namespace, rank: int, world: int) -> None:
    """The whole run. Raises ValueError, before anything is written, for what cannot be trained."""
    torch.manual_seed(args.seed)
    check_arguments(args, world)
    model, tokenizer, text, held = prepare(args, rank, world)
    if args.steps == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        return report(args, model.eval(), held, None)
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    # bfloat16 computes in a copy: one step is too small for its 8 bits, so float32 weights add them up
    work = copy.deepcopy(model).bfloat16() if args.bf16 else model
    working = [p for p in work.parameters() if p.requires_grad]
    if args.freeze_trunk:
        model.exit_heads = work.exit_heads  # heads ship as they were computed with, the trunk as it came
    original = copy.deepcopy(work).requires_grad_(False) if args.model and not args.freeze_trunk else None
    run = Run(args, model, work, params, working, make_optimizers(names, params), tokenizer)
    if args.resume:
        run.load()
    if rank == 0:
        print(f"{sum(p.numel() for p in params):,} parameters to train, {len(text):,} tokens to train on, "
              f"{len(held):,} held out, exits {', '.join(map(str, model.exits)) or 'none'}", flush=True)  # fmt: skip

    if args.compile:
        for layer in work.layers:
            layer.compile(dynamic=False)  # rows of two lengths: two programs
    losses: nn.Module
    if args.freeze_trunk:
        losses, pieces = HeadLosses(work), FrozenTrunk(work, text, args, rank, world).pieces
    else:
        losses, pieces = LayerSkipLosses(work, original), LayerSkip(work, text, args, rank, world).pieces
    if world > 1:
        losses = DistributedDataParallel(losses, find_unused_parameters=not args.freeze_trunk)  # skipped layers
    loop(args, run, losses, pieces, held, rank, world)
    if rank == 0:
        written, _ = checkpoints.load(args.out / "model", args.device, work.embed.weight.dtype)
        report(args, written, held, original)


def loop(args, run, losses, pieces, held, rank, world) -> None:
    exits, first, began, saved_at = run.model.exits, run.step, time.time(), time.time()
    layout = "{percentage:3.0f} % |{bar:20}| {elapsed} < {remaining}{postfix}"
    bar = tqdm(total=1.0, disable=rank > 0, bar_format=layout)
    bar.n = bar.initial = run.progress(world)
    while (done := run.progress(world)) < 1:
        total = 0
        step_pieces = pieces(run.step, done)
        for i, piece in enumerate(step_pieces):
            losses.require_backward_grad_sync = i == len(step_pieces) - 1  # DDP averages once a step
            loss, stats = losses(*piece)
            (loss / len(step_pieces)).backward()
            total += stats / len(step_pieces)
        if world > 1:
            dist.all_reduce(total)
        loss, *agreement = (total / world).tolist()
        run.update(loss, rate=args.lr * min(1.0, (run.step + 1) / WARM_UP, (1 - done) / DECAY))

        speed = args.batch * (run.step - first) / (time.time() - began)
        shown = " ".join(f"{exit}: {a:.0%}" for exit, a in zip(exits, agreement))
        bar.set_postfix_str(f"step {run.step}, loss {loss:.3f}, agreement {shown}, {speed:,.0f} tokens/s", False)
        bar.update(max(0.0, run.progress() - bar.n))
        if rank == 0 and (time.time() - saved_at > SAVE_EVERY or run.progress() >= 1):
            run.save()
            loss, agreement = measure(run.work, held_rows(held, 2 * args.context), depths=exits)
            shown = " ".join(f"{exit}: {agreement[exit - 1]:.1%}" for exit in exits)
            bar.write(f"step {run.step}: held-out loss {loss:.4f}, agreement {shown}")
            saved_at = time.time()
    bar.close()


# ---- recipes 1 and 3: every layer learns ---------------------------------------------------------------


class LayerSkip:
    """What each step of recipes 1 and 3 reads: rows of text, layers to skip, exits to train."""

    def __init__(self, model: Llama, text: Tensor, args: argparse.Namespace, rank: int, world: int):
        self.model, self.text, self.args, self.rank, self.world = model, text, args, rank, world

    def pieces(self, step: int, done: float) -> list[tuple]:
        """The arguments of LayerSkipLosses, one tuple for each pass of the step, equally many rows in each."""
        args, exits = self.args, self.model.exits
        context = args.context * (LONG if step % 6 == 5 else 1)
        local = max(1, args.batch // context // self.world)  # rows a step for each process
        rows = batch(self.text, step, local * self.world, context, args.seed)
        rows = rows[self.rank * local : (self.rank + 1) * local].to(args.device)
        drop = (MAX_DROP_GIVEN if args.model else MAX_DROP) * (1 - done)
        skipped, extra = draw_depths(self.model.config.n_layers, exits, drop, step, args.seed)
        # a given model knows its text already: its first exit may weigh as much as the others
        weights = {exit: EXIT_WEIGHT if i or args.model else DRAFT_WEIGHT for i, exit in enumerate(exits)}
        if exits:
            weights[extra] = EXTRA_WEIGHT
        share = 1.0 if args.model else MAX_SHARE * min(1.0, 2 * done)
        return [(piece, skipped, weights, share) for piece in rows.chunk(-(-local * context // args.micro))]


class LayerSkipLosses(nn.Module):
    """One pass through the layers, read at every exit asked for.

    forward(rows, skipped, weights, share): rows (B, N+1) of token ids; the layers to skip; the loss weight of each
    exit; how much of an exit's goal is the last layer's distribution, the rest being the text. Returns the loss, and
    without gradient (1 + len(weights),): the last layer's loss, then each exit's agreement with it.
    """

    def __init__(self, model: Llama, original: Llama | None = None):
        super().__init__()
        self.model = model
        self.original = [original]  # in a list, so that it is no submodule: nothing to train or to share

    def forward(self, rows: Tensor, skipped: frozenset[int], weights: dict[int, float], share: float):
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
        if self.original[0] is None:
            last = F.cross_entropy(logits, target)
        else:
            with torch.no_grad():
                kept = self.original[0](ids).flatten(0, 1).float().softmax(-1)
            last = F.cross_entropy(logits, kept)
        total, stats = last, [last.detach()]
        for exit, weight in weights.items():
            read = model.logits(model.read(hidden[exit], exit), exit).flatten(0, 1).float()  # (B*N, V)
            stats.append((read.detach().argmax(-1) == choice).float().mean())
            total = total + weight * exit_loss(read, goal, target, share)
        return total, torch.stack(stats)


def exit_loss(logits: Tensor, goal: Tensor, target: Tensor, share: float) -> Tensor:
    """Cross-entropy of logits (M, V) against the text's tokens (M,) and, in a share, the distributions goal (M, V)."""
    logp = logits.log_softmax(-1)
    soft = -(goal * logp).sum(-1).mean()
    return soft if share == 1 else (1 - share) * F.nll_loss(logp, target) + share * soft


def draw_depths(n_layers: int, exits: tuple, drop: float, step: int, seed: int) -> tuple[frozenset[int], int]:
    """The layers this step skips and the one more depth it trains: the same in every process.

    Layer l of L is skipped with probability drop * (2^(l / (L-1)) - 1) (LayerSkip, equation 2).
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
    growth = torch.exp(torch.arange(n_layers) * math.log(2) / (n_layers - 1)) - 1  # 0 .. 1
    skipped = (torch.rand(n_layers, generator=rng) < drop * growth).nonzero().flatten().tolist()
    others = [e for e in range(1, n_layers) if e not in exits] or [n_layers - 1]
    return frozenset(skipped), others[int(torch.randint(len(others), (1,), generator=rng))]


# ---- recipe 2: the trunk is frozen, heads learn --------------------------------------------------------


class FrozenTrunk:
    """What a frozen trunk makes of the text: computed when a row is first met, kept while there is room."""

    def __init__(self, model: Llama, text: Tensor, args: argparse.Namespace, rank: int, world: int):
        self.model, self.args, self.rank, self.world = model, args, rank, world
        length = WHOLE * args.context
        self.rows = text[: len(text) // length * length].view(-1, length)  # samples are as long: each is one row
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.room = KEPT

    def pieces(self, step: int, done: float) -> list[tuple[Tensor, Tensor]]:
        """The arguments of HeadLosses, one tuple for each pass of the step, equally many rows in each."""
        length = self.rows.shape[1]
        local = max(1, self.args.batch // length // self.world)
        drawn = range(step * local * self.world + self.rank, (step + 1) * local * self.world, self.world)
        states, choices = zip(*(self.read(shuffled(i, len(self.rows), self.args.seed)) for i in drawn))
        n = -(-local * length // self.args.micro)
        pairs = zip(torch.stack(states).chunk(n), torch.stack(choices).chunk(n), strict=True)
        return [(s.to(self.args.device), c.to(self.args.device)) for s, c in pairs]

    @torch.no_grad()
    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Hidden states (N, K+1, D) at the exits and the last layer, and the full model's choices (N,).

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

    Returns the mean over the exits of the cross-entropy between the full model's distribution and the exit's, and
    without gradient (1 + K,): the same, then each exit's agreement with the full model. What an exit cannot say is
    not held against it: the distributions are those among the tokens it knows.
    """

    def __init__(self, model: Llama):
        super().__init__()
        self.heads: Any = model.exit_heads
        self.model = [model]  # in a list, so that only the heads are trained and shared

    def forward(self, states: Tensor, choices: Tensor):
        (model,) = self.model
        exits, losses, stats = model.exits, [], []
        *hidden, last = states.unbind(2)  # (B, N, D) each
        matrix, vocab = model.head.weight, self.heads[str(exits[0])].vocab  # one vocabulary for all exits
        with torch.no_grad():
            rows = matrix if vocab is None else matrix[vocab]
            goal = F.linear(model.norm(last), rows).float().softmax(-1).flatten(0, 1)  # (B*N, len(vocab))
        for exit, h in zip(exits, hidden, strict=True):
            logits = self.heads[str(exit)].known(model.read(h, exit), matrix).float().flatten(0, 1)
            best = logits.detach().argmax(-1)
            stats.append(((best if vocab is None else vocab[best]) == choices.flatten()).float().mean())
            losses.append(F.cross_entropy(logits, goal))
        loss = torch.stack(losses).mean()
        return loss, torch.stack([loss.detach(), *stats])


# ---- the state of a run --------------------------------------------------------------------------------


class Run:
    """What a step changes, and what a checkpoint holds. All randomness follows from the seed and the step."""

    def __init__(self, args, model, work, params, working, optimizers, tokenizer):
        self.args, self.model, self.work, self.tokenizer = args, model, work, tokenizer
        self.params, self.working, self.optimizers = params, working, optimizers
        self.step, self.spent, self.began = 0, 0.0, time.time()
        self.kind = {  # what a checkpoint must share to be continued
            "config": dataclasses.asdict(model.config), "exits": list(model.exits),
            "trained": [list(p.shape) for p in params],
            **{key: getattr(args, key) for key in ("model", "freeze_trunk", "bf16", "batch", "context", "seed")},
        }  # fmt: skip

    def progress(self, world: int = 1) -> float:
        """How much of the steps, or of the minutes, is done, 0 to 1; agreed on by all processes."""
        done = self.step / self.args.steps if self.args.steps else 0.0
        if self.args.minutes:
            done = max(done, (self.spent + time.time() - self.began) / 60 / self.args.minutes)
            if world > 1:  # clocks differ
                shared = torch.tensor(done, dtype=torch.float64, device=self.args.device)
                dist.all_reduce(shared, dist.ReduceOp.MAX)
                done = shared.item()
        return min(1.0, done)

    def update(self, loss: float, rate: float) -> None:
        """One step of the optimizers. Raises ValueError, with nothing changed, if training has diverged."""
        for p, w in zip(self.params, self.working):
            p.grad = None if w.grad is None else w.grad.to(p.dtype)  # skipped layers have none, and stay
        norm = nn.utils.clip_grad_norm_(self.params, 1.0).item()
        if not (math.isfinite(norm) and loss < DIVERGED * math.log(self.model.config.vocab_size)):
            raise ValueError(f"diverged at step {self.step}: loss {loss:.3g}, gradient norm {norm:.3g}; lower --lr")
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
        """Each file appears whole or not at all; training.safetensors last, since it is what --resume trusts."""
        # what was computed with is what ships; a frozen trunk ships as it came
        checkpoints.save(self.model if self.args.freeze_trunk else self.work, self.tokenizer, self.args.out / "model")
        tensors = {f"weights.{i}": p.detach() for i, p in enumerate(self.params)}
        for o, optimizer in enumerate(self.optimizers):
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{o}.{i}.{key}": value for key, value in state.items()}
        state = {"kind": self.kind, "step": self.step, "elapsed": self.spent + time.time() - self.began}
        file = self.args.out / "training.safetensors"
        write_whole(file, lambda to: save_file(tensors, to, metadata={"run": json.dumps(state)}))

    def load(self) -> None:
        with safe_open(self.args.out / "training.safetensors", "pt") as file:
            saved = json.loads(file.metadata()["run"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        kind = json.loads(json.dumps(self.kind))
        if odd := [key for key in kind if saved["kind"].get(key) != kind[key]]:
            was, now = saved["kind"].get(odd[0]), kind[odd[0]]
            raise ValueError(f"{self.args.out} holds a run of another kind: its {odd[0]} is {was}, asked is {now}")
        with torch.no_grad():
            for i, (p, w) in enumerate(zip(self.params, self.working)):
                p.copy_(tensors[f"weights.{i}"])
                w.copy_(p)
        for o, optimizer in enumerate(self.optimizers):
            states: dict[int, dict] = defaultdict(dict)
            for name, value in tensors.items():
                if name.startswith(f"optimizer.{o}."):
                    i, key = name.split(".")[2:]
                    states[int(i)][key] = value
            optimizer.load_state_dict({"state": dict(states), "param_groups": optimizer.state_dict()["param_groups"]})
        self.step, self.spent = saved["step"], saved["elapsed"]


def make_optimizers(names: tuple[str, ...], params: tuple[nn.Parameter, ...]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside a trunk's layers, AdamW for embeddings, output rows, norms and exit heads."""
    inner = [p.ndim == 2 and n.startswith("layers.") for n, p in zip(names, params)]
    groups = [[p for p, i in zip(params, inner) if i == wanted] for wanted in (True, False)]
    muon = [torch.optim.Muon(groups[0], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")] if groups[0] else []
    return muon + [torch.optim.AdamW(groups[1], betas=(0.9, 0.95), weight_decay=0.0)]


# ---- model and text ------------------------------------------------------------------------------------


def prepare(args, rank: int, world: int) -> tuple[Llama, Tokenizer | None, Tensor, Tensor]:
    """The model, what of it is to be trained marked; its tokenizer; tokens (T,) to train on and held out."""
    if args.model:
        model, tokenizer = checkpoints.load(args.model, args.device, torch.float32)
    else:
        documents = read_corpus(args.corpus)
        tokenizer = learn([text for name, text in documents.items() if not is_held_out(name)], args.vocab)
        shape = (tokenizer.n_vocab, args.dim, args.layers, args.heads, args.kv_heads, args.ffn)
        model = Llama(Config(*shape)).to(args.device)
    depth = model.config.n_layers
    exits = args.exits if args.exits is not None else model.exits or sorted({-(-depth // 16), -(-depth // 4)})
    if any(not a < b < depth for a, b in zip((0, *exits), exits)):
        raise ValueError(f"exits must ascend strictly within 1..{depth - 1}, got {tuple(exits)}")
    if args.freeze_trunk and not exits:
        raise ValueError("--freeze-trunk trains exits only, and --exits names none")
    if LONG * args.context > model.config.max_seq_len:
        raise ValueError(f"{LONG} x --context must fit the model's {model.config.max_seq_len}, got {args.context}")
    model.exits = tuple(exits)

    if args.self_distill:
        text, held = own_samples(model, tokenizer, args, rank, world)
    else:
        if tokenizer is None:
            raise ValueError(f"{args.model} has no tokenizer: only --self-distill can train it")
        documents = read_corpus(args.corpus) if args.model else documents
        text = encode(tokenizer, {n: t for n, t in documents.items() if not is_held_out(n)})
        held = encode(tokenizer, {n: t for n, t in documents.items() if is_held_out(n)})
    need = 2 * LONG * args.context + 2
    if len(text) < need or len(held) < 2 * args.context + 1:
        raise ValueError(f"the corpus is too short: {len(text)} tokens to train on and {len(held)} held out, "
                         f"at least {need} and {2 * args.context + 1} are needed")  # fmt: skip
    model.train().requires_grad_(not args.freeze_trunk)
    if args.freeze_trunk:
        vocab = common_choices(model, text, args) if model.config.vocab_size > args.draft_vocab else None
        width = model.config.dim if args.width is None else args.width
        h = model.embed(held_rows(text, WHOLE * args.context, 8).to(args.device))
        for first, exit in zip((0, *exits), exits):
            h = model.run(h, first, exit)
            model.exit_heads[str(exit)] = head = ExitHead(model.config, width, vocab).to(args.device)
            equalise_norms(head, h, model.head.weight)
    return model, tokenizer, text, held


@torch.no_grad()
def equalise_norms(head: ExitHead, h: Tensor, matrix: Tensor) -> None:
    """Start a head's norms so that all coordinates of h (B, N, D) leave them equally large, and logits of size 1.

    A few coordinates of a trunk's hidden states are tens of times larger than the rest, and would drown them.
    """
    scale = F.rms_norm(h, h.shape[-1:]).square().mean((0, 1)).clamp(min=1e-6).rsqrt()  # (D,)
    head.norm.weight.copy_(scale)
    if head.block is not None:
        head.block.attn_norm.weight.copy_(scale)
        head.block.mlp_norm.weight.copy_(scale)
    logits = head(h, matrix)
    head.norm.weight.div_(logits[logits.isfinite()].std())


def read_corpus(path: Path | None) -> dict[str, str]:
    """Name -> text of every UTF-8 file under path, or of each 32,768 characters if path is one file.

    None: the standard library's modules, without tests and tables of characters: about 11 MB.
    """
    if path is not None and path.is_file():
        text = path.read_text("utf-8", errors="replace")
        return {f"{path.name}:{i}": text[i : i + 2**15] for i in range(0, len(text), 2**15)}
    skip = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"} if path is None else set()
    root = path or Path(sysconfig.get_paths()["stdlib"])
    documents = {}
    for file in sorted(root.rglob("*.py" if path is None else "*")):
        name = file.relative_to(root)
        if file.is_file() and not skip & set(name.parts):
            try:
                documents[name.as_posix()] = file.read_text("utf-8")
            except UnicodeDecodeError:  # a test of bad encodings, or no text at all
                pass
    if not any(documents.values()):
        raise ValueError(f"the corpus is empty: {root} has no UTF-8 text")
    return documents


def is_held_out(name: str) -> bool:
    """By a hash of the name: the same file stays held out when others come and go."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0


def encode(tokenizer: Tokenizer, documents: dict[str, str]) -> Tensor:
    """All documents as one row of token ids (T,), each ended by END where the tokenizer has one."""
    end = [tokenizer.special[END]] if END in tokenizer.special else []
    ids = [i for text in documents.values() for i in (*tokenizer.encode(text), *end)]
    return torch.tensor(ids, dtype=torch.int32)


def shuffled(i: int, n: int, seed: int) -> int:
    """The i-th of n windows in an order shuffled anew each epoch."""
    return int(torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + i // n))[i % n])


def batch(text: Tensor, step: int, rows: int, context: int, seed: int) -> Tensor:
    """Rows (rows, context+1) of a step: windows in a shuffled order, at an offset drawn anew each epoch."""
    windows = (len(text) - 1) // context - 1
    out = []
    for i in range(step * rows, (step + 1) * rows):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + i // windows)
        start = shuffled(i, windows, seed) * context + torch.randint(context, (1,), generator=rng).item()
        out.append(text[start : start + context + 1])
    return torch.stack(out).long()


def own_samples(model: Llama, tokenizer: Tokenizer | None, args, rank, world) -> tuple[Tensor, Tensor]:
    """Tokens (T,) the model itself writes, to train on and held out: rows of WHOLE x --context tokens.

    Half of them greedily, half at temperature 1, in batches shared among the processes. Most answer a question that
    a chat model has written itself, at temperature 1; the others, and all of other models, a few words of the corpus.
    """
    file, length = args.out / "samples.safetensors", WHOLE * args.context
    kind = {"model": args.model, "tokens": args.self_distill, "length": length, "seed": args.seed, "bf16": args.bf16}
    if file.exists():
        with safe_open(file, "pt") as saved:
            if json.loads(saved.metadata()["run"]) != kind:
                raise ValueError(f"{file} holds samples of another kind: {saved.metadata()['run']}")
            rows = saved.get_tensor("rows")
    else:
        writer = copy.deepcopy(model).bfloat16() if args.bf16 else model
        batches = -(-args.self_distill // (SIDE_BY_SIDE * length))
        mine = []
        for i in tqdm(range(rank, batches, world), "the model's own samples", disable=rank > 0):
            rng = torch.Generator().manual_seed(args.seed * 1_000_003 + i)
            openings, until = make_openings(model, tokenizer, args, i, rng)
            if openings.shape[1] >= length:
                raise ValueError(f"samples have {WHOLE} x --context = {length} tokens, their openings already "
                                 f"{openings.shape[1]}")  # fmt: skip
            warm = torch.arange(SIDE_BY_SIDE) % 2 == 1
            mine.append((i, sample(writer, openings, length, warm, rng, until)))
        parts: list = [mine]
        if world > 1:
            parts = [None] * world
            dist.all_gather_object(parts, mine)
        rows = torch.cat([made for _, made in sorted(sum(parts, []), key=lambda pair: pair[0])]).int()
        if rank == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            write_whole(file, lambda to: save_file({"rows": rows}, to, metadata={"run": json.dumps(kind)}))
    kept_back = max(16, len(rows) // HELD_OUT)
    return rows[kept_back:].flatten(), rows[:kept_back].flatten()


def make_openings(model, tokenizer, args, i: int, rng: torch.Generator) -> tuple[Tensor, tuple[int, ...]]:
    """Token ids (SIDE_BY_SIDE, P) that samples begin with, and the tokens that end a question left to the model."""
    V = model.config.vocab_size
    if tokenizer is None:
        return torch.randint(V, (SIDE_BY_SIDE, 4), generator=rng), ()
    turn, other = tokenizer.chat(["a"]), tokenizer.chat(["b"])
    before = next(j for j, pair in enumerate(zip(turn, other)) if pair[0] != pair[1])  # where the user's words belong
    if tokenizer.template is not None and i % 4:  # BOS alone is no chat
        return torch.tensor(turn[:before]).expand(SIDE_BY_SIDE, -1), tokenizer.stop
    words = encode(tokenizer, {n: t for n, t in read_corpus(args.corpus).items() if not is_held_out(n)})
    words = words[words < V]
    starts = torch.randint(len(words) - 12, (SIDE_BY_SIDE,), generator=rng).tolist()
    return torch.tensor([[*turn[:before], *words[s : s + 12].tolist(), *turn[before + 1 :]] for s in starts]), ()


@torch.no_grad()
def sample(
    model: Llama, openings: Tensor, length: int, warm: Tensor, rng: torch.Generator | None = None,
    until: tuple[int, ...] = (),
) -> Tensor:  # fmt: skip
    """Continue openings (B, P) to (B, length): rows marked in warm (B,) at temperature 1, the others greedily.

    With `until`, every row begins at temperature 1 and goes on so through the first of these tokens, or ASK tokens.
    """
    (B, P), device = openings.shape, model.embed.weight.device
    cache, first = SideBySide(model, B, length), 0
    rows = torch.zeros(B, length, dtype=torch.long, device=device)
    rows[:, :P] = openings
    warm, asking = warm.to(device), torch.full((B,), bool(until), device=device)
    last = torch.tensor(until, dtype=torch.long, device=device)
    for at in range(P, length):
        h = model.run(model.embed(rows[:, first:at]), 0, model.config.n_layers, first, cache)
        first = at
        logits = model.logits(h[:, -1], model.config.n_layers).float()  # (B, V)
        below = logits.softmax(-1).cumsum(-1)
        point = torch.rand(B, 1, generator=rng).to(device) * below[:, -1:]
        drawn = torch.searchsorted(below, point, right=True).clamp(max=logits.shape[1] - 1).squeeze(1)
        rows[:, at] = token = torch.where(warm | asking, drawn, logits.argmax(-1))
        asking &= ~torch.isin(token, last)
        asking &= at < P + ASK
    return rows.cpu()


class SideBySide:
    """Keys and values of sequences sampled side by side; what `Attention` asks of a cache, no more."""

    def __init__(self, model: Llama, rows: int, length: int):
        c, weight = model.config, model.embed.weight
        shape = (2, c.n_layers, rows, c.n_kv_heads, length, c.head_dim)
        self.held = torch.zeros(shape, device=weight.device, dtype=weight.dtype)

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        stop = start + k.shape[2]
        for held, new in zip(self.held[:, layer], (k, v)):
            held[:, :, start:stop] = new
        return tuple(self.held[:, layer, :, :, :stop])  # (B, G, stop, E) each

    def mask(self, start: int, n: int) -> None:
        return None  # an opening, or one token a row


@torch.no_grad()
def common_choices(model: Llama, text: Tensor, args) -> list[int]:
    """The token ids the model picks most often on the text, together with those the text holds most often."""
    counts = torch.bincount(text.long(), minlength=model.config.vocab_size)
    for row in held_rows(text, args.context, 128).split(8):
        choice = model(row[:, :-1].to(args.device)).argmax(-1).cpu().flatten()
        counts += torch.bincount(choice, minlength=len(counts))
    order = counts.argsort(descending=True, stable=True)[: args.draft_vocab]
    return sorted(order[counts[order] > 0].tolist())


# ---- what came of it -----------------------------------------------------------------------------------


def held_rows(text: Tensor, context: int, n: int = 16) -> Tensor:
    """n rows (n, context+1), evenly spread over the text."""
    starts = torch.linspace(0, len(text) - context - 1, n).long().tolist()
    return torch.stack([text[s : s + context + 1] for s in starts]).long()


@torch.no_grad()
def measure(model: Llama, rows: Tensor, start: int = 0, depths: tuple | None = None) -> tuple[float, list[float]]:
    """On rows (B, N+1): the full model's loss, and each depth's agreement with it, from position start on."""
    n, total = model.config.n_layers, 0.0
    agree = torch.zeros(n + 1, dtype=torch.float64)
    for piece in rows.split(4):
        ids, target = piece[:, :-1], piece[:, start + 1 :]
        h, states = model.embed(ids.to(model.embed.weight.device)), []
        for i in range(n):
            h = model.run(h, i, i + 1)
            states.append(h)
        full = model.logits(states[-1][:, start:], n).float()  # (B, N-start, V)
        total += F.cross_entropy(full.flatten(0, 1), target.flatten().to(full.device)).item() * len(piece) / len(rows)
        for exit in range(1, n) if depths is None else depths:
            read = model.read(states[exit - 1], exit)[:, start:]
            same = model.logits(read, exit).argmax(-1) == full.argmax(-1)
            agree[exit] += same.double().mean().item() * len(piece) / len(rows)
    return total, agree[1:-1].tolist()


def report(args: argparse.Namespace, model: Llama, held: Tensor, original: Llama | None) -> None:
    """Print and draw every layer's agreement with the full model, and what was kept of the original."""
    out, context, start = args.out, args.context, args.context // 2
    header = describe(args.model or "a new model", args.device, model.embed.weight.dtype)
    rows = held_rows(held, 2 * context)
    loss, on_text = measure(model, rows)
    greedy = sample(model, rows[:, :start], 2 * context + 1, torch.zeros(len(rows), dtype=torch.bool))
    _, on_greedy = measure(model, greedy, start - 1)
    print(f"\nheld-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
    print("agreement with the full model\nlayer   held-out text   greedy continuations")
    for exit, (a, b) in enumerate(zip(on_text, on_greedy), 1):
        print(f"{exit:5}   {a:13.1%}   {b:20.1%}{'   <- exit' if exit in model.exits else ''}")
    if original is not None:
        with torch.no_grad():
            p, q = (torch.cat([m(r[:, :-1].to(m.embed.weight.device)).float().log_softmax(-1) for r in rows.split(4)])
                    for m in (original, model))  # fmt: skip
        kl, same = (p.exp() * (p - q)).sum(-1).mean(), (p.argmax(-1) == q.argmax(-1)).float().mean()
        was = math.exp(F.nll_loss(p.flatten(0, 1), rows[:, 1:].flatten().to(p.device)))
        print(f"kept of the original: agreement {same:.1%}, KL {kl:.4f} nats, "
              f"perplexity {was:.2f} -> {math.exp(loss):.2f}")  # fmt: skip
    layers = range(1, len(on_text) + 1)
    setting = [in_words(header), header["command"]]
    lines = [
        *(f"# {line}" for line in setting),
        "layer,held_out_text,greedy_continuations",
        *(f"{i},{a},{b}" for i, a, b in zip(layers, on_text, on_greedy)),
    ]
    write_whole(out / "agreement.csv", lambda to: to.write_text("\n".join(lines) + "\n", "utf-8"))
    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(layers, on_text, label="held-out text")
    axes.plot(layers, on_greedy, label="greedy continuations")
    for exit in model.exits:
        axes.axvline(exit, color="grey", linestyle=":")
    axes.set(xlabel="exit after layer", ylabel="agreement with the full model", ylim=(0, 1))
    axes.legend()
    caption = [line for text in setting for line in textwrap.wrap(text, 110, break_on_hyphens=False)]
    figure.supxlabel("\n".join(caption), x=0.01, ha="left", fontsize=7, color="0.3")
    write_whole(out / "agreement.png", lambda to: figure.savefig(to, format="png", dpi=150))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    add("--model", metavar="M", help="a name, .gguf file or Hugging Face folder to start from (recipes 2 and 3)")
    add("--freeze-trunk", action="store_true", help="recipe 2: train only heads at the exits")
    add("--self-distill", type=int, default=0, metavar="TOKENS", help="train M on so many tokens of its own writing")
    add("--corpus", type=Path, metavar="PATH", help="a text file, or a folder of them (default: Python's library)")
    add("--exits", type=int, nargs="*", metavar="E", help="exits, shallow to deep (default: M's own, or 1/16 and 1/4 of"
        " the depth; none: no exit losses at all, for comparison)")  # fmt: skip
    add("--steps", type=int, help="optimizer steps (default 1000 without --minutes); 0: only measure --model")
    add("--minutes", type=float, help="a budget: the schedule fits itself to the clock, so reruns differ")
    add("--batch", type=int, default=8192, help="tokens a step, all processes together")
    add("--micro", type=int, default=2048, help="tokens a pass; gradients add up to a batch")
    add("--context", type=int, default=128, help=f"tokens a row; every sixth step has rows {LONG} times as long")
    add("--lr", type=float, help="peak learning rate (default 3e-3, 2e-3 for heads, 3e-4 for a given trunk)")
    add("--seed", type=int, default=0)
    add("--bf16", action="store_true", help="compute in bfloat16; pays on GPUs, and on CPUs with AVX-512 BF16 or AMX")
    add("--compile", action="store_true", help="fuse each layer's operations; needs a C++ compiler")
    add("--resume", action="store_true", help="continue DIR/training.safetensors")
    shape = p.add_argument_group("the model made by recipe 1")
    for name, default in dict(layers=32, dim=128, heads=2, kv_heads=1, ffn=384, vocab=2048).items():
        shape.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    heads = p.add_argument_group("the heads made by recipe 2")
    heads.add_argument("--width", type=int, help="of the block's SwiGLU (default: the model's), 0 for no block")
    heads.add_argument("--draft-vocab", type=int, default=8192, help="how many tokens an exit may draft")
    args = p.parse_args(argv)
    if args.steps is None and args.minutes is None:
        args.steps = 1000
    if args.lr is None:
        args.lr = 3e-3 if not args.model else 2e-3 if args.freeze_trunk else 3e-4
    return args


def check_arguments(args: argparse.Namespace, world: int) -> None:
    if (args.freeze_trunk or args.self_distill) and not args.model:
        raise ValueError("--freeze-trunk and --self-distill need a --model to start from")
    for name in ("steps", "minutes", "batch", "micro", "context", "lr"):
        as_it_is = name == "steps" and args.steps == 0 and args.model and not args.freeze_trunk
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf and not as_it_is:
            raise ValueError(f"--{name} must be above 0, got {value}")
    if not args.model and args.vocab < 257:
        raise ValueError(f"--vocab must be at least 257 (each byte, and the end of a document), got {args.vocab}")
    if args.batch < args.context * LONG * world:
        raise ValueError(f"--batch must hold {LONG} x --context tokens for each of {world} processes, got {args.batch}")
    if args.corpus is not None and not args.corpus.exists():
        raise ValueError(f"no corpus at {args.corpus}")
    exists = (args.out / "training.safetensors").exists()
    if exists and not args.resume:
        raise ValueError(f"{args.out} holds a run already: --resume continues it, another --out starts afresh")
    if args.resume and not exists:
        raise ValueError(f"nothing to resume: {args.out / 'training.safetensors'} does not exist")


if __name__ == "__main__":
    main()
