"""A memory outside of the context: notes with keywords and links, found again by BM25.

After A-MEM (arXiv 2502.12110), where a language model writes keywords and links; here keywords are the rarest
words of a note, and links lead to the notes that are most like it, so that no other model takes part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any, NamedTuple

import bm25s

from mem1.envs.base import Action, Environment, Step
from mem1.envs.search.bm25 import split_words

_KEYWORDS = 5  # of a note
_LINKS = 2
_NEXT = " | "  # between notes


class Note(NamedTuple):
    text: str
    keywords: tuple[str, ...]
    links: tuple[int, ...]  # places of earlier notes


class Notes:
    """The notes of one episode, some dozens: their index is made afresh with each."""

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self._words: list[list[str]] = []  # of each, its keywords twice
        self._index: Any = None

    def add(self, text: str) -> None:
        """A note on what was asked and found."""
        links = tuple(self.search(text, _LINKS))
        words = split_words(text)
        holders = Counter(word for known in self._words for word in set(known))
        keywords = sorted(dict.fromkeys(words), key=lambda word: (holders[word], -len(word)))[:_KEYWORDS]
        self.notes.append(Note(text, tuple(keywords), links))
        self._words.append(words + keywords)
        self._index = None

    def search(self, query: str, count: int) -> list[int]:
        """Places of at most `count` notes that have a word of the query, the best first."""
        words = split_words(query)
        if not words or not any(self._words):
            return []
        if self._index is None:
            self._index = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
            self._index.index(self._words, create_empty_token=False, show_progress=False)
        scores = self._index.get_scores_from_ids(self._index.get_tokens_ids(words)).tolist()
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        return [place for place in order if scores[place] > 0][:count]

    def recall(self, query: str, count: int) -> list[Note]:
        """At most `count` notes: those that fit best, then those that these are linked with."""
        best = self.search(query, count)
        linked = [place for found in best for place in self.notes[found].links]
        return [self.notes[place] for place in dict.fromkeys([*best, *linked])][:count]


class MemoryEnvironment:
    """`environment` with a memory: behind each observation stand the `count` notes that fit the action best,
    then what was just found becomes a note itself. cut: what a policy would see of a text.
    """

    def __init__(self, environment: Environment, count: int, cut: Callable[[str], str]) -> None:
        self._environment, self._count, self._cut = environment, count, cut
        self._notes = Notes()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    def reset(self, seed: int, task: Any = None) -> str | Awaitable[str]:
        self._notes = Notes()
        return self._environment.reset(seed, task)

    def step(self, action: Action) -> Step | Awaitable[Step]:
        given = self._environment.step(action)
        return self._later(action, given) if isawaitable(given) else self._remembered(action, given)

    async def _later(self, action: Action, given: Awaitable[Step]) -> Step:
        return self._remembered(action, await given)

    def _remembered(self, action: Action, given: Step) -> Step:
        if not isinstance(given, tuple) or len(given) != 5:
            return given  # no step: the loop says so
        step = Step(*given)
        over = step.terminated or step.truncated or action.kind == "malformed"
        if over or not isinstance(step.observation, str):
            return step
        recalled = [note.text for note in self._notes.recall(action.text, self._count)]
        seen = self._cut(step.observation)
        self._notes.add(self._cut(f"{action.text} {seen}"))
        return step._replace(observation=_NEXT.join([seen, *recalled]))
