"""What FSDP leaves of a weight outside of a forward: every public op names it, and says what to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_cache_cases import based, paged, plain
from loss_cases import OPTIONS, batch, cast, logprob_of
from torch import Tensor, distributed

from mem1_core import TrajectoryMask, ops
from mem1_core.backend import check_whole

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")


def of_attention() -> dict[str, Any]:
    q, k, v = torch.randn(3, 1, 8, 2, 16)
    return {
        "q": q,
        "k": k,
        "v": v,
        "mask": TrajectoryMask.from_evict(torch.full((1, 8), 8, dtype=torch.int32)),
    }


def of_cached_attention() -> dict[str, Any]:
    q, keys, values = torch.randn(3, 2, 4, 2, 16)
    tables = {"cache_seqlens": [4, 4], "cache_batch_idx": [1, 0], "query_lens": [4, 2]}
    own = {name: torch.tensor(x, dtype=torch.int32) for name, x in tables.items()}
    return {"q": q, "k_cache": keys, "v_cache": values, **own}


def of_logprob() -> dict[str, Any]:
    return logprob_of(cast(batch(bias=True), torch.float32)) | {"temperature": torch.ones(12)}


def of_ppo_loss() -> dict[str, Any]:
    normalizer = {"normalizer": torch.tensor(3.0), "temperature": torch.ones(12)}
    return cast(batch(bias=True) | OPTIONS["everything"] | normalizer, torch.float32)


def of_gae() -> dict[str, Any]:
    return {"reward": torch.ones(2, 3), "value": torch.ones(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)}


def of_value_loss() -> dict[str, Any]:
    return {name: torch.ones(3) for name in ("value", "old_value", "returns")} | {"mask": torch.ones(3) > 0}


ARGUMENTS: list[tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = [
    (ops.trajectory_attention, of_attention),
    (ops.cached_attention, of_cached_attention),
    (ops.prune_kv_cache_, plain),
    (ops.prune_kv_cache_, based),
    (ops.prune_paged_kv_cache_, paged),
    (
        ops.linear_logprob,
        lambda: logprob_of(cast(batch(bias=True), torch.float32)) | {"temperature": torch.ones(12)},
    ),
    (ops.fused_linear_ppo_loss, of_ppo_loss),
    (ops.gae, of_gae),
    (ops.masked_whiten, lambda: {"values": torch.ones(3), "mask": torch.ones(3) > 0}),
    (ops.clipped_value_loss, of_value_loss),
]
BY_OP = pytest.mark.parametrize(("op", "arguments"), ARGUMENTS, ids=[op.__name__ for op, _ in ARGUMENTS])
NOT_WEIGHTS = ("keep", "inv_freq")  # what a caller makes for the call


def test_every_op_is_here() -> None:
    assert {op.__name__ for op, _ in ARGUMENTS} == set(ops.__all__)
    for op, arguments in ARGUMENTS:
        assert arguments().keys() <= inspect.signature(op).parameters.keys()


def tensors_in(given: dict[str, Any]) -> list[str]:
    def some(x: Any) -> bool:
        return isinstance(x, Tensor) or (isinstance(x, (tuple, list)) and any(map(some, x)))

    return [name for name, x in given.items() if some(x) and name not in NOT_WEIGHTS]


def with_first(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`x`, or the same nest of sequences with its first tensor changed."""
    return change(x) if isinstance(x, Tensor) else [with_first(x[0], change), *x[1:]]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    meeting: Path = tmp_path_factory.mktemp("mesh") / "meeting"
    distributed.init_process_group("gloo", f"file://{meeting}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@BY_OP
def test_a_sharded_tensor_is_named(
    op: Callable[..., Any], arguments: Callable[[], dict[str, Any]], mesh: Any
) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    op(**arguments())
    for name in tensors_in(arguments()):

        def shard(x: Tensor) -> Tensor:
            return distribute_tensor(x, mesh, [Shard(0)]) if x.dim() else distribute_tensor(x, mesh)

        given = arguments()
        given[name] = with_first(given[name], shard)
        with pytest.raises(
            TypeError, match=rf"^{name}: expected a whole tensor, got a DTensor.*\.full_tensor\(\)"
        ):
            op(**given)


@BY_OP
def test_a_tensor_whose_storage_was_freed_is_named(
    op: Callable[..., Any], arguments: Callable[[], dict[str, Any]]
) -> None:
    def free(x: Tensor) -> Tensor:
        x = x.clone()
        x.untyped_storage().resize_(0)
        return x

    for name in tensors_in(arguments()):
        given = arguments()
        given[name] = with_first(given[name], free)
        with pytest.raises(
            ValueError, match=rf"^{name}: expected a tensor in memory, .*freed.*\.full_tensor\(\)"
        ):
            op(**given)


def test_what_has_no_storage_of_its_own_passes() -> None:
    check_whole(
        x=torch.empty(0, 3), y=None, z=1.0, meta=torch.empty(3, device="meta"), nested=[(torch.ones(1),)]
    )
    torch.func.vmap(lambda x: check_whole(x=x) or x)(torch.ones(3))
    sparse = torch.ones(2, 2).to_sparse()
    check_whole(sparse=sparse)


def test_a_weight_under_fsdp(mesh: Any) -> None:
    """Sharded, it is refused; as the remedy says, it works."""
    from torch.distributed.fsdp import fully_shard

    head = torch.nn.Linear(8, 16, bias=False)
    fully_shard(head, mesh=mesh)
    hidden, target = torch.randn(4, 8), torch.arange(4)
    with pytest.raises(TypeError, match="^weight: expected a whole tensor, got a DTensor of torch.float32"):
        ops.linear_logprob(hidden, head.weight, target)
    logprob, _ = ops.linear_logprob(hidden, head.weight.full_tensor(), target)
    logprob.sum().backward()
    assert head.weight.grad is not None and logprob.isfinite().all()
