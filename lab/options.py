"""What train_exits.py can be asked, and what it refuses before any work."""

import argparse
import math
from pathlib import Path

import torch

from lab.commands import Parser, check_exits, must_take_files
from lab.corpus import LONG
from lab.installed import INSTALLED


def arguments(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    """The options, those left open filled in. Raises ValueError for what cannot be read."""
    p = Parser(description=description)
    add = p.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    add("--model", metavar="M", help="a name, .gguf file or folder to start from: recipes 2 and 3")
    add("--freeze-trunk", action="store_true", help="recipe 2: train only heads at the exits")
    add("--self-distill", type=int, default=0, metavar="TOKENS", help="train M on its own writing")
    texts = f"a text file, a folder, or {INSTALLED}: every package here (default: Python's library)"
    leave = "recipe 3: what weight the model's own loops have, which are to be unlikely"
    add("--unlikelihood", type=float, default=0.0, metavar="W", help=leave)
    add("--corpus", type=corpus, metavar="PATH", help=texts)
    exits = "M's own, or 1/16 and 1/4 of the depth; none: no exit losses at all, for comparison"
    add("--exits", type=int, nargs="*", metavar="E", help=f"shallow to deep (default: {exits})")
    add("--steps", type=int, help="default 1000 without --minutes; 0: only measure --model")
    add("--minutes", type=float, help="a budget: the schedule fits itself to it, so reruns differ")
    add("--batch", type=int, default=8192, help="tokens a step, all processes together")
    add("--micro", type=int, default=2048, help="tokens a pass; gradients add up to a batch")
    long = f"tokens a row; every sixth step has rows {LONG} times as long, recipe 2 all 4 times"
    add("--context", type=int, default=128, help=long)
    rates = "default 3e-3, 2e-3 for heads, 3e-4 for a given trunk"
    add("--lr", type=float, help=f"peak learning rate ({rates})")
    add("--seed", type=int, default=0)
    where = "pays on GPUs, and on CPUs with AVX-512 BF16 or AMX"
    add("--bf16", action="store_true", help=f"compute in bfloat16; {where}")
    add("--compile", action="store_true", help="fuse each layer's operations; needs a C++ compiler")
    add("--resume", action="store_true", help="continue DIR/training.safetensors")
    shape = p.add_argument_group("the model made by recipe 1")
    for name, default in dict(layers=32, dim=128, heads=2, kv_heads=1, ffn=384, vocab=2048).items():
        shape.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    heads = p.add_argument_group("the heads made by recipe 2")
    heads.add_argument(
        "--width", type=int, help="of the SwiGLU (default: M's hidden size), 0 for no block"
    )
    heads.add_argument("--draft-vocab", type=int, default=8192, help="tokens an exit may draft")
    args = p.parse_args(argv)
    if args.steps is None and args.minutes is None:
        args.steps = 1000
    if args.lr is None:
        args.lr = 3e-3 if not args.model else 2e-3 if args.freeze_trunk else 3e-4
    return args


def corpus(word: str) -> Path | str:
    return word if word == INSTALLED else Path(word)


def check_arguments(args: argparse.Namespace, rank: int, world: int) -> None:
    """ValueError for what can be seen to be wrong before a model or a text is read."""
    if (args.freeze_trunk or args.self_distill) and not args.model:
        raise ValueError("--freeze-trunk and --self-distill need a --model to start from")
    if args.unlikelihood and (args.freeze_trunk or not args.model):
        raise ValueError("--unlikelihood changes the trunk of a --model, as recipe 3 does")
    if not 0 <= args.unlikelihood < math.inf:
        raise ValueError(f"--unlikelihood must be 0 or above, got {args.unlikelihood}")
    for name in ("steps", "minutes", "batch", "micro", "context", "lr"):
        as_it_is = name == "steps" and args.steps == 0 and args.model and not args.freeze_trunk
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf and not as_it_is:
            raise ValueError(f"--{name} must be above 0, got {value}")
    for name, least in dict(context=2, seed=0, self_distill=0, draft_vocab=1).items():
        if not least <= (value := getattr(args, name)) < 2**40:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} must be {least} or above, below 2^40, got {value}")
    if not args.model and args.vocab < 257:
        why = "each byte, and the end of a document"
        raise ValueError(f"--vocab must be at least 257 ({why}), got {args.vocab}")
    if args.exits is not None:
        check_exits(args.exits, 1, None if args.model else args.layers)
    if args.freeze_trunk and args.exits == []:
        raise ValueError("--freeze-trunk trains exits only, and --exits names none")
    if args.batch < args.context * LONG * world:
        raise ValueError(
            f"--batch must hold {LONG} x --context tokens for each of {world} processes, "
            f"got {args.batch}"
        )
    if args.corpus not in (None, INSTALLED) and not args.corpus.exists():
        raise ValueError(f"no corpus at {args.corpus}")
    if args.device.type == "cuda" and args.device.index >= (gpus := torch.cuda.device_count()):
        raise ValueError(f"processes take a GPU each: at most {gpus} here")
    check_out(args, rank)


def check_out(args: argparse.Namespace, rank: int) -> None:
    """ValueError unless --out holds the run to be resumed, or can take a new one."""
    exists = (args.out / "training.safetensors").exists()
    if exists and not args.resume:
        said = "--resume continues it, another --out starts afresh"
        raise ValueError(f"{args.out} holds a run already: {said}")
    if args.resume and not exists:
        raise ValueError(f"nothing to resume: {args.out / 'training.safetensors'} does not exist")
    if rank == 0:  # the process that writes
        must_take_files(args.out)
