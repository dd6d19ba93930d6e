"""The plan of a run against what small runs were measured to take."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from checkout import ROOT

from mem1.checks import InputError
from mem1.cli import main
from mem1.config import AlgorithmConfig, LoraConfig, ModelConfig, RolloutConfig, ScaleConfig, TrainConfig
from mem1.config_files import made, read, typed
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.models.build import build_model
from mem1.models.memory_plan import weights_bytes
from mem1.rollout.rollout_loop import rollout
from mem1.runtime.ranks import Ranks
from mem1.train import checkpoint
from mem1.train import plan as planned
from mem1.train.batches import pack
from mem1.train.flops import Work, flops
from mem1.train.plan import Kept, plan
from mem1.train.sharding import companions, sharded_learner

RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.yaml"))
SMALL = TrainConfig(
    device="cpu",
    batch_size=12,
    model=ModelConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=96),
    rollout=RolloutConfig(max_turns=5, max_action_tokens=24, max_prompt_tokens=64, max_info_tokens=32),
    algorithm=AlgorithmConfig(max_tokens_per_micro_batch=512, mini_batch_size=12, critic_only_updates=0),
)


@pytest.fixture(scope="module")
def played(tokenizer):
    model = build_model(tokenizer, SMALL.model)
    make = partial(MultiHopEnv, 2)
    return list(rollout(model, tokenizer, make, range(SMALL.batch_size), SMALL.rollout))


def kept_bytes(learner, trajectories, regime) -> int:
    """What the trunk really keeps of a forward for its backward, but for weights."""
    stream = pack(trajectories, regime)
    weights = {p.untyped_storage().data_ptr() for p in learner.actor.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner.policy(stream, lambda hidden, head: hidden.sum())
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("regime", ["carry", "reencode"])
def test_tokens_and_memory_are_those_that_a_run_takes(tokenizer, played, regime):
    config = replace(SMALL, rollout=replace(SMALL.rollout, regime=regime))
    found = plan(config, played)
    rows = {each: pack(played, each).layout.token_index.numel() for each in ("carry", "reencode")}
    contexts = 0
    for trajectory in played:  # a turn's row: what its last token saw, itself included
        seen = trajectory.mask.dense()[0].sum(-1)
        turns = torch.tensor([s.turn for s in trajectory.segments]).repeat_interleave(
            torch.tensor([s.length for s in trajectory.segments])
        )
        written = trajectory.policy_mask
        for turn in turns[written].unique():
            contexts += int(seen[written & (turns == turn)][-1])
    assert found.tokens == (rows["carry"], rows["reencode"], contexts)

    model = build_model(tokenizer, config.model)
    assert found.parameters == model.num_parameters()
    learner = sharded_learner(model, *companions(model, config), config, Ranks())
    before = sum(weights_bytes(m) for m in (learner.policy, learner.critic, learner.reference))
    assert found.memory["weights"] == before
    metrics = learner.update(played)
    states = sum(
        value.nbytes
        for optimizer in learner.optimizers.values()
        for state in optimizer.inner.state.values()
        for name, value in state.items()
        if name != "step"
    )
    trained = [m for o in learner.optimizers.values() for m in o.masters]
    assert found.memory["optimizer states"] == states == 2 * sum(m.nbytes for m in trained)
    assert found.memory["gradients"] == sum(m.nbytes for m in trained)
    assert found.flops == pytest.approx(metrics["update_flops"], rel=1e-9)
    # The forward of a micro-batch as large as the plan's: rows of other trajectories count the same.
    stream_rows = pack(played[:3], regime).layout.token_index.numel()
    expected = Kept(build_model(tokenizer, config.model)).bytes(stream_rows)
    assert kept_bytes(learner, played[:3], regime) == pytest.approx(expected, rel=0.1)


def test_checkpointed_layers_keep_less(tokenizer, played):
    model = build_model(tokenizer, replace(SMALL.model, num_hidden_layers=6))
    kept = Kept(model)
    whole, less = kept.bytes(1000), kept.bytes(1000, checkpointing=True)
    assert less < 0.35 * whole
    config = replace(SMALL, scale=ScaleConfig(activation_checkpointing=True))
    learner = sharded_learner(model, *companions(model, config), config, Ranks())
    learner._without_dropout()
    rows = pack(played, "carry").layout.token_index.numel()
    inputs = kept.bytes(rows, checkpointing=True) - kept._all // 6 * rows // 16
    assert kept_bytes(learner, played, "carry") == pytest.approx(inputs, rel=0.35)


def test_operations_of_a_forward(tokenizer):
    """Counted by torch, of a model with eager attention, which computes all pairs."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build_model(tokenizer, SMALL.model)
    model.set_attn_implementation("eager")
    n = 64
    ids = torch.zeros(1, n, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    every_pair = Work(n, n * n, n)
    whole = flops(model.model, every_pair, model.lm_head)
    assert whole.forward == counter.get_total_flops() and whole.backward == 2 * whole.forward
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    # What goes into the first layer needs no gradient but the embedding's, which is no product.
    assert sum(whole) == pytest.approx(counter.get_total_flops(), rel=0.03)
    model.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    assert flops(model.model, Work(8, 0, 0)).backward == flops(model.model, Work(8, 0, 0)).forward


def test_operations_of_an_update(tokenizer):
    """Forwards and backwards of each kind, as they are made."""
    work = Work(100, 1000, 50)

    def of(**settings):
        config = replace(SMALL, algorithm=replace(SMALL.algorithm, **settings))
        model = build_model(tokenizer, SMALL.model)
        learner = sharded_learner(model, *companions(model, config), config, Ranks())
        policy, value = flops(model.model, work, model.lm_head), flops(model.model, work)
        return learner, policy.forward, value.forward

    learner, policy, value = of()
    assert learner.update_flops(work) == policy * (1 + 1 + 3) + value * (1 + 3)
    assert learner.update_flops(work, train_actor=False) == policy * (1 + 1) + value * (1 + 3)
    learner, policy, value = of(kl_coef=0.0, epochs=2)
    assert learner.update_flops(work) == policy * (1 + 6) + value * (1 + 6)
    learner, policy, value = of(critic="shared")
    assert learner.update_flops(work) == policy * (1 + 1 + 3) + value
    assert learner.update_flops(work, train_actor=False) == policy * (1 + 1) + value * (1 + 1)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_can_be_planned_without_their_models(name, capsys):
    assert main(["plan", str(ROOT / "recipes" / name), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["slots"] > 0 and found["total_bytes"] <= 141e9
    tokens = found["tokens"]
    assert tokens["one_copy"] < tokens["blocks"] < tokens["per_turn_rows"]


def test_a_dry_run_builds_the_shards_of_a_model_that_is_not_here(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "recipes" / "qwen2.5-7b-qa.yaml")
    made_of = []
    build = planned.sharded_learner
    monkeypatch.setattr(
        planned, "sharded_learner", lambda *given: made_of.append(build(*given)) or made_of[-1]
    )
    assert main(["train", recipe, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "Qwen/Qwen2.5-7B: 7,615,616,512 parameters, 4 GPUs" in said and "  fits in 141 GB" in said
    (learner,) = made_of
    parts = [*learner.policy.parameters()]
    assert all(p.is_meta and type(p).__name__ == "DTensor" for p in parts)
    assert sum(p.to_local().numel() for p in parts) * 4 == pytest.approx(7_615_616_512, rel=1e-3)
    assert not torch.distributed.is_initialized() and not list(tmp_path.iterdir())
    assert main(["train", recipe, "--dry-run", "--scale.gpu_memory=80"]) == 0
    assert "does not fit in 80.0 GB" in capsys.readouterr().out
    assert main(["train", recipe, "--dry-run", "--scale.gpu_memory=80", "--scale.cpu_offload=true"]) == 0
    assert "in the host's memory" in (said := capsys.readouterr().out) and "  fits in 80.0 GB" in said


def test_more_ranks_take_less_each():
    one, four = (
        plan(replace(SMALL, model=replace(SMALL.model, vocab_size=1024), scale=ScaleConfig(ranks=ranks)))
        for ranks in (1, 4)
    )
    for part in ("optimizer states", "gradients", "weights"):
        assert 0.25 <= four.memory[part] / one.memory[part] < 0.27
    assert four.memory["rollout copy"] * 3 < one.memory["weights"] * 1.1 and four.slots == 3
    assert four.seconds == pytest.approx(one.seconds / 4)


def test_adapters_take_less():
    settings = typed(read(ROOT / "recipes" / "qwen2.5-1.5b-lora-qa.yaml"))
    adapted = made(settings)
    small, full = plan(adapted), plan(replace(adapted, lora=LoraConfig()))
    assert small.memory["optimizer states"] < 0.1 * full.memory["optimizer states"]
    assert small.memory["weights"] < 0.75 * full.memory["weights"], "the reference is the actor itself"
    # Of weights that do not learn half of the backward, a third of what an epoch costs; attention costs all.
    assert 0.75 < small.flops / full.flops < 0.9


def test_a_plan_with_adapters_has_what_they_take(tokenizer, played):
    config = replace(
        SMALL,
        init="x",
        lora=LoraConfig(rank=4),
        model=replace(SMALL.model, vocab_size=len(tokenizer), dtype="bfloat16"),
    )
    found = plan(config, played)
    model = build_model(tokenizer, config.model)
    learner = sharded_learner(model, *companions(model, config), config, Ranks())
    assert found.memory["weights"] == weights_bytes(learner.policy) + weights_bytes(learner.critic)
    trained = [m for o in learner.optimizers.values() for m in o.masters]
    narrow = [p for p in learner.critic.head.parameters()]
    masters = sum(4 * p.numel() for p in narrow)
    assert found.memory["optimizer states"] == 2 * sum(m.nbytes for m in trained) + masters
    rows = pack(played[:3], "carry").layout.token_index.numel()
    expected = Kept(model).bytes(rows)
    assert kept_bytes(learner, played[:3], "carry") == pytest.approx(expected, rel=0.15)


def test_a_model_that_is_here_is_planned_as_it_is(tokenizer, tmp_path, capsys):
    """In a process of its own, where nobody has made attention known yet."""
    model = build_model(tokenizer, replace(SMALL.model, dtype="bfloat16"))
    path = checkpoint.save(tmp_path / "model", model, tokenizer)
    command = [sys.executable, "-m", "mem1", "train", "--model", str(path), "--dry-run", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{model.num_parameters():,} parameters, 1 GPU" in done.stdout


@pytest.mark.parametrize(
    ("config", "how", "message"),
    [
        (TrainConfig(init="no/model"), {}, "init: expected a model on this machine, or its shape"),
        (SMALL, {"mfu": 1.5}, "mfu: expected a number > 0 and <= 1, got 1.5"),
    ],
)
def test_what_cannot_be_planned(config, how, message):
    with pytest.raises(InputError, match=message):
        plan(config, **how)


def test_a_plan_of_played_episodes(tmp_path, played, capsys):
    path = tmp_path / "played.jsonl"
    path.write_text("".join(t.to_json() + "\n" for t in played))
    assert main(["plan", str(ROOT / "recipes" / "small.yaml"), "--trajectories", str(path)]) == 0
    assert (
        f"one copy{round(64 / 12 * pack(played, 'carry').layout.token_index.numel()):>26,}"
        in capsys.readouterr().out
    )
    path.write_text("")
    assert main(["plan", str(ROOT / "recipes" / "small.yaml"), "--trajectories", str(path)]) == 2
    assert "trajectories: expected a file with trajectories" in capsys.readouterr().err
