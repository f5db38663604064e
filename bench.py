"""Measure greedy decoding, single-layer speculation and HiSpec with the same loop, on the same prompts.

    python bench.py --quick

Each prompt is decoded once to warm up and to record the greedy text; then the methods take turns on
it, several times, and every speed-up is the median over those repeats of a ratio within one repeat.
Times are wall-clock seconds of whole generations, prompt included. The last step, outside the timed
runs, is to time the parts of a generation and to compare the levels' predictions on the greedy text.

Exits and windows are those that --tune last found for the model, device, dtype and step (results/ladders.json);
where it has not been run, the paper's.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

import figures as drawn
import hispec
from checkpoints import load, save
from checkpoints.files import describe, must_be_writable, write_whole
from faststep import FixedStep
from hispec import Generation, generate
from kvcache import KVCache
from model import Llama
from tune import CONTEXT, Rungs, best_threads, default_exits, save_ladders, saved_ladders, timed, tune


@dataclass(frozen=True)
class Method:
    """One way to decode. Ours differ in nothing but the ladder; peers bring a decoder of their own."""

    name: str
    exits: tuple[int, ...]
    windows: tuple[int, ...]
    decode: Callable[..., Generation]  # decode(prompt, max_new_tokens, stop=...)
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Request:
    """One turn to answer: its category and the token ids of the conversation so far."""

    category: str
    prompt: list[int]
    greedy: list[int]  # the reference answer


def main() -> None:
    args = parse_arguments()
    device = args.device
    dtype = getattr(torch, args.dtype) if args.dtype else torch.bfloat16 if device.startswith("cuda") else torch.float32
    questions = read_prompts(args.prompts)
    if args.quick:
        questions = list({question["category"]: question for question in reversed(questions)}.values())[::-1]
    max_new_tokens, repeats = args.max_new_tokens or (24 if args.quick else 64), 2 if args.quick else 3

    model, tokenizer = load(args.model, device, dtype)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, and the prompts are text")
    if args.chat == "never":
        tokenizer.template = None
    stop = tokenizer.stop
    if device == "cpu":
        torch.set_num_threads(best_threads(model))
    header = {"step": args.step, **describe(args.model, device, dtype)}
    chosen = saved_ladders(header, model)
    print(header["device"], f"{header['threads']} threads", header["dtype"], header["model"], sep=" · ")
    print("prompt:", tokenizer.prompt, flush=True)

    room = most_tokens(model, tokenizer, questions, max_new_tokens)
    make_decoder = partial(decoder, model, room if args.step == "fixed" else None)
    with tqdm(total=len(questions), desc="warm-up and greedy reference", leave=False) as bar:
        requests = list(open_requests(make_decoder(), tokenizer, questions, max_new_tokens, stop, room, bar))
    if not requests:
        raise ValueError(f"no prompt fits the model's context of {model.config.max_seq_len} tokens")
    if args.tune:
        firsts = {request.category: request.prompt for request in reversed(requests)}.values()
        chosen = tune(model, list(firsts), max_new_tokens, stop, make_decoder, args.step == "fixed")
        save_ladders(header, chosen)
        print_tuning(chosen)
    ladders = all_ladders(model, chosen)
    peaks = [peak_memory(make_decoder, ladder, requests, max_new_tokens) for ladder in ladders.values()]
    ours = [Method(name, *ladder[:2], make_decoder(*ladder), ladder[2]) for name, ladder in ladders.items()]
    methods = ours + (peer_methods(model, exit=ours[1].exits[0]) if args.peers else [])
    for method in methods[1:]:
        method.decode(requests[0].prompt, max_new_tokens, stop=stop)  # warm-up of the other methods
    runs = measure(methods, requests, max_new_tokens, stop, repeats)
    results = summarise(methods, requests, runs)
    for method, result, peak in zip(ours, results, peaks, strict=False):  # peers come after ours, and stay closed
        result["peak_bytes"] = peak
        result.update(time_shares(model, method, requests, max_new_tokens, stop))
        if any(method.exits):
            result.update(level_agreement(model, method, requests))
    print_tables(results)
    limit = memory_limit(model) | pass_times(model, args.step == "fixed")
    print_limit(limit, results)
    print_divergence(model, methods, requests, runs[-1])
    print(f"\nSample ({requests[0].category}):", tokenizer.decode(requests[0].greedy).strip())
    if args.json:
        text = json.dumps({**header, "limit": limit, "methods": results}, indent=1) + "\n"
        write_whole(args.json, lambda to: to.write_text(text, "utf-8"))
    if args.figures:
        data = drawn.gather(model, requests, results, chosen, max_new_tokens, stop, make_decoder, args.step == "fixed")
        drawn.save(args.figures, data, header)


def decoder(model: Llama, room: int | None, exits=(), windows=(), thresholds=()) -> Callable[..., Generation]:
    """generate with this ladder: with a fixed step for sequences of at most `room` tokens, or the plain one."""
    fast = fixed_step(model, exits, room) if room else None
    return partial(generate, model, exits=exits, windows=windows, thresholds=thresholds, fast=fast)


fixed_step = cache(FixedStep)  # ladders that differ in their windows only can share one


def all_ladders(model: Llama, chosen: dict) -> dict[str, Rungs]:
    """Greedy, one draft exit, and HiSpec, with the ladders chosen for them or the paper's windows."""
    exits = default_exits(model)
    ladders = {
        "greedy": {"exits": [], "windows": []},
        "single-layer": {"exits": exits[:1], "windows": [4]},
        "hispec": {"exits": exits[:2], "windows": [2, 4]},
    }
    return {
        name: (tuple(ladder["exits"]), tuple(ladder["windows"]), tuple(ladder.get("thresholds", ())))
        for name, ladder in (ladders | chosen).items()
    }


