"""Where the time of an update of the default run goes:

python bench/step_time.py MODEL [UPDATES]

MODEL is a checkpoint to start from, as `mem1 train recipes/small.yaml` leaves one. Timed are the calls into
model and kernels: forwards and samples of the engine, log-probs and values before the update, forwards and
backwards of the losses, and the optimisers; what is left of a part is the loop's own.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mem1.config_files import made, merged, read, typed
from mem1.engine.engine import Engine
from mem1.engine.slots import Slots
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.training import toy_training
from mem1.runtime.progress import Progress
from mem1.train import learner, train_loop
from mem1.train.learner import Learner
from mem1.train.optim import AdamW
from mem1.train.training_episodes import Episodes

RECIPE = Path(__file__).parents[1] / "recipes" / "small.yaml"
WARM = 2  # updates that are not counted: the critic learns alone in them
# Each part, by the call that it is, with the calls into model and kernels within it.
PARTS: dict[str, tuple[Any, str, list[tuple[Any, str]]]] = {
    "rollout": (Episodes, "of_update", [(Engine, "feed"), (Engine, "sample"), (Slots, "prune")]),
    "log-probs and values": (Learner, "prepare", [(learner, "recompute_logprobs"), (Learner, "_values")]),
    "update": (
        Learner,
        "learn",
        [(Learner, "_value_step"), (Learner, "_policy_step"), (AdamW, "step")],
    ),
}


def main(model: str, updates: int = 6) -> None:
    seconds: dict[str, float] = defaultdict(float)

    def timed(owner: Any, name: str, label: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def call(*given: Any, **settings: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*given, **settings)
            finally:
                seconds[label] += time.perf_counter() - began

        setattr(owner, name, call)

    for part, (owner, name, inside) in PARTS.items():
        timed(owner, name, part)
        for place, called in inside:
            timed(place, called, f"{part}, inside")
    for name in ("reset", "step"):
        timed(MultiHopEnv, name, "environments")
    given = {"init": model, "max_updates": WARM + updates, "save_every": 10**6}
    config = made(typed(merged(read(RECIPE), given, {"environment": {"objectives": [1, 4]}})))
    config.environment.pop("name", None)
    marks: list[tuple[float, dict[str, float]]] = []

    def at_update(line: str) -> None:
        if line.startswith("update ") and "  reward " in line:
            marks.append((time.perf_counter(), dict(seconds)))

    with TemporaryDirectory() as out:
        train_loop.train(config, out, **toy_training(config), progress=Progress(log=at_update))
    (began, before), (ended, after) = marks[WARM - 1], marks[-1]
    spent = {name: (after[name] - before.get(name, 0.0)) / updates for name in after}
    whole = (ended - began) / updates
    outside = whole - sum(spent[f"{part}, inside"] for part in PARTS)
    for part in PARTS:
        inner = spent[f"{part}, inside"]
        own = spent[part] - inner
        print(f"{part:<22}{spent[part]:8.3f} s {spent[part] / whole:6.1%}, of it outside {own:.3f} s")
    print(f"of which environments {spent['environments']:.3f} s")
    rest = whole - sum(spent[part] for part in PARTS)
    print(f"{'other':<22}{rest:8.3f} s {rest / whole:6.1%}")
    print(f"{'a step':<22}{whole:8.3f} s, outside of model and kernels {outside / whole:.1%}")
    print(json.dumps({"seconds": whole, "outside": outside / whole, **spent}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
