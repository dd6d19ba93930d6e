"""`mem1 demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mem1.commands.loading import check_writable
from mem1.commands.train_command import stages_of, train_stages
from mem1.demo import Agents, demo
from mem1.runtime.progress import Progress

_RECIPES = Path(__file__).parents[1] / "recipes" / "mem1-tiny"


def run(options: argparse.Namespace, progress: Progress) -> None:
    check_writable(options.out)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    agents = None
    if options.train:
        runs = options.out / "runs"
        train_stages(stages_of(sorted(_RECIPES.glob("*.yaml")), runs), progress, resume=True)
        agents = Agents(runs / "2-ppo", runs / "1-supervised", runs / "4-full-context-ppo")
    demo(
        options.out,
        agents,
        quick=options.quick,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=progress,
    )
