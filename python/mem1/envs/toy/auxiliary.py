"""Two exercises in what small decoders find hardest, copying and looking up.

    copy    copy : dora leo max . <answer> dora leo max </answer>
    lookup  lookup : dora leo ; max ivan ; rosa cyril . max [ivan] dora [leo]

In a look-up the bracketed words are the policy's; each word before one is named by the environment.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from mem1.envs.base import Example
from mem1.envs.toy.words import NAMES
from mem1_core.segments import Segment

MAX_WORDS = 12  # of a copy
MAX_PAIRS = 8  # of a look-up


def copy_example(ids: Mapping[str, int], rng: random.Random) -> Example:
    """Repeat 2 to `MAX_WORDS` different names. `ids` maps every word and tag to its token id."""
    words = rng.sample(NAMES, rng.randint(2, MAX_WORDS))
    prompt = ["copy", ":", *words, "."]
    answer = ["<answer>", *words, "</answer>"]
    segments = [Segment("prompt", 0, len(prompt)), Segment("answer", 1, len(answer))]
    return Example([ids[word] for word in prompt + answer], segments, "never")


def lookup_example(ids: Mapping[str, int], rng: random.Random) -> Example:
    """Say which name stands beside each of 2 to `MAX_PAIRS` names, asked for in a new order."""
    count = rng.randint(2, MAX_PAIRS)
    names = rng.sample(NAMES, 2 * count)
    pairs = list(zip(names[:count], names[count:], strict=True))
    words = ["lookup", ":", *" ; ".join(f"{key} {value}" for key, value in pairs).split(), "."]
    rng.shuffle(pairs)
    segments = [Segment("prompt", 0, len(words) + 1)]
    for turn, (key, value) in enumerate(pairs, start=1):
        words += [key, value]
        segments += [Segment("answer", turn, 1), Segment("info", turn, 1)]
    return Example([ids[word] for word in words], segments[:-1], "never")
