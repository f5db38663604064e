"""Measure greedy decoding, single exits, HiSpec and look-ups, in one loop on the same prompts.

    python bench.py --quick
    python bench.py --ladder "1(1) 2(2) 8(4)"
    torchrun --nproc_per_node=2 bench.py --model M      # a model larger than one GPU

For each prompt, greedy decoding writes the reference text; then the methods take turns. Times are
wall-clock seconds of whole generations, prompt included. On every third prompt of a category, each
method also samples a text. Sampled texts differ, so comparing them proves nothing; the tests prove
that they have the same distribution. On every sixth prompt, each method runs once more, outside the
measured speeds, to time its steps and to count which drafts are kept. A line is printed after each
prompt, and the tables after the last.

Each method is compared with greedy decoding, with its own draft alone (its first exit directly
below the full model) and with the best single exit. The ladders are those that --tune last found
for the model, dtype, step and processor. If it has not been run here, every method takes the ladder
found for this model elsewhere, or, if there is none, the model's exits with the paper's windows. On
a CPU the number of threads and the faster of float32 and bfloat16 are found once and kept.
"""

import argparse
import json
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from arguments import Options, ladder_text, parse_ladder
from checkpoints import load
from checkpoints.console import Parser, command, must_take_files, say, table
from checkpoints.files import describe, must_be_writable, write_whole
from checkpoints.ladders import (
    Ladder,
    as_ladder,
    as_options,
    default_exits,
    kept_dtype,
    kept_ladders,
    kept_threads,
    ladders_in,
    must_be_keepable,
    save_ladders,
)
from checkpoints.machine import Notes, limits, ratio, watch, what_was_seen
from checkpoints.tokenizer import Tokenizer
from checkpoints.variety import distinct, looping
from hispec import Generation, Step, generate
from model import Llama

PROMPTS = Path(__file__).parent / "prompts"
HELD_OUT = Path("held-out")  # not a file: stands for beginnings of installed files, drawn by lab/
WARM_UP = 8  # tokens decoded before measuring: a process's first passes are slower than later ones
ROOM = 288  # positions that a step must have room for, so that passes can be timed by themselves
GREEDY: Ladder = ((), (), ())


@dataclass(frozen=True)
class Method:
    """One way to decode. Our methods differ only in the ladder; peers bring their own decoder."""

    name: str
    ladder: Ladder
    decode: Callable[..., Generation]  # decode(prompt, max_new_tokens, stop=..., temperature=...)
    draft: Ladder | None = None  # its own draft alone: its first exit directly below the full model
    ours: bool = True
    sampled: "Method | None" = None  # the same kind tuned for sampled text; None: this one

    @property
    def key(self) -> object:
        """Methods with the same key are measured only once."""
        return self.ladder if self.ours else self.name


@dataclass
class Request:
    """One turn to answer, and what was measured on it."""

    category: str
    prompt: list[int]  # token ids of the conversation so far
    greedy: list[int]  # the reference answer
    made: list[Generation] = field(default_factory=list)  # [method]
    sampled: list[Generation] = field(default_factory=list)  # [method], or empty
    watched: dict[object, Notes] = field(default_factory=dict)  # by Method.key, or empty
    ending: str = ""  # how the prompt ends, if its file says so


