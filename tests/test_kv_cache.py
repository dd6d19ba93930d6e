"""prune_kv_cache_: one body of tests for every backend and device of the machine; a gather is expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv_cache_cases import BACKENDS, DTYPES, copied, layers_of, memory, padded, same
from torch import Tensor
from transformers import Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from mem1_core.ops import prune_kv_cache_
from mem1_core.sample_inputs import KEEP_PATTERNS, KV_LAYOUTS, keep_mask, kv_cache, ranges_of
from mem1_core.testing import assert_accurate, poisoned_memory

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
turning_dtypes = pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)


def survivors(keep: Tensor, lengths: list[int]) -> list[list[int]]:
    return [[s for s in range(n) if row[s]] for row, n in zip(keep.tolist(), lengths, strict=True)]


def gather(kv: Any, alive: list[list[int]]) -> None:
    for layer in layers_of(kv):
        for x in layer:
            for b, slots in enumerate(alive):
                x[b, : len(slots)] = x[b, slots]


def forget(kv: Any, alive: list[list[int]]) -> None:
    """Zeros where anything may stand: past the survivors."""
    for layer in layers_of(kv):
        for x in layer:
            for b, slots in enumerate(alive):
                x[b, len(slots) :] = 0


def check(
    kv: Any, keep: Any, lengths: Tensor, alive: list[list[int]], backend: str, view: Any = lambda kv: kv
) -> None:
    """Every byte of the cache, also between the entries; `view` makes of the memory what the op is given."""
    want, others = copied(kv), memory([keep, lengths])
    with poisoned_memory():
        new_lengths = prune_kv_cache_(view(kv), keep, lengths, backend=backend)
    assert new_lengths.dtype == lengths.dtype and new_lengths.device == lengths.device
    assert new_lengths.tolist() == [len(slots) for slots in alive]
    gather(view(want), alive)
    for cache in (kv, want):
        forget(view(cache), alive)
    assert same(memory(kv), memory(want))
    assert same(memory([keep, lengths]), others), "what says what stays is not written"


def check_mask(
    kv: Any, keep: Tensor, lengths: list[int], backend: str, device: str, dtype: torch.dtype = torch.int32
) -> None:
    n = torch.tensor(lengths, dtype=dtype, device=device)
    check(kv, keep.to(device), n, survivors(keep, lengths), backend)


# ------------------------------------------------------------------------------------------------- moving


@every_backend
@every_dtype
@pytest.mark.parametrize("pattern", KEEP_PATTERNS)
def test_patterns(backend: str, device: str, dtype: torch.dtype, pattern: str) -> None:
    lengths = [0, 1, 97, 60]
    kv = kv_cache(3, 4, 97, 2, 64, dtype=dtype, device=device)
    check_mask(kv, keep_mask(pattern, lengths, 97), lengths, backend, device)


@every_backend
@every_dtype
@pytest.mark.parametrize("dim", [1, 3, 64, 80, 96, 128, 192, 256])
def test_head_dims(backend: str, device: str, dtype: torch.dtype, dim: int) -> None:
    lengths = [33, 20]
    for heads in (1, 3):
        kv = kv_cache(2, 2, 33, heads, dim, dtype=dtype, device=device)
        check_mask(kv, keep_mask("random", lengths, 33), lengths, backend, device)


@every_backend
@every_dtype
@pytest.mark.parametrize("layout", KV_LAYOUTS)
@pytest.mark.parametrize("dim", [20, 64])
def test_layouts(backend: str, device: str, dtype: torch.dtype, layout: str, dim: int) -> None:
    lengths = [50, 0, 41]
    kv = kv_cache(3, 3, 50, 2, dim, dtype=dtype, device=device, layout=layout)
    check_mask(kv, keep_mask("random", lengths, 50), lengths, backend, device)


@every_backend
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_types_of_one_byte(backend: str, device: str, dtype: torch.dtype) -> None:
    lengths = [40, 13]
    kv = kv_cache(2, 2, 40, 2, 64, dtype=torch.uint8, device=device)
    kv = kv.bool() if dtype == torch.bool else kv.view(dtype)
    check_mask(kv, keep_mask("random", lengths, 40), lengths, backend, device)


@every_backend
@pytest.mark.parametrize("form", ["tensors of layers", "stacked after the batch", "parts of a larger cache"])
def test_forms_of_a_cache(backend: str, device: str, form: str) -> None:
    lengths = [30, 17]
    keep = keep_mask("random", lengths, 30)
    arguments = keep.to(device), torch.tensor(lengths, device=device), survivors(keep, lengths), backend
    if form == "tensors of layers":
        kv = list(kv_cache(3, 2, 30, 2, 16, device=device).unbind())
        check([layer.clone() for layer in kv], *arguments)
    elif form == "stacked after the batch":
        kv = kv_cache(3, 2, 30, 2, 16, device=device).transpose(1, 2).contiguous()  # [L, B, 2, ...]
        check(kv, *arguments, view=lambda kv: tuple((layer[:, 0], layer[:, 1]) for layer in kv))
        check(kv, *arguments, view=lambda kv: kv.transpose(1, 2))
    else:  # some layers, sequences, slots and heads
        kv = kv_cache(5, 4, 37, 4, 16, device=device)
        check(kv, *arguments, view=lambda kv: kv[1::2, :, 1:3, 4:34, ::2])


@every_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", [[0], [1], [43], [0, 0], [43, 0, 7, 43, 1]], ids=str)
def test_lengths(backend: str, device: str, dtype: torch.dtype, lengths: list[int]) -> None:
    kv = kv_cache(1, len(lengths), 43, 2, 16, device=device)
    check_mask(kv, keep_mask("random", lengths, 43), lengths, backend, device, dtype)


@every_backend
@pytest.mark.parametrize(
    "shape", [(2, 0, 5, 1, 8), (2, 3, 0, 1, 8), (0, 2, 5, 1, 8), (2, 2, 5, 0, 8), (128, 2, 5, 1, 8)], ids=str
)
def test_sizes(backend: str, device: str, shape: tuple[int, ...]) -> None:
    """No sequence, slot, layer or head, and as many layers as one launch takes."""
    lengths = [shape[2]] * shape[1]
    keep = keep_mask("random", lengths, shape[2])
    check_mask(kv_cache(*shape, device=device), keep, lengths, backend, device)
    check_ranges(kv_cache(*shape, device=device), ranges_of(keep, lengths), lengths, backend, device)


@every_backend
def test_views_of_keep_and_lengths(backend: str, device: str) -> None:
    lengths = torch.tensor([31, 40, 31, 40], device=device)[::2]
    keep = keep_mask("random", [40] * 4, 40).to(device)
    for mask in (keep[::2], keep[:, :40].T.contiguous().T[::2], keep.repeat_interleave(2, 1)[::2, ::2]):
        kv = kv_cache(2, 2, 40, 1, 16, device=device)
        check(kv, mask, lengths, survivors(mask, [31, 31]), backend)
    shared, same_length = keep[:1].expand(3, -1), lengths[:1].expand(3)
    kv = kv_cache(2, 3, 40, 1, 16, device=device)
    check(kv, shared, same_length, survivors(shared, [31] * 3), backend)


@every_backend
def test_what_the_mask_says_behind_the_length_does_not_count(backend: str, device: str) -> None:
    lengths, caches = [9, 0, 26], []
    keep = keep_mask("random", lengths, 40)
    for beyond in (False, True):
        for row, n in zip(keep, lengths, strict=True):
            row[n:] = beyond
        kv = kv_cache(1, 3, 40, 1, 16, device=device)
        check_mask(kv, keep, lengths, backend, device)
        caches.append(kv)
    assert torch.equal(*caches)


def test_a_large_cache_on_several_threads() -> None:
    threads = torch.get_num_threads()
    lengths = [700, 3, 512]
    try:
        torch.set_num_threads(4)
        for layout in ("tokens", "heads"):
            kv = kv_cache(5, 3, 700, 4, 64, dtype=torch.bfloat16, layout=layout)
            check_mask(kv, keep_mask("mem1", lengths, 700), lengths, "cpu", "cpu")
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------- ranges


def check_ranges(
    kv: Any, ranges: list[list[tuple[int, int]]], lengths: list[int], backend: str, device: str
) -> None:
    """Ranges as lists, and as a tensor of every kind."""
    alive = [[s for begin, end in row for s in range(begin, end)] for row in ranges]
    n = torch.tensor(lengths, dtype=torch.int32, device=device)
    strided = padded(ranges).transpose(1, 2).contiguous().transpose(1, 2)
    kinds = padded(ranges), padded(ranges, front=True).int(), strided
    check(copied(kv), ranges, n, alive, backend)
    check(copied(kv), tuple(tuple([*pair] for pair in row) for row in ranges), n, alive, backend)
    for tensor in kinds:
        check(copied(kv), tensor.to(device), n, alive, backend)


@every_backend
@pytest.mark.parametrize("pattern", KEEP_PATTERNS)
def test_ranges(backend: str, device: str, pattern: str) -> None:
    lengths = [0, 1, 37, 60]
    ranges = ranges_of(keep_mask(pattern, lengths, 60), lengths)
    check_ranges(kv_cache(2, 4, 60, 2, 16, device=device), ranges, lengths, backend, device)


@every_backend
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16], ids=str)
def test_narrow_integers(backend: str, device: str, dtype: torch.dtype) -> None:
    ranges = torch.tensor([[[2, 5]], [[0, 9]]], dtype=dtype, device=device)
    n = torch.tensor([7, 9], dtype=dtype, device=device)
    kv = kv_cache(1, 2, 9, 1, 8, device=device)
    check(kv, ranges, n, [[2, 3, 4], [*range(9)]], backend)


@every_backend
def test_empty_and_touching_ranges(backend: str, device: str) -> None:
    ranges = [
        [(0, 0), (0, 3), (3, 3), (3, 5), (5, 5), (9, 9), (9, 12), (20, 20)],  # up to the length
        [],
        [(4, 4), (20, 20)],
        [(0, 20)],
    ]
    kv = kv_cache(2, 4, 24, 2, 16, device=device)
    check_ranges(kv, ranges, [20] * 4, backend, device)
    check_ranges(kv, [[]] * 4, [20] * 4, backend, device)


# -------------------------------------------------------------------------------------------------- turning


def frequencies(kind: str, dim: int) -> Tensor:
    inv_freq = 10_000.0 ** -(torch.arange(dim // 2) / (dim / 2))
    if kind == "yarn":
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](rope_config(kind, dim))
        assert attention_factor > 1
    return inv_freq


def rope_config(kind: str, dim: int) -> Qwen2Config:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10_000.0}
    if kind == "yarn":
        rope |= {"factor": 4.0, "original_max_position_embeddings": 2_048}
    return Qwen2Config(
        hidden_size=2 * dim, num_attention_heads=2, max_position_embeddings=8_192, rope_parameters=rope
    )


def rotated(keys: Tensor, delta: Tensor, inv_freq: Tensor) -> Tensor:
    """RoPE, rotate-half, in the dtype of the frequencies: keys [L, n, H, D] by delta [n] more positions."""
    angle = delta.to(inv_freq)[:, None, None] * inv_freq
    first, second = keys.to(inv_freq.dtype).chunk(2, -1)
    parts = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    return torch.cat(parts, -1)


def assert_turned(got: Tensor, keys: Tensor, delta: Tensor, inv_freq: Tensor) -> None:
    """`got` are `keys` rotated by `delta`, as well as it can be done in float32 (float64 for float64)."""
    wide = torch.promote_types(keys.dtype, torch.float32)
    eager = rotated(keys, delta, inv_freq.to(wide)).to(keys.dtype)
    exact = rotated(keys, delta, inv_freq.double())
    # Of values that could be rounded either way, or where eager code happens to be exact.
    atol = 16 * torch.finfo(wide).eps * exact.abs().max().item() if exact.numel() else 0.0
    assert_accurate(got, eager, exact, atol=atol, name="keys")


def check_compact(
    kv: Any, keep: Any, lengths: Tensor, alive: list[list[int]], backend: str, **options: Any
) -> None:
    """Values move bit for bit; keys are rotated and where they do not move, left alone."""
    before = copied(kv)
    inv_freq = options["inv_freq"]
    new_lengths = prune_kv_cache_(kv, keep, lengths, positions="compact", backend=backend, **options)
    assert new_lengths.tolist() == [len(slots) for slots in alive]
    for (key, value), (old_key, old_value) in zip(kv, before, strict=True):
        for b, slots in enumerate(alive):
            n = len(slots)
            assert torch.equal(value[b, :n], old_value[b, slots])
            delta = torch.arange(n, device=key.device) - torch.tensor(slots, device=key.device)
            still = delta == 0
            assert torch.equal(key[b, :n][still], old_key[b, slots][still])
            assert_turned(key[None, b, :n], old_key[None, b, slots], delta, inv_freq)


@every_backend
@turning_dtypes
@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_compact_positions(backend: str, device: str, dtype: torch.dtype, kind: str) -> None:
    lengths = [0, 1, 8_192]
    keep = keep_mask("suffix", lengths, 8_192)
    keep[2, :8_000] = False
    keep[2, [0, 5, 100]] = True
    kv = kv_cache(1, 3, 8_192, 1, 64, dtype=dtype, device=device)
    n = torch.tensor(lengths, device=device)
    inv_freq = frequencies(kind, 64).to(device)
    check_compact(kv, keep.to(device), n, survivors(keep, lengths), backend, inv_freq=inv_freq)


@every_backend
@turning_dtypes
@pytest.mark.parametrize("layout", KV_LAYOUTS)
@pytest.mark.parametrize("dim", [2, 6, 80, 128, 256])
def test_compact_shapes(backend: str, device: str, dtype: torch.dtype, layout: str, dim: int) -> None:
    lengths = [41, 30]
    kv = kv_cache(2, 2, 41, 2, dim, dtype=dtype, device=device, layout=layout)
    keep = keep_mask("random", lengths, 41)
    n = torch.tensor(lengths, device=device)
    alive, inv_freq = survivors(keep, lengths), frequencies("default", dim).to(device)
    other = copied(kv)
    check_compact(kv, keep.to(device), n, alive, backend, inv_freq=inv_freq)
    check_compact(other, ranges_of(keep, lengths), n, alive, backend, inv_freq=inv_freq)
    for cache in (kv, other):
        forget(cache, alive)
    assert same(memory(kv), memory(other))


@every_backend
@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_a_turned_key_is_the_key_of_its_new_position(backend: str, device: str, kind: str) -> None:
    """With transformers' own rotary embedding, whose attention factor stays on the key."""
    dim, length = 64, 2_000
    rotary = Qwen2RotaryEmbedding(rope_config(kind, dim)).to(device)
    raw = kv_cache(1, 1, length, 2, dim, device=device)[0, 0]  # [1, S, H, D]

    def encoded(raw: Tensor, positions: Tensor) -> Tensor:
        cos, sin = rotary(raw, positions[None].to(device))
        return apply_rotary_pos_emb(raw, raw, cos, sin, unsqueeze_dim=2)[1]

    kept = torch.cat([torch.arange(300), torch.arange(1_500, length)])
    slots, new = torch.arange(length), torch.arange(len(kept))
    key = encoded(raw, slots)
    eager = rotated(key[:, kept], (new - kept).to(device), rotary.inv_freq)
    exact = rotated(raw[:, kept], new.to(device), rotary.inv_freq.double()) * rotary.attention_scaling
    n = torch.tensor([length], device=device)
    ranges = [[(0, 300), (1_500, length)]]
    prune_kv_cache_(
        [(key, raw.clone())], ranges, n, positions="compact", inv_freq=rotary.inv_freq, backend=backend
    )
    assert_accurate(key[:, : len(kept)], eager, exact)
    torch.testing.assert_close(key[:, : len(kept)], encoded(raw[:, kept], new), rtol=0, atol=2e-3)
    assert (rotary.attention_scaling > 1) == (kind == "yarn")


