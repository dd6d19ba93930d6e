"""Environments of gymnasium whose actions and observations are texts, or can be put in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mem1.checks import require
from mem1.envs.adapters.session import Session, invalid, readable
from mem1.envs.base import Action, Step, require_running
from mem1.extras import extra

MAX_SHOWN = 200  # characters of a space's alphabet that an observation lists


class GymnasiumEnv(Session):
    """One environment of gymnasium, made by `make()` at the first reset.

        GymnasiumEnv(lambda: gymnasium.make("FrozenLake-v1", desc=None, map_name="4x4"),
                     to_action={"left": 0, "down": 1, "right": 2, "up": 3},
                     to_text=lambda place, info: f"row {place // 4}, column {place % 4}")

    to_action: gives the environment's action for one of the policy's, whatever its kind: a table of words, in
    which case and blanks do not matter, or a function, which raises ValueError, with words for the policy,
    for what is none. Without it the action space is Text and the policy's text the action. to_text: makes a
    text of an observation and its info; without it the observation space is Text.

    What is not in the action space is answered with what is, and counted as invalid; the environment is not
    stepped then. Its rewards, flags and infos are passed on as they are. It is used by one thread at a time,
    but not always by the same.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        to_action: Mapping[str, Any] | Callable[[Action], Any] | None = None,
        to_text: Callable[[Any, dict[str, Any]], str] | None = None,
    ) -> None:
        self._make, self._to_action, self._to_text = make, to_action, to_text
        self._words = _table(to_action) if isinstance(to_action, Mapping) else {}
        self._env: Any = None
        self._allowed = ""

    def reset(self, seed: int, task: Any = None) -> str:
        """Reset with the seed and, as `options`, the task. InputError for an environment whose spaces do not
        fit the arguments.
        """
        self._running = False
        if self._env is None:
            self._env = self._make()
        self._allowed = self._check_spaces()
        observation, info = self._env.reset(seed=seed, options=task)
        self._running = True
        return self._text(observation, info)

    def step(self, action: Action) -> Step:
        require_running(self._running)
        try:
            chosen = self._chosen(action)
        except ValueError as error:
            return invalid(error)
        observation, reward, terminated, truncated, info = self._env.step(chosen)
        self._running = not (terminated or truncated)
        return Step(self._text(observation, info), float(reward), bool(terminated), bool(truncated), info)

    def close(self) -> None:
        """Close the environment, if there is one; the next reset makes another."""
        self._running = False
        env, self._env = self._env, None
        if env is not None:
            env.close()

    def _chosen(self, action: Action) -> Any:
        """The environment's action; ValueError, with what is allowed, if there is none."""
        refused = ValueError(f"expected {self._allowed}")
        if action.kind == "malformed":
            raise refused
        if self._words:
            chosen = self._words.get(_folded(action.text))
        else:
            chosen = self._to_action(action) if callable(self._to_action) else action.text
        if chosen is None or not self._env.action_space.contains(chosen):
            raise refused
        return chosen

    def _text(self, observation: Any, info: dict[str, Any]) -> str:
        text = observation if self._to_text is None else self._to_text(observation, info)
        return readable(text, "to_text" if self._to_text else "observation")

    def _check_spaces(self) -> str:
        """What actions are allowed, in words."""
        with extra("gym", "make"):
            from gymnasium import spaces

        actions: Any = getattr(self._env, "action_space", None)
        observations = getattr(self._env, "observation_space", None)
        require(isinstance(actions, spaces.Space), "make", "an environment of gymnasium", self._env)
        expected = "Text, or to_text that makes a text of an observation"
        fits = self._to_text is not None or isinstance(observations, spaces.Text)
        require(fits, "observation_space", expected, observations)
        for word, chosen in self._words.items():
            require(actions.contains(chosen), f"to_action: {word!r}", f"an action in {actions}", chosen)
        if self._words:
            return f"one of: {', '.join(self._words)}"
        if self._to_action is not None:
            return f"an action in {actions}"
        expected = "Text, or to_action that gives its actions for words"
        require(isinstance(actions, spaces.Text), "action_space", expected, actions)
        alphabet = actions.characters
        listed = alphabet if len(alphabet) <= MAX_SHOWN else f"{alphabet[:MAX_SHOWN]}..."
        return f"{actions.min_length} to {actions.max_length} characters of: {listed}"


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _table(words: Mapping[str, Any]) -> dict[str, Any]:
    require(all(isinstance(word, str) for word in words), "to_action", "words", list(words))
    table = {_folded(word): chosen for word, chosen in words.items()}
    sound = 0 < len(table) == len(words) and "" not in table
    require(sound, "to_action", "words that differ in more than case and blanks", list(words))
    return table
