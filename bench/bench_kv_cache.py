"""prune_kv_cache_ and prune_paged_kv_cache_ on what a turn of MEM1 leaves of a KV cache.

Peers: torch's gather into new memory, copied back; the slice cloned and copied back, where one range leaves;
kvpress's way, a gather per layer into a new cache. GB/s count the entries that change their place, K and V of
all layers, read once and written once, whatever a row really moves; a plain copy of as many bytes is the
ceiling. In place, most of what is written over has just been read, so that less memory is touched than by a
copy: a figure over 100 % is no error.

On a CUDA device (`-k gpu`) figures are the time of the device, calls after one another, where a small cache
stays in L2. In the tables of an idle device they are what a caller of one call waits, its launch included,
L2 overwritten before.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv_cache_task import OURS, PAGED, Model, Task, Turn
from measure import Result

QWEN_7B = Model(28, 4, 128, torch.bfloat16)
SMALL_MODEL = Model(4, 2, 32, torch.float32)  # the defaults of `mem1 train`
QUICK_MODEL = Model(2, 2, 16, torch.bfloat16)

# A prompt of 396 tokens stays and a turn of 500 leaves. An ordinary action has 120 tokens; when 1,024 move,
# 117 MB of the 7B model's cache are read and written.
ONE_TURN, LARGE = Turn(396, 500, 120), Turn(396, 500, 1024)
UNALIGNED = Turn(396, 505, 1024)  # the turn ends within a page, of 16 and of 256
TABLES = {
    "large": (QWEN_7B, [LARGE]),
    "one turn": (QWEN_7B, [ONE_TURN]),
    "one turn of the small model": (SMALL_MODEL, [ONE_TURN]),
}
SMALL = [name for name in TABLES if name.startswith("one turn")]
GPU_BUDGET_S = 1.5  # eleven tables: under half a minute with inputs and checks


def ragged(batch: int) -> list[Turn]:
    """Lengths that differ by up to a quarter, on average those of LARGE."""
    generator = torch.Generator().manual_seed(0)
    factors = 0.75 + 0.5 * torch.rand(batch, 3, generator=generator)
    return [Turn(*row) for row in (factors * torch.tensor(LARGE)).int().tolist()]


def make_task(bench: Any, name: str, model: Model, turns: list[Turn], device: str, **options: Any) -> Task:
    if not bench.measuring:
        model, turns = QUICK_MODEL, [Turn(*(n // 3 for n in turn)) for turn in turns[:3]]
    return Task(name if device == "cpu" else f"{name}, on {device}", model, turns, device, **options)


def measure(bench: Any, task: Task, device: str, idle: bool = False) -> dict[str, Result]:
    candidates = [*task.ours(), *([task.replayed()] if idle else []), *task.peers()]
    return bench.compare(
        task.title(),
        candidates,
        moved_bytes=task.moved_bytes,
        device=device,
        idle=idle,
        budget_s=3.0 if device == "cpu" else GPU_BUDGET_S,
    )


@pytest.mark.parametrize("table", TABLES)
def test_prune(bench: Any, table: str) -> None:
    results = measure(bench, make_task(bench, table, *TABLES[table], "cpu"), "cpu")
    if table == "large":
        bench.goal_of_copy(results, OURS, 70)


def test_compact(bench: Any) -> None:
    measure(bench, make_task(bench, "compact", *TABLES["large"], "cpu", compact=True), "cpu")


@pytest.mark.parametrize("gaps", ["close", "leave"])
@pytest.mark.parametrize("page", [16, 256])
def test_paged(bench: Any, page: int, gaps: str) -> None:
    name = f"pages of {page}, gaps {gaps}"
    measure(bench, make_task(bench, name, QWEN_7B, [UNALIGNED], "cpu", page=page, gaps=gaps), "cpu")


@pytest.mark.parametrize("table", ["large", "64 ragged"])
def test_gpu_prune(bench: Any, device: str, table: str) -> None:
    model, turns = TABLES.get(table, (QWEN_7B, ragged(64)))
    results = measure(bench, make_task(bench, table, model, turns, device), device)
    bench.goal_of_copy(results, OURS, 80)


@pytest.mark.parametrize("table", SMALL)
def test_gpu_prune_small(bench: Any, device: str, table: str) -> None:
    results = measure(bench, make_task(bench, table, *TABLES[table], device), device)
    if bench.measuring:
        micros = results[OURS].median * 1e6
        bench.goal(f"{table}, time of the device", micros, 10, at_most=True, unit=" us")


@pytest.mark.parametrize("table", SMALL)
def test_gpu_prune_idle(bench: Any, device: str, table: str) -> None:
    measure(bench, make_task(bench, f"{table}, device idle before", *TABLES[table], device), device, True)


def test_gpu_compact(bench: Any, device: str) -> None:
    measure(bench, make_task(bench, "compact", *TABLES["large"], device, compact=True), device)


@pytest.mark.parametrize("gaps", ["close", "leave"])
@pytest.mark.parametrize("page", [16, 256])
def test_gpu_paged(bench: Any, device: str, page: int, gaps: str) -> None:
    task = make_task(
        bench, f"pages of {page}, gaps {gaps}", QWEN_7B, [UNALIGNED], device, page=page, gaps=gaps
    )
    results = measure(bench, task, device)
    if gaps == "close":
        bench.goal_of_copy(results, PAGED, 80)
