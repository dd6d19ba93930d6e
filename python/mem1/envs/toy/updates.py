"""A world in which facts change while the agent reads them: the last value counts.

    prompt   write next until nothing found ; then answer these questions in order , a name each , later over
             before : ada boss ; bruno rival .
    turn 1   <IS> ada boss ; bruno rival </IS> <query> next </query>
             <info> found ada boss carla </info>
    turn 2   <IS> ada boss carla ; bruno rival </IS> <query> next </query>
             <info> found bruno rival emil ; dora boss max ; ada boss frank </info>
    turn 3   <IS> ada boss frank ; bruno rival emil </IS> <query> next </query>
             <info> nothing found </info>
    turn 4   <IS> ada boss frank ; bruno rival emil </IS> <answer> frank ; emil </answer>

Nothing can be looked up again, so the agent must know which of its notes a fact replaces, and which facts and
denials ("not ada boss leo") concern none of them.
"""

from __future__ import annotations

import random
from numbers import Real
from typing import Any

from mem1.checks import require
from mem1.envs.base import Action, ExpertAction, Step, require_running
from mem1.envs.toy.episodes import interval, padded, whole_number
from mem1.envs.toy.multihop import FOUND, NOTHING_FOUND
from mem1.envs.toy.multihop_questions import MAX_QUESTIONS
from mem1.envs.toy.words import NAMES, RELATIONS
from mem1.metrics import UNANSWERED, grade

NEXT = "next"
ANSWER = "answer these questions in order , a name each"
INSTRUCTION = f"write {NEXT} until {NOTHING_FOUND} ; then {ANSWER} , later over before :"
MALFORMED = f"malformed ; write {NEXT} , or {ANSWER}"
ANSWER_SHARE = 0.1  # of the actions of an agent that acts at random
MAX_NOISE = 0.9


