"""Rollout: many episodes side by side on one engine.

for trajectory in rollout(model, tokenizer, make_environment, seeds, RolloutConfig(regime="carry")):
    ...
"""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mem1.checks import InputError, require
from mem1.config import RolloutConfig
from mem1.engine.engine import Engine
from mem1.engine.policy_checks import check_policy
from mem1.envs.base import Environment, ExpertEnvironment
from mem1.envs.tasks import task_id
from mem1.models.load import stop_ids
from mem1.models.memory_plan import plan_memory
from mem1.parsing.codec import Codec
from mem1.rollout.call_pool import CallPool, try_call, warn_of_failure
from mem1.rollout.env_calls import Reply
from mem1.rollout.episode import Episode
from mem1.seeds import derive_seed
from mem1.trajectory import Failure, FinishReason, Trajectory

_MANY = 1 / 6  # of the rows
_PATIENCE = 0.2  # seconds between two looks at whether a rollout is to end
_LIMITS = "max_prompt_tokens max_turns max_action_tokens max_info_tokens".split()


class _Attempt(NamedTuple):
    """An episode to play, and how often that has failed."""

    task: Any
    seed: int
    sampling_seed: int
    failures: tuple[Failure, ...] = ()


def rollout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    make_environment: Callable[[], Environment],
    seeds: Iterable[int],
    config: RolloutConfig,
    *,
    tasks: Iterable[Any] | None = None,
    sampling_seed: int = 0,
    group_size: int = 1,
    expert: bool = False,
    engine: Engine | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Trajectory]:
    """Yield `group_size` finished trajectories per seed, in the order in which they finish.

    An episode follows from its seed and its task alone: the environment is reset with these, and the sampler
    has a generator of its own, made of the seed and `sampling_seed`, so the batch it runs in changes nothing
    but rounding; with `config.synchronous` the batch, too, follows from the seeds, and the same call gives
    the same bits. Seeds are integers >= 0; `tasks`, one for each, are rows of a task set (`mem1.envs.tasks`).
    Episodes of a group differ in their `Trajectory.sampling_seed`, the first has `sampling_seed` itself;
    their prompt is read once. With `expert` the environment's expert writes the actions and the model only
    reads along (their log-probs are the model's).

    Environments answer on threads, while the other episodes go on (a `run_inline` one at once); whatever
    goes wrong in one ends its own episode. That is then played again from its seed, up to
    `config.episode_retries` times, and the last attempt is yielded. `make_environment` must make a new
    environment for each attempt: one that has run out of time may still be at work. It is called in between:
    what takes time belongs into `reset`.

    The weights must not change between the first and the last trajectory taken from the generator. An
    `engine` of this model may be kept from one rollout to the next, with its memory and its CUDA graphs; it
    has its own `max_num_batched_tokens`.

    `stopped` is asked before each step; once it says True the rollout ends, without the episodes that are not
    over.

    Raises InputError, before anything runs, for seeds, a model or a tokenizer that cannot be used, and where
    the limits of `config` allow more positions than the model has; ValueError if `engine` is one of another
    model, RuntimeError, at the first trajectory, if it is in use.
    """
    sampling_seed = _checked_seed("sampling_seed", sampling_seed)
    require(isinstance(group_size, int) and group_size >= 1, "group_size", "an integer >= 1", group_size)
    samples = [sampling_seed, *(derive_seed(sampling_seed, "group", i) for i in range(1, group_size))]
    require(isinstance(seeds, Iterable), "seeds", "integers >= 0 to go through", seeds)
    attempts = deque(
        _Attempt(task, seed, sample) for task, seed in _episodes(seeds, tasks) for sample in samples
    )
    check_positions(model, config)
    codec = make_codec(tokenizer, config, model)
    engine = engine or make_engine(model, config, len(attempts))
    if engine.model is not model:
        raise ValueError("engine: expected one of this model, got one of another")
    if engine.capacity is not None and engine.capacity < config.peak_tokens():
        raise ValueError(
            f"engine: expected a capacity of at least {config.peak_tokens()}, which the limits allow, got "
            f"{engine.capacity}"
        )
    name = str(getattr(model.config, "_name_or_path", None) or "")

    def start(attempt: _Attempt) -> Episode:
        environment = try_call(make_environment)
        episode = Episode(
            environment,  # type: ignore[arg-type]
            attempt.seed,
            codec,
            config,
            sampling_seed=attempt.sampling_seed,
            expert=expert,
            model=name,
            failures=attempt.failures,
            task=attempt.task,
        )
        if isinstance(environment, BaseException):
            episode.take_call()
            episode.receive(environment)
        return episode

    return _run(attempts, start, engine, config, stopped)