def main() -> None:
    args = parse_arguments()
    tell = partial(say, keep_going=bool(args.json or args.figures))
    model, tokenizer, header = load_model(args, tell)
    own = [parse_ladder(text) for text in args.ladder]
    for ladder in own:
        ladder.check_model(model.config, [int(exit) for exit in model.draft_heads])
    questions = choose_questions(args, tokenizer)
    limit = args.max_new_tokens, tokenizer.stop
    room = most_tokens(model, tokenizer, questions, args.max_new_tokens)
    step = make_step(model, args, max(room, ROOM))
    decoder = partial(decode_with, model, step)

    ran, (tuned, where) = {}, kept_ladders(header, model)
    drawn, _ = kept_ladders(header, model, sampled=True)
    if args.tune:
        from lab.tune import tune, tuning_table

        tell("tuning: thousands of ladders are predicted and dozens are run; this takes minutes")
        firsts = {q["category"]: tokenizer.chat(q["turns"][:1]) for q in reversed(questions)}
        prompts = [p for p in firsts.values() if len(p) + args.max_new_tokens <= room]
        ran = tune(step, prompts, *limit, decoder, sampling(args))
        save_ladders(header, ran, ship=args.ship)
        tell(tuning_table(ran) + "\n")
        tuned, drawn = ladders_in(ran, model), ladders_in(ran, model, sampled=True)
        where = "this machine, now"
    methods = choose_methods(model, tuned, own, decoder, every_kind=args.tune)
    others = {m.name: m for m in choose_methods(model, drawn, own, decoder, every_kind=args.tune)}
    methods = [replace(method, sampled=others.get(method.name)) for method in methods]
    header["ladders"] = f"tuned on {where}" if where else "not tuned: the paper's windows"
    tell("ladders:", header["ladders"])
    drafts = {method.draft for method in methods if method.draft and len(method.ladder[0]) > 1}
    for draft in sorted(drafts - {*tuned.values()}):
        tell(f"  {ladder_text(*draft)}, exit {draft[0][0]} alone, was not tuned")
    if args.peers:
        from lab.peers import peers

        tell("peers: transformers loads the same weights")
        for name, decode in peers(model, exit=methods[1].ladder[0][0]):
            methods.append(Method(name, GREEDY, decode, ours=False))

    requests: list[Request] = []
    columns = shown(methods)
    tell("\n" + row_line("over greedy, by prompt", "tokens/s", [name for name, _ in columns]))
    began = time.perf_counter()
    for request in ask(decoder(*GREEDY), tokenizer, questions, *limit, room, tell):
        if not requests:
            tell(how_long(questions, methods, time.perf_counter() - began))
        with tqdm(total=1, desc=request.category, leave=False, disable=args.quiet or None) as bar:
            measure(request, requests, methods, limit, sampling(args), bar)
        requests.append(request)
        tell(row(methods, request, columns))
    if not requests:
        raise ValueError(f"no prompt fits the model's context of {model.config.max_seq_len} tokens")

    results = summarise(model, methods, requests)
    if args.step == "rounds":
        count_in_steps(results)
    header["limit"] = limits(step, min(ROOM, model.config.max_seq_len) - 32)
    if args.json:
        write_whole(args.json, json.dumps({**header, "methods": results}, indent=1) + "\n")
    if args.figures:
        from lab import figures, plots

        data = figures.gather(step, requests, results, ran, *limit, decoder)
        plots.save(args.figures, data, header)
    tell(report(results, header["limit"], args.temperature))
    for line in divergences(model, methods, requests):
        tell(line)
    samples = {request.category: request for request in reversed(requests)}
    for request in [*samples.values()][::-1][: 1 if args.quick else None]:
        text = tokenizer.decode(request.greedy, after=request.prompt).strip()
        tell(f"\nSample ({request.category}): {text}")


# ---- what is measured ---------------------------------------------------------------------------


def load_model(args: argparse.Namespace, tell: Callable) -> tuple[Llama, Tokenizer, dict]:
    """The model in the dtype asked for or the faster one, its tokenizer, and the run's setting."""
    plain = args.step == "plain"
    load_as = partial(load, args.model, args.device, plain=plain, ranks=args.ranks)
    step = {"step": args.step}
    if args.dtype is None:
        either = step | describe(args.model, args.device, torch.float32)
        args.dtype = kept_dtype(either, lambda name: load_as(getattr(torch, name))[0], args.tune)
        tell(f"of float32 and bfloat16 the faster here: {args.dtype}")
    dtype = getattr(torch, args.dtype)
    model, tokenizer = load_as(dtype)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, which the prompts need: they are text")
    if args.chat == "never":
        tokenizer.template = None
    header = step | describe(args.model, args.device, dtype) | {"sampling": sampling(args)}
    if args.device == "cpu" and not args.ranks:
        header["threads"] = kept_threads(header, model, args.tune)
        torch.set_num_threads(header["threads"])
    threads = f"threads: {header['threads']}" if args.device == "cpu" else "GPU"
    tell(header["device"], threads, header["dtype"], f"{args.step} step", args.model, sep=" · ")
    tell("prompt:", tokenizer.prompt)
    return model, tokenizer, header


