"""One training run, top to bottom: a model, a supervised warm start, then updates on its own episodes."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
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
from mem1.io import append_json, atomic_write, without_nan
from mem1.models.adapters import norms
from mem1.models.build import build_model, check_shape, dropouts
from mem1.models.load import load_report
from mem1.rollout.rollout_loop import check_positions, make_codec, make_engine, rollout
from mem1.runtime.device import pick_device, whereabouts
from mem1.runtime.interrupts import Interrupted, Interrupts
from mem1.runtime.progress import Progress
from mem1.runtime.ranks import Ranks
from mem1.seeds import derive_seed
from mem1.train import checkpoint
from mem1.train.checkpoint import Place
from mem1.train.flops import peak_tflops
from mem1.train.judging import Judge, judged
from mem1.train.learner import Learner
from mem1.train.optim import Diverged
from mem1.train.run_folder import DIVERGED, Resumed, RunFolder
from mem1.train.sharding import companions, copy_weights, sharded_learner
from mem1.train.trackers import Trackers
from mem1.train.trainer_state import TrainerState
from mem1.train.training_episodes import Episodes, describe
from mem1.train.warmstart import DrawExample, expert_examples, optimizer_for, warm_start
from mem1.trajectory import Trajectory


def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    make_environment: Callable[[], Environment],
    *,
    tasks: Iterable[Any] | None = None,
    evaluation_tasks: Iterable[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    draw_example: DrawExample | None = None,
    judge: Judge | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> checkpoint.Checkpoint:
    """Train and return the last checkpoint, which is also in the folder `out/last`.

    `out` gets what `RunFolder` says: settings, metrics.jsonl (one line per step, its "phase" is warmstart or
    policy) and checkpoints.

    make_environment: makes an environment for each episode of the policy (`config.environment` only keeps on
    record what it was made with). tasks: the task set, whose rows go to the episodes, or groups of them, in
    an order that follows from the seed, all once before any comes again. evaluation_tasks: those for
    `config.evaluate_every`, or None where an episode follows from its seed alone. tokenizer: that of a model
    with random weights. draw_example: what the warm start learns from, laid out as the rollouts to come, see
    `warm_start`; by default the episodes of the environment's expert. judge: a reward model or a judge, asked
    for one more reward of each episode, all of a batch at once; may be a coroutine function.

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
    settings = config.to_dict()
    rows, held_out = (
        None if given is None else TaskStream(given, config.seed) for given in (tasks, evaluation_tasks)
    )
    device = pick_device(config.device)
    ranks = Ranks.join(device)
    device, run = ranks.place(device), RunFolder(Path(out), config.keep, config.scale.background_saves)
    progress = progress if ranks.first else Progress(log=lambda line: None)

    with Interrupts() as interrupts, closing(run), ExitStack() as stack:
        # 1. A model: of the run so far, of a checkpoint, or a new one.
        saved: TrainerState | None = None
        resumed = run.resume(settings) if resume and ranks.first else Resumed(None, config.init, [])
        for line in resumed.notes:
            progress.log(line)
        init, goes_on = ranks.broadcast((resumed.init, resumed.checkpoint is not None))
        given, config = config.init, replace(config, init=init)
        if given != init and (given is not None or config.warmstart_steps):  # which may have other examples
            raise InputError(f"resume: expected the init of the run, {init!r}, got {given!r}")
        if goes_on:
            actor, tokenizer, saved = resumed.checkpoint or checkpoint.load(out)
            if saved and "adapted" in saved:  # the adapters are of this, not of what they made of it
                base, known = saved["adapted"]
                actor = checkpoint.load(base, config.model.dtype).model
                found = norms(actor)  # equal but for the rounding of sums
                same = len(found) == len(known) and all(
                    map(partial(math.isclose, rel_tol=1e-9), found, known)
                )
                require(same, "init", "the weights that the adapters were made for", base)
        elif init is not None:
            base = str(checkpoint.newest(init))
            actor, tokenizer, _ = checkpoint.load(base, config.model.dtype)
            progress.log(str(load_report(actor, tokenizer, init)))
            check_shape(actor, config.model)
        else:
            if tokenizer is None:
                raise InputError("tokenizer: expected one for a model with random weights, got none")
            actor = build_model(tokenizer, config.model, derive_seed(config.seed, "weights"))
        actor.to(device)
        progress.log(whereabouts(actor) + (f", {ranks.size} processes" if ranks.size > 1 else ""))
        require(any(p.requires_grad for p in actor.parameters()), "model", "weights that learn", "none")
        check_positions(actor, config.rollout)
        check_policy(actor.eval())
        make_codec(tokenizer, config.rollout, actor)  # which refuses what cannot be used
        lessons = config.warmstart_steps
        warm = (init is None or lessons > 0) and (saved is None or "learner" not in saved)
        alone = ranks.size == 1 or init is None or not lessons
        require(alone, "warmstart.steps", "0 of a loaded model in several processes, of one", lessons)
        examples = draw_example
        if warm and lessons and examples is None:
            examples = expert_examples(
                tokenizer, cast(Callable[[], ExpertEnvironment], make_environment), config.rollout, rows
            )
        if not goes_on and ranks.first:
            settings["init"], settings["warmstart"]["steps"] = init, config.warmstart_steps
            run.begin(settings, overwrite=overwrite or resume)
        trackers = Trackers(config.trackers if ranks.first else (), run.path, settings)
        stack.callback(trackers.close)

        # 2. The warm start, by the first alone.
        if warm:
            if ranks.first:
                _warm_start(actor, tokenizer, examples, config, run, saved, trackers, interrupts, progress)
            ranks.share(actor)
            saved = None

        # 3. Updates on episodes of the policy.
        always = {"adapted": [base, norms(actor)]} if config.lora.rank else {}
        critic, reference = companions(actor, config)
        sampler = actor if ranks.size == 1 else copy.deepcopy(actor).requires_grad_(False)
        learner = sharded_learner(actor, critic, reference, config, ranks)
        if saved:
            learner.restore(saved["learner"], saved)
            copy_weights(learner.policy.model, sampler)
        rules = config.rollout
        if device.type == "cpu" and rules.kv_memory <= 1:  # a share of what all have together
            rules = replace(rules, kv_memory=rules.kv_memory / ranks.size)
        engine = make_engine(
            *(sampler.eval(), rules, config.batch_size, progress.log),
            reserved_bytes=learner.bytes_to_come,
        )
        if dropped := dropouts(actor):
            progress.log(f"dropout is off during the updates ({', '.join(dropped)})")
        play = partial(rollout, sampler, tokenizer, make_environment, config=config.rollout, engine=engine)
        episodes = Episodes(play, config, rows, held_out, ranks, progress)
        return _updates(
            *(learner, sampler, tokenizer, episodes, config, run, saved, always),
            *(judge, ranks, trackers, interrupts, progress),
        )


