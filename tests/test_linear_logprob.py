"""linear_logprob: one body of tests for every backend and device of the machine."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from kv_cache_cases import BACKENDS
from loss_cases import FORMS, LEAVES, batch, cast, check, draw, logprob_of, results, same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mem1_core import reference
from mem1_core.ops import linear_logprob
from mem1_core.testing import gradients, poisoned_memory

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
CHUNKS = {"one row": 1, "5 rows": 5 * 4000, "16 rows": 16 * 4000, "32 rows": 47 * 4000}  # of 1,000 floats


def inputs(*sizes: int, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any) -> Any:
    return logprob_of(cast(batch(*sizes, **options), dtype, device))


# ---------------------------------------------------------------------------------------------- accuracy


@every_backend
@both_dtypes
@pytest.mark.parametrize("tokens", [0, 1, 7, 512])
@pytest.mark.parametrize("vocabulary", [1, 2, 1000])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_sizes(
    backend: str, device: str, dtype: torch.dtype, tokens: int, vocabulary: int, bias: bool
) -> None:
    given = inputs(tokens, 48, vocabulary, dtype=dtype, device=device, bias=bias)
    check(linear_logprob, given, backend=backend)


@every_backend
@both_dtypes
@pytest.mark.parametrize(("tokens", "vocabulary"), [(0, 50257), (1, 50257), (37, 50257), (7, 151936)])
def test_large_vocabularies(
    backend: str, device: str, dtype: torch.dtype, tokens: int, vocabulary: int
) -> None:
    """One that is odd, and one whose widened weight comes in several blocks on the CPU."""
    given = inputs(tokens, 32, vocabulary, dtype=dtype, device=device, bias=True)
    check(linear_logprob, given, backend=backend)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "workspace_bytes"),
    [((37, 1026, 300), None), ((5, 515, 257), None), ((515, 130, 300), None), ((600, 140, 70), 528 * 72 * 4)],
    ids=str,
)
def test_products_in_pieces(
    backend: str, device: str, dtype: torch.dtype, sizes: tuple[int, int, int], workspace_bytes: int | None
) -> None:
    """On the CPU: so many columns and terms at a time; the last pieces are odd, and chunks add up."""
    options = {"backend": backend, "workspace_bytes": workspace_bytes}
    with poisoned_memory():
        check(linear_logprob, inputs(*sizes, dtype=dtype, device=device, bias=True), **options)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["fp16", "fp64"])
def test_other_dtypes(backend: str, device: str, dtype: torch.dtype) -> None:
    given = inputs(37, 48, 1000, dtype=dtype, device=device, bias=True)
    got = check(linear_logprob, given | {"temperature": 0.7}, backend=backend)
    assert got["logprob"].dtype == torch.promote_types(dtype, torch.float32)


@every_backend
@both_dtypes
@pytest.mark.parametrize("kind", ["number", "integer", "scalar", "per token", "per token, fp64"])
def test_temperature(backend: str, device: str, dtype: torch.dtype, kind: str) -> None:
    each = (draw(37, seed=7).abs() + 0.3).to(device)
    temperature = {"number": 0.7, "integer": 2, "scalar": torch.tensor(1.3), "per token": each.float()}
    given = inputs(37, 48, 1000, dtype=dtype, device=device)
    check(linear_logprob, given | {"temperature": temperature.get(kind, each)}, backend=backend)


@every_backend
@both_dtypes
@pytest.mark.parametrize("rows", CHUNKS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "soft cap"])
def test_chunks(
    backend: str, device: str, dtype: torch.dtype, rows: str, bias: bool, softcap: float | None
) -> None:
    """Many chunks, the last of them shorter; 1,001 columns are not aligned in memory."""
    for vocabulary in (1000, 1001):
        given = inputs(37, 48, vocabulary, dtype=dtype, device=device, bias=bias) | {"softcap": softcap}
        check(linear_logprob, given, backend=backend, workspace_bytes=CHUNKS[rows])


@every_backend
@both_dtypes
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "target", "temperature"])
@pytest.mark.parametrize("form", FORMS)
def test_strides_do_not_matter(backend: str, device: str, dtype: torch.dtype, name: str, form: str) -> None:
    given = inputs(37, 48, 100, dtype=dtype, device=device, bias=True)
    given["temperature"] = (draw(37, seed=7).abs() + 0.3).to(device, torch.float32)
    x = given[name]
    given[name] = FORMS[form](x) if x.dim() == 2 else FORMS[form](x[:, None].expand(-1, 2))[:, 1]
    got = check(linear_logprob, given, backend=backend)
    packed = {n: x.contiguous() for n, x in given.items()}
    for n, x in results(linear_logprob, packed, backend=backend).items():
        torch.testing.assert_close(got[n], x, rtol=2e-2 if x.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@every_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_integers_of_any_size(backend: str, device: str, dtype: torch.dtype) -> None:
    given = inputs(37, 48, 100, device=device)
    want = results(linear_logprob, given, backend=backend)
    assert same(results(linear_logprob, given | {"target": given["target"].to(dtype)}, backend=backend), want)


# --------------------------------------------------------------------------------------------- gradients


@every_backend
@pytest.mark.parametrize("workspace_bytes", [1, 2 * 14 * 8, None], ids=["one row", "2 rows", "at once"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "soft cap"])
def test_gradcheck(
    backend: str, device: str, workspace_bytes: int | None, bias: bool, softcap: float | None
) -> None:
    given = inputs(5, 4, 13, dtype=torch.float64, device=device, bias=bias)
    target, temperatures = given.pop("target"), (draw(5, seed=7).abs() + 0.3).to(device)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"workspace_bytes": workspace_bytes, "backend": backend, "softcap": softcap}
        return linear_logprob(hidden, weight, target, temperatures, bias=bias, **options)

    assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in given.values()))


@every_backend
@pytest.mark.parametrize("output", [0, 1], ids=["logprob", "entropy"])
def test_gradient_of_one_output(backend: str, device: str, output: int) -> None:
    given = inputs(37, 48, 100, device=device, bias=True)
    grads = []
    for function, options in ((linear_logprob, {"backend": backend}), (reference.linear_logprob, {})):
        leaves = {n: x.clone().requires_grad_() for n, x in given.items() if n != "target"}
        out = function(target=given["target"], **leaves, **options)[output]
        grads.append(torch.autograd.grad(out.sum(), [*leaves.values()]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@every_backend
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_gradients_of_some_inputs(backend: str, device: str, wanted: tuple[str, ...]) -> None:
    given = inputs(37, 48, 100, device=device, bias=True)
    want = results(linear_logprob, given, backend=backend)
    leaves = {name: given[name].clone().requires_grad_() for name in wanted}
    out = linear_logprob(**{**given, **leaves}, backend=backend)
    for name, x in zip(wanted, gradients(list(out), [*leaves.values()]), strict=True):
        assert torch.equal(x, want[f"d_{name}"])


@every_backend
@both_dtypes
@pytest.mark.parametrize("rows", [*CHUNKS, "at once"])
def test_backward_twice(backend: str, device: str, dtype: torch.dtype, rows: str) -> None:
    """The second one, and those of other graphs, find the logits that the forward has kept."""
    given = inputs(37, 48, 1000, dtype=dtype, device=device, bias=True)
    leaves = [given[name].requires_grad_() for name in LEAVES]

    def total() -> Tensor:
        logprob, entropy = linear_logprob(**given, backend=backend, workspace_bytes=CHUNKS.get(rows))
        return logprob.sum() + entropy.square().sum()

    once = torch.autograd.grad(total(), leaves)
    graph, other = total(), total()
    for retain in (True, True, False):
        again = torch.autograd.grad(graph, leaves, retain_graph=retain)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(map(torch.equal, once, torch.autograd.grad(other, leaves)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(graph, leaves)


class Products(TorchDispatchMode):
    """Counts what is called by its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rows", "again"), [(1, 36), (16, 2), (32, 1), (48, 0), (100, 0)])
