"""Questions with real passages as an environment for `mem1 rollout --environment passages:PassageEnv`, run in
this folder.

A query is answered with passages that support one of the questions, or with any others: what a retriever
would find costs the same tokens.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from mem1.envs.base import Action, Observation

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


class PassageEnv:
    """`objectives` questions of `data`/qa.jsonl an episode; `passages` of `data`/corpus.jsonl a query."""

    def __init__(self, data: str, objectives: int = 4, passages: int = 3) -> None:
        self.objectives, self.passages = objectives, passages
        self.rows, self.corpus = _lines(f"{data}/qa.jsonl"), _lines(f"{data}/corpus.jsonl")

    def reset(self, seed: int) -> str:
        self.rng = random.Random(seed)
        self.asked = self.rng.sample(self.rows, self.objectives)
        return INSTRUCTION + "".join(f"{n}. {row['question']}\n" for n, row in enumerate(self.asked, 1))

    def step(self, action: Action) -> Observation:
        support = self.rng.choice(self.asked)["support"][: self.passages]
        found = support + self.rng.sample(range(len(self.corpus)), self.passages - len(support))
        text = "\n".join(f"Doc {n}: {self.corpus[i]['contents']}" for n, i in enumerate(found, 1))
        return Observation(text, 0.0, action.kind == "answer")

    def score(self) -> dict[str, float]:
        return {"reward": 0.0, "exact_match": 0.0, "f1": 0.0}


@cache
def _lines(path: str) -> list[dict[str, Any]]:
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
