"""A world whose rewards are late and uncertain: questions are answered one at a time, and paid for later.

    prompt   answer these questions in order , one at a time , a name each : 17 ada boss ; 18 bruno rival .
    turn 1   <IS> 17 ada boss </IS> <query> ada boss </query>                     <info> found carla </info>
    turn 2   <IS> 17 carla </IS> <answer> carla </answer>                         <info> answered </info>
    turn 3   <IS> 17 carla ; 18 bruno rival </IS> <query> bruno rival </query>    <info> found emil </info>
                                                                                  reward of the first question
    turn 4   <IS> 17 carla ; 18 emil </IS> <answer> emil </answer>                reward of the second

What an answer has earned comes some turns later, whatever the policy does then, and is more or less than the
answer is worth. The expert's `<IS>` lists the questions met so far, each as far as it is known.
"""

from __future__ import annotations

import random
from math import fsum
from typing import Any

from mem1.envs.base import Action, ExpertAction, Step, require_running
from mem1.envs.toy.episodes import interval, padded, share, whole_number
from mem1.envs.toy.multihop import FOUND, MALFORMED, NOTHING_FOUND
from mem1.envs.toy.multihop_questions import MAX_HOPS, MAX_QUESTIONS, MultiHopQuestions
from mem1.envs.toy.words import NAMES, RELATIONS
from mem1.metrics import SEPARATOR, UNANSWERED, exact_match, grade

INSTRUCTION = "answer these questions in order , one at a time , a name each :"
ANSWER_SHARE = 0.3  # of the actions of an agent that acts at random
MAX_DELAY = 100


class DelayedRewardEnv:
    """Answer `objectives` questions of `hops` relations one after the other; per turn one query, a name and a
    relation, or one answer. The answer to the last question ends the episode; an answer with several names,
    separated by `;`, answers as many questions.

    Each right answer earns 1 / objectives times a factor, drawn evenly from 1 - spread to 1 + spread, and is
    paid `delay` turns later, at the latest when the last question is answered. So all rewards of an episode
    add up to what was earned, from 0 to 1 + spread, and on average to the share of right answers. delay: a
    number of turns or a range; delays and factors are drawn with the episode, for each question, whatever the
    policy does. An episode that is cut off by a limit of turns loses what has not been paid.

    objectives, hops: a number or a range (least, most) that each episode draws from. `passage_tokens` pads
    each answer to a query with unrelated words to that many tokens.

    Infos have `exact_match`, `f1` and `answers_miscounted` of the answers so far, and `outstanding`: rewards
    that have been earned and not been paid. Raises InputError for an argument out of its range.
    """

    run_inline = True  # a rollout need not ask on a thread

    def __init__(
        self,
        objectives: int | tuple[int, int] = 2,
        hops: int | tuple[int, int] = 1,
        delay: int | tuple[int, int] = (1, 4),
        spread: float = 0.5,
        passage_tokens: int = 0,
    ) -> None:
        self._objectives = interval("objectives", objectives, 1, MAX_QUESTIONS)
        self._hops = interval("hops", hops, 1, MAX_HOPS)
        self._delay = interval("delay", delay, 0, MAX_DELAY)
        self._spread = share("spread", spread)
        self.passage_tokens = whole_number("passage_tokens", passage_tokens, 0)
        self.objectives = self._objectives[1]
        self._running = False

    def reset(self, seed: int, task: Any = None) -> str:
        self._rng = rng = random.Random(seed)
        self.objectives = rng.randint(*self._objectives)
        self._questions = MultiHopQuestions(rng, self.objectives, self._hops)
        worth = 1.0 / self.objectives
        self._payments = [
            (rng.randint(*self._delay), worth * rng.uniform(1.0 - self._spread, 1.0 + self._spread))
            for _ in range(self.objectives)
        ]
        self._answered: list[str] = []
        self._score = UNANSWERED
        self._due: list[tuple[int, float]] = []  # turns, and what is paid then
        self._turn = 0
        self._running = True
        return f"{INSTRUCTION} {self._questions.text()} ."

    def step(self, action: Action) -> Step:
        require_running(self._running)
        self._turn += 1
        said = MALFORMED
        if action.kind == "answer":
            said = "answered"
            self._take(action.text)
        elif action.kind == "query":
            said = self._look_up(action.text)
        self._running = len(self._answered) < self.objectives
        paid = [amount for turn, amount in self._due if turn <= self._turn or not self._running]
        self._due = [(turn, amount) for turn, amount in self._due if turn > self._turn and self._running]
        info = {**self._score, "outstanding": fsum(amount for _, amount in self._due)}
        return Step(said, fsum(paid), not self._running, info=info)

    @property
    def answers(self) -> list[str]:
        """The right answers, in the order of the questions."""
        return self._questions.answers

    def expert_action(self) -> ExpertAction:
        """Ask hop after hop of the first question that is not answered; then answer it."""
        i = len(self._answered)
        notes = " ; ".join(self._questions.note(question) for question in range(i + 1))
        pending = self._questions.pending(i)
        action = Action("query", " ".join(pending)) if pending else Action("answer", self.answers[i])
        return ExpertAction(notes, action)

    def random_action(self, rng: random.Random) -> ExpertAction:
        """A look-up of any name and relation, or now and then any name as an answer."""
        if rng.random() < ANSWER_SHARE:
            return ExpertAction("", Action("answer", rng.choice(NAMES)))
        return ExpertAction("", Action("query", f"{rng.choice(NAMES)} {rng.choice(RELATIONS)}"))

    def _look_up(self, query: str) -> str:
        found = self._questions.look_up(query)
        if found is None:
            return NOTHING_FOUND
        return padded(f"{FOUND} {found}", self.passage_tokens, self._rng)

    def _take(self, answer: str) -> None:
        """Answer as many questions as there are parts; what the right ones have earned is due later."""
        first = len(self._answered)
        self._answered += answer.split(SEPARATOR)
        self._score = grade(SEPARATOR.join(self._answered), [[right] for right in self.answers]).info()
        for i, given in enumerate(self._answered[first : self.objectives], first):
            delay, amount = self._payments[i]
            if exact_match(given, [self.answers[i]]):
                self._due.append((self._turn + delay, amount))
