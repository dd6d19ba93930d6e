"""The models that come with the package, by their names; docs/mem1-tiny.md says what each can do.

Beside them are the settings of the runs that made them, and what these measured (bench/ship_mem1_tiny.py puts
all of it there).
"""

from __future__ import annotations

from pathlib import Path

PACKAGED = Path(__file__).parent / "shipped"  # NAME/ of every model
_SETTINGS = "train.json"  # of a run, from its beginning
RUNS = PACKAGED / "runs"  # NAME.json and NAME.jsonl of every run
MADE_BY = {
    "mem1-tiny": "3-ppo",  # answers questions of `mem1.envs.toy.multihop`, with the memory of MEM1
    "mem1-tiny-start": "2-hasty",  # what it was before reinforcement
    "mem1-tiny-full-context": "6-full-context-ppo",  # of the same size and training, which forgets nothing
}


def shipped(name: str) -> Path | None:
    """The folder of a model of the package; None of any other name, and where a run of that name is here."""
    return PACKAGED / name if name in MADE_BY and not (Path(name) / _SETTINGS).is_file() else None


def settings_of(folder: Path) -> Path | None:
    """The settings of the run that made a model of the package; None of any other folder."""
    place = folder.resolve()
    run = MADE_BY.get(place.name) if place.parent == PACKAGED.resolve() else None
    return RUNS / f"{run}.json" if run else None
