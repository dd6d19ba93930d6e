"""linear_logprob and fused_linear_ppo_loss at their borders: bad inputs, autograd, torch.compile, memory."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_cache_cases import BACKENDS
from loss_cases import LEAVES, OPTIONS, SEQUENCE, batch, cast, draw, logprob_of, results, same
from torch import Tensor

from mem1_core.ops import fused_linear_ppo_loss, linear_logprob

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
fused_backends = pytest.mark.parametrize(
    ("backend", "device"), [pair for pair in BACKENDS if pair.values[0] != "reference"]
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def example(dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any) -> dict[str, Any]:
    return cast(batch(bias=True) | OPTIONS["everything"] | options, dtype, device)


def leaves_of(given: dict[str, Any]) -> list[Tensor]:
    return [given[name].requires_grad_() for name in LEAVES]


def close(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        tolerance = 2e-2 if x.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------- bad inputs

REFUSED = (TypeError, ValueError)
META = torch.device("meta")

# What is wrong: (the argument that the message must name first, the arguments that differ from good ones)
BAD_LAYER: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "hidden a list": ("hidden", lambda: {"hidden": [[1.0] * 4] * 12}),
    "hidden of rank 3": ("hidden", lambda: {"hidden": torch.zeros(1, 12, 4)}),
    "hidden of integers": ("hidden", lambda: {"hidden": torch.zeros(12, 4, dtype=torch.int32)}),
    "hidden complex": ("hidden", lambda: {"hidden": torch.zeros(12, 4, dtype=torch.complex64)}),
    "hidden of 8 bits": (
        "hidden",
        lambda: {n: x.to(torch.float8_e4m3fn) for n, x in example().items() if n in LEAVES},
    ),
    "weight missing": ("weight", lambda: {"weight": None}),
    "weight of rank 1": ("weight", lambda: {"weight": torch.zeros(4)}),
    "weight of another width": ("weight", lambda: {"weight": torch.zeros(6, 5)}),
    "weight of another dtype": ("weight", lambda: {"weight": torch.zeros(6, 4, dtype=torch.bfloat16)}),
    "weight on another device": ("weight", lambda: {"weight": torch.zeros(6, 4, device=META)}),
    "no vocabulary": ("weight", lambda: {"weight": torch.zeros(0, 4), "bias": None}),
    "no width": ("weight", lambda: {"weight": torch.zeros(6, 0), "hidden": torch.zeros(12, 0)}),
    "bias of another length": ("bias", lambda: {"bias": torch.zeros(5)}),
    "bias of rank 2": ("bias", lambda: {"bias": torch.zeros(6, 1)}),
    "bias of another dtype": ("bias", lambda: {"bias": torch.zeros(6, dtype=torch.float64)}),
    "bias a number": ("bias", lambda: {"bias": 0.0}),
    "target a list": ("target", lambda: {"target": [0] * 12}),
    "target of floats": ("target", lambda: {"target": torch.zeros(12)}),
    "target of bools": ("target", lambda: {"target": torch.zeros(12, dtype=torch.bool)}),
    "target too short": ("target", lambda: {"target": torch.zeros(11, dtype=torch.int64)}),
    "target of rank 2": ("target", lambda: {"target": torch.zeros(12, 1, dtype=torch.int64)}),
    "target elsewhere": ("target", lambda: {"target": torch.zeros(12, dtype=torch.int64, device=META)}),
    "target too large": ("target", lambda: {"target": torch.full((12,), 6)}),
    "target negative": ("target", lambda: {"target": torch.full((12,), -100)}),
    "one target too large": ("target", lambda: {"target": torch.arange(12) // 11 * 6}),
    "temperature 0": ("temperature", lambda: {"temperature": 0.0}),
    "temperature negative": ("temperature", lambda: {"temperature": -1}),
    "temperature NaN": ("temperature", lambda: {"temperature": math.nan}),
    "temperature infinite": ("temperature", lambda: {"temperature": math.inf}),
    "temperature a string": ("temperature", lambda: {"temperature": "1"}),
    "temperature None": ("temperature", lambda: {"temperature": None}),
    "temperature too short": ("temperature", lambda: {"temperature": torch.ones(11)}),
    "temperature of rank 2": ("temperature", lambda: {"temperature": torch.ones(12, 1)}),
    "temperature of integers": ("temperature", lambda: {"temperature": torch.ones(12).int()}),
    "workspace of 0": ("workspace_bytes", lambda: {"workspace_bytes": 0}),
    "workspace of a fraction": ("workspace_bytes", lambda: {"workspace_bytes": 1e6}),
    "backend unknown": ("backend", lambda: {"backend": "fast"}),
}


def wrong_rows(name: str) -> dict[str, tuple[str, Callable[[], dict[str, Any]]]]:
    """What is wrong with an argument that has a floating point number for each token."""
    return {
        f"{name} too short": (name, lambda: {name: torch.zeros(11)}),
        f"{name} of rank 2": (name, lambda: {name: torch.zeros(12, 1)}),
        f"{name} of integers": (name, lambda: {name: torch.zeros(12, dtype=torch.int64)}),
        f"{name} a number": (name, lambda: {name: 0.0}),
        f"{name} elsewhere": (name, lambda: {name: torch.zeros(12, device=META)}),
    }


def wrong_number(name: str, *values: Any) -> dict[str, tuple[str, Callable[[], dict[str, Any]]]]:
    return {f"{name} = {value!r}": (name, lambda value=value: {name: value}) for value in values}


BAD_LOSS = {
    **{k: v for n in ("old_logprob", "advantage") for k, v in wrong_rows(n).items()},
    **{k: v for n in ("ref_logprob", "rollout_logprob") for k, v in wrong_rows(n).items()},
    **wrong_number("old_logprob", None),
    **wrong_number("advantage", None),
    **wrong_number("loss_mask", None, torch.ones(12), torch.ones(12).long(), torch.ones(11).bool()),
    **wrong_number("sequence_ids", None, SEQUENCE.float(), SEQUENCE[:11], SEQUENCE > 0, [0] * 12),
    **wrong_number("clip_low", -0.1, 1.1, math.nan, "0.2", None),
    **wrong_number("clip_high", -0.1, math.nan, "0.2", None),
    **wrong_number("dual_clip", 1.0, 0.0, -3.0, math.nan, "3"),
    **wrong_number("rollout_is_cap", 0.0, -1.0, math.nan, "2", None),
    **wrong_number("kl_coef", math.nan, math.inf, "0.1", None),
    **wrong_number("entropy_coef", math.nan, -math.inf, "0.1", None),
    **wrong_number("kl_estimator", "k4", None, 3),
    **wrong_number("aggregation", "mean", None),
    **wrong_number("normalizer", 0, -1.0, math.nan, "1", torch.ones(1), torch.ones((), device=META)),
    "ref_logprob missing": ("ref_logprob", lambda: {"ref_logprob": None}),
}


def refused(function: Any, given: dict[str, Any], changes: dict[str, Any], name: str) -> None:
    function(**given)
    before = {n: x.clone() for n, x in given.items() if isinstance(x, Tensor)}
    with pytest.raises(REFUSED, match=rf"^{name}\b"):
        function(**given | changes)
    assert same({n: given[n] for n in before}, before)


@pytest.mark.parametrize("wrong", BAD_LAYER)
@pytest.mark.parametrize("function", [linear_logprob, fused_linear_ppo_loss])
def test_bad_output_layer(function: Any, wrong: str) -> None:
    given = logprob_of(example()) if function is linear_logprob else example()
    name, changes = BAD_LAYER[wrong]
    refused(function, given, changes(), name)


@pytest.mark.parametrize("wrong", BAD_LOSS)
def test_bad_loss(wrong: str) -> None:
    name, changes = BAD_LOSS[wrong]
    refused(fused_linear_ppo_loss, example(), changes(), name)


@pytest.mark.parametrize("function", [linear_logprob, fused_linear_ppo_loss])
def test_backends_that_are_not_here(function: Any) -> None:
    given = logprob_of(example()) if function is linear_logprob else example()
    with pytest.raises(
        NotImplementedError,
        match=f"^{function.__name__}: the 'triton' backend is not available in this build",
    ):
        function(**given, backend="triton")
    elsewhere = {n: x.to(META) if isinstance(x, Tensor) else x for n, x in given.items()}
    with pytest.raises(NotImplementedError, match=f"^{function.__name__}: expected a cpu or cuda tensor"):
        function(**elsewhere)


# ----------------------------------------------------------------------------------------------- autograd


@every_backend
@both_dtypes
@pytest.mark.parametrize("factor", [1.0, 1.7, 0.0, -2.0])
def test_the_loss_is_scaled_before_backward(
    backend: str, device: str, dtype: torch.dtype, factor: float
) -> None:
    given = example(dtype, device)
    want = results(fused_linear_ppo_loss, given, backend=backend)
    leaves = leaves_of(given)
    loss, _ = fused_linear_ppo_loss(**given, backend=backend)
    (factor * loss).backward()
    close([x.grad for x in leaves], [factor * want[f"d_{name}"] for name in LEAVES])
    assert all(x.grad.dtype == dtype for x in leaves)


@every_backend
@both_dtypes
def test_backward_more_than_once(backend: str, device: str, dtype: torch.dtype) -> None:
    """The gradients that the forward has made outlive every backward that keeps the graph."""
    given = example(dtype, device)
    leaves = leaves_of(given)
    loss, _ = fused_linear_ppo_loss(**given, backend=backend)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [x.clone() for x in first]
    third = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    last = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, copies, last, strict=True))
    close(third, [3 * x for x in first])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@every_backend
@both_dtypes
def test_gradients_accumulate(backend: str, device: str, dtype: torch.dtype) -> None:
    given = example(dtype, device)
    want = results(fused_linear_ppo_loss, given, backend=backend)
    leaves = leaves_of(given)
    for _ in range(2):
        fused_linear_ppo_loss(**given, backend=backend)[0].backward()
    close([x.grad for x in leaves], [2 * want[f"d_{name}"] for name in LEAVES])
    both = sum(fused_linear_ppo_loss(**given, backend=backend)[0] for _ in range(2))
    close(torch.autograd.grad(both, leaves), [2 * want[f"d_{name}"] for name in LEAVES])


@every_backend
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "weight")], ids=str)
def test_frozen_parts(backend: str, device: str, wanted: tuple[str, ...]) -> None:
    given = example(device=device)
    want = results(fused_linear_ppo_loss, given, backend=backend)
    leaves = [given[name].requires_grad_() for name in wanted]
    loss, _ = fused_linear_ppo_loss(**given, backend=backend)
    assert torch.equal(loss, want["loss"])
    loss.backward()
    assert all(torch.equal(x.grad, want[f"d_{name}"]) for name, x in zip(wanted, leaves, strict=True))
    assert all(given[name].grad is None for name in LEAVES if name not in wanted)


@every_backend
@pytest.mark.parametrize("function", [linear_logprob, fused_linear_ppo_loss])
def test_what_is_trained_before_the_layer(backend: str, device: str, function: Any) -> None:
    """A LoRA in front of a frozen layer; an embedding tied to the layer's weight."""
    given = example(device=device)
    if function is linear_logprob:
        given = logprob_of(given)
    hidden, weight = given.pop("hidden"), given.pop("weight")
    tokens = torch.arange(12, device=device) % 6
    low, up = (draw(*shape, seed=5).float().to(device).requires_grad_() for shape in ((4, 2), (2, 4)))
    tied = weight.clone().requires_grad_()

    def gradients_by(which: str) -> tuple[Tensor, ...]:
        lora, _ = function(hidden + hidden @ low @ up, weight, **given, backend=which)
        same_weight, _ = function(hidden + tied[tokens], tied, **given, backend=which)
        return torch.autograd.grad(lora.sum() + same_weight.sum(), [low, up, tied])

    torch.testing.assert_close(gradients_by(backend), gradients_by("reference"), rtol=1e-4, atol=1e-5)


