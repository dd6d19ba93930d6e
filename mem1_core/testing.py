"""What tests and benches share: the accuracy rule, evict tables, inputs, poison, the machine.

Nothing here is imported by the library itself. Layering: torch <- trajectory <- reference <- testing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mem1_core.segments import Segment

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
    sample of the query rows (see `visible_rows`), which is how a result that is too large for an N x N matrix
    is checked.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q * scale, k).masked_fill(~visible[:, None], float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v)


def visible_rows(evict: Tensor, rows: Tensor) -> Tensor:
    """Rows of a dense mask: evict int [B, N], rows int [R] -> bool [B, R, N]: j <= rows[r] < evict[b, j]."""
    keys = torch.arange(evict.shape[1], device=evict.device)
    return (keys <= rows[:, None]) & (rows[:, None] < evict[:, None, :])


# ------------------------------------------------------------------------------------------ evict tables
# Each takes (n, seed) and returns int32 [n] with j < evict[j] <= n.


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def causal_evict(n: int, seed: int = 0) -> Tensor:
    """Nothing is ever evicted: plain causal attention."""
    return torch.full((n,), n, dtype=torch.int32)


def random_evict(n: int, seed: int = 0) -> Tensor:
    """evict[j] uniform in (j, n]."""
    keys = torch.arange(n)
    draw = torch.rand(n, generator=_generator(seed), dtype=torch.float64)
    return (keys + 1 + (draw * (n - keys)).long()).to(torch.int32)


def monotone_evict(n: int, seed: int = 0) -> Tensor:
    """A window of changing width that never moves back: evict does not decrease."""
    if n == 0:
        return torch.empty(0, dtype=torch.int32)
    width = torch.randint(1, max(2, n // 3), (n,), generator=_generator(seed))
    return (torch.arange(n) + width).clamp(max=n).cummax(0).values.to(torch.int32)


def adversarial_evict(n: int, seed: int = 0, tile: int = 64) -> Tensor:
    """What a tile plan gets wrong first: keys seen by themselves only beside keys that live for ever, and
    deaths on a tile boundary or one token to either side of it."""
    generator = _generator(seed)
    keys = torch.arange(n)
    boundary = (keys // tile + torch.randint(1, 4, (n,), generator=generator)) * tile
    choices = torch.stack([keys + 1, boundary - 1, boundary, boundary + 1, torch.full((n,), n)])
    pick = torch.randint(0, len(choices), (n,), generator=generator)
    # Whole tiles of short-lived keys, so that dead tiles occur too, with one survivor here and there.
    lonely = torch.rand(n // tile + 1, generator=generator).repeat_interleave(tile)[:n] < 0.4
    pick = torch.where(lonely & (torch.rand(n, generator=generator) < 0.98), 0, pick)
    chosen = choices.gather(0, pick[None])[0]
    return torch.minimum(torch.maximum(chosen, keys + 1), torch.tensor(n)).to(torch.int32)


def packed_evict(n: int, seed: int = 0) -> Tensor:
    """Documents packed end to end: evict = end of the document."""
    ends = torch.arange(1, n + 1)
    is_end = torch.rand(n, generator=_generator(seed)) < 4 / max(n, 1)
    if n:
        is_end[-1] = True
    ends = ends[is_end]
    return ends[torch.searchsorted(ends, torch.arange(n), right=True)].to(torch.int32)


def prefix_tree_evict(n: int, seed: int = 0) -> Tensor:
    """A random prefix tree in depth-first order: evict = end of the subtree that hangs below the token."""
    generator = _generator(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    evict = torch.full((n,), n, dtype=torch.int32)
    path: list[int] = []  # first tokens of the open nodes, root first
    position = 0
    while position < n:
        depth = draw(0, len(path) + 1) if path else 0
        if depth < len(path):
            closed = evict[path[depth] : position]  # the subtree of a closed node ends here, if not earlier
            closed.clamp_(max=position)
            del path[depth:]
        path.append(position)
        position += draw(1, max(2, n // 8))
    return evict


EVICT_TABLES: dict[str, Callable[[int, int], Tensor]] = {
    "causal": causal_evict,
    "random": random_evict,
    "monotone": monotone_evict,
    "adversarial": adversarial_evict,
    "packed": packed_evict,
    "prefix_tree": prefix_tree_evict,
}


def mem1_segments(
    turns: int, *, prompt: int = 396, internal_state: int = 84, query: int = 36, info: int = 380
) -> list[Segment]:
    """A MEM1 trajectory: the prompt, then `turns` times `<IS>`, `<query>` and `<info>`; lengths in tokens."""
    segments = [Segment("prompt", 0, prompt)]
    for turn in range(1, turns + 1):
        segments.append(Segment("state", turn, internal_state))
        segments.append(Segment("query", turn, query))
        segments.append(Segment("info", turn, info))
    return segments


# The two trajectories that every attention figure of this project is measured on, by their length in tokens.
MEM1_TRAJECTORIES: dict[int, list[Segment]] = {
    3_396: mem1_segments(6),
    11_852: mem1_segments(16, internal_state=180, info=500),
}


# ---------------------------------------------------------------------------------------------- tensors

LAYOUTS = ("contiguous", "transposed", "fused", "padded")


def attention_inputs(
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layout: str = "contiguous",
    requires_grad: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q [B, N, Hq, D], k and v [B, N, Hkv, D]; the same numbers whatever the layout in memory.

    layout: "contiguous"; "transposed" (memory [B, H, N, D]); "fused" (slices of one [B, N, Hq + 2 Hkv, D]
    projection); "padded" (every row D of a longer one, so that no stride is a product of sizes).
    """
    generator = _generator(seed)
    sizes = (heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(batch, tokens, h, head_dim, generator=generator).to(device, dtype) for h in sizes)
    if layout == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "fused":
        q, k, v = torch.cat([q, k, v], dim=2).split(sizes, dim=2)
    elif layout == "padded":
        q, k, v = (torch.nn.functional.pad(x, (0, 8))[..., :head_dim] for x in (q, k, v))
    elif layout != "contiguous":
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    q, k, v = (x.detach().requires_grad_(requires_grad) for x in (q, k, v))
    return q, k, v


