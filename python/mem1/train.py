"""One training run, top to bottom: a model with random weights, a supervised warm start, then PPO."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mem1 import checkpoint
from mem1.checkpoint import LAST, whole_file
from mem1.config import TrainConfig
from mem1.engine import Engine
from mem1.envs.multihop import MultiHopEnv
from mem1.model import build_critic, build_model
from mem1.ppo import PPO
from mem1.rollout import rollout
from mem1.tokenizer import build_tokenizer
from mem1.trajectory import ENVIRONMENT_ERROR, Trajectory
from mem1.warmstart import warm_start

METRICS = "metrics.jsonl"
CONFIG = "train.json"


def train(
    config: TrainConfig,
    out: Path,
    *,
    init: Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> checkpoint.Checkpoint:
    """Train and return the last checkpoint, which is also in the folder `out/last`.

    `out` gets train.json (the settings), metrics.jsonl (one line per step, its "phase" is warmstart or ppo)
    and the checkpoint. `init` is a checkpoint to start from in the place of random weights and a warm start;
    `resume` goes on from `out/last`. The warm start is in the world and the layout of the rollouts to come.

    Episodes that an environment error ended are left out of their update; an update that has no other is
    skipped, and counts. An exception or Ctrl-C leaves the checkpoint of the last complete update; only if it
    comes in the middle of an update, when the weights are half-way, that of the last `save_every`.
    """
    make_world = partial(MultiHopEnv, **config.environment())
    make_world()  # an argument that is out of range fails before any work
    if resume and init is not None:
        raise ValueError(f"init: wanted None together with resume, got {str(init)!r}")
    lessons = replace(
        config.warmstart, regime=config.rollout.regime, prune=config.rollout.prune, **config.environment()
    )
    config = replace(config, warmstart=lessons)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    start = out / LAST if resume else init
    if start is not None:
        actor, tokenizer, trainer = checkpoint.load(start)
        say(f"loaded {start}: {sum(p.numel() for p in actor.parameters()):,} parameters")
    else:
        tokenizer, trainer = build_tokenizer(), None
        actor = build_model(tokenizer, config.model)
        say(f"new model: {sum(p.numel() for p in actor.parameters()):,} parameters, {len(tokenizer)} tokens")
    state = _checked(trainer, config, out / LAST) if resume else None

    out.mkdir(parents=True, exist_ok=True)
    with whole_file(out / CONFIG) as file:
        json.dump(asdict(config), file, indent=2)
    metrics = out / METRICS
    _keep_records(metrics, state["ppo"]["updates"] if state else None)
    if start is None:
        warm_start(actor, tokenizer, config.warmstart, metrics, say)
        checkpoint.save(out / LAST, actor, tokenizer)

    critic = build_critic(actor)
    reference = copy.deepcopy(actor).requires_grad_(False) if config.ppo.kl else None
    ppo = PPO(actor, critic, reference, config.ppo, config.rollout.regime, config.rollout.temperature)
    if state:
        critic.load_state_dict(state["critic"])
        if reference is not None:
            reference.load_state_dict(state["reference"])
        ppo.load_state_dict(state["ppo"])

    engine = Engine(actor.eval(), min(config.rollout.slots, config.batch), config.rollout.prefill_tokens)
    began, slowest, complete = time.perf_counter(), 0.0, True
    try:
        while ppo.updates < config.updates:
            clock = time.perf_counter()
            if config.seconds is not None and clock - began + slowest > config.seconds:
                break
            first = config.seed + ppo.updates * config.batch
            seeds = range(first, first + config.batch)
            actor.eval()
            trajectories = list(rollout(actor, tokenizer, make_world, seeds, config.rollout, engine=engine))
            rolled = time.perf_counter()
            record: dict[str, Any] = {"phase": "ppo", "step": ppo.updates + 1, **describe(trajectories)}
            sound = [t for t in trajectories if not t.finished.startswith(ENVIRONMENT_ERROR)]
            if sound:
                complete = False
                record |= ppo.update(sound, torch.Generator().manual_seed(first))
                complete = True
            else:
                ppo.updates += 1  # the next batch has other seeds, and the loop an end
            record |= {"rollout_seconds": rolled - clock, "update_seconds": time.perf_counter() - rolled}
            checkpoint.append_json(metrics, record)
            say(_line(record) if sound else f"update {ppo.updates:3d}  skipped: {trajectories[0].finished}")
            if ppo.updates % config.save_every == 0:
                _save(out, actor, tokenizer, critic, reference, ppo)
            slowest = max(slowest, time.perf_counter() - clock)
    finally:
        if complete:
            _save(out, actor, tokenizer, critic, reference, ppo)
    return checkpoint.Checkpoint(actor.eval(), tokenizer, None)


def _checked(trainer: dict[str, Any] | None, config: TrainConfig, path: Path) -> dict[str, Any]:
    """The trainer's state in the checkpoint `path`, if a run with `config` can go on from it."""
    if trainer is None:
        raise ValueError(f"resume: wanted a checkpoint of PPO in {path}, got one without trainer state")
    if config.ppo.kl and trainer["reference"] is None:
        raise ValueError(f"kl: wanted 0, as in the run that is resumed (no reference), got {config.ppo.kl}")
    return trainer


def _keep_records(metrics: Path, updates: int | None) -> None:
    """Drop what `metrics` says of PPO after that many updates; None: start it anew."""
    kept = []
    if updates is not None and metrics.exists():
        for line in metrics.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):  # cut off when the run died
                break
            record = json.loads(line)
            if record["phase"] != "ppo" or record["step"] <= updates:
                kept.append(line)
    with whole_file(metrics) as file:
        file.writelines(kept)


def _line(record: dict[str, Any]) -> str:
    return (
        "update {step:3d}  reward {reward:.3f}  exact match {exact_match:.2f}  answered {answered:.2f}  "
        "max |dlogp| {dlogp_max:.1e}  KL {kl_reference:.4f}  {policy_tokens} tokens  "
        "{rollout_seconds:.1f} + {update_seconds:.1f} s".format(**record)
    )


def describe(trajectories: list[Trajectory]) -> dict[str, float | int]:
    """What a batch of episodes looks like. Means over the episodes, except the token counts, which are
    sums.
    """
    return {
        "reward": fmean(t.reward for t in trajectories),
        "exact_match": fmean(t.score.get("exact_match", 0.0) for t in trajectories),
        "answered": fmean(t.finished == "answered" for t in trajectories),
        "environment_errors": sum(t.finished.startswith(ENVIRONMENT_ERROR) for t in trajectories),
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
