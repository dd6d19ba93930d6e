from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mem1.checks import InputError
from mem1.config import RolloutConfig
from mem1.envs.base import Action, Step
from mem1.envs.toy.expert import expert_example
from mem1.envs.toy.updates import FOUND, INSTRUCTION, MALFORMED, NOTHING_FOUND, UpdatesEnv
from mem1.envs.toy.words import NAMES, RELATIONS
from mem1.rollout.rollout_loop import play_expert

NEXT = Action("query", "next")
WORLDS = st.builds(
    UpdatesEnv,
    objectives=st.integers(1, 16) | st.just((1, 16)),
    updates=st.integers(0, 8) | st.just((1, 3)),
    noise=st.sampled_from([0.0, 0.5, 0.9, (0.0, 0.9)]),
    facts_per_turn=st.integers(1, 16),
    passage_tokens=st.sampled_from([0, 40]),
)
SEEDS = st.integers(0, 2**53 - 1)


def play(environment: UpdatesEnv, seed: int) -> tuple[list[str], list[Step]]:
    """All texts of an episode of the expert, and its steps."""
    texts, steps = [environment.reset(seed)], list[Step]()
    while not (steps and steps[-1].terminated):
        state, action = environment.expert_action()
        steps.append(environment.step(action))
        texts += [state, action.text, steps[-1].observation]
    return texts, steps


def read_stream(environment: UpdatesEnv, seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """The questions of an episode, and all statements of its stream, in their order."""
    prompt = environment.reset(seed)
    questions = [text.split() for text in prompt.removeprefix(INSTRUCTION).removesuffix(".").split(";")]
    statements = []
    while (observation := environment.step(NEXT).observation) != NOTHING_FOUND:
        statements += [text.split() for text in observation.removeprefix(FOUND).split(" ; ")]
    return questions, statements


@settings(max_examples=40, deadline=None)
@given(WORLDS, SEEDS)
def test_the_expert_answers_everything(environment: UpdatesEnv, seed: int) -> None:
    texts, steps = play(environment, seed)
    assert [step.reward for step in steps] == [0.0] * (len(steps) - 1) + [1.0]
    unanswered = {"exact_match": 0.0, "f1": 0.0, "answers_miscounted": 1.0, "outdated": 0.0}
    assert all(step.info == unanswered for step in steps[:-1])
    count = float(environment.objectives)
    assert steps[-1].info == {"exact_match": count, "f1": count, "answers_miscounted": 0.0, "outdated": 0.0}
    assert (texts, steps) == play(environment, seed)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 16), st.integers(0, 8), st.sampled_from([0.0, 0.6]))
def test_the_last_fact_of_the_stream_is_the_answer(seed: int, count: int, updates: int, noise: float) -> None:
    environment = UpdatesEnv(count, updates, noise=noise)
    questions, statements = read_stream(environment, seed)
    assert len(questions) == count
    for question, answer in zip(questions, environment.answers, strict=True):
        names = [statement[2] for statement in statements if statement[:2] == question]
        assert len(names) == updates + 1
        assert names[-1] == answer
        assert all(one != other for one, other in zip(names, names[1:], strict=False))
        assert not any(s[1:3] == question and s[3] in names for s in statements if s[0] == "not")
    if noise == 0.0:
        assert len(statements) == count * (updates + 1)


def test_facts_of_all_questions_are_mixed() -> None:
    """Whose fact is first and whose is last does not follow from the order of the questions."""
    ends = set()
    for seed in range(40):
        questions, statements = read_stream(UpdatesEnv(2, 2), seed)
        order = [questions.index(statement[:2]) for statement in statements]
        assert sorted(order) == [0, 0, 0, 1, 1, 1]
        ends.add((order[0], order[-1]))
    assert ends == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_the_notes_of_the_expert_follow_the_facts() -> None:
    environment = UpdatesEnv(2, 1, facts_per_turn=1)
    prompt = environment.reset(0)
    first, second = prompt.removeprefix(f"{INSTRUCTION} ").removesuffix(" .").split(" ; ")
    notes = {first: first, second: second}
    for _ in range(4):
        assert environment.expert_action() == (" ; ".join(notes.values()), NEXT)
        name, relation, value = environment.step(NEXT).observation.removeprefix(f"{FOUND} ").split()
        notes[f"{name} {relation}"] = f"{name} {relation} {value}"
    assert environment.expert_action() == (" ; ".join(notes.values()), NEXT)
    assert environment.step(NEXT).observation == NOTHING_FOUND
    values = [note.split()[-1] for note in notes.values()]
    assert environment.expert_action() == (" ; ".join(notes.values()), Action("answer", " ; ".join(values)))
    assert environment.step(NEXT).observation == NOTHING_FOUND


def test_an_answer_that_was_replaced_is_counted_as_outdated() -> None:
    environment = UpdatesEnv(4, 2)
    questions, statements = read_stream(environment, 1)
    values = [[s[2] for s in statements if s[:2] == question] for question in questions]
    assert all(first != last for first, *_, last in values)
    given = [values[0][0], values[1][-1], values[2][0], "nobody"]
    step = environment.step(Action("answer", " ; ".join(given)))
    assert (step.reward, step.terminated) == (0.25, True)
    assert step.info == {"exact_match": 1.0, "f1": 1.0, "answers_miscounted": 0.0, "outdated": 2.0}
    environment.reset(1)
    assert environment.step(Action("answer", values[0][-1])).info["answers_miscounted"] == 1.0


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.8])
def test_noise_is_the_share_of_statements_that_answer_nothing(noise: float) -> None:
    environment = UpdatesEnv(8, 2, noise=noise)
    total, kinds = 0, {"denial": 0, "name": 0, "relation": 0}
    for seed in range(60):
        questions, statements = read_stream(environment, seed)
        heads = {question[0] for question in questions}
        total += len(statements)
        for statement in (s for s in statements if s[:2] not in questions):
            kinds["denial"] += statement[0] == "not" and statement[1:3] in questions
            kinds["name"] += len(statement) == 3 and statement[0] not in heads
            kinds["relation"] += len(statement) == 3 and statement[0] in heads
    distracting = sum(kinds.values())
    assert total - distracting == 60 * 8 * 3
    assert distracting / total == pytest.approx(noise, abs=0.02)
    assert all(count == pytest.approx(distracting / 3, rel=0.15) for count in kinds.values())


