"""The whole job in about five minutes on two idle cores: train, evaluate, compare, draw."""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError
from mem1.config import EvictionPolicy, Regime, RolloutConfig, TrainConfig, WarmStartConfig
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.training import toy_training
from mem1.evaluation.evaluation_loop import OBJECTIVES, evaluate, evaluate_expert, evaluation_seeds
from mem1.evaluation.plots import plot_learning, plot_peaks, plot_trajectory
from mem1.evaluation.results import Result, table
from mem1.io import atomic_write, without_nan
from mem1.rollout.rollout_loop import rollout
from mem1.runtime.progress import Progress
from mem1.train.parity import Parity, parity
from mem1.train.run_folder import METRICS
from mem1.train.train_loop import train

AGENTS: tuple[tuple[str, EvictionPolicy], ...] = (("MEM1", "action"), ("full context", "never"))
PASSAGE = 400  # tokens: the size of a retrieved passage

_SHOWN = (
    *("agent", "objectives", "errors", "reward", "exact_match", "answered"),
    *("turns", "peak_tokens", "peak_tokens_without_prompt"),
)


def demo(
    out: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Run the demo; everything it makes is in the folder `out`.

    `quick` does the same in well under a minute with a smaller budget of each part. `overwrite` starts over
    where `out` has a training run. Raises InputError at once if there is no matplotlib for the plots at the
    end.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("matplotlib: expected for the plots, got none: pip install 'mem1_core[plot]'")
    progress = progress or Progress()
    log = progress.log
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)

    def title(text: str) -> None:
        log(f"\n[{time.perf_counter() - began:4.0f} s] {text}")

    config = demo_config(quick, seed)
    title("1/4 training: supervised warm start on expert trajectories, then PPO")
    log(f"{config.warmstart.steps} steps and {config.max_updates} updates, however fast this machine is")
    if not quick:
        log("two idle cores of a server take about five minutes for all four parts")
    model, tokenizer, _ = train(
        config, out / "train", **toy_training(config), overwrite=overwrite, progress=progress
    )

    title("2/4 the trained policy, greedy: MEM1 against the same weights with everything kept in context,")
    log("which in training they never saw; trained on 1 to 8 objectives")
    log("means per episode; lengths in tokens, seconds of wall time per episode")
    results: list[Result] = []
    lines: list[str] = []
    for agent, prune in AGENTS:
        for n in OBJECTIVES[:2] if quick else OBJECTIVES:
            # Room for what the expert would write, and some more: an agent that has lost its way must come to
            # an end.
            limits = replace(
                config.rollout, prune=prune, greedy=True, max_turns=2 * n + 4, max_action_tokens=8 * n + 24
            )
            row, trajectories = evaluate(
                model,
                tokenizer,
                limits,
                partial(MultiHopEnv, n),
                agent=agent,
                objectives=n,
                episodes=4 if quick else 16,
                seed=seed,
                progress=progress,
            )
            results.append(row)
            lines += [json.dumps({"agent": agent, **trajectory.to_dict()}) for trajectory in trajectories]
    with atomic_write(out / "trajectories.jsonl") as file:
        file.write("\n".join(lines) + "\n")
    log(table(results, (*_SHOWN, "dependency_length", "seconds")))

    title("3/4 the expert on the same job: what memory takes when every question gets answered")
    expert = expert_results(tokenizer, config.rollout)
    log(table(expert, (*_SHOWN, "dependency_length")))
    log(growth(expert))

    title("4/4 log-probs: sampled by the rollout against recomputed by the trainer")
    measured = parity_results(model, tokenizer, config.rollout, 4 if quick else 8, seed, progress)
    log(table(measured))

    report = {
        "trained": [row.to_dict() for row in results],
        "expert": [row.to_dict() for row in expert],
        "parity": [without_nan(asdict(row)) for row in measured],
    }
    with atomic_write(out / "results.json") as file:
        json.dump(report, file, indent=2, allow_nan=False)
    plot_peaks(expert, out / "peak_tokens.png")
    plot_peaks(results, out / "peak_tokens_trained.png")
    plot_learning(out / "train" / METRICS, out / "learning_curve.png")
    _, shown = evaluate_expert(
        tokenizer, config.rollout, partial(MultiHopEnv, 4), agent="MEM1", objectives=4, episodes=1
    )
    plot_trajectory(shown[0], out / "trajectory_mask.png")
    tokenizer.save_pretrained(out / "tokenizer")  # for `mem1 view`
    title(f"done. Plots, tables and trajectories are in {out.resolve()}")
    log(f"mem1 view {out / 'trajectories.jsonl'} makes a page of them")
    log(f"mem1 eval --model {out / 'train'} evaluates further")


def demo_config(quick: bool, seed: int) -> TrainConfig:
    """The budget of the demo, in steps: on two idle cores two minutes of warm start and over one of PPO."""
    return TrainConfig(
        max_updates=2 if quick else 12,
        batch_size=8 if quick else 64,
        environment={"objectives": (1, 8)},
        seed=seed,
        rollout=RolloutConfig(num_slots=64, max_action_tokens=96, max_turns=20),
        warmstart=WarmStartConfig(steps=30 if quick else 1000),
    )


def expert_results(tokenizer: PreTrainedTokenizerBase, config: RolloutConfig) -> list[Result]:
    """The expert under both prune rules, with bare answers to its queries and with answers of a passage's
    size.
    """
    results: list[Result] = []
    for passage in (0, PASSAGE):
        for agent, prune in AGENTS:
            name = f"{agent}, expert" + (f", {PASSAGE}-token passages" if passage else "")
            rules = replace(config, prune=prune)
            for n in OBJECTIVES:
                make = partial(MultiHopEnv, n, passage_tokens=passage)
                row, _ = evaluate_expert(tokenizer, rules, make, agent=name, objectives=n, episodes=2)
                results.append(row)
    return results


def growth(results: list[Result]) -> str:
    """How peak memory grows from 2 to 16 objectives, a line per agent."""
    peaks = {(r.agent, r.objectives): r for r in results}
    lines, bare = [], "peak_tokens_without_prompt"
    for agent in dict.fromkeys(r.agent for r in results):
        small, large = peaks[agent, 2], peaks[agent, 16]
        lines.append(
            f"{agent}: 16 objectives need {large['peak_tokens'] / small['peak_tokens']:.2f}x the peak of 2, "
            f"{large[bare] / small[bare]:.2f}x without the prompt"
        )
    return "\n".join(lines)


def parity_results(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: RolloutConfig,
    episodes: int,
    seed: int,
    progress: Progress,
) -> list[Parity]:
    """Every regime in fp32 and bf16, on sampled episodes of 4 objectives (9 turns, if the policy gets that
    far).
    """
    rows: list[Parity] = []
    regimes: tuple[Regime, ...] = ("carry", "reencode", "paper")
    cases = [(dtype, regime) for dtype in (torch.float32, torch.bfloat16) for regime in regimes]
    with progress.phase("regimes and dtypes", total=len(cases)) as phase:
        for dtype, regime in cases:
            policy = copy.deepcopy(model).to(dtype)
            rules = replace(config, regime=regime)
            seeds = evaluation_seeds(seed, episodes)
            played = list(rollout(policy, tokenizer, lambda: MultiHopEnv(4), seeds, rules))
            rows.append(parity(policy, played, regime, config.temperature))
            phase.advance()
    return rows