def _warm_start(
    actor: Any,
    tokenizer: Any,
    draw_example: DrawExample | None,  # None: for a warm start of no steps
    config: TrainConfig,
    run: RunFolder,
    state: TrainerState | None,
    trackers: Trackers,
    interrupts: Interrupts,
    progress: Progress,
) -> None:
    """The supervised steps that `state` has not, with checkpoints; the last one is where updates begin."""
    lessons, total = replace(config.warmstart, steps=config.warmstart_steps), config.warmstart_steps
    optimizer, done = optimizer_for(actor, lessons), 0
    named, skipped = dict(actor.named_parameters()), 0
    if state:
        state.fill(optimizer.tensors(named, state.names))
        optimizer.restore(state["optimizer"])
        skipped = state["skipped_steps"]
        done = optimizer.steps + skipped
    saved = done if state else None

    def save() -> None:
        nonlocal saved
        if saved != done:
            saved = done  # one that fails is not tried again: what it was shall be seen
            values = {"optimizer": optimizer.values(), "skipped_steps": skipped}
            run.save(Place(0, done), actor, tokenizer, values, optimizer.tensors(named))

    steps = warm_start(
        actor,
        lessons,
        cast(DrawExample, draw_example),
        regimes=lessons.regimes or (config.rollout.regime,),
        seed=config.seed,
        optimizer=optimizer,
        done=done,
    )
    complete = False  # the weights are those after `done` steps, and these are on record
    try:
        with progress.phase("warm start", total, done) as phase:
            for record in steps:
                append_json(run.metrics, without_nan({"phase": "warmstart"} | record))
                trackers.log({"phase": "warmstart"} | record)
                done += 1
                skipped += not math.isfinite(record["grad_norm"])
                complete = True
                phase.advance(
                    note=f"loss {record['loss']:.3f}, {100 * record['token_accuracy']:.0f} % of tokens right"
                )
                if done % lessons.save_every == 0:
                    save()
                interrupts.check()
                complete = False
        complete = True
    finally:
        if complete:
            save()


