"""Train exits that can see: give a Llama early exits good enough to draft and to filter.

    python train_exits.py --out DIR                             1. a small model, from scratch
    python train_exits.py --out DIR --model M --freeze-trunk    2. exit heads for M, whose own output stays as it is
    python train_exits.py --out DIR --model M                   3. all of M, held close to the original

1 is LayerSkip's recipe (arXiv 2404.16710): layers are skipped at random, deep ones more often, and the exits are
read through the shared norm and output matrix. Every step trains the ladder's exits and one more depth. An exit
learns the text and, in a share that grows to 4/5, the last layer's distribution. Two changes: skipping fades out
instead of in, which is cheap while the deep layers know little, and matrices are trained with Muon. The text is
Python's own standard library; its vocabulary is learned, and whole files are held out to measure on.
2 distils the full model into ExitHeads: a norm, a small residual map, the output rows of the tokens M uses most.
3 trains the trunk as 1 does, but the last layer learns the original's distribution and the exits the last layer's.

--self-distill trains 2 and 3 on M's own writing, which is what decoding will meet. torchrun --nproc_per_node=N
shares each step among N processes. DIR gets model/ (for checkpoints.load), training.safetensors (for --resume),
and at the end agreement.csv and agreement.png: how often each layer's exit picks the full model's token.

The file knows nothing of drafting or verifying: it makes exits agree, hispec.py turns agreement into speed.
"""

import argparse
import copy
import csv
import dataclasses
import hashlib
import json
import math
import os
import sysconfig
import time
from collections import defaultdict
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoints
from checkpoints import write_whole
from model import Config, ExitHead, Llama
from tokenizer import END, chat, learn_bpe

HELD_OUT = 28  # one document in so many is never trained on
LONG = 8  # every sixth step reads rows so many times as long, that far positions are trained too
DRAFT_WEIGHT, EXIT_WEIGHT = 0.3, 1.0  # loss weights of the first exit and of those above it; the last layer's is 1
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
    finally:
        if world > 1:
            dist.destroy_process_group()


def train(args: argparse.Namespace, rank: int, world: int) -> None:
    """The whole run. Raises ValueError, before anything is written, for what cannot be trained."""
    torch.manual_seed(args.seed)
    check_arguments(args, world)
    model, tokenizer, text, held = prepare(args)
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    # bfloat16 computes in a copy: one step is too small for its 8 bits, so float32 weights add them up
    work = copy.deepcopy(model).bfloat16() if args.bf16 else model
    working = [p for p in work.parameters() if p.requires_grad]
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
    losses = ExitLosses(work, original, args.freeze_trunk)
    if world > 1:
        losses = DistributedDataParallel(losses, find_unused_parameters=not args.freeze_trunk)  # skipped layers
    loop(args, run, losses, text, held, rank, world)
    if rank == 0:
        written, _ = checkpoints.load(args.out / "model", args.device, work.embed.weight.dtype)
        report(args.out, written, held, args.context, original)


