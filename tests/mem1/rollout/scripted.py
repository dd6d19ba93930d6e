"""An environment of no sense with an expert that writes every kind of action, and awkward texts."""

from __future__ import annotations

import random

from mem1.envs.base import Action, ExpertAction, Step
from mem1.parsing.tags import FOLD, MEM1, SUMMARY, TagFormat

TEXTS = [
    "the Rhine", "a < b > c </", "</I", "x</IS", "é日本\u2028語", "line\n\n", " blanks  ", ">>", "",
    "<query>twice", "<|im_end|> said", "42", "tail </info", "<answer> no </answe", "\ud7ff\uffff",
]  # fmt: skip
KINDS = {
    MEM1: ["query"],
    FOLD: ["query", "branch", "query", "return", "query"],
    SUMMARY: ["query", "query", "summary"],
}


class ScriptedEnv:
    """`turns` turns of the kinds of its format in order, then an answer; lengths and texts follow from the
    seed.
    """

    objectives = 1
    run_inline = True

    def __init__(self, format: TagFormat = MEM1, turns: tuple[int, int] = (4, 7), words: int = 12) -> None:
        self.format, self.turns, self.words = format, turns, words

    def reset(self, seed: int, task=None) -> str:
        self.rng, self.turn = random.Random(seed), 0
        self.last = self.rng.randint(*self.turns)
        return f"Question {seed}: {self.text()}?\n"

    def text(self) -> str:
        return " ".join(self.rng.choices(TEXTS, k=self.rng.randint(1, self.words)))

    def expert_action(self) -> ExpertAction:
        kinds = KINDS[self.format]
        kind = "answer" if self.turn >= self.last else kinds[self.turn % len(kinds)]
        self.turn += 1  # counted here: the loop answers some kinds itself
        return ExpertAction(self.text(), Action(kind, self.text()))

    def step(self, action: Action) -> Step:
        return Step(self.text(), 1.0, action.kind == "answer", info={"exact_match": 1.0, "f1": 1.0})
