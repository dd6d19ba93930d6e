"""Which products the output layer takes on the CPU: measured once for a machine, kept for every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loss_cases import batch, cast, check, logprob_of

from mem1_core import _head, _products
from mem1_core.ops import linear_logprob


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, a process that has decided nothing, and products of any size worth a measurement."""
    folder = tmp_path / "mem1_core" / "products"
    monkeypatch.setattr(_products, "_cache_folder", lambda: folder)
    monkeypatch.setattr(_products, "_decided", {})
    monkeypatch.setattr(_products, "LEAST_WORK", 0)
    monkeypatch.setattr(_products, "PIECE", 16)
    return folder


Took = Callable[[float, float], list[int]]


@pytest.fixture
def took(monkeypatch: pytest.MonkeyPatch) -> Took:
    """Makes measurements come out as told; returns a list that grows with each."""

    def tell(blocks: float, mm: float) -> list[int]:
        calls: list[int] = []

        def measure(hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
            calls.append(len(weight))
            return {"blocks": blocks, "torch.mm": mm}

        monkeypatch.setattr(_products, "_measure", measure)
        return calls

    return tell


def ask(rows: int = 12, vocabulary: int = 512) -> bool:
    return _products.by_blocks(torch.randn(rows, 8), torch.randn(vocabulary, 8), rows)


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_products, "_decided", {})


@pytest.mark.parametrize(("mm", "blocks_stay"), [(0.5, False), (0.89, False), (0.91, True), (2.0, True)])
def test_mm_has_to_be_clearly_faster(took: Took, mm: float, blocks_stay: bool) -> None:
    assert [took(1.0, mm), ask()] == [[16], blocks_stay]


def test_an_answer_lasts(took: Took, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = took(1.0, 0.5)
    assert not ask() and not ask() and not ask(rows=13) and len(first) == 1
    (entry,) = cache.iterdir()
    assert json.loads(entry.read_text())["seconds"] == {"blocks": 1.0, "torch.mm": 0.5}
    new_process(monkeypatch)
    second = took(1.0, 2.0)  # would say the opposite
    assert not ask() and not second
    assert ask(rows=40) and ask(vocabulary=1100) and len(second) == 2  # other kinds
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert ask() and len(second) == 3
    finally:
        torch.set_num_threads(threads)


def test_who_comes_first_decides(cache: Path, monkeypatch: pytest.MonkeyPatch, took: Took) -> None:
    def measure(hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
        took(1.0, 0.5)  # meanwhile, in another process
        assert not ask()
        new_process(monkeypatch)
        return {"blocks": 1.0, "torch.mm": 2.0}

    monkeypatch.setattr(_products, "_measure", measure)
    assert not ask()
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": "another", "by_blocks": true}', "null"])
def test_a_damaged_entry_is_no_error(
    cache: Path, damage: str, took: Took, monkeypatch: pytest.MonkeyPatch
) -> None:
    took(1.0, 0.5)
    ask()
    (entry,) = cache.iterdir()
    entry.write_text(damage)
    new_process(monkeypatch)
    calls = took(1.0, 0.5)
    assert not ask() and not ask() and len(calls) == 1


def test_without_a_cache_the_process_decides(cache: Path, took: Took) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("no folder")
    calls = took(1.0, 0.5)
    assert not ask() and not ask() and len(calls) == 1


def test_small_products_are_never_measured(cache: Path, took: Took, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = took(1.0, 0.5)
    assert ask(vocabulary=255)
    monkeypatch.setattr(_products, "LEAST_WORK", 2**33)
    assert ask() and not calls and not cache.exists()


def test_the_measurement_counts_the_best_turn_after_the_first() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(16, 8)
    ticks = iter([0, 0, 0, 5, 0, 4, 0, 3, 0, 7, 0, 6, 0, 6])  # one look in each of the first two runs
    assert _products._measure(hidden, weight, lambda: next(ticks)) == {"blocks": 3, "torch.mm": 4}


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("rows", [16, 32, 100])
def test_both_ways_are_right(monkeypatch: pytest.MonkeyPatch, blocks: bool, rows: int) -> None:
    asked: list[int] = []
    monkeypatch.setattr(_head, "by_blocks", lambda hidden, weight, n: asked.append(n) or blocks)
    given = logprob_of(cast(batch(37, 48, 1001, bias=True), torch.float32))
    check(linear_logprob, given, workspace_bytes=rows * 4016)
    assert asked == [min(rows, 37)] * 2  # forward and backward ask the same


def test_a_real_measurement_in_two_processes(tmp_path: Path) -> None:
    code = (
        "import torch; from mem1_core import _products, ops; _products.LEAST_WORK = 0; torch.manual_seed(0)\n"
        "h, w = torch.randn(64, 64), torch.randn(16 * _products.PIECE, 64)\n"
        "print(ops.linear_logprob(h, w, torch.arange(64))[0].double().sum().item())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    one, two = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert one == two and len(list(tmp_path.rglob("*.json"))) == 1
