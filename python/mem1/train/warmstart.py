"""The supervised warm start: next-token prediction of what experts write."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mem1.config import WarmStartConfig
from mem1.envs.toy.auxiliary import copy_example, lookup_example
from mem1.envs.toy.examples import Example
from mem1.envs.toy.expert import expert_example
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.seeds import derive_seed
from mem1.train.batches import PackedBatch, label_hidden
from mem1.train.optim import AdamW
from mem1_core.layout import Regime, TrajectoryLayout


def optimizer_for(actor: Any, config: WarmStartConfig) -> AdamW:
    """The optimiser of a warm start: weight decay for matrices alone."""
    matrices = [p for p in actor.parameters() if p.dim() > 1]
    vectors = [p for p in actor.parameters() if p.dim() <= 1]
    return AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        max_grad_norm=config.max_grad_norm,
    )


def warm_start(
    actor: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: WarmStartConfig,
    *,
    seed: int = 0,
    optimizer: AdamW | None = None,
    done: int = 0,
) -> Iterator[dict[str, float]]:
    """Train `actor` in place, a step for each record that is taken: `step`, `loss`, `token_accuracy`,
    `grad_norm`, `learning_rate`.

    Each step is one stream of freshly drawn examples, which follow from `seed` and the step. A run that was
    stopped after `done` steps goes on with its `optimizer` (`optimizer_for`) as it was then. Raises Diverged
    when the gradients stay without a finite norm.
    """
    ids = tokenizer.get_vocab()
    device = next(actor.parameters()).device
    optimizer = optimizer or optimizer_for(actor, config)
    for step in range(done, config.steps):
        actor.train()
        progress = step / config.steps
        draw = random.Random(derive_seed(seed, "warm start", step))
        batch = list(examples(ids, draw, config, progress))
        logits, labels = label_logits(actor, batch, config.regime, device)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        rate = config.learning_rate * rate_factor(step, progress, config)
        norm = optimizer.step(rate)
        actor.eval()
        yield {
            "step": step + 1,
            "loss": loss.item(),
            "token_accuracy": (logits.argmax(-1) == labels).float().mean().item(),
            "grad_norm": norm,
            "learning_rate": rate,
        }


def rate_factor(step: int, done: float, config: WarmStartConfig) -> float:
    """The learning rate's factor: up in `warmup_steps`, flat for the first half, then a cosine to 0.02."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(max(2.0 * done - 1.0, 0.0), 1.0)))


def examples(
    ids: Mapping[str, int], draw: random.Random, config: WarmStartConfig, done: float
) -> Iterator[Example]:
    """Examples until `batch_tokens` are reached.

    The curriculum: the share of auxiliary tasks falls linearly from `config.auxiliary_fraction` to a quarter
    of it, and the most questions of an episode grow from the least, plus 1, to `config.objectives[1]` over
    the first half.
    """
    least, most = config.objectives
    reach = min(most, least + 1 + int((most - least) * min(1.0, 2.0 * done)))
    auxiliary = config.auxiliary_fraction * (1.0 - 0.75 * done)
    tokens = 0
    while tokens < config.batch_tokens:
        if draw.random() < auxiliary:
            example = draw.choice((copy_example, lookup_example))(ids, draw)
        else:
            environment = MultiHopEnv((least, reach), config.hops, config.passage_tokens)
            example = expert_example(environment, draw.getrandbits(53), ids, config.prune)
        tokens += len(example.tokens)
        yield example


def label_logits(
    actor: Any, batch: list[Example], regime: Regime, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits [M, V] and labels int64 [M] of the policy's tokens, by one forward over one packed stream."""
    layouts = [TrajectoryLayout.from_segments(e.segments, regime=regime, prune=e.prune) for e in batch]
    layout = TrajectoryLayout.pack(layouts).to(device)
    tokens = torch.tensor([token for e in batch for token in e.tokens], device=device)
    stream = PackedBatch(tokens, layout)
    return actor.get_output_embeddings()(label_hidden(actor, stream)), stream.targets
