"""Rollout: many episodes side by side on one engine.

for trajectory in rollout(model, tokenizer, make_environment, seeds, RolloutConfig(regime="carry")):
    ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mem1.calls import Calls, outcome
from mem1.codec import Codec
from mem1.config import RolloutConfig
from mem1.engine import Engine
from mem1.envs.base import Environment, ScriptedEnvironment
from mem1.episode import Episode, Reply
from mem1.sampling import sample
from mem1.trajectory import POLICY_ERROR, Trajectory

_MANY = 1 / 6  # of the rows


def rollout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    make_environment: Callable[[], Environment],
    seeds: Iterable[int],
    config: RolloutConfig,
    *,
    sampling_seed: int = 0,
    scripted: bool = False,
    engine: Engine | None = None,
) -> Iterator[Trajectory]:
    """Yield one finished `Trajectory` per seed, in the order in which they finish.

    An episode follows from its seed alone: the environment is reset with it, and the sampler has a generator
    of its own, so the batch it runs in changes nothing but rounding. With `scripted` the environment's expert
    writes the actions and the model only reads along (their log-probs are the model's).

    Environments answer on threads, while the other episodes go on (an `instant` one at once); whatever goes
    wrong in one ends its own episode. `make_environment` itself is called in between: what takes time belongs
    into `reset`. An environment that has run out of time must not be used again.

    The weights must not change between the first and the last trajectory taken from the generator. An
    `engine` of this model may be kept from one rollout to the next, with its memory and its CUDA graphs; it
    has its own `prefill_tokens`. Raises ValueError if it is one of another model, RuntimeError if it is in
    use.
    """
    waiting = deque(seeds)
    engine = engine or Engine(model, max(1, min(config.slots, len(waiting))), config.prefill_tokens)
    if engine.model is not model:
        raise ValueError("engine: wanted one of this model, got one of another")
    codec = Codec(tokenizer)

    def start() -> Episode:
        world = outcome(make_environment)
        episode = Episode(world, waiting.popleft(), codec, config, sampling_seed, scripted)
        if isinstance(world, BaseException):
            episode.take_question()
            episode.hear(world)
        return episode

    with engine.session():
        active: list[Episode] = []
        calls: Calls[Episode, Reply] = Calls(config.env_timeout)
        while waiting or active:
            # Free slots get new episodes. Slot number and place in `active` are the same thing.
            while waiting and len(active) < min(config.slots, engine.slots):
                active.append(start())
            _ask(active, calls)
            _advance(active, engine, config)
            yield from _leave(active, engine)


def _ask(active: list[Episode], calls: Calls[Episode, Reply]) -> None:
    """Ask the environments and hear those that have answered; wait for one if nobody can go on."""
    for episode in active:
        question = episode.take_question()
        if question is not None:
            calls.ask(episode, question, instant=episode.instant)
    stuck = not any(episode.unread or episode.finished for episode in active)
    for episode, reply in calls.outcomes(wait=stuck):
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
    chosen, logprobs = sample(logits, uniform, forced, config)
    for i, token, logprob in zip(ready, chosen.tolist(), logprobs.tolist(), strict=True):
        held = len(batch[i].cached)
        batch[i].write(token, logprob)
        if len(batch[i].cached) < held:  # to encode anew, behind the prompt
            engine.truncate(rows[i], len(batch[i].cached))


def _leave(active: list[Episode], engine: Engine) -> Iterator[Trajectory]:
    """Finished episodes leave; the last row takes the free slot."""
    for row in reversed(range(len(active))):
        if active[row].finished:
            if active[row].finished.startswith(POLICY_ERROR):
                engine.clear(row)
            yield active[row].trajectory()
            last = active.pop()
            if row < len(active):
                engine.move(len(active), row)
                active[row] = last
            engine.truncate(len(active), 0)


def play_script(
    tokenizer: PreTrainedTokenizerBase,
    make_environment: Callable[[], ScriptedEnvironment],
    seeds: Iterable[int],
    config: RolloutConfig,
) -> Iterator[Trajectory]:
    """The expert's trajectories without any model (their log-probs are 0): for warm starts and for measuring
    memory.
    """
    codec = Codec(tokenizer)
    for seed in seeds:
        episode = Episode(make_environment(), seed, codec, config, scripted=True)
        while not episode.finished:
            question = episode.take_question()
            if question is not None:
                episode.hear(outcome(question))
                continue
            while episode.unread:
                episode.read()
            episode.write(episode.forced(), 0.0)
        yield episode.trajectory()
