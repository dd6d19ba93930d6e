"""The critic of an actor of any family."""

from __future__ import annotations

import pytest
import torch
from small_families import build

from mem1.engine.policy_checks import check_policy
from mem1.models.build import build_critic
from mem1_core.integrations.transformers import register
from mem1_core.mask import TrajectoryMask

IDS = torch.tensor([[5, 9, 3, 7, 2, 8]])
MASK = TrajectoryMask.from_evict(torch.tensor([3, 6, 6, 6, 6, 6]))
INPUTS = {"input_ids": IDS, "position_ids": torch.arange(6)[None], "mem1_mask": MASK}


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "llama", "mistral", "phi3", "olmo2", "gemma", "gpt_neox", "gpt2"]
)
def test_a_critic_reads_what_its_actor_reads(family):
    register()
    actor = build(family, "mem1")
    check_policy(actor)
    for parameter in actor.parameters():
        parameter.requires_grad_(False)
    critic = build_critic(actor)
    assert all(parameter.requires_grad for parameter in critic.parameters())
    assert not critic(**INPUTS).any()  # at first it says 0
    with torch.no_grad():
        critic.head.weight.copy_(actor.get_output_embeddings().weight[4:5])
    values = critic(**INPUTS)
    logits = actor(**INPUTS, use_cache=False).logits[..., 4]
    torch.testing.assert_close(values.detach(), logits, atol=1e-4, rtol=1e-4)
    values.sum().backward()
    assert not any(parameter.grad is not None for parameter in actor.parameters())
    assert critic.trunk.get_input_embeddings().weight.grad.any()


def test_a_critic_has_weights_of_its_own_in_the_dtype_of_the_actor():
    register()
    actor = build("gpt2", "mem1").to(torch.bfloat16)  # whose embedding is its output layer
    critic = build_critic(actor)
    assert {parameter.dtype for parameter in critic.parameters()} == {torch.bfloat16}
    theirs = {parameter.data_ptr() for parameter in actor.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in critic.parameters()}
    assert critic(**INPUTS).dtype == torch.bfloat16


def test_a_projected_output_has_a_width_of_its_own():
    """OPT's trunk returns states of another width than its layers have."""
    register()
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96, "vocab_size": 96}
    config = OPTConfig(hidden_size=64, word_embed_proj_dim=32, attn_implementation="mem1", **sizes)
    actor = OPTForCausalLM(config).eval()
    critic = build_critic(actor)
    assert critic.head.in_features == 32 and critic(**INPUTS).shape == (1, 6)
