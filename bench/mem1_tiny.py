"""What the models of recipes/mem1-tiny can do, and what reinforcement on 2 questions adds for 16:

    python bench/mem1_tiny.py RUNS OUT [--parts agents robustness regimes growth] [--episodes 200] [--jobs 2]

RUNS is where `mem1 train recipes/mem1-tiny/*.yaml` has put its runs. OUT gets cells.json (what it has of the
same weights, episodes and seed is not played again), tables.md and mem1-tiny.png. Shares are those of the
questions that are answered right, with 95 % intervals over episodes that nobody was trained on, the same ones
in every cell.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mem1.demo import limits, trained_with
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.evaluation.evaluation_loop import OBJECTIVES, evaluate
from mem1.evaluation.results import markdown
from mem1.io import atomic_write
from mem1.parsing.tags import MEM1
from mem1.train import checkpoint
from mem1.train.checkpoint import CHECKPOINTS
from mem1.train.parity import parity
from mem1.train.run_folder import CONFIG

SEED = 20260  # of the episodes
WORLD = {"hops": 2, "facts": 4}
GREEDY, SAMPLED = {"greedy": True}, {"greedy": False}
_HINT = "hint : you have 1 turn left ; answer questions ."
WRONG_HINT = replace(MEM1, turn_hint=_HINT, last_turn_hint=_HINT)
POLICY = "3-ppo"
SHOWN = (
    *("mem1-tiny", "mem1-tiny in reencode", "imitating without haste", "start"),
    *("full context", "full context, imitating without haste", "full context, start"),
)
MEM1_RUNS = {
    "start": "2-hasty",
    "mem1-tiny": POLICY,
    "seed 1": "3-ppo-seed-1",
    "seed 2": "3-ppo-seed-2",
    "start, imitating four times as long": "7-hasty-longer",
    "imitating without haste": "1-supervised",
}
FULL_RUNS = {
    "full context, start": "5-full-context-hasty",
    "full context": "6-full-context-ppo",
    "full context, imitating without haste": "4-full-context-supervised",
}


@dataclass(frozen=True)
class Cell:
    """Episodes of one model at one number of objectives."""

    part: str
    row: str
    model: str
    objectives: int
    world: dict[str, Any] = field(default_factory=dict)  # over WORLD
    sampler: dict[str, Any] = field(default_factory=lambda: GREEDY)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the rollout."""
        return {"prune": "action", "regime": "carry"} | self.sampler

    @property
    def key(self) -> str:
        return f"{self.part} | {self.row} | {self.objectives}"


def agents(runs: Path) -> Iterator[Cell]:
    """Who answers how many, with what memory."""
    again = {"mem1-tiny in reencode": POLICY}
    for name, run in (MEM1_RUNS | again | FULL_RUNS).items():
        rule = {"prune": "never"} if name in FULL_RUNS else {"regime": "reencode"} if name in again else {}
        for drawn, sampler in (("greedy", GREEDY), ("sampled", SAMPLED)):
            for n in OBJECTIVES:
                yield Cell("agents", f"{name}, {drawn}", str(runs / run), n, {}, sampler | rule)


def robustness(runs: Path) -> Iterator[Cell]:
    """What nobody was trained for."""
    worlds = {
        "as trained": {},
        "bare answers": {"facts": 0},
        "8 facts": {"facts": 8},
        "4 hops": {"hops": 4},
        "text that imitates tags": {"adversarial": True},
        "a quarter of the facts missing": {"missing": 0.25},
        **{f"passages of {length} tokens": {"passage_tokens": length} for length in (50, 100, 200, 400)},
    }
    model = str(runs / POLICY)
    for name, world in worlds.items():
        for n in (2, 16):
            yield Cell("robustness", name, model, n, world)
    for n in (2, 16):
        yield Cell("robustness", "a hint that is wrong", model, n, {}, GREEDY | {"format": WRONG_HINT})
        yield Cell("robustness", "pruned at </IS>", model, n, {}, GREEDY | {"prune": "state"})
    for n in (24, 32):
        yield Cell("robustness", "more questions than ever", model, n)