def peer_methods(model: Llama, exit: int) -> list[Method]:
    """transformers' own greedy, early-exit and prompt-lookup decoding of the same weights.

    The weights pass through a temporary folder in Hugging Face's format.
    """
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        save(model, None, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model.embed.weight.dtype)
    theirs.to(model.embed.weight.device)

    def decode(prompt, max_new_tokens, *, stop, **options) -> Generation:
        began = time.perf_counter()
        ids = torch.tensor([prompt], device=theirs.device)
        options |= {"eos_token_id": list(stop), "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        out = theirs.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, **options)
        return Generation(out[0, len(prompt) :].tolist(), [], time.perf_counter() - began)

    options = {
        "transformers": {},
        "transformers early exit": {"assistant_early_exit": exit},
        "transformers lookup": {"prompt_lookup_num_tokens": 10},
    }
    return [Method(name, (), (), partial(decode, **option)) for name, option in options.items()]


# ---------------------------------------------------------------------------------------------------
# Prompts


def read_prompts(path: Path) -> list[dict]:
    """Questions from a JSONL file in Spec-Bench's form: each line has `category` and `turns` (user's texts)."""
    questions = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
            turns = question["turns"]
            ok = isinstance(question["category"], str) and isinstance(turns, list) and turns
            if not ok or not all(isinstance(turn, str) and turn for turn in turns):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{path}, line {number}: expected {{"category": "...", "turns": ["...", ...]}} with at least one turn'
            ) from None
        questions.append(question)
    if not questions:
        raise ValueError(f"{path} holds no prompts")
    return questions


def most_tokens(model, tokenizer, questions, max_new_tokens) -> int:
    """An upper bound for the longest conversation, answers included; at most the model's context."""
    asked = [[text for turn in q["turns"] for text in (turn, "")][:-1] for q in questions]
    # an answer cut from the text and encoded anew may have more tokens than were generated
    most = max(len(tokenizer.chat(turns)) + 2 * max_new_tokens * len(turns) for turns in asked)
    return min(most, model.config.max_seq_len)


def open_requests(decode, tokenizer, questions, max_new_tokens, stop, room, bar) -> Iterator[Request]:
    """Answer each turn greedily; the answer is the reference, and part of the next turn's prompt."""
    for question in questions:
        conversation: list[str] = []
        for turn in question["turns"]:
            conversation.append(turn)
            prompt = tokenizer.chat(conversation)
            if len(prompt) + max_new_tokens > room:
                bar.write(f"left out: {question['category']}, {len(prompt)} tokens, too long for the model's context")
                break
            greedy = decode(prompt, max_new_tokens, stop=stop).tokens
            conversation.append(tokenizer.decode([token for token in greedy if token not in stop]))
            yield Request(question["category"], prompt, greedy)
        bar.update()


# ---------------------------------------------------------------------------------------------------
# Measuring


def measure(methods, requests, max_new_tokens, stop, repeats) -> list[list[list[Generation]]]:
    """runs[repeat][method][request]; the methods take turns on each request, in a rotating order."""
    runs: list = [[[None] * len(requests) for _ in methods] for _ in range(repeats)]
    with tqdm(total=repeats * len(requests) * len(methods), desc="measuring", leave=False) as bar:
        for repeat in range(repeats):
            for r, request in enumerate(requests):
                for i in range(len(methods)):
                    m = (i + repeat + r) % len(methods)
                    runs[repeat][m][r] = methods[m].decode(request.prompt, max_new_tokens, stop=stop)
                    bar.update()
    return runs


