"""Whole rounds in one launch: here called instead of captured, beside a decoder that counts steps."""

import pytest
import torch
from conftest import Case, cases, greedy, random_model
from hypothesis import assume, given, settings
from test_fast_cpu import DTYPES, KINDS, large_model, stir
from test_fast_cuda import READ, elsewhere  # noqa: F401, a fixture
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import hispec
from arguments import Options
from fast import cuda, rounds
from fast.cuda import PROMPT, WIDTH, FixedStep
from fast.rounds import ROUND, Round, RoundStep, in_steps
from hispec import Decoder, generate
from model import DraftHead

LADDERS = [((), ()), ((2,), (6,)), ((1, 3), (2, 6)), ((1, 2, 3), (1, 3, 5)), ((2,), (WIDTH + 3,))]


class Counted(Decoder):
    """The recursion of hispec.py with windows counted in steps, that goes on past the text's end.

    Sampled, it takes the uniforms that a round would take.
    """

    def __init__(self, prompt, end, *rest):
        super().__init__(prompt, end + ROUND, *rest)
        self.limit = end
        self.steps, self.most = in_steps(self.options.windows)

    def propose(self, k, want):
        if k < self.top:
            return self.one_step(k)
        if self.options.draft_head and self.length < self.limit:
            self.drafter.draft(self, 1)
        while self.length < min(self.limit, self.end):
            self.uniforms = self.step.uniforms.uniform_(generator=self.rng)
            self.one_step(k)
        del self.text[self.limit :]
        self.length = min(self.length, self.limit)

    def report(self, k, base, drafts, kept):
        super().report(k, base, drafts, min(kept, self.limit - base) if k == self.top else kept)

    def one_step(self, k):
        if self.depths[k] == 0:
            return self.draft(self.steps[0])
        base, q = self.length, None
        drafts = 1 if k and self.depths[k - 1] == 0 else self.steps[k - 1] if k else 0
        written = [self.propose(k - 1, 0) for _ in range(drafts)]
        if drafts and self.options.temperature > 0:
            q = torch.cat(written)
        logits = self.run(k, base)
        own, kept, written = self.judge(k, base, q, logits)
        self.settle(k, base, own, kept)
        return written if written is None else written[: self.length - base]

    def accept(self, k, drafts, q, p):
        if not hasattr(self, "uniforms"):  # the prompt's own token
            return super().accept(k, drafts, q, p)
        coins, own = self.take(self.most[k]), self.take(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hispec, "coin", lambda prob, rng: coins[: len(prob)] < prob)
            patch.setattr(hispec, "draw", lambda weights, rng: rounds.draw(weights, own))
            return super().accept(k, drafts, q, p)

    def choose(self, logits):
        if not hasattr(self, "uniforms") or self.options.temperature == 0:
            return super().choose(logits)
        q = self.options.distribution(logits)
        return rounds.draw(q[0], self.take(1)), q

    def take(self, n):
        taken, self.uniforms = self.uniforms.split([n, len(self.uniforms) - n])
        return taken


def both(case: Case, **options):
    """By rounds, on a cache that holds an earlier text, and by the decoder that counts steps."""
    stir(case.model)
    if case.exits[:1] == (0,):  # a look-up would need the host
        options["draft_head"] = exit = (*case.exits, case.model.config.n_layers)[1]
        case.model.draft_heads[str(exit)] = DraftHead(case.model.config).double().eval()
    step = RoundStep(case.model, len(case.prompt) + case.max_new_tokens)
    rest = options | dict(exits=case.exits, windows=case.windows, stop=case.stop, fast=step)
    generate(case.model, case.prompt[::-1], case.max_new_tokens, **rest)
    made = [
        generate(case.model, case.prompt, case.max_new_tokens, **rest, decoder=decoder)
        for decoder in (None, Counted)
    ]
    if len(made[0].tokens) > 1:  # the first is the prompt's
        assert any(isinstance(work, Round) for work in step.captured.values())
    return made