KV_LAYOUTS = ("tokens", "heads", "padded", "misaligned", "layers")


def kv_cache(
    layers: int,
    rows: int,
    slots: int,
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layout: str = "tokens",
    seed: int = 0,
) -> Any:
    """A random cache [L, 2, rows, slots, Hkv, D]; the same numbers whatever the layout in memory.

    rows are sequences, or the pages of a paged cache. layout: "tokens" (contiguous); "heads" (memory [..,
    Hkv, slots, D]); "padded" (every row D of a longer one); "misaligned" (the same by one element, so that no
    entry starts where a vector could be loaded); "layers" (a list of L separate pairs (key, value)).
    """
    shape = (layers, 2, rows, slots, heads, head_dim)
    generator = _generator(seed)
    if dtype.is_floating_point:
        kv = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
    else:
        kv = torch.randint(0, 256, shape, generator=generator, device="cpu").to(device, dtype)
    if layout == "heads":
        return kv.transpose(3, 4).contiguous().transpose(3, 4)
    if layout == "padded":
        return torch.nn.functional.pad(kv, (0, 8))[..., :head_dim]
    if layout == "misaligned":
        return torch.nn.functional.pad(kv, (1, 0))[..., 1:]
    if layout == "layers":
        return [(layer[0].clone(), layer[1].clone()) for layer in kv]
    if layout != "tokens":
        raise ValueError(f"layout: expected one of {KV_LAYOUTS}, got {layout!r}")
    return kv


KEEP_PATTERNS = ("random", "none", "all", "prefix", "suffix", "alternating", "mem1")


def keep_mask(pattern: str, lengths: Sequence[int], slots: int, seed: int = 0) -> Tensor:
    """bool [B, slots]: what stays of the first lengths[b] entries of each sequence; chance past them.

    "mem1" is what a turn of MEM1 leaves of the prompt, the previous turn and the action just written.
    """
    generator = _generator(seed)
    keep = torch.rand(len(lengths), slots, generator=generator, device="cpu") < 0.5
    for row, n in zip(keep, lengths, strict=True):
        slot = torch.arange(n, device="cpu")
        if pattern == "mem1":
            row[:n] = (slot < 396 * n // 1016) | (slot >= 896 * n // 1016)
        elif pattern != "random":
            row[:n] = {
                "none": slot < 0,
                "all": slot >= 0,
                "prefix": slot < n // 2,
                "suffix": slot >= n // 2,
                "alternating": slot % 2 == 1,
            }[pattern]
    return keep


def ranges_of(keep: Tensor, lengths: Sequence[int]) -> list[list[tuple[int, int]]]:
    """A mask as sorted ranges [begin, end) for each sequence."""
    ranges = []
    for row, n in zip(keep.tolist(), lengths, strict=True):
        edges = [s for s in range(n + 1) if (s < n and row[s]) != (s > 0 and row[s - 1])]
        ranges.append(list(zip(edges[::2], edges[1::2], strict=True)))
    return ranges


def gradients(out: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """Gradients of `inputs` for a random gradient of `out`.

    That gradient follows from `seed` and the shape alone: its values exist in bf16, so that every dtype gets
    the same numbers.
    """
    outs = [out] if isinstance(out, Tensor) else list(out)
    generator = _generator(seed)
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