def test_kept_logits_are_not_made_again(rows: int, again: int) -> None:
    """And no more of them are kept than the workspace holds, none where nothing wants a gradient."""
    given, kept = inputs(37, 48, 1000, bias=True), []
    for name in LEAVES:
        given[name].requires_grad_()
    own = [x.data_ptr() for x in given.values()]

    def pack(x: Tensor) -> Tensor:
        if x.dim() == 2 and x.data_ptr() not in own:
            kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logprob, entropy = linear_logprob(**given, workspace_bytes=rows * 4000)
    (logits,) = kept
    assert len(logits) == min(rows // 16 * 16 or rows, 37) and logits.nbytes <= rows * 4000
    with Products() as products:
        (logprob.sum() + entropy.sum()).backward()
    assert products.names["_linear_logits_"] == again
    assert products.names["_linear_weight_gradient_"] == again + 1
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        linear_logprob(**given)
    assert len(kept) == 1


# ------------------------------------------------------------------------------------- what is not finite


@every_backend
@both_dtypes
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
def test_a_bad_row_stays_alone(backend: str, device: str, dtype: torch.dtype, poison: float) -> None:
    """Bit for bit: matrix products of one shape compute a row from that row alone."""
    given = inputs(37, 48, 100, dtype=dtype, device=device)
    dirty = given | {"hidden": given["hidden"].clone()}
    dirty["hidden"][[3, 20], 5] = poison
    good = [t for t in range(37) if t not in (3, 20)]
    want = results(linear_logprob, given, backend=backend, workspace_bytes=16 * 400)
    got = results(linear_logprob, dirty, backend=backend, workspace_bytes=16 * 400)
    for name in ("logprob", "entropy", "d_hidden"):
        assert torch.equal(got[name][good], want[name][good]), name
        assert got[name][[3, 20]].isnan().any(-1).all(), f"{name} must show what went in"


@every_backend
@both_dtypes
@pytest.mark.parametrize("which", ["every token", "some tokens", "all but one token"])
def test_banned_tokens(backend: str, device: str, dtype: torch.dtype, which: str) -> None:
    """A bias of -inf: targets that are ruled out have log-prob -inf, and no gradient is NaN."""
    given = inputs(37, 48, 100, dtype=dtype, device=device, bias=True)
    banned = torch.ones(100, dtype=torch.bool, device=device)
    if which == "some tokens":
        banned[given["target"][::2].unique()] = False
    elif which == "all but one token":
        banned[given["target"][0]] = False
    given["bias"] = given["bias"].masked_fill(banned, -math.inf)
    got = results(linear_logprob, given, backend=backend)
    want = results(reference.linear_logprob, cast(given, torch.float64, device))
    for name, x in got.items():
        tolerance = 0.02 if x.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(x.double(), want[name], rtol=tolerance, atol=tolerance)
    assert (got["logprob"] == -math.inf).equal(banned[given["target"]])
    if which == "every token":
        assert not any(x.any() for name, x in got.items() if name != "logprob")


@every_backend
@pytest.mark.parametrize("rest", [math.nan, 0.0, -math.inf], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 5, 100])
def test_a_bias_that_is_nan_shows(backend: str, device: str, rest: float, vocabulary: int) -> None:
    bias = torch.full((vocabulary,), rest, device=device)
    bias[-1] = math.nan
    out = linear_logprob(**inputs(3, 4, vocabulary, device=device), bias=bias, backend=backend)
    assert all(x.isnan().all() for x in out), out