def summarise(methods, requests, runs) -> list[dict]:
    """One result a method, with the same figures for all requests and by category."""
    categories = list(dict.fromkeys(request.category for request in requests))
    results = []
    for m, method in enumerate(methods):
        result = {key: getattr(method, key) for key in ("name", "exits", "windows", "thresholds")}
        result.update(figures(methods, requests, runs, m, lambda category: True))
        result["by_category"] = {name: figures(methods, requests, runs, m, name.__eq__) for name in categories}
        results.append(result)
    return results


def figures(methods, requests, runs, m: int, chosen) -> dict:
    """The figures of method m over the requests whose category is chosen."""
    picked = [r for r, request in enumerate(requests) if chosen(request.category)]
    names = [method.name for method in methods]

    def rate(repeat, method: int) -> float:
        generations = [repeat[method][r] for r in picked]
        return sum(len(g.tokens) for g in generations) / sum(g.seconds for g in generations)

    def speedup_over(name: str) -> float:
        return statistics.median(rate(repeat, m) / rate(repeat, names.index(name)) for repeat in runs)

    last = [runs[-1][m][r] for r in picked]  # decoding is deterministic: the counts are those of every repeat
    levels = list(zip(*(generation.levels for generation in last), strict=True))
    tokens, prompts = sum(len(generation.tokens) for generation in last), sum(len(requests[r].prompt) for r in picked)
    differing = [differing_tokens(runs[-1][m][r].tokens, requests[r].greedy) for r in picked]
    return {
        "tokens_per_second": statistics.median(rate(repeat, m) for repeat in runs),
        "speedup_vs_greedy": speedup_over("greedy"),
        "speedup_vs_single_layer": speedup_over("single-layer"),
        "tokens_per_target_pass": tokens / sum(s.calls for s in levels[-1]) if levels else None,
        "acceptance": [ratio(sum(s.accepted for s in level), sum(s.proposed for s in level)) for level in levels[:-1]],
        "positions": [(sum(s.positions for s in level) - prompts) / tokens for level in levels],
        "identical": differing.count(0),
        "prompts": len(picked),
        "tokens": tokens,
        "differing_tokens": sum(differing),
    }


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def differing_tokens(tokens: list[int], reference: list[int]) -> int:
    """Positions at which two texts differ; where one is longer, its surplus counts."""
    return sum(a != b for a, b in zip(tokens, reference, strict=False)) + abs(len(tokens) - len(reference))


@contextmanager
def timed_steps(depths: tuple[int, ...]):
    """While open, model steps are timed: yields a list with the seconds spent at each level so far."""
    seconds, real = [0.0] * len(depths), hispec.Ladder.predict

    def predict(ladder, k, rows):
        began = time.perf_counter()
        logits = real(ladder, k, rows)
        if logits.is_cuda:
            torch.cuda.synchronize()
        seconds[k] += time.perf_counter() - began
        return logits

    hispec.Ladder.predict = predict  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        hispec.Ladder.predict = real  # type: ignore[method-assign]


def time_shares(model, method, requests, max_new_tokens, stop) -> dict:
    """Share of the time in each level's steps, shallow to deep, and in the loop outside them.

    From one more run on a few requests, since timing a step has to wait for it.
    """
    depths = (*method.exits, model.config.n_layers)
    with timed_steps(depths) as seconds:
        total = sum(method.decode(request.prompt, max_new_tokens, stop=stop).seconds for request in requests[:3])
    return {"time_share": [s / total for s in seconds], "time_share_loop": 1 - sum(seconds) / total}


@torch.inference_mode()
def memory_limit(model: Llama) -> dict:
    """What the memory allows greedy decoding: each token takes a full pass, and a pass reads each weight once.

    bytes_per_second is the best of five products of a matrix too large for most caches and a vector. A model that
    fits into the caches can be faster than the limit; keys and values, which a pass reads too, are left out.
    """
    weight = model.embed.weight
    passed = [*model.layers.parameters(), *model.norm.parameters(), model.head.weight]
    matrix = torch.ones(8192, 8192, device=weight.device, dtype=weight.dtype)
    fastest = math.inf
    for _ in range(6):  # the first warms up
        began = time.perf_counter()
        (matrix @ matrix[0])[0].item()
        fastest = min(fastest, time.perf_counter() - began)
    pass_bytes = sum(p.nbytes for p in passed)
    speed = matrix.nbytes / fastest
    return {"bytes_per_second": speed, "pass_bytes": pass_bytes, "greedy_tokens_per_second": speed / pass_bytes}


