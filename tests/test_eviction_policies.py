"""Each rule of forgetting: what leaves when, how much it can hold, and that training follows a rollout by it
token by token, whatever it is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch

from mem1_core.eviction import EvictionError, EvictionTable, evict_from_segments, eviction_table
from mem1_core.eviction_policies import (
    RULES,
    Compact,
    EvictionPolicy,
    Fold,
    HideObservations,
    LastTurns,
    Recorded,
    Truncate,
    policy_name,
    resolve_policy,
    short_form,
)
from mem1_core.layout import TrajectoryLayout
from mem1_core.plot import plot_mask
from mem1_core.segments import Segment, by_policy, is_action


def forget_reasoning(segments: Sequence[Segment]) -> list[bool]:
    """A user's own: a state leaves as soon as the environment has answered its action."""
    answered = max((s.turn for s in segments if s.kind == "info"), default=0)
    return [s.kind != "state" or s.turn > answered for s in segments]


class HidesMore(HideObservations):
    def __call__(self, segments: Sequence[Segment]) -> Sequence[bool]:
        return [s.kind != "info" for s in segments]


POLICIES: list[EvictionPolicy] = [
    *("action", "state", "never", "last_turns=2", "last_turns=3", 9, 20),
    *(
        "compact=9",
        "compact=20",
        "hide_observations=1",
        "hide_observations=2",
        "fold",
        "summary",
        forget_reasoning,
    ),
]


def turns(*kinds: str, state: int = 2, action: int = 1, info: int = 3, prompt: int = 4) -> list[Segment]:
    segments = [Segment("prompt", 0, prompt)]
    for turn, kind in enumerate(kinds, start=1):
        segments += [Segment("state", turn, state), Segment(kind, turn, action), Segment("info", turn, info)]
    return segments


def random_trajectory(seed: int) -> list[Segment]:
    """Up to 9 turns of all kinds of actions, some segments empty or missing."""
    rng = random.Random(seed)
    segments, count = [Segment("prompt", 0, rng.randint(1, 5))], rng.randint(1, 9)
    for turn in range(1, count + 1):
        if rng.random() < 0.8:
            segments.append(Segment("state", turn, rng.choice((0, 1, 2, 4))))
        if rng.random() < 0.9:
            kind = rng.choice(("query", "query", "branch", "return", "summary", "answer"))
            segments.append(Segment(kind, turn, rng.choice((0, 1, 3))))
        if turn < count or segments[-1].turn != turn:
            segments.append(Segment("info", turn, rng.choice((0, 1, 5))))
    return segments


def shown(segments: Sequence[Segment], n: int) -> list[Segment]:
    """What a rule gets to see after segment n: segments with tokens, every turn with an action."""
    seen: list[Segment] = []
    for segment, following in zip(segments[: n + 1], [*segments[1 : n + 1], None], strict=True):
        if segment.length:
            seen.append(segment)
        state = bool(seen) and (seen[-1].kind, seen[-1].turn) == ("state", segment.turn)
        if state and is_action(segment.kind) and not segment.length:
            seen.append(segment)
        elif state and following and (following.turn != segment.turn or following.kind == "info"):
            seen.append(Segment("query", segment.turn, 0))
    return seen


Context = list[tuple[int, int]]  # (token of the trajectory, its position), as it was fed


def play(segments: list[Segment], prune: EvictionPolicy, reencode: bool) -> dict[int, Context]:
    """A rollout, token by token: what each policy token was sampled from."""
    rule, sampled = resolve_policy(prune), dict[int, Context]()
    context: Context = []
    owner: list[tuple[str, int]] = []  # kind and turn of each token written
    logits_of: Context = []
    position = 0

    def forget(seen: list[Segment]) -> None:
        nonlocal context, logits_of, position
        hidden = {(s.kind, s.turn) for s, stays in zip(seen, rule(tuple(seen)), strict=True) if not stays}
        left = [entry for entry in context if owner[entry[0]] not in hidden]
        if len(left) < len(context):
            context = left
            if reencode:
                context = [(token, place) for place, (token, _) in enumerate(context)]
                position, logits_of = len(context), list(context)

    for n, segment in enumerate(segments):
        following = segments[n + 1] if n + 1 < len(segments) else None
        for _ in range(segment.length):
            if by_policy(segment.kind):
                sampled[len(owner)] = list(logits_of)
            context.append((len(owner), position))
            owner.append((segment.kind, segment.turn))
            position += 1
            logits_of = list(context)
        seen = shown(segments, n)
        if segment.length or (seen and not seen[-1].length):
            forget(seen)
        if segment.kind == "state" and segment.length and following and following.turn != segment.turn:
            forget([*seen, Segment("query", segment.turn, 0)])
        if segment.kind == "state" and segment.length and following and following.kind == "info":
            forget([*seen, Segment("query", segment.turn, 0)])
    return sampled