def loop(args, run, losses, text, held, rank, world) -> None:
    exits, n_layers = run.model.exits, run.model.config.n_layers
    first, began, saved_at = run.step, time.time(), time.time()
    layout = "{percentage:3.0f} % |{bar:20}| {elapsed} < {remaining}{postfix}"
    bar = tqdm(total=1.0, disable=rank > 0, bar_format=layout)
    bar.n = bar.initial = run.progress(world)
    while (done := run.progress(world)) < 1:
        context = args.context * (LONG if run.step % 6 == 5 else 1)
        local = max(1, args.batch // context // world)  # rows a step for each process
        rows = batch(text, run.step, local * world, context, args.seed)[rank * local : (rank + 1) * local]
        drop = (MAX_DROP_GIVEN if args.model else MAX_DROP) * (1 - done)
        skipped, extra = draw_depths(n_layers, exits, drop, run.step, args.seed)
        weights = {exit: EXIT_WEIGHT if i else DRAFT_WEIGHT for i, exit in enumerate(exits)}
        if exits and not args.freeze_trunk:
            weights[extra] = EXTRA_WEIGHT
        share = 1.0 if args.model else MAX_SHARE * min(1.0, 2 * done)

        stats = torch.zeros(1 + len(weights), device=args.device)  # the last layer's loss, the exits' agreement
        pieces = rows.split(max(1, args.micro // context))
        for i, piece in enumerate(pieces):
            losses.require_backward_grad_sync = i == len(pieces) - 1  # DDP averages once a step
            loss, stat = losses(piece.to(args.device), skipped, weights, share)
            (loss * (len(piece) / local)).backward()
            stats += stat * (len(piece) / local)
        if world > 1:
            dist.all_reduce(stats)
        loss, *agreement = (stats / world).tolist()
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


class ExitLosses(nn.Module):
    """One pass through the layers, read at every exit asked for.

    forward(rows, skipped, weights, share): rows (B, N+1) of token ids; the layers to skip; the loss weight of each
    exit; how much of an exit's goal is the last layer's distribution, the rest being the text. Returns the loss, and
    without gradient (1 + len(weights),): the last layer's loss, then each exit's agreement with it.
    """

    def __init__(self, model: Llama, original: Llama | None = None, frozen: bool = False):
        super().__init__()
        self.model = model
        self.frozen = frozen
        self.original = [original]  # in a list, so that it is no submodule: nothing to train or to share

    def forward(self, rows: Tensor, skipped: frozenset[int], weights: dict[int, float], share: float):
        model, ids, target = self.model, rows[:, :-1], rows[:, 1:].flatten()  # (B, N), (B*N,)
        depth = model.config.n_layers
        with torch.set_grad_enabled(not self.frozen):
            h, hidden = model.embed(ids), {}  # (B, N, D)
            for i in range(depth):
                if self.frozen or i not in skipped:
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
        total, stats = torch.zeros_like(last) if self.frozen else last, [last.detach()]
        for exit, weight in weights.items():
            read = model.logits(hidden[exit], exit).flatten(0, 1).float()  # (B*N, V)
            stats.append((read.detach().argmax(-1) == choice).float().mean())
            total = total + weight * exit_loss(read, goal, target, share, vocabulary(model, exit))
        return total, torch.stack(stats)


def exit_loss(logits: Tensor, goal: Tensor, target: Tensor, share: float, vocab: Tensor | None) -> Tensor:
    """Cross-entropy of logits (M, V) against the text's tokens (M,) and, in a share, the distributions goal (M, V).

    An exit that knows only some tokens learns the goal among those: what it cannot say is not held against it.
    """
    if vocab is not None:
        logits, goal = logits[:, vocab], goal[:, vocab]
        return F.cross_entropy(logits, goal / goal.sum(-1, keepdim=True).clamp(min=1e-9))
    logp = logits.log_softmax(-1)
    soft = -(goal * logp).sum(-1).mean()
    return soft if share == 1 else (1 - share) * F.nll_loss(logp, target) + share * soft


def vocabulary(model: Llama, exit: int) -> Tensor | None:
    return model.exit_heads[str(exit)].vocab if str(exit) in model.exit_heads else None


def draw_depths(n_layers: int, exits: tuple, drop: float, step: int, seed: int) -> tuple[frozenset[int], int]:
    """The layers this step skips and the one more depth it trains: the same in every process.

    Layer l of L is skipped with probability drop * (2^(l / (L-1)) - 1) (LayerSkip, equation 2).
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
    growth = torch.exp(torch.arange(n_layers) * math.log(2) / (n_layers - 1)) - 1  # 0 .. 1
    skipped = (torch.rand(n_layers, generator=rng) < drop * growth).nonzero().flatten().tolist()
    others = [e for e in range(1, n_layers) if e not in exits] or [n_layers - 1]
    return frozenset(skipped), others[torch.randint(len(others), (1,), generator=rng).item()]


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
            **{key: getattr(args, key) for key in ("freeze_trunk", "bf16", "batch", "context", "seed")},
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
            states = defaultdict(dict)
            for name, value in tensors.items():
                if name.startswith(f"optimizer.{o}."):
                    i, key = name.split(".")[2:]
                    states[int(i)][key] = value
            optimizer.load_state_dict({"state": dict(states), "param_groups": optimizer.state_dict()["param_groups"]})
        self.step, self.spent = saved["step"], saved["elapsed"]


def make_optimizers(names: tuple[str, ...], params: tuple[nn.Parameter, ...]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers and exit heads, AdamW for embeddings, output rows and norms."""
    inner = [p.ndim == 2 and n.startswith(("layers.", "exit_heads.")) for n, p in zip(names, params)]
    groups = [[p for p, i in zip(params, inner) if i == wanted] for wanted in (True, False)]
    muon = [torch.optim.Muon(groups[0], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")] if groups[0] else []
    return muon + [torch.optim.AdamW(groups[1], betas=(0.9, 0.95), weight_decay=0.0)]


# ---- model and text ------------------------------------------------------------------------------------


def prepare(args) -> tuple[Llama, tiktoken.Encoding | None, Tensor, Tensor]:
    """The model, what of it is to be trained marked; its tokenizer; tokens (T,) to train on and held out."""
    if args.model:
        model, tokenizer = checkpoints.load(args.model, args.device, torch.float32)
    else:
        documents = read_corpus(args.corpus)
        tokenizer = learn_bpe([text for name, text in documents.items() if not is_held_out(name)], args.vocab)
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
        text, held = own_samples(model, tokenizer, args)
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
        heads = {str(exit): ExitHead(model.config, args.width, vocab) for exit in exits}
        for head in heads.values():
            head.norm.load_state_dict(model.norm.state_dict())  # start as the shared way out
        model.exit_heads = nn.ModuleDict(heads).to(args.device)
    return model, tokenizer, text, held


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


def encode(tokenizer: tiktoken.Encoding, documents: dict[str, str]) -> Tensor:
    """All documents as one row of token ids (T,), each ended by END where the tokenizer has one."""
    end = [tokenizer.encode_single_token(END)] if END in tokenizer.special_tokens_set else []
    ids = [i for text in documents.values() for i in (*tokenizer.encode_ordinary(text), *end)]
    return torch.tensor(ids, dtype=torch.int32)


def batch(text: Tensor, step: int, rows: int, context: int, seed: int) -> Tensor:
    """Rows (rows, context+1) of a step: windows in an order shuffled, and at an offset drawn, anew each epoch."""
    windows = (len(text) - 1) // context - 1
    out = []
    for i in range(step * rows, (step + 1) * rows):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + i // windows)
        order, shift = torch.randperm(windows, generator=rng), torch.randint(context, (1,), generator=rng).item()
        start = order[i % windows].item() * context + shift
        out.append(text[start : start + context + 1])
    return torch.stack(out).long()


def own_samples(model: Llama, tokenizer: tiktoken.Encoding | None, args) -> tuple[Tensor, Tensor]:
    """Tokens (T,) the model itself writes, half of them greedily, half at temperature 1; to train on, held out.

    Each sample answers a few words of the corpus, in the model's own chat format if it has one.
    """
    rng = torch.Generator().manual_seed(args.seed)
    length, words = 2 * args.context, None
    if tokenizer is not None:
        words = encode(tokenizer, {n: t for n, t in read_corpus(args.corpus).items() if not is_held_out(n)})
    rows, by_length = [], defaultdict(list)
    bar = tqdm(total=args.self_distill, desc="the model's own samples", unit=" tokens")
    while sum(map(len, rows)) * length < args.self_distill:
        if words is None:
            opening = torch.randint(model.config.vocab_size, (4,), generator=rng).tolist()
        else:
            start = torch.randint(len(words) - 12, (1,), generator=rng).item()
            opening = chat(tokenizer, [tokenizer.decode(words[start : start + 12].tolist())])
            opening = [i for i in opening if i < model.config.vocab_size]
        if len(opening) >= length:
            raise ValueError(f"samples have 2 x --context = {length} tokens, and an opening already {len(opening)}")
        ready = by_length[len(opening)]  # rows of a batch start together
        ready.append(opening)
        if len(ready) == 32:
            warm = torch.arange(32) % 2 == 1
            rows.append(sample(model, torch.tensor(ready), length, warm))
            ready.clear()
            bar.update(32 * length)
    bar.close()
    rows = torch.cat(rows).int()  # (samples, length)
    kept_back = max(16, len(rows) // HELD_OUT)
    return rows[kept_back:].flatten(), rows[:kept_back].flatten()


@torch.no_grad()
def sample(model: Llama, openings: Tensor, length: int, warm: Tensor) -> Tensor:
    """Continue openings (B, P) to (B, length): rows marked in warm (B,) at temperature 1, the others greedily."""
    device = model.embed.weight.device
    cache, rows, first = Grown(model.config.n_layers), openings.to(device), 0
    warm = warm.to(device)
    while rows.shape[1] < length:
        h = model.run(model.embed(rows[:, first:]), 0, model.config.n_layers, first, cache)
        first = rows.shape[1]
        logits = model.logits(h[:, -1], model.config.n_layers).float()  # (B, V)
        drawn = torch.multinomial(logits.softmax(-1), 1)  # (B, 1)
        token = torch.where(warm[:, None], drawn, logits.argmax(-1, keepdim=True))
        rows = torch.cat([rows, token], 1)
    return rows.cpu()


class Grown:
    """Keys and values of many sequences sampled side by side; what `Attention` asks of a cache, no more."""

    def __init__(self, n_layers: int):
        self.held = [None] * n_layers

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if start:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.held[layer], (k, v)))  # (B, G, start+N, E)
        self.held[layer] = k, v
        return k, v

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
            states.append(h[:, start:])  # (B, N-start, D)
        full = model.logits(states[-1], n).float()
        total += F.cross_entropy(full.flatten(0, 1), target.flatten().to(full.device)).item() * len(piece) / len(rows)
        for exit in range(1, n) if depths is None else depths:
            same = model.logits(states[exit - 1], exit).argmax(-1) == full.argmax(-1)
            agree[exit] += same.double().mean().item() * len(piece) / len(rows)
    return total, agree[1:-1].tolist()


def report(out: Path, model: Llama, held: Tensor, context: int, original: Llama | None) -> None:
    """Print and draw every layer's agreement with the full model, and what was kept of the original."""
    rows = held_rows(held, 2 * context)
    start = context // 2
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
    with open(out / "agreement.csv", "w", newline="") as file:
        csv.writer(file).writerow(("layer", "held_out_text", "greedy_continuations"))
        csv.writer(file).writerows(zip(layers, on_text, on_greedy))
    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(layers, on_text, label="held-out text")
    axes.plot(layers, on_greedy, label="greedy continuations")
    for exit in model.exits:
        axes.axvline(exit, color="grey", linestyle=":")
    axes.set(xlabel="exit after layer", ylabel="agreement with the full model", ylim=(0, 1))
    axes.legend()
    figure.savefig(out / "agreement.png", dpi=150)
    pyplot.close(figure)


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
    add("--steps", type=int, help="optimizer steps (default 1000 without --minutes)")
    add("--minutes", type=float, help="a budget: the schedule fits itself to the clock, so reruns differ")
    add("--batch", type=int, default=8192, help="tokens a step, all processes together")
    add("--micro", type=int, default=2048, help="tokens a pass; gradients add up to a batch")
    add("--context", type=int, default=128, help=f"tokens a row; every sixth step has rows {LONG} times as long")
    add("--lr", type=float, help="peak learning rate (default 3e-3, 1e-3 for heads, 3e-4 for a given trunk)")
    add("--seed", type=int, default=0)
    add("--bf16", action="store_true", help="compute in bfloat16; pays on GPUs, and on CPUs with AVX-512 BF16 or AMX")
    add("--compile", action="store_true", help="fuse each layer's operations; needs a C++ compiler")
    add("--resume", action="store_true", help="continue DIR/training.safetensors")
    shape = p.add_argument_group("the model made by recipe 1")
    for name, default in dict(layers=32, dim=128, heads=2, kv_heads=1, ffn=384, vocab=2048).items():
        shape.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    heads = p.add_argument_group("the heads made by recipe 2")
    heads.add_argument("--width", type=int, default=1024, help="inner size of the residual map, 0 for none")
    heads.add_argument("--draft-vocab", type=int, default=8192, help="how many tokens an exit may draft")
    args = p.parse_args(argv)
    if args.steps is None and args.minutes is None:
        args.steps = 1000
    if args.lr is None:
        args.lr = 3e-3 if not args.model else 1e-3 if args.freeze_trunk else 3e-4
    return args


def check_arguments(args: argparse.Namespace, world: int) -> None:
    if (args.freeze_trunk or args.self_distill) and not args.model:
        raise ValueError("--freeze-trunk and --self-distill need a --model to start from")
    for name in ("steps", "minutes", "batch", "micro", "context", "lr"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
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