# ---- whole texts --------------------------------------------------------------------------------


@settings(max_examples=100)
@given(cases(shapes=KINDS))
def test_rounds_write_greedys_text_and_count_as_the_loop_would(case):
    out, counted = both(case)
    assert out.tokens == counted.tokens == greedy(case)
    assert out.levels == counted.levels


@settings(max_examples=60)
@given(cases(shapes=KINDS))
def test_sampled_rounds_decide_as_the_loop_does_on_the_same_random_numbers(case):
    for options in (dict(temperature=0.9), dict(temperature=2.0, top_k=3, top_p=0.8)):
        out, counted = both(case, seed=7, **options)
        assert out.tokens == counted.tokens and out.levels == counted.levels


@settings(max_examples=25)
@given(cases())
def test_what_needs_the_host_at_every_step_is_decoded_by_the_loop(case):
    """Thresholds, look-ups, watchers."""
    step = RoundStep(case.model, len(case.prompt) + case.max_new_tokens)
    watch = None if any(case.thresholds) or case.exits[:1] == (0,) else lambda event: None
    alone, out = (
        generate(case.model, case.prompt, case.max_new_tokens, **case.arguments, **options)
        for options in ({}, dict(fast=step, watch=watch))
    )
    assert out.tokens == alone.tokens and out.levels == alone.levels
    assert not any(isinstance(work, Round) for work in step.captured.values())


def test_prompts_and_windows_wider_than_a_pass():
    model = random_model(5, max_seq_len=2 * PROMPT + 64)
    for exits, windows in [((1, 3), (WIDTH + 3, 20)), ((2,), (ROUND - 1,)), ((2,), (ROUND,))]:
        for length in (WIDTH, PROMPT + 5):
            case = Case(model, ([3, 1, 4, 1, 5] * length)[:length], 40, exits, windows, ())
            step = RoundStep(model, length + 40)
            out = generate(model, case.prompt, 40, **case.arguments, fast=step)
            assert out.tokens == greedy(case)
            covered = any(isinstance(work, Round) for work in step.captured.values())
            assert covered == (windows != (ROUND,))  # that many drafts and the own token do not fit


def test_a_level_without_finite_logits_is_told():
    model = random_model(1)
    step, rest = RoundStep(model, 60), dict(exits=(1, 3), windows=(2, 4))
    expected = generate(model, [1, 2], 30).tokens
    weight = model.layers[2].mlp.down.weight
    before = weight.data.clone()

    class Spoiled(rounds.Rounds):
        def read_prompt(self):
            super().read_prompt()
            weight.data.fill_(torch.nan)

    for options in ({}, dict(temperature=0.8, seed=1)):
        with pytest.raises(ValueError, match="NaN"):
            generate(model, [1, 2], 30, **rest, **options, fast=step, decoder=Spoiled)
        weight.data.copy_(before)
        assert generate(model, [1, 2], 30, **rest, fast=step).tokens == expected


# ---- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_position_leaves_in_the_cache_has_the_same_bits_in_every_ladder(dtype):
    """By rounds, by single passes where the host decides, and one token at a time."""
    model = large_model(dtype)
    step, prompt, left = RoundStep(model, 64), [7, 8, 9] * 10, []
    for exits, windows, *thresholds in [*LADDERS[:4], ((0, 2), (3, 4), 0.0, 0.1)]:
        rest = dict(exits=exits, windows=windows, thresholds=thresholds, fast=step)
        text = [*prompt, *generate(model, prompt, 34, **rest).tokens]
        assert len(text) == 64
        held = step.cache.keys, step.cache.values  # the last token has passed no layer
        left.append((text, *(t[:4, ..., : len(text) - 1, :].clone() for t in held)))
    for text, keys, values in left[1:]:
        assert text == left[0][0]
        assert torch.equal(keys, left[0][1]) and torch.equal(values, left[0][2])


# ---- what a round does --------------------------------------------------------------------------


