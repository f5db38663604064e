"""With n drafts, each right with probability a, 1 + a + ... + a^n tokens are written on average.

For HiSpec, let `reached[m]` be the probability that m tokens are gathered before or after some
round. Its sum over m < n_i is the mean number of rounds; for m >= n_i it is the probability that
the full model verifies m tokens.
"""


def written(a: float, n: int) -> float:
    return sum(a**j for j in range(n + 1))


def single_layer(a, draft, full, n) -> float:
    return (n * draft + full) / written(a, n)


def hispec(t, n_d, n_i) -> float:
    gains = {r: t.alpha ** (r - 1) * (1 - t.alpha) for r in range(1, n_d + 1)}
    gains[n_d + 1] = t.alpha**n_d
    reached = [1.0] + [0.0] * (n_i + n_d)
    for m in range(n_i):
        for gain, chance in gains.items():
            reached[m + gain] += reached[m] * chance
    rounds, ends = sum(reached[:n_i]), enumerate(reached[n_i:], n_i)
    tokens = sum(chance * written(t.beta, m) for m, chance in ends)
    return (rounds * (n_d * t.draft + t.middle) + t.full) / tokens


def best_single_layer(a, draft, full) -> int:
    return min(range(1, 25), key=lambda n: single_layer(a, draft, full, n))


def best_hispec(t) -> tuple[int, int]:
    windows = [(n_d, n_i) for n_d in range(1, 7) for n_i in range(n_d, 17)]
    return min(windows, key=lambda pair: hispec(t, *pair))
