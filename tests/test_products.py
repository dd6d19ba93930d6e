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
from loss_cases import batch, cast, check, draw, logprob_of

from mem1_core import _head, _products
from mem1_core.ops import linear_logprob
from mem1_core.testing import poisoned_memory


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, a process that has decided nothing, and products of any size worth a measurement."""
    folder = tmp_path / "mem1_core" / "products"
    monkeypatch.setattr(_products, "_cache_folder", lambda: folder)
    monkeypatch.setattr(_products, "_decided", {})
    monkeypatch.setattr(_products, "MIN_WORK", 0)
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


def ask(rows: int = 12, vocabulary: int = 64) -> bool:
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
    assert ask(vocabulary=31)
    monkeypatch.setattr(_products, "MIN_WORK", 2**33)
    assert ask() and not calls and not cache.exists()


def test_the_measurement_counts_the_best_turn_after_the_first() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(16, 8)
    ticks = iter([0, 0, 0, 5, 0, 4, 0, 3, 0, 6])  # one look in each of the first two runs
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
        "import torch; from mem1_core import _products, ops; _products.MIN_WORK = 0; torch.manual_seed(0)\n"
        "h, w = torch.randn(64, 64), torch.randn(2 * _products.PIECE, 64)\n"
        "print(ops.linear_logprob(h, w, torch.arange(64))[0].double().sum().item())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    one, two = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert one == two and len(list(tmp_path.rglob("*.json"))) == 1


# ------------------------------------------------------------------------------------------------ bfloat16


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1001])
def test_narrow_gradients_are_the_wide_ones_rounded(vocabulary: int) -> None:
    """In the place of the logits, and nothing of them but the row's own."""
    logits = 3 * draw(5, vocabulary + 7).float()
    of_rows = [x.float() for x in draw(5, 5, seed=1)]
    target = torch.arange(5) % vocabulary
    of_rows[1][3] = torch.nan
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows = logits.clone()
        given = rows[:, :vocabulary], None, target, torch.ones(5), *of_rows
        torch.ops.mem1_core._rows_backward_(*given, dtype, 0.0, 0)
        made[dtype] = rows.view(dtype)[:, :vocabulary]
        assert torch.equal(rows[:, vocabulary:], logits[:, vocabulary:])
    wide, narrow = made.values()
    assert wide[3].isnan().all() and torch.isfinite(wide[0]).all()
    torch.testing.assert_close(narrow, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("native", [True, False], ids=["as it is", "widened"])
@pytest.mark.parametrize("sizes", [(1, 2, 1), (37, 48, 1001), (16, 7, 257), (5, 33, 512)], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_bfloat16_on_every_processor(native: bool, sizes: tuple[int, int, int], rows: int) -> None:
    """Odd sizes, one chunk and several; and where the processor has no products of bfloat16."""
    if native and not torch.ops.mem1_core._linear_in_bfloat16():
        pytest.skip("this processor has no products of bfloat16")
    given = logprob_of(cast(batch(*sizes, bias=True), torch.bfloat16))
    with torch.backends.mkldnn.flags(enabled=native), poisoned_memory():
        assert torch.ops.mem1_core._linear_in_bfloat16() == native
        check(linear_logprob, given, workspace_bytes=rows * 4 * (sizes[2] + 3))


def test_one_chunk_makes_a_narrow_gradient_of_the_weight() -> None:
    given = logprob_of(cast(batch(32, 48, 1000), torch.bfloat16))
    given["weight"].requires_grad_()
    for workspace_bytes, size in ((None, 2), (16 * 4000, 4)):
        linear_logprob(**given, workspace_bytes=workspace_bytes)[0].sum().backward()
        assert given["weight"].grad.untyped_storage().size() == 48_000 * size
        given["weight"].grad = None
