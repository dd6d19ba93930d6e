"""How far the log-probs that a rollout sampled with may be from those that the trainer recomputes."""

from __future__ import annotations

import copy
from typing import Any

import torch

from mem1.train.batches import pack, recompute_logprobs
from mem1.train.parity import Parity, parity
from mem1.trajectory import Trajectory

GATES = {torch.float32: {"max_dlogp": 5e-5}, torch.bfloat16: {"mean_dlogp": 5e-3, "kl": 1e-4}}
_OWN_ERROR = 1.2  # of two computations that are each as far from fp32, measured 0.99 to 1.03


def assert_parity(model: Any, played: list[Trajectory]) -> Parity:
    """The gates of the model's dtype. CPUs that multiply bf16 themselves round more often than those that
    widen it: there bf16 may be apart as far as its own forward is from that of the same weights in fp32.
    """
    measured, dtype = parity(model, played, played[0].regime), next(model.parameters()).dtype
    gates = GATES[dtype].copy()
    if dtype == torch.bfloat16 and measured.mean_dlogp > gates["mean_dlogp"]:
        gates["mean_dlogp"] = max(gates["mean_dlogp"], _OWN_ERROR * _rounding(model, played))
    for name, gate in gates.items():
        assert getattr(measured, name) <= gate, (measured, gates)
    return measured


def _rounding(model: Any, played: list[Trajectory]) -> float:
    """The mean difference of log-probs between the model's dtype and fp32."""
    stream = pack(played, played[0].regime, torch.device("cpu"))
    own, exact = (
        recompute_logprobs(one, stream, played[0].temperature)
        for one in (model, copy.deepcopy(model).float())
    )
    return float((own - exact).abs().mean())