def make_codec(
    tokenizer: PreTrainedTokenizerBase, config: RolloutConfig, model: PreTrainedModel | None = None
) -> Codec:
    """Between text and tokens, those that end a turn of `model` among them. InputError for a tokenizer, a
    template or limits that cannot be used.
    """
    codec = Codec(
        tokenizer,
        config.format,
        chat=config.chat,
        system=config.system,
        observation_role=config.observation_role,
        stop_ids=() if model is None else stop_ids(model, tokenizer),
    )
    codec.check_limits(config.max_info_tokens, config.max_action_tokens, config.max_state_tokens)
    return codec


def make_engine(
    model: PreTrainedModel,
    config: RolloutConfig,
    episodes: int,
    tell: Callable[[str], None] | None = None,
    reserved_bytes: int = 0,
) -> Engine:
    """An engine with a slot for each of `episodes` side by side, as many as `config` and memory allow; what
    that takes is told before it is taken. `reserved_bytes` are left for others. InputError if there is not
    memory for one slot, or for a model that no engine takes.
    """
    check_policy(model)  # the plan runs it
    plan = plan_memory(
        model,
        capacity=config.peak_tokens(),
        num_slots=max(1, min(config.num_slots, episodes)),
        kv_memory=int(config.kv_memory) if config.kv_memory >= 2 else config.kv_memory,
        max_num_batched_tokens=config.max_num_batched_tokens,
        reserved_bytes=reserved_bytes,
    )
    if tell is not None:
        tell(str(plan))
    return Engine(model, plan.num_slots, config.max_num_batched_tokens, capacity=plan.capacity)


def check_positions(model: PreTrainedModel, config: RolloutConfig) -> None:
    """InputError where the limits of `config` allow more positions than the model has."""
    available = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = config.positions()
    if available is None or needed <= available:
        return
    rules = f"regime={config.regime!r}, prune={config.prune_name!r}, "
    limits = rules + ", ".join(f"{name}={getattr(config, name)!r}" for name in _LIMITS)
    fits = replace(config, regime="reencode").positions() <= available
    raise InputError(
        f"max_position_embeddings: expected at least {needed}, which {limits} add up to, got {available}; "
        f"make the limits smaller{' or set regime=reencode' if fits else ''}"
    )


def _episodes(seeds: Iterable[int], tasks: Iterable[Any] | None) -> list[tuple[Any, int]]:
    """A task, None where there are none, for each seed."""
    checked = [_checked_seed("seeds", seed) for seed in seeds]
    rows = [None] * len(checked) if tasks is None else [*tasks]
    require(len(rows) == len(checked), "tasks", f"one for each of {len(checked)} seeds", len(rows))
    for row in rows if tasks is not None else ():
        task_id(row)  # refuses what has none
    return list(zip(rows, checked, strict=True))


def _checked_seed(name: str, seed: object) -> int:
    try:
        index = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        index = -1
    require(index >= 0, name, "integers >= 0", seed)
    return index


