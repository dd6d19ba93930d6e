"""The processes of a training run, which compute together: one, or as many as `torchrun` has started."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

_Value = TypeVar("_Value")
_ASK_EVERY = 0.1  # seconds
_TIMEOUT = timedelta(hours=2)  # of one exchange: somebody else may still be at an environment


@dataclass(frozen=True)
class Ranks:
    """Which of them this is. Every method is called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    store: distributed.Store | None = None  # what all can read and write at any time
    group: distributed.ProcessGroup | None = None  # through which they exchange; None: the usual one

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Those of the process group that there is, or that torchrun wants; else this process alone."""
        if distributed.is_initialized() or not distributed.is_torchelastic_launched():
            return cls.current()
        store, rank, size = next(distributed.rendezvous("env://", timeout=_TIMEOUT))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        group = distributed.PrefixStore("group", store)
        distributed.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=_TIMEOUT)
        return cls(rank, size, distributed.PrefixStore("ranks", store))

    @classmethod
    def current(cls) -> Ranks:
        """Those of the process group that there is; else this process alone."""
        if not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def place(self, device: torch.device) -> torch.device:
        """This one's device of that kind."""
        if device.type != "cuda" or self.size == 1:
            return device
        mine = torch.device("cuda", distributed.get_node_local_rank())
        torch.cuda.set_device(mine)
        return mine

    def apart(self) -> Ranks:
        """The same, for a thread of each of them: what they exchange does not meet with what others do."""
        return replace(self, group=distributed.new_group(backend="gloo")) if self.size > 1 else self

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def gather(self, value: _Value) -> list[_Value]:
        """The values of all, by rank: anything that can be pickled, its tensors on the CPU."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=self.group)
        return found

    def broadcast(self, value: _Value) -> _Value:
        """The value of the first."""
        if self.size == 1:
            return value
        found: list[Any] = [value]
        distributed.broadcast_object_list(found, src=0, group=self.group)
        return found[0]

    @torch.no_grad()
    def share(self, module: nn.Module) -> None:
        """Give all the weights that the first has, in place."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                distributed.broadcast(tensor, src=0, group=self.group)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all, the same bits for each."""
        if self.size > 1:
            distributed.all_reduce(values, group=self.group)
        return values

    def done(self, what: str) -> None:
        """Let the others know, who may be `overdue`. Not called together."""
        if self.store is not None:
            self.store.add(what, 1)

    def overdue(self, what: str, seconds: float | None) -> Callable[[], bool]:
        """Says, asked again and again, whether another rank has been done with `what` for so many seconds;
        never with None, and where there is no store. Not called together.
        """
        store, asked, since = self.store, -math.inf, math.inf
        if store is None or seconds is None:
            return lambda: False

        def overdue() -> bool:
            nonlocal asked, since
            now = time.monotonic()
            if since == math.inf and now >= asked + _ASK_EVERY:
                asked = now
                since = now if store.add(what, 0) else since
            return now >= since + seconds

        return overdue

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            distributed.barrier(group=self.group)
