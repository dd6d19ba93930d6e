"""Rollout throughput: `mem1.rollout` against Hugging Face `generate`, which encodes the pruned context again
each turn; and what a rollout of 64 turns holds in memory.

One model object with random weights serves all candidates; the peer runs it with "sdpa" and transformers' own
growing cache. All play episodes of the same lengths, and environments answer at once: that a lock-step batch
also waits for its slowest environment is not counted. See `rollout_task.py`.
"""

from __future__ import annotations

import resource
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from measure import Candidate, Result
from rollout_task import RandomWords, Workload, check_generated, check_ours, generate, play

from mem1.config import EvictionPolicy, ModelConfig, Regime
from mem1.engine.engine import Engine
from mem1.envs.base import Action, Step
from mem1.envs.toy.tokenizer import build_tokenizer
from mem1.models.build import build_model
from mem1.rollout.rollout_loop import rollout

MIB = 2**20
OURS, REENCODE = "mem1.rollout, carry", "mem1.rollout, reencode"
LOCK_STEP = "HF generate, lock-step"
ONE_BY_ONE = "HF generate, one at a time"
CARRY: dict[str, Regime] = {OURS: "carry"}
BOTH: dict[str, Regime] = {**CARRY, REENCODE: "reencode"}
# With its vocabulary the shape of Qwen2.5-0.5B. At the usual initializer_range of 0.02 the rounding of a bf16
# forward alone moves log-probs by 7e-3, more than the 5e-3 by which rollout and trainer may differ.
LARGE = ModelConfig(
    num_hidden_layers=24,
    hidden_size=896,
    num_attention_heads=14,
    num_key_value_heads=2,
    intermediate_size=4864,
    initializer_range=0.01,
    dtype="bfloat16",
)
LARGE_VOCABULARY = 151_936
# Keys and values of a token take 4 KiB: what is kept shows.
HEAVY_CACHE = ModelConfig(
    num_hidden_layers=2, hidden_size=256, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64
)


def policy(config: ModelConfig, vocabulary: int = 0) -> Any:
    """Random weights; `vocabulary`, if given, is more than the tokenizer's own."""
    model = build_model(build_tokenizer(), config).eval()
    model.generation_config.eos_token_id = None  # lengths are not its choice
    if vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


@pytest.fixture(scope="module")
def small_model() -> Any:
    return policy(ModelConfig())


@pytest.fixture(scope="module")
def large_model(bench: Any, device: str) -> Any:
    if bench.measuring:
        return policy(LARGE, LARGE_VOCABULARY).to(device)
    return policy(replace(LARGE, num_hidden_layers=2, hidden_size=28 * 4, intermediate_size=64), 1_000)


def sized(bench: Any, episodes: int, turns: int) -> Workload:
    """The workload to measure, or a short one."""
    if bench.measuring:
        return Workload(episodes, turns)
    return Workload(min(episodes, 5), min(turns, 3), prompt=(12, 20), action=(6, 14), info=(12, 24))


def compare(
    bench: Any, model: Any, workload: Workload, slots: int, regimes: dict[str, Regime], device: str = "cpu"
) -> dict[str, Result]:
    """One table, with the throughput of each row."""
    engine = Engine(model, slots)  # kept from call to call, as a trainer does
    candidates = [
        Candidate(
            name,
            partial(play, engine, workload, regime),
            partial(check_ours, model, workload, regime),
        )
        for name, regime in regimes.items()
    ]
    peer = partial(generate, model, workload, slots), partial(check_generated, workload, slots)
    candidates.append(Candidate(ONE_BY_ONE if slots == 1 else LOCK_STEP, *peer, peer=True))
    config = model.config
    title = (
        f"rollout on {device}, {config.num_hidden_layers} layers x {config.hidden_size}, vocabulary "
        f"{config.vocab_size:,}, {str(model.dtype).removeprefix('torch.')}, {slots} side by side, {workload}"
    )
    # A call takes seconds: three rounds, or two where it takes many.
    results = bench.compare(title, candidates, device=device, idle=True, budget_s=10, min_rounds=3)
    if bench.measuring:
        work = {"policy tokens/s": workload.policy_tokens(), "trajectories/s": workload.episodes}
        for name, result in results.items():
            if result.seconds:
                rates = {unit: amount / result.median for unit, amount in work.items()}
                bench.columns(name).update(rates)
                bench.print(f"  {name}: " + ", ".join(f"{rate:,.2f} {unit}" for unit, rate in rates.items()))
    return results


