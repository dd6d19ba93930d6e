"""The losses over the vocabulary on a GPU: real sizes, memory, no wait of the host, streams, CUDA graphs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mem1_core
from mem1_core import _library, reference
from mem1_core.ops import fused_linear_ppo_loss, gae, linear_logprob
from mem1_core.testing import assert_accurate, no_wait

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not mem1_core.cuda_architectures(), reason="built without nvcc"),
]
DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Tokens and vocabulary: one chunk of few rows, many rows, and two chunks of a large vocabulary.
SIZES = [(5, 151_936), (1_000, 50_257), (900, 151_936)]
GIB = 2**30


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def layer(
    tokens: int, vocabulary: int, dtype: torch.dtype, width: int = 64, bias: bool = True
) -> dict[str, Any]:
    """An output layer whose logits have a spread of about 2, with a temperature for each token."""
    return {
        "hidden": draw(tokens, width, seed=0, dtype=dtype),
        "weight": (draw(vocabulary, width, seed=1) * 2 / math.sqrt(width)).to(dtype),
        "target": torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(2)).to(DEVICE),
        "temperature": 0.5 + draw(tokens, seed=3).abs(),
        "bias": draw(vocabulary, seed=4, dtype=dtype) if bias else None,
    }


def batch(given: dict[str, Any]) -> dict[str, Any]:
    """The rest of the loss: ratios on both sides of the clip and never near it, every fourth row masked."""
    tokens = len(given["hidden"])
    with torch.no_grad():
        logprob, _ = linear_logprob(**given)
    steps = torch.tensor([0.0, 0.1, -0.1, 0.5, -0.6, 1.6], device=DEVICE)
    away = steps[torch.arange(tokens, device=DEVICE) % len(steps)]
    return given | {
        "old_logprob": logprob - away,
        "advantage": draw(tokens, seed=5),
        "loss_mask": torch.arange(tokens, device=DEVICE) % 4 != 2,
        "ref_logprob": logprob + 0.5 * draw(tokens, seed=6),
        "rollout_logprob": logprob - away + 0.2 * draw(tokens, seed=7),
        "dual_clip": 3.0,
        "kl_coef": 0.1,
        "entropy_coef": 0.02,
        "aggregation": "sum",  # fp16 reaches down to 6e-8: such gradients, as under a loss scale
    }


def wide(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }


def leaves(given: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    found = {
        name: given[name].detach().clone().requires_grad_()
        for name in ("hidden", "weight", "bias")
        if given[name] is not None
    }
    return given | found, list(found.values())


def forward_and_backward(op: Callable[..., Any], given: dict[str, Any]) -> list[Tensor]:
    """What the op returns, and the gradients of hidden, weight and bias."""
    given, inputs = leaves(given)
    first, second = op(**given)
    results = [first, second["logprob"]] if isinstance(second, dict) else [first, second]
    wanted = [x for x in results if x.requires_grad]
    incoming = [draw(*x.shape, seed=8 + n, dtype=x.dtype) for n, x in enumerate(wanted)]
    return [x.detach() for x in results] + list(torch.autograd.grad(wanted, inputs, incoming))


OPS = {"logprob": linear_logprob, "loss": fused_linear_ppo_loss}
REFERENCES = {"logprob": reference.linear_logprob, "loss": reference.fused_linear_ppo_loss}


def case(op: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    given = layer(*args, **kwargs)
    return given if op == "logprob" else batch(given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens, vocabulary", SIZES)
@pytest.mark.parametrize("op", OPS)
def test_against_fp64(op: str, tokens: int, vocabulary: int, bias: bool, dtype: torch.dtype) -> None:
    given = case(op, tokens, vocabulary, dtype, bias=bias)
    ours = forward_and_backward(OPS[op], given)
    plain = forward_and_backward(REFERENCES[op], given)
    exact = forward_and_backward(REFERENCES[op], wide(given, torch.float64))
    names = ("result", "second result", "d_hidden", "d_weight", "d_bias")[: len(exact)]
    for name, got, eager, best in zip(names, ours, plain, exact, strict=True):
        total = got.dim() == 0  # a sum over the tokens, whose terms cancel
        assert_accurate(got, eager, best, factor=3, atol=2e-6 * tokens if total else None, name=name)


@pytest.mark.slow
@pytest.mark.memory
def test_more_than_2_to_the_31_logits_in_a_chunk() -> None:
    """Rows on both sides of the bound, in the forward and in the gradients that replace the logits."""
    tokens, vocabulary, needed = 14_200, 151_936, 14 * GIB
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed // GIB} GiB of free GPU memory")
    assert tokens * vocabulary > 2**31
    given = layer(tokens, vocabulary, torch.bfloat16, width=16) | {"workspace_bytes": 9 * GIB}
    hidden = given["hidden"].requires_grad_()
    logprob, entropy = linear_logprob(**given)
    (d_hidden,) = torch.autograd.grad([logprob, entropy], hidden, [torch.ones_like(logprob)] * 2)
    edge = 2**31 // vocabulary
    rows = torch.tensor([0, 1, edge - 1, edge, edge + 1, tokens - 1], device=DEVICE)
    few = {name: given[name][rows] for name in ("hidden", "target", "temperature")}
    few |= {name: given[name] for name in ("weight", "bias")}
    got = logprob[rows], entropy[rows], d_hidden[rows]
    wanted = []
    for dtype in (torch.bfloat16, torch.float64):
        part = wide(few, dtype) | {
            "temperature": few["temperature"].to(torch.promote_types(dtype, torch.float32))
        }
        part["hidden"] = part["hidden"].detach().requires_grad_()
        results = reference.linear_logprob(**part)
        (gradient,) = torch.autograd.grad(results, part["hidden"], [torch.ones_like(x) for x in results])
        wanted.append((*results, gradient))
    for name, ours, eager, best in zip(("logprob", "entropy", "d_hidden"), got, *wanted, strict=True):
        assert_accurate(ours.detach(), eager, best, factor=3, name=name)


@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocabulary", [5, 8_191, 8_193, 50_257])
def test_the_alignment_of_a_row_does_not_show(vocabulary: int, gradient: torch.dtype) -> None:
    """Rows that no vector load can read give the same bits; what lies between the rows is left alone."""
    tokens = 7
    logits, bias = 3 * draw(tokens, vocabulary, seed=0), draw(vocabulary, seed=1)
    target = torch.arange(tokens, device=DEVICE) % vocabulary
    temperatures, a, b = (0.5 + draw(tokens, seed=seed).abs() for seed in (2, 3, 4))
    made = []
    for columns in (-(-vocabulary // 4) * 4, (vocabulary + 2) // 4 * 4 + 1):
        space = torch.full((tokens, columns), 77.0, device=DEVICE)
        rows = space[:, :vocabulary]
        rows.copy_(logits)
        stats = _library.on_current_stream(
            _library.ops._rows_logprob, rows.device, rows, bias, target, temperatures
        )
        assert torch.equal(rows, logits)
        given = rows, bias, target, temperatures, stats[2], stats[3], stats[1], a, b, gradient, 0.0
        _library.on_current_stream(_library.ops._rows_backward_, rows.device, *given)
        made.append([*stats, rows.view(gradient)[:, :vocabulary]])
        assert (space[:, vocabulary:] == 77).all()
    for aligned, not_aligned in zip(*made, strict=True):
        assert torch.equal(aligned, not_aligned)


@pytest.mark.parametrize("ruled_out", [-math.inf, torch.finfo(torch.float32).min, -1e30])
def test_a_bias_rules_tokens_out(ruled_out: float) -> None:
    """Also whole loads of a thread, as in a vocabulary that is padded to a round number."""
    given = layer(40, 9_000, torch.float32)
    given["target"] = given["target"] % 4_500
    given["bias"][4_500:] = ruled_out
    got = forward_and_backward(linear_logprob, given)
    shorter = given | {name: given[name][:4_500] for name in ("weight", "bias")}
    logprob, entropy, d_hidden, d_weight, d_bias = forward_and_backward(linear_logprob, shorter)
    padded = torch.cat([d_weight, torch.zeros_like(d_weight)]), torch.cat([d_bias, torch.zeros_like(d_bias)])
    for ours, wanted in zip(got, (logprob, entropy, d_hidden, *padded), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def poison(target: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    bad = target.clone()
    bad[[1, 5, 6]] = torch.tensor([-1, vocabulary, 2**40], device=DEVICE)
    return bad, bad != target


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_target_out_of_range_makes_its_row_nan(dtype: torch.dtype) -> None:
    """And no other: the host cannot know without a wait."""
    given = layer(12, 1_000, dtype)
    good = forward_and_backward(linear_logprob, given)
    target, hit = poison(given["target"], 1_000)
    logprob, entropy, d_hidden, *_ = forward_and_backward(linear_logprob, given | {"target": target})
    assert logprob[hit].isnan().all() and d_hidden[hit].isnan().all()
    assert torch.equal(logprob[~hit], good[0][~hit]) and torch.equal(entropy, good[1])
    assert torch.equal(d_hidden[~hit], good[2][~hit])


def test_a_target_out_of_range_makes_the_loss_nan() -> None:
    given = batch(layer(12, 1_000, torch.bfloat16))
    good = forward_and_backward(fused_linear_ppo_loss, given)
    target, hit = poison(given["target"], 1_000)
    loss, logprob, d_hidden, *_ = forward_and_backward(fused_linear_ppo_loss, given | {"target": target})
    hit &= given["loss_mask"]
    assert hit.any() and loss.isnan() and logprob[hit].isnan().all() and d_hidden[hit].isnan().all()
    assert torch.equal(logprob[~hit], good[1][~hit]) and torch.equal(d_hidden[~hit], good[2][~hit])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_a_repeat_gives_the_same_bits(op: str, dtype: torch.dtype) -> None:
    given = case(op, 300, 50_257, dtype) | {"workspace_bytes": 32 * 2**20}  # two chunks
    first, second = (forward_and_backward(OPS[op], given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------ waits and streams


def waits(call: Callable[[], Any]) -> int:
    """How often a call makes the host wait."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def test_linear_logprob_does_not_wait() -> None:
    """Neither forward nor backward, on a stream of its own, after work that is still to be done there."""
    given = layer(300, 50_257, torch.bfloat16)
    wanted = forward_and_backward(linear_logprob, given)  # loads the kernels
    late, inputs = leaves(given | {"hidden": torch.zeros_like(given["hidden"])})
    incoming = [draw(300, seed=seed) for seed in (8, 9)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), no_wait():
        torch.cuda._sleep(10**8)
        late["hidden"].data.copy_(given["hidden"])
        results = linear_logprob(**late)
        got = [*results, *torch.autograd.grad(results, inputs, incoming)]
    torch.cuda.current_stream().wait_stream(stream)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.detach(), theirs)