def sees(layout: TrajectoryLayout, row: int) -> Context:
    rows = layout.mask.dense()[0, row].nonzero()[:, 0]
    return list(zip(layout.token_index[rows].tolist(), layout.position_ids[rows].tolist(), strict=True))


@pytest.mark.parametrize("prune", POLICIES, ids=policy_name)
@pytest.mark.parametrize("regime", ["carry", "reencode"])
def test_layouts_are_what_a_rollout_by_the_rule_saw(prune: EvictionPolicy, regime: str) -> None:
    for seed in range(60):
        segments = random_trajectory(seed)
        layout = TrajectoryLayout.from_segments(segments, regime=regime, prune=prune)  # type: ignore[arg-type]
        sampled = play(segments, prune, regime == "reencode")
        assert layout.targets.tolist() == list(sampled)
        for row, target in zip(layout.logit_rows.tolist(), layout.targets.tolist(), strict=True):
            assert sees(layout, row) == sampled[target], (seed, target)


def test_what_leaves_when_by_hand() -> None:
    # Prompt 4 tokens; a turn has 2 + 1 + 3. Actions end at 7, 13, 19, 25, 31, states at 6, 12, 18, ...
    plain = turns("query", "query", "query", "query")

    def ends(prune: EvictionPolicy, segments: list[Segment] = plain) -> list[int | None]:
        return eviction_table(segments, prune).lifetimes

    stay = [None] * 3
    assert ends("action") == [None, *[13] * 3, *[19] * 3, *[25] * 3, *stay]
    assert ends("state") == [None, *[12] * 3, *[18] * 3, *[24] * 3, *stay]
    assert ends("never") == [None] * 13
    assert ends("last_turns=2") == [None, *[19] * 3, *[25] * 3, *stay, *stay]
    assert ends("hide_observations=1") == [
        *[None] * 3, 13, *[None] * 2, 19, *[None] * 2, 25, *stay
    ]  # fmt: skip
    assert ends("hide_observations=2") == [*[None] * 3, 19, *[None] * 2, 25, *stay, *stay]
    # At the third action turns 1 to 3 have 6 + 6 + 3 tokens, turns 2 and 3 have 9.
    assert ends(9) == [None, *[19] * 3, *[25] * 3, *stay, *stay]
    assert ends(15) == [None, *[25] * 3, *stay, *stay, *stay]
    assert ends("summary", turns("query", "summary", "query")) == [
        *[None], *[13] * 4, *[None] * 2, *stay
    ]  # fmt: skip
    folded = turns("query", "branch", "query", "return", "query")
    assert ends("fold", folded) == [*[None] * 6, *[25] * 5, *[None] * 2, *stay]
    nested = turns("branch", "branch", "query", "return", "return")
    assert ends("fold", nested) == [
        *[None] * 3, *[31] * 3, *[25] * 5, *[31] * 3, None, None
    ]  # fmt: skip
    assert ends("fold", turns("return", "query")) == [None] * 7
    assert ends(forget_reasoning) == [None, 10, None, None, 16, None, None, 22, None, None, 28, None, None]


def test_a_turn_that_is_a_state_alone_is_complete_where_the_environment_speaks() -> None:
    segments = [
        Segment("prompt", 0, 1), Segment("query", 1, 2), Segment("info", 1, 1), Segment("state", 2, 3),
        Segment("info", 2, 2), Segment("query", 3, 1),
    ]  # fmt: skip
    written = [*segments[:4], Segment("query", 2, 0), *segments[4:]]
    for prune in POLICIES:
        evict = evict_from_segments(segments, prune)
        assert torch.equal(evict, evict_from_segments(written, prune))
    assert evict_from_segments(segments).tolist() == [10, 7, 7, 7, *[10] * 6]


