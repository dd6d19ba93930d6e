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

_RANGES = ("objectives", "hops", "facts")


class Curriculum:
    """Draws an example: an auxiliary exercise, or an episode of the expert.

    Over the first `growth` (a share) of the steps the share of exercises falls from `auxiliary_fraction` to a
    quarter of it, they grow to their full length, and the ranges that an episode draws its objectives, hops
    and facts from grow from their least to their most.

    ids: every word and tag -> its token id. environment: keyword arguments of `MultiHopEnv`.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        environment: dict[str, Any],
        prune: EvictionPolicy = "action",
        auxiliary_fraction: float = 0.4,
        growth: float = 0.5,
    ) -> None:
        self.ids, self.environment = ids, {"objectives": DEFAULT_OBJECTIVES} | environment
        self.prune, self.auxiliary_fraction, self.growth = prune, auxiliary_fraction, growth

    def __call__(self, rng: random.Random, progress: float) -> Example:
        """The next example `progress` (0 to 1) of the way through the warm start."""
        grown = progress / self.growth if progress < self.growth else 1.0
        if rng.random() < self.auxiliary_fraction * (1.0 - 0.75 * grown):
            return rng.choice((copy_example, lookup_example, lookup_example))(self.ids, rng, grown)
        ranges = {
            name: (low, low + round(grown * (high - low)))
            for name in _RANGES
            if isinstance(ends := self.environment.get(name), (tuple, list))
            for low, high in [ends]
        }
        environment = MultiHopEnv(**self.environment | ranges)
        return expert_example(environment, rng.getrandbits(53), self.ids, self.prune)
