"""The state of a training run: how heads begin, what a step changes, what a checkpoint holds.

Knows nothing of what is learned: it is handed gradients and a learning rate.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import time
from collections import defaultdict

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import checkpoints
from checkpoints.files import open_tensors, write_whole
from lab.commands import check_exits
from lab.corpus import WHOLE, held_rows
from model import ExitHead, Llama
from operators import Linear

DIVERGED = 2.0  # times the loss of uniform guessing


class Run:
    """What a step changes and a checkpoint holds. All chance follows from the seed and the step."""

    def __init__(self, args, model: Llama, work: Llama, tokenizer):
        """work: the model itself, or the copy of it in bfloat16 that is computed with."""
        self.args, self.model, self.work, self.tokenizer = args, model, work, tokenizer
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.params = list(trained.values())
        self.working = [p for p in work.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(trained)
        if args.freeze_trunk:
            # heads ship as they were computed with, the trunk as it came
            model.exit_heads = work.exit_heads
        self.step, self.spent, self.began = 0, 0.0, time.time()
        asked = ["model", "freeze_trunk", "bf16", "batch", "context", "seed"]
        asked += ["self_distill", "unlikelihood", "draft_vocab"]
        vocabulary = [tokenizer.spell(id) for id in range(tokenizer.n_vocab)] if tokenizer else []
        self.kind = {  # what a checkpoint must share to be continued
            "config": dataclasses.asdict(model.config),
            "exits": list(model.exits),
            "trained": [list(p.shape) for p in self.params],
            **{key: getattr(args, key) for key in asked},
            "corpus": args.corpus and str(args.corpus),
            "vocabulary": hashlib.sha256(repr(vocabulary).encode()).hexdigest(),
        }

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
        """One step of the optimizers. ValueError, with nothing changed, if training diverges."""
        for p, w in zip(self.params, self.working):
            # skipped layers have none, and stay
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
        """Each file appears whole; training.safetensors last, since it is what --resume trusts."""
        # what was computed with is what ships; a frozen trunk ships as it came
        shipped = self.model if self.args.freeze_trunk else self.work
        checkpoints.save(shipped, self.tokenizer, self.args.out / "model")
        tensors = {f"weights.{i}": p.detach() for i, p in enumerate(self.params)}
        for o, optimizer in enumerate(self.optimizers):
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{o}.{i}.{key}": value for key, value in state.items()}
        elapsed = self.spent + time.time() - self.began
        state = {"kind": self.kind, "step": self.step, "elapsed": elapsed}
        file = self.args.out / "training.safetensors"
        write_whole(file, lambda to: save_file(tensors, to, metadata={"run": json.dumps(state)}))

    def load(self) -> None:
        with open_tensors(self.args.out / "training.safetensors") as file:
            saved = json.loads(file.metadata()["run"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        kind = json.loads(json.dumps(self.kind))
        if odd := [key for key in kind if saved["kind"].get(key) != kind[key]]:
            was, now = saved["kind"].get(odd[0]), kind[odd[0]]
            raise ValueError(
                f"{self.args.out} holds a run of another kind: "
                f"its {odd[0]} is {was}, asked is {now}"
            )
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
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": dict(states), "param_groups": groups})
        self.step, self.spent = saved["step"], saved["elapsed"]


def make_optimizers(trained: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon for matrices inside a trunk's layers, AdamW for all else: embeddings, norms, heads."""
    matrices = [p for name, p in trained.items() if p.ndim == 2 and name.startswith("layers.")]
    others = [p for name, p in trained.items() if p.ndim != 2 or not name.startswith("layers.")]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    if not matrices:
        return [adamw]
    return [torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), adamw]


# ---- heads as they begin ------------------------------------------------------------------------


def choose_exits(model: Llama, args: argparse.Namespace) -> None:
    """Give the model the exits asked for, else leave its own, else 1/16 and 1/4 of its depth."""
    depth = model.config.n_layers
    own = model.exits or sorted({-(-depth // 16), -(-depth // 4)})
    exits = own if args.exits is None else args.exits
    check_exits(exits, 1, depth)
    model.exits = tuple(exits)


def add_heads(model: Llama, text: Tensor, args) -> None:
    """Give the model a fresh head at each exit, for the tokens (T,) it will be trained on."""
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
def common_choices(model: Llama, text: Tensor, args) -> list[int]:
    """The token ids the model picks most often on the text, and those the text holds most often."""
    counts = torch.bincount(text.long(), minlength=model.config.vocab_size)
    for row in held_rows(text, args.context, 128).split(8):
        choice = model(row[:, :-1].to(args.device)).argmax(-1).cpu().flatten()
        counts += torch.bincount(choice, minlength=len(counts))
    order = counts.argsort(descending=True, stable=True)[: args.draft_vocab]
    return sorted(order[counts[order] > 0].tolist())


@torch.no_grad()
def equalise_norms(head: ExitHead, h: Tensor, output: Linear) -> None:
    """Start a head's norms so that all coordinates of h (B, N, D) leave them equally large.

    Logits have size 1 then. A few coordinates of a trunk's hidden states are tens of times larger
    than the rest, and would drown them.
    """
    scale = F.rms_norm(h, h.shape[-1:]).square().mean((0, 1)).clamp(min=1e-6).rsqrt()  # (D,)
    head.norm.weight.copy_(scale)
    if head.block is not None:
        head.block.attn_norm.weight.copy_(scale)
        head.block.mlp_norm.weight.copy_(scale)
    logits = head(h, output)
    head.norm.weight.div_(logits[logits.isfinite()].std())