def make_step(model: Llama, args: argparse.Namespace, room: int) -> Step:
    """The step that all of our methods use, for texts of at most `room` tokens."""
    if args.step == "plain":
        return Step(model)
    if args.step == "packed":
        from fast.cpu import prepare

        return prepare(model)
    from fast.cuda import FixedStep
    from fast.rounds import RoundStep

    kind = RoundStep if args.step == "rounds" else FixedStep
    return kind(model, room, args.compile and args.device != "cpu", args.fused)


def decode_with(model: Llama, step: Step, *ladder) -> Callable:
    """`generate` with this step and ladder (exits, windows, thresholds); no ladder: greedy."""
    return partial(generate, model, fast=step, **as_options(ladder or GREEDY))


def choose_methods(
    model: Llama, tuned: dict[str, Ladder], own: list[Options], decoder: Callable, every_kind: bool
) -> list[Method]:
    """The tuned ladders, or untuned ones where there are none, and `own`, named as written.

    Each ladder's own draft alone is among them. every_kind: include the other tuned ladders too.
    """

    def alone(ladder: Ladder) -> Ladder | None:
        """The ladder's own draft alone, with the paper's window if no such ladder was tuned."""
        exits, _, _ = ladder
        if len(exits) < 2:
            return ladder if exits else None
        if exits[0] < 0:  # a draft head cannot do without the exit that it reads
            return None
        known = [single for single in tuned.values() if single[0] == exits[:1]]
        return known[0] if known else (exits[:1], (4,), (0.0,))

    draft, middle = default_exits(model)[:2]
    hispec = tuned.get("hispec", ((draft, middle), (2, 4), (0.0, 0.0)))
    ladders: dict[str, Ladder] = {
        "greedy": GREEDY,
        "single-layer": tuned.get("single-layer", ((middle,), (4,), (0.0,))),
        "hispec": hispec,
        "draft alone": alone(hispec) or GREEDY,  # HiSpec always has one
        "paper windows": (hispec[0], (2, 4), (0.0, 0.0)),
        "look-up": tuned.get("look-up", ((0,), (4,), (0.0,))),
        "look-up, exit": tuned.get("look-up, exit", ((0, middle), (4, 4), (0.0, 0.0))),
    }
    for head in map(int, model.draft_heads):
        whole = head == model.config.n_layers
        below: Ladder = ((-head, head), (3, 6), (0.0, 0.0))
        name, untuned = ("head", ((-head,), (3,), (0.0,))) if whole else ("head, exit", below)
        ladders.setdefault(name, tuned.get(name, untuned))
    ladders |= {name: x for name, x in tuned.items() if every_kind and name not in ladders}
    for x in own:
        ladders[ladder_text(x.exits, x.windows, x.thresholds, x.draft_head)] = as_ladder(x)
    for ladder in [*ladders.values()]:
        if (single := alone(ladder)) is not None and single not in ladders.values():
            ladders[f"exit {single[0][0]} alone"] = single
    return [Method(name, x, decoder(*x), alone(x)) for name, x in ladders.items()]


def sampling(args: argparse.Namespace) -> dict:
    """How tokens are drawn in the sampled part; empty if nothing is sampled."""
    names = ("temperature", "top_p", "top_k", "seed")
    return {name: getattr(args, name) for name in names} if args.temperature > 0 else {}


# ---- what is asked ------------------------------------------------------------------------------


def choose_questions(args: argparse.Namespace, tokenizer: Tokenizer) -> list[dict]:
    if args.prompts == HELD_OUT:
        from lab.prompts import draw_held_out

        questions = draw_held_out(tokenizer)
    else:
        suits = "python.jsonl" if tokenizer.template is None else "chat.jsonl"
        questions = read_prompts(args.prompts or PROMPTS / suits)
    every = 1 if args.all or args.prompts else 3  # of a category's prompts, the first included
    chosen: list[dict] = []
    seen: Counter[str] = Counter()
    for question in questions:
        at = seen[question["category"]]
        seen[question["category"]] += 1
        if at == 0 if args.quick else at % every == 0:
            chosen.append(question)
    return chosen


