"""TrajectoryMask: lifetimes from turns, dense form, counts, packing, bad input."""

from __future__ import annotations

import random
import re

import pytest
import torch
from torch import Tensor

from mem1_core.eviction import dependency_length, evict_from_segments
from mem1_core.eviction_policies import EvictionPolicy
from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TrajectoryMask
from mem1_core.sample_inputs import EVICT_TABLES
from mem1_core.segments import Segment, by_policy, policy_tokens

LENGTHS = (0, 1, 63, 64, 65, 127, 200)

# prompt 2 | is 2, query 1, info 2 | is 1, query 1, info 3 | is 2, answer 2
TURNS = [
    Segment("prompt", 0, 2),
    Segment("state", 1, 2),
    Segment("query", 1, 1),
    Segment("info", 1, 2),
    Segment("state", 2, 1),
    Segment("query", 2, 1),
    Segment("info", 2, 3),
    Segment("state", 3, 2),
    Segment("answer", 3, 2),
]


def spans(tokens: list[int], values: list[int]) -> list[int]:
    return [value for n, value in zip(tokens, values, strict=True) for _ in range(n)]


# ------------------------------------------------------------------------------------------- from turns


@pytest.mark.parametrize(
    ("prune", "expected"),
    [
        # The action of turn 2 ends at 9, that of turn 3 at 16 = N.
        ("action", spans([2, 5, 5, 4], [16, 9, 16, 16])),
        # `</IS>` of turn 2 is token 7, that of turn 3 token 13.
        ("state", spans([2, 5, 5, 4], [16, 8, 14, 16])),
        ("never", [16] * 16),
        # Turns 1 and 2 have 7 tokens when the action of turn 2 is complete.
        (6, spans([2, 5, 5, 4], [16, 9, 16, 16])),
        (7, [16] * 16),
    ],
)
def test_evict_of_a_known_trajectory(prune: EvictionPolicy, expected: list[int]) -> None:
    evict = evict_from_segments(TURNS, prune)
    assert evict.dtype == torch.int32
    assert evict.tolist() == expected
    assert TrajectoryLayout.from_segments(TURNS, prune=prune).mask.evict_at.tolist() == [expected]


def test_the_last_token_of_an_action_still_sees_the_previous_turn() -> None:
    dense = TrajectoryLayout.from_segments(TURNS).mask.dense()[0]
    assert dense[8, 2:7].all(), "the end of turn 2's action sees turn 1"
    assert not dense[9, 2:7].any(), "the token after it does not"
    assert dense[9, :2].all() and dense[9, 7:10].all(), "prompt and own turn stay"


def test_prune_at_is_falls_back_to_the_end_of_the_action() -> None:
    for missing in ([], [Segment("state", 2, 0)]):
        segments = [
            Segment("prompt", 0, 1), Segment("state", 1, 2), Segment("query", 1, 1), Segment("info", 1, 1),
            *missing, Segment("query", 2, 3), Segment("info", 2, 2),
        ]  # fmt: skip
        assert evict_from_segments(segments, "state").tolist() == [10] + [8] * 4 + [10] * 5


def test_a_turn_without_an_action_prunes_nothing() -> None:
    segments = [
        Segment("prompt", 0, 1), Segment("query", 1, 2), Segment("info", 2, 2), Segment("query", 3, 2),
        Segment("info", 3, 1),
    ]  # fmt: skip
    assert evict_from_segments(segments).tolist() == [8] + [7] * 4 + [8] * 3