# ---------------------------------------------------------------------------------------- turning from a base


@every_backend
@turning_dtypes
@pytest.mark.parametrize("layout", KV_LAYOUTS)
def test_keys_made_from_a_base(backend: str, device: str, dtype: torch.dtype, layout: str) -> None:
    """The base need not lie in memory as the cache does; what the keys in the cache were is forgotten."""
    lengths = [60, 0, 37]
    kv = kv_cache(2, 3, 60, 2, 16, dtype=dtype, device=device)
    base = kv_cache(2, 3, 60, 2, 16, dtype=dtype, device=device, layout=layout, seed=1)
    base = [layer[0] for layer in base] if layout in ("layers", "heads") else base[:, 0]
    places = torch.randint(0, 8_192, (3, 60), generator=torch.Generator().manual_seed(2)).int().to(device)
    keep, inv_freq = keep_mask("random", lengths, 60), frequencies("default", 16).to(device)
    before, old_base, old_places = kv.clone(), copied(base), places.clone()
    kv[:, 0] = torch.nan
    n = torch.tensor(lengths, device=device)
    options: dict[str, Any] = {"base_keys": base, "base_positions": places, "backend": backend}
    new = prune_kv_cache_(kv, keep.to(device), n, positions="compact", inv_freq=inv_freq, **options)
    alive = survivors(keep, lengths)
    assert new.tolist() == [len(slots) for slots in alive]
    for b, slots in enumerate(alive):
        count = len(slots)
        assert torch.equal(places[b, :count], old_places[b, slots])
        delta = torch.arange(count, device=device) - old_places[b, slots]
        for layer in range(2):
            assert torch.equal(kv[layer, 1, b, :count], before[layer, 1, b, slots])
            assert torch.equal(base[layer][b, :count], old_base[layer][b, slots])
            assert_turned(kv[layer, :1, b, :count], old_base[layer][None, b, slots], delta, inv_freq)