def read_prompts(path: Path) -> list[dict]:
    """Questions in Spec-Bench's form: one JSON object per line, with `category` and `turns`."""
    questions = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # nothing else ends a line
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
        except (ValueError, KeyError, TypeError, RecursionError):
            wanted = '{"category": "...", "turns": ["...", ...]} with at least one turn'
            raise ValueError(f"{path}, line {number}: expected {wanted}") from None
        questions.append(question)
    if not questions:
        raise ValueError(f"{path} holds no prompts")
    return questions


def most_tokens(model, tokenizer, questions, max_new_tokens: int) -> int:
    """Bound the tokens of the longest conversation, answers included, by the context at most."""
    asked = [[text for turn in q["turns"] for text in (turn, "")][:-1] for q in questions]
    # an answer's text, encoded again, may have more tokens than were generated
    most = max(len(tokenizer.chat(turns)) + 2 * max_new_tokens * len(turns) for turns in asked)
    return min(most, model.config.max_seq_len)


def ask(decode, tokenizer, questions, max_new_tokens, stop, room, tell) -> Iterator[Request]:
    """Answer each turn greedily. The answer is the reference, and part of the next prompt."""
    for question in questions:
        conversation: list[str] = []
        for turn in question["turns"]:
            conversation.append(turn)
            prompt = tokenizer.chat(conversation)
            if len(prompt) + max_new_tokens > room:
                size = f"{question['category']}, {len(prompt)} tokens"
                tell(f"left out: {size}, too long for the model's context")
                break
            greedy = decode(prompt, max_new_tokens, stop=stop).tokens
            answer = [token for token in greedy if token not in stop]
            conversation.append(tokenizer.decode(answer, after=prompt))
            yield Request(question["category"], prompt, greedy, ending=question.get("ending", ""))


# ---- measuring ----------------------------------------------------------------------------------


def measure(
    request: Request, before: list[Request], methods, limit, sampling: dict, bar=None
) -> None:
    """Decode one request by every method.

    before: the requests measured so far. limit: max_new_tokens and the stop tokens. sampling: how
    to sample, or empty.
    """
    new, stop = limit
    turn = partial(take_turn, methods, request.prompt, bar=bar, stop=stop)
    if not before:
        turn(0, min(new, WARM_UP))
    request.made = turn(len(before), new)
    if sampling and sum(other.category == request.category for other in before) % 3 == 0:
        seed = (sampling["seed"] + sum(len(other.sampled) > 0 for other in before)) % 2**63
        drawing = partial(take_turn, for_sampled(methods), request.prompt, bar=bar, stop=stop)
        drawing = partial(drawing, **sampling | {"seed": seed})
        if not before:
            drawing(0, min(new, WARM_UP))
        request.sampled = drawing(len(before), new)
    if len(before) % 6 == 0:  # this is enough to count, and costs little time
        for method in methods:
            if method.ours and method.key not in request.watched:
                request.watched[method.key] = watch(method.decode, request.prompt, new, stop)


def for_sampled(methods: list[Method]) -> list[Method]:
    return [method.sampled or method for method in methods]


def take_turn(
    methods, prompt, first: int, max_new_tokens: int, bar=None, **options
) -> list[Generation]:
    """Decode once by each method in turn, beginning with method number `first`."""
    made: dict[object, Generation] = {}
    for i in range(len(methods)):
        method = methods[(first + i) % len(methods)]
        if method.key not in made:
            made[method.key] = method.decode(prompt, max_new_tokens, **options)
        if bar is not None:
            bar.set_postfix_str(method.name)
    return [made[method.key] for method in methods]


# ---- results ------------------------------------------------------------------------------------


def summarise(model: Llama, methods: list[Method], requests: list[Request]) -> list[dict]:
    """One result per method: over all requests, by category, and for the sampled texts."""
    predicted = choices(model, {e for m in methods for e in m.ladder[0] if e > 0}, requests)
    drawn = [request for request in requests if request.sampled]
    results = []
    for m, method in enumerate(methods):
        result: dict = {"name": method.name} | as_options(method.ladder)
        result |= by_category(methods, requests, m, figures)
        if drawn:
            drawing = for_sampled(methods)
            counted = by_category(drawing, drawn, m, partial(figures, sampled=True))
            result["sampled"] = as_options(drawing[m].ladder) | counted
        if method.ours:
            result |= what_was_seen([r.watched[method.key] for r in requests if r.watched])
        if any(exit > 0 for exit in method.ladder[0]):
            result |= level_agreement(predicted, method.ladder[0])
        results.append(result)
    return results