@every_backend
def test_what_gets_no_gradient(backend: str, device: str) -> None:
    given = example(device=device)
    constants = [x for n, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()]
    for x in constants:
        x.requires_grad_()
    fused_linear_ppo_loss(**given, backend=backend)[0].backward()
    logprob, entropy = linear_logprob(**logprob_of(given), backend=backend)
    (logprob + entropy).sum().backward()
    assert {n for n, x in given.items() if isinstance(x, Tensor) and x.grad is not None} == set(LEAVES)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            results_without = [
                fused_linear_ppo_loss(**given, backend=backend)[0],
                *linear_logprob(**logprob_of(given), backend=backend),
            ]
        assert not any(x.requires_grad for x in results_without)
    assert not fused_linear_ppo_loss(**example(device=device), backend=backend)[0].requires_grad


def test_second_derivative_is_refused() -> None:
    given = example()
    leaves = leaves_of(given)
    loss, _ = fused_linear_ppo_loss(**given)
    with pytest.raises(NotImplementedError, match="^fused_linear_ppo_loss: has no second derivative"):
        torch.autograd.grad(loss, leaves, create_graph=True)
    logprob, _ = linear_logprob(**logprob_of(given))
    (once, *_) = torch.autograd.grad(logprob.sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="^linear_logprob: has no second derivative"):
        torch.autograd.grad(once.square().sum(), leaves)


