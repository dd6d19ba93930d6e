"""The whole job in about five minutes on two cores: train, evaluate, compare, draw."""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mem1.io import whole_file
from mem1.config import PPOConfig, Prune, Regime, RolloutConfig, TrainConfig, WarmStartConfig
from mem1.envs.multihop import MultiHopEnv
from mem1.evaluate import OBJECTIVES, Parity, Result, evaluate, evaluate_script, parity, table
from mem1.plots import plot_learning, plot_mask, plot_peaks
from mem1.rollout import rollout
from mem1.train import METRICS, train

AGENTS: tuple[tuple[str, Prune], ...] = (("MEM1", "action"), ("full context", "never"))
PASSAGE = 400  # tokens: the size of a retrieved passage

_SHOWN = ("agent", "objectives", "reward", "exact_match", "answered", "turns", "peak", "peak_without_prompt")


def demo(out: Path, *, quick: bool = False, seed: int = 0, say: Callable[[str], None] = print) -> None:
    """Run the demo; everything it makes is in the folder `out`.

    `quick` does the same in well under a minute with a smaller budget of each part. Raises ImportError at
    once if there is no matplotlib for the plots at the end.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the plots need matplotlib: pip install 'mem1_core[plot]'")
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)

    def title(text: str) -> None:
        say(f"\n[{time.perf_counter() - began:4.0f} s] {text}")

    title("1/4 training: supervised warm start on scripted trajectories, then PPO")
    config = demo_config(quick, seed)
    model, tokenizer, _ = train(config, out / "train", say=say)

    title("2/4 the trained policy, greedy: MEM1 against the same weights with everything kept in context")
    say("means per episode; lengths in tokens, seconds of wall time per episode")
    results: list[Result] = []
    lines: list[str] = []
    for agent, prune in AGENTS:
        for n in OBJECTIVES[:2] if quick else OBJECTIVES:
            # Room for what the expert would write, and some more: an agent that has lost its way must come to
            # an end.
            limits = replace(
                config.rollout, prune=prune, greedy=True, max_turns=2 * n + 4, max_action=8 * n + 24
            )
            rows, trajectories = evaluate(
                model, tokenizer, limits, agent=agent, objectives=(n,), episodes=4 if quick else 16
            )
            results += rows
            lines += [json.dumps({"agent": agent, **trajectory.to_dict()}) for trajectory in trajectories]
    with whole_file(out / "trajectories.jsonl") as file:
        file.write("\n".join(lines) + "\n")
    say(table(results, (*_SHOWN, "dependency", "seconds")))

    title("3/4 the scripted expert on the same job: what memory takes when every question gets answered")
    scripted = script_results(tokenizer, config.rollout)
    say(table(scripted, (*_SHOWN, "dependency")))
    say(growth(scripted))

    title("4/4 log-probs: sampled by the rollout against recomputed by the trainer")
    measured = parity_results(model, tokenizer, config.rollout, episodes=4 if quick else 8)
    say(table(measured))

    report = {
        name: [asdict(row) for row in rows] for name, rows in (("trained", results), ("scripted", scripted))
    }
    with whole_file(out / "results.json") as file:
        json.dump(report | {"parity": [asdict(row) for row in measured]}, file, indent=2)
    plot_peaks(scripted, out / "peak_tokens.png")
    plot_peaks(results, out / "peak_tokens_trained.png")
    plot_learning(out / "train" / METRICS, out / "learning_curve.png")
    _, shown = evaluate_script(tokenizer, config.rollout, agent="MEM1", objectives=(4,), episodes=1)
    plot_mask(shown[0], out / "trajectory_mask.png")
    title(f"done. Plots, tables and trajectories are in {out.resolve()}")


def demo_config(quick: bool, seed: int) -> TrainConfig:
    """The budget of the demo, sized for two cores."""
    return TrainConfig(
        updates=2 if quick else 200,
        seconds=None if quick else 50.0,
        batch=8 if quick else 64,
        objectives=(1, 8),
        seed=seed,
        rollout=RolloutConfig(slots=64, max_action=96, max_turns=20),
        warmstart=WarmStartConfig(seconds=4.0 if quick else 130.0, objectives=(1, 8)),
        ppo=PPOConfig(),
    )


def script_results(tokenizer: PreTrainedTokenizerBase, config: RolloutConfig) -> list[Result]:
    """The expert under both prune rules, with bare answers to its queries and with answers of a passage's
    size.
    """
    results: list[Result] = []
    for passage in (0, PASSAGE):
        for agent, prune in AGENTS:
            name = f"{agent}, script" + (f", {PASSAGE}-token passages" if passage else "")
            rows, _ = evaluate_script(
                tokenizer, replace(config, prune=prune), agent=name, passage_tokens=passage, episodes=2
            )
            results += rows
    return results


def growth(results: list[Result]) -> str:
    """How peak memory grows from 2 to 16 objectives, a line per agent."""
    peaks = {(r.agent, r.objectives): r for r in results}
    lines = []
    for agent in dict.fromkeys(r.agent for r in results):
        small, large = peaks[agent, 2], peaks[agent, 16]
        lines.append(
            f"{agent}: 16 objectives need {large.peak / small.peak:.2f}x the peak of 2, "
            f"{large.peak_without_prompt / small.peak_without_prompt:.2f}x without the prompt"
        )
    return "\n".join(lines)


def parity_results(
    model: Any, tokenizer: PreTrainedTokenizerBase, config: RolloutConfig, episodes: int
) -> list[Parity]:
    """Every regime in fp32 and bf16, on sampled episodes of 4 objectives (9 turns, if the policy gets that
    far).
    """
    rows: list[Parity] = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = copy.deepcopy(model).to(dtype)
        regimes: tuple[Regime, ...] = ("carry", "reencode", "paper")
        for regime in regimes:
            played = list(
                rollout(
                    policy,
                    tokenizer,
                    lambda: MultiHopEnv(4),
                    range(episodes),
                    replace(config, regime=regime),
                )
            )
            rows.append(parity(policy, played, regime, config.temperature))
    return rows
