"""Tables, summaries and pictures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from mem1.checks import InputError
from mem1.config import RolloutConfig
from mem1.demo import growth, rise
from mem1.engine.engine import Engine
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.evaluation.evaluation_loop import OBJECTIVES, evaluate, evaluate_expert, evaluation_seeds
from mem1.evaluation.plots import plot_learning, plot_trajectory
from mem1.evaluation.results import Result, error_counts, summarize, table
from mem1.metrics import Mean
from mem1.runtime.progress import Progress
from mem1.seeds import derive_seed
from mem1.train.parity import Parity, parity
from mem1.trajectory import Failure, TokenReward, Trajectory
from mem1_core.segments import Segment


def result(agent: str, objectives: int, peak: float) -> Result:
    values = {"reward": 0.5, "peak_tokens": peak, "peak_tokens_without_prompt": peak - 10}
    return Result(agent, objectives, 1, {}, 0, {name: Mean.of([value]) for name, value in values.items()})


def handmade(*segments: Segment, **settings) -> Trajectory:
    length = sum(segment.length for segment in segments)
    return Trajectory(torch.zeros(length, dtype=torch.int64), list(segments), torch.zeros(length), **settings)


def test_a_row_is_the_mean_over_the_episodes():
    long = handmade(
        Segment("prompt", 0, 4),
        *(Segment("state", 1, 3), Segment("query", 1, 2), Segment("info", 1, 5)),
        *(Segment("state", 2, 2), Segment("query", 2, 3), Segment("info", 2, 1)),
        *(Segment("state", 3, 1), Segment("answer", 3, 2)),
        prune="action",
        rewards=[TokenReward(22, 0.5)],
        score={"exact_match": 2.0, "f1": 3.0},
        invalid_turns=[1],
        model_tokens=25,
        seconds=4.0,
    )
    short = handmade(
        *(Segment("prompt", 0, 6), Segment("state", 1, 2), Segment("query", 1, 2)),
        prune="action",
        finish_reason="turn_limit",
        score={"exact_match": 0.0, "f1": 0.0},
        model_tokens=10,
        seconds=3.0,
    )
    # Actions: 5 tokens that find the prompt's 4; 5 that find 4 + 10; 3 that find 4 + 6, turn 1 being pruned.
    # At most the prompt, turn 1 and action 2 are live: 4 + 10 + 5. The short one: 4 tokens that find 6.
    dependency = (4 + 5 / 2) * 5 + (14 + 5 / 2) * 5 + (10 + 3 / 2) * 3, (6 + 4 / 2) * 4
    expected = {
        "reward": 0.25,
        "exact_match": 1.0,
        "f1": 1.5,
        "answered": 0.5,
        "turns": (3 + 1) / 2,
        "invalid_actions": 0.5,
        "tokens": (23 + 10) / 2,
        "model_tokens": (25 + 10) / 2,
        "peak_tokens": (19 + 10) / 2,
        "peak_tokens_without_prompt": (15 + 4) / 2,
        "dependency_length": sum(dependency) / 2,
        "dependency_length_without_prompt": (sum(dependency) - 4 * (5 + 5 + 3) - 6 * 4) / 2,
        "seconds": 3.5,
    }
    row = summarize("MEM1", 3, [long, short])
    assert {name: row[name] for name in row.means} == expected
    assert (row.episodes, row.errors, row.replays) == (2, {}, 0)
    assert all(mean.count == 2 and mean.low < mean.value < mean.high for mean in row.means.values())
    assert row.to_dict()["turns_interval"] == [1.0, 3.0]

    # Episodes that went wrong are counted and change no mean: their zeros would pull every length down.
    start = handmade(
        Segment("prompt", 0, 2), prune="action", finish_reason="environment_error", error="TimeoutError: x"
    )
    lost = [start, start, replace(start, finish_reason="policy_error", error="NaN")]
    long = replace(long, failures=[Failure("TimeoutError", 1, 20), Failure("OSError", 0, 0)])
    bad = summarize("MEM1", 3, [start, long, *lost[1:], short])
    assert bad == replace(row, episodes=5, errors={"TimeoutError": 2, "policy": 1}, replays=2)

    none = summarize("MEM1", 3, lost)
    assert (none.episodes, none.errors) == (3, {"TimeoutError": 2, "policy": 1})
    assert none.replays == 0 and all(math.isnan(none[name]) for name in none.means)
    assert none.to_dict()["reward"] is None and none.to_dict()["reward_interval"] is None
    assert table([none], ("errors", "replays", "reward")).splitlines()[2] == (
        "| 3: TimeoutError 2, policy 1 |       0 |      - |"
    )


def test_errors_by_kind():
    broken = [
        ("environment_error", "OSError: disk"),
        ("environment_error", "BoomError"),
        ("policy_error", "NaN"),
    ]
    played = [
        handmade(prune="action", finish_reason=reason, error=error)
        for reason, error in [("answered", ""), ("turn_limit", ""), *broken, broken[1]]
    ]
    assert list(error_counts(played).items()) == [("BoomError", 2), ("OSError", 1), ("policy", 1)]


class Broken(MultiHopEnv):
    """Fails half of its resets and a query now and then."""

    def reset(self, seed: int, task=None) -> str:
        self.bad = seed % 2 == 0
        if self.bad:
            raise ConnectionError("no answer")
        return super().reset(seed)


def test_a_broken_retriever_gets_no_better_number(make_model, tokenizer):
    model, config = (
        make_model(),
        RolloutConfig(num_slots=4, max_action_tokens=12, max_turns=3, episode_retries=0),
    )

    def play(world: type[MultiHopEnv]) -> tuple[Result, list[Trajectory]]:
        return evaluate(model, tokenizer, config, world, agent="MEM1", objectives=2, episodes=8)

    (good, played), (bad, _) = play(MultiHopEnv), play(Broken)
    lost = sum(seed % 2 == 0 for seed in evaluation_seeds(0, 8))
    assert 0 < lost < 8 and bad.errors == {"ConnectionError": lost} and good.errors == {}
    same = summarize("MEM1", 2, [t for t in played if t.seed % 2])
    names = ("turns", "tokens", "peak_tokens", "peak_tokens_without_prompt", "dependency_length", "reward")
    for name in names:
        assert bad[name] == pytest.approx(same[name])
    assert bad["seconds"] > 0


def test_evaluation_seeds_are_its_own():
    assert evaluation_seeds(0, 3) == [derive_seed(0, "evaluation", i) for i in range(3)]
    assert evaluation_seeds(0, 2) == evaluation_seeds(0, 3)[:2], "more episodes are more of the same"
    other = {
        derive_seed(seed, "training", update, i) for seed in (0, 1) for update in range(50) for i in range(64)
    }
    ours = [s for seed in (0, 1) for s in evaluation_seeds(seed, 1000)]
    assert len(set(ours)) == 2000 and not other & set(ours)


def test_a_row_is_a_phase(make_model, tokenizer):
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            self.now += 4.0
            return self.now

    lines: list[str] = []
    config = RolloutConfig(num_slots=2, max_action_tokens=8, max_turns=2)
    model, progress = make_model(), Progress(lines.append, Clock())
    for n in (1, 3):
        make = partial(MultiHopEnv, n)
        evaluate(model, tokenizer, config, make, agent="MEM1", objectives=n, episodes=6, progress=progress)
    assert [line.split(",")[:2] for line in lines if "6/6" in line] == [
        ["MEM1", " 1 objective 6/6"],
        ["MEM1", " 3 objectives 6/6"],
    ]
    assert any(" left" in line for line in lines)


def test_parity_of_nothing_is_no_number(make_model):
    start = handmade(
        Segment("prompt", 0, 2), prune="state", finish_reason="environment_error", error="OSError"
    )
    row = parity(make_model(), [start], "carry")
    assert (row.prune, row.trajectories, row.turns, row.tokens) == ("state", 0, 0, 0)
    assert math.isnan(row.max_dlogp) and math.isnan(row.mean_dlogp) and math.isnan(row.kl)
    with pytest.raises(ValueError, match="expected at least one, got none"):
        parity(make_model(), [], "carry")


def test_no_number_is_null_in_json():
    row = result("MEM1", 2, 40.0)
    row = replace(row, means=row.means | {"reward": Mean.of([])}, errors={"OSError": 1})
    data = json.loads(json.dumps(row.to_dict(), allow_nan=False))
    assert data["reward"] is None and data["peak_tokens"] == 40.0 and data["errors"] == {"OSError": 1}


def test_every_agent_gets_the_same_episodes(make_model, tokenizer):
    prompts = []
    for prune in ("action", "never", 20):
        config, agent = (
            RolloutConfig(num_slots=4, max_action_tokens=12, max_turns=3, prune=prune),
            f"agent {prune}",
        )
        model, results, played = make_model(), [], []
        engine = Engine(model, 4)
        for n in (1, 3):
            make = partial(MultiHopEnv, n)
            row, trajectories = evaluate(
                model, tokenizer, config, make, agent=agent, objectives=n, episodes=2, engine=engine
            )
            results.append(row)
            played += trajectories
        assert [(r.agent, r.objectives, r.episodes) for r in results] == [(agent, 1, 2), (agent, 3, 2)]
        assert [t.objectives for t in played] == [1, 1, 3, 3]
        assert all(
            r["peak_tokens"] >= r["peak_tokens_without_prompt"] > 0 and r["seconds"] > 0 for r in results
        )
        by_seed = sorted(played, key=lambda t: (t.objectives, t.seed))
        prompts.append([t.tokens[: t.segments[0].length].tolist() for t in by_seed])
    assert prompts[0] == prompts[1] == prompts[2]


def test_a_row_has_an_episode(make_model, tokenizer):
    what = {"agent": "MEM1", "objectives": 2, "episodes": 0}
    for call in (
        lambda: evaluate(make_model(), tokenizer, RolloutConfig(), MultiHopEnv, **what),
        lambda: evaluate_expert(tokenizer, RolloutConfig(), MultiHopEnv, **what),
    ):
        with pytest.raises(InputError, match="episodes: expected an integer >= 1, got 0"):
            call()


def expert_rows(
    tokenizer: Any, config: RolloutConfig, objectives: tuple[int, ...]
) -> tuple[list[Result], list[Trajectory]]:
    """An episode of the expert at each number of objectives."""
    results, played = [], []
    for n in objectives:
        make = partial(MultiHopEnv, n)
        row, trajectories = evaluate_expert(tokenizer, config, make, agent="MEM1", objectives=n, episodes=1)
        results.append(row)
        played += trajectories
    return results, played


def test_no_limit_holds_for_the_expert(tokenizer):
    config = RolloutConfig(max_prompt_tokens=8, max_turns=1, max_action_tokens=12, max_state_tokens=6)
    make = partial(MultiHopEnv, 2)
    free, held = (
        evaluate_expert(tokenizer, c, make, agent="MEM1", objectives=2, episodes=1)[0]
        for c in (RolloutConfig(), config)
    )
    assert held["answered"] == free["answered"] == 1 and held["turns"] == free["turns"] > 1


def test_the_expert_answers_everything_at_every_size(tokenizer):
    results, played = expert_rows(tokenizer, RolloutConfig(max_action_tokens=8, max_turns=2), OBJECTIVES)
    assert [r.objectives for r in results] == [1, 2, 4, 8, 16]
    assert all(r["reward"] == 1.0 and r["answered"] == 1.0 for r in results)
    assert [r["exact_match"] for r in results] == [1, 2, 4, 8, 16]
    assert results[-1]["turns"] == 33
    assert len(played) == 5


def test_memory_of_the_default_world_grows_far_slower_than_with_the_full_context(tokenizer):
    def ratio(prune: Any, passage: int) -> float:
        two, sixteen = (
            evaluate_expert(
                *(tokenizer, RolloutConfig(prune=prune), partial(MultiHopEnv, n, passage_tokens=passage)),
                agent="expert",
                objectives=n,
            )[0]["peak_tokens_without_prompt"]
            for n in (2, 16)
        )
        return sixteen / two

    assert ratio("action", 0) <= ratio("never", 0) / 3
    assert ratio("action", 400) <= 1.65


def test_the_truncating_agent_holds_its_window_and_a_turn(tokenizer):
    (row,), (played,) = expert_rows(tokenizer, RolloutConfig(prune=300), (16,))
    sizes: dict[int, int] = {}
    for segment in played.segments[1:]:
        sizes[segment.turn] = sizes.get(segment.turn, 0) + segment.length
    assert sum(sizes.values()) > 4 * 300
    assert 300 < row["peak_tokens_without_prompt"] <= 300 + 2 * max(sizes.values()), (
        "full until the action is complete"
    )
    assert row["answered"] == 1.0 and row["dependency_length"] == played.dependency_length()
    again = Trajectory.from_dict(json.loads(played.to_json()))
    assert again.prune == 300 and torch.equal(again.mask.evict_at, played.mask.evict_at)


def test_a_table_is_markdown():
    text = table(
        [result("MEM1", 2, 1234.4), result("full context", 16, 5.25)], ("agent", "objectives", "peak_tokens")
    )
    assert text.splitlines() == [
        "|        agent | objectives | peak_tokens |",
        "|--------------|------------|-------------|",
        "|         MEM1 |          2 |        1234 |",
        "| full context |         16 |       5.250 |",
    ]
    assert "1.2e-06" in table([Parity("carry", "action", "float32", 1, 4, 9, 1.2e-6, 1e-7, 0.0)])
    assert "|    64 |" in table([Parity("carry", 64, "float32", 1, 4, 9, 0.0, 0.0, 0.0)], ("prune",))


def test_growth_compares_16_with_2():
    text = growth([result("MEM1", n, peak) for n, peak in ((16, 100.0), (1, 20.0), (2, 40.0))])
    assert text == "MEM1: 16 objectives need 2.50x the peak of 2, 3.00x without the prompt"


def test_rewards_stand_in_a_line(tmp_path):
    records = [{"phase": "policy", "step": n, "reward": reward} for n, reward in ((1, 0.5), (2, 0.75))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert rise(tmp_path / "metrics.jsonl").endswith(": 0.50 0.75")


def test_pictures(tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    results, played = expert_rows(tokenizer, RolloutConfig(), (1, 2))
    records = [{"phase": "warmstart", "step": i, "loss": 3 / i} for i in (1, 2, 3)]
    records += [{"phase": "policy", "step": i, "reward": 0.1 * i, "answered": 0.5} for i in (1, 2)]
    # Gaps: no number, one that is none, and an update of which nothing is said.
    records += [
        {"phase": "policy", "step": 3, "reward": None, "answered": math.nan},
        {"phase": "policy", "step": 4},
    ]
    results.append(replace(results[0], objectives=4, means={}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plot_learning(tmp_path / "metrics.jsonl", tmp_path / "learning.png")
    plot_trajectory(played[1], tmp_path / "mask.png")
    for name in ("learning.png", "mask.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        assert (tmp_path / name).stat().st_size > 5000
