"""Trajectories packed for one forward, and the log-probs that a trainer recomputes on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mem1.config import Regime
from mem1.engine.output_layer import output_layer
from mem1.trajectory import Trajectory
from mem1_core.layout import TrajectoryLayout
from mem1_core.ops import linear_logprob


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


def pack(trajectories: list[Trajectory], regime: Regime, device: torch.device | str = "cpu") -> PackedBatch:
    """One stream of all `trajectories`, laid out for `regime`."""
    return PackedBatch(
        tokens=torch.cat([t.tokens for t in trajectories]).to(device),
        layout=TrajectoryLayout.pack([t.layout(regime) for t in trajectories]).to(device),
    )


def split(trajectories: list[Trajectory], max_tokens: int, regime: Regime = "carry") -> Iterator[list[int]]:
    """Indices of the trajectories in groups of at most `max_tokens` rows of the layout of
    `regime`, which are the tokens of a forward; a longer trajectory is a group of its own. Never an empty
    group, none left out.
    """
    group: list[int] = []
    tokens = 0
    for i, trajectory in enumerate(trajectories):
        n = trajectory.layout(regime).token_index.numel()
        if group and tokens + n > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(i)
        tokens += n
    if group:
        yield group


def label_hidden(model: Any, batch: PackedBatch) -> Tensor:
    """The hidden states [M, H] from which the policy's tokens are predicted."""
    hidden = model.get_decoder()(**batch.inputs(), use_cache=False).last_hidden_state[0]
    return hidden[batch.layout.logit_rows]


@torch.no_grad()
def recompute_logprobs(model: Any, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
    """Log-probs fp32 [M] of the policy's tokens under `model`, by one forward over the batch."""
    head = output_layer(model)
    hidden, temperature = label_hidden(model, batch), head.temperature(temperature)
    return linear_logprob(
        hidden, head.weight, batch.targets, temperature, bias=head.bias, softcap=head.softcap
    )[0]