def regimes(runs: Path) -> Iterator[Cell]:
    """The same weights with their cache pruned, and encoded again."""
    trained = {
        "start": start_of(runs / POLICY),
        "reinforced in carry": runs / POLICY,
        "reinforced in reencode": runs / f"{POLICY}-reencode",
    }
    for name, model in trained.items():
        for regime in ("carry", "reencode"):
            for drawn, sampler in (("greedy", GREEDY), ("sampled", SAMPLED)):
                for n in (2, 16):
                    row = f"{name}, run in {regime}, {drawn}"
                    yield Cell("regimes", row, str(model), n, {}, sampler | {"regime": regime})


def growth(runs: Path) -> Iterator[Cell]:
    """16 questions, by updates on 2 and by where these began."""
    for run in sorted(runs.glob("*ppo*")):
        rule = {name: settings_of(run)["rollout"][name] for name in ("prune", "regime")}
        for path in [start_of(run), *reversed(checkpoint.numbered(run))]:
            update = path.name if path.parent.parent == run else "policy-000000"
            for drawn, sampler in (("greedy", GREEDY), ("sampled", SAMPLED)):
                for n in (2, 16):
                    yield Cell("growth", f"{run.name}, {update}, {drawn}", str(path), n, {}, sampler | rule)


PARTS = {"agents": agents, "robustness": robustness, "regimes": regimes, "growth": growth}


def start_of(run: Path) -> Path:
    """The model that a run began with; beside it, wherever the runs were moved."""
    init = Path(settings_of(run)["init"])
    place = init.parts[-3:] if init.parent.name == CHECKPOINTS else init.parts[-1:]
    return run.parent.joinpath(*place)


def settings_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / CONFIG).read_text()))


