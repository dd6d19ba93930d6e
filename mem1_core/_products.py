"""Whose fp32 products of an output layer are faster on this CPU: oneDNN's, by blocks, or MKL's, `torch.mm`.

That depends on the processor, and is measured: on a piece of the weight, once for a machine and kind of
product. The answer is kept in the user's cache folder, ~/.cache/mem1_core, because the two round differently:
the same run has to give the same bits in the next process. Where the folder cannot be used the answer lasts
as long as the process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE = 16_384  # rows of the weight that are measured: fewer, and what a call costs by itself would show
MIN_WORK = 2**33  # multiplications of one product: below, measuring would cost more than it could bring
BLOCKS = 2  # raised when the block products of linear_cpu.cpp change, which voids answers about them
CLEARLY = 0.9  # of the time of block products: what torch.mm has to stay below to replace them
REPEATS = 2

_decided: dict[str, bool] = {}


def by_blocks(hidden: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether to multiply by blocks, so many rows of hidden [T, H] at a time with weight [V, H]; both float32
    on the CPU.
    """
    vocabulary, width = weight.shape
    if rows * vocabulary * width < MIN_WORK or vocabulary < 2 * PIECE:
        return True
    key = json.dumps(_kind(rows, width, vocabulary), sort_keys=True)
    if key not in _decided:
        _decided[key] = _kept(_cache_folder(), key, lambda: _measure(hidden[:rows], weight[:PIECE]))
    return _decided[key]


def _kind(rows: int, width: int, vocabulary: int) -> dict[str, Any]:
    """Sizes by their powers of two: a chunk that is a little shorter is no other kind."""
    sizes = [size.bit_length() for size in (rows, width, vocabulary)]
    return {
        "blocks": BLOCKS,
        "cpu": _processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "sizes": sizes,
    }


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    named = ("vendor_id", "cpu family", "model", "model name", "stepping")
    facts = [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in named]
    return " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *facts])


def _cache_folder() -> Path:
    try:
        return Path.home() / ".cache" / "mem1_core" / "products"
    except RuntimeError:  # the user has none
        return Path(os.devnull)


def _kept(folder: Path, key: str, measure: Callable[[], dict[str, float]]) -> bool:
    """The answer in the folder; without one a new one, or that of whoever has put one there first."""
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    found = _read(path, key)
    if found is not None:
        return found
    seconds = measure()
    answer = seconds["torch.mm"] > CLEARLY * seconds["blocks"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".new") as file:
            json.dump({"key": key, "by_blocks": answer, "seconds": seconds}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
            try:
                os.link(file.name, path)  # all of it or nothing, and never in the place of another
            except FileExistsError:
                found = _read(path, key)
                if found is None:  # damaged
                    os.link(file.name, f"{file.name}.again")
                    os.replace(f"{file.name}.again", path)
    except OSError:  # a cache is no condition
        pass
    return answer if found is None else found


def _read(path: Path, key: str) -> bool | None:
    try:
        entry = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(entry, dict) and entry.get("key") == key and isinstance(entry.get("by_blocks"), bool)
    return entry["by_blocks"] if known else None


def _measure(
    hidden: Tensor, weight: Tensor, now: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of the three products each way, the best of some turns."""
    ops = torch.ops.mem1_core
    hidden, weight = hidden.detach().contiguous(), weight.detach().contiguous()
    logits = hidden.new_empty(len(hidden), len(weight))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def blocks() -> None:
        ops._linear_logits_(hidden, weight, logits)
        ops._linear_hidden_gradient_(logits, weight, d_hidden)
        ops._linear_weight_gradient_(logits, hidden, d_weight, False)

    def mm() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)

    best = {"blocks": float("inf"), "torch.mm": float("inf")}
    with torch.no_grad():
        for turn in range(REPEATS + 1):
            for name, run in (("blocks", blocks), ("torch.mm", mm)):
                begin = now()
                run()
                if turn:  # the first one allocates and compiles
                    best[name] = min(best[name], now() - begin)
    return best
