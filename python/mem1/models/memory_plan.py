"""What a rollout will take of the memory, before it starts: how many slots fit beside a model."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mem1.checks import InputError, require
from mem1.engine.cpu_products import product_bytes
from mem1.engine.engine import forward_tokens, reserved_tokens, sampling_bytes
from mem1.models.activations import Activations
from mem1.models.free_memory import free_memory, resident_bytes
from mem1_core.integrations.transformers import cache_shape


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a rollout, on the device of its model."""

    num_slots: int
    capacity: int  # tokens that a slot has room for
    slot_bytes: int
    weights_bytes: int
    forward_bytes: int  # activations of the largest forward
    sampling_bytes: int  # logits and their temporaries
    free_bytes: int  # beside what is there, before anything is reserved
    reserved_bytes: int  # for others, who have not taken it yet
    process_bytes: int  # of the host: the program, beside the weights; 0 for a CUDA device

    @property
    def kv_bytes(self) -> int:
        return self.num_slots * self.slot_bytes

    @property
    def working_bytes(self) -> int:
        """What a step takes for itself: it samples when the forward is over."""
        return max(self.forward_bytes, self.sampling_bytes)

    @property
    def total_bytes(self) -> int:
        held = self.process_bytes + self.weights_bytes + self.reserved_bytes
        return held + self.kv_bytes + self.working_bytes

    def __str__(self) -> str:
        slots = f"{self.num_slots} slot{'s' * (self.num_slots > 1)} of {self.capacity:,} tokens"
        parts = f"{size(self.weights_bytes)} weights, {size(self.kv_bytes)} KV cache ({slots}, "
        parts += f"{size(self.slot_bytes)} each), {size(self.working_bytes)} to work in"
        parts += f", {size(self.reserved_bytes)} for training" if self.reserved_bytes else ""
        parts += f", {size(self.process_bytes)} program" if self.process_bytes else ""
        return f"memory {size(self.total_bytes)}: {parts}; {size(self.free_bytes)} were free"


def plan_memory(
    model: PreTrainedModel,
    capacity: int,
    num_slots: int,
    kv_memory: float | int = 0.9,
    max_num_batched_tokens: int = 4096,
    reserved_bytes: int = 0,
) -> MemoryPlan:
    """How many slots an engine for `model` can have: `num_slots`, or as many as fit.

    kv_memory: what the KV cache may take, a fraction (float, up to 1.0) of what is free beside the model and
    the working memory, or a number of bytes (int). reserved_bytes: of what is free, for others: the gradients
    and moments of a training run. Raises InputError for anything else, and if not even one slot fits.
    """
    require(capacity >= 1, "capacity", "an integer >= 1", capacity)
    require(num_slots >= 1, "num_slots", "an integer >= 1", num_slots)
    fraction = isinstance(kv_memory, float) and 0 < kv_memory <= 1
    if not fraction and not (type(kv_memory) is int and kv_memory >= 1):
        expected = "expected a fraction > 0 and <= 1.0 or an integer of bytes"
        raise InputError(f"kv_memory: {expected}, got {kv_memory!r}")
    head: Tensor = cast(Any, model.get_output_embeddings()).weight
    slot = slot_bytes(model, capacity, head.device)
    trunk: nn.Module = cast(Any, model.get_decoder())
    weights, free, activations = weights_bytes(model), free_memory(head.device), Activations(model)
    process = max(0, resident_bytes() - weights) if head.device.type == "cpu" else 0

    def plan(slots: int) -> MemoryPlan:
        tokens = forward_tokens(slots, capacity, max_num_batched_tokens)
        forward = activations.peak(tokens) + product_bytes(trunk, tokens)
        sampling = sampling_bytes(head, slots)
        return MemoryPlan(slots, capacity, slot, weights, forward, sampling, free, reserved_bytes, process)

    def budget(planned: MemoryPlan) -> int:
        left = max(0, free - reserved_bytes - planned.working_bytes)
        return int(kv_memory * left) if fraction else min(int(kv_memory), left)

    plans = [plan(slots) for slots in range(1, num_slots + 1)]
    fitting = bisect_left(plans, True, key=lambda planned: planned.kv_bytes > budget(planned))
    if fitting == 0:
        needs = f"{size(slot)} for a slot of {capacity:,} tokens"
        got = f"{kv_memory!r}, {size(budget(plans[0]))}"
        beside = f"{size(free)} are free, {size(min(free, plans[0].working_bytes))} of them to work in"
        beside += f" and {size(reserved_bytes)} for training" if reserved_bytes else ""
        raise InputError(f"kv_memory: expected at least {needs}, got {got} ({beside})")
    return plans[fitting - 1]


def slot_bytes(model: PreTrainedModel, capacity: int, device: torch.device) -> int:
    """Keys and values of a slot for so many tokens, in an engine of `model` on `device`."""
    layers, kv_heads, head_dim = cache_shape(model.config)
    element = next(model.parameters()).element_size()
    return int(2 * layers * reserved_tokens(capacity, device) * kv_heads * head_dim * element)


def weights_bytes(model: nn.Module) -> int:
    """Of its parameters; shared ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def size(count: int) -> str:
    """Bytes as people say them, "1.2 GB"."""
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= step:
            return f"{count / step:.{0 if count >= 100 * step else 1}f} {unit}"
    return f"{count} B"