def count_in_steps(results: list[dict]) -> None:
    """Note the steps that stood for each window, where whole rounds were decoded."""
    from fast.rounds import covers, in_steps

    for r in [*results, *(r["sampled"] for r in results if "sampled" in r)]:
        options = Options(r["exits"], r["windows"], r["thresholds"], r.get("draft_head", 0))
        r["steps"] = in_steps(options.windows)[0] if covers(options) else None


def by_category(methods, requests: list[Request], m: int, of: Callable) -> dict:
    """Return the figures of all requests, of each category, and of each kind of ending."""
    found = of(methods, requests, m)
    for name, kind in ("by_category", "category"), ("by_ending", "ending"):
        groups = defaultdict(list)
        for request in requests:
            if value := getattr(request, kind):
                groups[value].append(request)
        if groups:
            found[name] = {value: of(methods, some, m) for value, some in groups.items()}
    return found


def figures(methods: list[Method], requests: list[Request], m: int, sampled=False) -> dict:
    """The figures of method m over these requests: of its greedy texts, or of its sampled ones."""
    turns = [request.sampled if sampled else request.made for request in requests]
    made = list(zip(*turns, strict=True))  # [method][request]
    keys = [method.key for method in methods]

    def rate(method: int) -> float:
        return sum(len(g.tokens) for g in made[method]) / sum(g.seconds for g in made[method])

    def speedup_over(key: object) -> float | None:
        return rate(m) / rate(keys.index(key)) if key in keys else None

    def seconds(part) -> float | None:
        """The mean per prompt, or None for a method without levels, which does not report this."""
        return statistics.mean(map(part, made[m])) if levels else None

    levels = list(zip(*(generation.levels for generation in made[m]), strict=True))
    tokens = sum(len(generation.tokens) for generation in made[m])
    prompts = sum(len(request.prompt) for request in requests)
    single = next(method.key for method in methods if method.name == "single-layer")
    found = {
        "tokens_per_second": rate(m),
        "speedup_vs_greedy": speedup_over(methods[0].key),
        "speedup_vs_draft_alone": speedup_over(methods[m].draft),
        "speedup_vs_single_layer": speedup_over(single),
        "tokens_per_target_pass": tokens / sum(s.calls for s in levels[-1]) if levels else None,
        "acceptance": [
            ratio(sum(s.accepted for s in level), sum(s.proposed for s in level))
            for level in levels[:-1]
        ],
        "positions": [(sum(s.positions for s in level) - prompts) / tokens for level in levels],
        "prefill_seconds": seconds(lambda g: g.prefill_seconds),
        "decode_seconds": seconds(lambda g: g.seconds - g.prefill_seconds),
        "distinct": statistics.median(distinct(g.tokens) for g in made[m]),
        "looping": sum(looping(g.tokens) * len(g.tokens) for g in made[m]) / tokens,
        "prompts": len(requests),
        "tokens": tokens,
    }
    if sampled:
        return found
    differing = [differing_tokens(g.tokens, r.greedy) for g, r in zip(made[m], requests)]
    return found | {"identical": differing.count(0), "differing_tokens": sum(differing)}


def differing_tokens(tokens: list[int], reference: list[int]) -> int:
    """The number of positions at which two texts differ; tokens past the shorter's end count."""
    surplus = abs(len(tokens) - len(reference))
    return sum(a != b for a, b in zip(tokens, reference, strict=False)) + surplus


@torch.inference_mode()
def choices(model: Llama, exits: set[int], requests: list[Request]) -> dict[int, torch.Tensor]:
    """For each depth, the tokens (N,) its exit predicts at the N positions of all greedy texts."""
    predicted = defaultdict(list)
    for request in requests:
        ids = torch.tensor([request.prompt + request.greedy], device=model.embed.weight.device)
        h, first = model.embed(ids[:, :-1]), 0
        for depth in (*sorted(exits), model.config.n_layers):
            h, first = model.run(h, first, depth), depth
            states = model.exit_block(h, depth)[0, len(request.prompt) - 1 :]
            predicted[depth].append(model.logits(states, depth).argmax(-1))
    return {depth: torch.cat(parts) for depth, parts in predicted.items()}


