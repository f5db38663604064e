"""How far drafts get: what every level keeps of them, by the position in the draft.

Counted from what `watch` is told. Knows nothing of time: a generation that is watched is slower.
"""

from collections.abc import Callable

from arguments import Event
from lab.agreement import ratio
from lab.prompts import Request


def draft_acceptance(
    decode: Callable, levels: int, requests: list[Request], max_new_tokens: int, stop
) -> dict:
    """What became of the drafts of all levels below the last, decoding every request once more.

    acceptance_by_position[k][i]: the share of level k's drafts with an i-th token whose i-th token
    was kept, from 0 on. A token behind a rejected one is not. accepted_length[k]: tokens kept a
    verification.
    """
    generations: list[list[Event]] = [[] for _ in requests]
    for request, events in zip(requests, generations, strict=True):
        decode(request.prompt, max_new_tokens, stop=stop, watch=events.append)
    return count_kept(generations, levels)


def count_kept(generations: list[list[Event]], levels: int) -> dict:
    """The same for the events of these generations with so many levels."""
    steps = [event for events in generations for event in events[1:]]  # the first reads the prompt
    by_position, lengths = [], []
    for k in range(1, levels):
        checks = [e for e in steps if e.level == k]
        widest = max((len(e.drafts) for e in checks), default=0)
        by_position.append(
            [
                ratio(sum(e.kept > i for e in checks), sum(len(e.drafts) > i for e in checks))
                for i in range(widest)
            ]
        )
        lengths.append(ratio(sum(e.kept for e in checks), len(checks)))
    return {"acceptance_by_position": by_position, "accepted_length": lengths}