def peak_memory(make_decoder, ladder: Rungs, requests: list[Request], max_new_tokens: int) -> int | None:
    """Bytes of GPU memory at most in use, weights included, while the ladder answers the longest prompt; CPU: None."""
    if not torch.cuda.is_available():
        return None
    fixed_step.cache_clear()  # what other ladders' steps hold is not this one's
    torch.cuda.reset_peak_memory_stats()
    make_decoder(*ladder)(max((request.prompt for request in requests), key=len), max_new_tokens)
    return torch.cuda.max_memory_allocated()


@torch.inference_mode()
def pass_times(model: Llama, fixed: bool) -> dict:
    """Seconds of a full pass over one position, and of its parts run alone: as many single layers, and the head."""
    L, weight = model.config.n_layers, model.embed.weight
    if fixed:
        whole, single = FixedStep(model, (), CONTEXT), FixedStep(model, (1,), CONTEXT)
        layer, head = single.segments[0], whole.heads[0]

        def full() -> None:
            whole.segments[0]()
            whole.heads[0]()

    else:
        cache = KVCache(model.config, (), CONTEXT, weight.device, weight.dtype)
        h, at = model.embed(torch.zeros(1, 1, dtype=torch.long, device=weight.device)), CONTEXT - 1
        layer, head = lambda: model.run(h, 0, 1, at, cache), lambda: model.logits(h, L)

        def full() -> None:
            model.logits(model.run(h, 0, L, at, cache), L)

    seconds = {"pass_seconds": timed(full, weight.is_cuda), "layer_seconds": timed(layer, weight.is_cuda)}
    return seconds | {"layers": L, "head_seconds": timed(head, weight.is_cuda)}


@torch.inference_mode()
def level_agreement(model: Llama, method: Method, requests: list[Request]) -> dict:
    """How often the levels predict the same token, along the greedy texts.

    agreement["4-8"] is the share of tokens on which the levels at depths 4 and 8 agree. false_rejects
    is the share of the draft's tokens refused by the level above it that the full model would keep.
    """
    depths = (*(exit for exit in method.exits if exit > 0), model.config.n_layers)  # a look-up predicts nothing
    predicted = defaultdict(list)
    for request in requests:
        ids = torch.tensor([request.prompt + request.greedy], device=model.embed.weight.device)
        h, first = model.embed(ids[:, :-1]), 0
        for depth in depths:
            h = model.run(h, first, depth)
            read = model.read(h, depth)[0, len(request.prompt) - 1 :]
            predicted[depth].append(model.logits(read, depth).argmax(-1))
            first = depth
    choice = {depth: torch.cat(parts) for depth, parts in predicted.items()}
    pairs = [(a, b) for i, a in enumerate(depths) for b in depths[i + 1 :]]
    draft, middle, full = choice[depths[0]], choice[depths[1]], choice[depths[-1]]
    refused = draft != middle
    out: dict = {"agreement": {f"{a}-{b}": (choice[a] == choice[b]).double().mean().item() for a, b in pairs}}
    if len(depths) > 2:  # the two lowest exits
        out["false_rejects"] = ratio((refused & (draft == full)).sum().item(), refused.sum().item())
    return out


# ---------------------------------------------------------------------------------------------------
# Reporting


def print_tables(results: list[dict]) -> None:
    def percent(values) -> str:
        return " ".join("–" if value is None else f"{value:.0%}" for value in values) or "–"

    def number(value) -> str:
        return "–" if value is None else f"{value:.2f}"

    columns = "method, ladder, tokens/s, x greedy, x single, tokens/pass, accepted, time, loop, identical"
    rows = [columns.split(", ")]
    for r in results:
        ladder = ladder_text(r) or "–"
        rows.append(
            [r["name"], ladder, f"{r['tokens_per_second']:.1f}", f"{r['speedup_vs_greedy']:.2f}"]
            + [f"{r['speedup_vs_single_layer']:.2f}", number(r["tokens_per_target_pass"]), percent(r["acceptance"])]
            + [percent(r.get("time_share", [])), percent([r.get("time_share_loop")])]
            + [f"{r['identical']}/{r['prompts']}"]
        )
    print_table(rows)
    print(
        "\nladder: exit(window), stopping below a probability where one is given. accepted, time: by level, shallow to"
    )
    print("deep. loop: time outside model steps.\n")

    rows = [["tokens/s, x greedy", *(r["name"] for r in results)]]
    for category in results[0]["by_category"]:
        cells = [r["by_category"][category] for r in results]
        rows.append([category, *(f"{c['tokens_per_second']:.1f}  {c['speedup_vs_greedy']:.2f}x" for c in cells)])
    print_table(rows)
    for r in results:
        if "agreement" in r:
            pairs = ", ".join(f"{pair} {value:.0%}" for pair, value in r["agreement"].items())
            rejects = f"; false rejects {percent([r['false_rejects']])}" if "false_rejects" in r else ""
            print(f"\n{r['name']}: levels agree on {pairs}{rejects}")


