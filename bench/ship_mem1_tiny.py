"""Puts what `mem1 train recipes/mem1-tiny/*.yaml` has made into the package:

    python bench/ship_mem1_tiny.py RUNS

Weights are stored in half precision and load in single, as bench/mem1_tiny.py evaluates them. Of every run go
its settings and every n-th line of what it has measured, the last among them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from mem1_tiny import settings_of, start_of

from mem1.models.shipped import MADE_BY, RUNS
from mem1.train import checkpoint
from mem1.train.run_folder import CONFIG, METRICS

LINES = 100  # of a log, at most
LARGEST = 6e6  # bytes of all


def main(runs: Path) -> None:
    package = RUNS.parent.with_name(".shipped.new")
    shutil.rmtree(package, ignore_errors=True)
    records = package / RUNS.name
    records.mkdir(parents=True)
    for name, run in MADE_BY.items():
        place = checkpoint.newest(runs / run)
        model, tokenizer, _ = checkpoint.load(place)
        checkpoint.save(package / name, model.half(), tokenizer)
        (package / name / "model.safetensors").chmod(0o644)  # for everyone, wherever it is copied from
        path = package / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
        print(f"{name}: {place}")
    for run in sorted(path.parent for path in runs.glob(f"*/{CONFIG}")):
        settings = settings_of(run)
        if settings["init"]:
            settings["init"] = str(start_of(run).relative_to(runs))
        (records / f"{run.name}.json").write_text(json.dumps(settings, indent=2) + "\n")
        lines = (run / METRICS).read_text().splitlines(keepends=True)
        step = max(1, -(-len(lines) // LINES))
        (records / f"{run.name}.jsonl").write_text("".join(lines[::-step][::-1]))
    size = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
    print(f"{size / 1e6:.2f} MB in all")
    if size > LARGEST:
        raise SystemExit(f"expected at most {LARGEST / 1e6} MB")
    shutil.rmtree(RUNS.parent, ignore_errors=True)
    package.rename(RUNS.parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