@every_backend
@both_dtypes
def test_logits_of_thousands(backend: str, device: str, dtype: torch.dtype) -> None:
    """Where exp overflows unless the row's maximum is taken out first, and all mass is on one token."""
    given = inputs(37, 48, 100, dtype=dtype, device=device)
    given["hidden"] = given["hidden"] * 2000
    got = check(linear_logprob, given, backend=backend)
    assert all(x.isfinite().all() for x in got.values()) and got["logprob"].min() < -1000


# ------------------------------------------------------------------------------------------------ repeats


@every_backend
@both_dtypes
@pytest.mark.parametrize("workspace_bytes", [1, 16 * 4096, None])
def test_uninitialised_memory_is_never_read(
    backend: str, device: str, dtype: torch.dtype, workspace_bytes: int | None
) -> None:
    given = inputs(37, 48, 1001, dtype=dtype, device=device, bias=True)
    before = {name: x.clone() for name, x in given.items()}
    options: dict[str, Any] = {"backend": backend, "workspace_bytes": workspace_bytes}
    want = results(linear_logprob, given, **options)
    with poisoned_memory():
        got = results(linear_logprob, given, **options)
    assert same(got, want) and same(given, before)
    assert same(results(linear_logprob, given, **options), want), "is not repeatable"


@every_backend
@both_dtypes
def test_a_row_does_not_depend_on_the_others(backend: str, device: str, dtype: torch.dtype) -> None:
    """Bit for bit on what the other rows of its chunk hold, and on whole chunks after its own. Matrix
    products of fewer rows may add up in another order: a few rows at a time are equal up to rounding."""
    given = inputs(48, 48, 1000, dtype=dtype, device=device)
    options: dict[str, Any] = {"backend": backend, "workspace_bytes": 16 * 4000}
    want = linear_logprob(**given, **options)
    changed = given | {"hidden": given["hidden"].clone()}
    changed["hidden"][1::2] *= 3
    for x, y in zip(linear_logprob(**changed, **options), want, strict=True):
        assert torch.equal(x[::2], y[::2]) and not torch.equal(x[1::2], y[1::2])
    for rows in (16, 32, 1, 2, 7, 31):
        part = given | {"hidden": given["hidden"][:rows], "target": given["target"][:rows]}
        for x, y in zip(linear_logprob(**part, **options), want, strict=True):
            if rows % 16 == 0 and backend != "reference":  # which has no chunks
                assert torch.equal(x, y[:rows])
            torch.testing.assert_close(x, y[:rows], rtol=2e-6, atol=1e-5)