@pytest.mark.parametrize("prune", POLICIES, ids=policy_name)
def test_a_table_that_grows_is_the_table_of_all(prune: EvictionPolicy) -> None:
    for seed in range(40):
        segments = random_trajectory(seed)
        whole = evict_from_segments(segments, prune).tolist()
        for n in range(len(segments)):
            if segments[n].kind == "state" and n + 1 < len(segments):
                continue  # whether its turn is over, the next segment says
            until = sum(segment.length for segment in segments[: n + 1])
            table = EvictionTable(prune)
            for segment in eviction_table(segments[: n + 1], prune).segments:
                table.add(segment)
            assert table.tokens == until
            assert table.evict().tolist() == [min(end, until) for end in whole[:until]], (seed, n)
            assert table.alive().sum() == sum(
                end is None and s.length for end, s in zip(table.lifetimes, table.segments, strict=True)
            )


@pytest.mark.parametrize("prune", [p for p in POLICIES if not callable(p)])
def test_no_trajectory_has_more_tokens_alive_than_the_formula_says(prune: EvictionPolicy) -> None:
    """And one whose segments are as long as they may be has as many."""
    rule = resolve_policy(prune)
    for count in range(1, 9):
        for state, action, info in ((2, 1, 3), (3, 4, 1), (1, 1, 9)):
            segments = turns(*["query"] * count, state=state, action=action, info=info)[:-1]
            formula = rule.peak_tokens(4, state + action, info, count)  # type: ignore[attr-defined]
            peak = int(TrajectoryLayout.from_segments(segments, prune=prune).mask.peak_tokens())
            assert peak <= formula
            if not isinstance(rule, (Truncate, Compact)) and str(rule) != "state":
                assert peak == formula, (count, state, action, info)
            if str(rule) == "state" and count > 1:  # what it writes after the state is written alone
                assert peak == 4 + max(2 * state + action + info, state + action + info)


def test_bounds_of_the_truncating_agent_are_reached() -> None:
    segments = turns(*["query"] * 6, state=2, action=2, info=4)[:-1]
    assert Truncate(12).peak_tokens(4, 4, 4, 6) == 4 + 12 + 4 + 4
    peak = TrajectoryLayout.from_segments(segments, prune=12).mask.peak_tokens()
    assert peak.tolist() == [4 + 12 + 4 + 4]
    # Full with the second action, which stays; the third finds that and the info between.
    peak = TrajectoryLayout.from_segments(segments, prune="compact=12").mask.peak_tokens()
    assert Compact(12).peak_tokens(4, 4, 4, 6) == 4 + 12 + 4 + 4 and peak.tolist() == [4 + 12 + 4 + 4]


def test_a_compact_context_keeps_all_until_it_is_full() -> None:
    segments = turns(*["query"] * 5, state=2, action=2, info=4)[:-1]
    evict = evict_from_segments(segments, "compact=12")
    ends = [4 + 8 * turn + 4 for turn in range(5)]  # of the actions
    starts = [4 + 8 * turn for turn in range(5)]
    # 4 tokens, 12, 20: the third action drives out the first two turns; then 4 again, with its info 12, 20.
    assert evict[starts[0]] == evict[starts[1]] == ends[2] and evict[starts[2]] == ends[4]
    assert evict[starts[4]] == sum(s.length for s in segments)