@pytest.mark.parametrize("slots", [16, 32])
def test_rollout(bench: Any, small_model: Any, slots: int) -> None:
    if not bench.measuring:
        slots //= 8
    workload = sized(bench, episodes=2 * slots, turns=6)
    results = compare(bench, small_model, workload, slots, BOTH)
    if slots != 16:  # a step of so few rows is half Python in either candidate
        bench.goal_speedup(results, OURS, LOCK_STEP, 3)


def test_rollout_one_by_one(bench: Any, small_model: Any) -> None:
    compare(bench, small_model, sized(bench, episodes=2, turns=6), 1, CARRY)


def test_gpu_rollout(bench: Any, device: str, large_model: Any) -> None:
    slots = 64 if bench.measuring else 3
    results = compare(bench, large_model, sized(bench, episodes=slots, turns=4), slots, BOTH, device)
    bench.goal_speedup(results, OURS, LOCK_STEP, 3)


def test_gpu_rollout_one_by_one(bench: Any, device: str, large_model: Any) -> None:
    compare(bench, large_model, sized(bench, episodes=1, turns=3), 1, CARRY, device)


class Memory(NamedTuple):
    """Bytes when a turn's action is complete."""

    resident: int
    cache: int


class MeteredWords(RandomWords):
    """Takes note of the memory at each step."""

    def __init__(self, workload: Workload, engines: list[Engine], sizes: list[Memory]) -> None:
        super().__init__(workload)
        self.engines, self.sizes = engines, sizes

    def step(self, action: Action) -> Step:
        self.sizes.append(Memory(resident_bytes(), held_bytes(self.engines[-1])))
        return super().step(action)


def held_bytes(engine: Engine) -> int:
    """Keys and values in the slots; what was reserved beyond them is not in memory."""
    kv = engine.cache.kv
    return sum(engine.cache.lengths) * kv[:, :, 0, 0].numel() * kv.element_size()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory_by_turn(
    model: Any, workload: Workload, prune: EvictionPolicy, engines: list[Engine]
) -> list[Memory]:
    """One trajectory; `resident` is the growth since before the rollout."""
    sizes: list[Memory] = []
    make = partial(MeteredWords, workload, engines, sizes)
    config = replace(workload.config(slots=1), prune=prune)
    before = resident_bytes()
    (trajectory,) = rollout(model, build_tokenizer(), make, [0], config, expert=True)
    assert trajectory.turns == len(sizes) == workload.turns
    return [Memory(size.resident - before, size.cache) for size in sizes]


def test_memory(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant with MEM1's pruning, growing with the full-context agent."""
    engines: list[Engine] = []

    def recorded(*args: Any, **settings: Any) -> Engine:
        engines.append(Engine(*args, **settings))
        return engines[-1]

    monkeypatch.setattr("mem1.rollout.rollout_loop.Engine", recorded)
    turns = 64 if bench.measuring else 6
    workload = Workload(1, turns, prompt=(40, 40), action=(16, 16), info=(240, 240))
    model = policy(HEAVY_CACHE)
    memory_by_turn(model, replace(workload, turns=3), "action", engines)  # what libraries keep from first use
    sizes = {prune: memory_by_turn(model, workload, prune, engines) for prune in ("action", "never")}
    bounded, growing = ([memory.cache for memory in sizes[prune]] for prune in ("action", "never"))
    assert bounded[-1] == bounded[2] < growing[-1]
    if not bench.measuring:
        return
    shown = [turn for turn in (1, 2, 4, 8, 16, 32, 64) if turn <= turns]
    lines = [
        f"memory of a rollout, MiB when the action of a turn is complete, {workload}",
        "  turn".ljust(40) + "".join(f"{turn:>8}" for turn in shown),
    ]
    for prune, agent in (("action", "MEM1"), ("never", "full context")):
        for what in Memory._fields:
            values = [getattr(sizes[prune][turn - 1], what) / MIB for turn in shown]
            lines.append(f"  {agent}, {what}".ljust(40) + "".join(f"{value:8.1f}" for value in values))
    bench.print("\n" + "\n".join(lines))
    bench.run.add_table(lines[0], {prune: [m._asdict() for m in sizes[prune]] for prune in sizes})