def fifty_prunes(backend: str, device: str, with_base: bool) -> list[float]:
    """Each prune drops some tokens, then new ones fill the slots: rms errors of the keys after each prune.

    Checks beside this that with a base each key is the exact one, rounded once.
    """
    slots, dim = 96, 64
    generator = torch.Generator().manual_seed(0)
    inv_freq = frequencies("default", dim).to(device)
    first = kv_cache(1, 2, slots, 1, dim, dtype=torch.bfloat16, device=device)
    kv, base = first.clone(), first[:, 0].clone()
    places = torch.arange(slots, dtype=torch.int32, device=device).repeat(2, 1)
    truth, encoded = base.double(), places.clone()  # followed by a gather
    n, errors = torch.tensor([slots, slots], device=device), []
    for prune in range(50):
        keep = (torch.rand(2, slots, generator=generator) < 0.97).to(device)
        options = {"base_keys": base, "base_positions": places} if with_base else {}
        new = prune_kv_cache_(kv, keep, n, positions="compact", inv_freq=inv_freq, backend=backend, **options)
        errors_of_all = []
        for b, (alive, count) in enumerate(zip(survivors(keep, [slots] * 2), new.tolist(), strict=True)):
            truth[:, b, :count], encoded[b, :count] = truth[:, b, alive], encoded[b, alive]
            delta = torch.arange(count, device=device) - encoded[b, :count]
            exact = rotated(truth[:, b, :count], delta, inv_freq.double())
            errors_of_all.append(error := kv[:, 0, b, :count] - exact)
            if with_base:
                limit = exact.abs() * 2.0**-8 + 1e-4  # half a unit in the last place, and float32's angles
                assert (error.abs() <= limit).all(), f"prune {prune}: {(error.abs() - limit).max():.1e} over"
            fresh = kv_cache(1, 1, slots - count, 1, dim, dtype=torch.bfloat16, device=device, seed=prune)
            kv[:, :, b, count:] = fresh[:, :, 0]
            base[:, b, count:] = fresh[:, 0, 0]
            truth[:, b, count:] = fresh[:, 0, 0].double()
            places[b, count:] = encoded[b, count:] = torch.arange(count, slots, device=device)
        errors.append(torch.cat(errors_of_all, 1).square().mean().sqrt().item())
    return errors


@every_backend
def test_fifty_prunes_round_once_with_a_base_and_drift_without(backend: str, device: str) -> None:
    with_base = fifty_prunes(backend, device, with_base=True)
    without = fifty_prunes(backend, device, with_base=False)
    assert max(with_base) < 1.5 * with_base[0]
    assert without[0] < 1.5 * with_base[0]
    assert without[9] > 1.5 * without[0] and without[-1] > 1.5 * without[9]