def _run(
    attempts: deque[_Attempt],
    start: Callable[[_Attempt], Episode],
    engine: Engine,
    config: RolloutConfig,
    stopped: Callable[[], bool],
) -> Iterator[Trajectory]:
    active: list[Episode] = []  # slot number and place in this list are the same thing
    calls: CallPool[Episode, Reply] = CallPool(config.env_timeout)
    ended = False
    try:
        with engine.session():
            while (attempts or active) and not (ended := stopped()):
                # 1. Free slots get new episodes.
                while attempts and len(active) < min(config.num_slots, engine.num_slots):
                    active.append(start(attempts.popleft()))
                # 2. Actions go to the environments, replies come back.
                _poll_environments(active, calls, config, stopped)
                # 3. One forward over what is pending, the prunes that are due, one token more.
                _step(active, engine, config)
                # 4. Finished episodes leave; one that its environment has failed is played again later.
                for episode in _pop_finished(active, engine):
                    _close(episode, calls)
                    played, failures = episode.trajectory(), episode.failures
                    failed = played.finish_reason == FinishReason.ENVIRONMENT_ERROR
                    if failed and len(failures) < config.episode_retries:
                        failure = Failure(played.error_kind, played.turns, played.tokens.numel())
                        again = _Attempt(
                            episode.task, played.seed, played.sampling_seed, (*failures, failure)
                        )
                        attempts.append(again)
                    else:
                        yield played
    finally:  # it may be given up in the middle
        for episode in active:
            _close(episode, calls)
        if not ended:
            calls.wait_detached()


def _close(episode: Episode, calls: CallPool[Episode, Reply]) -> None:
    """Tell the environment, if it wants to know, that its episode is over."""
    call = episode.closing_call
    if call is not None and episode.run_inline:
        warn_of_failure(call)
    elif call is not None:
        calls.detach(call)


def _poll_environments(
    active: list[Episode],
    calls: CallPool[Episode, Reply],
    config: RolloutConfig,
    stopped: Callable[[], bool],
) -> None:
    """Submit what the environments are to be asked and receive their replies; wait for one if no episode can
    go on, for all with `synchronous`, unless it is to be `stopped`.
    """
    for episode in active:
        call = episode.take_call()
        if call is not None:
            calls.submit(episode, call, run_inline=episode.run_inline)
    stuck = not any(episode.pending or episode.finish_reason for episode in active)
    wanted = calls.num_pending if config.synchronous else int(stuck)
    while True:
        replies = calls.collect(at_least=wanted, patience=_PATIENCE)
        for episode, reply in replies:
            episode.receive(reply)
        wanted -= len(replies)
        if wanted <= 0 or not calls.num_pending or stopped():
            break


def _step(active: list[Episode], engine: Engine, config: RolloutConfig) -> None:
    """Feed what is pending, prune where a prune is due, and sample a token for those with nothing pending."""
    rows = [row for row, episode in enumerate(active) if episode.pending]
    rows = _share_prompts(active, rows, engine)
    if engine.captures:  # one token for each row costs little: who has more waits until many have
        short = [row for row in rows if len(active[row].pending) == 1]
        if len(rows) - len(short) < _MANY * len(rows):
            rows = short
    counts = _share_out([len(active[row].pending) for row in rows], config.max_num_batched_tokens)
    rows, counts = [row for row, n in zip(rows, counts, strict=True) if n], [n for n in counts if n]
    if not rows:
        return
    batch = [active[row] for row in rows]
    tokens = [
        [episode.tokens[j] for j in episode.pending[:n]] for episode, n in zip(batch, counts, strict=True)
    ]
    positions = [episode.positions(n) for episode, n in zip(batch, counts, strict=True)]
    longest = max(len(episode.cached) + n for episode, n in zip(batch, counts, strict=True))
    if engine.capacity is not None and longest > engine.capacity:
        expected = f"peak_tokens of at least {longest}, which an episode holds"
        raise InputError(f"prune={config.prune_name!r}: expected {expected}, got {engine.capacity}")
    for row, episode in zip(rows, batch, strict=True):  # what is to be encoded again is forgotten first
        engine.cache.truncate(row, len(episode.cached))
    hidden = engine.feed(rows, tokens, positions)
    keeps = {row: episode.commit_fed(n) for row, episode, n in zip(rows, batch, counts, strict=True)}
    engine.cache.prune({row: keep for row, keep in keeps.items() if keep is not None})

    ready = [i for i, episode in enumerate(batch) if not episode.pending and not episode.awaiting_reply]
    if not ready:
        return
    uniform = torch.tensor([batch[i].uniform() for i in ready], dtype=torch.float64)
    forced = torch.tensor([batch[i].forced() for i in ready])
    hidden = hidden if len(ready) == len(rows) else hidden[ready]
    sampled = engine.sample(hidden, uniform, forced, config)
    rollout = [None] * len(ready) if sampled.rollout_logprobs is None else sampled.rollout_logprobs.tolist()
    columns = ready, sampled.tokens.tolist(), sampled.logprobs.tolist(), rollout
    for i, token, logprob, rollout_logprob in zip(*columns, strict=True):
        batch[i].write(token, logprob, rollout_logprob)


