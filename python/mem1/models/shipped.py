"""The models that come with the package, by their names (bench/ship_mem1_tiny.py puts them there); none yet.

mem1-tiny                 answers questions of `mem1.envs.toy.multihop`, with the memory of MEM1
mem1-tiny-start           what it was before reinforcement
mem1-tiny-full-context    of the same size and training, which forgets nothing
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "shipped"


def shipped(name: str) -> Path | None:
    """The folder of a model of the package; None of any other name."""
    folder = _FOLDER / name
    return folder if folder.parent == _FOLDER and (folder / "config.json").is_file() else None
