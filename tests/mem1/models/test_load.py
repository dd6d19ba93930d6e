"""Loading models as people have them on disk: dtypes, shards, tied weights, tokenizers with quirks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_families import build, model_class, small_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mem1.checks import InputError
from mem1.engine.engine import Engine
from mem1.models.load import load, stop_ids
from mem1.models.memory_plan import size
from mem1.train import checkpoint

TEXT = "<IS> ada knows bruno </IS> <query> who is carla's teacher ? </query> été 雪"


def byte_level(**special: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of some 300 tokens, "<|end|>" among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|turn|>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "<|end|>"} | special))


@pytest.fixture
def saved(tmp_path) -> Callable[..., Path]:
    """A folder with a small model and a tokenizer, as `save_pretrained` writes them."""

    def save(
        family: str = "qwen2", tokenizer: Any = None, dtype: torch.dtype = torch.float32, **settings: Any
    ) -> Path:
        shards = settings.pop("max_shard_size", "1GB")
        config = small_config(family)
        for name, value in ({"vocab_size": 320} | settings).items():
            setattr(config, name, value)
        torch.manual_seed(0)
        model = model_class(family)._from_config(config).to(dtype)
        model.config.dtype = dtype
        model.save_pretrained(tmp_path / family, max_shard_size=shards)
        (tokenizer or byte_level()).save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "phi3", "olmo2", "gpt_neox"])
def test_a_family_loads_and_runs(saved, family):
    path = saved(family)
    model, tokenizer, report = load(path, device="cpu")
    assert model.config._attn_implementation == "mem1" and not model.training
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert report.layers == 2 and report.vocabulary == 320 and report.tokens == len(tokenizer)
    hidden = Engine(model, 1).feed([0], [tokenizer.encode(TEXT)], [list(range(len(tokenizer.encode(TEXT))))])
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        expected = plain(torch.tensor([tokenizer.encode(TEXT)])).logits[0, -1]
    torch.testing.assert_close(Engine(model, 1).logits(hidden)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_as_they_are_saved(saved, dtype, tied):
    path = saved(dtype=dtype, tie_word_embeddings=tied)
    model, _, report = load(path, device="cpu")
    weights = list(model.parameters())
    assert {weight.dtype for weight in weights} == {dtype}
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert report.parameters == sum(weight.numel() for weight in weights)
    assert report.weights_bytes == report.parameters * dtype.itemsize
    assert report.kv_bytes_per_token == 2 * 2 * 2 * 16 * dtype.itemsize


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_is_that_of_the_weights_alone(saved, dtype):
    attention = "sdpa" if dtype == "float16" else "mem1"  # which the CPU has no float16 for
    model, _, report = load(saved(), dtype, "cpu", attention)
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32 and report.dtype == dtype


def test_a_dtype_that_the_device_has_no_attention_for_is_refused(saved):
    with pytest.raises(InputError, match="expected float32, bfloat16 or float64 on the CPU, got Half"):
        load(saved(), "float16", "cpu")


def test_shards_are_put_together(saved):
    whole = load(saved(), device="cpu").model.state_dict()
    path = saved(max_shard_size="40KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    (path / "model.safetensors").unlink()
    for name, weight in load(path, device="cpu").model.state_dict().items():
        assert torch.equal(weight, whole[name])
    lost = sorted(path.glob("model-*.safetensors"))[1]
    kept = lost.read_bytes()
    lost.write_bytes(kept[:-50])
    with pytest.raises(InputError, match=r"expected a readable model.safetensors in .*qwen2"):
        load(path, device="cpu")
    lost.unlink()
    with pytest.raises(InputError, match=f"expected {lost.name} in .*, got none"):
        load(path, device="cpu")
    (path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match=r"expected a readable model.safetensors.index.json"):
        load(path, device="cpu")


@pytest.mark.parametrize(
    ("special", "listed", "expected"),
    [
        ({}, None, {0}),
        ({"pad_token": "<|end|>"}, None, {0}),
        ({"bos_token": "<|turn|>", "pad_token": None}, 1, {0, 1}),
        ({}, [1, 5], {0, 1, 5}),
        ({"eos_token": None}, [1], {1}),
        ({"eos_token": None}, None, set()),
    ],
)
def test_what_ends_a_turn(saved, special, listed, expected):
    path = saved(tokenizer=byte_level(**special), eos_token_id=None, bos_token_id=None)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    model, tokenizer, report = load(path, device="cpu")
    assert stop_ids(model, tokenizer) == expected
    assert {token for _, token in report.stops} == expected
    assert tokenizer.pad_token == special.get("pad_token")


def test_a_report_says_what_was_loaded(saved):
    path = saved(dtype=torch.bfloat16)
    model, _, report = load(path, device="cpu")
    weights = f"{report.parameters:,} parameters, {size(2 * report.parameters)} of bfloat16"
    assert str(report).splitlines() == [
        f"{path}: Qwen2ForCausalLM, {weights} on cpu",
        "attention mem1, 512 positions, 2 layers of 2 KV heads of 16, 256 B of KV cache a token",
        f"vocabulary 320, {report.tokens} known to the tokenizer; beside its tags a turn ends with "
        "<|end|> (0)",
    ]


def test_a_report_says_which_layers_have_a_window(saved):
    settings = {"sliding_window": 16, "head_dim": 16}
    kinds = ["sliding_attention", "full_attention"]
    for family, types, said in (
        ("gemma3_text", kinds, "(1 with a window of 16)"),
        ("mistral", None, "(with a window"),
    ):
        path = saved(family, **settings, **({"layer_types": types} if types else {}))
        assert f"2 layers {said}" in str(load(path, device="cpu").report)


def test_a_tokenizer_may_know_fewer_tokens_than_the_model_but_not_more(saved):
    tokenizer = byte_level()
    last = len(tokenizer)
    load(saved(vocab_size=last), device="cpu")
    with pytest.raises(InputError, match=f"tokenizer: expected at most {last - 1} tokens, .*, got {last}"):
        load(saved(vocab_size=last - 1), device="cpu")


def broken(path: Path, name: str, text: str | None) -> None:
    if text is None:
        (path / name).unlink()
    else:
        (path / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", None, "expected a model folder with a config.json, got"),
        ("config.json", "{", "expected a readable config.json"),
        ("config.json", '{"model_type": "unheard_of"}', "expected a whole model in"),
        ("generation_config.json", "[", "expected a readable generation_config.json"),
        ("tokenizer.json", None, "expected a tokenizer.json"),
        ("tokenizer_config.json", "", "expected a readable tokenizer_config.json"),
        ("model.safetensors", None, "expected a whole model in"),
        ("model.safetensors", "x" * 100, "expected a readable model.safetensors"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(saved, name, text, message):
    path = saved()
    broken(path, name, text)
    with pytest.raises(InputError, match=f"^model: {message}") as error:
        load(path, device="cpu")
    assert "\n" not in str(error.value)


def test_weights_that_are_not_there_are_not_drawn_at_random(saved):
    path = saved(tie_word_embeddings=True)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    with pytest.raises(InputError, match=r"expected all weights in .*, got none for lm_head.weight"):
        load(path, device="cpu")


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("falcon", {}, "'mem1' through .* AttentionInterface, got FalconForCausalLM, whose own table has no"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "got chunked_attention"),
    ],
)
def test_what_an_engine_would_refuse_is_refused(saved, family, settings, reason):
    with pytest.raises(InputError, match=reason):
        load(saved(family, **settings), device="cpu")


def test_another_attention_is_for_comparisons(saved):
    model, _, report = load(saved("phi"), device="cpu", attention="sdpa")
    assert model.config._attn_implementation == report.attention == "sdpa"


@pytest.mark.parametrize("setting", [{"dtype": "int8"}, {"device": "tpu"}])
def test_settings_are_checked_first(setting):
    with pytest.raises(InputError, match=f"^{next(iter(setting))}: expected one of auto, "):
        load("nowhere/at/all", **setting)


def test_logits_that_are_more_than_a_product_are_found(monkeypatch):
    """Whatever a config calls it."""
    model = build("llama", "mem1")
    forward = type(model).forward

    def scaled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits *= 1.5
        return out

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(InputError, match="logits that are hidden states times the output weight, got others"):
        Engine(model, 1)


def test_the_folder_of_a_run_is_its_newest_checkpoint(saved, tmp_path):
    path = saved()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for step in (1, 2):
        shutil.copytree(path, tmp_path / "run" / "checkpoints" / f"policy-{step:06}")
    (tmp_path / "run" / "checkpoints" / "policy-000002" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="policy-000002"):
        checkpoint.load(tmp_path / "run")


def test_an_id_is_looked_for_in_the_cache(saved, tmp_path):
    """In a process without a network, as it reads where the cache is when it starts."""
    snapshot = tmp_path / "cache" / "hub" / "models--small--model" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(saved(), snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    program = (
        "from mem1.checks import InputError\n"
        "from mem1.models.load import load\n"
        "print(load('small/model', device='cpu').report)\n"
        "for name in ('small/other', 'a/b/c', './small/model'):\n"
        "    try:\n        load(name, device='cpu')\n"
        "    except InputError as error:\n        print(error)\n"
    )
    settings = {
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | settings
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stderr
    assert lines[0].startswith("small/model: Qwen2ForCausalLM")
    unknown = (
        "model: expected a model folder with a config.json or the id of a model in the local cache or on"
    )
    assert lines[3].startswith(unknown) and "'small/other'" in lines[3]
    assert lines[4] == "model: expected a model folder with a config.json, got 'a/b/c'"
    assert lines[5].startswith("model: expected a model folder with a config.json, got ")


def test_the_folder_of_a_training_run_is_its_last_checkpoint(saved, tmp_path):
    path = saved()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last").symlink_to(path)
    assert load(tmp_path / "run").report.parameters == load(path).report.parameters
    with pytest.raises(InputError, match="expected a model folder with a config.json"):
        load(tmp_path)
