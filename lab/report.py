"""What the bench found, as tables and lines on the terminal. Nothing is timed here."""

import torch


def print_tables(results: list[dict]) -> None:
    def percent(values) -> str:
        return " ".join("–" if value is None else f"{value:.0%}" for value in values) or "–"

    def number(value) -> str:
        return "–" if value is None else f"{value:.2f}"

    columns = {
        "method": lambda r: r["name"],
        "ladder": lambda r: ladder_text(r) or "–",
        "tokens/s": lambda r: f"{r['tokens_per_second']:.1f}",
        "x greedy": lambda r: number(r["speedup_vs_greedy"]),
        "x single": lambda r: number(r["speedup_vs_single_layer"]),
        "tokens/pass": lambda r: number(r["tokens_per_target_pass"]),
        "accepted": lambda r: percent(r["acceptance"]),
        "time": lambda r: percent(r.get("time_share", [])),
        "loop": lambda r: percent([r.get("time_share_loop")]),
        "identical": lambda r: f"{r['identical']}/{r['prompts']}",
    }
    print_table([[*columns], *([cell(r) for cell in columns.values()] for r in results)])
    print("\nladder: exit(window), stopping below a probability where one is given.")
    print("accepted, time: by level, shallow to deep. loop: time outside model steps.\n")

    rows = [["tokens/s, x greedy", *(r["name"] for r in results)]]
    for category in results[0]["by_category"]:
        cells = [r["by_category"][category] for r in results]
        speeds = [f"{c['tokens_per_second']:.1f}  {c['speedup_vs_greedy']:.2f}x" for c in cells]
        rows.append([category, *speeds])
    print_table(rows)
    for r in results:
        if "agreement" in r:
            said = ", ".join(f"{pair} {value:.0%}" for pair, value in r["agreement"].items())
            if "false_rejects" in r:
                said += f"; false rejects {percent([r['false_rejects']])}"
            print(f"\n{r['name']}: levels agree on {said}")


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
