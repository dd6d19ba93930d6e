"""Which environment the options of a command name, and the settings of the sampler that fit it."""

from __future__ import annotations

import argparse
import inspect
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from inspect import isawaitable
from typing import Any

from mem1.checks import require
from mem1.config import RolloutConfig
from mem1.envs.toy.updates import UpdatesEnv
from mem1.envs.worlds import DEFAULT, TOYS, Objectives, Side, World, open_world
from mem1.parsing.tags import HINTS
from mem1.runtime.event_loop import EVENT_LOOP
from mem1_core.eviction_policies import qualified_name

_CLOSING_S = 5.0  # seconds for a client to close
_PASSAGES = 1024  # tokens of an observation of real text: the paper's, rounded up


def environment_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What the environment of the options is made with, apart from its number of objectives."""
    arguments = dict(options.environment_args)
    for name, default, worlds in (("hops", 2, (DEFAULT,)), ("passage_tokens", 0, TOYS)):
        given = getattr(options, name)
        if options.environment in worlds:
            twice = given is not None and name in arguments
            require(not twice, name, "it here or in environment-args, not both", given)
            arguments = {name: default if given is None else given} | arguments
        else:
            require(given is None, name, f"none beside environment {_name(options.environment)}", given)
    return arguments


def environment_record(options: argparse.Namespace) -> dict[str, Any]:
    """What a run keeps on record of its environment."""
    named = {} if options.environment == DEFAULT else {"name": _name(options.environment)}
    tasks = {} if options.tasks is None else {"tasks": options.tasks}
    return named | tasks | environment_arguments(options)


def _name(environment: Any) -> str:
    return environment if isinstance(environment, str) else qualified_name(environment)


def world_of(options: argparse.Namespace, objectives: Objectives, side: Side, episodes: int = 0) -> World:
    """The world of the options, its rows those of one side. InputError, before any work, if it cannot be."""
    return open_world(
        options.environment,
        environment_arguments(options),
        objectives=objectives,
        side=side,
        tags=options.format,
        tasks=options.tasks,
        episodes=episodes,
    )


@contextmanager
def closing(worlds: Iterable[World]) -> Iterator[None]:
    """In the end the clients of `worlds` are closed, on the loop on which they were used."""
    try:
        yield
    finally:
        for client in dict.fromkeys(client for world in worlds for client in world.clients):
            closed = client.close()
            if isawaitable(closed):
                try:
                    EVENT_LOOP.run(closed, time.monotonic() + _CLOSING_S)
                except (OSError, TimeoutError) as error:  # the work is done, and more are to be closed
                    warnings.warn(f"close of {type(client).__name__}: {error}", RuntimeWarning, stacklevel=2)


def _most(value: Any) -> int:
    """The upper end of a range; 0 of what is none, which the environment refuses."""
    ends = value if isinstance(value, (list, tuple)) else [value]
    return max((end for end in ends if isinstance(end, int)), default=0)


def _facts(made: Mapping[str, Any], objectives: int) -> tuple[int, int]:
    """Of `UpdatesEnv`: the turns of a reader, and the tokens of a piece of its stream: a fact has some four
    words, and behind each comes noise until a draw says enough, three times the mean at most.
    """
    signature = inspect.signature(UpdatesEnv).parameters
    updates, share, at_once = (
        made.get(name, signature[name].default) for name in ("updates", "noise", "facts_per_turn")
    )
    noise = max((end for end in (share if isinstance(share, (list, tuple)) else [share])), default=0.0)
    turns = -(-objectives * (_most(updates) + 1) // max(_most(at_once), 1)) + 2
    statements = _most(at_once) * (1.0 + 3.0 * noise / max(1.0 - noise, 0.1))
    return turns, round(8 * statements)


def rollout_config(options: argparse.Namespace, objectives: int | None) -> RolloutConfig:
    """The settings of the sampler for episodes of at most that many objectives, None for an environment of
    which nothing is known.

    Limits that were not given leave room: for a whole passage, and for twice the turns of the expert, or, of
    real questions, as many as the paper's. They leave no more than that: a model has to have a position for
    every token that they allow.
    """
    default = RolloutConfig()
    max_info_tokens, max_turns = default.max_info_tokens, default.max_turns
    if options.environment in TOYS:
        made = environment_arguments(options)
        least = {"passage_tokens": 0, "facts": 0, "hops": 1}
        most = {name: _most(made.get(name, value)) for name, value in least.items()}
        passage, hops = most["passage_tokens"] + 4 * most["facts"], most["hops"]
        max_info_tokens = passage + (64 if options.environment == DEFAULT else max_info_tokens)
        per_question = 2 * hops if options.environment == DEFAULT else 8 * hops
        max_turns = max(max_turns, (objectives or 1) * per_question + 2)
        if options.environment == "updates":
            turns, tokens = _facts(made, objectives or 2)
            max_turns, max_info_tokens = max(max_turns, 2 * turns), max(max_info_tokens, passage + tokens)
    elif isinstance(options.environment, str):
        max_info_tokens = _PASSAGES
        max_turns = 10 if options.environment == "webshop" else 6 if (objectives or 1) <= 4 else 20
    names = {field.name for field in fields(RolloutConfig)} & vars(options).keys()
    return RolloutConfig(
        **{name: getattr(options, name) for name in names - {"format", "max_info_tokens", "max_turns"}},
        format=replace(options.format, **HINTS) if options.turn_hint else options.format,
        max_info_tokens=max_info_tokens if options.max_info_tokens is None else options.max_info_tokens,
        max_turns=max_turns if options.max_turns is None else options.max_turns,
    )
