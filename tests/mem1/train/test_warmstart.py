from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tokenizers import SMALL as SMALL_TOKENIZERS
from torch import Tensor
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from mem1.checks import InputError
from mem1.config import AlgorithmConfig, ModelConfig, RolloutConfig, TrainConfig, WarmStartConfig
from mem1.envs.base import Action, Example, ExpertAction
from mem1.envs.toy.curriculum import Curriculum
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.training import toy_training
from mem1.io import append_json
from mem1.models.build import build_critic, build_model
from mem1.rollout.rollout_loop import play_expert
from mem1.runtime.progress import Progress
from mem1.train import checkpoint, train_loop
from mem1.train.run_folder import METRICS
from mem1.train.train_loop import train
from mem1.train.warmstart import (
    draw_batch,
    expert_examples,
    label_logprobs,
    optimizer_for,
    rate_factor,
    warm_start,
)
from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TrajectoryMask
from mem1_core.segments import Segment, policy_tokens

SMALL = ModelConfig(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64
)
SHORT = WarmStartConfig(steps=12, batch_tokens=256, warmup_steps=2)


@pytest.fixture
def draw(tokenizer: PreTrainedTokenizerFast) -> Curriculum:
    return Curriculum(tokenizer.get_vocab(), {"objectives": (1, 2)})


def test_loss_falls(tokenizer: PreTrainedTokenizerFast, draw: Curriculum) -> None:
    model = build_model(tokenizer, SMALL)
    records = list(warm_start(model, replace(SHORT, steps=50), draw))
    losses = [record["loss"] for record in records]
    assert [record["step"] for record in records] == list(range(1, 51))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert not model.training
    assert list(warm_start(model, replace(SHORT, steps=0), draw)) == []


def test_the_seed_and_the_step_decide(tokenizer: PreTrainedTokenizerFast, draw: Curriculum) -> None:
    def losses(seed: int, stop: int = SHORT.steps) -> list[float]:
        """Of a run that is stopped after `stop` steps and goes on."""
        model = build_model(tokenizer, SMALL)
        optimizer = optimizer_for(model, SHORT)
        first = list(islice(warm_start(model, SHORT, draw, seed=seed, optimizer=optimizer), stop))
        rest = warm_start(model, SHORT, draw, seed=seed, optimizer=optimizer, done=stop)
        return [record["loss"] for record in (*first, *rest)]

    assert losses(3) == losses(3) == losses(3, stop=5)
    assert losses(3)[0] != losses(4)[0]


def test_schedule() -> None:
    config = WarmStartConfig(steps=100, warmup_steps=10)
    factors = [rate_factor(step, step / 100, config) for step in range(101)]
    assert factors[0] == 0.1 and factors[10:51] == [1.0] * 41
    assert factors[-1] == pytest.approx(0.02)
    assert factors[50:] == sorted(factors[50:], reverse=True)


def test_curriculum(tokenizer: PreTrainedTokenizerFast) -> None:
    draw = Curriculum(tokenizer.get_vocab(), {"objectives": (1, 4), "hops": 2}, "action", 0.4)
    for progress, most, share in ((0.0, 1, 0.4), (0.25, 3, 0.25), (0.5, 4, 0.1), (1.0, 4, 0.1)):
        batch = draw_batch(draw, random.Random(0), progress, 40_000)
        expert = [e for e in batch if e.prune == "action"]
        assert 1 - len(expert) / len(batch) == pytest.approx(share, abs=0.06)
        turns = {e.segments[-1].turn for e in expert}
        assert turns == {1 + 2 * k for k in range(1, most + 1)}