def _share_prompts(active: list[Episode], rows: list[int], engine: Engine) -> list[int]:
    """Episodes of a group have one prompt: the first reads it, the others wait and get its entries, all but
    the last token's, which they are to go on from. Returns the rows that need not wait.
    """
    new = [row for row in rows if not active[row].cached and len(active[row].prompt) > 1]
    readers: dict[tuple[int, ...], int] = {}  # prompt -> the row that is furthest in it
    if new:
        for row, episode in enumerate(active):
            prompt = tuple(episode.prompt)
            best = readers.setdefault(prompt, row)
            if len(episode.cached) > len(active[best].cached):
                readers[prompt] = row
    waiting = set()
    for row in new:
        prompt, reader = active[row].prompt, readers[tuple(active[row].prompt)]
        if reader != row and len(active[reader].cached) >= len(prompt) - 1:
            engine.cache.copy(reader, row, len(prompt) - 1)
            active[row].adopt_prompt(len(prompt) - 1)
        elif reader != row:
            waiting.add(row)
    return [row for row in rows if row not in waiting]


def _share_out(lengths: list[int], budget: int) -> list[int]:
    """How many tokens of each row to read now: single ones always, of longer texts `budget` in all, in
    order.
    """
    counts = []
    for length in lengths:
        counts.append(1 if length == 1 else min(length, budget))
        budget -= counts[-1] if length > 1 else 0
    return counts


def _pop_finished(active: list[Episode], engine: Engine) -> Iterator[Episode]:
    """Finished episodes leave; the last row takes the free slot."""
    for row in reversed(range(len(active))):
        if active[row].finish_reason:
            finished = active[row]
            # Numbers that are not finite may be among what it held, and masks do not hide these everywhere.
            engine.cache.clear(row)
            last = active.pop()
            if row < len(active):
                engine.cache.move(len(active), row)
                engine.cache.clear(len(active))
                active[row] = last
            yield finished


def play_expert(
    tokenizer: PreTrainedTokenizerBase,
    make_environment: Callable[[], ExpertEnvironment],
    seeds: Iterable[int],
    config: RolloutConfig,
    tasks: Iterable[Any] | None = None,
) -> Iterator[Trajectory]:
    """The expert's trajectories without any model (their log-probs are 0): for warm starts and for measuring
    memory. seeds, tasks: as for `rollout`.
    """
    codec = make_codec(tokenizer, config)
    for task, seed in _episodes(seeds, tasks):
        environment = try_call(make_environment)
        episode = Episode(environment, seed, codec, config, expert=True, task=task)  # type: ignore[arg-type]
        if isinstance(environment, BaseException):
            episode.take_call()
            episode.receive(environment)
        try:
            while not episode.finish_reason:
                call = episode.take_call()
                if call is not None:
                    episode.receive(try_call(call, time.monotonic() + config.env_timeout))
                    continue
                while episode.pending:
                    episode.commit_fed(len(episode.pending))
                episode.write(episode.forced(), 0.0)
        finally:
            if episode.closing_call is not None:
                warn_of_failure(episode.closing_call)
        yield episode.trajectory()
