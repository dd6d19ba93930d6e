"""The device that a command is told, and the line that says where it runs."""

from __future__ import annotations

import re

import pytest
import torch

from mem1.checks import InputError
from mem1.runtime import device
from mem1.runtime.device import pick_device, whereabouts


@pytest.fixture(params=[0, 2], ids=["no CUDA", "two CUDA devices"])
def count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(device, "cuda_architectures", lambda: "90a")
    return request.param


def test_auto_is_the_first_cuda_device_where_there_is_one(count):
    assert pick_device("auto") == (torch.device("cuda", 0) if count else torch.device("cpu"))
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_an_error_of_the_user(count, name):
    if count:
        assert pick_device(name) == torch.device("cuda", int(name == "cuda:1"))
    else:
        message = rf"device: expected one of auto, cpu \(torch .* sees no CUDA devices\), got '{name}'"
        with pytest.raises(InputError, match=message):
            pick_device(name)


@pytest.mark.parametrize("name", ["cuda:2", "gpu", "", "cuda:x", "meta"])
def test_a_name_that_no_device_has(count, name):
    there = "auto, cpu, cuda:0, cuda:1" if count else "auto, cpu"
    with pytest.raises(InputError, match=rf"device: expected one of {there} \(torch .*, got '{name}'"):
        pick_device(name)


def test_a_build_without_cuda_code_runs_on_the_cpu(count, monkeypatch):
    """Some ops have Triton alone, others nothing there: a run would end in the middle."""
    monkeypatch.setattr(device, "cuda_architectures", lambda: "")
    assert pick_device("auto") == torch.device("cpu")
    if count:
        with pytest.raises(
            InputError, match="device: expected a build of mem1_core with nvcc for CUDA, got 'cuda:1'"
        ):
            pick_device("cuda:1")


def test_the_line_says_where_and_in_what(make_model):
    model = make_model()
    count = sum(p.numel() for p in model.parameters())
    threads = torch.get_num_threads()
    pattern = rf"device cpu \(.+\), {threads} threads?; float32, {count:,} parameters"
    assert re.fullmatch(pattern, whereabouts(model))
    model.get_input_embeddings().to(torch.bfloat16)
    assert "; bfloat16, float32, " in whereabouts(model)


@pytest.mark.gpu
def test_the_line_names_the_gpu():
    line = whereabouts(torch.nn.Linear(2, 3, device=pick_device("cuda")))
    assert line == f"device cuda:0 ({torch.cuda.get_device_name(0)}); float32, 9 parameters"
