"""The training layouts against a rollout that is simulated token by token."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from mem1_core.eviction_policies import EvictionPolicy
from mem1_core.layout import Regime, TrajectoryLayout
from mem1_core.segments import Segment, by_policy

Context = list[tuple[int, int]]  # (token of the trajectory, position), in the order they were fed

PRUNES: tuple[EvictionPolicy, ...] = ("action", "state", "never", 6, 12)


def random_segments(seed: int) -> list[Segment]:
    """1 to 6 turns of random lengths, some segments empty or missing."""
    rng = random.Random(seed)
    segments = [Segment("prompt", 0, rng.randint(1, 5))]
    turns = rng.randint(1, 6)
    for turn in range(1, turns + 1):
        if rng.random() < 0.85:
            segments.append(Segment("state", turn, rng.choice((0, 1, 2, 4))))
        if rng.random() < 0.9:
            kind = "answer" if turn == turns and rng.random() < 0.5 else "query"
            segments.append(Segment(kind, turn, rng.choice((0, 1, 3))))  # type: ignore[arg-type]
        if turn < turns or rng.random() < 0.5 or segments[-1].turn != turn:
            segments.append(Segment("info", turn, rng.choice((0, 1, 5))))
    return segments


def written(segments: list[Segment]) -> Iterator[tuple[int, str, int, bool, bool]]:
    """(token, kind, turn, `state` ends here, action ends here), one token after another."""
    token = 0
    for n, segment in enumerate(segments):
        mine = [s for s in segments if s.turn == segment.turn and by_policy(s.kind) and s.length]
        for left in reversed(range(segment.length)):
            action = by_policy(segment.kind) and left == 0
            yield (
                token,
                segment.kind,
                segment.turn,
                action and segment is mine[0],
                action and segment is mine[-1],
            )
            token += 1
        assert n == 0 or segment.kind != "prompt"


def simulate(
    segments: list[Segment], prune: EvictionPolicy, reencode: bool
) -> tuple[dict[int, Context], list[Context]]:
    """Play the rollout: what each policy token was sampled from, what each token saw when fed.

    A rollout that carries its cache samples from the logits of the last token fed, which came before the
    prune; one that re-encodes prunes first and samples from the logits of what it encoded anew.
    """
    sampled: dict[int, Context] = {}
    saw: list[Context] = []
    context: Context = []
    turns: list[int] = []  # of the tokens in context
    logits_of: Context = []
    position = 0
    for token, kind, turn, is_ends, action_ends in written(segments):
        if by_policy(kind):
            sampled[token] = list(logits_of)
        context.append((token, position))
        turns.append(turn)
        position += 1
        logits_of = list(context)
        saw.append(list(context))
        if is_ends if prune == "state" else action_ends and prune != "never":
            stay = [of for of in turns if of]
            while stay[0] != turn and (not isinstance(prune, int) or len(stay) > prune):
                stay = [of for of in stay if of != stay[0]]  # the oldest turn leaves
            alive = [n for n, of in enumerate(turns) if of in (0, *stay)]
            context, turns = [context[n] for n in alive], [turns[n] for n in alive]
            if reencode:
                context = [(of, place) for place, (of, _) in enumerate(context)]
                position = len(context)
                logits_of = list(context)
    return sampled, saw


def row_sees(layout: TrajectoryLayout, row: int) -> Context:
    rows = layout.mask.dense()[0, row].nonzero()[:, 0]
    return list(zip(layout.token_index[rows].tolist(), layout.position_ids[rows].tolist(), strict=True))


def test_the_simulation_itself() -> None:
    segments = [
        Segment("prompt", 0, 1), Segment("state", 1, 1), Segment("query", 1, 1), Segment("info", 1, 1),
        Segment("state", 2, 1), Segment("query", 2, 1), Segment("info", 2, 1), Segment("state", 3, 1),
    ]  # fmt: skip
    carried, _ = simulate(segments, "action", reencode=False)
    assert carried[5] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]
    assert carried[7] == [(0, 0), (4, 4), (5, 5), (6, 6)]
    anew, _ = simulate(segments, "action", reencode=True)
    assert anew[5] == carried[5] and anew[7] == [(0, 0), (4, 1), (5, 2), (6, 3)]
    at_is, _ = simulate(segments, "state", reencode=False)
    assert at_is[5] == carried[5], "the logits of </IS> came before the prune"
    assert simulate(segments, "state", reencode=True)[0][5] == [(0, 0), (4, 1)]
    assert simulate(segments, 4, reencode=True)[0][7] == anew[7], "5 tokens in turns 1 and 2"
    assert simulate(segments, 5, reencode=True) == simulate(segments, "never", reencode=True)


@pytest.mark.parametrize("prune", PRUNES)
@pytest.mark.parametrize("seed", range(40))
def test_carry_is_what_an_in_place_rollout_saw(prune: EvictionPolicy, seed: int) -> None:
    segments = random_segments(seed)
    layout = TrajectoryLayout.from_segments(segments, prune=prune)
    sampled, saw = simulate(segments, prune, reencode=False)
    assert layout.targets.tolist() == list(sampled), "one label per policy token, in order"
    for row, target in zip(layout.logit_rows.tolist(), layout.targets.tolist(), strict=True):
        assert row_sees(layout, row) == sampled[target]
    # What is carried was computed from what was visible then: every row must agree, labelled or not.
    assert [row_sees(layout, row) for row in range(len(saw))] == saw


@pytest.mark.parametrize("prune", PRUNES)
@pytest.mark.parametrize("seed", range(40))
def test_reencode_is_what_a_re_encoding_rollout_saw(prune: EvictionPolicy, seed: int) -> None:
    segments = random_segments(seed)
    layout = TrajectoryLayout.from_segments(segments, regime="reencode", prune=prune)
    sampled, _ = simulate(segments, prune, reencode=True)
    assert layout.targets.tolist() == list(sampled)
    dense = layout.mask.dense()[0]
    for row, target in zip(layout.logit_rows.tolist(), layout.targets.tolist(), strict=True):
        assert row_sees(layout, row) == sampled[target]
        # The context was encoded in one pass: each of its rows sees those before it.
        rows = dense[row].nonzero()[:, 0]
        assert torch.equal(dense[rows][:, rows], torch.ones(len(rows), len(rows)).tril().bool())
        assert (dense[rows].sum(1) == torch.arange(1, len(rows) + 1)).all()


@pytest.mark.parametrize(("prune", "first"), [("action", 3), ("state", 2), (11, 4), (18, 5)])
def test_paper_is_wrong_from_some_turn_on(prune: EvictionPolicy, first: int) -> None:
    segments = [Segment("prompt", 0, 3)]
    for turn in range(1, 6):
        segments += [Segment("state", turn, 2), Segment("query", turn, 2), Segment("info", turn, 3)]
    turn_of = torch.tensor([s.turn for s in segments]).repeat_interleave(
        torch.tensor([s.length for s in segments])
    )
    sampled, _ = simulate(segments, prune, reencode=True)
    wrong: dict[Regime, set[int]] = {}
    for regime in ("paper", "reencode"):
        layout = TrajectoryLayout.from_segments(segments, regime=regime, prune=prune)
        wrong[regime] = {
            int(turn_of[target])
            for row, target in zip(layout.logit_rows.tolist(), layout.targets.tolist(), strict=True)
            if row_sees(layout, row) != sampled[target]
        }
    assert wrong == {"paper": set(range(first, 6)), "reencode": set()}
    carry, paper = (
        TrajectoryLayout.from_segments(segments, regime=r, prune=prune) for r in ("carry", "paper")
    )
    for name in ("token_index", "position_ids", "logit_rows", "targets"):
        assert torch.equal(getattr(carry, name), getattr(paper, name))
    assert torch.equal(carry.mask.evict_at, paper.mask.evict_at)


@pytest.mark.parametrize("regime", ["carry", "reencode"])
def test_packed_layouts_are_their_parts(regime: Regime) -> None:
    every = [random_segments(seed) for seed in range(6)]
    packed = TrajectoryLayout.pack([TrajectoryLayout.from_segments(s, regime=regime) for s in every])
    lengths = tuple(sum(segment.length for segment in segments) for segments in every)
    assert packed.lengths == lengths
    expected: dict[int, Context] = {}
    for n, segments in enumerate(every):
        sampled, _ = simulate(segments, "action", reencode=regime == "reencode")
        start = sum(lengths[:n])
        expected |= {t + start: [(of + start, place) for of, place in c] for t, c in sampled.items()}
    assert packed.targets.tolist() == list(expected)
    for row, target in zip(packed.logit_rows.tolist(), packed.targets.tolist(), strict=True):
        assert row_sees(packed, row) == expected[target]
    assert set(packed.loss_mask.nonzero()[:, 0].tolist()) == set(packed.logit_rows.tolist())


def test_packed_is_associative_and_takes_nothing() -> None:
    a, b, c = (TrajectoryLayout.from_segments(random_segments(seed), regime="reencode") for seed in range(3))
    left = TrajectoryLayout.pack([TrajectoryLayout.pack([a, b]), c])
    flat = TrajectoryLayout.pack([a, b, c])
    for name in ("token_index", "position_ids", "logit_rows", "targets"):
        assert torch.equal(getattr(left, name), getattr(flat, name))
    assert torch.equal(left.mask.evict_at, flat.mask.evict_at) and left.lengths == flat.lengths
    nothing = TrajectoryLayout.pack([])
    assert nothing.token_index.shape == (0,) and nothing.lengths == ()
    assert nothing.split_by_trajectory(torch.zeros(0)) == []


def test_per_trajectory_is_the_way_back_and_differentiable() -> None:
    layouts = [TrajectoryLayout.from_segments(random_segments(seed), regime="reencode") for seed in range(5)]
    layouts.insert(2, TrajectoryLayout.from_segments([Segment("prompt", 0, 4)]))  # no policy token at all
    packed = TrajectoryLayout.pack(layouts)
    values = torch.randn(len(packed.targets), dtype=torch.float64, requires_grad=True)
    parts = packed.split_by_trajectory(values)
    assert tuple(len(part) for part in parts) == packed.lengths
    assert torch.equal(torch.cat(parts)[packed.targets], values)
    is_policy = torch.zeros(sum(packed.lengths), dtype=torch.bool).index_fill_(0, packed.targets, True)
    assert (torch.cat(parts)[~is_policy] == 0).all()
    weights = torch.arange(sum(packed.lengths), dtype=torch.float64)
    (torch.cat(parts) * weights).sum().backward()
    assert torch.equal(values.grad, packed.targets.double())
    with pytest.raises(
        ValueError, match=r"values: expected one per policy token, shape \[\d+\], got \[3, 2\]"
    ):
        packed.split_by_trajectory(torch.zeros(3, 2))


def test_reencode_holds_as_many_tokens_as_carry() -> None:
    for seed in range(20):
        for prune in PRUNES:
            carry, again = (
                TrajectoryLayout.from_segments(random_segments(seed), regime=regime, prune=prune).mask
                for regime in ("carry", "reencode")
            )
            assert torch.equal(carry.peak_tokens(), again.peak_tokens())
            assert torch.equal(carry.peak_tokens(prompt=False), again.peak_tokens(prompt=False))
            assert sum(segment.length for segment in again.segments) == again.shape[1]


def test_layout_dtypes_and_errors() -> None:
    layout = TrajectoryLayout.from_segments(random_segments(3), regime="reencode")
    for tensor in (layout.token_index, layout.position_ids, layout.logit_rows, layout.targets):
        assert tensor.dtype == torch.int64
    assert layout.loss_mask.dtype == torch.bool and layout.loss_mask.shape == layout.token_index.shape
    moved = layout.to("cpu")
    assert torch.equal(moved.token_index, layout.token_index) and moved.mask is layout.mask
    with pytest.raises(ValueError, match="regime: expected one of .* got 'copy'"):
        TrajectoryLayout.from_segments([], regime="copy")  # type: ignore[arg-type]
    for segments in ([Segment("state", 1, 1)], [Segment("prompt", 0, 0), Segment("query", 1, 1)]):
        with pytest.raises(ValueError, match="expected a prompt of at least one token"):
            TrajectoryLayout.from_segments(segments)
    assert TrajectoryLayout.from_segments([], regime="reencode").token_index.shape == (0,)


def test_a_copy_behind_its_original_is_a_run_of_its_own() -> None:
    """Without states a block begins with the very action that the one before it has ended with."""
    segments = [Segment("prompt", 0, 3)]
    for turn in (1, 2, 3):
        segments += [Segment("query", turn, 2), Segment("info", turn, 4)]
    runs = TrajectoryLayout.from_segments(segments, regime="reencode").mask.segments
    assert [run.kind for run in runs].count("query") == 3 + 2
    assert set(runs) == set(segments)