@settings(max_examples=25)
@given(cases())
def test_every_position_passes_each_segment_exactly_once(case):
    """Each pass begins where the segment's last one ended, or was rolled back to."""

    class Watched(Round):
        def propose(self, k):
            p = super().propose(k)
            held[: k + 1] = [min(n, int(self.length) - 1) for n in held[: k + 1]]
            return p

        def segments(self, j, stop, first):
            for i in range(j, stop):
                if int(first) < int(self.length):  # else all of it is padding
                    assert int(first) == held[i]
                    held[i] = min(int(first) + WIDTH, int(self.length))
            return super().segments(j, stop, first)

    held = [len(case.prompt)] * (len(case.exits) + 1)
    assume(0 not in case.exits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "Round", Watched)
        step = RoundStep(case.model, len(case.prompt) + case.max_new_tokens)
        rest = dict(exits=case.exits, windows=case.windows, fast=step)
        generate(case.model, case.prompt, case.max_new_tokens, **rest)


def test_windows_are_counted_in_steps():
    assert in_steps((6,)) == ([6], [0, 6])
    assert in_steps((2, 4)) == ([2, 2], [0, 2, 6])  # two steps that write three tokens at most
    assert in_steps((3, 1, 20)) == ([3, 1, 7], [0, 3, 4, 35])


def test_a_captured_round_may_have_been_run_before_it_is_launched(monkeypatch):
    """A capture runs its work three times to warm up: nothing of that may be left."""

    def capture(self, work):
        for _ in range(3):
            work()
        return work

    monkeypatch.setattr(FixedStep, "capture", capture)
    for exits, windows in [*LADDERS, ((2,), (ROUND - 1,))]:
        case = Case(random_model(3), [1, 2, 3], 61, exits, windows, ())
        step = RoundStep(case.model, 64)
        step.pool = "pool"
        out = generate(case.model, case.prompt, 61, **case.arguments, fast=step)
        alone = generate(case.model, case.prompt, 61, fast=RoundStep(case.model, 64))
        assert out.tokens == alone.tokens == greedy(case)
        assert out.levels[-1].calls <= alone.levels[-1].calls


@pytest.mark.parametrize("options", [{}, dict(temperature=0.8, top_k=3, top_p=0.9)], ids=str)
@pytest.mark.parametrize("exits, head", [((), 0), ((2,), 0), ((1, 2), 0), ((0, 2), 2)])
def test_a_round_reads_nothing_and_stays_on_its_device(elsewhere, options, exits, head):  # noqa: F811
    if head:
        with torch.device("meta"):
            elsewhere.draft_heads["2"] = DraftHead(elsewhere.config)
    step = RoundStep(elsewhere, 40)
    with step.open(exits, 40, head):
        round = Round(step, Options(exits, (3, 4)[: len(exits)], draft_head=head, **options))
        round()
        assert step.report.device.type == "meta"

        class Planted(Round):
            def run(self, k, base):
                return super().run(k, base)[: int(base)]

        with pytest.raises(Exception, match=READ):
            Planted(step, round.options)()


class Launched(TorchDispatchMode):
    """Counts the operations that a device would be sent one by one."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        views = any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns)
        self.count += not views and "empty" not in op.name()
        return op(*args, **(kwargs or {}))


class Read(TorchFunctionMode):
    """Counts how often the host waits for a number."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.Tensor.item, torch.Tensor.tolist)
        return function(*args, **(kwargs or {}))


def counted(kind, n: int, monkeypatch, **options) -> list[int]:
    """Full verifications, graphs launched, other operations and host reads of n new tokens."""

    def capture(self, work):
        def replay():
            graphs.append(work)
            with _disable_current_modes():
                work()

        return replay

    for step in (FixedStep, RoundStep):
        monkeypatch.setattr(step, "capture", capture)
    step, graphs = kind(random_model(3), 64), []
    step.pool = "pool"
    with Launched() as launched, Read() as read:
        out = generate(step.model, [1, 2, 3], n, fast=step, **options)
    return [out.levels[-1].calls, len(graphs), launched.count, read.count]


