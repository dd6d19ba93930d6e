"""Multi-hop questions, and the facts that answer them: "17 ada boss teacher" asks, as number 17, for ada's
boss's teacher.
"""

from __future__ import annotations

import random

from mem1.envs.toy.words import NAMES, NUMBERS, RELATIONS
from mem1.metrics import SEPARATOR, normalize_answer

MAX_QUESTIONS, MAX_HOPS = 32, 4
UNKNOWN = "nothing"  # the answer of a question that cannot be answered


class MultiHopQuestions:
    """`count` questions of as many relations as each draws from `hops` (least, most), and a fact for every
    name and relation. The facts that lead to the answers share nobody; all others are arbitrary. Questions
    are numbered from a number that is drawn, so that a few of them show all the numbers that many have.

    missing: share of the questions, drawn one by one, of which a fact that leads to the answer is nobody's:
    `look_up` finds None, and the answer is `UNKNOWN`.

    hasty: chance with which somebody who asks is content with a name that is found on the way.

    chains: for each question the name that it begins with and those met on the way, the answer last. known:
    for each the relations that have been looked up, in their order.
    """

    def __init__(
        self,
        rng: random.Random,
        count: int,
        hops: tuple[int, int],
        missing: float = 0.0,
        hasty: float = 0.0,
    ) -> None:
        names = rng.sample(NAMES, len(NAMES))
        heads, rest = names[:count], names[count:]
        self._relations = [rng.choices(RELATIONS, k=rng.randint(*hops)) for _ in heads]
        self.chains = [
            [head, *(rest.pop() for _ in relations)]
            for head, relations in zip(heads, self._relations, strict=True)
        ]
        first = rng.randint(0, len(NUMBERS) - count)
        self._numbers = NUMBERS[first : first + count]
        self._facts: dict[tuple[str, ...], str | None] = {
            (name, relation): rng.choice(NAMES) for name in NAMES for relation in RELATIONS
        }
        for chain, relations in zip(self.chains, self._relations, strict=True):
            self._facts.update(zip(zip(chain[:-1], relations, strict=True), chain[1:], strict=True))
        for chain, relations in zip(self.chains, self._relations, strict=True):
            if missing and rng.random() < missing:
                lost = rng.randrange(len(relations))
                self._facts[chain[lost], relations[lost]] = None
                chain[lost + 1 :] = [UNKNOWN]
        self.known = [0] * count
        self._enough = [len(chain) - 1 for chain in self.chains]  # relations to look up
        if hasty:
            self._enough = [
                next((hop for hop in range(1, most) if rng.random() < hasty), most) for most in self._enough
            ]

    @property
    def answers(self) -> list[str]:
        """The right answers, in the order of the questions."""
        return [chain[-1] for chain in self.chains]

    def unnumbered(self, text: str) -> str:
        """Answers without the numbers of their questions: a number is no part of an answer."""
        parts = text.split(SEPARATOR)
        for i, (part, number) in enumerate(zip(parts, self._numbers, strict=False)):
            first, *rest = part.split() or [""]
            if normalize_answer(first) == number:
                parts[i] = " ".join(rest)
        return SEPARATOR.join(parts)

    def text(self) -> str:
        """The questions, as a prompt has them."""
        questions = zip(self._numbers, self.chains, self._relations, strict=True)
        return " ; ".join(" ".join([number, chain[0], *relations]) for number, chain, relations in questions)

    def look_up(self, query: str) -> str | None:
        """Who stands in a relation to a name; None for a query that is not these two words, and for a fact
        that is missing.
        """
        words = tuple(query.split())
        for i in range(len(self.chains)):
            if words and words == self.pending(i):
                self.known[i] += 1
        return self._facts.get(words)

    def is_fact(self, query: str) -> bool:
        """Whether a query is a name and a relation."""
        return tuple(query.split()) in self._facts

    def statements(self, rng: random.Random, query: str, count: int) -> list[str]:
        """`count` facts in any order: the one that answers a query, unless it is missing, and others, of the
        same name, the same relation, or neither. Empty for a query that is not these two words.
        """
        if not self.is_fact(query):
            return []
        asked = tuple(query.split())
        told = [asked] if count and self._facts[asked] is not None else []
        while len(told) < count:
            name, relation = rng.choice(NAMES), rng.choice(RELATIONS)
            other = rng.choice(((asked[0], relation), (name, asked[1]), (name, relation)))
            if other not in told and self._facts[other] is not None:
                told.append(other)
        rng.shuffle(told)
        return [" ".join([*fact, str(self._facts[fact])]) for fact in told]

    def pending(self, i: int) -> tuple[str, ...]:
        """The name and relation that question `i` goes on with; empty once its answer is known, or taken for
        known.
        """
        known, chain = self.known[i], self.chains[i]
        return (chain[known], self._relations[i][known]) if known < self._enough[i] else ()

    def note(self, i: int) -> str:
        """Question `i` as far as it is known: a name that was found takes the place of the one before and of
        the relation between them.
        """
        known, chain = self.known[i], self.chains[i]
        return " ".join(
            [self._numbers[i], chain[known], *(self._relations[i][known:] if self.pending(i) else [])]
        )