def level_agreement(choice: dict[int, torch.Tensor], exits: tuple[int, ...]) -> dict:
    """How often the levels of a ladder predict the same token, given the result of `choices`.

    agreement["4-8"] is the share of tokens on which the levels at depths 4 and 8 agree. Of the
    draft's tokens that the level above rejects, false_rejects is the share that the full model
    would keep. A look-up has no predictions to compare.
    """
    depths = (*(exit for exit in exits if exit > 0), max(choice))
    pairs = [(a, b) for i, a in enumerate(depths) for b in depths[i + 1 :]]
    draft, middle, full = choice[depths[0]], choice[depths[1]], choice[depths[-1]]
    same = {f"{a}-{b}": (choice[a] == choice[b]).double().mean().item() for a, b in pairs}
    out: dict = {"agreement": same}
    if len(depths) > 2:  # between the two lowest exits
        refused = draft != middle
        out["false_rejects"] = ratio((refused & (draft == full)).sum().item(), refused.sum().item())
    return out


# ---- what is printed ----------------------------------------------------------------------------

WIDE = 100  # columns of a terminal
SHORT = {"single-layer": "single", "draft alone": "draft", "paper windows": "paper",
         "look-up, exit": "look+exit", "head, exit": "head+exit"}  # fmt: skip


COLUMNS = """x: tokens/s relative to greedy decoding, its own draft alone, and the best single exit.
ladder: exit(window <threshold). a pass: tokens per full pass. accepted: by level, draft first."""


def percent(values) -> str:
    return " ".join("–" if value is None else f"{value:.0%}" for value in values) or "–"


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def shown(methods: list[Method]) -> list[tuple[str, int]]:
    """Headings and indices of the methods for which a line has room after greedy's speed."""
    columns, room = [], WIDE - 34
    for m, method in enumerate(methods[1:], 1):
        heading = SHORT.get(method.name, method.name).rjust(4)
        room -= len(heading) + 2
        if room >= 0:
            columns.append((heading, m))
    return columns


def how_long(questions: list[dict], methods: list[Method], seconds: float) -> str:
    """How long the run may take. seconds: what one text took."""
    turns = sum(len(question["turns"]) for question in questions)
    texts = turns * (1 + len({method.key for method in methods}) * 2)
    minutes = texts * seconds / 60
    return f"(up to {texts} texts; at {seconds:.1f} s each, like the first, {minutes:.1f} minutes)"


def row(methods: list[Method], request: Request, columns: list[tuple[str, int]]) -> str:
    """One prompt's results: greedy's tokens per second, and the others' speed-ups over it."""
    greedy = figures(methods, [request], 0)["tokens_per_second"]
    ratios = [
        number(figures(methods, [request], m)["speedup_vs_greedy"]).rjust(len(heading))
        for heading, m in columns
    ]
    return row_line(request.category, number(greedy, 1), ratios)


def row_line(prompt: str, speed: str, ratios: list[str]) -> str:
    return "  ".join([f"{prompt:22.22}", f"{speed:>8}", *ratios])


def report(results: list[dict], limit: dict, temperature: float) -> str:
    """What a reader needs first, in tables; the JSON holds everything else."""
    parts = [table(summary_rows(results, "all prompts", identical=True), 36) + "\n" + COLUMNS]
    if "sampled" in results[0]:
        drawn = [r | r["sampled"] for r in results]
        parts.append(table(summary_rows(drawn, f"at temperature {temperature:g}"), 36))
    return "\n" + "\n\n".join([*parts, limit_text(results[0], limit)])


