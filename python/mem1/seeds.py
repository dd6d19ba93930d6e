"""Where every random number of a run comes from: the run's seed, what it is for, and its place.

Streams of different runs, purposes or places have nothing in common, and none depends on what was drawn
before it: a resumed run draws what the unbroken one would have drawn.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Purpose = Literal[
    "weights", "warm start", "training", "minibatches", "evaluation", "sampling", "group", "adapters"
]
_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
LARGEST = 2**53  # seeds are below: whole numbers that JSON and every language keep


def derive_seed(seed: int, purpose: Purpose, *place: int) -> int:
    """A seed in [0, 2**53) for one use: `place` counts within the purpose, as in (update, episode).

    Equivalent to:
        >>> sequence = numpy.random.SeedSequence(seed, spawn_key=(PURPOSES.index(purpose), *place))
        >>> sequence.generate_state(1, numpy.uint64)[0] % 2**53
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(_PURPOSES.index(purpose), *place))
    return int(sequence.generate_state(1, np.uint64)[0]) % LARGEST
