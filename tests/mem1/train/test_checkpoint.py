"""Checkpoints, and the agent that is loaded from one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from mem1 import MemoryEfficientAgent
from mem1.checks import InputError
from mem1.config import RolloutConfig
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.train import checkpoint

CONFIG = RolloutConfig(max_action_tokens=24, max_turns=4)


def test_a_checkpoint_holds_model_tokenizer_and_trainer(make_model, tokenizer, tmp_path):
    model = make_model()
    path = checkpoint.save(tmp_path / "run" / "last", model, tokenizer, {"step": 3}, {"x": torch.ones(2)})
    loaded = checkpoint.load(path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name])
    text = "questions : ada boss ; <IS> bruno </IS> <query> ada boss </query>"
    assert loaded.tokenizer.encode(text) == tokenizer.encode(text)
    assert loaded.tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert loaded.trainer["step"] == 3 and torch.equal(loaded.trainer.tensors()["x"], torch.ones(2))
    assert loaded.model.config._attn_implementation == "mem1"
    plain = AutoModelForCausalLM.from_pretrained(path)  # any tool can read it
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)


def test_a_checkpoint_is_never_overwritten(make_model, tokenizer, tmp_path):
    checkpoint.save(tmp_path / "last", make_model(), tokenizer, {"step": 1})
    with pytest.raises(InputError, match="path: expected a name that is free, got "):
        checkpoint.save(tmp_path / "last", make_model(), tokenizer, {"step": 2})
    assert checkpoint.load(tmp_path / "last").trainer.values == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]


def test_a_failed_save_leaves_nothing_behind(make_model, tokenizer, tmp_path):
    with pytest.raises(AttributeError):
        checkpoint.save(tmp_path / "last", make_model(), None)
    assert list(tmp_path.iterdir()) == []
    checkpoint.save(tmp_path / "checkpoints" / "policy-000001", make_model(), tokenizer, {"step": 1})
    assert checkpoint.load(tmp_path).trainer.values == {
        "step": 1
    }  # the folder of a run stands for its newest


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "trainer.json"])
def test_a_damaged_file_is_named(make_model, tokenizer, tmp_path, name):
    path = checkpoint.save(tmp_path / "last", make_model(), tokenizer, {"step": 1})
    if name == "tokenizer.json":
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:-100])
    with pytest.raises(ValueError, match=name) as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(InputError, match="expected a model folder with a config.json, got"):
        checkpoint.load(tmp_path)


def test_an_agent_runs_and_answers(make_model, tokenizer, tmp_path):
    checkpoint.save(tmp_path / "model", make_model(), tokenizer)
    agent = MemoryEfficientAgent(tmp_path / "model", config=CONFIG)
    trajectory = agent.run(MultiHopEnv(2), seed=3)
    assert torch.equal(trajectory.tokens, agent.run(MultiHopEnv(2), seed=3).tokens)
    assert trajectory.objectives == 2

    asked = []

    def tool(query: str) -> str:
        asked.append(query)
        return "carla"

    reply = agent.answer("questions : ada boss teacher .", tool)
    assert (reply.text is None) == (reply.trajectory.finish_reason != "answered")
    answers = [s for s in reply.trajectory.segments if s.kind == "info"]
    assert len(answers) >= len(asked)


def test_an_agent_has_one_tokenizer(make_model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="tokenizer: expected one beside a model, got none"):
        MemoryEfficientAgent(make_model())
    with pytest.raises(InputError, match="tokenizer: expected none beside the name of a model"):
        MemoryEfficientAgent(str(tmp_path), tokenizer)
    with pytest.raises(InputError, match="expected a model folder with a config.json"):
        MemoryEfficientAgent(tmp_path)


def test_an_agent_returns_the_text_of_its_answer(make_model, tokenizer, monkeypatch):
    agent = MemoryEfficientAgent(make_model(), tokenizer, CONFIG)
    tokens = tokenizer.encode(
        "<IS> ada boss </IS> <query> ada boss </query> <IS> carla </IS> <answer> carla </answer>"
    )
    monkeypatch.setattr("mem1.rollout.rollout_loop.Episode.forced", lambda self: tokens.pop(0))
    asked = []
    reply = agent.answer("questions : ada boss .", tool=lambda query: asked.append(query) or "carla")
    assert reply.text == "carla"
    assert asked == ["ada boss"]
    assert reply.trajectory.finish_reason == "answered"
