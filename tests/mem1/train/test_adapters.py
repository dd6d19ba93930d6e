"""LoRA: what learns, what the reference is, what is saved, and a run that goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("peft")

from mem1.checks import InputError
from mem1.config import AlgorithmConfig, LoraConfig, RolloutConfig, TrainConfig
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.training import toy_training
from mem1.models.adapters import adapted_layers, adapters_off, add_adapters, merged_weights
from mem1.rollout.rollout_loop import rollout
from mem1.runtime.progress import Progress
from mem1.runtime.ranks import Ranks
from mem1.train import checkpoint
from mem1.train.batches import WithoutAdapters, pack, recompute_logprobs
from mem1.train.sharding import companions, sharded_learner
from mem1.train.train_loop import train

LORA = LoraConfig(rank=4, alpha=16)
CONFIG = TrainConfig(
    init="given below",
    max_updates=3,
    batch_size=6,
    save_every=1,
    environment={"objectives": 1},
    lora=LORA,
    rollout=RolloutConfig(num_slots=6, max_turns=3, max_action_tokens=16, max_prompt_tokens=64),
    algorithm=AlgorithmConfig(mini_batch_size=3, actor_lr=1e-2, critic_only_updates=0, kl_coef=0.1),
)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def learner(request, make_model):
    model = make_model(dtype=request.param)
    return sharded_learner(model, *companions(model, CONFIG), CONFIG, Ranks())


@pytest.fixture
def played(learner, tokenizer):
    make = partial(MultiHopEnv, 1)
    return list(rollout(learner.actor.eval(), tokenizer, make, range(6), CONFIG.rollout))


def test_only_adapters_learn_and_the_reference_is_the_model_without_them(learner, played, tokenizer):
    before = {name: p.detach().clone() for name, p in learner.policy.named_parameters()}
    stream = pack(played, "carry")
    first = recompute_logprobs(learner.policy, stream)
    assert isinstance(learner.reference, WithoutAdapters)
    assert torch.equal(recompute_logprobs(learner.reference, stream), first), "B is zero at first"
    metrics = learner.update(played)
    assert metrics["kl_reference"] == 0.0 and metrics["actor_grad_norm"] > 0
    changed = {name for name, p in learner.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".lora_" in name for name in changed)
    assert {p.dtype for name, p in learner.policy.named_parameters() if ".lora_" in name} == {torch.float32}
    assert not torch.equal(recompute_logprobs(learner.policy, stream), first)
    assert torch.equal(recompute_logprobs(learner.reference, stream), first)
    assert learner.update(played)["kl_reference"] > 0
    critic = {name for name, p in learner.critic.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith("head.") for name in critic) and len(critic) > 2


def test_sampled_and_recomputed_log_probs_agree_once_adapters_have_learned(make_model, tokenizer):
    model = make_model()
    learner = sharded_learner(model, *companions(model, CONFIG), CONFIG, Ranks())
    make = partial(MultiHopEnv, 1)
    for update in range(2):
        played = list(rollout(model.eval(), tokenizer, make, range(6), CONFIG.rollout))
        assert learner.update(played)["dlogp_max"] < 5e-5, update


def test_merged_weights_are_the_same_function(learner, played, make_model):
    learner.update(played)
    stream = pack(played, "carry")
    expected = recompute_logprobs(learner.policy, stream)
    merged = make_model(dtype=next(learner.actor.parameters()).dtype)
    assert not torch.allclose(recompute_logprobs(merged, stream), expected, atol=1e-3)
    merged.load_state_dict(merged_weights(learner.actor))
    tolerance = 1e-4 if merged.dtype == torch.float32 else 0.2
    torch.testing.assert_close(recompute_logprobs(merged, stream), expected, atol=tolerance, rtol=0)


def test_switched_off_is_switched_on_again_also_after_an_error(make_model):
    model = make_model()
    add_adapters(model, LORA, 0)
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        assert all(layer.disable_adapters for layer in adapted_layers(model).values())
        1 / 0  # noqa: B018
    assert not any(layer.disable_adapters for layer in adapted_layers(model).values())
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())


def test_the_seed_decides_and_names_of_layers_choose(make_model):
    def drawn(seed, **settings):
        model = make_model()
        state = torch.random.get_rng_state()
        add_adapters(model, replace(LORA, **settings), seed)
        assert torch.equal(torch.random.get_rng_state(), state), "nobody else's numbers"
        return {name: p for name, p in model.named_parameters() if ".lora_A" in name}

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert one.keys() == other.keys() and len(one) == 3 * 7
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    some = drawn(1, target_modules=("q_proj", "o_proj"))
    assert {name.split(".")[-4] for name in some} == {"q_proj", "o_proj"}
    with pytest.raises(InputError, match="lora.target_modules: expected layers of the model, got .*c_attn"):
        drawn(1, target_modules=("c_attn",))
    with pytest.raises(InputError, match="lora.target_modules: expected layers of the model, got '[*]'"):
        drawn(1, target_modules="*")
    with pytest.raises(InputError, match="lora.target_modules: expected no output layer among them"):
        drawn(1, target_modules=("lm_head", "q_proj"))


def test_a_run_goes_on_to_the_bit_and_any_tool_loads_what_it_saved(tmp_path, tokenizer, make_model):
    config = replace(CONFIG, init=str(checkpoint.save(tmp_path / "init", make_model(), tokenizer)))
    given = toy_training(config) | {"progress": Progress(log=lambda line: None)}
    train(config, tmp_path / "whole", **given)
    train(replace(config, max_updates=1), tmp_path / "parts", **given)
    train(config, tmp_path / "parts", **given, resume=True)
    runs = []
    for name in ("whole", "parts"):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        records = [{key: value for key, value in line.items() if "second" not in key} for line in lines]
        loaded = checkpoint.load(tmp_path / name)
        assert not adapted_layers(loaded.model)
        runs.append((records, loaded.model.state_dict()))
    (records, weights), (again, same) = runs
    assert records == again and len(records) == 3
    with pytest.raises(InputError, match="init: expected the weights that the adapters were made for"):
        shutil.rmtree(tmp_path / "init")
        checkpoint.save(tmp_path / "init", make_model(seed=1), tokenizer)
        train(replace(config, max_updates=4), tmp_path / "parts", **given, resume=True)
    start = make_model().state_dict()
    assert weights.keys() == start.keys() and all(torch.equal(weights[name], same[name]) for name in weights)
    moved = {name for name in weights if not torch.equal(weights[name], start[name])}
    assert moved and all(name.endswith("proj.weight") for name in moved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "rank: expected an integer >= 0, got -1"),
        ({"alpha": 0.0}, "alpha: expected a finite number > 0, got 0.0"),
        ({"target_modules": ()}, "target_modules: expected 'all-linear' or names"),
        ({"target_modules": (3,)}, "target_modules: expected 'all-linear' or names"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        LoraConfig(**settings)


def test_random_weights_are_nothing_to_adapt():
    with pytest.raises(InputError, match="lora.rank: expected 0 without init"):
        TrainConfig(lora=LORA)
