"""All that `mem1.train.train_loop.train` needs of the toy."""

from __future__ import annotations

from functools import partial
from typing import Any

from mem1.config import TrainConfig
from mem1.envs.toy.curriculum import Curriculum
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.tokenizer import build_tokenizer


def toy_training(config: TrainConfig) -> dict[str, Any]:
    """Arguments of `train` for a run in `MultiHopEnv(**config.environment)`. Raises
    InputError for an argument out of its range.
    """
    MultiHopEnv(**config.environment)
    tokenizer = build_tokenizer()
    return {
        "make_environment": partial(MultiHopEnv, **config.environment),
        "tokenizer": tokenizer,
        "draw_example": Curriculum(
            tokenizer.get_vocab(),
            config.environment,
            config.rollout.prune,
            config.warmstart.auxiliary_fraction,
            config.warmstart.growth,
        ),
    }