def test_noise_can_change_from_turn_to_turn() -> None:
    """With one fact a turn the length of a piece is geometric; with a share of its own in every turn it
    varies more.
    """

    def lengths(noise: Any) -> list[int]:
        environment, found = UpdatesEnv(8, 2, noise, facts_per_turn=1), []
        for seed in range(60):
            environment.reset(seed)
            while (observation := environment.step(NEXT).observation) != NOTHING_FOUND:
                found.append(observation.count(";"))
        return found

    steady, dynamic = lengths(0.5), lengths((0.1, 0.9))
    assert sum(count == 0 for count in steady) / len(steady) == pytest.approx(0.5, abs=0.05)
    assert max(dynamic) > 1.5 * max(steady)


def test_pieces_have_their_length_in_tokens_and_no_words_but_the_vocabulary_s(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts, _ = play(UpdatesEnv(16, (0, 3), noise=0.5), 0)
    padded, _ = play(UpdatesEnv(2, noise=0.2, facts_per_turn=1, passage_tokens=200), 0)
    for text in [*texts, *padded, MALFORMED]:
        assert tokenizer.unk_token_id not in tokenizer.encode(text), text
    assert {len(tokenizer.encode(text)) for text in padded[3:-4:3]} == {200}


def test_sixteen_objectives_fit_into_the_default_turns() -> None:
    limit = RolloutConfig().max_turns
    assert all(len(play(UpdatesEnv(16), seed)[1]) <= limit for seed in range(20))


@pytest.mark.parametrize("prune", ["action", "never"])
def test_the_expert_s_examples_are_what_the_rollout_makes(
    tokenizer: PreTrainedTokenizerFast, prune: str
) -> None:
    def make() -> UpdatesEnv:
        return UpdatesEnv(3, noise=0.3)

    config = RolloutConfig(prune=prune)  # type: ignore[arg-type]
    (played,) = play_expert(tokenizer, make, [5], config)
    example = expert_example(make(), 5, tokenizer.get_vocab(), config.prune)
    assert example.tokens == played.tokens.tolist() and example.segments == played.segments
    assert played.reward == 1.0 and played.score["exact_match"] == 3.0


def test_an_agent_that_acts_at_random_knows_nothing() -> None:
    environment, rng = UpdatesEnv(4), random.Random(0)
    rewards, answers = list[float](), set[str]()
    for seed in range(100):
        environment.reset(seed)
        while True:
            state, action = environment.random_action(rng)
            step = environment.step(action)
            assert state == "" and action.kind in ("query", "answer") and step.observation != MALFORMED
            if step.terminated:
                rewards.append(step.reward)
                answers.add(action.text)
                break
    assert sum(rewards) / len(rewards) < 0.05 and len(answers) == 100


HOSTILE = ["", "\x00", "</info><answer> ada </answer>", "ada ; " * 10_000, "\ud800", "next", "؀‮", ";;;;"]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["query", "malformed", "memory"]), st.text() | st.sampled_from(HOSTILE))
    )
)
def test_whatever_the_policy_writes_is_answered_in_words_of_the_world(actions: list[tuple[str, str]]) -> None:
    environment = UpdatesEnv(2, noise=0.5)
    environment.reset(0)
    known = {*NAMES, *RELATIONS, *f"{FOUND} {NOTHING_FOUND} {MALFORMED} ; not".split()}
    for kind, text in actions:
        observation, reward, terminated, truncated, _ = environment.step(Action(kind, text))
        assert (reward, terminated, truncated) == (0.0, False, False)
        assert {*observation.split()} <= known
        assert (observation == MALFORMED) == (kind != "query")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_answers_are_wrong(text: str) -> None:
    environment = UpdatesEnv(2)
    environment.reset(0)
    assert environment.step(Action("answer", text)).reward == 0.0
    with pytest.raises(RuntimeError, match="reset"):
        environment.step(NEXT)


def test_an_episode_that_has_not_begun_takes_no_step() -> None:
    with pytest.raises(RuntimeError, match="reset"):
        UpdatesEnv().step(NEXT)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("objectives", 0),
        ("objectives", 33),
        ("objectives", (3, 2)),
        ("objectives", True),
        ("updates", -1),
        ("updates", (0, 9)),
        ("updates", (1, 2, 3)),
        ("noise", -0.1),
        ("noise", 1.0),
        ("noise", (0.5, 0.1)),
        ("noise", "much"),
        ("facts_per_turn", 0),
        ("facts_per_turn", 17),
        ("facts_per_turn", (1, 2)),
        ("passage_tokens", -1),
    ],
)
def test_arguments_out_of_range_are_named(argument: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^{argument}: expected"):
        UpdatesEnv(**{argument: value})  # type: ignore[arg-type]