def summary_rows(results: list[dict], title: str, identical: bool = False) -> list[list[str]]:
    rows = [[title, "tokens/s", "x greedy", "x draft", "x single", "a pass", "accepted"]]
    rows[0] += ["identical"] * identical
    for r in results:
        ladder, counted = (
            ladder_text(r["exits"], windows, r["thresholds"], r.get("draft_head", 0))
            for windows in (r["windows"], windows_text(r))
        )
        name = counted if r["name"] == ladder else f"{r['name']}  {counted}".rstrip()
        speeds = [r[f"speedup_vs_{other}"] for other in ("greedy", "draft_alone", "single_layer")]
        cells = [number(r["tokens_per_second"], 1), *map(number, speeds)]
        cells += [number(r["tokens_per_target_pass"]), percent(r["acceptance"])]
        rows.append([name, *cells, *[f"{r['identical']}/{r['prompts']}"] * identical])
    return rows


def windows_text(r: dict) -> list:
    """A method's windows: those above the first with their steps, where these were counted."""
    if not r.get("steps"):
        return r["windows"]
    above = zip(r["windows"][1:], r["steps"][1:])
    return [*r["windows"][:1], *(f"{window} = {n} steps" for window, n in above)]


def limit_text(greedy: dict, limit: dict) -> str:
    ceiling, passes = limit["greedy_tokens_per_second"], limit["pass_seconds"]
    wider = [f"{n}: {seconds / passes['1']:.2f}x" for n, seconds in passes.items() if n != "1"]
    speed, size = limit["bytes_per_second"] / 1e9, limit["pass_bytes"] / 1e6
    return (
        f"memory: {speed:.1f} GB/s, {size:.1f} MB of weights a full pass: at most {ceiling:.0f} "
        f"tokens/s, of which greedy\ndecoding reaches {greedy['tokens_per_second'] / ceiling:.0%}. "
        f"A full pass over one position takes {1e3 * passes['1']:.2f} ms.\n"
        f"Over several positions it takes longer: {', '.join(wider)}"
    )


@torch.inference_mode()
def divergences(model: Llama, methods: list[Method], requests: list[Request]) -> Iterator[str]:
    """Where each text first differs from greedy's, if it does, and the two best logits there."""
    for m, method in enumerate(methods):
        for request in requests:
            tokens, reference = request.made[m].tokens, request.greedy
            if tokens == reference:
                continue
            pairs = enumerate(zip(tokens, reference, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(reference)))
            text = request.prompt + reference[:at]
            ids = torch.tensor([text], device=model.embed.weight.device)
            best, second = model(ids)[0, -1].topk(2).values.tolist()
            where = f"{method.name} differs ({request.category}) from token {at}"
            yield f"{where}: logits {best:.6g} and {second:.6g}"


