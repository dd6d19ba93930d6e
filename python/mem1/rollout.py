"""Rollout: many episodes side by side, each one a stream of tokens that the policy and its environment write
in turns.

    for trajectory in rollout(model, tokenizer, make_environment, seeds, RolloutConfig(regime="carry")):
        ...
"""

from __future__ import annotations

import math
import reprlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mem1.config import RolloutConfig
from mem1.engine import Engine, sample
from mem1.envs.base import Action, Environment, Observation, ScriptedAction, ScriptedEnvironment
from mem1.tokenizer import TAGS
from mem1.trajectory import Trajectory
from mem1_core.trajectory import Kind, Segment, evict_from_turns

# How `Trajectory.finished` begins when the environment failed: it raised, or gave something else than the
# protocol asks for. Such an episode has reward 0 and says nothing about the policy.
ENVIRONMENT_ERROR = "environment error"

_Answer = TypeVar("_Answer")
_FAILED = {"reward": 0.0, "exact_match": 0.0, "f1": 0.0}
_SEED_STRIDE = 1_000_003  # keeps the samplers of neighbouring seeds apart when `sampling_seed` moves


def rollout(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    make_environment: Callable[[], Environment],
    seeds: Iterable[int],
    config: RolloutConfig,
    *,
    sampling_seed: int = 0,
    scripted: bool = False,
) -> Iterator[Trajectory]:
    """Yield one finished `Trajectory` per seed, in the order in which they finish.

    An episode follows from its seed alone: the environment is reset with it, and the sampler has a generator
    of its own, so the batch it runs in changes nothing but rounding. With `scripted` the environment's expert
    writes the actions and the model only reads along (their log-probs are the model's).

    The weights must not change between the first and the last trajectory taken from the generator.
    """
    engine = Engine(model, config.slots, config.prefill_tokens)
    codec = Codec(tokenizer)
    waiting = deque(seeds)
    active: list[Episode] = []
    while waiting or active:
        # 1. Free slots get new episodes. Slot number and place in `active` are the same thing.
        while waiting and len(active) < config.slots:
            engine.truncate(len(active), 0)
            active.append(
                Episode(make_environment(), waiting.popleft(), codec, config, sampling_seed, scripted)
            )

        # 2. Feed what is unread: all of it for rows with much to read (a prompt, an answer to a query), as
        #    soon as these are a fair share of the batch; else the one token that each other row has just
        #    written.
        long = [row for row, episode in enumerate(active) if len(episode.unread) > 1]
        short = [row for row, episode in enumerate(active) if len(episode.unread) == 1]
        rows = long if 4 * len(long) >= len(active) or not short else short
        if rows:
            batch = [active[row] for row in rows]
            tokens = [[episode.tokens[j] for j in episode.unread] for episode in batch]
            hidden = engine.feed(rows, tokens, [episode.positions() for episode in batch])

            # 3. Prune where a prune is due, then let those write a token that have read all there is.
            for row, episode in zip(rows, batch, strict=True):
                keep = episode.read()
                if keep is not None:
                    engine.prune(row, keep)
            ready = [i for i, episode in enumerate(batch) if not episode.unread]
            if ready:
                uniform = torch.stack([batch[i].uniform() for i in ready])
                forced = torch.tensor([batch[i].forced() for i in ready])
                chosen, logprobs = sample(engine.logits(hidden[ready]), uniform, forced, config)
                for i, token, logprob in zip(ready, chosen.tolist(), logprobs.tolist(), strict=True):
                    batch[i].write(token, logprob)
                    engine.truncate(
                        rows[i], len(batch[i].cached)
                    )  # re-encoding starts over behind the prompt

        # 4. Finished episodes leave; the last row takes the free slot.
        for row in reversed(range(len(active))):
            if active[row].finished:
                yield active[row].trajectory()
                last = active.pop()
                if row < len(active):
                    engine.move(len(active), row)
                    active[row] = last


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
            while episode.unread:
                episode.read()
            episode.write(episode.forced(), 0.0)
        yield episode.trajectory()


