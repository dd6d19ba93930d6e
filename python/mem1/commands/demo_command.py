"""`mem1 demo`."""

from __future__ import annotations

import argparse

import torch

from mem1.commands.loading import check_writable
from mem1.commands.train_command import stages_of, train_stages
from mem1.demo import Agents, check, demo
from mem1.models.shipped import MADE_BY, RUNS
from mem1.runtime.progress import Progress

STAGES = (
    *("1-supervised", "2-hasty", "3-ppo"),
    *("4-full-context-supervised", "5-full-context-hasty", "6-full-context-ppo"),
)


def run(options: argparse.Namespace, progress: Progress) -> None:
    check_writable(options.out)
    agents, threads = None, options.threads or torch.get_num_threads()
    runs, again = options.out / "runs", options.overwrite
    # What it has trained it goes on with, and shows again; not after hours is it told what is in the way.
    replaces = again or (options.train and runs.is_dir())
    check(options.out, replaces)
    if options.train:
        recipes, none = [RUNS / f"{stage}.json" for stage in STAGES], argparse.Namespace(settings={})
        train_stages(
            stages_of(recipes, runs, none),
            progress,
            resume=not again,
            overwrite=again,
            goes_on="the same command goes on from it",
        )
        agents = Agents(*(runs / run for run in MADE_BY.values()))
    torch.set_num_threads(threads)  # which the stages have of their own
    demo(
        options.out,
        agents,
        quick=options.quick,
        seed=options.seed,
        overwrite=replaces,
        progress=progress,
    )
