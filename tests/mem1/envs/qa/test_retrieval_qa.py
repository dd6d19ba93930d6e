"""Retrieval QA, over a small retriever of its own: what is shown, paid and said, and the expert."""

from __future__ import annotations

import asyncio
import inspect
import random
from typing import Any

import pytest

from mem1.checks import InputError
from mem1.envs.base import ExpertAction
from mem1.envs.qa.questions import Question, QuestionTask
from mem1.envs.qa.retrieval_qa import RetrievalQAEnv, default_instruction
from mem1.envs.search.retriever import NOTHING_FOUND, Passage
from mem1.parsing.action import Action
from mem1.parsing.tags import FORMATS, MEM1, ActionTag, TagFormat

BRIDGE = Question("b", "who built the bridge", ("Ann Lee", "Lee"), "nq", ("1",))
FERRY = Question("f", "when did the ferry sink ", ("in; or about 1901", "1901"), "nq", ("2", "3"))
MOON = Question("m", "how far is the moon", ("far",), "nq", ("9",))
TASK = QuestionTask("t", (BRIDGE, FERRY, MOON))


CORPUS = {
    "who built the bridge": [
        Passage("1", '"Bridge"\nAnn Lee built it.', 2.0),
        Passage("4", '"Mill"\nTwo\nlines.', 1.0),
    ],
    "The ferry": [Passage("3", '"The ferry"\nIt sank in 1901.', 0.0)],
}


class Retriever:
    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int]] = []

    def search(self, queries: list[str], top_k: int) -> Any:
        self.calls.append((queries, top_k))
        return [CORPUS.get(query, [])[:top_k] for query in queries]


class AsyncRetriever(Retriever):
    async def search(self, queries: list[str], top_k: int) -> Any:
        await asyncio.sleep(0)
        return super().search(queries, top_k)


def env(**settings: Any) -> RetrievalQAEnv:
    return RetrievalQAEnv(None, Retriever(), **settings)


def test_the_prompt_has_the_questions_and_the_tags() -> None:
    environment = env()
    prompt = environment.reset(0, TASK)
    assert prompt.endswith(
        "Questions:\n1. who built the bridge\n2. when did the ferry sink \n3. how far is the moon\n"
    )
    assert all(f"<{tag}> and </{tag}>" in prompt for tag in MEM1.tags)
    assert environment.objectives == 3
    assert env(instruction="Go.").reset(0, BRIDGE) == "Go.\nQuestions:\n1. who built the bridge\n"


@pytest.mark.parametrize("name", FORMATS)
def test_the_instruction_fits_every_format(name: str) -> None:
    tags = FORMATS[name]
    text = default_instruction(tags)
    asked = [tags.action(kind) for kind in ("query", "answer")]
    named = {tags.state, tags.observation, *(action.tag for action in asked if action)} - {None}
    assert all(f"<{tag}> and </{tag}>" in text for tag in named)
    assert ("notes" in text) == (tags.state is not None)
    assert "None" not in text and "\n\n\n" not in text


def test_a_format_without_queries_is_refused() -> None:
    tags = TagFormat("IS", (ActionTag("answer", "answer"),))
    with pytest.raises(InputError, match="tags: expected an action of kind 'query', got IS, answer, info"):
        env(tags=tags)


def test_passages_are_shown_and_counted() -> None:
    retriever = Retriever()
    environment = RetrievalQAEnv(None, retriever, top_k=2)
    environment.reset(0, TASK)
    step = environment.step(Action("query", " who built the bridge"))
    assert step.observation == 'Doc 1(Title: "Bridge") Ann Lee built it.\nDoc 2(Title: "Mill") Two\nlines.'
    assert (step.reward, step.terminated, step.truncated) == (0.0, False, False)
    assert step.info == {
        "exact_match": 0.0,
        "f1": 0.0,
        "answers_miscounted": 1.0,
        "gold_found": 1.0,
        "objectives_em": [0.0, 0.0, 0.0],
        "objectives_f1": [0.0, 0.0, 0.0],
        "objectives_gold_found": [1.0, 0.0, 0.0],
    }
    assert retriever.calls == [(["who built the bridge"], 2)]
    assert environment.step(Action("query", "nobody")).observation == NOTHING_FOUND


