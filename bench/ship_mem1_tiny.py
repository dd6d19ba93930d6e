"""Puts what `mem1 train recipes/mem1-tiny/*.yaml` has made into the package:

    python bench/ship_mem1_tiny.py RUNS

Weights are stored in half precision and load in single: what is shipped, and evaluated, is what they are
then. With each go the settings of its run and every n-th line of what the run has measured.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from mem1_tiny import settings_of, start_of

from mem1.models import shipped
from mem1.train import checkpoint
from mem1.train.run_folder import CONFIG, METRICS

SHIPPED = Path(shipped.__file__).parent / "shipped"
MODELS = {
    "mem1-tiny": "2-ppo",
    "mem1-tiny-start": "1-supervised",
    "mem1-tiny-full-context": "4-full-context-ppo",
}
LINES = 400  # of a log, or a little more
LARGEST = 6e6  # bytes of all


def main(runs: Path) -> None:
    init = start_of(runs / MODELS["mem1-tiny"]).name
    for name, run in MODELS.items():
        source = runs / run
        place = (
            source / "checkpoints" / init if name == "mem1-tiny-start" else Path(checkpoint.newest(source))
        )
        folder = SHIPPED / name
        shutil.rmtree(folder, ignore_errors=True)
        model, tokenizer, _ = checkpoint.load(place)
        checkpoint.save(folder, model.half(), tokenizer)
        config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        settings = settings_of(source)
        if settings["init"]:
            settings["init"] = str(Path(settings["init"]).relative_to(runs))
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        lines = (source / METRICS).read_text().splitlines(keepends=True)
        (folder / METRICS).write_text("".join(lines[:: max(1, len(lines) // LINES)]))
        print(f"{name}: {place}")
    size = sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file())
    print(f"{size / 1e6:.2f} MB in all")
    if size > LARGEST:
        raise SystemExit(f"expected at most {LARGEST / 1e6} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
