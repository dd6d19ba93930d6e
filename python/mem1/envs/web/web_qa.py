"""Questions that are answered with a search engine and the pages of the web."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from mem1.checks import InputError, require
from mem1.envs.base import ExpertAction, Step, require_running
from mem1.envs.web.page_fetch import PageFetcher
from mem1.envs.web.page_text import clean
from mem1.envs.web.search_reply import WebResult, format_reply
from mem1.envs.web.serper import QueryRefused, SerperClient
from mem1.envs.web.url_rules import FetchError
from mem1.metrics import REWARDS, SEPARATOR, UNANSWERED, grade
from mem1.parsing.action import Action
from mem1.parsing.tags import MEM1, TagFormat


def instruction(tags: TagFormat) -> str:
    """What to do, with the tags of a format. InputError for one without a query and an answer."""
    names = [getattr(tags.action(kind), "tag", None) for kind in ("query", "answer")]
    require(None not in names, "tags", "actions of kind 'query' and 'answer'", ", ".join(tags.tags))
    query, answer = names
    notes = "" if tags.state is None else f" In each turn first note in <{tags.state}> what you still need."
    return (
        f"Answer the questions below with what you find on the web.{notes} Then write <{query}>: words "
        f"search the web, a URL reads that page; or, once all is known, <{answer}>: all answers at once, "
        "briefly, in their order, separated by ';'."
    )


INSTRUCTION = instruction(MEM1)
MALFORMED = "malformed: expected a query, words to search for or a URL, or an answer"


class _Objective(NamedTuple):
    """A question and the answers that are right."""

    question: str
    answers: tuple[str, ...]


class WebQAEnv:
    """Answer the questions of a task; each query searches the web or reads a page of it.

    A task is an object with `questions`, each of which has `question` and `answers`; or one such question; or
    a mapping with "question" and "golden_answers", a text and its list of answers or lists of both.

    A query that begins with http:// or https:// reads that page, any other is searched for. What the policy's
    own words lead to (a page that is not there, an address that is refused) is told in the observation. A
    search API that fails raises a SearchError; an outage is an OSError as well, after which a rollout asks
    again. The reward is the share of questions answered exactly, or with reward="f1" the mean F1. strict: a
    wrong number of answers makes all of them wrong. The last info has `objectives_em` and `objectives_f1`, of
    each question.

    search and pages may serve many environments side by side; with `owns_clients` they are closed by `close`.
    num_results: of a search.
    """

    def __init__(
        self,
        search: SerperClient,
        pages: PageFetcher,
        *,
        num_results: int = 10,
        strict: bool = False,
        reward: Literal["exact_match", "f1"] = "exact_match",
        owns_clients: bool = False,
        tags: TagFormat = MEM1,
    ) -> None:
        self._instruction = instruction(tags)
        require(1 <= num_results <= 100, "num_results", "a number from 1 to 100", num_results)
        require(reward in REWARDS, "reward", f"one of {', '.join(REWARDS)}", reward)
        self.objectives = 1
        self._strict, self._reward = strict, reward
        self._search, self._pages = search, pages
        self._num_results, self._owns_clients = num_results, owns_clients
        self._task: tuple[_Objective, ...] = ()
        self._running = False
        self._seen: tuple[WebResult, ...] = ()  # found by the last search

    def reset(self, seed: int, task: Any = None) -> str:
        """Start with the questions of `task`; nothing depends on `seed`. Raises InputError for a task that is
        none.
        """
        self._task, self._seen, self._running = _objectives(task), (), True
        self.objectives = len(self._task)
        questions = [f"{number}. {each.question}" for number, each in enumerate(self._task, 1)]
        return "\n".join([self._instruction, *questions])

    async def step(self, action: Action) -> Step:
        """Search, read or grade. Raises SearchError where the search API fails, RuntimeError if there is no
        running episode.
        """
        require_running(self._running)
        if action.kind == "answer":
            self._running = False
            graded = grade(action.text, [each.answers for each in self._task], strict=self._strict)
            reward = getattr(graded, self._reward) / self.objectives
            return Step("answered", reward, True, info=graded.info() | graded.by_objective())
        words = clean(action.text).split()
        if action.kind != "query" or not words:
            return Step(MALFORMED, info={**UNANSWERED, "invalid_action": True})
        reads = words[0].lower().startswith(("http://", "https://"))
        said = await self._read(words[0]) if reads else await self._find(" ".join(words))
        return Step(said, info=UNANSWERED)

    def random_action(self, rng: random.Random) -> ExpertAction:
        """A search for one of the questions, a page that was found, or now and then an answer of titles."""
        if rng.random() < 0.1:
            titles = [result.title for result in self._seen if result.title] or ["unknown"]
            answer = f"{SEPARATOR} ".join(rng.choice(titles) for _ in self._task)
            return ExpertAction("", Action("answer", answer))
        queries = [each.question for each in self._task] + [result.url for result in self._seen if result.url]
        return ExpertAction("", Action("query", rng.choice(queries)))

    async def close(self) -> None:
        """Close `search` and `pages`, if they are this environment's own."""
        if self._owns_clients:
            await self._search.close()
            self._pages.close()

    async def _find(self, query: str) -> str:
        try:
            reply = await self._search.search(query, self._num_results)
        except QueryRefused as error:
            return f"search failed: {error}"
        self._seen = reply.results
        return format_reply(reply)

    async def _read(self, url: str) -> str:
        try:
            return (await self._pages.fetch(url)).text
        except FetchError as error:
            return f"page not read: {error.reason}"


def _objectives(task: Any) -> tuple[_Objective, ...]:
    if isinstance(task, Mapping):
        questions, answers = task.get("question"), task.get("golden_answers")
        pairs = [(questions, answers)]
        if isinstance(questions, (list, tuple)) and isinstance(answers, (list, tuple)):
            require(len(questions) == len(answers), "task", "golden_answers for each question", task)
            pairs = list(zip(questions, answers, strict=True))
    else:
        rows = getattr(task, "questions", (task,))
        require(isinstance(rows, (list, tuple)), "task", "a list of questions", rows)
        pairs = [(getattr(row, "question", None), getattr(row, "answers", None)) for row in rows]
    require(len(pairs) > 0, "task", "at least one question", task)
    return tuple(_objective(question, answers) for question, answers in pairs)


def _objective(question: Any, answers: Any) -> _Objective:
    texts = isinstance(answers, (list, tuple)) and all(isinstance(answer, str) for answer in answers)
    if not (isinstance(question, str) and question.strip() and texts and answers):
        got = f"{question!r:.200} and {answers!r:.200}"
        raise InputError(f"task: expected a question with a list of right answers, got {got}")
    return _Objective(question.strip(), tuple(answers))
