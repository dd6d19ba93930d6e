"""Pruning on a GPU: no wait of the host, CUDA graphs, and values that only the device knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kv_cache_cases import (
    GOOD,
    SLOTS,
    based,
    bits,
    call,
    copied,
    memory,
    padded,
    paged,
    plain,
    same,
    tensors_of,
)

import mem1_core
from mem1_core.sample_inputs import keep_mask, ranges_of
from mem1_core.testing import no_wait

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not mem1_core.cuda_architectures(), reason="built without nvcc"),
]
PAGE = 4


def assert_as_on_the_host(
    result: Any, arguments: dict[str, Any], before: dict[str, Any], sequences: tuple[int, ...] = (0, 1, 2)
) -> None:
    """`arguments` and `result`, after the call, are for these sequences what the CPU makes of `before`."""
    want_arguments = copied(before, "cpu") | {"backend": "cpu"}
    want = call(want_arguments)
    kv, want_kv = arguments["kv"].cpu(), want_arguments["kv"]
    atol = 1e-5 if "inv_freq" in arguments else 0
    for b in sequences:
        for ours, theirs in zip(tensors_of(result)[:2], tensors_of(want)[:2], strict=True):
            assert torch.equal(ours[b].cpu(), theirs[b])
        n = int(tensors_of(want)[0][b])
        if "block_table" in arguments:
            table = want_arguments["block_table"][b]
            assert torch.equal(arguments["block_table"][b].cpu(), table)
            pages = table[: -(-n // PAGE)].long()
            pair = [cache[:, :, pages].flatten(2, 3)[:, :, :n] for cache in (kv, want_kv)]
        else:
            pair = [cache[:, :, b, :n] for cache in (kv, want_kv)]
        torch.testing.assert_close(*pair, rtol=0, atol=atol)
        for name in ("base_keys", "base_positions"):
            if name in arguments:
                ours, theirs = (x[name].cpu() for x in (arguments, want_arguments))
                ours, theirs = (x[:, b, :n] if x.dim() == 5 else x[b, :n] for x in (ours, theirs))
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("good", GOOD)
@pytest.mark.parametrize("keep", ["mask", "ranges", "lists"])
def test_the_host_does_not_wait(good: Callable[[], dict[str, Any]], keep: str) -> None:
    """On a stream of its own, after work that is still to be done there."""
    arguments = good()
    if keep != "mask":
        lists = ranges_of(arguments["keep"], arguments["lengths"].tolist())
        arguments["keep"] = padded(lists) if keep == "ranges" else lists
    before = copied(arguments)
    arguments = copied(arguments, "cuda")
    call(copied(arguments))  # loads the kernels
    later, arguments["kv"] = arguments["kv"], torch.zeros_like(arguments["kv"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), no_wait():
        torch.cuda._sleep(10**8)
        arguments["kv"].copy_(later)
        result = call(arguments)
    torch.cuda.current_stream().wait_stream(stream)
    assert_as_on_the_host(result, arguments, before)


@pytest.mark.parametrize("good", GOOD)
def test_a_cuda_graph_captures_a_prune(good: Callable[[], dict[str, Any]]) -> None:
    """Captured once, replayed for other contents, masks and lengths."""
    arguments = copied(good(), "cuda")
    call(copied(arguments))  # the first launch loads the kernels, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(arguments)
    for seed, lengths in enumerate(([SLOTS, 9, 10], [0, SLOTS, 1], [7, 7, 7])):
        fresh = good() | {"keep": keep_mask("random", lengths, SLOTS, seed), "lengths": torch.tensor(lengths)}
        for name, value in fresh.items():
            if isinstance(value, torch.Tensor):
                arguments[name].copy_(value)
        graph.replay()
        assert_as_on_the_host(result, arguments, fresh)


BAD_RANGES = {
    "unsorted": [(4, 6), (1, 2)],
    "overlapping": [(1, 5), (4, 6)],
    "backwards": [(5, 3)],
    "negative": [(-1, 3)],
    "beyond the length": [(3, 10)],
    "beyond the slots": [(3, 2**31 - 1)],
    "empty past the length": [(0, 3), (10, 10)],
    "end of 2^32 + 3": [(2, 2**32 + 3)],
}
BAD_LENGTHS = [-1, SLOTS + 1, 2**31 - 1, -(2**31), 2**32 + 3]


def bad_on_the_device(what: Any) -> dict[str, Any]:
    """Another `keep` or `lengths`, wrong for the second sequence alone."""
    if isinstance(what, int):
        return {"lengths": torch.tensor([SLOTS, what, 10], device="cuda")}
    row = BAD_RANGES[what]
    fine = [[(0, 0)] * (len(row) - 1) + [(2, 7)]]
    return {"keep": torch.tensor(fine + [row] + fine, device="cuda")}


@pytest.mark.parametrize("good", GOOD)
@pytest.mark.parametrize("what", [*BAD_RANGES, *BAD_LENGTHS])
def test_a_bad_value_on_the_device_leaves_its_sequence_alone(
    good: Callable[[], dict[str, Any]], what: Any
) -> None:
    """It is not touched, its new length is -1, and the others are pruned."""
    arguments = copied(good(), "cuda")
    if isinstance(what, str):
        arguments["keep"] = torch.tensor([[(2, 7)]] * 3, device="cuda")
    good_call = copied(arguments)
    arguments |= bad_on_the_device(what)
    before = copied(arguments)
    with no_wait():
        result = call(arguments)
    lengths = result if good is not paged else result.lengths
    assert lengths[1] == -1 and lengths.dtype == arguments["lengths"].dtype
    assert_as_on_the_host(result, arguments, good_call, sequences=(0, 2))
    if good is paged:
        assert torch.equal(arguments["block_table"][1], before["block_table"][1])
        rows = before["block_table"][1].long()
        assert not result.freed[rows].any()
    else:
        rows = torch.tensor([1], device="cuda")
    assert torch.equal(bits(arguments["kv"][:, :, rows]), bits(before["kv"][:, :, rows]))
    if "base_keys" in arguments:
        assert torch.equal(arguments["base_keys"][:, 1], before["base_keys"][:, 1])
        assert torch.equal(arguments["base_positions"][1], before["base_positions"][1])


def test_ranges_on_the_host_are_checked_there() -> None:
    """Where they can be read without a wait, all but the lengths is known."""
    for what in ("unsorted", "overlapping", "backwards", "negative", "beyond the slots", "end of 2^32 + 3"):
        arguments = copied(plain(), "cuda")
        arguments["keep"] = [[(0, 2)], BAD_RANGES[what], []]
        before = copied(arguments)
        with pytest.raises(ValueError, match="keep"):
            call(arguments)
        assert torch.equal(arguments["kv"], before["kv"])


@pytest.mark.parametrize(
    "name", ["keep", "lengths", "inv_freq", "base_keys", "base_positions", "block_table", "kv"]
)
def test_tensors_on_the_host_are_refused(name: str) -> None:
    good = paged if name == "block_table" else based
    arguments = copied(good(), "cuda")
    if name == "kv":
        layers = [tuple(layer) for layer in arguments["kv"]]
        arguments["kv"] = [layers[0], (layers[1][0], layers[1][1].cpu())]
    else:
        arguments[name] = arguments[name].cpu()
    before = memory(arguments)
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        call(arguments)
    assert same(memory(arguments), before)
