"""What the loop asks of an environment: text in, text out, a reward at the end.

An environment never sees tokens. The loop reads actions from what the policy wrote, and from nothing else: a
tag that occurs in an environment's text is only a word.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from mem1.parsing.action import Action
from mem1_core.eviction_policies import EvictionPolicy
from mem1_core.segments import Segment


class Observation(NamedTuple):
    """What the environment says to an action: `text` goes into `<info>`, without its tags. `reward` is for
    whoever steps an environment by hand: the loop takes the episode's from `score()`.
    """

    text: str
    reward: float
    done: bool


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
    """A task of one or more objectives that is worked on in turns.

    `objectives` is the number of objectives of the current episode (before the first `reset`: the most there
    can be). `step` answers every text, malformed ones included, and never raises because of what the policy
    wrote.

    In a rollout, methods are called on a thread while other episodes go on (an environment with an attribute
    `run_inline = True`, which computes its answers in microseconds and cannot hang, is called directly). An
    answer that takes longer than `RolloutConfig.env_timeout`, retries included, and whatever a method raises
    or gives against its signature ends this episode, with reward 0, `finish_reason`
    "environment_error" and an `error` that names it; the episode is then played again in a new environment,
    `episode_retries` times. Numbers may be numpy's or torch's.

    A call that raises one of the exception types in an attribute `retryable` is made again, `env_retries`
    times: it must have changed nothing. Without that attribute it is `(OSError,)`, to which ConnectionError
    and TimeoutError belong; the time-outs of httpx and aiohttp's client do not.
    """

    objectives: int

    def reset(self, seed: int) -> str:
        """Start an episode, all of which follows from `seed` and the actions; return the prompt: at least one
        token.
        """
        ...

    def step(self, action: Action) -> Observation:
        """Take one action. Raises RuntimeError only if there is no running episode."""
        ...

    def score(self) -> dict[str, Any]:
        """`reward`, usually in [0, 1]; `exact_match`, `f1` summed over objectives. All 0 before the answer.

        More entries may follow: numbers go with these to `Trajectory.score`, all else to `Trajectory.notes`.
        Numbers must be finite in float32.
        """
        ...


class ExpertEnvironment(Environment, Protocol):
    """An environment with an expert: teacher of the warm start, and agent of measurements without a model."""

    def expert_action(self) -> ExpertAction:
        """The expert's next action, given what has been asked so far in this episode."""
        ...
