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
from mem1.rollout.call_pool import CallPool, try_call
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
    attempts = deque(_Attempt(_checked_seed("seeds", seed)) for seed in seeds)
    sampling_seed = _checked_seed("sampling_seed", sampling_seed)
    check_positions(model, config)
    codec = Codec(tokenizer)
    engine = engine or Engine(
        model, max(1, min(config.num_slots, len(attempts))), config.max_num_batched_tokens
    )
    if engine.model is not model:
        raise ValueError("engine: expected one of this model, got one of another")
    name = str(getattr(model.config, "_name_or_path", None) or "")

    def start(attempt: _Attempt) -> Episode:
        environment = try_call(make_environment)
        episode = Episode(
            environment,  # type: ignore[arg-type]
            attempt.seed,
            codec,
            config,
            sampling_seed=sampling_seed,
            expert=expert,
            model=name,
            failures=attempt.failures,
        )
        if isinstance(environment, BaseException):
            episode.take_call()
            episode.receive(environment)
        return episode

    return _run(attempts, start, engine, config)


def check_positions(model: PreTrainedModel, config: RolloutConfig) -> None:
    """InputError where the limits of `config` allow more positions than the model has."""
    available = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = config.positions()
    if available is None or needed <= available:
        return
    limits = ", ".join(f"{name}={getattr(config, name)!r}" for name in _LIMITS)
    fits = replace(config, regime="reencode").positions() <= available
    raise InputError(
        f"max_position_embeddings: expected at least {needed}, which {limits} add up to, got {available}; "
        f"make the limits smaller{' or set regime=reencode' if fits else ''}"
    )


def _checked_seed(name: str, seed: object) -> int:
    try:
        index = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        index = -1
    require(index >= 0, name, "integers >= 0", seed)
    return index


def _run(
    attempts: deque[_Attempt], start: Callable[[_Attempt], Episode], engine: Engine, config: RolloutConfig
) -> Iterator[Trajectory]:
    with engine.session():
        active: list[Episode] = []  # slot number and place in this list are the same thing
        calls: CallPool[Episode, Reply] = CallPool(config.env_timeout)
        while attempts or active:
            # 1. Free slots get new episodes.
            while attempts and len(active) < min(config.num_slots, engine.num_slots):
                active.append(start(attempts.popleft()))
            # 2. Actions go to the environments, replies come back.
            _poll_environments(active, calls, config)
            # 3. One forward over what is pending, the prunes that are due, one token more.
            _step(active, engine, config)
            # 4. Finished episodes leave; one that its environment has failed is played again later.
            for played in _pop_finished(active, engine):
                failed = played.finish_reason == FinishReason.ENVIRONMENT_ERROR
                if failed and len(played.failures) < config.episode_retries:
                    failure = Failure(played.error_kind, played.turns, played.tokens.numel())
                    attempts.append(_Attempt(played.seed, (*played.failures, failure)))
                else:
                    yield played


def _poll_environments(active: list[Episode], calls: CallPool[Episode, Reply], config: RolloutConfig) -> None:
    """Submit what the environments are to be asked and receive their replies; wait for one if no episode can
    go on, for all with `synchronous`.
    """
    for episode in active:
        call = episode.take_call()
        if call is not None:
            calls.submit(episode, call, run_inline=episode.run_inline)
    stuck = not any(episode.pending or episode.finish_reason for episode in active)
    for episode, reply in calls.collect(at_least=calls.num_pending if config.synchronous else int(stuck)):
        episode.receive(reply)


def _step(active: list[Episode], engine: Engine, config: RolloutConfig) -> None:
    """Feed what is pending, prune where a prune is due, and sample a token for those with nothing pending."""
    rows = [row for row, episode in enumerate(active) if episode.pending]
    if engine.captures:  # one token for each row costs little: who has more waits until many have
        short = [row for row in rows if len(active[row].pending) == 1]
        if len(rows) - len(short) < _MANY * len(rows):
            rows = short
    if not rows:
        return
    batch = [active[row] for row in rows]
    tokens = [[episode.tokens[j] for j in episode.pending] for episode in batch]
    hidden = engine.feed(rows, tokens, [episode.positions() for episode in batch])
    keeps = {row: episode.commit_fed() for row, episode in zip(rows, batch, strict=True)}
    engine.cache.prune({row: keep for row, keep in keeps.items() if keep is not None})

    ready = [i for i, episode in enumerate(batch) if not episode.pending and not episode.awaiting_reply]
    if not ready:
        return
    uniform = torch.tensor([batch[i].uniform() for i in ready])
    forced = torch.tensor([batch[i].forced() for i in ready])
    logits = engine.logits(hidden if len(ready) == len(rows) else hidden[ready])
    sampled = sample(logits, uniform, forced, config)
    rollout = [None] * len(ready) if sampled.rollout_logprobs is None else sampled.rollout_logprobs.tolist()
    columns = ready, sampled.tokens.tolist(), sampled.logprobs.tolist(), rollout
    for i, token, logprob, rollout_logprob in zip(*columns, strict=True):
        cached = len(batch[i].cached)
        batch[i].write(token, logprob, rollout_logprob)
        if len(batch[i].cached) < cached:  # what is still seen of this turn is encoded again
            engine.cache.truncate(rows[i], len(batch[i].cached))


def _pop_finished(active: list[Episode], engine: Engine) -> Iterator[Trajectory]:
    """Finished episodes leave; the last row takes the free slot."""
    for row in reversed(range(len(active))):
        if active[row].finish_reason:
            if active[row].finish_reason == FinishReason.POLICY_ERROR:
                engine.cache.clear(row)
            yield active[row].trajectory()
            last = active.pop()
            if row < len(active):
                engine.cache.move(len(active), row)
                active[row] = last
            engine.cache.truncate(len(active), 0)


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
            call = episode.take_call()
            if call is not None:
                episode.receive(try_call(call, inf))
                continue
            while episode.pending:
                episode.commit_fed()
            episode.write(episode.forced(), 0.0)
        yield episode.trajectory()
