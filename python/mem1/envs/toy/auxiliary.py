"""Two exercises in what small decoders find hardest, copying and looking up.

    copy    copy : dora leo max . <answer> dora leo max </answer>
    lookup  lookup : 17 dora ; 18 max boss ; 19 rosa friend coach . after much 18 [max boss] 17 [dora] ...

In a look-up the bracketed words are the policy's; each key before them is named by the environment. Keys are
numbers that follow one another, as those of questions do, names and numbers in no order, or a name and a
relation each; unrelated words stand between the list and the first key.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from mem1.envs.base import Example
from mem1.envs.toy.words import FILLER, NAMES, NUMBERS, RELATIONS
from mem1_core.segments import Segment

WORDS = 8, 32  # of a copy at most, at the start and at last
PAIRS = 8, 32  # of a look-up
GAP = 0, 256  # words between a list and what is asked of it
MAX_KEYS = 16  # that are asked for

_ENTITIES = NAMES + NUMBERS


def copy_example(ids: Mapping[str, int], rng: random.Random, grown: float = 1.0) -> Example:
    """Repeat 2 or more different names and numbers. `ids` maps every word and tag to its token id. grown: 0
    for an easy one, 1 for any.
    """
    words = rng.sample(_ENTITIES, rng.randint(2, _most(WORDS, grown)))
    prompt = ["copy", ":", *words, "."]
    answer = ["<answer>", *words, "</answer>"]
    segments = [Segment("prompt", 0, len(prompt)), Segment("answer", 1, len(answer))]
    return Example([ids[word] for word in prompt + answer], segments, "never")


def lookup_example(ids: Mapping[str, int], rng: random.Random, grown: float = 1.0) -> Example:
    """Say what stands beside keys of a list of 2 or more, asked for in a new order."""
    count = rng.randint(2, _most(PAIRS, grown))
    pairs = rng.choice((_questions, _entities, _facts))(rng, count)
    listed = " ; ".join(f"{key} {value}" for key, value in pairs)
    gap = rng.choices(FILLER, k=int((_most(GAP, grown) + 1) ** rng.random()) - 1)
    words, segments = ["lookup", ":", *listed.split(), ".", *gap], list[Segment]()
    asked = rng.sample(pairs, min(count, MAX_KEYS))
    for turn, (key, value) in enumerate(asked, start=1):
        key_words, value_words = key.split(), value.split()
        words += [*key_words, *value_words]
        segments += [
            Segment("info", turn - 1, len(key_words))
            if segments
            else Segment("prompt", 0, len(words) - len(value_words)),
            Segment("answer", turn, len(value_words)),
        ]
    return Example([ids[word] for word in words], segments, "never")


_Pairs = list[tuple[str, str]]  # of keys and values


def _questions(rng: random.Random, count: int) -> _Pairs:
    """By number, as a prompt has them."""
    first = rng.randint(0, len(NUMBERS) - count)
    names = rng.sample(NAMES, count)
    return [
        (number, " ".join([name, *rng.choices(RELATIONS, k=rng.randint(0, 2))]))
        for number, name in zip(NUMBERS[first : first + count], names, strict=True)
    ]


def _entities(rng: random.Random, count: int) -> _Pairs:
    """Names and numbers in no order, so that these are told apart before they are counted."""
    drawn = rng.sample(_ENTITIES, 2 * count)
    return list(zip(drawn[:count], drawn[count:], strict=True))


def _facts(rng: random.Random, count: int) -> _Pairs:
    """By name and relation, many with one or the other in common."""
    names = rng.sample(NAMES, 1 + count // 3)
    keys = rng.sample([f"{name} {relation}" for name in names for relation in RELATIONS], count)
    return [(key, rng.choice(NAMES)) for key in keys]


def _most(ends: tuple[int, int], grown: float) -> int:
    return ends[0] + round(grown * (ends[1] - ends[0]))
