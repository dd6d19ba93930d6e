"""A program: one rank of some. It takes an update on trajectories of a file, in each of `CASES`.

    python sharded_step.py TRAJECTORIES STORE OUT RANK SIZE

Rank 0 writes to OUT, for each case, the metrics, all gradients of the first step and the weights after the
update; whole, whatever was sharded.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from mem1.config import AlgorithmConfig, LoraConfig, ModelConfig
from mem1.envs.toy.tokenizer import build_tokenizer
from mem1.models.adapters import add_adapters
from mem1.models.build import build_critic, build_model, build_value_head
from mem1.runtime.ranks import Ranks
from mem1.train.batches import Policy, WithoutAdapters
from mem1.train.learner import Learner
from mem1.train.optim import AdamW
from mem1.train.sharding import freeze_embeddings, shard, whole
from mem1.trajectory import Trajectory

MODEL = ModelConfig(
    num_hidden_layers=2, hidden_size=64, intermediate_size=128, initializer_range=0.1, look_back=0.0
)


class Case(NamedTuple):
    algorithm: str
    max_tokens: int  # of a micro-batch
    checkpointing: bool = False
    regime: str = "carry"
    tied: bool = True
    replicas: int = 1
    frozen: bool = False
    shared: bool = False  # the critic's trunk
    rank: int = 0  # of adapters


CASES = (
    Case("ppo", 10**6),
    Case("ppo", 150),
    Case("ppo", 1, checkpointing=True),
    Case("ppo", 400, regime="reencode", tied=False),
    Case("ppo", 150, replicas=2),
    Case("ppo", 150, regime="reencode", frozen=True),
    Case("ppo", 150, shared=True),
    Case("ppo", 150, rank=4),
    Case("grpo", 10**6),
    Case("grpo", 150, checkpointing=True),
    Case("grpo", 1),
)


def settings(case: Case) -> AlgorithmConfig:
    return AlgorithmConfig(
        name=case.algorithm,  # type: ignore[arg-type]
        critic="shared" if case.shared else "own",
        kl_coef=0.05,
        kl_placement="reward" if case.algorithm == "ppo" else "loss",
        entropy_coef=0.01,
        dual_clip=3.0,
        clip_high=0.28,
        state_weight=0.5,
        critic_only_updates=0,
        mini_batch_size=6,
        max_tokens_per_micro_batch=case.max_tokens,
        actor_lr=1e-3,
        critic_lr=1e-3,
    )


def update(case: Case, trajectories: list[Trajectory], ranks: Ranks) -> dict[str, Any]:
    actor: Any = build_model(build_tokenizer(), replace(MODEL, tie_word_embeddings=case.tied), 3)
    config = settings(case)
    critic = build_critic(actor) if case.algorithm == "ppo" and not case.shared else None
    reference = Policy(copy.deepcopy(actor).requires_grad_(False))
    with torch.no_grad():  # away from the reference and from the sampler
        for n, parameter in enumerate(actor.parameters()):
            parameter.mul_(1.0 + 0.01 * (n % 3))
        if critic is not None:
            critic.head.weight.fill_(0.02)
    if case.frozen:
        freeze_embeddings(actor, critic)
    if case.checkpointing:
        actor.gradient_checkpointing_enable()
    policy = Policy(actor, build_value_head(actor) if case.shared else None)
    if case.shared:
        torch.nn.init.constant_(policy.value_head.weight, 0.02)  # type: ignore[union-attr, arg-type]
    without: Any = reference
    if case.rank:
        for n, model in enumerate((actor, critic and critic.trunk)):
            if model is not None:
                add_adapters(model, LoraConfig(rank=case.rank), n)
                for name, parameter in model.named_parameters():
                    if ".lora_B" in name:
                        torch.nn.init.constant_(parameter, 0.01)
        without = WithoutAdapters(policy)
    for module, model in ((policy, actor), (reference, reference.model), (critic, critic and critic.trunk)):
        if module is not None:
            shard(module, model, ranks, replicas=min(case.replicas, ranks.size))
    learner = Learner(policy, critic, without, config, case.regime, ranks=ranks)  # type: ignore[arg-type]
    batch, metrics = learner.prepare(trajectories)
    # What was sampled is what the policy was before it moved: ratios are not 1, some are clipped.
    for experience in batch:
        experience.old_logprob = experience.trajectory.logprobs[experience.trajectory.policy_mask]
    gradients = first_gradients(learner)
    metrics |= learner.learn(batch, torch.Generator().manual_seed(0))
    models: dict[str, nn.Module] = {"actor": policy} | ({} if critic is None else {"critic": critic})
    weights = {
        f"{name}.{key}": whole(p.detach()) for name, m in models.items() for key, p in m.named_parameters()
    }
    return {"metrics": metrics, "gradients": gradients, "weights": weights}


def first_gradients(learner: Learner) -> dict[str, Tensor]:
    """Filled when the first step is taken."""
    found: dict[str, Tensor] = {}
    for name, optimizer in learner.optimizers.items():
        take = optimizer.step

        def step(rate: float, name: str = name, optimizer: AdamW = optimizer, take: Any = take) -> float:
            if f"{name}.0" not in found:
                gradients = [master.grad for master in optimizer.masters if master.grad is not None]
                found.update({f"{name}.{n}": whole(g).clone() for n, g in enumerate(gradients)})
            return float(take(rate))

        optimizer.step = step  # type: ignore[method-assign]
    return found


def main() -> None:
    source, store, out, rank, size = sys.argv[1:]
    torch.set_num_threads(1)
    ranks = Ranks()
    if int(size) > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size)
        )
        ranks = Ranks.join(torch.device("cpu"))
    trajectories = [Trajectory.from_dict(json.loads(line)) for line in Path(source).read_text().splitlines()]
    results = [update(case, trajectories, ranks) for case in CASES]
    if ranks.first:
        torch.save(results, out)
    if int(size) > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
