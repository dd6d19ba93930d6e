from __future__ import annotations

import random

import pytest

from mem1.envs.toy.multihop import INSTRUCTION, MultiHopEnv
from mem1.envs.toy.multihop_questions import MultiHopQuestions
from mem1.envs.toy.words import NAMES, RELATIONS
from mem1.parsing.action import Action


def drawn(seed: int, count: int = 3, hops: tuple[int, int] = (1, 4)) -> MultiHopQuestions:
    return MultiHopQuestions(random.Random(seed), count, hops)


@pytest.mark.parametrize("seed", range(5))
def test_they_are_those_of_the_default_environment(seed: int) -> None:
    rng = random.Random(seed)
    questions = MultiHopQuestions(rng, rng.randint(1, 4), (1, 3))
    environment = MultiHopEnv((1, 4), hops=(1, 3))
    assert environment.reset(seed) == f"{INSTRUCTION} {questions.text()} ."
    assert environment.answers == questions.answers


@pytest.mark.parametrize("seed", range(5))
def test_each_answer_is_found_hop_by_hop(seed: int) -> None:
    questions = drawn(seed)
    texts = questions.text().split(" ; ")
    for i, text in enumerate(texts):
        number, head, *relations = text.split()
        name = head
        assert questions.note(i) == text
        for hop, relation in enumerate(relations):
            assert questions.pending(i) == (name, relation)
            name = questions.look_up(f" {name}  {relation} ") or ""
            assert questions.note(i) == " ".join([number, name, *relations[hop + 1 :]])
        assert name == questions.answers[i]
        assert questions.pending(i) == ()
        assert questions.look_up(f"{head} {relations[0]}") == questions.chains[i][1]
        assert questions.note(i) == f"{number} {name}"


def test_chains_share_nobody() -> None:
    met = [name for chain in drawn(0, 32, (4, 4)).chains for name in chain]
    assert len(met) == len(set(met)) == len(NAMES) == 160


def test_they_are_numbered_from_any_number() -> None:
    firsts = set()
    for seed in range(1000):
        numbers = [int(text.split()[0]) for text in drawn(seed).text().split(" ; ")]
        assert numbers == list(range(numbers[0], numbers[0] + 3))
        firsts.add(numbers[0])
    assert firsts == set(range(1, 98))


def test_a_fact_that_is_missing_is_found_by_nobody() -> None:
    for seed in range(20):
        questions = MultiHopQuestions(random.Random(seed), 1, (3, 3), missing=1.0)
        _, name, *relations = questions.text().split()
        turns = 0
        while pending := questions.pending(0):
            assert pending == (name, relations[turns])
            name, turns = questions.look_up(" ".join(pending)), turns + 1
        assert name is None and len(questions.chains[0]) == turns + 1
        assert questions.answers == ["nothing"] and questions.note(0).split()[1:] == ["nothing"]


def test_a_fact_for_every_name_and_relation_and_for_nothing_else() -> None:
    questions = drawn(1)
    assert all(questions.look_up(f"{name} {relation}") in NAMES for name in NAMES for relation in RELATIONS)
    for query in ("", "ada", "ada ada", "boss ada", "ada boss coach", "<IS>", "ada\x00boss"):
        assert questions.look_up(query) is None


def test_a_number_is_no_part_of_an_answer() -> None:
    questions = MultiHopQuestions(random.Random(3), 3, (1, 1))
    numbers = [int(text.split()[0]) for text in questions.text().split(" ; ")]
    first, second, _ = numbers
    given = f"{first} ada ; {second}: bruno ; carla ; {first} dora"
    assert questions.unnumbered(given) == f"ada;bruno; carla ; {first} dora"
    assert questions.unnumbered(f"{second} ada ; {first}") == f"{second} ada ; {first}", "another's"
    assert questions.unnumbered("") == "" and questions.unnumbered(f" {first} ") == ""


def test_numbers_alone_earn_nothing() -> None:
    environment = MultiHopEnv(2)
    texts = environment.reset(1).removeprefix(INSTRUCTION).split(" ; ")
    numbers = [text.split()[0] for text in texts]
    step = environment.step(Action("answer", f"{numbers[0]} ; {numbers[1]}"))
    assert step.reward == 0.0 and step.info == {"exact_match": 0.0, "f1": 0.0, "answers_miscounted": 0.0}


def test_an_empty_query_after_the_last_answer_is_no_look_up() -> None:
    environment = MultiHopEnv(1, hops=1)
    environment.reset(2)
    environment.step(environment.expert_action().action)
    assert environment.step(Action("query", "")).observation == "nothing found"
    assert environment.expert_action().action.kind == "answer"
