"""The task of `bench_rollout.py`: episodes of drawn lengths, who plays them, and how both are checked.

A policy with random weights never writes a tag, so lengths come from a script. In ours an expert's words are
forced after the sampler has chosen: all of its work is done. `generate` writes, for every row, as many tokens
as the longest action of its batch has, since a batched agent loop waits for that one, and goes on with as
many of them as the row's own action has. It keeps no log-probs and need not tokenise the answers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from mem1.config import Regime, RolloutConfig
from mem1.engine.engine import Engine
from mem1.envs.base import Action, ExpertAction, Step
from mem1.envs.toy.tokenizer import build_tokenizer
from mem1.envs.toy.words import FILLER
from mem1.rollout.rollout_loop import rollout
from mem1.train.parity import parity
from mem1.trajectory import Trajectory
from mem1_core.integrations.transformers import NAME


class Lengths(NamedTuple):
    """Tokens of one episode; actions and infos have one entry per turn."""

    prompt: int
    actions: list[int]
    infos: list[int]


@dataclass(frozen=True)
class Workload:
    """Episodes whose lengths are drawn, each from its own seed. A range includes both ends."""

    episodes: int
    turns: int = 8
    prompt: tuple[int, int] = (360, 440)
    action: tuple[int, int] = (64, 120)
    info: tuple[int, int] = (300, 500)

    def lengths(self, seed: int) -> Lengths:
        generator = random.Random(seed)
        actions, infos = (
            [generator.randint(*span) for _ in range(self.turns)] for span in (self.action, self.info)
        )
        return Lengths(generator.randint(*self.prompt), actions, infos)

    def all_lengths(self) -> list[Lengths]:
        return [self.lengths(seed) for seed in range(self.episodes)]

    def policy_tokens(self) -> int:
        return sum(sum(drawn.actions) for drawn in self.all_lengths())

    def config(self, slots: int, regime: Regime = "carry") -> RolloutConfig:
        return RolloutConfig(num_slots=slots, regime=regime, max_turns=self.turns)

    def __str__(self) -> str:
        spans = (("prompt", self.prompt), ("action", self.action), ("info", self.info))
        drawn = ", ".join(f"{name} {'-'.join(map(str, sorted({*span})))}" for name, span in spans)
        return f"{self.episodes} episode{'s' * (self.episodes > 1)} of {self.turns} turns ({drawn})"


class RandomWords:
    """An environment, and its expert, that say random words: one word is one token."""

    objectives = 1
    run_inline = True

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def reset(self, seed: int, task=None) -> str:
        self.lengths, self.turn, self._words = self.workload.lengths(seed), 0, random.Random(seed)
        return self._text(self.lengths.prompt)

    def step(self, action: Action) -> Step:
        self.turn += 1
        # Two tokens of an info are its tags, four of an action.
        text = self._text(self.lengths.infos[self.turn - 1] - 2)
        return Step(text, 0.0, self.turn == self.workload.turns)

    def expert_action(self) -> ExpertAction:
        words = self.lengths.actions[self.turn] - 4
        kind = "answer" if self.turn + 1 == self.workload.turns else "query"
        return ExpertAction(self._text(words - words // 4), Action(kind, self._text(words // 4)))

    def _text(self, words: int) -> str:
        return " ".join(self._words.choices(FILLER, k=words))


def play(engine: Engine, workload: Workload, regime: Regime = "carry") -> list[Trajectory]:
    """Ours."""
    make, config = partial(RandomWords, workload), workload.config(engine.num_slots, regime)
    seeds, tokenizer = range(workload.episodes), build_tokenizer()
    return list(rollout(engine.model, tokenizer, make, seeds, config, expert=True, engine=engine))


class Turn(NamedTuple):
    """What `generate` was given and gave, int64 [b] each: real tokens of the contexts, tokens written."""

    contexts: Tensor
    written: Tensor


def generate(model: Any, workload: Workload, batch: int) -> list[Turn]:
    """The peer: episodes in batches that go from turn to turn together, each turn one call of `generate` on
    prompt, last action and last info.
    """
    turns, every = [], workload.all_lengths()
    with plain_attention(model):
        for begin in range(0, len(every), batch):
            turns += generate_batch(model, every[begin : begin + batch])
    return turns


def generate_batch(model: Any, episodes: Sequence[Lengths]) -> Iterator[Turn]:
    device, generator = model.device, torch.Generator().manual_seed(0)

    def words(length: int) -> Tensor:
        return torch.randint(20, 120, (length,), generator=generator)

    prompts = [words(episode.prompt) for episode in episodes]
    contexts = prompts
    for turn in range(len(episodes[0].actions)):
        lengths = [episode.actions[turn] for episode in episodes]
        longest = max(map(len, contexts))
        ids = torch.zeros(len(episodes), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, context in enumerate(contexts):
            ids[row, longest - len(context) :] = context
            mask[row, longest - len(context) :] = 1
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(lengths), pad_token_id=0
        )
        given = {"attention_mask": mask.to(device), "generation_config": settings}
        out = model.generate(ids.to(device), **given)[:, longest:].cpu()
        yield Turn(mask.sum(1), torch.full((len(episodes),), out.shape[1]))
        contexts = [
            torch.cat([prompts[row], out[row, : lengths[row]], words(episodes[row].infos[turn])])
            for row in range(len(episodes))
        ]


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def check_ours(
    model: Any, workload: Workload, regime: Regime, trajectories: list[Trajectory], checked: int = 4
) -> None:
    """All lengths are those drawn; the log-probs of some are those that a trainer computes."""
    assert sorted(t.seed for t in trajectories) == list(range(workload.episodes))
    for trajectory in trajectories:
        lengths = workload.lengths(trajectory.seed)
        assert trajectory.finish_reason == "answered", trajectory.error
        of_kind = {
            kind: [s.length for s in trajectory.segments if s.kind == kind] for kind in ("state", "info")
        }
        acted = [s.length for s in trajectory.segments if s.kind in ("query", "answer")]
        assert trajectory.segments[0].length == lengths.prompt
        assert [a + b for a, b in zip(of_kind["state"], acted, strict=True)] == lengths.actions
        assert of_kind["info"] == lengths.infos[:-1]  # nothing is said to the answer
    found = parity(model, trajectories[:checked], regime)
    if found.dtype == "float32":
        assert found.max_dlogp <= 5e-5, found
    else:
        assert found.mean_dlogp <= 5e-3, found
        assert found.kl <= 1e-4, found


def check_generated(workload: Workload, batch: int, turns: list[Turn]) -> None:
    """Each context is prompt, last action, last info; each row has as many tokens as the longest wants."""
    every, turn = workload.all_lengths(), iter(turns)
    for begin in range(0, len(every), batch):
        episodes = every[begin : begin + batch]
        for t in range(workload.turns):
            contexts = [e.prompt + (e.actions[t - 1] + e.infos[t - 1] if t else 0) for e in episodes]
            contexts_given, written = next(turn)
            assert contexts_given.tolist() == contexts
            assert written.tolist() == [max(e.actions[t] for e in episodes)] * len(episodes)
    assert next(turn, None) is None
