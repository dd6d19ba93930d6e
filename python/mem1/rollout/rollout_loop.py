"""Rollout: many episodes side by side on one engine.

for trajectory in rollout(model, tokenizer, make_environment, seeds, RolloutConfig(regime="carry")):
    ...
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import inf
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mem1.checks import InputError, require
from mem1.config import RolloutConfig
from mem1.engine.engine import Engine
from mem1.engine.sampling import sample
from mem1.envs.base import Environment, ExpertEnvironment
from mem1.parsing.codec import Codec
from mem1.rollout.call_pool import Calls, outcome
from mem1.rollout.env_calls import Reply
from mem1.rollout.episode import Episode
from mem1.trajectory import Failure, FinishReason, Trajectory

_MANY = 1 / 6  # of the rows
_LIMITS = (
    "regime",
    "prune",
    "max_prompt_tokens",
    "max_turns",
    "max_action_tokens",
    "max_info_tokens",
)  # of positions


class _Attempt(NamedTuple):
    """An episode to play, and how often that has failed."""

    seed: int
    failures: tuple[Failure, ...] = ()


def rollout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    make_environment: Callable[[], Environment],
    seeds: Iterable[int],
    config: RolloutConfig,
    *,
    sampling_seed: int = 0,
    expert: bool = False,
    engine: Engine | None = None,
) -> Iterator[Trajectory]:
    """Yield one finished `Trajectory` per seed, in the order in which they finish.

    An episode follows from its seed alone: the environment is reset with it, and the sampler has a generator
    of its own, made of it and `sampling_seed`, so the batch it runs in changes nothing but rounding; with
    `config.synchronous` not even that. Seeds are integers >= 0. With `expert` the environment's expert
    writes the actions and the model only reads along (their log-probs are the model's).

    Environments answer on threads, while the other episodes go on (a `run_inline` one at once); whatever
    goes wrong in one ends its own episode. That is then played again from its seed, up to
    `config.episode_retries` times, and the last attempt is yielded. `make_environment` must make a new
    environment for each attempt: one that has run out of time may still be at work. It is called in between:
    what takes time belongs into `reset`.

    The weights must not change between the first and the last trajectory taken from the generator. An
    `engine` of this model may be kept from one rollout to the next, with its memory and its CUDA graphs; it
    has its own `max_num_batched_tokens`.

    Raises InputError, before anything runs, for seeds, a model or a tokenizer that cannot be used, and where
    the limits of `config` allow more positions than the model has; ValueError if `engine` is one of another
    model, RuntimeError, at the first trajectory, if it is in use.
    """
    waiting = deque(_Attempt(_checked_seed("seeds", seed)) for seed in seeds)
    sampling_seed = _checked_seed("sampling_seed", sampling_seed)
    check_positions(model, config)
    codec = Codec(tokenizer)
    engine = engine or Engine(
        model, max(1, min(config.num_slots, len(waiting))), config.max_num_batched_tokens
    )
    if engine.model is not model:
        raise ValueError("engine: expected one of this model, got one of another")
    name = str(getattr(model.config, "_name_or_path", None) or "")

    def start(attempt: _Attempt) -> Episode:
        world = outcome(make_environment)
        episode = Episode(
            world,  # type: ignore[arg-type]
            attempt.seed,
            codec,
            config,
            sampling_seed=sampling_seed,
            expert=expert,
            model=name,
            failures=attempt.failures,
        )
        if isinstance(world, BaseException):
            episode.take_question()
            episode.hear(world)
        return episode

    return _play(waiting, start, engine, config)


def check_positions(model: PreTrainedModel, config: RolloutConfig) -> None:
    """InputError where the limits of `config` allow more positions than the model has."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = config.positions()
    if most is None or needed <= most:
        return
    limits = ", ".join(f"{name}={getattr(config, name)!r}" for name in _LIMITS)
    fits = replace(config, regime="reencode").positions() <= most
    raise InputError(
        f"max_position_embeddings: expected at least {needed}, which {limits} add up to, got {most}; make "
        f"the limits smaller{' or set regime=reencode' if fits else ''}"
    )


def _checked_seed(name: str, seed: object) -> int:
    try:
        index = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        index = -1
    require(index >= 0, name, "integers >= 0", seed)
    return index


def _play(
    waiting: deque[_Attempt], start: Callable[[_Attempt], Episode], engine: Engine, config: RolloutConfig
) -> Iterator[Trajectory]:
    with engine.session():
        active: list[Episode] = []
        calls: Calls[Episode, Reply] = Calls(config.env_timeout)
        while waiting or active:
            # Free slots get new episodes. Slot number and place in `active` are the same thing.
            while waiting and len(active) < min(config.num_slots, engine.num_slots):
                active.append(start(waiting.popleft()))
            _ask(active, calls, config)
            _advance(active, engine, config)
            for played in _leave(active, engine):
                failed = played.finish_reason == FinishReason.ENVIRONMENT_ERROR
                if failed and len(played.failures) < config.episode_retries:
                    failure = Failure(played.error_kind, played.turns, played.tokens.numel())
                    waiting.append(_Attempt(played.seed, (*played.failures, failure)))
                else:
                    yield played


def _ask(active: list[Episode], calls: Calls[Episode, Reply], config: RolloutConfig) -> None:
    """Ask the environments and hear those that have answered; wait for one if nobody can go on, for all if
    that is the rule.
    """
    for episode in active:
        question = episode.take_question()
        if question is not None:
            calls.ask(episode, question, run_inline=episode.run_inline)
    stuck = not any(episode.unread or episode.finish_reason for episode in active)
    for episode, reply in calls.outcomes(at_least=calls.open if config.synchronous else int(stuck)):
        episode.hear(reply)


def _advance(active: list[Episode], engine: Engine, config: RolloutConfig) -> None:
    """Feed what is unread, prune where a prune is due, and let those write a token that have read all there
    is.
    """
    rows = [row for row, episode in enumerate(active) if episode.unread]
    if engine.captures:  # one token for each row costs little: who has more waits until many have
        short = [row for row in rows if len(active[row].unread) == 1]
        if len(rows) - len(short) < _MANY * len(rows):
            rows = short
    if not rows:
        return
    batch = [active[row] for row in rows]
    tokens = [[episode.tokens[j] for j in episode.unread] for episode in batch]
    hidden = engine.feed(rows, tokens, [episode.positions() for episode in batch])
    keeps = {row: episode.read() for row, episode in zip(rows, batch, strict=True)}
    engine.prune({row: keep for row, keep in keeps.items() if keep is not None})

    ready = [i for i, episode in enumerate(batch) if not episode.unread and not episode.waiting]
    if not ready:
        return
    uniform = torch.tensor([batch[i].uniform() for i in ready])
    forced = torch.tensor([batch[i].forced() for i in ready])
    logits = engine.logits(hidden if len(ready) == len(rows) else hidden[ready])
    chosen = sample(logits, uniform, forced, config)
    drawn = [None] * len(ready) if chosen.rollout_logprobs is None else chosen.rollout_logprobs.tolist()
    columns = ready, chosen.tokens.tolist(), chosen.logprobs.tolist(), drawn
    for i, token, logprob, rollout_logprob in zip(*columns, strict=True):
        held = len(batch[i].cached)
        batch[i].write(token, logprob, rollout_logprob)
        if len(batch[i].cached) < held:  # to encode anew, behind the prompt
            engine.truncate(rows[i], len(batch[i].cached))


def _leave(active: list[Episode], engine: Engine) -> Iterator[Trajectory]:
    """Finished episodes leave; the last row takes the free slot."""
    for row in reversed(range(len(active))):
        if active[row].finish_reason:
            if active[row].finish_reason == FinishReason.POLICY_ERROR:
                engine.clear(row)
            yield active[row].trajectory()
            last = active.pop()
            if row < len(active):
                engine.move(len(active), row)
                active[row] = last
            engine.truncate(len(active), 0)


def play_expert(
    tokenizer: PreTrainedTokenizerBase,
    make_environment: Callable[[], ExpertEnvironment],
    seeds: Iterable[int],
    config: RolloutConfig,
) -> Iterator[Trajectory]:
    """The expert's trajectories without any model (their log-probs are 0): for warm starts and for measuring
    memory.
    """
    codec = Codec(tokenizer)
    for seed in seeds:
        episode = Episode(make_environment(), seed, codec, config, expert=True)
        while not episode.finish_reason:
            question = episode.take_question()
            if question is not None:
                episode.hear(outcome(question, inf))
                continue
            while episode.unread:
                episode.read()
            episode.write(episode.forced(), 0.0)
        yield episode.trajectory()
