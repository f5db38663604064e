"""Measure greedy decoding, single-layer speculation and HiSpec: one loop, the same prompts.

    python bench.py --quick

Each prompt is decoded once to warm up and to record the greedy text; then the methods take turns on
it, twice, and every speed-up is the median over those repeats of a ratio within one repeat. Times
are wall-clock seconds of whole generations, prompt included. Then they take turns on every second
prompt of a category, sampling: there every method writes another text of the same distribution,
which tests prove and no comparison of texts could. Last, outside the speeds, the parts of a
generation are timed, what was kept of the drafts is counted, and the levels' predictions on the
greedy text are compared.

Exits and windows are those that --tune last found for the model, device, dtype and step
(results/ladders.json); where it has not been run, the model's own exits, or the paper's, and the
paper's windows. On a CPU, so are the number of threads and, unless --dtype says it, the faster of
float32 and bfloat16; where they are not known yet, they are found first.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from arguments import checked_sampling
from checkpoints import load, save
from checkpoints.files import describe, must_be_writable, write_whole
from faststep import FixedStep
from hispec import Generation, generate
from lab import figures as gathered
from lab import plots
from lab.acceptance import draft_acceptance
from lab.agreement import choices, level_agreement, ratio
from lab.commands import Parser, command, must_take_files
from lab.costs import ROOM, Rungs, memory_limit, pass_times, peak_memory, time_shares
from lab.prompts import (
    DRAWN,
    Request,
    default_prompts,
    draw_held_out,
    most_tokens,
    open_requests,
    read_prompts,
)
from lab.report import print_divergence, print_limit, print_samples, print_tables, print_tuning
from lab.tune import default_exits, kept_dtype, kept_threads, save_ladders, saved_ladders, tune
from lab.variety import distinct, looping
from model import Llama


@dataclass(frozen=True)
class Method:
    """One way to decode. Ours differ only in the ladder; peers bring a decoder of their own."""

    name: str
    exits: tuple[int, ...]
    windows: tuple[int, ...]
    decode: Callable[..., Generation]  # decode(prompt, max_new_tokens, stop=..., temperature=...)
    thresholds: tuple[float, ...] = ()


def main() -> None:
    args = parse_arguments()
    drawn = args.prompts == DRAWN
    questions = read_prompts(args.prompts) if args.prompts and not drawn else None
    step, setting = {"step": args.step}, (args.model, args.device)
    if args.dtype is None:
        either = step | describe(*setting, torch.float32)
        args.dtype = kept_dtype(either, lambda: load(*setting, torch.float32)[0], args.tune)
        print(f"of float32 and bfloat16 the faster here: {str(args.dtype).removeprefix('torch.')}")
    model, tokenizer = load(*setting, args.dtype)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, and the prompts are text")
    if args.chat == "never":
        tokenizer.template = None
    if drawn:
        questions = draw_held_out(tokenizer)
    questions = questions or read_prompts(default_prompts(tokenizer))
    if args.quick:
        firsts = {question["category"]: question for question in reversed(questions)}
        questions = list(firsts.values())[::-1]
    header = step | describe(*setting, args.dtype) | {"sampling": sampling(args)}
    if args.device == "cpu":
        header["threads"] = kept_threads(header, model, anew=args.tune)
        torch.set_num_threads(header["threads"])
    chosen = saved_ladders(header, model)
    run_on = header["device"], f"{header['threads']} threads", header["dtype"], header["model"]
    print(*run_on, sep=" · ")
    print("prompt:", tokenizer.prompt, flush=True)

    limits = args.max_new_tokens, tokenizer.stop
    room = most_tokens(model, tokenizer, questions, args.max_new_tokens)
    fast = None  # one step and one cache for all ladders
    if args.step == "fixed":
        fast = FixedStep(model, max(room, ROOM), compiled=args.compile)
    make_decoder = partial(decoder, model, fast)
    with tqdm(total=len(questions), desc="warm-up and greedy reference", leave=False) as bar:
        opened = open_requests(make_decoder(), tokenizer, questions, *limits, room, bar)
        requests = list(opened)
    if not requests:
        raise ValueError(f"no prompt fits the model's context of {model.config.max_seq_len} tokens")
    if args.tune:
        firsts = {request.category: request.prompt for request in reversed(requests)}
        chosen = tune(model, list(firsts.values()), *limits, make_decoder, fast)
        save_ladders(header, chosen)
        print_tuning(chosen)
    ladders = all_ladders(model, chosen)
    methods, runs, results = compare(model, requests, ladders, make_decoder, args, limits)
    print_tables(results, args.temperature)
    limit = memory_limit(model) | pass_times(model, fast)
    print_limit(limit, results)
    print_divergence(model, methods, requests, runs[-1])
    print_samples(requests[:1] if args.quick else requests, tokenizer)
    if args.json:
        text = json.dumps({**header, "limit": limit, "methods": results}, indent=1) + "\n"
        write_whole(args.json, text)
    if args.figures:
        data = gathered.gather(model, requests, results, chosen, *limits, make_decoder, fast)
        plots.save(args.figures, data, header)


def compare(
    model: Llama, requests: list[Request], ladders: dict[str, Rungs], make_decoder: Callable,
    args: argparse.Namespace, limits: tuple[int, tuple[int, ...]],
) -> tuple[list[Method], list, list[dict]]:  # fmt: skip
    """Run our ladders and, with --peers, others' decoding: the methods, their runs, the results.

    limits: max_new_tokens and the stop tokens.
    """
    peaks, longest = [], max((request.prompt for request in requests), key=len)
    for ladder in ladders.values():
        device = model.embed.weight.device
        peaks.append(peak_memory(device, make_decoder(*ladder), longest, limits[0]))
    methods = [Method(name, x[0], x[1], make_decoder(*x), x[2]) for name, x in ladders.items()]
    ours = list(methods)
    if args.peers:
        methods += peer_methods(model, exit=ours[1].exits[0])
    for method in methods[1:]:
        method.decode(requests[0].prompt, limits[0], stop=limits[1])  # warm-up of the others
    runs = measure(methods, requests, *limits, REPEATS)
    results = summarise(methods, requests, runs)
    if law := sampling(args):
        some = every_second(requests)
        drawn = summarise(methods, some, measure(methods, some, *limits, 1, law), True)
        for result, of_sampled in zip(results, drawn, strict=True):
            result["sampled"] = of_sampled
    about = [{key: getattr(m, key) for key in ABOUT} for m in methods]
    results = [{**head, **result} for head, result in zip(about, results, strict=True)]
    few = [request.prompt for request in requests[:3]]
    said = choices(model, {e for m in ours for e in m.exits if e > 0}, requests)
    # peers come after ours, and stay closed
    for method, result, peak in zip(ours, results, peaks, strict=False):
        result["peak_bytes"] = peak
        depths = (*method.exits, model.config.n_layers)
        result.update(time_shares(depths, method.decode, few, *limits))
        if method.exits:
            # every third request says enough, and nobody waits for it
            result.update(draft_acceptance(method.decode, len(depths), requests[::3], *limits))
        if any(method.exits):
            result.update(level_agreement(said, method.exits))
    return methods, runs, results


def decoder(
    model: Llama, fast: FixedStep | None, exits=(), windows=(), thresholds=()
) -> Callable[..., Generation]:
    """generate with this ladder, by the plain step or another."""
    return partial(generate, model, exits=exits, windows=windows, thresholds=thresholds, fast=fast)


REPEATS = 2  # of the greedy part
ABOUT = ("name", "exits", "windows", "thresholds")  # what says which method a result is of


def all_ladders(model: Llama, chosen: dict) -> dict[str, Rungs]:
    """Greedy, one draft exit, and HiSpec, with the ladders chosen for them or the paper's.

    Where HiSpec's is not the paper's, the same exits with the paper's windows too.
    """
    exits = default_exits(model)
    ladders: dict[str, dict] = {
        "greedy": {"exits": [], "windows": []},
        "single-layer": {"exits": exits[:1], "windows": [4]},
        "hispec": {"exits": exits[:2], "windows": [2, 4]},
    }
    ladders |= chosen
    ours, papers = ladders["hispec"], [2, 4]
    if list(ours["windows"]) != papers or any(ours.get("thresholds", ())):
        ladders["paper windows"] = {"exits": ours["exits"], "windows": papers}
    return {
        name: (tuple(x["exits"]), tuple(x["windows"]), tuple(x.get("thresholds", ())))
        for name, x in ladders.items()
    }


def sampling(args: argparse.Namespace) -> dict:
    """How tokens are drawn in the sampled part; empty if there is none."""
    names = ("temperature", "top_p", "top_k", "seed")
    return {name: getattr(args, name) for name in names} if args.temperature > 0 else {}


def every_second(requests: list[Request]) -> list[Request]:
    """Half of them, from the first on in each category."""
    before = [[other.category for other in requests[:i]] for i in range(len(requests))]
    return [r for r, seen in zip(requests, before, strict=True) if seen.count(r.category) % 2 == 0]


def peer_methods(model: Llama, exit: int) -> list[Method]:
    """transformers' own greedy, early-exit and prompt-lookup decoding of the same weights.

    The weights pass through a temporary folder in Hugging Face's format.
    """
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        save(model, None, folder)
        dtype = model.embed.weight.dtype
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    theirs.to(model.embed.weight.device)

    def decode(
        prompt, max_new_tokens, *, stop, temperature=0.0, top_p=1.0, top_k=0, seed=0, **options
    ) -> Generation:
        torch.manual_seed(seed)
        if temperature > 0:
            options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        began = time.perf_counter()
        ids = torch.tensor([prompt], device=theirs.device)
        options |= {"eos_token_id": list(stop), "pad_token_id": 0}
        options |= {"attention_mask": torch.ones_like(ids)}
        options |= {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
        out = theirs.generate(ids, **options)
        return Generation(out[0, len(prompt) :].tolist(), [], time.perf_counter() - began, 0.0)

    options = {
        "transformers": {},
        "transformers early exit": {"assistant_early_exit": exit},
        "transformers lookup": {"prompt_lookup_num_tokens": 10},
    }
    return [Method(name, (), (), partial(decode, **option)) for name, option in options.items()]


def measure(
    methods, requests, max_new_tokens, stop, repeats, law: dict | None = None
) -> list[list[list[Generation]]]:
    """runs[repeat][method][request]; methods take turns on each request, in a rotating order.

    law: how to sample, each request from a seed of its own; none: greedily.
    """
    runs: list = [[[None] * len(requests) for _ in methods] for _ in range(repeats)]
    with tqdm(total=repeats * len(requests) * len(methods), desc="measuring", leave=False) as bar:
        for repeat in range(repeats):
            for r, request in enumerate(requests):
                drawn = law | {"seed": (law["seed"] + r) % 2**63} if law else {}
                for i in range(len(methods)):
                    m = (i + repeat + r) % len(methods)
                    made = methods[m].decode(request.prompt, max_new_tokens, stop=stop, **drawn)
                    runs[repeat][m][r] = made
                    bar.update()
    return runs


def summarise(methods, requests, runs, sampled=False) -> list[dict]:
    """One result a method, with the same figures for all requests and by category."""
    categories = list(dict.fromkeys(request.category for request in requests))
    results = []
    for m in range(len(methods)):
        of = partial(figures, methods, requests, runs, m, sampled=sampled)
        by = {name: of(name.__eq__) for name in categories}
        results.append(of(lambda category: True) | {"by_category": by})
    return results


def figures(methods, requests, runs, m: int, chosen, sampled=False) -> dict:
    """The figures of method m over the requests whose category is chosen.

    sampled: one repeat, of texts that are not to be compared with the greedy ones.
    """
    picked = [r for r, request in enumerate(requests) if chosen(request.category)]
    names = [method.name for method in methods]

    def rate(repeat, method: int) -> float:
        generations = [repeat[method][r] for r in picked]
        return sum(len(g.tokens) for g in generations) / sum(g.seconds for g in generations)

    def speedup_over(name: str) -> float:
        other = names.index(name)
        return statistics.median(rate(repeat, m) / rate(repeat, other) for repeat in runs)

    def seconds(part) -> float | None:
        """A prompt's, on average; None where levels are not known, and so neither is the part."""
        each = [statistics.mean(part(repeat[m][r]) for r in picked) for repeat in runs]
        return statistics.median(each) if levels else None

    # decoding is deterministic: the counts are those of every repeat
    last = [runs[-1][m][r] for r in picked]
    levels = list(zip(*(generation.levels for generation in last), strict=True))
    tokens = sum(len(generation.tokens) for generation in last)
    prompts = sum(len(requests[r].prompt) for r in picked)
    found = {
        "tokens_per_second": statistics.median(rate(repeat, m) for repeat in runs),
        "speedup_vs_greedy": speedup_over("greedy"),
        "speedup_vs_single_layer": speedup_over("single-layer"),
        "tokens_per_target_pass": tokens / sum(s.calls for s in levels[-1]) if levels else None,
        "acceptance": [
            ratio(sum(s.accepted for s in level), sum(s.proposed for s in level))
            for level in levels[:-1]
        ],
        "positions": [(sum(s.positions for s in level) - prompts) / tokens for level in levels],
        "prefill_seconds": seconds(lambda g: g.prefill_seconds),
        "decode_seconds": seconds(lambda g: g.seconds - g.prefill_seconds),
        "distinct": statistics.median(distinct(g.tokens) for g in last),
        "looping": sum(looping(g.tokens) * len(g.tokens) for g in last) / tokens,
        "prompts": len(picked),
        "tokens": tokens,
    }
    if sampled:
        return found
    differing = [differing_tokens(runs[-1][m][r].tokens, requests[r].greedy) for r in picked]
    return found | {"identical": differing.count(0), "differing_tokens": sum(differing)}


