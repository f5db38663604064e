"""Text to train and to measure on: read from files, or written by the model, and cut into rows.

Everything is drawn from the seed and the step, so that a run that was cut goes on with the same
rows. What is learned from them is not known here.
"""

import copy
import functools
import json
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from checkpoints.files import open_tensors, write_whole
from checkpoints.tokenizer import Tokenizer
from checkpoints.vocabulary import END
from kvcache import KVCache
from lab.installed import HELD_OUT, INSTALLED, is_held_out, read_installed
from lab.variety import looped
from model import Llama

LONG = 8  # every sixth step reads rows so many times as long: far positions are trained too
WHOLE = 4  # samples, and the rows a frozen trunk reads, have so many times --context
SIDE_BY_SIDE = {"cpu": 64, "cuda": 1024}  # samples written at once
ASK = 64  # a question of the model's own has at most so many tokens
LOOP = 4  # tokens that come again at once are a loop, to a model that shall leave it
# folders of the standard library
NO_TEXT = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


def read_corpus(path: Path | str | None) -> dict[str, str]:
    """Name -> text of every UTF-8 file under path, or of each 32,768 characters of one file.

    None: the standard library's modules, without tests and tables of characters: about 11 MB.
    INSTALLED: these and the packages beside them (installed.py). ValueError if there is no text.
    """
    if path == INSTALLED:
        return read_installed(read_corpus(None), Path(sysconfig.get_paths()["purelib"]))
    path = None if path is None else Path(path)
    if path is not None and path.is_file():
        text = path.read_text("utf-8", errors="replace")
        return {f"{path.name}:{i}": text[i : i + 2**15] for i in range(0, len(text), 2**15)}
    skip = set() if path else NO_TEXT
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


def encode(tokenizer: Tokenizer, documents: dict[str, str]) -> Tensor:
    """All documents as one row of token ids (T,), each ended by END where the tokenizer has one."""
    end = [tokenizer.special[END]] if END in tokenizer.special else []
    ids = [tokenizer.encode(text) + end for text in documents.values()]
    return torch.cat([torch.tensor(row, dtype=torch.int32) for row in ids or [[]]])


def encode_split(tokenizer, documents: dict[str, str]) -> tuple[Tensor, Tensor]:
    """The token ids (T,) of the documents to train on, and of those held out."""
    held = {name: text for name, text in documents.items() if is_held_out(name)}
    rest = {name: text for name, text in documents.items() if name not in held}
    return encode(tokenizer, rest), encode(tokenizer, held)


