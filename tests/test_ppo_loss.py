"""fused_linear_ppo_loss: one body of tests for every backend and device of the machine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kv_cache_cases import BACKENDS
from loss_cases import FORMS, LEAVES, OPTIONS, SEQUENCE, batch, cast, check, draw, results, same
from torch import Tensor

from mem1_core import reference
from mem1_core.ops import fused_linear_ppo_loss, linear_logprob
from mem1_core.testing import poisoned_memory

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
CHUNKS = {"one row": 1, "5 rows": 5 * 4000, "16 rows": 16 * 4000, "32 rows": 47 * 4000}  # of 1,000 floats
METRICS = {"entropy", "clip_fraction", "ratio_max", "logprob"}


def rich(tokens: int, *sizes: int, bias: bool = True) -> dict[str, Any]:
    """A batch with every term in its loss, for sequences of 5 tokens."""
    given = batch(tokens, *sizes, bias=bias)
    return given | {
        "ref_logprob": given["old_logprob"] + 0.5 * draw(tokens, seed=6),
        "rollout_logprob": given["old_logprob"] + 0.5 * draw(tokens, seed=7),
        "sequence_ids": torch.arange(tokens) // 5,
        "temperature": draw(tokens, seed=8).abs() + 0.5,
        "aggregation": "sequence-mean",
        "dual_clip": 3.0,
        "kl_coef": 0.1,
        "entropy_coef": 0.05,
    }


# ---------------------------------------------------------------------------------------------- accuracy


@every_backend
@both_dtypes
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("workspace_bytes", [5 * 32, None], ids=["5 rows", "at once"])
def test_options(
    backend: str, device: str, dtype: torch.dtype, case: str, workspace_bytes: int | None
) -> None:
    given = cast(batch() | OPTIONS[case], dtype, device)
    got = check(fused_linear_ppo_loss, given, backend=backend, workspace_bytes=workspace_bytes)
    assert METRICS < got.keys() and ("kl" in got) == ("ref_logprob" in given)


@every_backend
@both_dtypes
@pytest.mark.parametrize("tokens", [0, 1, 7, 512])
@pytest.mark.parametrize("vocabulary", [1, 2, 1000])
@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_sizes(
    backend: str, device: str, dtype: torch.dtype, tokens: int, vocabulary: int, kind: str
) -> None:
    given = {"plain": batch, "rich": rich}[kind](tokens, 48, vocabulary)
    check(fused_linear_ppo_loss, cast(given, dtype, device), backend=backend)


@every_backend
@both_dtypes
@pytest.mark.parametrize(("tokens", "vocabulary"), [(0, 50257), (1, 50257), (37, 50257), (7, 151936)])
def test_large_vocabularies(
    backend: str, device: str, dtype: torch.dtype, tokens: int, vocabulary: int
) -> None:
    """One that is odd, and one whose widened weight comes in several blocks on the CPU."""
    check(fused_linear_ppo_loss, cast(rich(tokens, 32, vocabulary), dtype, device), backend=backend)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["fp16", "fp64"])
def test_other_dtypes(backend: str, device: str, dtype: torch.dtype) -> None:
    got = check(fused_linear_ppo_loss, cast(rich(37, 48, 1000), dtype, device), backend=backend)
    wide = torch.promote_types(dtype, torch.float32)
    assert all(x.dtype == (dtype if name.startswith("d_") else wide) for name, x in got.items())


@every_backend
@both_dtypes
@pytest.mark.parametrize("rows", CHUNKS)
def test_chunks(backend: str, device: str, dtype: torch.dtype, rows: str) -> None:
    """Many chunks, the last of them shorter; 1,001 columns are not aligned in memory."""
    for vocabulary in (1000, 1001):
        given = cast(rich(53, 48, vocabulary), dtype, device)
        check(fused_linear_ppo_loss, given, backend=backend, workspace_bytes=CHUNKS[rows])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_another_dtype(backend: str, device: str, dtype: torch.dtype) -> None:
    """What is given for each token need not have the dtype of the logits."""
    given = cast(rich(37, 48, 100), torch.float32, device)
    names = ("old_logprob", "advantage", "ref_logprob", "rollout_logprob", "temperature")
    rounded = {name: given[name].to(dtype) for name in names}
    integers = {name: given[name].int() for name in ("target", "sequence_ids")}
    got = results(fused_linear_ppo_loss, given | rounded | integers, backend=backend)
    wide = {name: x.float() for name, x in rounded.items()}
    torch.testing.assert_close(got, results(fused_linear_ppo_loss, given | wide, backend=backend))


@every_backend
@both_dtypes
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "advantage", "loss_mask", "temperature"])
@pytest.mark.parametrize("form", FORMS)
def test_strides_do_not_matter(backend: str, device: str, dtype: torch.dtype, name: str, form: str) -> None:
    given = cast(rich(37, 48, 100), dtype, device)
    x = given[name]
    given[name] = FORMS[form](x) if x.dim() == 2 else FORMS[form](x[:, None].expand(-1, 2))[:, 1]
    got = check(fused_linear_ppo_loss, given, backend=backend)
    packed = {n: x.contiguous() if isinstance(x, Tensor) else x for n, x in given.items()}
    for n, x in results(fused_linear_ppo_loss, packed, backend=backend).items():
        torch.testing.assert_close(got[n], x, rtol=2e-2 if x.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@every_backend
def test_wild_log_ratios_stay_finite(backend: str, device: str) -> None:
    given = cast(rich(12, 4, 6) | {"normalizer": 2.0}, torch.float32, device)
    for name, far in (("old_logprob", -1e4), ("ref_logprob", 1e4), ("rollout_logprob", -1e4)):
        given[name] = given[name] + far
    given["advantage"] = -given["advantage"].abs()  # the side PPO does not clip
    got = check(fused_linear_ppo_loss, given, backend=backend)
    assert float(got["ratio_max"]) == pytest.approx(math.exp(20)) and all(
        x.isfinite().all() for x in got.values()
    )


# --------------------------------------------------------------------------------------------- gradients


@every_backend
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("workspace_bytes", [1, 5 * 48, None], ids=["one row", "5 rows", "at once"])
def test_gradcheck(backend: str, device: str, case: str, workspace_bytes: int | None) -> None:
    given = cast(batch(bias=True) | OPTIONS[case], torch.float64, device)
    leaves = tuple(given.pop(name).requires_grad_() for name in LEAVES)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options: dict[str, Any] = {"workspace_bytes": workspace_bytes, "backend": backend}
        return fused_linear_ppo_loss(hidden, weight, bias=bias, **given, **options)[0]

    assert torch.autograd.gradcheck(loss, leaves)


@every_backend
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "sum"])
@pytest.mark.parametrize("cuts", [[5], [3, 5], [0, 5, 5, 8], [*range(1, 12)]], ids=str)
def test_micro_batches_with_the_batch_normaliser_add_up(
    backend: str, device: str, aggregation: reference.Aggregation, cuts: list[int]
) -> None:
    """Any split gives the batch's loss and gradients; sequences must stay whole only for their mean."""
    if aggregation == "sequence-mean":
        cuts = [c for c in cuts if c in (0, 5, 8)]
    given = cast(batch(bias=True) | OPTIONS["k3"], torch.float64, device)
    sequence_ids = SEQUENCE.to(device)
    leaves = [given.pop(name).requires_grad_() for name in LEAVES]
    names = [name for name, x in given.items() if isinstance(x, Tensor)]
    count = {"token-mean": int(given["loss_mask"].sum()), "sequence-mean": 3, "sum": 1}[aggregation]

    def part(rows: slice, normalizer: float | Tensor | None) -> Tensor:
        own: dict[str, Any] = given | {name: given[name][rows] for name in names}
        own |= {"sequence_ids": sequence_ids[rows], "aggregation": aggregation, "normalizer": normalizer}
        return fused_linear_ppo_loss(leaves[0][rows], leaves[1], bias=leaves[2], backend=backend, **own)[0]

    whole = part(slice(None), None)
    bounds = [0, *cuts, 12]
    for normalizer in (count, torch.tensor(count, device=device)):
        parts = [part(slice(a, b), normalizer) for a, b in zip(bounds, bounds[1:], strict=False)]
        torch.testing.assert_close(sum(parts), whole)
        one = torch.autograd.grad(whole, leaves, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(sum(parts), leaves), one)