def test_a_curriculum_begins_with_what_is_easy(tokenizer: PreTrainedTokenizerFast) -> None:
    world = {"objectives": 1, "hops": (1, 3), "facts": (0, 4)}
    draw = Curriculum(tokenizer.get_vocab(), world, "action", 0.5, growth=0.2)
    longest = {}
    for progress in (0.0, 0.1, 0.2, 1.0):
        batch = draw_batch(draw, random.Random(0), progress, 30_000)
        expert = [e for e in batch if e.prune == "action"]
        turns = {e.segments[-1].turn for e in expert}
        assert turns == set(range(2, {0.0: 3, 0.1: 4}.get(progress, 5)))
        infos = {s.length for e in expert for s in e.segments if s.kind == "info"}
        assert max(infos) == {0.0: 4, 0.1: 3 + 2 * 4 - 1}.get(progress, 3 + 4 * 4 - 1)
        longest[progress] = max(len(e.tokens) for e in batch if e.prune == "never")
    assert longest[0.0] < 70 < longest[0.1] < longest[0.2] and 300 < longest[0.2] <= 500


def test_examples_come_from_the_environment_that_is_trained_in(tokenizer: PreTrainedTokenizerFast) -> None:
    environment = {"objectives": (2, 2), "hops": 3, "passage_tokens": 50}
    config = TrainConfig(
        environment=environment,
        rollout=RolloutConfig(prune="state"),
        warmstart=WarmStartConfig(auxiliary_fraction=0.0),
    )
    given = toy_training(config)
    for example in draw_batch(given["draw_example"], random.Random(0), 0.0, 256):
        assert example.prune == "state"
        assert example.segments[-1].turn == 2 * 3 + 1
        assert {s.length for s in example.segments if s.kind == "info"} == {50 + 2}
    assert given["make_environment"]().passage_tokens == 50


def test_any_environment_with_an_expert_can_be_learned_from(tokenizer: PreTrainedTokenizerFast) -> None:
    config = RolloutConfig(prune="state")
    draw = expert_examples(tokenizer, partial(MultiHopEnv, 2), config)
    seed = random.Random(5).getrandbits(53)
    (played,) = play_expert(tokenizer, partial(MultiHopEnv, 2), [seed], config)
    example = draw(random.Random(5), 0.0)
    assert example == (played.tokens.tolist(), played.segments, "state")


