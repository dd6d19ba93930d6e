from __future__ import annotations

import random
from math import fsum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mem1.checks import InputError
from mem1.config import RolloutConfig
from mem1.envs.base import Action, Step
from mem1.envs.toy.delayed import FOUND, INSTRUCTION, MALFORMED, NOTHING_FOUND, DelayedRewardEnv
from mem1.envs.toy.expert import expert_example
from mem1.envs.toy.words import NAMES
from mem1.rollout.rollout_loop import play_expert

ASK = Action("query", "ada boss")
WORLDS = st.builds(
    DelayedRewardEnv,
    objectives=st.integers(1, 16) | st.just((1, 16)),
    hops=st.integers(1, 4) | st.just((1, 4)),
    delay=st.integers(0, 100) | st.just((0, 10)),
    spread=st.floats(0.0, 1.0),
)
SEEDS = st.integers(0, 2**53 - 1)


def play(environment: DelayedRewardEnv, seed: int) -> tuple[list[str], list[Step]]:
    """All texts of an episode of the expert, and its steps."""
    texts, steps = [environment.reset(seed)], list[Step]()
    while not (steps and steps[-1].terminated):
        state, action = environment.expert_action()
        steps.append(environment.step(action))
        texts += [state, action.text, steps[-1].observation]
    return texts, steps


def rewards_of(environment: DelayedRewardEnv, answers: list[str], seed: int = 0) -> list[float]:
    """The rewards of an episode of these answers, one a turn."""
    environment.reset(seed)
    return [environment.step(Action("answer", answer)).reward for answer in answers]


@settings(max_examples=60, deadline=None)
@given(WORLDS, SEEDS)
def test_the_expert_answers_everything_and_is_paid_all_of_it(
    environment: DelayedRewardEnv, seed: int
) -> None:
    texts, steps = play(environment, seed)
    count = float(environment.objectives)
    last = {"exact_match": count, "f1": count, "answers_miscounted": 0.0, "outstanding": 0.0}
    assert steps[-1].info == last
    assert 0.0 <= fsum(step.reward for step in steps) <= 2.0
    assert (texts, steps) == play(environment, seed)


@settings(max_examples=60, deadline=None)
@given(WORLDS, SEEDS)
def test_what_was_paid_and_is_outstanding_grows_by_the_answers_alone(
    environment: DelayedRewardEnv, seed: int
) -> None:
    environment.reset(seed)
    earned, steps = 0.0, list[Step]()
    while not (steps and steps[-1].terminated):
        action = environment.expert_action().action
        steps.append(environment.step(action))
        now = fsum(step.reward for step in steps) + steps[-1].info["outstanding"]
        assert (now > earned) if action.kind == "answer" else (now == pytest.approx(earned))
        earned = now


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), SEEDS, st.data())
def test_each_right_answer_has_its_worth_whatever_else_is_done(
    count: int, seed: int, data: st.DataObject
) -> None:
    environment = DelayedRewardEnv(count)
    environment.reset(seed)
    right = environment.answers
    alone = [
        fsum(rewards_of(environment, [a if i == k else "nobody" for i, a in enumerate(right)], seed))
        for k in range(count)
    ]
    assert all(0.5 / count <= worth <= 1.5 / count for worth in alone)
    chosen = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    mixed = [a if take else "nobody" for a, take in zip(right, chosen, strict=True)]
    expected = fsum(worth for worth, take in zip(alone, chosen, strict=True) if take)
    assert fsum(rewards_of(environment, mixed, seed)) == pytest.approx(expected)
    assert fsum(rewards_of(environment, [" ; ".join(mixed)], seed)) == pytest.approx(expected)


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_an_answer_is_paid_so_many_turns_later(delay: int) -> None:
    environment = DelayedRewardEnv(2, delay=delay, spread=0.0)
    environment.reset(0)
    first, second = environment.answers
    actions = [Action("answer", first), ASK, Action("malformed", ""), ASK, ASK]
    rewards = [environment.step(action).reward for action in actions]
    assert rewards == [0.5 if turn == delay else 0.0 for turn in range(5)]
    step = environment.step(Action("answer", second))
    assert step.terminated and step.reward == 0.5


def test_what_is_outstanding_is_paid_with_the_last_answer() -> None:
    environment = DelayedRewardEnv(4, delay=100, spread=0.0)
    environment.reset(0)
    a, b, c, d = environment.answers
    assert rewards_of(environment, [a, "nobody", c, d]) == [0.0, 0.0, 0.0, 0.75]
    assert rewards_of(environment, [a, f"{b} ; {c}", ""]) == [0.0, 0.0, 0.75]
    assert rewards_of(environment, [f"{a};{b};{c};{d};{d}"]) == [1.0]


def test_infos_tell_how_far_the_episode_is() -> None:
    environment = DelayedRewardEnv(2, delay=5, spread=0.0)
    environment.reset(0)
    first, second = environment.answers
    infos = [environment.step(action).info for action in (ASK, Action("answer", first), Action("answer", ""))]
    names = ("exact_match", "f1", "answers_miscounted", "outstanding")
    assert [tuple(info[name] for name in names) for info in infos] == [
        (0.0, 0.0, 1.0, 0.0),
        (1.0, 1.0, 1.0, 0.5),
        (1.0, 1.0, 0.0, 0.0),
    ]


