"""`mem1 demo`."""

from __future__ import annotations

import argparse

import torch

from mem1.commands.loading import check_writable
from mem1.demo import demo
from mem1.runtime.progress import Progress


def run(options: argparse.Namespace, progress: Progress) -> None:
    check_writable(options.out)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    demo(
        options.out,
        quick=options.quick,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=progress,
    )
