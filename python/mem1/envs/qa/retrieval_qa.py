"""Questions to be answered with the help of a retriever: multi-objective QA over a corpus.

prompt   Answer the questions below with the help of a search engine. ... 1. <question> 2. <question>
turn 1   <IS> next 1 </IS> <query> words </query>   <info> Doc 1(Title: "...") ... Doc 2 ... </info>
turn 2   <IS> 1. Oslo; next 2 </IS> <query> words </query>   <info> ... </info>
turn 3   <IS> 1. Oslo; 2. 1969 </IS> <answer> Oslo; 1969 </answer>
"""

from __future__ import annotations

import random
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal

from mem1.checks import InputError, require
from mem1.envs.base import ExpertAction, Step, require_running
from mem1.envs.qa.questions import Question, QuestionRow
from mem1.envs.search.retriever import Passage, Retriever, format_passages
from mem1.metrics import REWARDS, SEPARATOR, Grade, grade
from mem1.parsing.action import Action
from mem1.parsing.tags import MEM1, TagFormat

UNKNOWN = "unknown"  # what the expert answers where nothing was found


def default_instruction(tags: TagFormat) -> str:
    """What stands above the questions, in the tags of a format. InputError for one without queries or
    answers.
    """
    query, answer, info = _tag(tags, "query"), _tag(tags, "answer"), tags.observation
    notes = (
        f"In each turn first write your notes between <{tags.state}> and </{tags.state}>: what is known "
        "about each question, what is still open, and what to search for next. The next turn sees these "
        "notes and what the last search has found, and perhaps nothing else."
    )
    paragraphs = [
        "Answer the questions below with the help of a search engine. You work in turns.",
        *([notes] if tags.state else []),
        f"As long as an answer is missing, write one query, about one question, between <{query}> and "
        f"</{query}>. The passages that fit it best come back between <{info}> and </{info}>.",
        f"Once all answers are known, write them between <{answer}> and </{answer}>: in the order of the "
        "questions, separated by semicolons, each as short as possible and without an explanation, as in "
        f"<{answer}> Oslo; 1969 </{answer}>.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _tag(tags: TagFormat, kind: str) -> str:
    action = tags.action(kind)
    if action is None:
        raise InputError(f"tags: expected an action of kind {kind!r}, got {', '.join(tags.tags)}")
    return action.tag


class RetrievalQAEnv:
    """Answer the questions of a task; each query gets the `top_k` passages that fit it best.

    tasks: what an episode that is given no task draws from, by its seed; None: each must be given one.
    instruction: what stands above the questions, by default `default_instruction(tags)`. strict: a wrong
    number of answers makes all of them wrong. reward: what an answer is paid by, "exact_match" or "f1", over
    the number of objectives. title_of: the title of a passage by its id, for the expert.

    Calls are made again after the errors that the retriever calls `retryable`, by default OSErrors. Where
    `retriever.search` gives an awaitable, so does `step`. `Step.info` has the metrics of
    `mem1.metrics.Grade`, those of no answer before the end; `gold_found`, the number of objectives of which a
    passage that supports it has been shown; and of each objective, as lists, `objectives_em`, `objectives_f1`
    and `objectives_gold_found`. Raises InputError for an argument out of its range.
    """

    def __init__(
        self,
        tasks: Sequence[QuestionRow] | None,
        retriever: Retriever,
        top_k: int = 3,
        instruction: str | None = None,
        *,
        strict: bool = False,
        reward: Literal["exact_match", "f1"] = "exact_match",
        tags: TagFormat = MEM1,
        title_of: Callable[[str], str | None] | None = None,
    ) -> None:
        require(tasks is None or len(tasks) > 0, "tasks", "at least one, or None", tasks)
        require(isinstance(top_k, int) and top_k >= 1, "top_k", "a number >= 1", top_k)
        require(reward in REWARDS, "reward", f"one of {', '.join(REWARDS)}", reward)
        self._tasks, self._retriever, self._top_k = tasks, retriever, top_k
        self.retryable = getattr(retriever, "retryable", (OSError,))
        self._instruction = default_instruction(tags) if instruction is None else instruction
        query, answer = _tag(tags, "query"), _tag(tags, "answer")
        self._hint = (
            f"Nothing was done. Write a query between <{query}> and </{query}>, or all answers between "
            f"<{answer}> and </{answer}>."
        )
        self._strict, self._reward, self._title_of = strict, reward, title_of
        self._takes_notes = tags.state is not None
        self._running = False
        self._begin(())

    def _begin(self, questions: tuple[Question, ...]) -> None:
        self._questions = questions
        self._grade = Grade((0.0,) * len(questions), (0.0,) * len(questions), answers_miscounted=True)
        self._gold_found = [False] * len(questions)
        self._asked: set[str] = set()

    @property
    def objectives(self) -> int:
        """The number of questions of the current episode; 1 before the first."""
        return max(1, len(self._questions))

    def reset(self, seed: int, task: QuestionRow | None = None) -> str:
        """Start an episode with `task`, or one of `tasks` that follows from `seed`; return the prompt."""
        if task is None and self._tasks is not None:
            task = self._tasks[random.Random(seed).randrange(len(self._tasks))]
        questions = (task,) if isinstance(task, Question) else getattr(task, "questions", ())
        require(len(questions) > 0, "task", "a Question or a QuestionTask", task)
        self._begin(questions)
        self._running = True
        lines = [f"{number}. {question.question}" for number, question in enumerate(questions, 1)]
        return "\n".join([self._instruction, "Questions:", *lines, ""])

    def step(self, action: Action) -> Step | Coroutine[Any, Any, Step]:
        """Search, or end the episode with the answers; all else changes nothing and is answered by a hint."""
        require_running(self._running)
        text = action.text.strip()
        if action.kind == "answer":
            return self._answered(text)
        if action.kind != "query" or not text:
            return Step(self._hint, info=self._info() | {"invalid_action": True})
        found = self._retriever.search([text], self._top_k)
        if isinstance(found, Awaitable):
            return self._awaited(text, found)
        return self._found(text, found[0])

    async def _awaited(self, query: str, found: Awaitable[list[list[Passage]]]) -> Step:
        return self._found(query, (await found)[0])

    def _found(self, query: str, passages: Sequence[Passage]) -> Step:
        self._asked.add(query)
        shown = {passage.id for passage in passages}
        for place, question in enumerate(self._questions):
            self._gold_found[place] |= not shown.isdisjoint(question.support)
        return Step(format_passages(passages), info=self._info())

    def _answered(self, answer: str) -> Step:
        self._grade = grade(answer, [question.answers for question in self._questions], strict=self._strict)
        self._running = False
        reward = getattr(self._grade, self._reward) / len(self._questions)
        return Step("", reward, terminated=True, info=self._info())

    def _info(self) -> dict[str, Any]:
        return {
            **self._grade.info(),
            "gold_found": float(sum(self._gold_found)),
            **self._grade.by_objective(),
            "objectives_gold_found": [float(found) for found in self._gold_found],
        }

    def expert_action(self) -> ExpertAction:
        """Ask each question in turn, word for word; then, with `title_of`, for the titles of the passages
        that support it. Once one of these has been shown, the answer is known; where none was found,
        it is "unknown".
        """
        left = [self._queries_left(place) for place in range(len(self._questions))]
        answers = [self._golden(place) if found else UNKNOWN for place, found in enumerate(self._gold_found)]
        notes = [f"{place}. {answer}" for place, answer in enumerate(answers, 1) if not left[place - 1]]
        following = next((place for place, queries in enumerate(left) if queries), None)
        if following is None:
            action = Action("answer", f"{SEPARATOR} ".join(answers))
        else:
            notes.append(f"next {following + 1}")
            action = Action("query", left[following][0])
        return ExpertAction(f"{SEPARATOR} ".join(notes) if self._takes_notes else "", action)

    def _queries_left(self, place: int) -> list[str]:
        """What the expert may still ask about an objective."""
        question, queries = self._questions[place], []
        if not self._gold_found[place]:
            titles = [] if self._title_of is None else [self._title_of(name) for name in question.support]
            queries = [text.strip() for text in (question.question, *titles) if text and text.strip()]
        return [query for query in queries if query not in self._asked]

    def _golden(self, place: int) -> str:
        """A golden answer that can stand among others."""
        answers = self._questions[place].answers
        return next((answer for answer in answers if SEPARATOR not in answer), answers[0])

    def random_action(self, rng: random.Random) -> ExpertAction:
        """Ask one of the questions or, as likely as each of them, answer all with words of theirs."""
        choice = rng.randrange(len(self._questions) + 1)
        if choice < len(self._questions):
            return ExpertAction("", Action("query", self._questions[choice].question.strip()))
        words = re.findall(r"\w+", " ".join(question.question for question in self._questions)) or [UNKNOWN]
        return ExpertAction("", Action("answer", f"{SEPARATOR} ".join(rng.choices(words, k=self.objectives))))
