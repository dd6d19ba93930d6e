"""What the loop asks of an environment: text in, text out, rewards at any step.

    observation = environment.reset(seed, task)
    observation, reward, terminated, truncated, info = environment.step(action)

An environment never sees tokens. The loop reads actions from what the policy wrote, and from nothing else: a
tag that occurs in an environment's text is only a word.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from mem1.parsing.action import Action
from mem1_core.eviction_policies import EvictionPolicy
from mem1_core.segments import Segment

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Step(NamedTuple):
    """What comes of an action; any tuple of five in this order will do.

    observation: goes into `<info>`, without its tags; nobody reads that of the last step. reward: of this
    step; those of an episode are added up, and each counts for the last token that the policy wrote before
    it. terminated: the task is over. truncated: it is not, but goes on no further. info: numbers, which go to
    `Trajectory.score` under their names (the latest of each counts), and all else,
    which goes to `Trajectory.notes`; a true `invalid_action` counts the action in
    `Trajectory.invalid_actions`.
    """

    observation: str
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = NOTHING


class ExpertAction(NamedTuple):
    """What the expert writes in one turn: the text between the `<IS>` tags and the action after it."""

    state: str
    action: Action


class Example(NamedTuple):
    """A sequence for a warm start to learn from: its token ids, who writes which of them, and by which rule
    it is pruned. The lengths of the segments sum to the number of ids.
    """

    tokens: list[int]
    segments: list[Segment]
    prune: EvictionPolicy


class Environment(Protocol):
    """A task that is worked on in turns. Methods may be coroutines (`async def`).

    May have more than the two methods: `objectives`, the number of objectives of the current episode (1);
    `close()`, called when the episode is over, whatever ended it; after a time-out the call that took too
    long may still be running.

    In a rollout, methods are called on a thread while other episodes go on (an environment with an attribute
    `run_inline = True`, which computes its answers in microseconds and cannot hang, is called directly);
    coroutines share one event loop, which none of them may block. An answer that takes longer than
    `RolloutConfig.env_timeout`, retries included, and whatever a method raises or gives against its signature
    ends this episode, with reward 0, `finish_reason` "environment_error" and an `error` that names it; the
    episode is then played again in a new environment, `episode_retries` times. Numbers may be numpy's or
    torch's, finite in float32, and the square of all rewards together as well.

    A call that raises one of the exception types in an attribute `retryable` is made again, `env_retries`
    times: it must have changed nothing. Without that attribute it is `(OSError,)`, to which ConnectionError,
    TimeoutError and the errors of aiohttp's connections belong.
    """

    def reset(self, seed: int, task: Any = None) -> str | Awaitable[str]:
        """Start an episode, all of which follows from `seed`, `task` and the actions; return the prompt: at
        least one token. task: a row of a task set (`mem1.envs.tasks`), None where there is none.
        """
        ...

    def step(self, action: Action) -> Step | Awaitable[Step]:
        """Take one action. Answers every text, malformed ones included, and never raises because of what the
        policy wrote. Raises RuntimeError only if there is no running episode.
        """
        ...


def require_running(running: bool) -> None:
    """RuntimeError for a step without a running episode."""
    if not running:
        raise RuntimeError("step: expected a running episode, got one that is over or not begun; call reset")


class ExpertEnvironment(Environment, Protocol):
    """An environment with an expert: teacher of the warm start, and agent of measurements without a model."""

    def expert_action(self) -> ExpertAction:
        """The expert's next action, given what has been asked so far in this episode."""
        ...


class SampledEnvironment(Environment, Protocol):
    """An environment that knows what could be done now: for an agent that acts at random."""

    def random_action(self, rng: random.Random) -> ExpertAction:
        """One of the actions that are possible now."""
        ...