@fused_backends
@both_dtypes
@pytest.mark.parametrize("function", [linear_logprob, fused_linear_ppo_loss])
def test_autocast_does_not_reach_inside(backend: str, device: str, dtype: torch.dtype, function: Any) -> None:
    given = logprob_of(example(dtype, device)) if function is linear_logprob else example(dtype, device)
    want = results(function, given, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        got = results(function, given, backend=backend)
    assert same(got, want)


# ------------------------------------------------------------------------------------------- torch.compile


def flat(given: dict[str, Any], wanted: list[bool]) -> tuple[Any, ...]:
    """The arguments of the registered op, in its order."""
    tensors = (
        "hidden weight bias target old_logprob advantage loss_mask ref_logprob rollout_logprob sequence_ids"
    )
    settings = (0.2, 0.2, 3.0, 2.0, 0.1, "k3", 0.01, "sequence-mean", 2.0, 5 * 32, wanted)
    return *(given.get(n) for n in tensors.split()), given["temperature"], None, *settings


@both_dtypes
@pytest.mark.parametrize("wanted", [(1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_opcheck(dtype: torch.dtype, wanted: tuple[int, ...], bias: bool) -> None:
    ops = torch.ops.mem1_core
    given = cast(batch(bias=bias) | OPTIONS["everything"], dtype)
    want = [bool(w) and name in given for name, w in zip(LEAVES, wanted, strict=True)]
    for name, w in zip(LEAVES, want, strict=True):
        if w:
            given[name].requires_grad_()
    names = ("hidden", "weight", "bias", "target", "temperature")
    alone = (*(given.get(n) for n in names), 2.0, 5 * 32)
    torch.library.opcheck(ops.fused_linear_ppo_loss.default, flat(given, want))
    saved = [x.detach() if isinstance(x, Tensor) else x for x in alone[:-2]]
    for keep in (False, True):
        torch.library.opcheck(ops.linear_logprob.default, (*alone, keep, False))
        with torch.no_grad():
            _, entropy, max_logit, log_sum_exp, kept = ops.linear_logprob(*alone, keep, True)
        assert len(kept) == (5 if keep else 0)
        d_out = torch.ones_like(entropy), torch.ones_like(entropy)
        backward = (*d_out, *saved, max_logit, log_sum_exp, entropy, kept, 2.0, 5 * 32, want)
        torch.library.opcheck(ops.linear_logprob_backward.default, backward)


@pytest.mark.parametrize(
    ("compiler", "dynamic"),
    [("aot_eager", False), ("aot_eager", True), pytest.param("inductor", False, marks=pytest.mark.slow)],
)
def test_compile(compiler: str, dynamic: bool) -> None:
    torch.compiler.reset()

    settings = {n: x for n, x in OPTIONS["everything"].items() if not isinstance(x, Tensor)}

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, given: dict[str, Any]) -> Tensor:
        layer = hidden.sin(), weight, target
        loss, metrics = fused_linear_ppo_loss(*layer, bias=bias * 2, **given, **settings)
        logprob, entropy = linear_logprob(*layer, 0.7, bias=bias)
        return 1.7 * loss + logprob.mean() + entropy.mean() + metrics["entropy"] + metrics["kl"]

    compiled = torch.compile(step, backend=compiler, fullgraph=True, dynamic=dynamic)
    for tokens in (12, 7):
        given = {n: x for n, x in example().items() if isinstance(x, Tensor)}
        given |= {n: x[:tokens] for n, x in given.items() if n not in ("weight", "bias")}
        leaves = leaves_of(given)
        rest = {n: x for n, x in given.items() if n not in (*LEAVES, "target")}
        got, want = (f(*leaves, given["target"], rest) for f in (compiled, step))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


@pytest.mark.parametrize(
    "name", ["kl_coef", "entropy_coef", "clip_high", "rollout_is_cap", "normalizer", "softcap"]
)
def test_compile_with_a_number_that_changes(name: str) -> None:
    """As a controller of the KL coefficient does: torch.compile traces such a number as a symbol."""
    torch.compiler.reset()
    given = example()
    given.pop(name, None)

    def loss(number: float) -> Tensor:
        return fused_linear_ppo_loss(**given, **{name: number})[0]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for number in (0.1, 0.2, 0.4):
        torch.testing.assert_close(compiled(number), loss(number))


# -------------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
@pytest.mark.parametrize("function", ["linear_logprob", "fused_linear_ppo_loss"])
def test_memory_does_not_grow_with_tokens(function: str) -> None:
    """Logits of 1,024 tokens over 50,257 are 196 MiB; the workspace is 8, the rest a few."""
    code = f"""
import torch
from mem1_core import ops

def memory(key):
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(key)) / 1024

def step(tokens):
    hidden, weight = (torch.randn(n, 16, requires_grad=True) for n in (tokens, 50257))
    zeros = torch.zeros(tokens)
    rest = (zeros, zeros, zeros == 0) if "{function}" == "fused_linear_ppo_loss" else ()
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    ops.{function}(hidden, weight, zeros.long(), *rest, workspace_bytes=2**23)[0].sum().backward()
    return memory("VmHWM") - before

step(1)  # what the libraries allocate once
print(step(1024))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 48, f"{done.stdout} MiB"
