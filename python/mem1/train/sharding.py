"""Models in parts: FSDP2 over the ranks of a run (`torch.distributed.fsdp.fully_shard`)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from mem1.checks import require
from mem1.config import TrainConfig
from mem1.models.adapters import add_adapters
from mem1.models.build import Critic, build_critic, build_value_head
from mem1.runtime.ranks import Ranks
from mem1.seeds import derive_seed
from mem1.train.batches import Policy, WithoutAdapters
from mem1.train.learner import Learner


def shard(
    module: nn.Module,
    model: Any,
    ranks: Ranks,
    *,
    compute_dtype: torch.dtype | None = None,
    replicas: int = 1,
    cpu_offload: bool = False,
) -> None:
    """Leave each rank its part of the parameters of `module`, in place; with one rank nothing is done.

    A layer is gathered for as long as it computes; what belongs to none (embedding, output layer, norm) for
    the whole of `module.forward`, in which all that uses it has to happen. model: the decoder within, of
    Hugging Face. compute_dtype: of forwards and backwards, None the parameters' own; parameters, gradients
    and what an optimiser keeps stay in theirs. replicas: of the whole, each over ranks / replicas (HSDP).

    Gradients are those of the sum of all ranks' losses.
    """
    if ranks.size == 1:
        return
    device = next(module.parameters()).device.type
    if device == "meta":  # of a plan, whose processes are none either
        device = "cpu"
    shape, names = (ranks.size,), ("shard",)
    if replicas > 1:
        shape, names = (replicas, ranks.size // replicas), ("replicate", "shard")
    settings = {
        "mesh": init_device_mesh(device, shape, mesh_dim_names=names),
        "mp_policy": MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    for layer in layers_of(module, model):
        fully_shard(layer, **settings)
    fully_shard(module, **settings)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def layers_of(module: nn.Module, model: Any) -> list[nn.Module]:
    """The layers within `module` of the decoder `model`, as that names their class."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return [one for one in module.modules() if type(one).__name__ in kinds]


@torch.no_grad()
def copy_weights(module: nn.Module, whole_one: nn.Module) -> None:
    """Give `whole_one`, a module of the same parameters in any dtype, the weights of a sharded one that
    learn. All ranks call this.
    """
    theirs = dict(whole_one.named_parameters())
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            theirs[name].copy_(whole(parameter))


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, of which each rank has a part. All ranks call this."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def freeze_embeddings(actor: Any, critic: Critic | None) -> None:
    """Those that tokens are read with."""
    for trunk in (actor, critic and critic.trunk):
        if trunk is not None:
            trunk.get_input_embeddings().requires_grad_(False)


def companions(actor: Any, config: TrainConfig) -> tuple[Critic | None, Any | None]:
    """What an actor learns with: its critic, if that has a trunk of its own, and its frozen reference, which
    an actor with adapters is itself (None). Actor and critic get their adapters here.
    """
    own = config.algorithm.name == "ppo" and config.algorithm.critic == "own"
    critic = build_critic(actor) if own else None
    if not config.lora.rank:
        wanted = config.algorithm.kl_coef > 0
        return critic, copy.deepcopy(actor).requires_grad_(False) if wanted else None
    for n, model in enumerate((actor, critic and critic.trunk)):
        if model is not None:
            add_adapters(model, config.lora, derive_seed(config.seed, "adapters", n))
    return critic, None


def sharded_learner(
    actor: Any, critic: Critic | None, reference: Any | None, config: TrainConfig, ranks: Ranks
) -> Learner:
    """What learns, with its `companions`, in parts where there are several ranks: of half precision, which
    then computes, the parts that learn are in float32. InputError for a layout that these ranks cannot have.
    """
    scale, device = config.scale, next(actor.parameters()).device.type
    wanted = scale.ranks or ranks.size
    require(wanted == ranks.size, "ranks", f"{ranks.size}, the processes that there are", wanted)
    whole_nodes = ranks.size % scale.replicas == 0
    require(whole_nodes, "replicas", f"a divisor of the {ranks.size} processes", scale.replicas)
    offloads = not scale.cpu_offload or (ranks.size > 1 and device in ("cuda", "meta"))
    require(offloads, "cpu_offload", "several processes with a GPU each", f"{ranks.size} process")
    if scale.activation_checkpointing:
        for model in (actor, critic and critic.trunk):
            if model is not None:  # renamed in transformers 5.24
                enable = getattr(model, "activation_checkpointing_enable", None)
                (enable or model.gradient_checkpointing_enable)()
    if config.algorithm.freeze_embeddings:
        freeze_embeddings(actor, critic)
    shared = config.algorithm.name == "ppo" and config.algorithm.critic == "shared"
    policy = Policy(actor, build_value_head(actor) if shared else None)
    frozen: Policy | WithoutAdapters | None = None if reference is None else Policy(reference)
    if config.lora.rank and config.algorithm.kl_coef:
        frozen = WithoutAdapters(policy)
    narrow = next(actor.parameters()).dtype
    dtype = None if narrow == torch.float32 else narrow
    parts = [(policy, actor), (frozen, reference), (critic, actor)]
    for module, model in parts if ranks.size > 1 else ():
        if isinstance(module, nn.Module):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            shard(
                *(module, model, ranks),
                compute_dtype=dtype,
                replicas=scale.replicas,
                cpu_offload=scale.cpu_offload,
            )
    rollout = config.rollout
    return Learner(policy, critic, frozen, config.algorithm, rollout.regime, rollout.temperature, ranks)
