"""The supervised warm start: next-token prediction of what scripted experts write."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mem1.checkpoint import append_json
from mem1.config import WarmStartConfig
from mem1.envs.multihop import MultiHopEnv
from mem1.ppo import Stream, label_hidden
from mem1.tasks import Example
from mem1.tasks.auxiliary import copy_example, lookup_example
from mem1.tasks.scripted import scripted_example
from mem1_core.layout import TrajectoryLayout
from mem1_core.trajectory import Regime

REPORT_EVERY = 50  # steps


def warm_start(
    actor: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: WarmStartConfig,
    metrics: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[float]:
    """Train `actor` in place; returns the loss of every step.

    Each step is one stream of freshly drawn examples. Progress, from 0 to 1, is the share of the steps or of
    the seconds that is used up, whichever is larger; it drives the curriculum and the learning rate.
    `metrics` gets one line of JSON per step, `say` one line of text every `REPORT_EVERY` steps.
    """
    ids = tokenizer.get_vocab()
    device = next(actor.parameters()).device
    draw = random.Random(config.seed)
    matrices = [p for p in actor.parameters() if p.dim() > 1]
    vectors = [p for p in actor.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    losses: list[float] = []
    began = time.perf_counter()
    actor.train()
    while (done := progress(len(losses), time.perf_counter() - began, config)) < 1.0:
        batch = list(examples(ids, draw, config, done))
        rate = config.learning_rate * rate_factor(len(losses), done, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits, labels = label_logits(actor, batch, config.regime, device)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(actor.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step, right = len(losses), (logits.argmax(-1) == labels).float().mean().item()
        seconds = time.perf_counter() - began
        if metrics is not None:
            record = {"phase": "warmstart", "step": step, "loss": losses[-1], "token_accuracy": right}
            append_json(metrics, record | {"learning_rate": rate, "seconds": seconds})
        if step % REPORT_EVERY == 0:
            say(f"warm start {step:4d}  loss {losses[-1]:.3f}  tokens right {right:.3f}  {seconds:.0f} s")
    actor.eval()
    return losses


def progress(step: int, seconds: float, config: WarmStartConfig) -> float:
    """How much of the warm start lies behind: 0 at its start, 1 (or more) when it is over."""
    used = step / config.steps if config.steps else 1.0
    return used if config.seconds is None else max(used, seconds / config.seconds)


def rate_factor(step: int, done: float, config: WarmStartConfig) -> float:
    """The learning rate's factor: up in `warmup_steps`, flat for the first half, then a cosine to 0.02."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(max(2.0 * done - 1.0, 0.0), 1.0)))


def examples(
    ids: Mapping[str, int], draw: random.Random, config: WarmStartConfig, done: float
) -> Iterator[Example]:
    """Examples until `batch_tokens` are reached.

    The curriculum: the share of auxiliary tasks falls linearly from `config.auxiliary` to a quarter of it,
    and the most questions of an episode grow from the least, plus 1, to `config.objectives[1]` over the first
    half.
    """
    least, most = config.objectives
    reach = min(most, least + 1 + int((most - least) * min(1.0, 2.0 * done)))
    auxiliary = config.auxiliary * (1.0 - 0.75 * done)
    tokens = 0
    while tokens < config.batch_tokens:
        if draw.random() < auxiliary:
            example = draw.choice((copy_example, lookup_example))(ids, draw)
        else:
            environment = MultiHopEnv((least, reach), config.hops, config.passage_tokens)
            # Seeds far above those that evaluations and PPO count up from 0.
            example = scripted_example(environment, 2**32 + draw.getrandbits(32), ids, config.prune)
        tokens += len(example.tokens)
        yield example


def label_logits(
    actor: Any, batch: list[Example], regime: Regime, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits [M, V] and labels int64 [M] of the policy's tokens, by one forward over one packed stream."""
    layouts = [TrajectoryLayout.from_turns(e.segments, regime=regime, prune=e.prune) for e in batch]
    layout = TrajectoryLayout.packed(layouts).to(device)
    tokens = torch.tensor([token for e in batch for token in e.tokens], device=device)
    stream = Stream(tokens, layout)
    return actor.get_output_embeddings()(label_hidden(actor, stream)), stream.targets