def _updates(
    learner: Learner,
    sampler: Any,
    tokenizer: Any,
    episodes: Episodes,
    config: TrainConfig,
    run: RunFolder,
    state: TrainerState | None,
    always: dict[str, Any],
    judge: Judge | None,
    ranks: Ranks,
    trackers: Trackers,
    interrupts: Interrupts,
    progress: Progress,
) -> checkpoint.Checkpoint:
    # Of evaluations where there are some, since the last checkpoint that has a score.
    rewards: list[float] = state["rewards"] if state else []
    saved: int | None = learner.updates if state else None

    def save() -> None:
        nonlocal saved, rewards
        if saved == learner.updates:
            return
        saved = learner.updates  # one that fails is not tried again: what it was shall be seen
        # Only where every run saves: how often one was interrupted shall not decide which is the best.
        due = learner.updates % config.save_every == 0 or learner.updates == config.max_updates
        score = fmean(rewards) if due and rewards else None
        if score is not None:
            rewards = []
        values = {"learner": learner.values(), "rewards": rewards} | always
        place = Place(1, learner.updates)
        run.save(place, sampler, tokenizer, values, learner.tensors(), score=score, ranks=ranks)

    peak = config.scale.tflops or peak_tflops(learner.device)
    peak = peak and peak * ranks.size
    complete = True  # the weights are those of `learner.updates` updates, and these are on record
    together = True  # every rank comes to the end of this
    try:
        while learner.updates < config.max_updates:
            update, began = learner.updates, time.perf_counter()
            together = ranks.size == 1
            # Nothing is lost in these: the same update starts over from its seeds.
            with interrupts.allowed() if together else nullcontext():
                sampler.eval()
                trajectories = episodes.of_update(update)
                verdict = {} if judge is None else judged(trajectories, judge, ranks)
                rolled = time.perf_counter()
                batch, metrics = learner.prepare(trajectories)
            complete = False
            shuffle = torch.Generator().manual_seed(derive_seed(config.seed, "minibatches", update))
            steps = config.algorithm.epochs * -(-len(batch) // config.algorithm.mini_batch_size)
            with progress.phase(f"update {update + 1}: optimiser steps", steps) as phase:
                try:
                    metrics |= learner.learn(batch, shuffle, phase.advance)
                except Diverged:
                    _keep(trajectories, run.path / DIVERGED, ranks)
                    raise
            if ranks.size > 1:
                copy_weights(learner.policy.model, sampler)
            record = {
                "phase": "policy",
                "step": learner.updates,
                **describe(trajectories),
                "late_episodes": config.batch_size - len(trajectories),
                **verdict,
                **metrics,
            }
            record |= _speeds(record, rolled - began, time.perf_counter() - rolled, peak)
            try:
                with interrupts.allowed() if ranks.size == 1 else nullcontext():
                    record |= episodes.evaluation(learner.updates)
            finally:  # the update is one without it, too
                if ranks.first:
                    append_json(run.metrics, without_nan(record))
                    trackers.log(record)
                score = record.get("evaluation_reward") if config.evaluate_every else record["reward"]
                rewards += [] if score is None else [score]
                complete, together = True, ranks.size == 1
            together = True
            progress.log(_line(record, config.max_updates))
            if learner.updates % config.save_every == 0:
                save()
            if signum := max(ranks.gather(interrupts.pending)):
                raise Interrupted(signum)
    finally:
        if complete and together:
            save()
    return checkpoint.Checkpoint(sampler.eval(), tokenizer, None)


def _keep(trajectories: list[Trajectory], path: Path, ranks: Ranks) -> None:
    """For whoever looks into it."""
    if ranks.first:
        with atomic_write(path) as file:
            file.writelines(trajectory.to_json() + "\n" for trajectory in trajectories)


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


def _speeds(
    record: dict[str, Any], rollout: float, update: float, peak_tflops: float | None
) -> dict[str, float]:
    """Of seconds; peak_tflops: of all ranks together, None where nobody knows."""
    tflops = record["update_flops"] / update / 1e12
    return {
        "update_tflop_per_second": tflops,
        **({"mfu": tflops / peak_tflops} if peak_tflops else {}),
        "rollout_seconds": rollout,
        "update_seconds": update,
        "rollout_tokens_per_second": record["policy_tokens"] / rollout,
        "update_tokens_per_second": record["tokens"] / update,
    }