class UpdatesEnv:
    """Answer `objectives` questions, a name and a relation each, after a stream of facts. A query, whatever
    it says (`next`, or the memory of a chunk reader), is answered with the next piece of the stream; an
    answer, a name per question, separated by `;`, ends the episode.

    The fact that answers a question is replaced `updates` times, each time by another name. Facts come in an
    order of their own, `facts_per_turn` in a turn. Among them stands noise: facts about somebody or something
    else, and denials of what nobody has said. noise: its share of all statements, 0 to 0.9; a range (least,
    most) is drawn from in every turn, so that the share changes with time. objectives, updates: a number or a
    range that each episode draws from, updates for each question. `passage_tokens` pads each piece of the
    stream with unrelated words to that many tokens.

    The reward, at the end, is the share of questions answered with the last name. Infos have `exact_match`,
    `f1` and `answers_miscounted`, and `outdated`: the questions that were answered with an earlier name.
    Raises InputError for an argument out of its range.
    """

    run_inline = True  # a rollout need not ask on a thread

    def __init__(
        self,
        objectives: int | tuple[int, int] = 2,
        updates: int | tuple[int, int] = (1, 3),
        noise: float | tuple[float, float] = 0.0,
        facts_per_turn: int = 2,
        passage_tokens: int = 0,
    ) -> None:
        self._objectives = interval("objectives", objectives, 1, MAX_QUESTIONS)
        self._updates = interval("updates", updates, 0, 8)
        self._noise = _shares(noise)
        self._facts_per_turn = whole_number("facts_per_turn", facts_per_turn, 1, 16)
        self.passage_tokens = whole_number("passage_tokens", passage_tokens, 0)
        self.objectives = self._objectives[1]
        self._running = False

    def reset(self, seed: int, task: Any = None) -> str:
        self._rng = rng = random.Random(seed)
        self.objectives = rng.randint(*self._objectives)
        heads = rng.sample(NAMES, self.objectives)
        self._questions = [(head, rng.choice(RELATIONS)) for head in heads]
        self._names = [self._draw_names() for _ in heads]
        # Who is named when: the questions of all facts, shuffled; those of one question keep their order.
        order = [i for i, names in enumerate(self._names) for _ in names]
        rng.shuffle(order)
        ahead = [iter(names) for names in self._names]
        self._stream = [(i, next(ahead[i])) for i in order]
        self._read = 0  # facts that the agent has been told
        self._told_end = False
        self._running = True
        return f"{INSTRUCTION} {' ; '.join(' '.join(question) for question in self._questions)} ."

    def step(self, action: Action) -> Step:
        require_running(self._running)
        if action.kind == "answer":
            self._running = False
            graded = grade(action.text, [[names[-1]] for names in self._names])
            outdated = grade(action.text, [[*{*names} - {names[-1]}] for names in self._names]).exact_match
            info = graded.info() | {"outdated": outdated}
            return Step("answered", graded.exact_match / self.objectives, True, info=info)
        said = self._piece() if action.kind == "query" else MALFORMED
        return Step(said, info={**UNANSWERED, "outdated": 0.0})

    @property
    def answers(self) -> list[str]:
        """The right answers, in the order of the questions."""
        return [names[-1] for names in self._names]

    def expert_action(self) -> ExpertAction:
        """Read to the end, noting the last name for each question; then answer."""
        last = dict(self._stream[: self._read])
        notes = " ; ".join(
            " ".join([*question, *([last[i]] if i in last else [])])
            for i, question in enumerate(self._questions)
        )
        answer = Action("answer", " ; ".join(self.answers))
        return ExpertAction(notes, answer if self._told_end else Action("query", NEXT))

    def random_action(self, rng: random.Random) -> ExpertAction:
        """The next piece, or now and then an answer of any names."""
        if rng.random() < ANSWER_SHARE:
            return ExpertAction("", Action("answer", " ; ".join(rng.choices(NAMES, k=self.objectives))))
        return ExpertAction("", Action("query", NEXT))

    def _draw_names(self) -> list[str]:
        """The names that answer a question one after the other; each differs from the one before."""
        names = [self._rng.choice(NAMES)]
        for _ in range(self._rng.randint(*self._updates)):
            names.append(self._rng.choice([name for name in NAMES if name != names[-1]]))
        return names

    def _piece(self) -> str:
        """The next facts of the stream, with noise between them."""
        facts = self._stream[self._read : self._read + self._facts_per_turn]
        if not facts:
            self._told_end = True
            return NOTHING_FOUND
        self._read += len(facts)
        said = [" ".join([*self._questions[i], name]) for i, name in facts]
        share = self._rng.uniform(*self._noise)
        for _ in facts:
            while self._rng.random() < share:
                said.insert(self._rng.randint(0, len(said)), self._distraction())
        return padded(f"{FOUND} {' ; '.join(said)}", self.passage_tokens, self._rng)

    def _distraction(self) -> str:
        """A statement that looks like an answer to a question and is none."""
        i = self._rng.randrange(self.objectives)
        name, relation = self._questions[i]
        what = self._rng.choice(("denial", "name", "relation"))
        if what == "denial":
            other = self._rng.choice([other for other in NAMES if other not in self._names[i]])
            return f"not {name} {relation} {other}"
        if what == "name":
            heads = {head for head, _ in self._questions}
            name = self._rng.choice([other for other in NAMES if other not in heads])
        else:
            relation = self._rng.choice([other for other in RELATIONS if other != relation])
        return f"{name} {relation} {self._rng.choice(NAMES)}"


def _shares(noise: float | tuple[float, float]) -> tuple[float, float]:
    ends = tuple(noise) if isinstance(noise, (tuple, list)) else (noise, noise)  # a list: of JSON
    fits = len(ends) == 2 and all(isinstance(end, Real) and not isinstance(end, bool) for end in ends)
    fits = fits and 0.0 <= ends[0] <= ends[1] <= MAX_NOISE
    require(fits, "noise", f"a share or a rising interval within 0..{MAX_NOISE}", noise)
    return ends
