"""What a pruning bench runs: a cache with a turn of MEM1 to forget, candidates on it, and the check of their
results.

All but kvpress's way work on one tensor in place. A call that is repeated moves the same entries again,
whatever they hold by then; the check of the first one puts the cache back as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from measure import Candidate
from torch import Tensor

from mem1_core.ops import prune_kv_cache_, prune_paged_kv_cache_
from mem1_core.ops.kv_cache import Gaps, PagedPrune
from mem1_core.testing import assert_accurate

OURS, PAGED = "prune_kv_cache_", "prune_paged_kv_cache_"
FROM_BASE, REPLAYED = f"{OURS}, from base keys", f"{OURS}, CUDA graph replayed"
GATHER = "torch gather, copied back"
CLONE = "torch slice, cloned and copied back"
KVPRESS = "kvpress's way: gather per layer"


class Turn(NamedTuple):
    """A sequence in tokens: its prompt, the turn that leaves, and what was written after that."""

    prompt: int
    previous: int
    written: int


class Model(NamedTuple):
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


class Task:
    """A cache [L, 2, B, S, Hkv, D], or its memory as a pool of shuffled pages, and which entries stay."""

    def __init__(
        self,
        name: str,
        model: Model,
        turns: Sequence[Turn],
        device: str,
        *,
        page: int | None = None,
        gaps: Gaps = "close",
        compact: bool = False,
    ) -> None:
        self.name, self.model, self.turns, self.gaps, self.compact = name, model, turns, gaps, compact
        layers, heads, dim, dtype = model
        batch, slots = len(turns), -(-max(map(sum, turns)) // 256) * 256
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self.paged, self.page = page is not None, page or slots  # a sequence without pages has one large one
        self.pages = batch * slots // self.page
        if self.paged:
            order = torch.randperm(self.pages, generator=generator, device=device)
            self.kv = draw(layers, 2, self.pages, self.page, heads, dim)
        else:
            order = torch.arange(batch, device=device)
            self.kv = draw(layers, 2, batch, slots, heads, dim)
        self.original = self.kv.clone()
        self.block_table = order.int().view(batch, -1)
        self.table = self.block_table.clone()  # ours edits it
        self.lengths = torch.tensor([sum(turn) for turn in turns], dtype=torch.int32, device=device)
        slot, prompts, ends = torch.arange(slots), *torch.tensor([t[:2] for t in turns]).cumsum(1).T
        self.keep = ((slot < prompts[:, None]) | (slot >= ends[:, None])).to(device)
        self.counts = [turn.prompt + turn.written for turn in turns]

        # Of each sequence the survivors' positions, and where they are in the pool before and after.
        self.alive = [k[:n].nonzero()[:, 0] for k, n in zip(self.keep, self.lengths.tolist(), strict=True)]
        homes = self._slots(self.block_table)
        self.sources = [home[alive] for home, alive in zip(homes, self.alive, strict=True)]
        self.targets = []
        for home, alive in zip(homes, self.alive, strict=True):
            left, counts = (alive // self.page).unique(return_counts=True)
            pages = home.view(-1, self.page)[left]
            if gaps == "leave":
                self.targets.append(pages[torch.arange(self.page, device=device) < counts[:, None]])
            else:
                self.targets.append(pages.flatten()[: len(alive)])
        source, target = torch.cat(self.sources), torch.cat(self.targets)
        moved = source != target
        self.moved_from, self.moved_to = source[moved], target[moved]
        self.moved_by = torch.cat([_ranks(alive) - alive for alive in self.alive])[moved]
        self.moved_bytes = 2 * self.moved_to.numel() * layers * 2 * heads * dim * self.kv.element_size()

        self.inv_freq = 1e6 ** -(torch.arange(0, dim, 2, device=device) / dim) if compact else None
        if compact:  # the base of a key lies where the key does, encoded for another position
            self.base_keys = draw(layers, batch, slots, heads, dim)
            self.base_positions = 2 * torch.arange(slots, device=device).int().repeat(batch, 1)
            self.original_base = self.base_keys.clone(), self.base_positions.clone()

    def title(self) -> str:
        layers, heads, dim, dtype = self.model
        return (
            f"{self.name}, {str(dtype).removeprefix('torch.')}, L {layers}, Hkv {heads}, D {dim}, "
            f"B {len(self.turns)}, {self.moved_to.numel():,} of {sum(self.counts):,} survivors move, "
            f"{self.moved_bytes / 1e6:.2f} MB read and written"
        )

    def _in_place(
        self, name: str, run: Callable[[], Any], check: Callable[[Any], None], peer: bool = False
    ) -> Candidate:
        """`check`, and then the cache is as it was."""

        def check_and_restore(result: Any) -> None:
            check(result)
            self._restore()

        return Candidate(name, run, check_and_restore, peer=peer)

    # --- ours -----------------------------------------------------------------------------------------------

    def ours(self) -> list[Candidate]:
        if self.paged:
            return [self._in_place(PAGED, self._prune_paged, self._check_paged)]
        if not self.compact:
            return [self._in_place(OURS, self._prune, self._check_ours)]
        turning = partial(self._prune, positions="compact", inv_freq=self.inv_freq)
        base = partial(turning, base_keys=self.base_keys, base_positions=self.base_positions)
        return [
            self._in_place(OURS, turning, self._check_ours),
            self._in_place(FROM_BASE, base, self._check_from_base),
        ]

    def replayed(self) -> Candidate:
        """Ours as part of a captured decode loop; capture fails if anything waits for the device."""
        if not self.kv.is_cuda:
            return self._in_place(REPLAYED, self._prune, self._check_ours)
        self._prune()  # what is loaded or allocated once must not be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lengths = self._prune()
        self._restore()

        def replay() -> Tensor:
            graph.replay()
            return lengths

        return self._in_place(REPLAYED, replay, self._check_ours)

    def _prune(self, **options: Any) -> Tensor:
        return prune_kv_cache_(self.kv, self.keep, self.lengths, **options)

    def _prune_paged(self) -> PagedPrune:
        self.table.copy_(self.block_table)  # a part of the time
        return prune_paged_kv_cache_(self.kv, self.keep, self.table, self.lengths, gaps=self.gaps)

    # --- peers ----------------------------------------------------------------------------------------------

    def peers(self) -> list[Candidate]:
        candidates = [self._in_place(GATHER, self._gather, self._check_targets, peer=True)]
        if not self.paged:
            if not self.compact:
                candidates.append(self._in_place(CLONE, self._clone, self._check_targets, peer=True))
            candidates.append(Candidate(KVPRESS, self._kvpress, self._check_kvpress, peer=True))
        return candidates

    def _gather(self) -> None:
        """The entries that move, and no others, of all layers and sequences at once."""
        moved = self._pool().index_select(2, self.moved_from)
        if self.compact:
            moved[:, 0] = self._turned(moved[:, 0], self.moved_by[:, None])
        self._pool().index_copy_(2, self.moved_to, moved)

    def _clone(self) -> None:
        """What one can write where a single range leaves."""
        for b, (prompt, previous, written) in enumerate(self.turns):
            gap = prompt + previous
            moved = self.kv[:, :, b, gap : gap + written].clone()
            self.kv[:, :, b, prompt : prompt + written] = moved

    def _kvpress(self) -> list[tuple[Tensor, Tensor]]:
        """New keys and values [B, Hkv, n, D] of all survivors, layer by layer; the maths of kvpress's
        re-rotation is in the dtype of the keys."""
        made = []
        for keys, values in self._heads_first:
            keys, values = (x.gather(2, self._heads_first_index).contiguous() for x in (keys, values))
            if self.compact:
                by = _ranks(self._survivors[0]) - self._survivors
                keys = self._turned(keys, by[:, None], keys.dtype)
            made.append((keys, values))
        return made

    @cached_property
    def _survivors(self) -> Tensor:
        """[B, n], the shorter ones padded: kvpress keeps as many of each sequence."""
        return torch.nn.utils.rnn.pad_sequence(self.alive, batch_first=True)

    @cached_property
    def _heads_first(self) -> Tensor:
        """[L, 2, B, Hkv, S, D]: the cache as Hugging Face models have it, which is what kvpress works on."""
        return self.original.transpose(3, 4).contiguous()

    @cached_property
    def _heads_first_index(self) -> Tensor:
        batch, heads, dim = len(self.turns), self.model.kv_heads, self.model.head_dim
        return self._survivors[:, None, :, None].expand(batch, heads, -1, dim)

    def _turned(self, keys: Tensor, by: Tensor, maths: torch.dtype = torch.float32) -> Tensor:
        """Keys [.., D] rotated on by `by` [..] positions, the angles in fp32 (fp64), all else in `maths`."""
        assert self.inv_freq is not None
        angle = by[..., None] * self.inv_freq.to(torch.promote_types(maths, torch.float32))
        cosine, sine = angle.cos().to(maths), angle.sin().to(maths)
        first, second = keys.to(maths).chunk(2, dim=-1)
        rotated = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
        return rotated.to(keys.dtype) if maths != torch.float64 else rotated

    # --- checks ---------------------------------------------------------------------------------------------

    def _pool(self, kv: Tensor | None = None) -> Tensor:
        """[L, 2, slots of all pages, Hkv, D]"""
        return (self.kv if kv is None else kv).flatten(2, 3)

    def _slots(self, block_table: Tensor) -> Tensor:
        """[B, S]: where in the pool each position of a sequence is."""
        offsets = torch.arange(self.page, device=block_table.device)
        return (block_table.long()[..., None] * self.page + offsets).flatten(1)

    def _check_ours(self, lengths: Tensor) -> None:
        assert lengths.tolist() == self.counts
        self._check_targets(None)

    def _check_paged(self, result: PagedPrune) -> None:
        """What an attention reads through the new table."""
        assert result.lengths.tolist() == self.counts
        offsets = torch.arange(self.page, device=self.table.device)
        filled = (offsets < result.page_lengths[..., None]).flatten(1)
        self._check_places([s[f] for s, f in zip(self._slots(self.table), filled, strict=True)])
        used = -(-self.lengths // self.page)
        old = [table[:n] for table, n in zip(self.block_table, used.tolist(), strict=True)]
        left = self.table[self.table >= 0]
        assert result.freed.sum() == len(torch.cat(old)) - len(left)
        assert not result.freed[left.long()].any()

    def _check_targets(self, _: None) -> None:
        self._check_places(self.targets)

    def _check_from_base(self, lengths: Tensor) -> None:
        assert lengths.tolist() == self.counts
        base, encoded = self.original_base
        for b, alive in enumerate(self.alive):
            keys, place = self._pool()[:, 0], self.targets[b]
            self._check_turned(keys[:, place], base[:, b, alive], _ranks(alive) - encoded[b, alive])
            assert torch.equal(self.base_keys[:, b, : len(alive)], base[:, b, alive])
            assert torch.equal(self.base_positions[b, : len(alive)], encoded[b, alive])

    def _check_kvpress(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for b, (source, alive) in enumerate(zip(self.sources, self.alive, strict=True)):
            before = self._pool(self.original)[:, :, source]
            for (keys, values), (key, value) in zip(pairs, before, strict=True):
                keys, values = (x[b, :, : len(alive)].transpose(0, 1) for x in (keys, values))
                assert torch.equal(values, value)
                if self.compact:
                    self._check_turned(keys[None], key[None], _ranks(alive) - alive, keys.dtype)
                else:
                    assert torch.equal(keys, key)

    def _check_places(self, places: Sequence[Tensor]) -> None:
        before, after = self._pool(self.original), self._pool()
        for source, place, alive in zip(self.sources, places, self.alive, strict=True):
            gathered, got = before[:, :, source], after[:, :, place]
            assert torch.equal(got[:, 1], gathered[:, 1]), "values differ from a gather"
            if self.compact:
                self._check_turned(got[:, 0], gathered[:, 0], _ranks(alive) - alive)
            else:
                assert torch.equal(got[:, 0], gathered[:, 0]), "keys differ from a gather"

    def _check_turned(
        self, got: Tensor, keys: Tensor, by: Tensor, maths: torch.dtype = torch.float32
    ) -> None:
        """Keys [L, n, Hkv, D] of the first and the last layer against fp64."""
        for layer in (0, -1):
            eager = self._turned(keys[layer], by[:, None], maths)
            exact = self._turned(keys[layer], by[:, None], torch.float64)
            assert_accurate(got[layer], eager, exact, name="keys")

    def _restore(self) -> None:
        self.kv.copy_(self.original)
        if self.compact:
            self.base_keys.copy_(self.original_base[0])
            self.base_positions.copy_(self.original_base[1])


def _ranks(alive: Tensor) -> Tensor:
    return torch.arange(len(alive), device=alive.device)
