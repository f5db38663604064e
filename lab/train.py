"""Training beyond the two recipes of train_exits.py, on which this file builds.

    python -m lab.train --out DIR --model M              3. all of M, held close to the original
    torchrun --nproc_per_node=N -m lab.train ...         any recipe, its rows shared by N processes
    python -m lab.train --out DIR --model M --steps 0    only measures and draws M

Recipe 3 trains the trunk as recipe 1 does, but the last layer learns the original's distribution,
the exits learn the last layer's, and the first exit has the same weight as the others. With
--unlikelihood the model also continues what it reads, greedily, and the tokens in its loops are
made unlikely (arXiv 1908.04319).

--corpus installed reads Python's library and every installed package; its tokens are kept in
DIR/corpus. --self-distill trains recipes 2 and 3 and draft heads on M's own writing, since this is
the text that decoding will see; it is kept in DIR/samples.safetensors. A chat model is given the
mark that begins a user's turn, and writes the question too (Magpie, arXiv 2406.08464).

At the end agreement.csv has a second column, on greedy continuations, and agreement.png shows both.
"""

import argparse
import copy
import dataclasses
import datetime
import math
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import checkpoints
from checkpoints.console import command
from checkpoints.files import describe
from checkpoints.tokenizer import Tokenizer
from checkpoints.vocabulary import learn
from lab.agreement import agreement, kept, write_figure
from lab.corpus import own_loops, own_samples
from lab.installed import INSTALLED, installed_tokens
from model import Llama
from train_exits import (
    EXIT_WEIGHT,
    LONG,
    FrozenTrunk,
    LayerSkip,
    LookBack,
    Run,
    check,
    choose_exits,
    encode,
    loop,
    new_model,
    options,
    prepare,
    read_corpus,
    report,
    report_drafts,
    split,
)

MAX_DROP = 0.1  # probability with which recipe 3 skips the last layer, at the start
OWN = 0.5  # loss weight of rows that the model has written itself; that of the text is 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the checked options. Raises ValueError for what is wrong, before any work."""
    p = options(__doc__)
    own = "recipes 2 and 3, draft heads: train on this many tokens of M's own writing"
    p.add_argument("--self-distill", type=int, default=0, metavar="TOKENS", help=own)
    start = (
        "recipe 1: begin with the layers of M, a model of the same shape, instead of random ones"
    )
    p.add_argument("--layers-of", metavar="M", help=start)
    leave = "recipe 3: weight of the loss that makes the model's own loops unlikely"
    p.add_argument("--unlikelihood", type=float, default=0.0, metavar="W", help=leave)
    args = p.parse_args(argv)
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    recipe_3 = args.model and not args.freeze_trunk and not args.draft_head
    if (args.freeze_trunk or args.self_distill) and not (args.model or args.draft_head):
        raise ValueError("--freeze-trunk and --self-distill need a --model to start from")
    if args.layers_of and (args.model or args.draft_head):
        raise ValueError("--layers-of begins a new model, as recipe 1 does: no --model")
    if args.unlikelihood and not recipe_3:
        raise ValueError("--unlikelihood changes the trunk of a --model, as recipe 3 does")
    if not 0 <= args.unlikelihood < math.inf or args.self_distill < 0:
        raise ValueError("--unlikelihood and --self-distill must be 0 or above")
    args.only_measure = args.steps == 0 and recipe_3
    args.steps = None if args.only_measure else args.steps
    if recipe_3 and args.lr is None:
        args.lr = 3e-4
    check(args, args.rank == 0)
    if args.batch < LONG * args.context * args.world:
        raise ValueError(f"--batch must hold {LONG} x --context tokens for each process")
    if args.device.type == "cuda":
        args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if args.device.index >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"processes take a GPU each: at most {gpus} here")
    return args


