from itertools import combinations, combinations_with_replacement

import pytest
from recordings import as_trace, recorded


@pytest.mark.parametrize("levels", [1, 2])
def test_no_ladder_is_faster(work, levels):
    found = recorded()
    rest = [as_trace(one) for one in found["traces"][:3]], found["costs"], found["n_layers"]
    exits, windows, thresholds = ladder = work.fastest(levels, *rest)
    assert len(exits) == len(windows) == levels and not any(thresholds)
    every = [
        work.seconds((e, w, thresholds), *rest)
        for e in combinations(work.EXITS, levels)
        for w in combinations_with_replacement(work.WINDOWS, levels)
    ]
    assert work.seconds(ladder, *rest) == pytest.approx(min(every))