# ---- options ------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """The options, with defaults filled in. ValueError if any is wrong, before any work."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    models = "tiny, smollm2, a Hugging Face folder or owner/name, or a .gguf file"
    add("--model", default="tiny", help=models)
    ours = "default: prompts/chat.jsonl for a model that chats, else prompts/python.jsonl"
    drawn = f"or {HELD_OUT}: beginnings of installed files never trained on"
    file = f"JSONL with category and turns, {drawn} ({ours})"
    add("--prompts", type=Path, metavar="FILE", help=file)
    plain = "never: plain text, even for a model that chats"
    add("--chat", choices=["auto", "never"], default="auto", help=plain)
    another = "also measure this ladder: exit(window) or exit(window <threshold); may be repeated"
    add("--ladder", action="append", default=[], metavar='"2(2 <0.2) 8(4)"', help=another)
    add("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    add("--dtype", choices=dtypes, help="default: bfloat16; on a CPU the faster of it and float32")
    shapes = "plain: the core's own; packed: weights packed, the default on a CPU; fixed: a GPU "
    shapes += "captures each pass in one shape; rounds: whole rounds as well, the default there"
    add("--step", choices=["plain", "packed", "fixed", "rounds"], help=shapes)
    launches = "captured steps on a GPU: capture the layers without compiling them"
    add("--no-compile", dest="compile", action="store_false", help=launches)
    one = (
        "captured steps on a GPU: all layers of a level in one kernel, for a model as small as tiny"
    )
    add("--fused", action="store_true", help=one)
    add("--max-new-tokens", type=int, metavar="N", help="per answer (default 64; --quick: 24)")
    warmth = "of the sampled part (default 0.8); 0: sample nothing"
    add("--temperature", type=float, default=0.8, help=warmth)
    add("--top-p", type=float, default=1.0, help="likeliest tokens, of this total probability")
    add("--top-k", type=int, default=0, help="draw from this many tokens (default 0: from all)")
    add("--seed", type=int, default=0, help="of the sampled part")
    add("--quick", action="store_true", help="one prompt per category, 24 tokens unless N is given")
    whole = "every prompt of a file that comes with the project (default: a third of each category)"
    add("--all", action="store_true", help=whole)
    find = "first find the fastest exits, windows and threads, and keep them for this machine"
    add("--tune", action="store_true", help=find)
    everyone = "with --tune: keep them in results/ladders.json, for all who clone this"
    add("--ship", action="store_true", help=everyone)
    peers = "also measure decoding by transformers with the same weights, without our exit heads"
    add("--peers", action="store_true", help=peers)
    add("--json", type=Path, metavar="FILE", help="also write every figure to FILE")
    add("--figures", type=Path, metavar="DIR", help="also draw figures into DIR, as PNG and SVG")
    args = parser.parse_args()
    args.ranks, args.quiet = None, False
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        share_out(args)
    fill_in(args)
    check(args)
    return args


def share_out(args: argparse.Namespace) -> None:
    """Share the model among the processes of torchrun; all make the same calls, each on its part.

    So nothing may be chosen by time, which each process would measure for itself. Only one of them
    prints and writes.
    """
    if find_spec("fast") is None:
        raise ValueError("several processes share a model through fast/, which is not here")
    if args.tune or args.peers or args.figures or args.step not in (None, "plain"):
        raise ValueError("several processes: no --tune, --peers or --figures, no --step but plain")
    from fast.parallel import start

    args.ranks = start(args.device)
    args.device, args.step, args.quiet = args.ranks.device, "plain", not args.ranks.first
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.json = None if args.quiet else args.json


def fill_in(args: argparse.Namespace) -> None:
    """The defaults that depend on the machine, on other options, and on whether fast/ is here."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu, fast = args.device.startswith("cuda"), find_spec("fast") is not None
    args.step = args.step or ("plain" if not fast else "rounds" if on_gpu else "packed")
    if args.dtype is None and (args.device != "cpu" or not fast):
        args.dtype = "bfloat16" if on_gpu else "float32"  # otherwise the faster one
    if args.max_new_tokens is None:
        args.max_new_tokens = 24 if args.quick else 64


def check(args: argparse.Namespace) -> None:
    Options(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    for text in args.ladder:
        parse_ladder(text)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    try:
        dtype = getattr(torch, args.dtype or "float32")
        torch.zeros(1, device=args.device, dtype=dtype).item()
    except (RuntimeError, AssertionError, TypeError) as error:  # some devices have no float64
        why = str(error).splitlines()[0]
        asked = f"--device {args.device}" + f" --dtype {args.dtype}" * (args.dtype is not None)
        raise ValueError(f"{asked} cannot be used here: {why}") from None
    if args.step == "packed" and args.device != "cpu":
        raise ValueError("--step packed is for a CPU")
    if args.fused and (args.step not in ("fixed", "rounds") or args.device == "cpu"):
        raise ValueError(f"--fused is for captured steps on a GPU, not --step {args.step}")
    if args.step != "plain" and find_spec("fast") is None:
        raise ValueError(f"--step {args.step} needs fast/, which is not here")
    of_lab = {"--tune": args.tune, "--figures": args.figures, "--peers": args.peers}
    of_lab["--prompts held-out"] = args.prompts == HELD_OUT
    if any(of_lab.values()) and find_spec("lab") is None:
        asked = ", ".join(option for option, given in of_lab.items() if given)
        raise ValueError(f"{asked}: needs lab/, which is not here")
    if args.prompts not in (None, HELD_OUT):
        read_prompts(args.prompts)  # an error in the file is raised now, not later
    if args.tune:
        must_be_keepable(args.ship)
    if args.json:
        must_be_writable(args.json)
    if args.figures:
        must_take_files(args.figures)
    for option, package in ("peers", "transformers"), ("figures", "matplotlib"):
        if getattr(args, option) and find_spec(package) is None:
            why = f"needs {package}: pip install -r requirements-dev.txt"
            raise ValueError(f"--{option} {why}")


if __name__ == "__main__":
    command(main, "stopped: no result was written")