# ------------------------------------------------------------------------------- masked rows, infinities, NaN


@every_backend
@both_dtypes
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_masked_rows_are_never_read(backend: str, device: str, dtype: torch.dtype, poison: float) -> None:
    given = cast(rich(37, 48, 100), dtype, device)
    want = results(fused_linear_ppo_loss, given, backend=backend, workspace_bytes=5 * 400)
    out = ~given["loss_mask"]
    for name in ("hidden", "old_logprob", "advantage", "ref_logprob", "rollout_logprob", "temperature"):
        given[name] = given[name].clone()
        given[name][out] = poison
    given["target"] = given["target"].masked_fill(out, -100)
    given["sequence_ids"] = given["sequence_ids"].masked_fill(out, 2**40)
    got = results(fused_linear_ppo_loss, given, backend=backend, workspace_bytes=5 * 400)
    assert same(got, want)
    assert not got["d_hidden"][out].any() and not got["logprob"][out].any()


@every_backend
@both_dtypes
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "sum"])
def test_nothing_to_learn_from_is_a_loss_of_zero(
    backend: str, device: str, dtype: torch.dtype, aggregation: str
) -> None:
    given = cast(rich(37, 48, 100) | {"aggregation": aggregation}, dtype, device)
    given["loss_mask"] = torch.zeros_like(given["loss_mask"])
    with poisoned_memory():
        got = results(fused_linear_ppo_loss, given, backend=backend)
    assert METRICS | {"kl"} < got.keys() and not any(x.any() for x in got.values())


