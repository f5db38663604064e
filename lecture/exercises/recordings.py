"""What exercises 6 and 7 replay: the costs and texts that record.py wrote to recorded.json.

lab/costs.py adds up the time that a ladder would take along such a text.
"""

import json

from common import HERE

from lab.costs import Costs, Trace


def recorded() -> dict:
    """Return what record.py wrote, with depths as integers."""
    found = json.loads((HERE / "recorded.json").read_text("utf-8"))
    for trace in found["traces"]:
        trace["by_depth"] = {int(depth): x for depth, x in trace["by_depth"].items()}
    costs = found["costs"]
    trunk, head, loop = (
        {int(depth): x for depth, x in costs[name].items()} for name in ("trunk", "head", "loop")
    )
    return found | {"costs": Costs(trunk, head, costs["doubt"], loop)}


def as_trace(one: dict, sure=lambda best, second, entropy: best) -> Trace:
    """A recorded text for `lab.costs.replay`. sure: the rule for a level's certainty."""
    by_depth = one["by_depth"]
    return Trace(
        one["prompt"],
        one["prefill"],
        {depth: x["choices"] for depth, x in by_depth.items()},
        {
            depth: [sure(*each) for each in zip(x["best"], x["second"], x["entropy"], strict=True)]
            for depth, x in by_depth.items()
        },
    )
