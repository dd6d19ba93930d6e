"""The yardsticks themselves: the accuracy rule and the factories."""

from __future__ import annotations

import pytest
import torch

from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TrajectoryMask
from mem1_core.reference import trajectory_attention
from mem1_core.sample_inputs import (
    EVICT_TABLES,
    LAYOUTS,
    MEM1_TRAJECTORIES,
    attention_inputs,
    prefix_tree_evict,
)
from mem1_core.testing import assert_accurate, eager_attention, machine, poisoned_memory


def test_accuracy_rule() -> None:
    reference = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    eager = (reference + 1e-3).float()
    assert_accurate((reference - 1.9e-3).float(), eager, reference)
    with pytest.raises(AssertionError, match="dq: largest error"):
        wrong = reference.float().clone()
        wrong[7] += 3e-3
        assert_accurate(wrong, eager, reference, name="dq")
    with pytest.raises(AssertionError, match="root-mean-square"):
        uneven = reference.clone()
        uneven[0] += 1  # eager may be far off once; an error of that size everywhere is another matter
        assert_accurate((reference + 0.5).float(), uneven.float(), reference)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_accuracy_rule_sees_what_is_not_finite(bad: float) -> None:
    x = torch.tensor([1.0, -torch.inf])
    assert_accurate(x, x, x.double())
    with pytest.raises(AssertionError, match="infinities or NaN"):
        assert_accurate(torch.tensor([bad, -torch.inf]), x, x.double())
    with pytest.raises(AssertionError, match="infinities or NaN"):
        assert_accurate(torch.tensor([1.0, bad]), x, x.double())


@pytest.mark.parametrize("table", EVICT_TABLES)
@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 509])
def test_evict_tables_are_valid(table: str, n: int) -> None:
    for seed in range(5):
        evict = EVICT_TABLES[table](n, seed)
        assert evict.dtype == torch.int32 and evict.shape == (n,)
        assert TrajectoryMask.from_evict(evict).evict_at.tolist() == [evict.tolist()]
        assert torch.equal(evict, EVICT_TABLES[table](n, seed))


def test_prefix_tree_is_nested() -> None:
    """Two lifetimes are nested or apart, never crossing; and there is more than one branch."""
    evict = prefix_tree_evict(300, seed=1).tolist()
    for j, end in enumerate(evict):
        assert all(inner <= end for inner in evict[j:end])
    assert len(set(evict)) > 3


def test_mem1_trajectories_have_the_published_shape() -> None:
    for tokens, segments in MEM1_TRAJECTORIES.items():
        mask = TrajectoryLayout.from_segments(segments).mask
        assert mask.shape == (1, tokens)
    assert mask.visible_pairs() == 11_041_998  # 7.9 % of all pairs at N 11,852


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_do_not_depend_on_the_layout(layout: str) -> None:
    plain = attention_inputs(2, 9, 4, 2, 16)
    strided = attention_inputs(2, 9, 4, 2, 16, layout=layout)
    for x, y in zip(plain, strided, strict=True):
        assert torch.equal(x, y) and y.stride(-1) == 1
        assert y.is_contiguous() == (layout == "contiguous")


def test_eager_is_the_reference() -> None:
    mask = TrajectoryMask.from_evict(EVICT_TABLES["random"](70, 0))
    q, k, v = attention_inputs(2, 70, 4, 2, 16, dtype=torch.float64)
    exact = trajectory_attention(q, k, v, mask)
    assert isinstance(exact, torch.Tensor)
    torch.testing.assert_close(eager_attention(q, k, v, mask.dense()), exact)
    rows = torch.tensor([0, 3, 69])
    sample = eager_attention(q[:, rows], k, v, mask.visible(rows))
    torch.testing.assert_close(sample, exact[:, rows])


def test_poison_is_undone() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(100).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_machine_names_what_figures_depend_on() -> None:
    assert {"cpu", "cores", "threads", "python", "torch"} <= machine().keys()