def test_the_loss_waits_once_for_the_number_of_its_rows() -> None:
    given, inputs = leaves(batch(layer(300, 50_257, torch.bfloat16)))
    once = waits(lambda: given["loss_mask"].nonzero())
    assert once > 0
    made: list[Tensor] = []
    assert waits(lambda: made.append(fused_linear_ppo_loss(**given)[0])) == once
    with no_wait():
        torch.autograd.grad(made[0], inputs, torch.ones_like(made[0]))


@pytest.mark.memory
@pytest.mark.parametrize("op", OPS)
def test_peak_memory(op: str) -> None:
    """The gradients, that of the weight in fp32, and 512 MiB of logits; whatever the number of tokens."""
    given, inputs = leaves(case(op, 6_000, 50_257, torch.bfloat16, width=1_024, bias=False))
    incoming = torch.ones(6_000, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        first = OPS[op](**given)[0]
        return torch.autograd.grad(first, inputs, incoming if first.dim() else None)

    step()  # the libraries' own memory
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    used = torch.cuda.max_memory_allocated() - before
    d_hidden, d_weight = 2 * given["hidden"].numel(), 4 * given["weight"].numel()
    assert used <= d_hidden + d_weight + 512 * 2**20 + 32 * 2**20


@pytest.mark.parametrize("op", OPS)
def test_a_second_device(op: str) -> None:
    """Tensors of a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    given = case(op, 50, 9_000, torch.bfloat16)
    there = {name: x.to("cuda:1") if isinstance(x, Tensor) else x for name, x in given.items()}
    for ours, theirs in zip(OPS[op](**there), OPS[op](**given), strict=True):
        pairs = [(ours[k], theirs[k]) for k in theirs] if isinstance(theirs, dict) else [(ours, theirs)]
        for x, y in pairs:
            assert x.device == torch.device("cuda:1")
            torch.testing.assert_close(x.cpu(), y.cpu())
    assert torch.cuda.current_device() == 0


def test_a_cuda_graph_captures_linear_logprob() -> None:
    given = layer(300, 50_257, torch.bfloat16) | {"workspace_bytes": 32 * 2**20}  # two chunks
    fresh = given | {
        "hidden": draw(300, 64, seed=21, dtype=torch.bfloat16),
        "target": given["target"].flip(0),
    }
    with torch.no_grad():
        wanted = linear_logprob(**fresh)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = linear_logprob(**given)
    for name in ("hidden", "target"):
        given[name].copy_(fresh[name])
    graph.replay()
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------------------------------------- gae


def rows_of_tokens(batch: int, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """reward, value and mask; NaN outside of the mask, the first row without a token."""
    reward, value = (draw(batch, length, seed=seed, dtype=dtype) for seed in (0, 1))
    share = torch.linspace(-0.1, 1.1, batch)[:, None]
    mask = (torch.rand(batch, length, generator=torch.Generator().manual_seed(2)) < share).to(DEVICE)
    return [reward.masked_fill(~mask, math.nan), value.masked_fill(~mask, math.nan), mask]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 4, 1_023, 1_024, 1_025, 5_000])
def test_gae_against_fp64(length: int, dtype: torch.dtype) -> None:
    reward, value, mask = rows_of_tokens(33, length, dtype)
    given = reward.cpu(), value.cpu(), mask.cpu(), 0.99, 0.95
    plain, exact = reference.gae(*given), reference.gae(given[0].double(), given[1].double(), *given[2:])
    got = gae(reward, value, mask, 0.99, 0.95)
    for name, ours, eager, best in zip(("advantage", "returns"), got, plain, exact, strict=True):
        assert_accurate(ours.cpu(), eager, best, name=name)
        assert (ours[~mask] == 0).all()


def test_gae_does_not_wait_and_a_cuda_graph_captures_it() -> None:
    given, fresh = rows_of_tokens(8, 3_000), rows_of_tokens(8, 3_000)
    fresh = [x.flip(0).contiguous() for x in fresh]
    with no_wait():
        wanted = gae(*fresh, 0.99, 0.95)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = gae(*given, 0.99, 0.95)
    for ours, theirs in zip(given, fresh, strict=True):
        ours.copy_(theirs)
    graph.replay()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))
