"""Multi-hop questions, and the facts that answer them: "ada boss teacher" asks for ada's boss's teacher."""

from __future__ import annotations

import random

from mem1.envs.toy.words import NAMES, RELATIONS


class MultiHopQuestions:
    """`count` questions of as many relations as each draws from `hops` (least, most), and a fact for every
    name and relation. The facts that lead to the answers share nobody; all others are arbitrary.

    chains: for each question the name that it begins with and those met on the way, the answer last. known:
    for each the relations that have been looked up, in their order.
    """

    def __init__(self, rng: random.Random, count: int, hops: tuple[int, int]) -> None:
        names = rng.sample(NAMES, len(NAMES))
        heads, rest = names[:count], names[count:]
        self._relations = [rng.choices(RELATIONS, k=rng.randint(*hops)) for _ in heads]
        self.chains = [
            [head, *(rest.pop() for _ in relations)]
            for head, relations in zip(heads, self._relations, strict=True)
        ]
        self._facts = {(name, relation): rng.choice(NAMES) for name in NAMES for relation in RELATIONS}
        for chain, relations in zip(self.chains, self._relations, strict=True):
            self._facts.update(zip(zip(chain[:-1], relations, strict=True), chain[1:], strict=True))
        self.known = [0] * count

    @property
    def answers(self) -> list[str]:
        """The right answers, in the order of the questions."""
        return [chain[-1] for chain in self.chains]

    def text(self) -> str:
        """The questions, as a prompt has them."""
        pairs = zip(self.chains, self._relations, strict=True)
        return " ; ".join(" ".join([chain[0], *relations]) for chain, relations in pairs)

    def look_up(self, query: str) -> str | None:
        """Who stands in a relation to a name; None for a query that is not these two words."""
        words = query.split()
        found = self._facts.get((words[0], words[1])) if len(words) == 2 else None
        for i in range(len(self.chains)):
            if found is not None and words == self.pending(i):
                self.known[i] += 1
        return found

    def pending(self, i: int) -> list[str]:
        """The name and relation that question `i` goes on with; empty once its answer is known."""
        known, relations = self.known[i], self._relations[i]
        return [self.chains[i][known], relations[known]] if known < len(relations) else []

    def note(self, i: int) -> str:
        """Question `i` as far as it is known: a name that was found takes the place of the relations it
        answers.
        """
        known, chain = self.known[i], self.chains[i]
        return " ".join([chain[0], *([chain[known]] if known else []), *self._relations[i][known:]])