def test_a_window_drops_several_turns_and_keeps_several() -> None:
    segments = [Segment("prompt", 0, 4)]
    for turn, state in enumerate((1, 1, 1, 5, 1), start=1):
        segments += [Segment("state", turn, state), Segment("query", turn, 1), Segment("info", turn, 1)]
    # Turn 4 has 7 tokens, the others 3. The actions end at 6, 9, 12, 19 and 22; N = 23. From turn 1 on there
    # are 15 tokens at the fourth of them and 18 at the fifth, from turn 2 on 12 and 15, from turn 3 on 9
    # and 12.
    for window, lifetimes in {
        2: [23, 9, 12, 19, 22, 23],
        11: [23, 19, 19, 22, 23, 23],
        14: [23, 19, 22, 23, 23, 23],
        15: [23, 22, 23, 23, 23, 23],
        18: [23] * 6,
    }.items():
        assert evict_from_segments(segments, window).tolist() == spans([4, 3, 3, 3, 7, 3], lifetimes), window
    mask = TrajectoryLayout.from_segments(segments, prune=11).mask
    dense = mask.dense()[0]
    assert dense[18, :19].all(), "the last token of an action still sees what leaves at it"
    assert dense[19].nonzero()[:, 0].tolist() == [0, 1, 2, 3, *range(10, 20)]
    assert mask.peak_tokens(prompt=False).tolist() == [15], "before the prune"
    # Context at the begin of each action: the prompt, and turns 1 to 3 until they leave.
    expected = (4 + 1) * 2 + (7 + 1) * 2 + (10 + 1) * 2 + (13 + 3) * 6 + (4 + 3 + 7 + 1) * 2
    assert dependency_length(segments, 11) == expected


def random_turns(seed: int) -> list[Segment]:
    """1 to 12 turns; segments may be empty or missing."""
    rng = random.Random(seed)
    segments = [Segment("prompt", 0, rng.choice((0, 1, 5)))] if rng.random() < 0.9 else []
    for turn in range(1, rng.randint(1, 12) + 1):
        kinds: list[str] = ["state", "query", "info"]
        chosen = [kind for kind in kinds if rng.random() < 0.85] or kinds[2:]
        segments += [Segment(kind, turn, rng.choice((0, 1, 2, 3, 9))) for kind in chosen]
    return segments


def owners_and_actions(segments: list[Segment]) -> tuple[list[int], dict[int, int]]:
    """The turn of each token, and where each turn's action ends, for turns in which the policy wrote."""
    tokens = [(s.turn, s.kind) for s in segments for _ in range(s.length)]
    ends = {turn: n + 1 for n, (turn, kind) in enumerate(tokens) if by_policy(kind)}
    return [turn for turn, _ in tokens], ends


def forget_by_age(segments: list[Segment], window: int) -> list[int]:
    """The truncating agent played token by token."""
    owners, ends = owners_and_actions(segments)
    evict = [len(owners)] * len(owners)
    held: dict[int, list[int]] = {}  # turn -> its tokens
    for n, turn in enumerate(owners):
        if turn > 0:
            held.setdefault(turn, []).append(n)
        if ends.get(turn) == n + 1:
            while len(held) > 1 and sum(len(tokens) for tokens in held.values()) > window:
                for gone in held.pop(min(held)):
                    evict[gone] = n + 1
    return evict


@pytest.mark.parametrize("window", [1, 2, 5, 8, 13, 21, 40])
def test_a_window_against_the_agent_played_token_by_token(window: int) -> None:
    several = 0
    for seed in range(60):
        segments = random_turns(seed)
        evict = evict_from_segments(segments, window).tolist()
        assert evict == forget_by_age(segments, window), segments
        owners, ends = owners_and_actions(segments)
        for turn, end in ends.items():
            live = [owners[n] for n in range(end) if owners[n] and evict[n] > end]
            assert len(live) <= max(window, owners[:end].count(turn)), (segments, turn)
            several += len(set(live)) > 1
    assert (several > 0) == (window > 1), "expected windows that hold more than one turn"


def test_the_ends_of_the_windows_are_the_other_rules() -> None:
    for seed in range(60):
        segments = random_turns(seed)
        tokens = sum(segment.length for segment in segments)
        assert torch.equal(evict_from_segments(segments, 1), evict_from_segments(segments, "action"))
        assert torch.equal(evict_from_segments(segments, tokens + 1), evict_from_segments(segments, "never"))