def test_a_model_that_is_loaded_learns_where_steps_are_asked_for(tokenizer, tmp_path, monkeypatch) -> None:
    """And a run that was stopped goes on to where the unbroken one comes."""
    start = checkpoint.save(tmp_path / "start", build_model(tokenizer, SMALL), tokenizer)
    config = TrainConfig(
        init=str(start),
        max_updates=1,
        batch_size=4,
        algorithm=AlgorithmConfig(critic_only_updates=0),
        rollout=RolloutConfig(num_slots=4, max_turns=9, max_action_tokens=64),
    )
    assert config.warmstart_steps == 0 and replace(config, init=None).warmstart_steps == 2000
    taught = replace(config, warmstart=replace(SHORT, save_every=6))

    def run(out: str, config: TrainConfig = taught, **how: bool) -> None:
        quiet = Progress(log=lambda line: None)
        train(config, tmp_path / out, partial(MultiHopEnv, (1, 2)), progress=quiet, **how)

    def records(out: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / out / METRICS).read_text().splitlines()]

    run("none", config)
    assert [record["phase"] for record in records("none")] == ["policy"]
    run("unbroken")
    assert [record["phase"] for record in records("unbroken")] == ["warmstart"] * 12 + ["policy"]
    losses = [record["loss"] for record in records("unbroken")[:12]]
    assert losses[-1] < losses[0] - 0.3

    class Killed(BaseException):
        pass

    def append(path: Path, record: dict[str, Any]) -> None:
        if record["step"] == 9:
            raise Killed
        append_json(path, record)

    with monkeypatch.context() as patch:
        patch.setattr(train_loop, "append_json", append)
        with pytest.raises(Killed):
            run("stopped")
    with pytest.raises(InputError, match=r"resume: expected the init of the run, '.*start', got None"):
        run("stopped", replace(taught, init=None), resume=True)
    run("stopped", resume=True)
    told = [[(r["phase"], r["step"], r.get("loss")) for r in records(out)] for out in ("unbroken", "stopped")]
    assert told[0] == told[1]
    one, other = (checkpoint.load(tmp_path / out).model.state_dict() for out in ("unbroken", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_dropout_is_off(tokenizer: PreTrainedTokenizerFast, draw: Curriculum) -> None:
    """Also that of attention, which kernels have none of."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    drops = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}
    config = PhiConfig(vocab_size=len(tokenizer), attn_implementation="mem1", **shape, **drops)
    model = PhiForCausalLM(config)
    runs = [list(warm_start(copy.deepcopy(model), replace(SHORT, steps=3), draw)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_tokenizer_that_knows_every_text_has_no_unknown_token() -> None:
    tokenizer = SMALL_TOKENIZERS["byte-level"]()
    config = RolloutConfig(max_prompt_tokens=2000, max_action_tokens=1000, max_info_tokens=1000)
    example = expert_examples(tokenizer, partial(MultiHopEnv, 2), config)(random.Random(0), 0.0)
    assert tokenizer.unk_token_id is None and len(example.tokens) > 100


def test_an_expert_that_cannot_teach_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    class Down(MultiHopEnv):
        def step(self, action: Any) -> Any:
            raise LookupError("no such page")

    class Unknown(MultiHopEnv):
        def expert_action(self) -> ExpertAction:
            return ExpertAction("xyzzy", Action("answer", "ada"))

    class Mute:
        pass

    for make, config, message in (
        (
            Down,
            RolloutConfig(),
            "expected an episode that it ends, at seed .* LookupError: no such page",
        ),
        (
            MultiHopEnv,
            RolloutConfig(max_turns=1),
            "got turn_limit with max_turns=1 and .*=192",
        ),
        (MultiHopEnv, RolloutConfig(max_action_tokens=8), "at most max_action_tokens=8, got 11 tokens"),
        (Unknown, RolloutConfig(), "expert: expected words of the tokenizer, .* got '<IS> <unk> </IS>"),
        (Mute, RolloutConfig(), "make_environment: expected one with expert_action .* got Mute"),
    ):
        with pytest.raises(InputError, match=message):
            expert_examples(tokenizer, make, config)(random.Random(5), 0.0)  # type: ignore[arg-type]


def test_an_example_that_teaches_nothing_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, query = Segment("prompt", 0, 2), Segment("query", 1, 1)
    for example, message in (
        (Example([], [], "action"), "expected tokens that the policy writes, got \\[\\]"),
        (Example([5, 6], [prompt], "action"), "expected tokens that the policy writes"),
        (Example([5, 6, 7, 8], [prompt, query], "action"), "expected segments of 4 tokens in all, got 3"),
    ):
        with pytest.raises(InputError, match=f"draw_example: {message}"):
            draw_batch(lambda rng, progress, example=example: example, random.Random(0), 0.0, 64)


def test_the_toy_takes_its_environment_as_the_environment_does(tokenizer: PreTrainedTokenizerFast) -> None:
    for environment in ({}, {"objectives": 2}, {"objectives": (2, 2)}):
        draw = toy_training(TrainConfig(environment=environment))["draw_example"]
        examples = [draw(random.Random(n), 1.0) for n in range(30)]
        assert {e.segments[-1].turn for e in examples if e.prune == "action"} == {1 + 2 * 2}


def test_heads_of_a_new_model_look_back(tokenizer: PreTrainedTokenizerFast) -> None:
    """The first layer's, at the token before and at the one before that, by turns; by biases alone."""
    for shape in ({}, {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96}):
        model = build_model(tokenizer, ModelConfig(**shape))  # type: ignore[arg-type]
        layer = model.model.layers[0].self_attn
        heads = model.config.num_attention_heads
        places = torch.arange(12)[None]
        cos, sin = model.model.rotary_emb(torch.zeros(1, 12, 1), places)
        keys = layer.k_proj.bias.view(1, -1, 1, layer.head_dim).expand(-1, -1, 12, -1)
        queries = layer.q_proj.bias.view(1, heads, 1, layer.head_dim).expand(-1, -1, 12, -1)
        queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
        keys = keys.repeat_interleave(heads // keys.shape[1], 1)
        scores = (queries[0, :, 11, None] * keys[0]).sum(-1) * layer.scaling
        for head in range(heads):
            assert scores[head].argmax() == 11 - (1 + head % 2)
            assert scores[head].max().item() == pytest.approx(20.0, rel=1e-4)
    plain = build_model(tokenizer, ModelConfig(look_back=0.0)).model.layers[0].self_attn
    assert not plain.q_proj.bias.any() and not plain.k_proj.bias.any()


@pytest.mark.parametrize("regime", ["carry", "reencode"])
def test_labels_are_the_tokens_of_the_policy(
    tokenizer: PreTrainedTokenizerFast, draw: Curriculum, regime: str
) -> None:
    model = build_model(tokenizer, SMALL)
    batch = draw_batch(draw, random.Random(0), 0.0, SHORT.batch_tokens)
    logprob, right = label_logprobs(model, batch, regime, torch.device("cpu"))  # type: ignore[arg-type]
    expected: list[Tensor] = []
    for example in batch:
        layout = TrajectoryLayout.from_segments(example.segments, regime=regime, prune=example.prune)  # type: ignore[arg-type]
        ids = torch.tensor(example.tokens)
        logits = model(
            ids[layout.token_index][None], position_ids=layout.position_ids[None], mem1_mask=layout.mask
        ).logits[0, layout.logit_rows]
        written = ids[policy_tokens(example.segments)]
        expected.append(logits.log_softmax(-1).gather(1, written[:, None])[:, 0])
        assert len(written) == len(logits)
    torch.testing.assert_close(logprob, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert right.shape == logprob.shape and right.dtype == torch.bool
    logprob.sum().backward()
    assert model.get_output_embeddings().weight.grad is not None


def test_model_follows_its_config(tokenizer: PreTrainedTokenizerFast) -> None:
    state = torch.random.get_rng_state()
    model = build_model(tokenizer, SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = model.get_output_embeddings().weight
    assert weights is model.get_input_embeddings().weight
    assert weights.std().item() == pytest.approx(SMALL.initializer_range, rel=0.1)
    other = build_model(tokenizer, SMALL, seed=1)
    assert not torch.equal(other.get_output_embeddings().weight, weights)
    assert build_model(tokenizer, replace(SMALL, dtype="bfloat16")).dtype == torch.bfloat16


def test_critic_starts_as_a_copy_that_values_everything_at_zero(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_model(tokenizer, SMALL)
    critic = build_critic(model)
    ids = torch.arange(20)[None]
    mask = TrajectoryMask.from_evict(torch.full((1, 20), 20, dtype=torch.int32))
    values = critic(ids, ids, mask)
    assert values.shape == (1, 20) and not values.any()
    (values - 1).square().mean().backward()
    assert critic.head.bias.grad is not None
    assert all(p.grad is None for p in model.parameters())


def test_bf16_keeps_its_frequencies(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_model(tokenizer, replace(SMALL, dtype="bfloat16"))
    exact = build_model(tokenizer, SMALL)
    buffers = dict(exact.named_buffers())
    assert buffers
    for name, buffer in [*model.named_buffers(), *build_critic(model).trunk.named_buffers(prefix="model")]:
        assert torch.equal(buffer, buffers[name]), name
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_what_is_frozen_in_the_actor_learns_in_the_critic(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_model(tokenizer, SMALL)
    model.get_input_embeddings().weight.requires_grad_(False)
    assert all(p.requires_grad for p in build_critic(model).parameters())
