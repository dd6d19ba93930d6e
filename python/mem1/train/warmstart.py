"""The supervised warm start: next-token prediction of what experts write."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError
from mem1.config import RolloutConfig, WarmStartConfig, default_steps
from mem1.engine.output_layer import OutputLayer
from mem1.envs.base import Example, ExpertEnvironment
from mem1.envs.tasks import TaskStream
from mem1.models.build import without_dropout
from mem1.parsing.token_text import unknown_id
from mem1.rollout.rollout_loop import play_expert
from mem1.seeds import derive_seed
from mem1.train.batches import PackedBatch, Policy
from mem1.train.optim import AdamW
from mem1.trajectory import FinishReason
from mem1_core.layout import Regime, TrajectoryLayout
from mem1_core.ops import linear_logprob
from mem1_core.segments import policy_tokens

DrawExample = Callable[[random.Random, float], Example]


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
    config: WarmStartConfig,
    draw_example: DrawExample,
    *,
    regimes: Sequence[Regime] = ("carry",),
    seed: int = 0,
    optimizer: AdamW | None = None,
    done: int = 0,
) -> Iterator[dict[str, float]]:
    """Train `actor` in place, a step for each record that is taken: `step`, `loss`, `token_accuracy`,
    `grad_norm`, `learning_rate`.

    Each step is one stream of freshly drawn examples, laid out in the `regimes` by turns, which follow from
    `seed` and the step: `draw_example(rng, progress)` gets a generator of random numbers and how far the warm
    start is, 0 to 1. A run that was stopped after `done` steps goes on with its `optimizer` (`optimizer_for`)
    as it was then. Raises Diverged when the gradients stay without a finite norm.
    """
    device = next(actor.parameters()).device
    optimizer = optimizer or optimizer_for(actor, config)
    total = default_steps(None) if config.steps is None else config.steps
    for step in range(done, total):
        without_dropout(actor)
        progress = step / total
        rng = random.Random(derive_seed(seed, "warm start", step))
        batch = draw_batch(draw_example, rng, progress, config.batch_tokens)
        logprob, right = label_logprobs(actor, batch, regimes[step % len(regimes)], device)
        loss = -logprob.mean()
        loss.backward()
        rate = config.learning_rate * rate_factor(step, progress, config)
        norm = optimizer.step(rate)
        actor.eval()
        yield {
            "step": step + 1,
            "loss": loss.item(),
            "token_accuracy": right.float().mean().item(),
            "grad_norm": norm,
            "learning_rate": rate,
        }


def rate_factor(step: int, done: float, config: WarmStartConfig) -> float:
    """The learning rate's factor: up in `warmup_steps`, flat for the first half, then a cosine to 0.02."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(max(2.0 * done - 1.0, 0.0), 1.0)))


def draw_batch(
    draw_example: DrawExample, rng: random.Random, progress: float, batch_tokens: int
) -> list[Example]:
    """Examples until `batch_tokens` are reached. InputError for one that nothing can be learned from."""
    batch: list[Example] = []
    while sum(len(example.tokens) for example in batch) < batch_tokens:
        example = draw_example(rng, progress)
        tokens, segments = len(example.tokens), sum(segment.length for segment in example.segments)
        if tokens != segments:
            raise InputError(f"draw_example: expected segments of {tokens} tokens in all, got {segments}")
        if not policy_tokens(example.segments).any():
            raise InputError(f"draw_example: expected tokens that the policy writes, got {example.segments}")
        batch.append(example)
    return batch


def expert_examples(
    tokenizer: PreTrainedTokenizerBase,
    make_environment: Callable[[], ExpertEnvironment],
    config: RolloutConfig,
    rows: TaskStream | None = None,
) -> DrawExample:
    """Episodes of the environment's own expert, each with any of the rows, as a warm start draws them.

    InputError for an environment without an expert; where an episode of it does not come to its own end, by
    an error or at a limit of `config`; and where it writes what the tokenizer does not know.
    """
    environment = make_environment()
    if not hasattr(environment, "expert_action"):
        raise InputError(
            "make_environment: expected one with expert_action to learn from, got "
            f"{type(environment).__name__} (or give draw_example, or a warm start of no steps)"
        )

    def draw(rng: random.Random, progress: float) -> Example:
        seed = rng.getrandbits(53)
        tasks = rows and [rng.choice(rows.tasks)]
        (played,) = play_expert(tokenizer, make_environment, [seed], config, tasks)
        written = played.tokens[played.policy_mask]
        if played.finish_reason not in (FinishReason.ANSWERED, FinishReason.ENVIRONMENT):
            what = played.error or (
                f"{played.finish_reason} with max_turns={config.max_turns} and "
                f"max_action_tokens={config.max_action_tokens}"
            )
            raise InputError(f"expert: expected an episode that it ends, at seed {seed}, got {what}")
        unknown = unknown_id(tokenizer)
        if unknown is not None and bool((written == unknown).any()):
            text = tokenizer.decode(written)
            raise InputError(f"expert: expected words of the tokenizer, at seed {seed}, got {text!r}")
        return Example(played.tokens.tolist(), played.segments, played.prune)

    return draw


def label_logprobs(
    actor: Any, batch: list[Example], regime: Regime, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of the policy's tokens [M], by one forward over one packed stream: their log-probs, differentiable, and
    bool, whether each is the likeliest one.
    """
    layouts = [TrajectoryLayout.from_segments(e.segments, regime=regime, prune=e.prune) for e in batch]
    layout = TrajectoryLayout.pack(layouts).to(device)
    tokens = torch.tensor([token for e in batch for token in e.tokens], device=device)
    stream = PackedBatch(tokens, layout)

    def finish(hidden: Tensor, head: OutputLayer) -> tuple[Tensor, Tensor]:
        logprob, _ = linear_logprob(
            hidden, head.weight, stream.targets, head.temperature(1.0), bias=head.bias, softcap=head.softcap
        )
        return logprob, head.likeliest(hidden.detach()) == stream.targets

    return Policy(actor)(stream, finish)