def test_edges_of_from_segments() -> None:
    assert evict_from_segments([]).shape == (0,)
    assert TrajectoryLayout.from_segments([]).mask.shape == (1, 0)
    assert TrajectoryLayout.from_segments([Segment("prompt", 0, 3)]).mask.evict_at.tolist() == [[3, 3, 3]]
    plain = [("prompt", 0, 1), ("state", 1, 1)]
    assert TrajectoryLayout.from_segments(plain).mask.shape == (1, 2)
    assert policy_tokens(TURNS).nonzero()[:, 0].tolist() == [2, 3, 4, 7, 8, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([("prompt", 0, 1), ("Think", 1, 1)], r"segments\[1\]\.kind: expected a lower-case word, got 'Th"),
        ([("prompt", 0, -1)], r"segments\[0\]\.length: expected 0 or more, got -1"),
        ([("state", 1, 1), ("prompt", 0, 1)], r"segments\[1\]: expected the prompt first"),
        ([("prompt", 1, 1)], r"segments\[0\]: expected the prompt first and with turn 0, .* turn 1"),
        ([("prompt", 0, 1), ("state", 2, 1)], r"segments\[1\]\.turn: expected 1, got 2"),
        ([("state", 1, 1), ("state", 2, 1), ("state", 1, 1)], r"segments\[2\]\.turn: expected 2 or 3, got 1"),
        (
            [("query", 1, 1), ("state", 1, 1)],
            r"segments\[1\]\.kind: expected the order .* got 'state' after 'query'",
        ),
        ([("query", 1, 1), ("answer", 1, 1)], r"got 'answer' after 'query'"),
        ([("state", 0, 1)], r"segments\[0\]\.turn: expected 1, got 0"),
    ],
)
def test_segments_out_of_order_are_named(segments: list[Segment], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrajectoryLayout.from_segments(segments)


def test_bad_arguments_of_from_segments_are_named() -> None:
    for prune in ("sometimes", True, 0, -1, 64.0, None, "64", "fold=2", "last_turns", "last_turns=0", "=1"):
        wanted = (
            "prune: expected 'action', a number of tokens >= 1, a function, or one of last_turns=N, state, "
            f"never, truncate=N, compact=N, hide_observations=N, fold, summary, got {prune!r}"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(wanted)}$"):
            TrajectoryLayout.from_segments(TURNS, prune=prune)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="regime: expected one of .* got 'copy'"):
        TrajectoryLayout.from_segments(TURNS, regime="copy")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"segments\[0\]: expected a Segment\(kind, turn, length\), got 'state'"
    ):
        TrajectoryLayout.from_segments(["state"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"segments\[0\]: expected int turn and length, got 0 and 1\.5"):
        TrajectoryLayout.from_segments([("prompt", 0, 1.5)])  # type: ignore[list-item]


# ------------------------------------------------------------------------------------------- from evict


@pytest.mark.parametrize("table", EVICT_TABLES)
@pytest.mark.parametrize("tokens", (0, 1, 13, 65))
def test_dense_live_and_counts_against_the_definition(table: str, tokens: int) -> None:
    evict = torch.stack([EVICT_TABLES[table](tokens, seed) for seed in range(3)])
    mask = TrajectoryMask.from_evict(evict)
    rows = [[[j <= i < e[j] for j in range(tokens)] for i in range(tokens)] for e in evict.tolist()]
    dense = torch.tensor(rows, dtype=torch.bool).reshape(3, tokens, tokens)
    assert torch.equal(mask.dense(), dense)
    assert torch.equal(mask.visible_counts(), dense.sum(-1, dtype=torch.int32))
    counted = torch.rand(3, tokens, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(mask.visible_counts(counted), (dense & counted[:, None]).sum(-1, dtype=torch.int32))
    assert mask.visible_pairs() == int(dense.sum())
    assert mask.peak_tokens().tolist() == [max((sum(row) for row in square), default=0) for square in rows]


def test_from_evict_copies_and_normalises() -> None:
    given = torch.tensor([[2, 0, 3, 0, 3]], dtype=torch.int64)[:, ::2]
    mask = TrajectoryMask.from_evict(given)
    given.fill_(0)
    assert mask.evict_at.tolist() == [[2, 3, 3]]
    assert mask.evict_at.dtype == torch.int32 and mask.evict_at.is_contiguous()
    contiguous = torch.tensor([1, 2], dtype=torch.int32)
    kept = TrajectoryMask.from_evict(contiguous)
    contiguous.fill_(0)
    assert kept.evict_at.tolist() == [[1, 2]]


@pytest.mark.parametrize("shape", [(0,), (0, 0), (0, 5), (3, 0)])
def test_empty_masks(shape: tuple[int, ...]) -> None:
    mask = TrajectoryMask.from_evict(torch.empty(shape, dtype=torch.int32))
    batch, tokens = shape if len(shape) == 2 else (1, 0)
    assert mask.shape == (batch, tokens)
    assert mask.dense().shape == (batch, tokens, tokens)
    assert mask.peak_tokens().tolist() == mask.peak_tokens(prompt=False).tolist() == [0] * batch
    assert mask.visible_pairs() == mask.plan.tiles == mask.plan.live_tiles == 0
    assert mask.plan.live_ratio == 0.0


@pytest.mark.parametrize(
    ("evict", "error", "message"),
    [
        ([1, 2], TypeError, "evict: expected an integer tensor .* got list"),
        (torch.tensor([1.0, 2.0]), TypeError, "evict: expected an integer tensor, got torch.float32"),
        (torch.tensor([True]), TypeError, "evict: expected an integer tensor, got torch.bool"),
        (torch.tensor(1), ValueError, r"evict: expected shape \[N\] or \[B, N\], got \[\]"),
        (torch.ones(1, 1, 1, dtype=torch.int32), ValueError, r"evict: expected shape .* got \[1, 1, 1\]"),
        (torch.tensor([3, 1, 3]), ValueError, r"evict\[1\]: expected .* in \[2, 3\], got 1"),
        (torch.tensor([3, 3, 4]), ValueError, r"evict\[2\]: expected .* in \[3, 3\], got 4"),
        (torch.tensor([[1, 2], [2, -1]]), ValueError, r"evict\[1, 1\]: expected .* in \[2, 2\], got -1"),
        (torch.tensor([1, 2**40]), ValueError, rf"evict\[1\]: expected .* got {2**40}"),
    ],
)
def test_bad_evict_is_named(evict: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrajectoryMask.from_evict(evict)


def test_packed_trajectories_do_not_see_each_other() -> None:
    parts = [
        TrajectoryMask.from_evict(table(n, 1))
        for table, n in zip(EVICT_TABLES.values(), LENGTHS, strict=False)
    ]
    packed = TrajectoryMask.pack(parts)
    assert packed.shape == (1, sum(part.shape[1] for part in parts))
    assert torch.equal(packed.dense()[0], torch.block_diag(*(part.dense()[0].int() for part in parts)).bool())
    assert int(packed.peak_tokens()) == max(int(part.peak_tokens()) for part in parts)
    assert TrajectoryMask.pack([]).shape == (1, 0)
    with pytest.raises(ValueError, match=r"masks\[1\]: expected a batch of one, got evict of shape \[2, 3\]"):
        TrajectoryMask.pack([parts[0], TrajectoryMask.from_evict(torch.full((2, 3), 3))])


# ------------------------------------------------------------------------------- peak, dependency length


def test_peak_tokens_with_and_without_prompt() -> None:
    # Most are live at the last token of turn 3's action: prompt 2, turn 2's 5, turn 3's 4.
    mask = TrajectoryLayout.from_segments(TURNS).mask
    assert mask.peak_tokens().tolist() == [11]
    assert mask.peak_tokens(prompt=False).tolist() == [9]
    assert TrajectoryLayout.from_segments(TURNS, regime="reencode").mask.peak_tokens(
        prompt=False
    ).tolist() == [9]
    assert TrajectoryLayout.from_segments(TURNS, prune="never").mask.peak_tokens().tolist() == [16]
    assert TrajectoryMask.pack([mask, mask]).peak_tokens(prompt=False).tolist() == [9]
    with pytest.raises(ValueError, match="prompt: expected True, as this mask does not know its segments"):
        TrajectoryMask.from_evict(mask.evict_at).peak_tokens(prompt=False)


def test_peak_tokens_do_not_grow_with_turns() -> None:
    def peak(turns: int, prune: EvictionPolicy) -> int:
        segments = [Segment("prompt", 0, 10)]
        for turn in range(1, turns + 1):
            segments += [Segment("state", turn, 7), Segment("query", turn, 3), Segment("info", turn, 20)]
        return int(TrajectoryLayout.from_segments(segments, prune=prune).mask.peak_tokens())

    assert peak(3, "action") == peak(30, "action") == 10 + 30 + 10
    assert peak(3, "state") == peak(30, "state") == 10 + 30 + 7
    assert peak(30, "never") == 10 + 30 * 30


def test_dependency_length_by_hand() -> None:
    # Context at the begin of each action: prompt; prompt and turn 1; prompt and turn 2.
    expected = (2 + 3 / 2) * 3 + (7 + 2 / 2) * 2 + (7 + 4 / 2) * 4
    assert dependency_length(TURNS) == expected
    assert dependency_length(TURNS, prompt=False) == (3 / 2) * 3 + (5 + 1) * 2 + (5 + 2) * 4
    # At `</IS>`: a query's context is the prompt and its own `state`.
    expected = (2 + 3 / 2) * 3 + (7 + 1 / 2) * 1 + (3 + 1 / 2) * 1 + (7 + 2 / 2) * 2 + (4 + 2 / 2) * 2
    assert dependency_length(TURNS, "state") == expected
    assert dependency_length(TURNS, "never") == (2 + 1.5) * 3 + (7 + 1) * 2 + (12 + 2) * 4
    for prompt in (True, False):
        assert dependency_length([], prompt=prompt) == 0.0
        assert dependency_length([Segment("prompt", 0, 4)], prompt=prompt) == 0.0


def test_dependency_length_counts_what_is_live_after_a_prune_at_is() -> None:
    """A short `state` over a long history, then a long query that sees none of it."""
    segments = [Segment("info", 1, 575), Segment("state", 2, 25), Segment("query", 2, 125)]
    segments = [Segment("prompt", 0, 25), *segments]
    expected = (600 + 25 / 2) * 25 + (50 + 125 / 2) * 125
    assert dependency_length(segments, "state") == expected
    assert dependency_length(segments, "action") == (600 + 150 / 2) * 150


def played_dependency(segments: list[Segment], prune: EvictionPolicy, prompt: bool) -> float:
    """The agent played token by token: each token that the policy writes costs what is held, and half."""
    owners, ends = owners_and_actions(segments)
    last = {turn: end for turn, end in ends.items() if prune != "never"}
    if prune == "state":
        kinds = [(s.turn, s.kind) for s in segments for _ in range(s.length)]
        last |= {turn: n + 1 for n, (turn, kind) in enumerate(kinds) if kind == "state"}
    window = prune if isinstance(prune, int) else 0
    written, held, total = policy_tokens(segments).tolist(), [], 0.0
    for n, turn in enumerate(owners):
        total += (sum(owner > 0 or prompt for owner in held) + 0.5) * written[n]
        held.append(turn)
        if last.get(turn) == n + 1:
            while min((t for t in held if t), default=turn) < turn and sum(t > 0 for t in held) > window:
                oldest = min(t for t in held if t)
                held = [t for t in held if t != oldest]
    return total


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("prune", ["action", "state", "never", 1, 5, 13, 40])
def test_dependency_length_against_the_agent_played_token_by_token(
    prune: EvictionPolicy, prompt: bool
) -> None:
    for seed in range(60):
        segments = random_turns(seed)
        expected = played_dependency(segments, prune, prompt)
        assert dependency_length(segments, prune, prompt=prompt) == expected, segments


def test_dependency_length_of_long_trajectories_is_exact() -> None:
    assert dependency_length([Segment("query", 1, 9001)]) == 9001 * 9001 / 2


# ---------------------------------------------------------------------------------------------- compile


def test_a_mask_is_an_argument_of_a_compiled_function() -> None:
    def shares(x: Tensor, mask: TrajectoryMask) -> Tensor:
        starts = mask.plan.key_ranges[..., 0].sum() + mask.plan.full_tiles.shape[0] + mask.plan.block_q
        return x * mask.evict_at + starts + mask.shape[1]

    compiled = torch.compile(shares, fullgraph=True, backend="aot_eager")
    for tokens in (65, 130, 200):
        mask = TrajectoryMask.from_evict(EVICT_TABLES["random"](tokens, 0))
        x = torch.rand(1, tokens, requires_grad=True)
        torch.testing.assert_close(compiled(x, mask), shares(x, mask))
