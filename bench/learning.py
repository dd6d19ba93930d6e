"""What updates learn from a weak start, and how far the sampler's log-probs are from the trainer's:

    python bench/learning.py OUT [--algorithms ppo grpo] [--regimes reencode paper] [--seeds 0 1 2]

The start of a seed, where every algorithm (in "carry") and every regime (with PPO) begins, is a warm start
whose steps are laid out in "carry" and in "reencode" by turns, until its policy earns WEAK in either. Rewards
before and after are those of 256 episodes that nobody trained on, sampled as in training. OUT gets the runs,
learning.json with the curves (what it has of an earlier call is not run again) and learning.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from mem1.config import ALGORITHMS, AlgorithmConfig, RolloutConfig, TrainConfig
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.training import toy_training
from mem1.evaluation.evaluation_loop import evaluate
from mem1.models.build import build_model
from mem1.runtime.progress import Progress
from mem1.seeds import derive_seed
from mem1.train import checkpoint
from mem1.train.train_loop import train
from mem1.train.warmstart import optimizer_for, warm_start

OBJECTIVES = (1, 2)
EPISODES = 256
WEAK, CHECK_EVERY = 0.15, 20  # reward of a start; steps from look to look
CONFIG = TrainConfig(
    environment={"objectives": OBJECTIVES},
    rollout=RolloutConfig(num_slots=64, max_turns=8, max_action_tokens=48),
    batch_size=128,
    threads=1,  # as fast as two of so small a model
)
GROUPED = {"grpo": 4, "rloo": 4}  # episodes of a task
ACTOR_LR = 3e-4
SMOOTH = 10  # updates


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--algorithms", nargs="*", default=["ppo", "grpo"], choices=ALGORITHMS)
    parser.add_argument("--regimes", nargs="*", default=["reencode", "paper"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=100)
    options = parser.parse_args()
    cases = [(name, "carry") for name in options.algorithms]
    cases += [("ppo", regime) for regime in options.regimes if regime != "carry"]
    path = options.out / "learning.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    for seed in options.seeds:
        config = replace(CONFIG, seed=seed, max_updates=options.updates)
        start = options.out / f"start-{seed}"
        missing = [case for case in cases if str(seed) not in found.get(", ".join(case), {})]
        if missing:
            print(f"seed {seed}: {weak_start(config, start)} steps", flush=True)
        for algorithm, regime in missing:
            one = learn(options.out, start, config, algorithm, regime)
            print(f"  {algorithm}, {regime}: {one['before']:.3f} -> {one['after']:.3f}", flush=True)
            found.setdefault(f"{algorithm}, {regime}", {})[str(seed)] = one
            path.write_text(json.dumps(found))
    for name, runs in found.items():
        ends = ", ".join(f"{one['before']:.3f} -> {one['after']:.3f}" for one in runs.values())
        mean = fmean(gap for one in runs.values() for gap in one["dlogp_mean"])
        most = max(gap for one in runs.values() for gap in one["dlogp_max"])
        print(f"{name}: {ends}; log-probs differ by {mean:.1e} on average, {most:.1e} at most")
    draw({name: list(runs.values()) for name, runs in found.items()}, options.out / "learning.png")


def weak_start(config: TrainConfig, path: Path) -> int:
    """Save a policy that earns at least WEAK in both regimes; returns the steps that it took."""
    task = toy_training(config)
    lessons = replace(config.warmstart, steps=4000)  # the learning rate of the first half is flat
    model = build_model(task["tokenizer"], config.model, derive_seed(config.seed, "weights"))
    optimizer, regimes = optimizer_for(model, lessons), ("carry", "reencode")
    for step in range(lessons.steps):
        next(
            warm_start(
                *(model, lessons, task["draw_example"]),
                regimes=regimes,
                seed=config.seed,
                optimizer=optimizer,
                done=step,
            )
        )
        if (step + 1) % CHECK_EVERY == 0 and all(
            reward(model.eval(), task["tokenizer"], with_regime(config, regime), EPISODES // 4) >= WEAK
            for regime in regimes
        ):
            break
    shutil.rmtree(path, ignore_errors=True)
    checkpoint.save(path, model, task["tokenizer"])
    return step + 1


def with_regime(config: TrainConfig, regime: str) -> TrainConfig:
    return replace(config, rollout=replace(config.rollout, regime=regime))  # type: ignore[arg-type]


def learn(out: Path, start: Path, config: TrainConfig, algorithm: str, regime: str) -> dict[str, Any]:
    folder = out / f"{algorithm}-{regime}-{config.seed}"
    settings = AlgorithmConfig(name=algorithm, actor_lr=ACTOR_LR)  # type: ignore[arg-type]
    config = replace(with_regime(config, regime), algorithm=settings, group_size=GROUPED.get(algorithm, 1))
    quiet = Progress(log=lambda line: None)
    config = replace(config, init=str(start))
    train(config, folder, **toy_training(config), overwrite=True, progress=quiet)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    records = [record for record in lines if record["phase"] == "policy"]
    curves = {name: [record[name] for record in records] for name in ("reward", "dlogp_mean", "dlogp_max")}
    before, after = (reward(*checkpoint.load(run)[:2], config) for run in (start, folder))
    return {"before": before, "after": after, **curves}


def reward(model: Any, tokenizer: Any, config: TrainConfig, episodes: int = EPISODES) -> float:
    make = partial(MultiHopEnv, OBJECTIVES)
    row, _ = evaluate(model, tokenizer, config.rollout, make, agent="mem1", objectives=2, episodes=episodes)
    return row.means["reward"].value


def smoothed(values: list[float]) -> list[float]:
    return [fmean(values[max(0, n - SMOOTH + 1) : n + 1]) for n in range(len(values))]


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    for name, runs in found.items():
        columns = list(zip(*(smoothed(one["reward"]) for one in runs), strict=True))
        (line,) = left.plot([fmean(column) for column in columns], label=name)
        ends = list(map(min, columns)), list(map(max, columns))
        left.fill_between(range(len(columns)), *ends, alpha=0.15, color=line.get_color())
        gaps = list(zip(*(one["dlogp_mean"] for one in runs), strict=True))
        right.plot([fmean(column) for column in gaps], label=name)
    left.set(xlabel="update", title=f"reward, mean of {SMOOTH} updates; band: seeds", ylim=(0, 1))
    right.set(xlabel="update", title="mean |log-prob sampled - recomputed|", yscale="log")
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
