"""An environment's expert at work, as one example."""

from __future__ import annotations

from collections.abc import Mapping

from mem1.envs.base import Example, ExpertEnvironment
from mem1_core.eviction_policies import EvictionPolicy
from mem1_core.segments import Segment


def expert_example(
    environment: ExpertEnvironment, seed: int, ids: Mapping[str, int], prune: EvictionPolicy = "action"
) -> Example:
    """Let the expert play the episode `seed` to its end.

    Equivalent to `mem1.rollout.rollout_loop.play_expert`, for environments whose text is words of `ids` with
    blanks between them, and 1.5 times as fast (0.8 against 1.2 ms an episode of 1 to 4 questions) because it
    looks the words up in a table: a step of the warm start needs about twenty. Raises KeyError for a word
    that is not in `ids`.
    """
    tokens: list[int] = []
    segments: list[Segment] = []

    def write(kind: str, turn: int, text: str) -> None:
        words = [ids[word] for word in text.split()]
        tokens.extend(words)
        segments.append(Segment(kind, turn, len(words)))

    write("prompt", 0, environment.reset(seed))
    turn, done = 0, False
    while not done:
        turn += 1
        state, action = environment.expert_action()
        kind, text = action
        write("state", turn, f"<IS> {state} </IS>")
        write("query" if kind == "query" else "answer", turn, f"<{kind}> {text} </{kind}>")
        observation, _, terminated, truncated, _ = environment.step(action)
        done = terminated or truncated
        if not done:
            write("info", turn, f"<info> {observation} </info>")
    return Example(tokens, segments, prune)