def play(cell: Cell, episodes: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, tokenizer, _ = checkpoint.load(cell.model)
    model = model.half().float()  # as it is shipped
    world, n = WORLD | cell.world, cell.objectives
    texts = 64 + 8 * world["facts"] + world.get("passage_tokens", 0)
    settings = {"num_slots": 64, "max_info_tokens": texts} | cell.settings
    config = replace(trained_with(cell.model), environment=world)
    rules = replace(limits(config, n), **settings)
    make = partial(MultiHopEnv, n, **world)
    row, played = evaluate(
        model, tokenizer, rules, make, agent=cell.row, objectives=n, episodes=episodes, seed=SEED
    )
    gap = parity(model, played[:16], rules.regime, rules.temperature)
    return row.to_dict() | {"max_dlogp": gap.max_dlogp, "mean_dlogp": gap.mean_dlogp}


def stamp(cell: Cell, episodes: int) -> list[Any]:
    """What the figures of a cell follow from, beside the code."""
    rules = repr((sorted(cell.world.items()), sorted(cell.settings.items())))
    return [episodes, SEED, digest(cell.model), cell.objectives, rules]


@cache
def digest(model: str) -> str:
    """Of its weights, by which many cells go."""
    weights = Path(checkpoint.newest(model)) / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


def share(cell: dict[str, Any]) -> str:
    """Of questions answered right."""
    ends = " to ".join(f"{end:.3f}" for end in cell["reward_interval"])
    return f"{cell['reward']:.3f} ({ends})"


def tables(found: dict[str, dict[str, Any]]) -> str:
    """What each part has found, in Markdown."""
    text = []
    for part in PARTS:
        cells = [(key.split(" | "), cell) for key, cell in found.items() if key.startswith(f"{part} | ")]
        sizes = sorted({int(n) for (_, _, n), _ in cells})
        rows = list(dict.fromkeys(row for (_, row, _), _ in cells))
        by_place = {(row, int(n)): cell for (_, row, n), cell in cells}
        for title, shown in (
            ("share of questions answered right", share),
            ("share of episodes with too many or too few answers", miscounted),
            ("peak tokens, and without the prompt", peaks),
            ("sampled and recomputed log-probs, largest gap", lambda cell: f"{cell['max_dlogp']:.1e}"),
        ):
            lines = [
                [row, *(shown(by_place[row, n]) if (row, n) in by_place else "" for n in sizes)]
                for row in rows
            ]
            if lines:
                text.append(f"{part}: {title}\n\n{markdown([part, *map(str, sizes)], lines)}\n")
    return "\n".join(text)


def miscounted(cell: dict[str, Any]) -> str:
    return f"{cell['answers_miscounted']:.3f}"


def peaks(cell: dict[str, Any]) -> str:
    return f"{cell['peak_tokens']:.0f}, {cell['peak_tokens_without_prompt']:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=PARTS)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cells.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    cells = [cell for part in options.parts for cell in PARTS[part](options.runs)]
    stamps = {cell.key: stamp(cell, options.episodes) for cell in cells}

    def keep(figures: dict[str, Any]) -> None:
        """For every cell of the same weights and rules."""
        same = [key for key, needed in stamps.items() if needed == figures.get("stamp")]
        found.update(dict.fromkeys(same, figures))

    for figures in [*found.values()]:
        keep(figures)
    for key in [*found]:  # of other weights or rules: no table shows them beside these
        if key.split(" | ")[0] in options.parts and found[key].get("stamp") != stamps.get(key):
            del found[key]
    missing = [cell for cell in cells if cell.key not in found]
    wanted = list({repr(stamps[cell.key]): cell for cell in missing}.values())
    failed = 0
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        played = {pool.submit(play, cell, options.episodes): cell for cell in wanted}
        for done in as_completed(played):
            cell = played[done]
            if (error := done.exception()) is not None:
                print(f"{cell.key}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                failed += 1
                continue
            keep(done.result() | {"stamp": stamps[cell.key]})
            print(f"{cell.key}: {share(found[cell.key])}", flush=True)
            with atomic_write(path) as file:
                json.dump(found, file, indent=1)
    (options.out / "tables.md").write_text(tables(found))
    draw(found, options.out / "mem1-tiny.png")
    if failed:
        raise SystemExit(f"{failed} of {len(wanted)} cells could not be played")


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Answers and memory by the number of questions; 16 questions by updates on 2."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.2), layout="constrained", dpi=120)
    left, middle, right = figure.subplots(1, 3)
    for name in SHOWN:
        cells = [(n, found.get(f"agents | {name}, greedy | {n}")) for n in OBJECTIVES]
        known = [(n, cell) for n, cell in cells if cell]
        sizes, values = [n for n, _ in known], [cell["reward"] for _, cell in known]
        ends = [[abs(cell["reward_interval"][end] - cell["reward"]) for _, cell in known] for end in (0, 1)]
        left.errorbar(sizes, values, ends, marker="o", capsize=2, label=name)
        middle.plot(sizes, [cell["peak_tokens"] for _, cell in known], marker="o", label=name)
    curves: dict[str, list[tuple[int, float]]] = {}
    for key, cell in found.items():
        part, row, n = key.split(" | ")
        if part == "growth" and n == "16" and row.endswith("greedy"):
            run, update, _ = row.split(", ")
            curves.setdefault(run, []).append((int(update[-6:]), cell["reward"]))
    for run, points in curves.items():
        right.plot(*zip(*sorted(points), strict=True), marker=".", label=run)
    left.set(title="questions answered right, greedy", xlabel="questions", ylim=(0, 1.02))
    middle.set(title="peak tokens", xlabel="questions", yscale="log")
    right.set(title="16 questions, greedy, by updates on 2", xlabel="update", ylim=(0, 1.02))
    for ax in (left, middle):
        ax.set_xscale("log")
        ax.set_xticks(OBJECTIVES, map(str, OBJECTIVES))
        ax.minorticks_off()
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    middle.legend(fontsize=7, loc="upper left")
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path)


if __name__ == "__main__":
    main()
