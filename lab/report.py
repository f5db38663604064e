"""What the bench found, as tables and lines on the terminal. Nothing is timed here."""

import torch


def percent(values) -> str:
    return " ".join("–" if value is None else f"{value:.0%}" for value in values) or "–"


def number(value) -> str:
    return "–" if value is None else f"{value:.2f}"


def print_tables(results: list[dict], temperature: float = 0.0) -> None:
    """All results; those of the sampled part, if they have them, say their temperature."""
    columns = {
        "method": lambda r: r["name"],
        "ladder": lambda r: ladder_text(r) or "–",
        "tokens/s": lambda r: f"{r['tokens_per_second']:.1f}",
        "x greedy": lambda r: number(r["speedup_vs_greedy"]),
        "x single": lambda r: number(r["speedup_vs_single_layer"]),
        "tokens/pass": lambda r: number(r["tokens_per_target_pass"]),
        "accepted": lambda r: percent(r["acceptance"]),
        "kept": lambda r: " ".join(map(number, r.get("accepted_length", []))) or "–",
        "prefill": lambda r: milliseconds(r["prefill_seconds"]),
        "decode": lambda r: milliseconds(r["decode_seconds"]),
        "time": lambda r: percent(r.get("time_share", [])),
        "loop": lambda r: percent([r.get("time_share_loop")]),
        "identical": lambda r: f"{r['identical']}/{r['prompts']}",
    }
    print_table([[*columns], *([cell(r) for cell in columns.values()] for r in results)])
    print("\nladder: exit(window), stopping below a probability where one is given.")
    print("accepted, kept (drafts a verification), time: by level, shallow to deep.")
    print("prefill, decode: ms a prompt. loop: time outside model steps.")
    if "sampled" in results[0]:
        print_sampled(results, temperature)
    print_categories(results)
    for r in results:
        for depth, shares in zip(r["exits"], r.get("acceptance_by_position", [])):
            print(f"\n{r['name']}: kept of exit {depth}'s drafts, by position: {percent(shares)}")
    for r in results:
        if "agreement" in r:
            said = ", ".join(f"{pair} {value:.0%}" for pair, value in r["agreement"].items())
            if "false_rejects" in r:
                said += f"; false rejects {percent([r['false_rejects']])}"
            print(f"\n{r['name']}: levels agree on {said}")


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.0f}"


def print_sampled(results: list[dict], temperature: float) -> None:
    """The figures of the sampled texts, over plain sampling."""
    rows = [[f"at temperature {temperature:g}", "tokens/s", "x plain", "x single", "tokens/pass",
             "accepted"]]  # fmt: skip
    for r in results:
        s = r["sampled"]
        speeds = [number(s[f"speedup_vs_{other}"]) for other in ("greedy", "single_layer")]
        counts = [number(s["tokens_per_target_pass"]), percent(s["acceptance"])]
        rows.append([r["name"], f"{s['tokens_per_second']:.1f}", *speeds, *counts])
    print()
    print_table(rows)


def print_categories(results: list[dict]) -> None:
    """Speeds by category beside what was written: a text that goes round in circles is easy."""
    both = "sampled" in results[0]
    names = [r["name"] for r in results]
    rows = [["tokens/s, x greedy" + ", x sampled" * both, *names, "distinct", "looping"]]

    def row(first: str, of) -> list[str]:
        cells, drawn = [of(r) for r in results], [of(r["sampled"]) for r in results if both]
        speeds = [f"{c['tokens_per_second']:.1f}  {c['speedup_vs_greedy']:.2f}x" for c in cells]
        if both:
            speeds = [f"{s}  {c['speedup_vs_greedy']:.2f}x" for s, c in zip(speeds, drawn)]
        varied = [" / ".join(f"{c[0]['distinct']:g}" for c in (cells, drawn) if c)]
        varied += [" / ".join(percent([c[0]["looping"]]) for c in (cells, drawn) if c)]
        return [first, *speeds, *varied]

    for category in results[0]["by_category"]:
        rows.append(row(category, lambda r, category=category: r["by_category"][category]))
    rows.append(row("all", lambda r: r))
    print()
    print_table(rows)
    texts = "greedy / sampled texts" if both else "texts"
    print(f"\ndistinct: median number of different tokens among the first 64, of {names[0]}'s")
    print(f"{texts}; looping: share of tokens in a loop of eight or more.")


def print_samples(requests, tokenizer) -> None:
    """The greedy text that follows the first request of each category."""
    firsts: dict = {}
    for request in requests:
        firsts.setdefault(request.category, request)
    for category, request in firsts.items():
        print(f"\nSample ({category}):", tokenizer.decode(request.greedy).strip())


def print_limit(limit: dict, results: list[dict]) -> None:
    ceiling = limit["greedy_tokens_per_second"]
    reached = ", ".join(f"{r['name']} {r['tokens_per_second'] / ceiling:.0%}" for r in results)
    speed, size = limit["bytes_per_second"] / 1e9, limit["pass_bytes"] / 1e6
    print(
        f"\nmemory: {speed:.1f} GB/s read, {size:.1f} MB of weights a full pass, "
        f"so at most {ceiling:.0f} tokens/s by greedy decoding; of that: {reached}"
    )
    passes = {n: 1e3 * seconds for n, seconds in limit["pass_seconds"].items()}
    layers, head = 1e3 * limit["layers"] * limit["layer_seconds"], 1e3 * limit["head_seconds"]
    wider = ", ".join(f"{n}: {ms / passes['1']:.2f}x" for n, ms in passes.items() if n != "1")
    print(
        f"a full pass over one position takes {passes['1']:.2f} ms; alone, its layers take "
        f"{layers:.2f} ms and its head {head:.2f} ms; over more positions, {wider}"
    )


def print_tuning(chosen: dict[str, dict]) -> None:
    """The ladders that tuning ran, with the speed-ups over greedy that it had predicted."""
    rows = [["tuning", "ladder", "predicted", "measured"]]
    for name, best in chosen.items():
        rows += [
            [name, ladder_text(r), f"{r['predicted']:.2f}x", f"{r['measured']:.2f}x"]
            for r in best["ran"]
        ]
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
    """Where each text that is not greedy's first differs, and the two best logits there."""
    for m, method in enumerate(methods):
        for request, generation in zip(requests, generations[m], strict=True):
            if generation.tokens == request.greedy:
                continue
            pairs = zip(generation.tokens, request.greedy, strict=False)
            shorter = min(len(generation.tokens), len(request.greedy))
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
            text = request.prompt + request.greedy[:at]
            ids = torch.tensor([text], device=model.embed.weight.device)
            best, second = model(ids)[0, -1].topk(2).values.tolist()
            where = f"{method.name} differs ({request.category}) from token {at}"
            print(f"{where}: logits {best:.6g} and {second:.6g}")
