"""Exercise 7, twenty minutes: move the exits.

python lecture/exercises/07_exits.py

The paper puts its exits at 1/8 and 1/4 of the depth: exits 4 and 8 of 32 layers. `tiny` was trained
with exits 2 and 8, but every layer can be read. recorded.json holds the choices of seven of them
along six texts, and what they cost. By replay, find the fastest ladder of one exit and of two.
Which exits are worth using, and by how much do they beat the paper's? Which would be on a machine
where a pass costs only its layers, however many positions it holds?
"""

from recordings import as_trace, recorded

from checkpoints.ladders import Ladder
from lab.costs import Costs, Trace, replay

EXITS = (1, 2, 3, 4, 6, 8, 12)
WINDOWS = (1, 2, 3, 4, 6, 8, 12)
GREEDY: Ladder = ((), (), ())


def seconds(ladder: Ladder, traces: list[Trace], costs: Costs, n_layers: int) -> float:
    """The time that the ladder takes for all the texts."""
    return sum(t.prefill + replay(t, ladder, costs, n_layers) for t in traces)


def fastest(levels: int, traces: list[Trace], costs: Costs, n_layers: int) -> Ladder:
    """The fastest ladder of one or two exits, from EXITS and WINDOWS, with thresholds 0.

    A deeper exit's window is at least as large as a shallower one's.
    """
    exits, windows = ((4, 8), (2, 4)) if levels == 2 else ((4,), (4,))
    return exits, windows, (0.0,) * levels  # your turn: these are the paper's


def by_layers(costs: Costs) -> Costs:
    """Costs of a millisecond per layer, for any number of positions; heads and loop are free."""
    widths = len(next(iter(costs.head.values())))
    trunk = {e: [0.0, *[1e-3 * e] * (widths - 1)] for e in costs.trunk}
    free = {e: [0.0] * widths for e in costs.head}
    return Costs(trunk, free, 0.0, dict.fromkeys(free, 0.0))


def main() -> None:
    found = recorded()
    traces = [as_trace(one) for one in found["traces"]]
    for name, costs in (
        ("as measured", found["costs"]),
        ("by layers", by_layers(found["costs"])),
    ):
        greedy = seconds(GREEDY, traces, costs, found["n_layers"])
        for levels in (1, 2):
            ladder = fastest(levels, traces, costs, found["n_layers"])
            gain = greedy / seconds(ladder, traces, costs, found["n_layers"])
            print(f"{name}, exits {ladder[0]}, windows {ladder[1]}: {gain:.2f}x greedy")


if __name__ == "__main__":
    main()
