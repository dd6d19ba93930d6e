"""The command `mem1`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from mem1.checks import InputError
from mem1.commands import data_command, demo_command, eval_command, rollout_command, train_command
from mem1.commands.options import build_parser
from mem1.config_files import take_dotted
from mem1.io import ignore_closed_pipe
from mem1.runtime.interrupts import Interrupts
from mem1.runtime.progress import Progress
from mem1.runtime.waiting import share_cpus

RUNS = {
    "train": train_command.run,
    "plan": train_command.run_plan,
    "eval": eval_command.run,
    "rollout": rollout_command.run,
    "view": data_command.view,
    "data": data_command.run,
    "retrieve": data_command.retrieve,
    "demo": demo_command.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0; 2 for what the user gave and cannot be used, with one line
    on stderr; 128 and the signal's number for a run that a signal ended, 130 for Ctrl-C. What else goes wrong
    is a bug, or the machine's, and shows its traceback.
    """
    given, settings = list(sys.argv[1:] if arguments is None else arguments), {}
    if given[:1] in (["train"], ["plan"]):
        settings, given = take_dotted(given)
    options = build_parser(RUNS).parse_args(given, argparse.Namespace(settings=settings))
    try:
        with share_cpus(), Interrupts() as interrupts, interrupts.allowed():
            options.run(options, Progress())
    except InputError as error:
        _complain(f"mem1 {options.command}: {error}")
        return 2
    except KeyboardInterrupt as error:
        _complain(f"mem1 {options.command}: {str(error) or 'interrupted'}")
        return 128 + int(getattr(error, "signum", signal.SIGINT))
    return 0


def _complain(line: str) -> None:
    with ignore_closed_pipe(sys.stderr):  # Ctrl-C ends the `tee` after `2>&1 |` as well
        print(line, file=sys.stderr, flush=True)