@pytest.mark.parametrize(
    ("answer", "settings", "reward", "info"),
    [
        ("the Ann Lee; 1901; far", {}, 1.0, (3.0, 3.0, 0.0, [1.0, 1.0, 1.0])),
        ("Ann; 1901; near", {}, 1 / 3, (1.0, 1 + 2 / 3, 0.0, [0.0, 1.0, 0.0])),
        ("Ann; 1901; near", {"reward": "f1"}, (1 + 2 / 3) / 3, (1.0, 1 + 2 / 3, 0.0, [0.0, 1.0, 0.0])),
        ("Lee; 1901", {}, 2 / 3, (2.0, 2.0, 1.0, [1.0, 1.0, 0.0])),
        ("Lee; 1901", {"strict": True}, 0.0, (0.0, 0.0, 1.0, [0.0, 0.0, 0.0])),
        ("", {}, 0.0, (0.0, 0.0, 1.0, [0.0, 0.0, 0.0])),
    ],
)
def test_answers_are_paid(answer: str, settings: Any, reward: float, info: tuple[Any, ...]) -> None:
    environment = env(**settings)
    environment.reset(0, TASK)
    step = environment.step(Action("answer", answer))
    assert (step.observation, step.terminated, step.truncated) == ("", True, False)
    assert step.reward == pytest.approx(reward)
    names = ("exact_match", "f1", "answers_miscounted", "objectives_em")
    assert [step.info[name] for name in names] == [pytest.approx(value) for value in info]
    with pytest.raises(RuntimeError, match="expected a running episode"):
        environment.step(Action("query", "more"))
    environment.reset(1, BRIDGE)
    assert environment.step(Action("query", "x")).info["objectives_em"] == [0.0]


@pytest.mark.parametrize(
    "action", [Action("malformed", "<IS>"), Action("query", "  "), Action("branch", "x")]
)
def test_what_is_no_action_changes_nothing(action: Action) -> None:
    retriever = Retriever()
    environment = RetrievalQAEnv(None, retriever)
    environment.reset(0, TASK)
    before = environment.expert_action()
    step = environment.step(action)
    assert "<query> and </query>" in step.observation and "<answer> and </answer>" in step.observation
    assert step.info["invalid_action"] is True and not step.terminated and step.reward == 0.0
    assert retriever.calls == [] and environment.expert_action() == before


@pytest.mark.parametrize("text", ["</info><answer>x</answer>", "\0\x1b[31m", "x" * 10**6, "é\u202e;;"])
def test_any_text_is_answered(text: str) -> None:
    environment = env()
    environment.reset(0, TASK)
    assert environment.step(Action("query", text)).observation == NOTHING_FOUND
    assert environment.step(Action("answer", text)).reward == 0.0


def test_an_awaited_retriever_makes_awaited_steps() -> None:
    environment = RetrievalQAEnv(None, AsyncRetriever())
    environment.reset(0, TASK)
    asked = environment.step(Action("query", "who built the bridge"))
    assert inspect.isawaitable(asked)
    step = asyncio.run(asked)
    assert step.observation.startswith('Doc 1(Title: "Bridge")') and step.info["gold_found"] == 1.0
    assert environment.step(Action("answer", "Lee; 1901; far")).reward == 1.0


def play(environment: RetrievalQAEnv) -> tuple[list[ExpertAction], Any]:
    actions = []
    while True:
        actions.append(environment.expert_action())
        step = environment.step(actions[-1].action)
        if step.terminated:
            return actions, step