def shuffled(i: int, n: int, seed: int) -> int:
    """The i-th of n windows in an order shuffled anew each epoch."""
    return int(permutation(n, seed * 1_000_003 + i // n)[i % n])


@functools.lru_cache(2)  # a step may end one epoch and begin the next
def permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def batch(text: Tensor, step: int, rows: int, context: int, seed: int) -> Tensor:
    """Rows (rows, context+1) of a step: shuffled windows, at an offset drawn anew each epoch."""
    windows = (len(text) - 1) // context - 1
    out = []
    for i in range(step * rows, (step + 1) * rows):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + i // windows)
        offset = int(torch.randint(context, (1,), generator=rng))
        start = shuffled(i, windows, seed) * context + offset
        out.append(text[start : start + context + 1])
    return torch.stack(out).long()


def equal_parts(rows: int, most: int) -> int:
    """The fewest parts of equally many rows, at most `most` each, so that each row counts alike."""
    return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= max(1, most))


def held_rows(text: Tensor, context: int, n: int = 16) -> Tensor:
    """n rows (n, context+1), evenly spread over the text."""
    starts = torch.linspace(0, len(text) - context - 1, n).long().tolist()
    return torch.stack([text[s : s + context + 1] for s in starts]).long()


# ---- the model's own writing --------------------------------------------------------------------


def own_samples(
    model: Llama, tokenizer: Tokenizer | None, args, rank, world
) -> tuple[Tensor, Tensor]:
    """Tokens (T,) the model writes, to train on and held out: rows of WHOLE x --context tokens.

    Half of them greedily, half at temperature 1, in batches shared among the processes. Most answer
    a question that a chat model has written itself, at temperature 1; the others, and all of other
    models, a few words of the corpus.
    """
    file, length = args.out / "samples.safetensors", WHOLE * args.context
    kind = {"model": args.model, "tokens": args.self_distill, "length": length}
    kind |= {"seed": args.seed, "bf16": args.bf16}
    if file.exists():
        with open_tensors(file) as saved:
            if json.loads(saved.metadata()["run"]) != kind:
                raise ValueError(f"{file} holds samples of another kind: {saved.metadata()['run']}")
            rows = saved.get_tensor("rows")
    else:
        rows, about = write_samples(model, tokenizer, args, rank, world), {"run": json.dumps(kind)}
        if rank == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            write_whole(file, lambda to: save_file({"rows": rows}, to, metadata=about))
    kept_back = max(16, len(rows) // HELD_OUT)
    return rows[kept_back:].flatten(), rows[:kept_back].flatten()


def write_samples(model: Llama, tokenizer: Tokenizer | None, args, rank: int, world: int) -> Tensor:
    """Rows (B, WHOLE x --context) of at least --self-distill tokens, from all processes."""
    writer, length = copy.deepcopy(model).bfloat16() if args.bf16 else model, WHOLE * args.context
    rows = SIDE_BY_SIDE[args.device.type]
    batches = -(-args.self_distill // (rows * length))
    mine = []
    for i in tqdm(range(rank, batches, world), "the model's own samples", disable=rank > 0):
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + i)
        openings, until = make_openings(model, tokenizer, args, i, rows, rng)
        if openings.shape[1] >= length:
            raise ValueError(
                f"samples have {WHOLE} x --context = {length} tokens, "
                f"their openings already {openings.shape[1]}"
            )
        warm = torch.arange(rows) % 2 == 1
        mine.append((i, sample(writer, openings, length, warm, rng, until)))
    parts: list = [mine]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, mine)
    batches_in_order = sorted(sum(parts, []), key=lambda pair: pair[0])
    return torch.cat([made for _, made in batches_in_order]).int()


def make_openings(
    model, tokenizer, args, i: int, rows: int, rng: torch.Generator
) -> tuple[Tensor, tuple[int, ...]]:
    """Openings of samples (rows, P), and the tokens that end a question left open."""
    V = model.config.vocab_size
    if tokenizer is None:
        return torch.randint(V, (rows, 4), generator=rng), ()
    turn, other = tokenizer.chat(["a"]), tokenizer.chat(["b"])
    # where the user's words belong
    before = next(j for j, pair in enumerate(zip(turn, other)) if pair[0] != pair[1])
    if tokenizer.template is not None and i % 4:  # BOS alone is no chat
        return torch.tensor(turn[:before]).expand(rows, -1), tokenizer.stop
    words, _ = encode_split(tokenizer, read_corpus(args.corpus))
    words = words[words < V]
    starts = torch.randint(len(words) - 12, (rows,), generator=rng).tolist()
    texts = [[*turn[:before], *words[s : s + 12].tolist(), *turn[before + 1 :]] for s in starts]
    return torch.tensor(texts), ()


def own_loops(model: Llama, rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows (B, N), their second halves written by the model, greedily; and which of that is in a
    loop (B, N): its first round is not.
    """
    (B, N), half = rows.shape, rows.shape[1] // 2
    with torch.compiler.set_stance("force_eager"):  # each pass here has another shape
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

    The others greedily. With `until`, every row begins at temperature 1 and goes on so through the
    first of these tokens, or ASK tokens.
    """
    (B, P), device = openings.shape, model.embed.weight.device
    cache, first = KVCache(model, (), length, batch=B), 0
    cache.pad = 1  # rows enough
    rows = torch.zeros(B, length, dtype=torch.long, device=device)
    rows[:, :P] = openings
    warm, asking = warm.to(device), torch.full((B,), bool(until), device=device)
    last = torch.tensor(until, dtype=torch.long, device=device)
    for at in range(P, length):
        cache.place(first, at)
        h = model.run(model.embed(rows[:, first:at]), 0, model.config.n_layers, cache)
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