@every_backend
@both_dtypes
@pytest.mark.parametrize("which", ["every token", "some tokens", "all but one token"])
def test_banned_tokens(backend: str, device: str, dtype: torch.dtype, which: str) -> None:
    """A bias of -inf. A target that is ruled out has a ratio of exp(-20) and no gradient from it."""
    given = cast(rich(37, 48, 100), dtype, device)
    banned = torch.ones(100, dtype=torch.bool, device=device)
    if which == "some tokens":
        banned[given["target"][::2].unique()] = False
    elif which == "all but one token":
        banned[given["target"][0]] = False
    given["bias"] = given["bias"].masked_fill(banned, -math.inf)
    got = results(fused_linear_ppo_loss, given, backend=backend)
    want = results(reference.fused_linear_ppo_loss, cast(given, torch.float64, device))
    for name, x in got.items():
        tolerance = 0.02 if x.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(x.double(), want[name], rtol=tolerance, atol=tolerance)
    dead = banned[given["target"]] & given["loss_mask"]
    assert torch.equal(got["logprob"] == -math.inf, dead) and got["loss"].isfinite()
    if which == "every token":
        assert not any(x.any() for name, x in got.items() if name.startswith("d_"))


ROW_INPUTS = ["hidden", "old_logprob", "advantage", "temperature", "ref_logprob", "rollout_logprob"]


