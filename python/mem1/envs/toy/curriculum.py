"""What the warm start of the toy learns from, step by step."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from mem1.envs.base import Example
from mem1.envs.toy.auxiliary import copy_example, lookup_example
from mem1.envs.toy.expert import expert_example
from mem1.envs.toy.multihop import DEFAULT_OBJECTIVES, MultiHopEnv
from mem1_core.eviction_policies import EvictionPolicy


class Curriculum:
    """Draws an example: an auxiliary exercise, or an episode of the expert.

    The share of exercises falls linearly from `auxiliary_fraction` to a quarter of it, and the most
    questions of an episode grow from the least, plus 1, to the most over the first half of the warm start.

    ids: every word and tag -> its token id. environment: keyword arguments of `MultiHopEnv`.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        environment: dict[str, Any],
        prune: EvictionPolicy = "action",
        auxiliary_fraction: float = 0.4,
    ) -> None:
        self.ids, self.environment = ids, environment
        objectives = environment.get("objectives", DEFAULT_OBJECTIVES)
        self.objectives = (objectives, objectives) if isinstance(objectives, int) else objectives
        self.prune, self.auxiliary_fraction = prune, auxiliary_fraction

    def __call__(self, rng: random.Random, progress: float) -> Example:
        """The next example `progress` (0 to 1) of the way through the warm start."""
        if rng.random() < self.auxiliary_fraction * (1.0 - 0.75 * progress):
            return rng.choice((copy_example, lookup_example))(self.ids, rng)
        low, high = self.objectives
        reach = min(high, low + 1 + int((high - low) * min(1.0, 2.0 * progress)))
        environment = MultiHopEnv(**self.environment | {"objectives": (low, reach)})
        return expert_example(environment, rng.getrandbits(53), self.ids, self.prune)