class WholeModel(LayerSkip):
    """Recipe 3: every layer of a given model learns, while it is held close to the original."""

    def __init__(self, model: Llama, text: Tensor, args: argparse.Namespace, original: Llama):
        super().__init__(model, text, args)
        self.original, self.max_drop = original, MAX_DROP
        self.weights = dict.fromkeys(model.exits, EXIT_WEIGHT)
        if args.unlikelihood:
            self.names.append("own loops")

    def gradients(self, run: Run, done: float) -> Tensor:
        """With --unlikelihood add a row: the loss on loops, and the share of tokens in loops."""
        stats, args = super().gradients(run, done), self.args
        if not args.unlikelihood:
            return stats
        rows = self.rows(run.step)
        own, inside = own_loops(self.model, run.mine(rows)[:, : args.context + 1])
        both = torch.stack([own, inside.long()], 1)  # (R, 2, N+1)
        made = run.backward(self.loop_loss, both, len(rows), args.micro // args.context)
        return torch.cat([stats, made])

    def share(self, done: float) -> float:
        return 1.0

    def last_loss(self, logits: Tensor, ids: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            goal = self.original(ids).flatten(0, 1).float().softmax(-1)
        return F.cross_entropy(logits, goal)

    def exit_loss(
        self, h: Tensor, exit: int, full: Tensor, target: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        """As in recipe 2, over the tokens that the exit may draft."""
        heads: Any = self.model.exit_heads
        if str(exit) not in heads or heads[str(exit)].vocab is None:
            return super().exit_loss(h, exit, full, target, share)
        vocab = heads[str(exit)].vocab
        logits = (
            heads[str(exit)].known(self.model.exit_block(h, exit), self.model.head).flatten(0, 1)
        )
        agrees = (vocab[logits.detach().argmax(-1)] == full.argmax(-1)).float().mean()
        return F.cross_entropy(logits.float(), full[:, vocab].softmax(-1)), agrees

    def loop_loss(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of rows that the model wrote. both (R, 2, N+1): ids, and whether in a loop."""
        rows, inside = both.to(self.args.device).unbind(1)
        target, loops = rows[:, 1:].flatten(), inside[:, 1:].flatten().float()
        logits, states = self.run(rows[:, :-1], frozenset())
        chosen = logits.softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
        unlikely = -(loops * torch.log1p(-chosen.clamp(max=0.999))).mean()
        total = self.args.unlikelihood * unlikely
        for exit, weight in self.weights.items():
            total = (
                total + weight * self.exit_loss(states[exit], exit, logits.detach(), target, 1)[0]
            )
        return OWN * total, torch.stack([unlikely.detach(), loops.mean()]).view(1, 2)


class SharedRun(Run):
    """A run whose rows are shared among processes, all of which hold the same weights."""

    def __init__(self, args: argparse.Namespace, model: Llama, tokenizer: Tokenizer | None):
        super().__init__(args, model, tokenizer)
        self.writes = args.rank == 0

    def progress(self) -> float:
        done = torch.tensor(super().progress(), dtype=torch.float64, device=self.args.device)
        dist.all_reduce(done, dist.ReduceOp.MAX)  # clocks differ
        return done.item()

    def mine(self, rows: Tensor) -> Tensor:
        return rows.tensor_split(self.args.world)[self.args.rank]

    def backward(self, *asked) -> Tensor:
        stats = super().backward(*asked)
        dist.all_reduce(stats)
        return stats

    def update(self, loss: float, rate: float) -> None:
        grads = [w.grad for w in self.working if w.grad is not None]  # skipped layers have none
        sums = torch.cat([grad.flatten().float() for grad in grads])
        dist.all_reduce(sums)
        for grad, part in zip(grads, sums.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))
        super().update(loss, rate)


def read(args: argparse.Namespace) -> tuple[Llama, Tokenizer | None, Tensor, Tensor]:
    """The model with its exits, its tokenizer, and tokens (T,) to train on and held out."""
    model, tokenizer = None, None
    if args.model:
        model, tokenizer = checkpoints.load(args.model, args.device, torch.float32, plain=True)
        if tokenizer is None and not args.self_distill:
            raise ValueError(f"{args.model} has no tokenizer: only --self-distill can train it")
        choose_exits(model, args)
    if model is not None and args.self_distill:
        return model, tokenizer, *own_samples(model, tokenizer, args)
    if args.corpus == INSTALLED:
        tokenizer, text, held = installed_tokens(args, tokenizer)
    else:
        texts, held_out = split(read_corpus(args.corpus))
        tokenizer = tokenizer or learn(texts, args.vocab)
        text, held = encode(tokenizer, texts, cut=model is None), encode(tokenizer, held_out)
    if model is None:
        model = new_model(args, tokenizer)
        if args.layers_of:
            take_layers(model, tokenizer, args.layers_of)
        choose_exits(model, args)
    return model, tokenizer, text, held


@torch.no_grad()
def take_layers(model: Llama, tokenizer: Tokenizer, name: str) -> None:
    """Give a new model the layers of another of its shape, whose vocabulary may differ.

    A token's embedding becomes the mean of the embeddings of the tokens that spell it in the other
    vocabulary (Fast Vocabulary Transfer, arXiv 2402.09977). ValueError if the shapes differ.
    """
    other, speller = checkpoints.load(name, model.embed.weight.device, torch.float32, plain=True)
    want = dataclasses.replace(model.config, vocab_size=other.config.vocab_size)
    if speller is None or other.config != want:
        raise ValueError(f"--layers-of {name}: a tokenizer and {want} are needed")
    shared = {k: w for k, w in other.state_dict().items() if k.startswith(("layers.", "norm."))}
    model.load_state_dict(shared, strict=False)
    ids = {speller.spell(id): [id] for id in range(speller.n_vocab)}
    for token in range(tokenizer.n_vocab):
        text = tokenizer.spell(token)
        pieces = ids.get(text) or speller.encode(text.decode("utf-8", "replace"))
        model.embed.weight[token] = other.embed.weight[pieces].mean(0)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model, tokenizer, text, held = read(args)
    if args.only_measure:
        return draw(args, model, held, None)
    prepare(model, text, held, args)
    run = (SharedRun if args.world > 1 else Run)(args, model, tokenizer)
    recipe: LayerSkip | FrozenTrunk
    original = None
    if args.draft_head:
        recipe = LookBack(run.work, text, args)
    elif args.model and not args.freeze_trunk:
        original = copy.deepcopy(run.work).requires_grad_(False)
        recipe = WholeModel(run.work, text, args, original)
    else:
        recipe = (FrozenTrunk if args.freeze_trunk else LayerSkip)(run.work, text, args)
    if args.resume:
        run.load()
    loop(args, run, recipe, held)
    if run.writes:
        dtype = run.work.embed.weight.dtype
        draw(args, checkpoints.load(args.out / "model", args.device, dtype)[0], held, original)


def draw(args: argparse.Namespace, model: Llama, held: Tensor, original: Llama | None) -> None:
    """Report every layer's agreement as a table and a figure, and how much was kept."""
    header = describe(args.model or "a new model", args.device, model.embed.weight.dtype)
    if args.draft_head:
        return report_drafts(args, header, model, held)
    loss, columns = agreement(model, held, args.context)
    report(args.out, header, model.exits, loss, columns)
    if original is not None:
        print(kept(original, model, held, args.context))
    write_figure(args.out, header, model.exits, columns)


def main(argv: list[str] | None = None) -> None:
    """Train and report. Raises ValueError, before anything is written, if it cannot be trained."""
    args = arguments(argv)
    if args.world == 1:
        return train(args)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)  # gathered data goes through this one
    patience = datetime.timedelta(hours=12)  # a run may be paused
    dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo", timeout=patience)
    try:
        train(args)
        dist.barrier()  # gloo aborts a process that leaves while another is still working
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main, "stopped: --resume continues from the last checkpoint, if there is one yet")
    if "WORLD_SIZE" in os.environ:  # gloo's threads may abort an interpreter that shuts down
        os._exit(0)