@every_backend
@both_dtypes
@pytest.mark.parametrize("name", ROW_INPUTS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_nan_shows_and_stays_in_its_row(
    backend: str, device: str, dtype: torch.dtype, name: str, estimator: str
) -> None:
    """In the loss and in the gradient: rows 3 and 4, whose ratios are in the clip range and cut off."""
    options: dict[str, Any] = {"kl_coef": 0.1, "kl_estimator": estimator, "dual_clip": 3.0}
    own = {
        "temperature": torch.ones(37),
        "ref_logprob": draw(37, seed=8),
        "rollout_logprob": draw(37, seed=9),
    }
    given = cast(batch(37, 48, 100) | own, dtype, device)
    given["old_logprob"][3:5] = results(fused_linear_ppo_loss, given)["logprob"][3:5]
    given["old_logprob"][4] -= 30
    given["loss_mask"][3:5] = True
    want = results(fused_linear_ppo_loss, given, backend=backend, **options)
    assert want["loss"].isfinite()
    for row in (3, 4):
        bad = given | {name: given[name].clone()}
        bad[name][row] = math.nan
        got = results(fused_linear_ppo_loss, bad, backend=backend, **options)
        others = torch.arange(37, device=device) != row
        assert got["loss"].isnan() and got["d_hidden"][row].isnan().all()
        for output in ("d_hidden", "logprob"):
            assert torch.equal(got[output][others], want[output][others])
        bad["loss_mask"] = bad["loss_mask"] & others
        masked = results(fused_linear_ppo_loss, bad, backend=backend, **options)
        assert masked["loss"].isfinite() and masked["d_hidden"].isfinite().all()


# ------------------------------------------------------------------------------------------------ repeats


@every_backend
@both_dtypes
@pytest.mark.parametrize("workspace_bytes", [1, 16 * 4096, None])
def test_uninitialised_memory_is_never_read(
    backend: str, device: str, dtype: torch.dtype, workspace_bytes: int | None
) -> None:
    given = cast(rich(53, 48, 1001), dtype, device)
    before = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
    options: dict[str, Any] = {"backend": backend, "workspace_bytes": workspace_bytes}
    want = results(fused_linear_ppo_loss, given, **options)
    with poisoned_memory():
        got = results(fused_linear_ppo_loss, given, **options)
    assert same(got, want) and same({name: given[name] for name in before}, before)
    assert same(results(fused_linear_ppo_loss, given, **options), want), "is not repeatable"


@every_backend
@both_dtypes
def test_a_row_does_not_depend_on_the_others(backend: str, device: str, dtype: torch.dtype) -> None:
    """Bit for bit: on what the other rows hold, and on whole chunks after its own."""
    given = cast(batch(64, 48, 1000), dtype, device) | {"aggregation": "sum"}
    options: dict[str, Any] = {"backend": backend, "workspace_bytes": 16 * 4000}
    want = results(fused_linear_ppo_loss, given, **options)
    changed = given | {name: given[name].clone() for name in ("hidden", "advantage")}
    for name in ("hidden", "advantage"):
        changed[name][1::2] *= 3
    got = results(fused_linear_ppo_loss, changed, **options)
    begin = {n: x[:43] if isinstance(x, Tensor) and n != "weight" else x for n, x in given.items()}
    assert begin["loss_mask"].sum() == 2 * 16
    fewer = results(fused_linear_ppo_loss, begin, **options)
    for name in ("d_hidden", "logprob"):
        assert torch.equal(got[name][::2], want[name][::2])
        assert not torch.equal(got[name][1::2], want[name][1::2])
        if backend != "reference":  # which has no chunks
            assert torch.equal(fewer[name], want[name][:43])


@every_backend
@both_dtypes
def test_logprob_is_that_of_linear_logprob(backend: str, device: str, dtype: torch.dtype) -> None:
    """Of the rows in the loss, bit for bit: a first update's ratios are exactly 1."""
    given = cast(batch(37, 48, 1000), dtype, device)
    rows = given["loss_mask"].nonzero()[:, 0]
    logprob, _ = linear_logprob(
        given["hidden"][rows], given["weight"], given["target"][rows], backend=backend
    )
    given["old_logprob"] = torch.zeros(37, device=device).index_copy(0, rows, logprob)
    _, metrics = fused_linear_ppo_loss(**given, backend=backend)
    assert torch.equal(metrics["logprob"], given["old_logprob"])
    assert metrics["ratio_max"] == 1 and metrics["clip_fraction"] == 0


@every_backend
def test_metrics_are_detached(backend: str, device: str) -> None:
    given = cast(batch() | OPTIONS["everything"], torch.float32, device)
    given |= {name: given[name].requires_grad_() for name in ("hidden", "weight")}
    loss, metrics = fused_linear_ppo_loss(**given, backend=backend)
    assert loss.requires_grad and loss.shape == ()
    assert not any(x.requires_grad for x in metrics.values())
    assert {name: list(x.shape) for name, x in metrics.items()} == {
        "entropy": [], "clip_fraction": [], "ratio_max": [], "kl": [], "logprob": [12]
    }  # fmt: skip