def test_short_forms_and_what_is_recorded() -> None:
    for rule in RULES:
        made = rule(3) if fields(rule) else rule()  # type: ignore[call-arg]
        assert resolve_policy(str(made)) == made
    assert str(LastTurns(1)) == "action" and resolve_policy("last_turns=1") == LastTurns(1)
    assert resolve_policy(7) == Truncate(7) and policy_name(7) == "truncate=7"
    assert policy_name(forget_reasoning) == f"{__name__}:forget_reasoning" and policy_name("fold") == str(
        Fold()
    )
    assert policy_name(partial(forget_reasoning, 3, k="a")) == f"{__name__}:forget_reasoning(3, k='a')"
    assert short_form(HideObservations(2)) == "hide_observations=2" and short_form(7) == 7
    assert short_form(HidesMore(2)) is None and policy_name(HidesMore(2)) == f"{__name__}:HidesMore"
    with pytest.raises(ValueError, match="prune: expected 'action', .* got <class .*Fold'>"):
        resolve_policy(Fold)  # type: ignore[arg-type]
    for wrong in (0, -1, True, 1.5, "2"):
        with pytest.raises(ValueError, match=f"turns: expected an integer >= 1, got {wrong!r}"):
            HideObservations(wrong)  # type: ignore[arg-type]
    for prune in POLICIES:
        for seed in range(20):
            segments = random_trajectory(seed)
            table = eviction_table(segments, prune)
            recorded = table.recorded()
            assert isinstance(recorded, Recorded) and str(recorded) == policy_name(prune)
            assert torch.equal(evict_from_segments(segments, recorded), table.evict())
            for regime in ("carry", "reencode"):
                mine, theirs = (
                    TrajectoryLayout.from_segments(segments, regime=regime, prune=p)  # type: ignore[arg-type]
                    for p in (recorded, prune)
                )
                assert torch.equal(mine.mask.evict_at, theirs.mask.evict_at)


def test_a_rule_that_goes_wrong_is_named_with_token_and_turn() -> None:
    def brings_back(segments: Sequence[Segment]) -> list[bool]:
        return [s.kind != "info" or len(segments) % 2 == 1 for s in segments]

    with pytest.raises(
        ValueError,
        match=r"expected what has left to stay away, but .*brings_back brings back token 7 "
        r"\(info of turn 1\) at token 12",
    ):
        evict_from_segments(turns("query", "query"), brings_back)
    with pytest.raises(
        ValueError, match=r"expected the prompt to stay, but .*<lambda> drops token 0 \(prompt of turn 0\) at"
    ):
        evict_from_segments(turns("query"), lambda segments: [False] * len(segments))
    for answer, shown in (([], r"\[\]"), (None, "None"), (3, "3"), (torch.ones(1, 2), "tensor")):
        what = rf"expected of .*<lambda> a flag for each of 1 segments, got {shown}.* at token 4, in turn 0"
        with pytest.raises(EvictionError, match=what):
            evict_from_segments(turns("query"), lambda segments, answer=answer: answer)  # type: ignore[misc]
    wanted = evict_from_segments(turns("query", "query"), forget_reasoning)
    for kind in (torch.tensor, np.array, tuple, iter):  # flags are flags
        given = evict_from_segments(turns("query", "query"), lambda s, kind=kind: kind(forget_reasoning(s)))  # type: ignore[misc]
        assert torch.equal(given, wanted)


def test_folding_shares_what_stands_before_the_branch() -> None:
    """Re-encoding copies what stands behind the first token that left, no more."""
    segments = turns(*["query"] * 5, "branch", "query", "query", "return", "query", "answer")[:-1]
    tokens = sum(segment.length for segment in segments)
    layout = TrajectoryLayout.from_segments(segments, regime="reencode", prune="fold")
    assert layout.mask.shape[1] == tokens + 1, "a copy of the return"
    # One row per turn, as other trainers have it: each with the context it was written from.
    per_turn = sum(
        len(play(segments, "fold", reencode=True)[end - 1]) + 1 for end in ends_of_actions(segments)
    )
    assert per_turn > 4 * tokens


def ends_of_actions(segments: list[Segment]) -> list[int]:
    ends, total = [], 0
    for segment in segments:
        total += segment.length
        if is_action(segment.kind):
            ends.append(total)
    return ends


@pytest.mark.parametrize("prune", POLICIES, ids=policy_name)
def test_the_picture_of_each_rule(prune: EvictionPolicy) -> None:
    pytest.importorskip("matplotlib")
    kinds = ("query", "branch", "query", "return", "summary", "query", "answer")
    layout = TrajectoryLayout.from_segments(turns(*kinds), prune=prune)
    figure = plot_mask(layout.mask, title=policy_name(prune))
    legend = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert {"prompt", "<IS>", "<branch>", "<return>", "<summary>", "<info>", "evicted"} <= legend
    assert ("prune event" in legend) == (prune != "never")