def test_the_expert_asks_each_question_and_answers_what_was_found() -> None:
    environment = env()
    environment.reset(0, TASK)
    actions, step = play(environment)
    assert actions == [
        ExpertAction("next 1", Action("query", "who built the bridge")),
        ExpertAction("1. Ann Lee; next 2", Action("query", "when did the ferry sink")),
        ExpertAction("1. Ann Lee; 2. unknown; next 3", Action("query", "how far is the moon")),
        ExpertAction("1. Ann Lee; 2. unknown; 3. unknown", Action("answer", "Ann Lee; unknown; unknown")),
    ]
    assert step.info["gold_found"] == step.info["exact_match"] == 1.0
    assert step.info["objectives_em"] == step.info["objectives_gold_found"] == [1.0, 0.0, 0.0]


def test_the_expert_asks_for_titles_where_it_knows_them() -> None:
    environment = env(title_of={"2": "Ferries", "3": "The ferry"}.get)
    environment.reset(0, TASK)
    actions, step = play(environment)
    assert [action.text for _, action in actions[1:]] == [
        "when did the ferry sink",
        "Ferries",
        "The ferry",
        "how far is the moon",
        "Ann Lee; 1901; unknown",
    ]
    assert step.info["objectives_em"] == step.info["objectives_gold_found"] == [1.0, 1.0, 0.0]


def test_the_expert_goes_on_from_what_others_have_asked() -> None:
    environment = env()
    environment.reset(0, TASK)
    environment.step(Action("query", "The ferry"))
    environment.step(Action("query", "how far is the moon"))
    assert environment.expert_action().state == "2. 1901; 3. unknown; next 1"


def test_the_expert_writes_no_notes_in_a_format_without() -> None:
    environment = env(tags=FORMATS["chunks"])
    environment.reset(0, TASK)
    assert environment.expert_action() == ExpertAction("", Action("query", "who built the bridge"))


def test_random_actions_are_possible_and_end() -> None:
    environment = env()
    questions = {question.question.strip() for question in TASK.questions}
    words = set(" ".join(questions).split())
    turns = []
    for seed in range(200):
        rng, turn, step = random.Random(seed), 0, None
        environment.reset(0, TASK)
        while step is None or not step.terminated:
            state, action = environment.random_action(rng)
            assert state == "" and action.kind in ("query", "answer")
            if action.kind == "query":
                assert action.text in questions
            else:
                assert len(action.text.split("; ")) == 3 and {*action.text.split("; ")} <= words
            step, turn = environment.step(action), turn + 1
        turns.append(turn)
    assert 3 < sum(turns) / len(turns) < 5  # the mean of a geometric distribution: 4


def test_tasks_are_drawn_by_the_seed() -> None:
    tasks = [Question(f"{n}", f"what is {n}", (f"{n}",)) for n in range(10)]
    prompts = [RetrievalQAEnv(tasks, Retriever(), instruction="").reset(seed) for seed in range(100)]
    assert prompts == [RetrievalQAEnv(tasks, Retriever(), instruction="").reset(seed) for seed in range(100)]
    assert prompts[:3] == [f"\nQuestions:\n1. what is {n}\n" for n in (6, 2, 0)]
    assert len({*prompts}) == 10
    given = RetrievalQAEnv(tasks, Retriever(), instruction="").reset(0, tasks[3])
    assert given == "\nQuestions:\n1. what is 3\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "tasks: expected at least one"),
        ({"top_k": 0}, "top_k: expected a number >= 1, got 0"),
        ({"reward": "success"}, "reward: expected one of exact_match, f1, got 'success'"),
    ],
)
def test_arguments_out_of_range(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RetrievalQAEnv(**({"tasks": None, "retriever": Retriever()} | settings))


@pytest.mark.parametrize("task", [None, "who?", QuestionTask("t", ())])
def test_an_episode_needs_a_task(task: Any) -> None:
    with pytest.raises(InputError, match="task: expected a Question or a QuestionTask"):
        env().reset(0, task)
