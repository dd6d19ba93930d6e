"""One training run, top to bottom: a model, a supervised warm start, then PPO."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError, require
from mem1.config import TrainConfig
from mem1.engine.policy_checks import check_policy
from mem1.envs.base import Environment, ExpertEnvironment
from mem1.envs.tasks import TaskStream
from mem1.evaluation.results import error_counts
from mem1.io import append_json, without_nan
from mem1.models.build import build_critic, build_model, dropouts
from mem1.models.load import load_report
from mem1.rollout.rollout_loop import check_positions, make_codec, make_engine, rollout
from mem1.runtime.device import pick_device, whereabouts
from mem1.runtime.interrupts import Interrupts
from mem1.runtime.progress import Progress
from mem1.seeds import derive_seed
from mem1.train import checkpoint
from mem1.train.checkpoint import Place
from mem1.train.ppo import PPO
from mem1.train.run_folder import Resumed, RunFolder
from mem1.train.warmstart import DrawExample, expert_examples, optimizer_for, warm_start
from mem1.trajectory import FinishReason, Trajectory


class EpisodesFailed(RuntimeError):
    """More episodes of a batch have failed than a run can learn beside."""


def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    make_environment: Callable[[], Environment],
    *,
    tasks: Iterable[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    draw_example: DrawExample | None = None,
    init: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> checkpoint.Checkpoint:
    """Train and return the last checkpoint, which is also in the folder `out/last`.

    `out` gets what `RunFolder` says: settings, metrics.jsonl (one line per step, its "phase" is warmstart or
    ppo) and checkpoints. `init` is a checkpoint to start from, in place of random weights and a warm start.

    make_environment: makes an environment for each episode of PPO (`config.environment` only keeps on record
    what it was made with). tasks: the task set, whose rows go to the episodes in an order that follows from
    the seed, all once before any comes again. tokenizer: that of a model with random weights. draw_example:
    what the warm start learns from, laid out as the rollouts to come, see `warm_start`; by default the
    episodes of the environment's expert.

    All random numbers follow from `config.seed`, and nothing from time: `resume` goes on from the newest
    checkpoint in `out` to where the unbroken run would have come. Ctrl-C and SIGTERM save the last complete
    step and raise Interrupted; an exception in the middle of an update, when the weights are half-way, leaves
    the checkpoint before.

    Episodes that failed, by an error of the environment or by numbers of the policy that are not finite, are
    left out of their update. Raises InputError for what cannot be run, EpisodesFailed when more than
    `config.max_failed` of a batch have failed, Diverged when gradients or weights are not finite any more.
    """
    progress = progress or Progress()
    if resume and overwrite:
        raise InputError("resume: expected it without overwrite, got True")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    settings = config.to_dict() | {"init": init and str(init)}
    rows = None if tasks is None else TaskStream(tasks, config.seed)
    device, run = pick_device(config.device), RunFolder(Path(out), config.keep)

    with Interrupts() as interrupts, closing(run):
        # 1. A model: of the run so far, of a checkpoint, or a new one.
        state: dict[str, Any] | None = None
        resumed = run.resume(settings) if resume else Resumed(None, init and str(init), [])
        for line in resumed.notes:
            progress.log(line)
        if resume and init is not None and str(init) != resumed.init:
            raise InputError(f"resume: expected the init of the run, {resumed.init!r}, got {str(init)!r}")
        init = resumed.init and Path(resumed.init)
        if resumed.checkpoint is not None:
            actor, tokenizer, state = resumed.checkpoint
        elif init is not None:
            actor, tokenizer, _ = checkpoint.load(init, config.model.dtype)
            progress.log(str(load_report(actor, tokenizer, str(init))))
        else:
            if tokenizer is None:
                raise InputError("tokenizer: expected one for a model with random weights, got none")
            actor = build_model(tokenizer, config.model, derive_seed(config.seed, "weights"))
        actor.to(device)
        progress.log(whereabouts(actor))
        require(any(p.requires_grad for p in actor.parameters()), "model", "weights that learn", "none")
        check_positions(actor, config.rollout)
        check_policy(actor.eval())
        make_codec(tokenizer, config.rollout, actor)  # which refuses what cannot be used
        warm = init is None and (state is None or "ppo" not in state)
        examples = draw_example
        if warm and config.warmstart.steps and examples is None:
            examples = expert_examples(
                tokenizer, cast(Callable[[], ExpertEnvironment], make_environment), config.rollout, rows
            )
        if resumed.checkpoint is None:
            run.begin(settings | {"init": resumed.init}, overwrite=overwrite or resume)

        # 2. The warm start.
        if warm:
            _warm_start(actor, tokenizer, examples, config, run, state or {}, interrupts, progress)
            state = None

        # 3. PPO.
        critic = build_critic(actor)
        reference = copy.deepcopy(actor).requires_grad_(False) if config.ppo.kl_coef else None
        ppo = PPO(actor, critic, reference, config.ppo, config.rollout.regime, config.rollout.temperature)
        if state:
            critic.load_state_dict(state["critic"])
            if reference is not None:
                reference.load_state_dict(state["reference"])
            ppo.load_state_dict(state["ppo"])
        engine = make_engine(
            actor.eval(), config.rollout, config.batch_size, progress.log, reserved_bytes=ppo.bytes_to_come
        )
        if dropped := dropouts(actor):
            progress.log(f"dropout is off during PPO ({', '.join(dropped)})")
        play = partial(rollout, actor, tokenizer, make_environment, config=config.rollout, engine=engine)
        return _ppo(ppo, tokenizer, play, rows, config, run, state or {}, interrupts, progress)


def _warm_start(
    actor: Any,
    tokenizer: Any,
    draw_example: DrawExample | None,  # None: for a warm start of no steps
    config: TrainConfig,
    run: RunFolder,
    state: dict[str, Any],
    interrupts: Interrupts,
    progress: Progress,
) -> None:
    """The supervised steps that `state` has not, with checkpoints; the last one is where PPO starts."""
    optimizer, done, total = optimizer_for(actor, config.warmstart), 0, config.warmstart.steps
    if state:
        optimizer.load_state_dict(state["optimizer"])
        done = optimizer.steps + state["skipped_steps"]
    skipped, saved = state.get("skipped_steps", 0), done if state else None

    def save() -> None:
        nonlocal saved
        if saved != done:
            saved = done  # one that fails is not tried again: what it was shall be seen
            trainer = {"optimizer": optimizer.state_dict(), "skipped_steps": skipped}
            run.save(Place(0, done), actor, tokenizer, trainer)

    regime, lessons = config.rollout.regime, config.warmstart
    steps = warm_start(
        actor,
        lessons,
        cast(DrawExample, draw_example),
        regime=regime,
        seed=config.seed,
        optimizer=optimizer,
        done=done,
    )
    complete = False  # the weights are those after `done` steps, and these are on record
    try:
        with progress.phase("warm start", total, done) as phase:
            for record in steps:
                append_json(run.metrics, without_nan({"phase": "warmstart"} | record))
                done += 1
                skipped += not math.isfinite(record["grad_norm"])
                complete = True
                phase.advance(
                    note=f"loss {record['loss']:.3f}, {100 * record['token_accuracy']:.0f} % of tokens right"
                )
                if done % config.warmstart.save_every == 0:
                    save()
                interrupts.check()
                complete = False
        complete = True
    finally:
        if complete:
            save()


def _ppo(
    ppo: PPO,
    tokenizer: Any,
    play: Callable[..., Iterator[Trajectory]],
    rows: TaskStream | None,
    config: TrainConfig,
    run: RunFolder,
    state: dict[str, Any],
    interrupts: Interrupts,
    progress: Progress,
) -> checkpoint.Checkpoint:
    actor = ppo.actor
    rewards: list[float] = state.get("rewards", [])  # since the last checkpoint that has a score
    saved: int | None = ppo.updates if state else None

    def save() -> None:
        nonlocal saved, rewards
        if saved == ppo.updates:
            return
        saved = ppo.updates  # one that fails is not tried again: what it was shall be seen
        # Only where every run saves: how often one was interrupted shall not decide which is the best.
        due = ppo.updates % config.save_every == 0 or ppo.updates == config.max_updates
        score = fmean(rewards) if due and rewards else None
        if score is not None:
            rewards = []
        trainer = {
            "critic": ppo.critic.state_dict(),
            "reference": None if ppo.reference is None else ppo.reference.state_dict(),
            "ppo": ppo.state_dict(),
            "rewards": rewards,
        }
        run.save(Place(1, ppo.updates), actor, tokenizer, trainer, score)

    complete = True  # the weights are those of `ppo.updates` updates, and these are on record
    try:
        while ppo.updates < config.max_updates:
            update, began = ppo.updates, time.perf_counter()
            seeds = [derive_seed(config.seed, "training", update, i) for i in range(config.batch_size)]
            place = {seed: i for i, seed in enumerate(seeds)}
            given = rows and [rows[update * config.batch_size + i] for i in range(config.batch_size)]
            # Nothing is lost in these: the same update starts over from its seeds.
            with interrupts.allowed():
                actor.eval()
                trajectories = []
                with progress.phase(f"update {update + 1}: rollout", config.batch_size) as phase:
                    for trajectory in play(seeds=seeds, tasks=given):
                        trajectories.append(trajectory)
                        phase.advance(note=trajectory.error_kind)
                # In the order of the seeds, not of the clock.
                trajectories.sort(key=lambda t: place[t.seed])
                _check_failures(trajectories, config.max_failed)
                rolled = time.perf_counter()
                batch, metrics = ppo.prepare(trajectories)
            complete = False
            shuffle = torch.Generator().manual_seed(derive_seed(config.seed, "minibatches", update))
            steps = config.ppo.epochs * -(-len(batch) // config.ppo.mini_batch_size)
            with progress.phase(f"update {update + 1}: optimiser steps", steps) as phase:
                metrics |= ppo.learn(batch, shuffle, phase.advance)
            record = {"phase": "ppo", "step": ppo.updates, **describe(trajectories), **metrics}
            record |= {"rollout_seconds": rolled - began, "update_seconds": time.perf_counter() - rolled}
            append_json(run.metrics, without_nan(record))
            rewards.append(record["reward"])
            complete = True
            progress.log(_line(record, config.max_updates))
            if ppo.updates % config.save_every == 0:
                save()
            interrupts.check()
    finally:
        if complete:
            save()
    return checkpoint.Checkpoint(actor.eval(), tokenizer, None)


def _check_failures(trajectories: list[Trajectory], max_failed: float) -> None:
    failed = [t for t in trajectories if t.error_kind]
    if len(failed) > max_failed * len(trajectories) or len(failed) == len(trajectories):
        kinds = ", ".join(f"{kind} {count}" for kind, count in error_counts(failed).items())
        raise EpisodesFailed(
            f"{len(failed)} of {len(trajectories)} episodes failed ({kinds}), after "
            f"{sum(len(t.failures) for t in failed)} more attempts; the first: "
            f"{failed[0].finish_reason}: {failed[0].error}"
        )


def _line(record: dict[str, Any], updates: int) -> str:
    text = (
        f"update {record['step']}/{updates}  reward {record['reward']:.3f}  exact match "
        f"{record['exact_match']:.2f}  answered {record['answered']:.2f}  turns {record['turns']:.1f}  peak "
        f"{record['peak_tokens']:.0f}  kl {record['kl_reference']:.4f}  dlogp {record['dlogp_max']:.1e}  "
        f"rollout {record['rollout_seconds']:.1f} s, update {record['update_seconds']:.1f} s"
    )
    if record["errors"] or record["replays"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in record["errors"].items()) or "none"
        text += f"  failed: {kinds}; played again: {record['replays']}"
    return text + (f"  skipped steps: {record['skipped_steps']}" if record["skipped_steps"] else "")


def describe(trajectories: list[Trajectory]) -> dict[str, Any]:
    """What a batch of episodes looks like. Means over those that did not fail; token counts are sums.

    errors: episodes lost for good, by kind. replays: attempts that the environment broke off and that were
    played again; dropped_turns, dropped_tokens: means over these and the lost episodes, to be held against
    turns and tokens: failures hit long episodes more often.
    """
    sound = [t for t in trajectories if not t.error_kind]
    replays = [failure for t in trajectories for failure in t.failures]
    dropped = [(f.turns, f.tokens) for f in replays]
    dropped += [(t.turns, t.tokens.numel()) for t in trajectories if t.error_kind]
    return {
        "reward": fmean(t.reward for t in sound),
        "exact_match": fmean(t.score.get("exact_match", 0.0) for t in sound),
        "answered": fmean(t.finish_reason == FinishReason.ANSWERED for t in sound),
        "turns": fmean(t.turns for t in sound),
        "peak_tokens": fmean(t.peak_tokens() for t in sound),
        "tokens": sum(t.tokens.numel() for t in sound),
        "policy_tokens": sum(int(t.policy_mask.sum()) for t in sound),
        "errors": error_counts(trajectories),
        "replays": len(replays),
        "dropped_turns": fmean(turns for turns, _ in dropped) if dropped else None,
        "dropped_tokens": fmean(tokens for _, tokens in dropped) if dropped else None,
    }
