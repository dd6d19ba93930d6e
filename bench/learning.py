"""What updates learn from a weak start, and how far the sampler's log-probs are from the trainer's:

    python bench/learning.py OUT [--algorithms ppo grpo] [--regimes reencode paper] [--seeds 0 1 2]

A short warm start of each seed, in the regime "carry", is where every algorithm (in "carry") and every regime
(with PPO) begins. Rewards before and after are those of 256 episodes that nobody trained on, sampled as in
training. OUT gets the runs, learning.json with the curves and learning.png.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from mem1.config import AlgorithmConfig, RolloutConfig, TrainConfig, WarmStartConfig
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.training import toy_training
from mem1.evaluation.evaluation_loop import evaluate
from mem1.runtime.progress import Progress
from mem1.train import checkpoint
from mem1.train.train_loop import train

OBJECTIVES = (1, 2)
EPISODES = 256
START = TrainConfig(
    max_updates=0,
    environment={"objectives": OBJECTIVES},
    rollout=RolloutConfig(num_slots=64, max_turns=8, max_action_tokens=48),
    warmstart=WarmStartConfig(steps=150),
)
CASES = {  # the least that each needs
    "ppo": {"batch_size": 64},
    "grpo": {"batch_size": 64, "group_size": 8},
    "rloo": {"batch_size": 64, "group_size": 8},
    "reinforce": {"batch_size": 64},
}
SMOOTH = 10  # updates


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--algorithms", nargs="*", default=["ppo", "grpo"], choices=CASES)
    parser.add_argument("--regimes", nargs="*", default=["reencode", "paper"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=60)
    options = parser.parse_args()
    cases = [(name, "carry") for name in options.algorithms]
    cases += [("ppo", regime) for regime in options.regimes if regime != "carry"]
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        start = options.out / f"start-{seed}"
        config = replace(START, seed=seed)
        run(config, start)
        for algorithm, regime in cases:
            found.setdefault(f"{algorithm}, {regime}", []).append(
                learn(options.out, start, replace(config, max_updates=options.updates), algorithm, regime)
            )
            (options.out / "learning.json").write_text(json.dumps(found))
    for name, runs in found.items():
        ends = ", ".join(f"{one['before']:.3f} -> {one['after']:.3f}" for one in runs)
        mean = fmean(gap for one in runs for gap in one["dlogp_mean"])
        most = max(gap for one in runs for gap in one["dlogp_max"])
        print(f"{name}: {ends}; log-probs differ by {mean:.1e} on average, {most:.1e} at most")
    draw(found, options.out / "learning.png")


def learn(out: Path, start: Path, config: TrainConfig, algorithm: str, regime: str) -> dict[str, Any]:
    folder = out / f"{algorithm}-{regime}-{config.seed}"
    settings = AlgorithmConfig(name=algorithm, kl_coef=0.001)  # type: ignore[arg-type]
    rollout = replace(config.rollout, regime=regime)  # type: ignore[arg-type]
    config = replace(config, algorithm=settings, rollout=rollout, **CASES[algorithm])
    run(config, folder, init=start)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    records = [record for record in lines if record["phase"] == "policy"]
    curves = {name: [record[name] for record in records] for name in ("reward", "dlogp_mean", "dlogp_max")}
    return {"before": reward(start, config), "after": reward(folder, config), **curves}


def run(config: TrainConfig, out: Path, **how: Any) -> None:
    quiet = Progress(log=lambda line: None)
    train(config, out, **toy_training(config) | how, overwrite=True, progress=quiet)


def reward(run: Path, config: TrainConfig) -> float:
    model, tokenizer, _ = checkpoint.load(run)
    make = partial(MultiHopEnv, OBJECTIVES)
    row, _ = evaluate(model, tokenizer, config.rollout, make, agent="mem1", objectives=2, episodes=EPISODES)
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
