"""What a forward keeps in memory beside the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from mem1_core.integrations.scores import Scores

_PROBE = 16  # tokens: tensors grow with them, and so few are read in no time
# glibc maps larger blocks one by one; smaller ones come from a heap whose holes were measured to take as much
# again (12 layers, H 512: 198 MB for 105 MB of tensors, 106 with every block mapped).
_HEAP_BLOCK = 32 * 2**20


class Activations:
    """The tensors that the trunk of `model` has side by side, watched over a forward of a few tokens: what a
    layer keeps is its own code's business.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        trunk: Any = model.get_decoder()
        device = next(trunk.parameters()).device
        self._heap_block = _HEAP_BLOCK if device.type == "cpu" else 0
        ids = torch.zeros(1, _PROBE, dtype=torch.int64, device=device)
        nothing = ids.new_empty(1, 1, 0, 0, dtype=torch.bool)  # goes to the layers, which do not look at it
        settings = {"position_ids": torch.arange(_PROBE, device=device)[None], "use_cache": False}
        with torch.inference_mode(), _Allocations() as allocations:
            trunk(input_ids=ids, attention_mask=nothing, mem1_cache=_NoCache(), **settings)
        self._side_by_side = allocations.side_by_side

    def peak(self, tokens: int) -> int:
        """Bytes of a forward of so many tokens, without what attention takes for itself."""
        return max(sum(self._bytes(n * tokens // _PROBE) for n in sizes) for sizes in self._side_by_side)

    def _bytes(self, block: int) -> int:
        return 2 * block if block < self._heap_block else block


class _NoCache:
    """A LayerCache that keeps nothing."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        return value.transpose(1, 2).repeat_interleave(query.shape[1] // value.shape[1], dim=2)


class _Allocations(TorchDispatchMode):
    """The sizes of tensors made inside that were alive at once, of all moments; layers repeat themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.side_by_side: set[tuple[int, ...]] = set()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        given, made = ({s._cdata: s for s in _storages(tree)} for tree in ((args, kwargs), out))
        for key in made.keys() - given.keys() - self._alive.keys():  # a view is no new memory
            self._alive[key] = StorageWeakRef(made[key]), made[key].nbytes()
        self.side_by_side.add(tuple(sorted(nbytes for _, nbytes in self._alive.values())))
        return out


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
