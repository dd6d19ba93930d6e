"""Questions with real passages as environments for `mem1 rollout --environment passages:PassageEnv`, run in
this folder: one without an end, for measurements, one with an expert and answers that count.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from mem1.envs.base import Action, ExpertAction, Step
from mem1.metrics import UNANSWERED, grade

INSTRUCTION = """\
You are given several questions and have to answer all of them. You work in turns, and after each turn
everything but your own notes is taken away from you, so your notes have to hold whatever you will still need.

In every turn first write your notes between <IS> and </IS>: the questions that are still open, what has been
found out for each of them, which of that is certain, and what you are going to do next. Keep them short. Do
not repeat what is no longer of any use, and never write down as a fact what no passage has said.

Then do one of two things. If something is missing, write one search query between <query> and </query>. A
search engine will answer between <info> and </info> with the passages that fit it best; read them in your
next turn, take into your notes what matters, and forget the rest. If you know all answers, write them between
<answer> and </answer>, in the order of the questions, separated by semicolons, each as short as it can be.

Questions:
"""

QUESTIONS = """\
Answer the questions. In each turn note between <IS> and </IS> what is known, then search with <query> or,
once all is known, write the answers with <answer>, separated by semicolons.
"""


class PassageEnv:
    """`objectives` questions of `data`/qa.jsonl an episode; `passages` of `data`/corpus.jsonl a query, which
    support one of the questions, or are any others: what a retriever would find costs the same tokens.
    """

    def __init__(self, data: str, objectives: int = 4, passages: int = 3) -> None:
        self.objectives, self.passages = objectives, passages
        self.rows, self.corpus = _lines(f"{data}/qa.jsonl"), _lines(f"{data}/corpus.jsonl")

    def reset(self, seed: int, task=None) -> str:
        self.rng = random.Random(seed)
        self.asked = self.rng.sample(self.rows, self.objectives)
        return INSTRUCTION + "".join(f"{n}. {row['question']}\n" for n, row in enumerate(self.asked, 1))

    def step(self, action: Action) -> Step:
        support = self.rng.choice(self.asked)["support"][: self.passages]
        found = support + self.rng.sample(range(len(self.corpus)), self.passages - len(support))
        text = "\n".join(f"Doc {n}: {self.corpus[i]['contents']}" for n, i in enumerate(found, 1))
        return Step(text, 0.0, action.kind == "answer")


class QuestionEnv:
    """Questions of `data`/qa.jsonl that one passage answers, and an expert who asks for each in turn.

    A query gets the passage of the question whose words it shares most of. episodes: how many there are,
    which come again for other seeds; None: any number.
    """

    def __init__(self, data: str, objectives: int = 2, episodes: int | None = None) -> None:
        self.objectives, self.episodes = objectives, episodes
        self.corpus = _lines(f"{data}/corpus.jsonl")
        self.rows = [row for row in _lines(f"{data}/qa.jsonl") if row["dataset"] == "nq"]

    def reset(self, seed: int, task=None) -> str:
        rng = random.Random(seed if self.episodes is None else seed % self.episodes)
        self.asked = rng.sample(self.rows, self.objectives)
        self.found: dict[int, str] = {}
        return QUESTIONS + "".join(f"{n}. {row['question']}?\n" for n, row in enumerate(self.asked, 1))

    def step(self, action: Action) -> Step:
        if action.kind == "answer":
            graded = grade(action.text, [row["golden_answers"] for row in self.asked])
            return Step("", graded.exact_match / self.objectives, True, info=graded.info())
        if action.kind != "query":
            return Step("Write <query> or <answer>.", info=UNANSWERED)
        words = set(action.text.lower().split())
        shared = [len(words & set(row["question"].lower().split())) for row in self.asked]
        n = max(range(len(shared)), key=shared.__getitem__)
        self.found[n] = self.asked[n]["golden_answers"][0]
        return Step(self.corpus[self.asked[n]["support"][0]]["contents"], info=UNANSWERED)

    def expert_action(self) -> ExpertAction:
        notes = [
            f"{n + 1}. {row['question']}: {self.found.get(n, 'open')}" for n, row in enumerate(self.asked)
        ]
        missing = [n for n in range(self.objectives) if n not in self.found]
        if missing:
            return ExpertAction("\n".join(notes), Action("query", self.asked[missing[0]]["question"]))
        return ExpertAction(
            "\n".join(notes), Action("answer", "; ".join(self.found[n] for n in range(self.objectives)))
        )


@cache
def _lines(path: str) -> list[dict[str, Any]]:
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
