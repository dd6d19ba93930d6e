"""Trajectories packed for one forward, and the log-probs that a trainer recomputes on it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mem1.config import Regime
from mem1.engine.output_layer import OutputLayer, output_layer
from mem1.models.adapters import adapters_off
from mem1.trajectory import Trajectory
from mem1_core.layout import TrajectoryLayout
from mem1_core.ops import linear_logprob
from mem1_core.segments import Segment

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class PackedBatch:
    """Trajectories packed for one forward: `layout` [N rows, M labels] over the concatenated `tokens`
    int64.
    """

    tokens: Tensor
    layout: TrajectoryLayout

    @property
    def counts(self) -> tuple[int, ...]:
        """Policy tokens of each trajectory; they sum to M."""
        return tuple(
            int(part.sum()) for part in self.layout.split_by_trajectory(torch.ones_like(self.targets))
        )

    @property
    def targets(self) -> Tensor:
        """int64 [M], the policy's tokens."""
        return self.tokens[self.layout.targets]

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of a decoder (or critic) whose attention is "mem1"."""
        return {
            "input_ids": self.tokens[self.layout.token_index][None],
            "position_ids": self.layout.position_ids[None],
            "mem1_mask": self.layout.mask,
        }


def pack(
    trajectories: Sequence[Trajectory], regime: Regime, device: torch.device | str = "cpu"
) -> PackedBatch:
    """One stream of all `trajectories`, laid out for `regime`; of none a token that teaches nothing, for a
    rank that has to take part all the same.
    """
    if not trajectories:
        layout = TrajectoryLayout.from_segments([Segment("prompt", 0, 1)])
        return PackedBatch(torch.zeros(1, dtype=torch.int64, device=device), layout.to(device))
    return PackedBatch(
        tokens=torch.cat([t.tokens for t in trajectories]).to(device),
        layout=TrajectoryLayout.pack([t.layout(regime) for t in trajectories]).to(device),
    )


def micro_batches(lengths: Sequence[int], max_tokens: int, ranks: int = 1) -> list[list[list[int]]]:
    """Which trajectories share a forward: for each rank a list of groups, as many for one as for another.

    lengths: rows of each (`rows`). A group has at most `max_tokens` rows, but for a longer trajectory by
    itself; groups are about equally long, and may be empty where there are more ranks than trajectories.
    Every trajectory is in one. The same lengths give the same groups.

    The longest first, each to the group that has least (Graham 1969), with as few groups as that allows.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    most = max([max_tokens, *lengths])
    count = -(-max(sum(lengths), 1) // most)
    while True:
        count += -count % ranks
        groups: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, group) for group in range(count)]
        fits = True
        for place in order:
            load, group = heapq.heappop(loads)
            groups[group].append(place)
            heapq.heappush(loads, (load + lengths[place], group))
            fits = fits and (load == 0 or load + lengths[place] <= max_tokens)
        if fits:
            break
        count += 1
    return [[sorted(group) for group in groups[rank::ranks]] for rank in range(ranks)]


def rows(trajectory: Trajectory, regime: Regime) -> int:
    """The tokens of a forward that a trajectory takes."""
    return int(trajectory.layout(regime).token_index.numel())


class Policy(nn.Module):
    """A causal language model whose forward ends in what training wants of it.

    All that needs the weight of the output layer happens inside `forward`: where the model is sharded, that
    is where a rank has it whole. value_head: of a critic that shares the trunk, [H] -> [1].
    """

    def __init__(self, model: Any, value_head: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.value_head = model, value_head

    def forward(
        self,
        stream: PackedBatch,
        finish: Callable[[Tensor, OutputLayer], _Result],
        everywhere: bool = False,
    ) -> _Result:
        """What `finish` makes of the hidden states [M, H] from which the policy's tokens are predicted, with
        `everywhere` of those of all rows [N, H], and of the output layer.
        """
        hidden = self.model.get_decoder()(**stream.inputs(), use_cache=False).last_hidden_state[0]
        chosen = hidden if everywhere else hidden[stream.layout.logit_rows]
        return finish(chosen, output_layer(self.model))


class WithoutAdapters:
    """A `Policy` as it was before its adapters learned: the frozen reference that costs no memory."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __call__(self, stream: PackedBatch, finish: Callable[[Tensor, OutputLayer], _Result]) -> _Result:
        with adapters_off(self._policy.model):
            found: _Result = self._policy(stream, finish)
        return found


@torch.no_grad()
def recompute_logprobs(policy: Any, stream: PackedBatch, temperature: float = 1.0) -> Tensor:
    """Log-probs fp32 [M] of the policy's tokens under a `Policy`, with or without its adapters, or a model,
    by one forward.
    """

    def logprobs(hidden: Tensor, head: OutputLayer) -> Tensor:
        return linear_logprob(
            *(hidden, head.weight, stream.targets, head.temperature(temperature)),
            bias=head.bias,
            softcap=head.softcap,
        )[0]

    found: Tensor = (Policy(policy) if isinstance(policy, PreTrainedModel) else policy)(stream, logprobs)
    return found
