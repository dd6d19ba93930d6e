"""One training run, top to bottom: a model with random weights, a supervised warm start, then PPO."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mem1 import checkpoint
from mem1.config import TrainConfig
from mem1.envs.multihop import MultiHopEnv
from mem1.model import build_critic, build_model
from mem1.ppo import PPO
from mem1.rollout import rollout
from mem1.tokenizer import build_tokenizer
from mem1.trajectory import Trajectory
from mem1.warmstart import warm_start

METRICS = "metrics.jsonl"
LAST = "last"


def train(
    config: TrainConfig,
    out: Path,
    *,
    init: Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> checkpoint.Checkpoint:
    """Train and return the last checkpoint, which is also in the folder `out/last`.

    `out` gets config.json, metrics.jsonl (one line per step, its "phase" is warmstart or ppo) and the
    checkpoint. `init` is a checkpoint to start from in the place of random weights and a warm start; `resume`
    goes on from `out/last`.
    """
    out.mkdir(parents=True, exist_ok=True)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    metrics = out / METRICS
    start = out / LAST if resume else init
    if start is not None:
        actor, tokenizer, trainer = checkpoint.load(start)
        say(f"loaded {start}: {sum(p.numel() for p in actor.parameters()):,} parameters")
    else:
        metrics.write_text("")
        tokenizer, trainer = build_tokenizer(), None
        actor = build_model(tokenizer, config.model)
        say(f"new model: {sum(p.numel() for p in actor.parameters()):,} parameters, {len(tokenizer)} tokens")
        # The warm start learns the layout that the rollouts will have.
        lessons = replace(config.warmstart, regime=config.rollout.regime, hops=config.hops)
        warm_start(actor, tokenizer, lessons, metrics, say)
        checkpoint.save(out / LAST, actor, tokenizer)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=2))

    critic = build_critic(actor)
    reference = copy.deepcopy(actor).requires_grad_(False) if config.ppo.kl else None
    ppo = PPO(actor, critic, reference, config.ppo, config.rollout.regime, config.rollout.temperature)
    if resume:
        if trainer is None:
            raise ValueError(
                f"resume: wanted a checkpoint of a PPO run in {out / LAST}, got one without trainer state"
            )
        critic.load_state_dict(trainer["critic"])
        if reference is not None:
            reference.load_state_dict(trainer["reference"])
        ppo.load_state_dict(trainer["ppo"])

    began, slowest = time.perf_counter(), 0.0
    while ppo.updates < config.updates:
        clock = time.perf_counter()
        if config.seconds is not None and clock - began + slowest > config.seconds:
            break
        first = config.seed + ppo.updates * config.batch
        seeds = range(first, first + config.batch)
        actor.eval()
        trajectories = list(
            rollout(actor, tokenizer, lambda: MultiHopEnv(**config.environment()), seeds, config.rollout)
        )
        rolled = time.perf_counter()
        record: dict[str, Any] = {"phase": "ppo", "step": ppo.updates + 1, **describe(trajectories)}
        record |= ppo.update(trajectories, torch.Generator().manual_seed(first))
        record |= {"rollout_seconds": rolled - clock, "update_seconds": time.perf_counter() - rolled}
        checkpoint.append_json(metrics, record)
        say(
            "update {step:3d}  reward {reward:.3f}  exact match {exact_match:.2f}  answered {answered:.2f}  "
            "max |dlogp| {dlogp_max:.1e}  KL {kl_reference:.4f}  {policy_tokens} tokens  "
            "{rollout_seconds:.1f} + {update_seconds:.1f} s".format(**record)
        )
        if ppo.updates % config.save_every == 0:
            _save(out, actor, tokenizer, critic, reference, ppo)
        slowest = max(slowest, time.perf_counter() - clock)
    if ppo.updates:
        _save(out, actor, tokenizer, critic, reference, ppo)
    return checkpoint.Checkpoint(actor.eval(), tokenizer, None)


def describe(trajectories: list[Trajectory]) -> dict[str, float | int]:
    """What a batch of episodes looks like. Means over the episodes, except the token counts, which are
    sums.
    """
    return {
        "reward": fmean(t.reward for t in trajectories),
        "exact_match": fmean(t.score.get("exact_match", 0.0) for t in trajectories),
        "answered": fmean(t.finished == "answered" for t in trajectories),
        "environment_errors": sum(t.finished.startswith("environment error") for t in trajectories),
        "turns": fmean(t.turns for t in trajectories),
        "peak_tokens": fmean(t.peak_tokens() for t in trajectories),
        "tokens": sum(t.tokens.numel() for t in trajectories),
        "policy_tokens": sum(int(t.policy_mask.sum()) for t in trajectories),
    }


def _save(out: Path, actor: Any, tokenizer: Any, critic: Any, reference: Any, ppo: PPO) -> None:
    trainer = {
        "critic": critic.state_dict(),
        "reference": None if reference is None else reference.state_dict(),
        "ppo": ppo.state_dict(),
    }
    checkpoint.save(out / LAST, actor, tokenizer, trainer)