@pytest.mark.parametrize("drawn", [{}, dict(temperature=0.8, seed=1)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("exits, windows", [((), ()), ((2,), (6,)), ((1, 3), (2, 4))])
def test_a_round_is_one_launch_and_one_read(monkeypatch, exits, windows, drawn):
    rest = dict(exits=exits, windows=windows, **drawn)
    for kind in (RoundStep, FixedStep):
        with_prompt, prompt = (counted(kind, n, monkeypatch, **rest) for n in (40, 1))
        verified, *numbers = (a - b for a, b in zip(with_prompt, prompt))
        if kind is RoundStep:
            assert numbers == [verified, bool(drawn) * verified, verified]  # and uniforms are drawn
        else:  # as it is without: each pass, each decision
            assert numbers[0] >= 2 * verified and numbers[1] > 10 * verified


# ---- block verification with masks --------------------------------------------------------------


def test_masked_block_verification_is_the_plain_rule_on_the_drafts_that_are_there(monkeypatch):
    rng = torch.Generator().manual_seed(1)
    kept_of = [0] * 6
    for _ in range(500):
        N, V = int(torch.randint(1, 6, (), generator=rng)), 4
        n = int(torch.randint(0, N + 1, (), generator=rng))
        sharp = torch.randint(1, 4, (), generator=rng)
        q, p = (torch.rand(rows, V, dtype=torch.float64, generator=rng) ** sharp
                for rows in (N, N + 1))  # fmt: skip
        p = torch.where(torch.rand(p.shape, generator=rng) < 0.2, 0, p) + 1e-300
        q, p = q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)
        if torch.rand((), generator=rng) < 0.3:
            q = p[:-1]  # a level that agrees
        drafts = q.multinomial(1, generator=rng)[:, 0]
        u = torch.rand(N + 1, dtype=torch.float64, generator=rng)
        monkeypatch.setattr(hispec, "coin", lambda prob, rng, u=u: u[: len(prob)] < prob)
        monkeypatch.setattr(hispec, "draw", lambda w, rng, u=u: rounds.draw(w, u[-1:]))
        own, kept, _ = hispec.accept_block(drafts[:n], q[:n], p[: n + 1], rng)
        mine = rounds.accept_block(drafts, q, p, torch.tensor([n]), u)
        assert (int(mine[0]), int(mine[1])) == (int(own), int(kept))
        kept_of[int(kept)] += 1
    assert all(kept_of)


def test_a_token_is_drawn_in_proportion_to_its_weight():
    weights, u = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0]).double(), (torch.arange(1000) + 0.5) / 1000
    drawn = torch.cat([rounds.draw(weights, one[None]) for one in u.double()])
    assert drawn.bincount(minlength=5).tolist() == [0, 250, 0, 750, 0]
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert [int(rounds.draw(weights, one[None])) for one in ends] == [1, 3]


# ---- planted bugs -------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", ["a mask one off", "a draft that is not there", "one position"])
def test_a_planted_bug_is_caught(monkeypatch, planted):
    leading, segments = rounds.leading, Round.segments
    if planted == "a mask one off":
        monkeypatch.setattr(cuda, "mask", lambda at, *rest, real=cuda.mask: real(at + 1, *rest))
    elif planted == "a draft that is not there":
        monkeypatch.setattr(
            rounds, "leading", lambda same: (leading(same) + 1).clamp(max=len(same))
        )
    else:
        monkeypatch.setattr(
            Round, "segments", lambda self, j, stop, at: segments(self, j, stop, at + (j > 0))
        )
    found = []
    for seed in range(5):
        case = Case(random_model(seed), [1, 2, 3], 20, (1, 3), (2, 4), ())
        step = RoundStep(case.model, 23)
        out = generate(case.model, case.prompt, 20, **case.arguments, fast=step)
        found.append(out.tokens != greedy(case))
    assert any(found)