class Codec:
    """The tokenizer and the ids of the tags. Each tag must be one token; raises ValueError naming one that is
    not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: dict[str, int] = {}
        for tag in TAGS:
            ids = tokenizer.encode(tag, add_special_tokens=False)
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise ValueError(
                    f"tokenizer: wanted one token for the tag {tag}, got ids {ids}; add it to the vocabulary"
                )
            self.ids[tag] = ids[0]
        self.stops = {self.ids["</query>"], self.ids["</answer>"], tokenizer.eos_token_id}
        self._tags = set(self.ids.values())

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def info(self, text: str, limit: int) -> list[int]:
        """`<info> text </info>` with at most `limit` tokens of text. Tags inside the text are left out of
        it.
        """
        body = [
            token
            for token in self.tokenizer.encode(text, add_special_tokens=False)
            if token not in self._tags
        ]
        return [self.ids["<info>"], *body[:limit], self.ids["</info>"]]

    def script(self, step: ScriptedAction) -> list[int]:
        """The tokens of an expert's action. Raises ValueError unless it is a query or an answer."""
        kind, text = step.action
        if kind not in ("query", "answer"):
            raise ValueError(f"expert_action: wanted a query or an answer, got {reprlib.repr(kind)}")
        written = f"<IS> {step.state} </IS> <{kind}> {text} </{kind}>"
        return self.tokenizer.encode(written, add_special_tokens=False)

    def action(self, tokens: list[int]) -> Action:
        """What an action asks of the environment; `tokens` are the action's without its `is` segment."""
        kinds: tuple[Literal["query", "answer"], ...] = ("query", "answer")
        for kind in kinds:
            begin, end = self.ids[f"<{kind}>"], self.ids[f"</{kind}>"]
            if tokens and tokens[-1] == end and begin in tokens:
                start = len(tokens) - tokens[::-1].index(begin)
                return Action(kind, self._text(tokens[start:-1]))
        return Action("malformed", self._text(tokens))

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens)).strip()