def differing_tokens(tokens: list[int], reference: list[int]) -> int:
    """Positions at which two texts differ; where one is longer, its surplus counts."""
    surplus = abs(len(tokens) - len(reference))
    return sum(a != b for a, b in zip(tokens, reference, strict=False)) + surplus


def parse_arguments() -> argparse.Namespace:
    """What is asked, defaults filled in. ValueError for what is wrong, before any work."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    models = "tiny, smollm2, a folder or owner/name of Hugging Face's, or a .gguf file"
    add("--model", default="tiny", help=models)
    ours = "default: prompts/chat.jsonl for a model that chats, else prompts/python.jsonl"
    drawn = f"or {DRAWN}: beginnings of installed files that no training has seen"
    file = f"JSONL with category and turns, {drawn} ({ours})"
    add("--prompts", type=Path, metavar="FILE", help=file)
    plain = "never: plain text, whatever the model"
    add("--chat", choices=["auto", "never"], default="auto", help=plain)
    add("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    add("--dtype", choices=dtypes, help="default: bfloat16; on a CPU the faster of it and float32")
    shape = "fixed: every pass has one shape, captured on a GPU (default there)"
    add("--step", choices=["plain", "fixed"], help=shape)
    launches = "fixed step on a GPU: capture the layers as they are"
    add("--no-compile", dest="compile", action="store_false", help=launches)
    add("--max-new-tokens", type=int, metavar="N", help="an answer (default 64; --quick: 24)")
    warmth = "of the sampled part (default 0.8); 0: measure greedy decoding only"
    add("--temperature", type=float, default=0.8, help=warmth)
    add("--top-p", type=float, default=1.0, help="draw from the fewest tokens that hold so much")
    add("--top-k", type=int, default=0, help="draw from so many tokens (default 0: from all)")
    add("--seed", type=int, default=0, help="of the sampled part")
    add("--quick", action="store_true", help="one prompt a category, 24 tokens unless N is given")
    find = "first find the fastest exits, windows and threads, and keep them"
    add("--tune", action="store_true", help=find)
    peers = "also measure transformers' decoding of the same weights, without our exit heads"
    add("--peers", action="store_true", help=peers)
    add("--json", type=Path, metavar="FILE", help="also write every figure to FILE")
    draw = "also draw twelve figures into DIR, as PNG and SVG"
    add("--figures", type=Path, metavar="DIR", help=draw)
    args = parser.parse_args()
    on_gpu = (args.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    args.device = args.device or ("cuda" if on_gpu else "cpu")
    if args.dtype or args.device != "cpu":  # there, whichever proves faster
        args.dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    args.step = args.step or ("fixed" if on_gpu else "plain")
    if args.max_new_tokens is None:
        args.max_new_tokens = 24 if args.quick else 64
    checked_sampling(args.temperature, args.top_k, args.top_p, args.seed)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {args.device} cannot be used here: {why}") from None
    if args.json:
        must_be_writable(args.json)  # said now, not when everything is measured
    if args.figures:
        must_take_files(args.figures)
    if args.peers and find_spec("transformers") is None:
        raise ValueError("--peers needs transformers: pip install -r requirements-dev.txt")
    return args


if __name__ == "__main__":
    command(main, "stopped: no result was written")