def print_limit(limit: dict, results: list[dict]) -> None:
    ceiling = limit["greedy_tokens_per_second"]
    reached = ", ".join(f"{r['name']} {r['tokens_per_second'] / ceiling:.0%}" for r in results)
    print(
        f"\nmemory: {limit['bytes_per_second'] / 1e9:.1f} GB/s read, {limit['pass_bytes'] / 1e6:.1f} MB of weights "
        f"a full pass, so at most {ceiling:.0f} tokens/s by greedy decoding; of that: {reached}"
    )
    layers = limit["layers"] * limit["layer_seconds"]
    print(
        f"a full pass takes {limit['pass_seconds'] * 1e3:.2f} ms; alone, its layers take {layers * 1e3:.2f} ms and its "
        f"head {limit['head_seconds'] * 1e3:.2f} ms"
    )


def print_tuning(chosen: dict[str, dict]) -> None:
    """The ladders that tuning ran, with the speed-ups over greedy that it had predicted."""
    rows = [["tuning", "ladder", "predicted", "measured"]]
    for name, best in chosen.items():
        rows += [[name, ladder_text(r), f"{r['predicted']:.2f}x", f"{r['measured']:.2f}x"] for r in best["ran"]]
    print_table(rows)
    print()


def ladder_text(ladder: dict) -> str:
    """2(4 <0.3) 8(6): exit 2, window 4, stopping below probability 0.3; exit 8, window 6."""
    thresholds = ladder["thresholds"] or [0.0] * len(ladder["exits"])
    levels = zip(ladder["exits"], ladder["windows"], thresholds, strict=True)
    return " ".join(f"{e}({w} <{t:g})" if t else f"{e}({w})" for e, w, t in levels)


def print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(first, *others, sep="  ")


@torch.inference_mode()
def print_divergence(model, methods, requests, generations) -> None:
    """For each text that is not greedy's: where it first differs, and how close the two best logits were there."""
    for m, method in enumerate(methods):
        for request, generation in zip(requests, generations[m], strict=True):
            if generation.tokens == request.greedy:
                continue
            pairs = zip(generation.tokens, request.greedy, strict=False)
            shorter = min(len(generation.tokens), len(request.greedy))
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
            ids = torch.tensor([request.prompt + request.greedy[:at]], device=model.embed.weight.device)
            best, second = model(ids)[0, -1].topk(2).values.tolist()
            print(f"{method.name} differs ({request.category}) from token {at}: logits {best:.6g} and {second:.6g}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="tiny", help="tiny, smollm2, a folder or owner/name of Hugging Face's, or a .gguf file"
    )
    parser.add_argument(
        "--prompts", type=Path, default=Path(__file__).parent / "prompts.jsonl", help="JSONL with category and turns"
    )
    parser.add_argument(
        "--chat", choices=["auto", "never"], default="auto", help="never: plain text, whatever the model"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    parser.add_argument("--dtype", choices=dtypes, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument(
        "--step", choices=["plain", "fixed"], help="fixed: every pass has one shape, captured on a GPU (default there)"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens an answer (default 64; --quick: 24)")
    parser.add_argument("--quick", action="store_true", help="one prompt a category, 24 tokens each, two repeats")
    parser.add_argument("--tune", action="store_true", help="first find the fastest exits and windows, and keep them")
    parser.add_argument("--peers", action="store_true", help="also measure transformers' decoding of the same weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to FILE")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also draw eleven figures into DIR, as PNG and SVG")
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.step = args.step or ("fixed" if args.device.startswith("cuda") else "plain")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}")
    for option, path in (("--json", args.json), ("--figures", args.figures and args.figures / "agreement.png")):
        if path is None:
            continue
        try:  # now, not when everything is measured
            if option == "--figures":
                args.figures.mkdir(parents=True, exist_ok=True)
            must_be_writable(path)
        except (OSError, ValueError) as error:
            parser.error(f"{option}: cannot write there: {error}")
    if args.peers and find_spec("transformers") is None:
        parser.error("--peers needs transformers: pip install -r requirements-dev.txt")
    return args


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped: nothing was written")