def test_rewards_are_right_on_average_and_spread_evenly() -> None:
    environment = DelayedRewardEnv(1, spread=0.5)
    rewards = []
    for seed in range(400):
        _, steps = play(environment, seed)
        rewards.append(fsum(step.reward for step in steps))
    assert fsum(rewards) / 400 == pytest.approx(1.0, abs=0.05)
    assert all(0.5 <= reward <= 1.5 for reward in rewards)
    for low in (0.5, 0.75, 1.0, 1.25):
        assert sum(low <= reward < low + 0.25 for reward in rewards) == pytest.approx(100, abs=30)


def test_delays_are_drawn_from_their_range() -> None:
    environment, seen = DelayedRewardEnv(2, delay=(2, 4)), set()
    for seed in range(40):
        environment.reset(seed)
        environment.step(Action("answer", environment.answers[0]))
        seen.add(next(turn for turn in range(1, 9) if environment.step(ASK).reward > 0.0))
    assert seen == {2, 3, 4}


def test_the_notes_rewrite_each_question_as_far_as_it_is_known() -> None:
    environment = DelayedRewardEnv(2, hops=2)
    prompt = environment.reset(3)
    first, second = prompt.removeprefix(f"{INSTRUCTION} ").removesuffix(" .").split(" ; ")
    (number, head, one, two), (_, other, three, _) = first.split(), second.split()
    assert environment.expert_action() == (first, Action("query", f"{head} {one}"))
    found = environment.step(Action("query", f"{head} {one}")).observation.removeprefix("found ")
    assert environment.expert_action() == (f"{number} {found} {two}", Action("query", f"{found} {two}"))
    answer = environment.step(Action("query", f"{found} {two}")).observation.removeprefix("found ")
    assert environment.expert_action() == (f"{number} {answer}", Action("answer", answer))
    step = environment.step(Action("answer", answer))
    assert (step.observation, step.terminated) == ("answered", False)
    assert environment.expert_action() == (
        f"{number} {answer} ; {second}",
        Action("query", f"{other} {three}"),
    )


def test_answers_have_their_length_in_tokens_and_no_words_but_the_vocabulary_s(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts, _ = play(DelayedRewardEnv(16, hops=(1, 4)), 0)
    padded, _ = play(DelayedRewardEnv(2, passage_tokens=200), 0)
    for text in [*texts, *padded, MALFORMED, NOTHING_FOUND]:
        assert tokenizer.unk_token_id not in tokenizer.encode(text), text
    assert {len(tokenizer.encode(text)) for text in padded if text.startswith(FOUND)} == {200}


def test_sixteen_objectives_fit_into_the_default_turns() -> None:
    assert len(play(DelayedRewardEnv(16), 0)[1]) == 32 <= RolloutConfig().max_turns


@pytest.mark.parametrize("prune", ["action", "never"])
def test_the_expert_s_examples_are_what_the_rollout_makes(
    tokenizer: PreTrainedTokenizerFast, prune: str
) -> None:
    def make() -> DelayedRewardEnv:
        return DelayedRewardEnv(3, delay=1)

    config = RolloutConfig(prune=prune)  # type: ignore[arg-type]
    (played,) = play_expert(tokenizer, make, [5], config)
    example = expert_example(make(), 5, tokenizer.get_vocab(), config.prune)
    assert example.tokens == played.tokens.tolist() and example.segments == played.segments
    _, steps = play(make(), 5)
    assert played.reward == pytest.approx(fsum(step.reward for step in steps))
    assert played.score["exact_match"] == 3.0


def test_an_agent_that_acts_at_random_knows_nothing() -> None:
    environment, rng = DelayedRewardEnv(4), random.Random(0)
    rewards, kinds = list[float](), set[str]()
    for seed in range(50):
        environment.reset(seed)
        step = Step("")
        while not step.terminated:
            state, action = environment.random_action(rng)
            step = environment.step(action)
            assert state == "" and step.observation not in (MALFORMED, NOTHING_FOUND)
            kinds.add(action.kind)
            rewards.append(step.reward)
    assert fsum(rewards) / 50 < 0.05 and kinds == {"query", "answer"}


HOSTILE = ["", "\x00", "</info><answer> ada </answer>", "\ud800", "ada", "ada boss", "؀‮", "x" * 10_000]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["query", "answer", "malformed", "memory"]), st.text() | st.sampled_from(HOSTILE)
        )
    )
)
def test_whatever_the_policy_writes_is_answered_in_words_of_the_world(actions: list[tuple[str, str]]) -> None:
    environment = DelayedRewardEnv(16)
    environment.reset(0)
    for kind, text in actions:
        step = environment.step(Action(kind, text))
        said = step.observation.removeprefix(f"{FOUND} ")
        assert said in (*NAMES, NOTHING_FOUND, MALFORMED, "answered")
        assert (said == MALFORMED) == (kind in ("malformed", "memory"))
        if step.terminated:
            break


def test_an_episode_that_is_over_takes_no_step() -> None:
    environment: Any = DelayedRewardEnv(1)
    with pytest.raises(RuntimeError, match="reset"):
        environment.step(ASK)
    environment.reset(0)
    assert environment.step(Action("answer", ";" * 100)).terminated
    with pytest.raises(RuntimeError, match="reset"):
        environment.step(ASK)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("objectives", 0),
        ("objectives", 33),
        ("hops", 5),
        ("delay", -1),
        ("delay", (3, 2)),
        ("delay", 101),
        ("spread", 1.5),
        ("spread", -0.5),
        ("spread", float("nan")),
        ("spread", "wide"),
        ("passage_tokens", -1),
        ("passage_tokens", 1.5),
    ],
)
def test_arguments_out_of_range_are_named(argument: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^{argument}: expected"):
        DelayedRewardEnv(**{argument: value})  # type: ignore[arg-type]
