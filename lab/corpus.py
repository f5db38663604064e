"""Text that a model writes itself, to train it on and to find its loops."""

import copy
import json

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from checkpoints.files import open_tensors, write_whole
from checkpoints.tokenizer import Tokenizer
from checkpoints.variety import looped
from kvcache import KVCache
from lab.installed import INSTALLED, everything, is_held_out
from model import Llama
from train_exits import HELD_OUT, WHOLE, encode, read_corpus, split

SIDE_BY_SIDE = {"cpu": 64, "cuda": 1024}  # samples written at the same time
ASK = 64  # most tokens of a question that the model writes itself
LOOP = 4  # with --unlikelihood, this many tokens repeated at once are a loop


def own_samples(model: Llama, tokenizer: Tokenizer | None, args) -> tuple[Tensor, Tensor]:
    """Tokens (T,) the model writes, to train on and held out, in rows as long as the recipe reads.

    Half are written greedily, half at temperature 1, in batches shared among the processes. Most
    of a chat model's answer a question that it has written itself at temperature 1. The others, and
    all of other models, continue a few words of the corpus.
    """
    file, length = args.out / "samples.safetensors", row_length(args)
    kind = {"model": args.model, "tokens": args.self_distill, "length": length}
    kind |= {"seed": args.seed, "bf16": args.bf16}
    if file.exists():
        with open_tensors(file) as saved:
            if json.loads(saved.metadata()["run"]) != kind:
                raise ValueError(f"{file} holds samples of another kind: {saved.metadata()['run']}")
            rows = saved.get_tensor("rows")
    else:
        rows, about = write_samples(model, tokenizer, args), {"run": json.dumps(kind)}
        if args.rank == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            write_whole(file, lambda to: save_file({"rows": rows}, to, metadata=about))
    kept_back = max(16, len(rows) // HELD_OUT)
    return rows[kept_back:].flatten(), rows[:kept_back].flatten()


def row_length(args) -> int:
    """Return a sample's length: a draft head reads --context tokens a row, exit heads more."""
    return args.context * (1 if args.draft_head else WHOLE)


def write_samples(model: Llama, tokenizer: Tokenizer | None, args) -> Tensor:
    """Rows (B, row_length) of at least --self-distill tokens, from all processes."""
    writer, length = copy.deepcopy(model).bfloat16() if args.bf16 else model, row_length(args)
    rows = SIDE_BY_SIDE[args.device.type]
    batches = -(-args.self_distill // (rows * length))
    words = openers(model, tokenizer, args)
    mine, turns = [], range(args.rank, batches, args.world)
    for i in tqdm(turns, "the model's own samples", disable=args.rank > 0):
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + i)
        openings, until = make_openings(tokenizer, words, i, rows, rng)
        if openings.shape[1] >= length:
            raise ValueError(
                f"with --context {args.context} samples have {length} tokens, "
                f"their openings already {openings.shape[1]}"
            )
        warm = torch.arange(rows) % 2 == 1
        mine.append((i, sample(writer, openings, length, warm, rng, until)))
    parts: list = [mine]
    if args.world > 1:
        parts = [None] * args.world
        dist.all_gather_object(parts, mine)
    batches_in_order = sorted(sum(parts, []), key=lambda pair: pair[0])
    return torch.cat([made for _, made in batches_in_order]).int()


def openers(model: Llama, tokenizer: Tokenizer | None, args) -> Tensor:
    """Return the tokens (T,) with which samples may begin: the corpus, or the whole vocabulary."""
    if tokenizer is None:
        return torch.arange(model.config.vocab_size)
    if args.corpus == INSTALLED:
        texts = [text for name, text in everything().items() if not is_held_out(name)]
    else:
        texts, _ = split(read_corpus(args.corpus))
    words = encode(tokenizer, texts)
    words = words[words < model.config.vocab_size]  # a tokenizer may know more than its model
    if len(words) <= 12:
        raise ValueError(f"the corpus is too short: {len(words)} tokens to begin samples with")
    return words


def make_openings(
    tokenizer: Tokenizer | None, words: Tensor, i: int, rows: int, rng: torch.Generator
) -> tuple[Tensor, tuple[int, ...]]:
    """Return openings (rows, P), and the tokens that end a question, if one must be written."""
    if tokenizer is None:
        return torch.randint(len(words), (rows, 4), generator=rng), ()
    turn, other = tokenizer.chat(["a"]), tokenizer.chat(["b"])
    # where the user's words begin
    before = next(j for j, pair in enumerate(zip(turn, other)) if pair[0] != pair[1])
    if tokenizer.template is not None and i % 4:  # BOS alone is not a chat
        return torch.tensor(turn[:before]).expand(rows, -1), tokenizer.stop
    starts = torch.randint(len(words) - 12, (rows,), generator=rng).tolist()
    texts = [[*turn[:before], *words[s : s + 12].tolist(), *turn[before + 1 :]] for s in starts]
    return torch.tensor(texts), ()


def own_loops(model: Llama, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, N) whose second halves the model has rewritten greedily, and which of these tokens
    are in a loop (B, N); a loop's first round does not count.
    """
    (B, N), half = rows.shape, rows.shape[1] // 2
    with torch.compiler.set_stance("force_eager"):  # each pass here has a different shape
        own = sample(model, rows[:, :half], N, torch.zeros(B, dtype=torch.bool))
    inside = torch.zeros(B, N, dtype=torch.bool)
    for row, mark in zip(own.tolist(), inside):
        mark[sorted(looped(row, LOOP))] = True
    inside[:, :half] = False
    return own, inside


@torch.no_grad()
def sample(
    model: Llama, openings: Tensor, length: int, warm: Tensor, rng: torch.Generator | None = None,
    until: tuple[int, ...] = (),
) -> Tensor:  # fmt: skip
    """Continue openings (B, P) to (B, length): rows marked in warm (B,) at temperature 1.

    The others are continued greedily. With `until`, every row begins at temperature 1, up to the
    first of these tokens, or for ASK tokens.
    """
    (B, P), device = openings.shape, model.embed.weight.device
    cache, first = KVCache(model, (), length, batch=B), 0
    rows = torch.zeros(B, length, dtype=torch.long, device=device)
    rows[:, :P] = openings
    warm, asking = warm.to(device), torch.full((B,), bool(until), device=device)
    last = torch.tensor(until, dtype=torch.long, device=device)
    for at in range(P, length):
        plan = cache.plan(first, at)
        h = model.run(model.embed(rows[:, first:at]), 0, model.config.n_layers, plan)
        first = at
        logits = model.logits(h[:, -1], model.config.n_layers).float()  # (B, V)
        below = logits.softmax(-1).cumsum(-1)
        point = torch.rand(B, 1, generator=rng).to(device) * below[:, -1:]
        drawn = torch.searchsorted(below, point, right=True).squeeze(1)
        drawn = drawn.clamp(max=logits.shape[1] - 1)
        rows[:, at] = token = torch.where(warm | asking, drawn, logits.argmax(-1))
        asking &= ~torch.isin(token, last)
        asking &= at < P + ASK
    return rows.cpu()
