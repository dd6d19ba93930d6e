"""How many slots fit, and whether a rollout takes what was planned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mem1.checks import InputError
from mem1.models import memory_plan
from mem1.models.free_memory import free_host_memory, free_memory
from mem1.models.memory_plan import plan_memory, size

RUN = Path(__file__).with_name("planned_run.py")
SLOT = 2 * 3 * 2 * 16 * 4 * 100  # of the small model: K and V, layers, KV heads, head dim, float32, tokens


@pytest.fixture
def model(make_model, monkeypatch):
    """A small model on a machine with 10 MB left."""
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 10_000_000)
    model = make_model()
    weights = sum(weight.nbytes for weight in model.parameters())
    monkeypatch.setattr(memory_plan, "resident_bytes", lambda: weights + 300_000_000)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rollout_takes_what_was_planned(dtype):
    done = subprocess.run([sys.executable, RUN, dtype], capture_output=True, text=True, check=True)
    planned, taken = json.loads(done.stdout)
    assert taken == pytest.approx(planned, rel=0.1)


def test_as_many_slots_as_were_asked_for_or_fit(model):
    plan = plan_memory(model, 100, 8)
    assert (plan.num_slots, plan.capacity, plan.slot_bytes) == (8, 100, SLOT)
    assert plan.total_bytes == plan.weights_bytes + 8 * SLOT + plan.working_bytes + 300_000_000
    assert plan.weights_bytes == sum(4 * weight.numel() for weight in model.parameters())
    assert plan_memory(model, 100, 8, 3 * SLOT + 5).num_slots == 3
    for share in (0.2, 0.9, 10**15):  # never more than there is
        most = plan_memory(model, 100, 1000, share)
        left = 10_000_000 - most.working_bytes
        assert 1 < most.num_slots < 100 and most.kv_bytes <= min(share, 1) * left
        assert plan_memory(model, 100, most.num_slots, share) == most


def test_a_plan_says_what_will_be_taken(model):
    plan = plan_memory(model, 100, 8)
    assert str(plan) == (
        f"memory {size(plan.total_bytes)}: {size(plan.weights_bytes)} weights, 614 kB KV cache (8 slots of "
        f"100 tokens, 76.8 kB each), {size(plan.working_bytes)} to work in, 300 MB program; 10.0 MB were free"
    )
    assert [size(n) for n in (7, 1_000, 999_999, 1_234_567, 5 * 10**9)] == [
        "7 B", "1.0 kB", "1000 kB", "1.2 MB", "5.0 GB",
    ]  # fmt: skip


def test_training_keeps_what_it_will_need(model):
    plan, most = plan_memory(model, 100, 8, reserved_bytes=5_000_000), plan_memory(model, 100, 1000, 1.0)
    assert ", 5.0 MB for training, " in str(plan)
    assert plan.total_bytes == plan_memory(model, 100, 8).total_bytes + 5_000_000
    less = plan_memory(model, 100, 1000, 1.0, reserved_bytes=5_000_000)
    assert less.kv_bytes + less.working_bytes <= 5_000_000 < most.kv_bytes + most.working_bytes


def test_working_memory_is_that_of_the_largest_forward(model, monkeypatch):
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 10**9)
    sizes = ((1, 64), (1, 4096), (2, 4096), (8, 4096), (8, 10**6))
    one, same, two, many, all_at_once = (
        plan_memory(model, 4096, slots, max_num_batched_tokens=batched).forward_bytes
        for slots, batched in sizes
    )
    assert one == same  # a piece runs, however small a batch may be
    assert one < two <= many < all_at_once


def test_a_slot_that_does_not_fit_is_named(model):
    message = r"expected at least 76.8 kB for a slot of 100 tokens, got 70000, 70.0 kB \(10.0 MB are free, "
    with pytest.raises(InputError, match=message):
        plan_memory(model, 100, 4, 70_000)
    message = r"expected at least 76.8 kB for a slot .* of them to work in and 9.9 MB for training\)"
    with pytest.raises(InputError, match=message):
        plan_memory(model, 100, 4, reserved_bytes=9_930_000)
    with pytest.raises(InputError, match="for a slot of 100,000 tokens, got 0.9, "):
        plan_memory(model, 100_000, 4)


@pytest.mark.parametrize("wrong", [0, -1, 0.0, 1.5, True, None, float("nan")])
def test_a_share_of_the_memory_is_a_fraction_or_bytes(model, wrong):
    with pytest.raises(InputError, match=r"kv_memory: expected a fraction > 0 and <= 1.0 or an integer of"):
        plan_memory(model, 100, 4, wrong)


def written(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_machine_has_what_linux_says_is_available(tmp_path):
    written(tmp_path / "proc", meminfo="MemTotal: 900 kB\nMemAvailable:  500 kB\nHugePages_Total: 0\n")
    assert free_host_memory(tmp_path / "proc", tmp_path / "cgroup") == 500 * 1024
    assert free_host_memory(tmp_path / "none", tmp_path / "none") > 2**20
    assert free_memory(torch.device("cpu")) > 2**20


def test_a_control_group_may_leave_less(tmp_path):
    groups = tmp_path / "cgroup"
    written(tmp_path / "proc", meminfo="MemAvailable: 500 kB\n")
    written(tmp_path / "proc" / "self", cgroup="3:cpu:/a\n0::/outer/inner\n")
    written(groups / "outer" / "inner", memory__max="max\n", memory__current="9000\n")
    limits = {"memory__max": "100000\n", "memory__current": "60000\n"}
    written(groups / "outer", memory__stat="inactive_file 5000\n", **limits)
    assert free_host_memory(tmp_path / "proc", groups) == 45_000  # of the outer one, and pages that can go
    written(tmp_path / "proc" / "self", cgroup="4:memory:/elsewhere\n")
    written(groups / "memory", memory__limit_in_bytes="70000", memory__usage_in_bytes="80000")
    assert free_host_memory(tmp_path / "proc", groups) == 0


def test_memory_that_torch_holds_unused_is_free(monkeypatch):
    cuda = {"mem_get_info": (100, 1000), "memory_reserved": 50, "memory_allocated": 20}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(SimpleNamespace(type="cuda")) == 130