class Episode:
    """One episode: its stream of tokens, and which of these the policy still has to read and may still see.

    Boundaries come from who wrote a token: only `write`, the policy's way in, looks at tags. What a prune
    leaves is asked of `evict_from_turns`, the table that the training mask is made of.

    cached: stream index of each token in the slot, in order. unread: indices to feed now; held: after the
    prune that is due.
    """

    def __init__(
        self,
        environment: Environment,
        seed: int,
        codec: Codec,
        config: RolloutConfig,
        sampling_seed: int = 0,
        scripted: bool = False,
    ) -> None:
        self.environment, self.seed, self.codec, self.config, self.scripted = (
            environment,
            seed,
            codec,
            config,
            scripted,
        )
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.segments: list[Segment] = []
        self.turn = 1
        self._action_start = 0  # stream index
        self._state_length = 0  # tokens of this action's `is` segment, 0 before its end
        self.cached: list[int] = []
        self.unread: list[int] = []
        self.held: list[int] = []
        self.finished = ""
        self._alive: Tensor | None = None  # bool per token of the stream: a prune is due
        self._script: deque[int] = deque()
        self._began = time.perf_counter()
        generator = torch.Generator().manual_seed(seed * _SEED_STRIDE + sampling_seed)
        self._uniform = torch.rand(config.max_turns * config.max_action, generator=generator)
        self._drawn = 0
        prompt = self._ask(self._reset)
        if prompt is not None:
            self._hear("prompt", 0, prompt)
            self._begin_action()

    def positions(self) -> list[int]:
        """Position ids of `unread`: the stream's own, or, re-encoding, the places in the pruned context."""
        if self.config.regime == "carry":
            return self.unread
        return list(range(len(self.cached), len(self.cached) + len(self.unread)))

    def read(self) -> Tensor | None:
        """`unread` has been fed. Returns which cached tokens to keep, bool [cached], if a prune is due
        now.
        """
        self.cached += self.unread
        self.unread, self.held = self.held, []
        if self._alive is None:
            return None
        keep = self._alive[self.cached]
        self.cached = torch.tensor(self.cached)[keep].tolist()
        self._alive = None
        return keep

    def uniform(self) -> Tensor:
        """The next number of this episode's own random stream, in [0, 1)."""
        self._drawn += 1
        return self._uniform[self._drawn - 1]

    def forced(self) -> int:
        """The next token of the script, -1 where the policy is free."""
        return self._script.popleft() if self._script else -1

    def write(self, token: int, logprob: float) -> None:
        """The policy writes one token; where this completes an action, the environment answers."""
        self.unread = [len(self.tokens)]
        self.tokens.append(token)
        self.logprobs.append(logprob)
        length = len(self.tokens) - self._action_start
        complete = token in self.codec.stops or length == self.config.max_action
        if token == self.codec.ids["</IS>"] and self._state_length == 0:
            self._state_length = length
            self.segments.append(Segment("is", self.turn, length))
            if not complete:
                self._boundary("query")
        if complete:
            self._complete_action()

    def trajectory(self) -> Trajectory:
        """What has happened, once `finished` says why it is over."""
        objectives = self._ask(lambda: _expect("objectives", self.environment.objectives, int))
        score = None if self._failed else self._ask(lambda: _checked_score(self.environment.score()))
        return Trajectory(
            tokens=torch.tensor(self.tokens, dtype=torch.int64),
            segments=self.segments,
            logprobs=torch.tensor(self.logprobs, dtype=torch.float32),
            prune=self.config.prune,
            score=dict(_FAILED) if score is None else score,
            finished=self.finished,
            seconds=time.perf_counter() - self._began,
            objectives=1 if objectives is None else objectives,
            seed=self.seed,
        )

    def _begin_action(self) -> None:
        self._action_start, self._state_length = len(self.tokens), 0
        if self.scripted:
            self._script = deque(self._ask(self._expert) or [])

    def _complete_action(self) -> None:
        written = self.tokens[self._action_start + self._state_length :]
        action = self.codec.action(written)
        if written:
            kind: Kind = "answer" if action.kind == "answer" else "query"
            self.segments.append(Segment(kind, self.turn, len(written)))
        reply = self._ask(lambda: self._step(action))
        if reply is None:
            return
        info, done = reply
        if done:
            self.finished = "answered" if action.kind == "answer" else "ended by the environment"
        elif self.turn == self.config.max_turns:
            self.finished = "turn limit"
        else:
            self._boundary("info")
            self._hear("info", self.turn, info)
            self.turn += 1
            self._begin_action()

    def _boundary(self, following: Kind) -> None:
        """A place where tokens may leave: ask the table, as if one token of kind `following` came next."""
        n = len(self.tokens)
        evict = evict_from_turns([*self.segments, Segment(following, self.turn, 1)], self.config.prune)[:n]
        if not (evict == n).any():
            return
        alive = evict > n
        if self.config.regime == "carry":
            self._alive = alive  # the last token written is fed first: it still sees what leaves
        else:
            prompt = self.segments[0].length
            self.cached = self.cached[:prompt]
            self.unread = [prompt + j for j in alive[prompt:].nonzero()[:, 0].tolist()]

    def _hear(self, kind: Kind, turn: int, tokens: list[int]) -> None:
        begin = len(self.tokens)
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.segments.append(Segment(kind, turn, len(tokens)))
        (self.unread if self._alive is None else self.held).extend(range(begin, len(self.tokens)))

    def _ask(self, question: Callable[[], _Answer]) -> _Answer | None:
        """Ask the environment, and turn what it gives into what the loop works with: no question below gives
        None. Whatever this raises ends this episode and no other.
        """
        try:
            return question()
        except Exception as error:  # a world is foreign code: no error of it may lose the batch
            if not self._failed:
                self.finished = f"{ENVIRONMENT_ERROR}: {type(error).__name__}: {error}"
            self.unread, self.held = [], []
            return None

    @property
    def _failed(self) -> bool:
        return self.finished.startswith(ENVIRONMENT_ERROR)

    # The questions.

    def _reset(self) -> list[int]:
        """The tokens of the prompt."""
        text = _expect("reset", self.environment.reset(self.seed), str)
        tokens = self.codec.prompt(text)
        if not tokens:
            raise ValueError(f"reset: wanted a prompt of at least one token, got {text!r}")
        return tokens

    def _step(self, action: Action) -> tuple[list[int], bool]:
        """The tokens of what the environment says to an action, and whether the episode is over."""
        text, _, done = _expect("step", self.environment.step(action), Observation)
        info = self.codec.info(_expect("step: text", text, str), self.config.max_info)
        return info, _expect("step: done", done, bool)

    def _expert(self) -> list[int]:
        """The tokens of the expert's next action."""
        step = self.environment.expert_action()  # type: ignore[attr-defined]
        return self.codec.script(_expect("expert_action", step, ScriptedAction))


def _expect(what: str, value: object, kind: type[_Answer]) -> _Answer:
    if not isinstance(value, kind):
        got = f"{type(value).__name__} {reprlib.repr(value)}"
        raise TypeError(f"{what}: wanted {kind.__name__}, got {got}")
    return value


def _checked_score(score: object) -> dict[str, float]:
    given = _expect("score", score, dict)
    sound = all(isinstance(value, Real) and math.isfinite(value) for value in given.values())
    if not sound or not _FAILED.keys() <= given.keys():
        raise ValueError(f"score: wanted finite numbers for {', '.join(_FAILED)}, got {given}")
    return {str(name): float(value) for name, value in given.items()}
