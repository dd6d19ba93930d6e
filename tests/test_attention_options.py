"""Windows, sinks, soft caps, values of another size, alone and together, by the rules of test_attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_attention import BACKENDS, both_dtypes, equal, every_backend
from torch import Tensor

from mem1_core import reference
from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TrajectoryMask
from mem1_core.ops import trajectory_attention
from mem1_core.sample_inputs import adversarial_evict, attention_inputs, mem1_segments, random_evict
from mem1_core.testing import assert_accurate, gradients, poisoned_memory

WINDOWS = [1, 7, 64, 512]


class Options(NamedTuple):
    window: int | None = None
    sinks: bool = False
    softcap: float | None = None

    def __str__(self) -> str:
        given = {name: value for name, value in self._asdict().items() if value}
        return " ".join(f"{name}={value}" for name, value in given.items()) or "plain"


ALONE = [*(Options(window=w) for w in WINDOWS), Options(sinks=True), Options(softcap=3.0)]
TOGETHER = [Options(7, True), Options(7, False, 3.0), Options(None, True, 3.0), Options(64, True, 3.0)]
quick_backends = pytest.mark.parametrize(
    ("backend", "device"), [param for param in BACKENDS if param.values != ("triton", "cpu")]
)
INTERPRETED = [Options(7), Options(sinks=True), Options(softcap=3.0), TOGETHER[-1]]


def cases(options: list[Options], interpreted: list[Options]) -> Any:
    """Interpreted kernels take seconds a case: some options for them, in float32 all at once alone."""
    return pytest.mark.parametrize(
        ("backend", "device", "dtype", "options"),
        [
            pytest.param(*param.values, dtype, option, id=f"{param.id}-{name}-{option}", marks=param.marks)
            for param in BACKENDS
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
            for option in (interpreted if param.values == ("triton", "cpu") else options)
            if param.values != ("triton", "cpu") or name == "bf16" or option == TOGETHER[-1]
        ],
    )


def inputs_of(
    n: int, heads: tuple[int, int], dim: int, value_dim: int, options: Options, **settings: Any
) -> list[Tensor]:
    """q, k, v and, where there are any, sinks."""
    batch = settings.pop("batch", 1)
    q, k, _ = attention_inputs(batch, n, *heads, dim, **settings)
    v = attention_inputs(batch, n, *heads, value_dim, **settings)[2]
    generator = torch.Generator().manual_seed(5)
    sinks = torch.randn(heads[0], generator=generator).to(q)
    return [q, k, v, *[sinks] * options.sinks]


def eager(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: TrajectoryMask, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Every step in the dtype of the inputs."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q * q.shape[-1] ** -0.5, k)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask.dense()[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    lse = scores.logsumexp(-1).to(torch.promote_types(q.dtype, torch.float32))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1)[..., : k.shape[1]], v), lse


def check(inputs: list[Tensor], mask: TrajectoryMask, backend: str, options: Options) -> list[Tensor]:
    """out, lse and all gradients against the fp64 reference."""
    windowed = mask if options.window is None else mask.windowed(options.window)

    def results(function: Any, leaves: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in leaves]
        outs = function(*leaves[:3], leaves[3] if options.sinks else None)
        return [*outs, *gradients(list(outs), leaves)]

    got = results(
        lambda q, k, v, sinks: trajectory_attention(
            q, k, v, mask, window=options.window, sinks=sinks, softcap=options.softcap,
            return_lse=True, backend=backend,
        ),
        inputs,
    )  # fmt: skip
    plain = results(lambda q, k, v, sinks: eager(q, k, v, sinks, windowed, options.softcap), inputs)
    exact = results(
        lambda q, k, v, sinks: reference.trajectory_attention(
            q, k, v, windowed, None, True, sinks, options.softcap
        ),
        [x.double() for x in inputs],
    )
    for name, ours, theirs, want in zip(
        ("out", "lse", "dq", "dk", "dv", "dsinks"), got, plain, exact, strict=False
    ):
        assert_accurate(ours, theirs, want, name=name)
    return got


def reencoded(turns: int = 3, prompt: int = 97) -> TrajectoryMask:
    """Two trajectories of blocks whose prompt stands further away in the stream than in position."""
    layouts = [
        TrajectoryLayout.from_segments(
            mem1_segments(count, prompt=tokens, internal_state=21, query=9, info=35), regime="reencode"
        )
        for count, tokens in ((turns, prompt), (2, 20))
    ]
    return TrajectoryLayout.pack(layouts).mask


# ------------------------------------------------------------------------------------------- the function


@cases([*ALONE, *TOGETHER], INTERPRETED[1:3])
def test_random_lifetimes(backend: str, device: str, dtype: torch.dtype, options: Options) -> None:
    evict = torch.stack([random_evict(200, seed) for seed in range(2)])
    inputs = inputs_of(200, (4, 2), 32, 32, options, batch=2, dtype=dtype, device=device)
    check(inputs, TrajectoryMask.from_evict(evict.to(device)), backend, options)


@cases([*ALONE, *TOGETHER], [INTERPRETED[0], INTERPRETED[3]])
def test_blocks_of_a_reencoded_stream(
    backend: str, device: str, dtype: torch.dtype, options: Options
) -> None:
    mask = reencoded()
    assert mask.positions is not None and not torch.equal(
        mask.positions.diff(), torch.ones(1, mask.shape[1] - 1)
    )
    inputs = inputs_of(mask.shape[1], (2, 1), 16, 16, options, dtype=dtype, device=device)
    check(inputs, mask.to(device), backend, options)


@pytest.mark.parametrize(
    ("backend", "device", "n", "window"),
    [
        pytest.param(*param.values, n, window, id=f"{param.id}-{n}-{window}", marks=param.marks)
        for param in BACKENDS
        for n in (1, 2, 63, 65, 127, 131, 257)
        for window in WINDOWS
        if param.values != ("triton", "cpu") or (n in (1, 131) and window in (7, 64))
    ],
)
def test_lengths_and_drawn_positions(backend: str, device: str, n: int, window: int) -> None:
    """Positions in no order at all."""
    options = Options(window, True, 3.0)
    positions = torch.randint(0, n, (1, n), generator=torch.Generator().manual_seed(n), dtype=torch.int32)
    mask = TrajectoryMask(adversarial_evict(n)[None].to(device), positions=positions.to(device))
    check(inputs_of(n, (2, 1), 16, 24, options, device=device), mask, backend, options)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "dims"),
    [
        pytest.param(*param.values, dtype, dims, id=f"{param.id}-{name}-{dims}", marks=param.marks)
        for param in BACKENDS
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for dims in ((192, 128), (16, 40), (64, 8), (40, 256))
        if param.values != ("triton", "cpu") or dims == ((16, 40) if name == "fp32" else (192, 128))
    ],
)
def test_values_of_another_size(backend: str, device: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    mask = TrajectoryMask.from_evict(random_evict(131).to(device))
    options = Options(64, True, 3.0) if dtype == torch.float32 else Options()
    check(inputs_of(131, (2, 1), *dims, options, dtype=dtype, device=device), mask, backend, options)


@quick_backends
def test_a_window_that_holds_everything_changes_nothing(backend: str, device: str) -> None:
    mask = reencoded().to(device)
    inputs = inputs_of(mask.shape[1], (2, 1), 16, 16, Options(), device=device)
    plain = check(inputs, mask, backend, Options())
    wide = check(inputs, mask, backend, Options(window=10**6))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, wide, strict=True))
    assert torch.equal(plain[0], wide[0])


@every_backend
def test_positions_may_be_given(backend: str, device: str) -> None:
    mask = reencoded().to(device)
    assert mask.positions is not None
    q, k, v = inputs_of(mask.shape[1], (2, 1), 16, 16, Options(), device=device)
    bare = TrajectoryMask.from_evict(mask.evict_at)
    want = trajectory_attention(q, k, v, mask, window=40, backend=backend)
    given = mask.positions.long()
    assert torch.equal(trajectory_attention(q, k, v, bare, window=40, positions=given, backend=backend), want)
    assert not torch.equal(trajectory_attention(q, k, v, bare, window=40, backend=backend), want)
    assert bare.at_positions(given) is bare.at_positions(given), "its plan is made once"
    assert mask.windowed(40) is mask.windowed(40)


@pytest.mark.parametrize(
    "options", [Options(3), Options(3, True, 2.0), Options(None, True), Options(None, False, 2.0)], ids=str
)
def test_gradcheck(options: Options) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 1, 4]], dtype=torch.int32)
    mask = TrajectoryMask(random_evict(9, seed=4)[None], positions=positions)
    leaves = inputs_of(9, (4, 2), 8, 5, options, batch=2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in leaves]

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Any:
        settings = {"window": options.window, "sinks": sinks, "softcap": options.softcap}
        return trajectory_attention(q, k, v, mask, 0.7, True, **settings)

    assert torch.autograd.gradcheck(attend, leaves)


@quick_backends
@both_dtypes
def test_uninitialised_memory_and_repeats(backend: str, device: str, dtype: torch.dtype) -> None:
    options, mask = Options(40, True, 3.0), reencoded().to(device)
    inputs = inputs_of(mask.shape[1], (2, 1), 24, 40, options, dtype=dtype, device=device)
    want = check(inputs, mask, backend, options)
    with poisoned_memory():
        fresh = TrajectoryMask(mask.evict_at, positions=mask.positions)
        assert equal(check(inputs, fresh, backend, options), want)


@pytest.mark.parametrize("made", [True, False], ids=["window made before", "window made inside"])
def test_compiles_without_a_graph_break(made: bool) -> None:
    torch.compiler.reset()

    def layers(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: TrajectoryMask) -> Tensor:
        near = trajectory_attention(q.sin(), k, v, mask, window=40, sinks=sinks, softcap=3.0)
        return near + trajectory_attention(q, k, v, mask)

    mask, fresh = reencoded(), reencoded()
    if made:
        fresh.windowed(40)
    leaves = inputs_of(mask.shape[1], (2, 1), 16, 16, Options(sinks=True))
    leaves = [x.requires_grad_() for x in leaves]
    got = torch.compile(layers, backend="aot_eager", fullgraph=True)(*leaves, fresh)
    want = layers(*leaves, mask)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients([got], leaves), gradients([want], leaves))


def test_opcheck() -> None:
    """The registered op with all of its arguments."""
    ops, mask = torch.ops.mem1_core, reencoded(2, 20).windowed(40)
    leaves = inputs_of(mask.shape[1], (2, 1), 16, 24, Options(sinks=True), dtype=torch.float64)
    q, k, v, sinks = (x.requires_grad_() for x in leaves)
    plan = mask.plan
    assert plan.key_lists is not None
    window = (mask.positions, mask.limits, *plan.key_lists)
    arguments = (mask.evict_at, *plan.tensors, plan.block_q, plan.block_k, 0.25, *window)
    torch.library.opcheck(ops.trajectory_attention.default, (q, k, v, *arguments, sinks, 3.0))
    with torch.no_grad():
        out, lse = ops.trajectory_attention(q, k, v, *arguments, sinks, 3.0)
    saved = (torch.ones_like(out), None, *(t.detach() for t in (q, k, v)), out, lse, *arguments, 3.0)
    torch.library.opcheck(ops.trajectory_attention_backward.default, saved)


# ------------------------------------------------------------------------------------------ tiles, refusals


@pytest.mark.parametrize("blocks", [(64, 64), (128, 128), (16, 32)], ids=str)
@pytest.mark.parametrize("window", [1, 40, 300])
def test_the_plan_of_a_window_covers_what_is_visible(window: int, blocks: tuple[int, int]) -> None:
    """Live tiles hold every visible pair, full ones nothing else, seen from either side the same."""
    mask = reencoded(9, 700).windowed(window)
    plan, n = mask.tile_plan(*blocks), mask.shape[1]
    (bq, bk), (rows, columns) = blocks, (-(-n // blocks[0]), -(-n // blocks[1]))
    visible = torch.zeros(rows * bq, columns * bk, dtype=torch.bool)
    visible[:n, :n] = mask.dense()[0]
    tiles = visible.view(rows, bq, columns, bk).transpose(1, 2)
    padding = (torch.arange(rows * bq) >= n).view(rows, 1, bq, 1)
    whole = (tiles | padding).flatten(2).all(-1)

    def dense(offsets: Tensor, listed: Tensor, height: int, width: int) -> Tensor:
        out = torch.zeros(height, width, dtype=torch.bool)
        for row in range(height):
            out[row, listed[offsets[row] : offsets[row + 1]].long()] = True
        return out

    full = dense(plan.full_offsets, plan.full_tiles, rows, columns)
    partial = dense(plan.partial_offsets, plan.partial_tiles, rows, columns)
    assert plan.key_lists is not None
    by_key = [dense(*plan.key_lists[n : n + 2], columns, rows).T for n in (0, 2)]
    assert torch.equal(by_key[0], full) and torch.equal(by_key[1], partial)
    assert not (full & partial).any() and not (full & ~whole).any()
    assert not (tiles.flatten(2).any(-1) & ~(full | partial)).any()
    assert plan.live_tiles < reencoded(9, 700).tile_plan(*blocks).live_tiles, "what is far away is dead"
    assert torch.equal(mask.visible_counts(), mask.dense().sum(-1, dtype=torch.int32))
    assert mask.visible_pairs() == int(mask.dense().sum())


def test_a_window_costs_what_a_window_costs() -> None:
    """512 of 16k tokens, in one copy: nine tiles of 64 of each row of 256."""
    plan = TrajectoryMask.from_evict(torch.full((16384,), 16384)).windowed(512).plan
    assert plan.live_tiles <= 9 * 256


def test_refusals() -> None:
    mask = TrajectoryMask.from_evict(random_evict(20))
    q, k, v = attention_inputs(1, 20, 4, 2, 16)
    for wrong, kind, message in [
        ({"window": 0}, ValueError, "window: expected an integer >= 1, got 0"),
        ({"window": 2.0}, TypeError, "window: expected an integer, got float"),
        ({"window": True}, TypeError, "window: expected an integer, got bool"),
        ({"positions": torch.arange(20)[None]}, ValueError, "positions: expected None without a window"),
        (
            {"window": 3, "positions": torch.arange(9)[None]},
            ValueError,
            r"positions: expected shape \[B, 20\], got \[1, 9\]",
        ),
        ({"window": 3, "positions": torch.rand(1, 20)}, TypeError, "integer tensor, got torch.float32"),
        ({"window": 3, "positions": torch.ones(1, 20).bool()}, TypeError, "integer tensor, got torch.bool"),
        ({"window": 3, "positions": torch.full((1, 20), 2**30)}, ValueError, "expected less than 2\\^30"),
        ({"softcap": True}, ValueError, "softcap: expected a finite number > 0 or None, got True"),
        ({"softcap": 1e39}, ValueError, "softcap: expected a finite number > 0 or None"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks: expected shape \[4\], the heads of q, got \[2\]"),
        ({"sinks": torch.zeros(4, dtype=torch.int64)}, TypeError, "sinks: expected a floating point tensor"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a finite number > 0 or None, got 0.0"),
        ({"softcap": torch.inf}, ValueError, "softcap: expected a finite number > 0"),
    ]:
        with pytest.raises(kind, match=message):
            trajectory_attention(q, k, v, mask, **wrong)
    with pytest.raises(ValueError, match="k: expected batch, length and dim of q"):
        trajectory_attention(q, k[..., :8], v, mask)
    with pytest.raises(ValueError, match="v: expected batch and length of q"):
        trajectory_attention(q, k, v[:, :9], mask)
    placed = TrajectoryMask(mask.evict_at, positions=torch.arange(20)[None].int()).windowed(3)
    with pytest.raises(ValueError, match=r"masks\[0\]: expected one without a window, got one of 3"):
        TrajectoryMask.pack([placed])
    with pytest.raises(ValueError, match="mask: expected one without a window, got one of 3"):
        placed.at_positions(torch.arange(20)[None])


@pytest.mark.parametrize(
    "mask", [TrajectoryMask.from_evict(random_evict(20)), reencoded()], ids=["one copy", "blocks"]
)
def test_of_two_windows_the_smaller_one_holds(mask: TrajectoryMask) -> None:
    q, k, v = attention_inputs(1, mask.shape[1], 4, 2, 16)
    want = trajectory_attention(q, k, v, mask, window=3)
    for first, then in ((3, 7), (7, 3), (3, 3)):
        got = trajectory_attention(q, k, v, mask.windowed(first), window=then)
        assert torch.equal(got, want), (first, then)


def test_numbers_of_numpy() -> None:
    mask = TrajectoryMask.from_evict(random_evict(20))
    q, k, v = attention_inputs(1, 20, 4, 2, 16)
    want = trajectory_attention(q, k, v, mask, window=3, softcap=2.0, scale=0.5)
    given = {"window": np.int64(3), "softcap": np.float32(2), "scale": np.float32(0.5)}
    assert torch.equal(trajectory_attention(q, k, v, mask, **given), want)


@pytest.mark.parametrize("made", [False, True], ids=["in the graph", "made ahead"])
@pytest.mark.parametrize("regime", ["carry", "reencode"])
def test_positions_under_compile(regime: str, made: bool) -> None:
    mask = reencoded() if regime == "reencode" else TrajectoryMask.from_evict(random_evict(40))
    q, k, v = attention_inputs(1, mask.shape[1], 4, 2, 16, requires_grad=True)
    positions = 2 * torch.arange(mask.shape[1])[None]
    if made:
        mask.at_positions(positions).windowed(6)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return trajectory_attention(q, k, v, mask, window=6, positions=positions)

    torch.compiler.reset()
    got, want = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v), step(q, k, v)
    torch.testing.assert_close(got, want)
    gradients_of = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (got, want)]
    for one, other in zip(*gradients_of, strict=True):
        torch.testing.assert_close(one, other)


@quick_backends
def test_positions_that_change_and_rows_of_them(backend: str, device: str) -> None:
    mask = TrajectoryMask.from_evict(random_evict(40).to(device))
    q, k, v = attention_inputs(2, 40, 4, 2, 16, device=device)
    steps = torch.arange(40, device=device)
    positions = steps[None].repeat(2, 1)
    positions[1] *= 2

    def dense(positions: Tensor) -> Tensor:
        rows = [TrajectoryMask(mask.evict_at, positions=row[None].int()).windowed(9) for row in positions]
        parts = [
            trajectory_attention(*(x[n : n + 1] for x in (q, k, v)), row, backend="reference")
            for n, row in enumerate(rows)
        ]
        return torch.cat(parts)

    for _ in range(2):
        got = trajectory_attention(q, k, v, mask, window=9, positions=positions, backend=backend)
        torch.testing.assert_close(got, dense(positions))
        positions += steps  # in place
    with torch.inference_mode():
        fresh = positions.clone()
        got = trajectory_attention(q, k, v, mask, window=9, positions=fresh, backend=backend)
        torch.testing.assert_close(got, dense(fresh))


@quick_backends
@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**70])
def test_windows_beyond_int32(backend: str, device: str, window: int) -> None:
    mask = reencoded().to(device)
    assert mask.positions is not None
    q, k, v = attention_inputs(1, mask.shape[1], 2, 1, 16, device=device)
    far = (mask.positions - 5).long() * (2**20 // 200)
    want = trajectory_attention(q, k, v, mask, backend=backend)
    for positions in (None, mask.positions, far):
        got = trajectory_attention(q, k, v, mask, window=window, positions=positions, backend=backend)
        assert torch.equal(got, want)
