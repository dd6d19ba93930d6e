"""What tests and benches share: the accuracy rule, backends, poison, the machine.

Nothing here is imported by the library itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------- accuracy


def assert_accurate(
    got: Tensor,
    eager: Tensor,
    reference: Tensor,
    factor: float = 2.0,
    atol: float | None = None,
    name: str = "result",
) -> None:
    """Assert that `got` is at most `factor` times as far from `reference` as eager code of the same dtype is.

    Args:
        got: what is tested.
        eager: the same function in plain PyTorch at the dtype of `got`: the error that the dtype excuses.
        reference: the same function in higher precision (fp64, or fp32 where fp64 is too large).
        factor: error allowed as a multiple of eager's.
        atol: absolute error allowed on top; by default, relative to the largest reference value, half a unit
            in the last place of the dtype (storing the exact answer costs that) plus 16 units of the dtype
            that sums are kept in, fp32 or wider: a fused op rounds elsewhere than eager code, which is
            exactly right now and then, as where a softmax has one term.
        name: what the message calls `got`.

    Both the largest and the root-mean-square error must pass: the first finds a wrong element, the second a
    bias that is small everywhere. Infinities and NaN must stand where the reference has them.
    """
    assert got.shape == reference.shape, (
        f"{name}: shape {tuple(got.shape)}, expected {tuple(reference.shape)}"
    )
    assert eager.shape == reference.shape, (
        f"{name}: eager has shape {tuple(eager.shape)}, reference {reference.shape}"
    )
    assert got.dtype == eager.dtype, f"{name}: dtype {got.dtype}, but eager has {eager.dtype}"
    if reference.numel() == 0:
        return
    exact, measured, plain = (x.detach().to("cpu", torch.float64) for x in (reference, got, eager))
    finite = exact.isfinite()
    same = (measured == exact) | (measured.isnan() & exact.isnan()) | (finite & measured.isfinite())
    assert same.all(), (
        f"{name}: {int((~same).sum())} infinities or NaN differ from the reference, the first at "
        f"{(~same).nonzero()[0].tolist()}: {measured[~same][0]} for {exact[~same][0]}"
    )
    exact, measured, plain = exact[finite], measured[finite], plain[finite]
    if exact.numel() == 0:
        return
    if atol is None:
        sums = torch.finfo(torch.promote_types(got.dtype, torch.float32))
        atol = (0.5 * torch.finfo(got.dtype).eps + 16 * sums.eps) * exact.abs().max().item()
    errors = {"largest": torch.Tensor.max, "root-mean-square": lambda x: x.square().mean().sqrt()}
    for kind, reduce in errors.items():
        ours, allowed = reduce((measured - exact).abs()).item(), reduce((plain - exact).abs()).item()
        limit = factor * allowed + atol
        assert ours <= limit, (
            f"{name}: {kind} error {ours:.3e} is over the limit {limit:.3e} = "
            f"{factor:g} * {allowed:.3e} (eager {str(got.dtype).removeprefix('torch.')}) + {atol:.1e}"
        )


def eager_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None) -> Tensor:
    """Attention as one writes it by hand, every step in the dtype of the inputs: the yardstick of accuracy.

    q [B, R, Hq, D], k and v [B, N, Hkv, D], visible bool [B or 1, R, N] -> [B, R, Hq, D]. R < N takes a
    sample of the query rows (see `TrajectoryMask.visible`), which is how a result that is too large for an
    N x N matrix is checked.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q * scale, k).masked_fill(~visible[:, None], float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v)


def gradients(out: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """Gradients of `inputs` for a random gradient of `out`.

    That gradient follows from `seed` and the shape alone: its values exist in bf16, so that every dtype gets
    the same numbers.
    """
    outs = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(seed)
    douts = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outs]
    return torch.autograd.grad(outs, list(inputs), douts)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, every uninitialised tensor torch makes (also from C++) holds NaN, or the largest integer.

    A kernel that reads what it never wrote, or leaves part of its output unwritten, shows.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic  # a module whose one attribute is made at run time
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


@contextlib.contextmanager
def no_wait() -> Iterator[None]:
    """Inside, a torch op that makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------- machine


def attention_backends() -> list[tuple[str, str]]:
    """(backend, device) pairs of `trajectory_attention` that this machine can run.

    Triton runs on a GPU, or else in its interpreter if that is on (TRITON_INTERPRET=1 before its import).
    """
    pairs = [("cpu", "cpu"), ("reference", "cpu")]
    if torch.cuda.is_available():
        pairs += [("triton", "cuda"), ("reference", "cuda")]
    elif importlib.util.find_spec("triton"):
        from mem1_core.triton.attention_launch import INTERPRETED

        pairs += [("triton", "cpu")] if INTERPRETED else []
    return pairs


def kv_cache_backends() -> list[tuple[str, str]]:
    """(backend, device) pairs of `prune_kv_cache_` that this machine can run."""
    pairs = [("cpu", "cpu"), ("reference", "cpu")]
    return [*pairs, ("cuda", "cuda"), ("reference", "cuda")] if torch.cuda.is_available() else pairs


def machine() -> dict[str, Any]:
    """The machine and the versions a figure was measured with, ready for JSON."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model)
    facts: dict[str, Any] = {
        "cpu": model,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_capability"] = "sm_{}{}".format(*torch.cuda.get_device_capability())
        facts["cuda"] = torch.version.cuda
    return facts
