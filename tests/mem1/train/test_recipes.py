"""A recipe for 7B, shrunk to two layers of its architecture, on two processes: its tokenizer, its data."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from checkout import ROOT
from real_data import DATA
from transformers import Qwen2Config, Qwen2ForCausalLM

from mem1.train import checkpoint
from mem1.train.run_folder import METRICS

SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 131072,
    "vocab_size": 152064,
}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
QUESTIONS = [
    {"id": f"q{n}", "dataset": "nq", "question": f"Who built the bridge in {town}?", "golden_answers": [who]}
    for n, (town, who) in enumerate([("Oslo", "Ann"), ("Bern", "Ben"), ("Rome", "Cleo"), ("Bonn", "Dan")] * 3)
]
PASSAGES = [
    {
        "id": str(n),
        "contents": f'"{row["question"][24:-1]}"\nThe bridge was built by {row["golden_answers"][0]}.',
    }
    for n, row in enumerate(QUESTIONS)
]


@pytest.fixture
def data(tmp_path):
    """The real questions and passages, or a few of the same form where there are none."""
    files = DATA / "qa" / "qa.jsonl", DATA / "qa" / "corpus.jsonl"
    if all(file.is_file() for file in files):
        return files
    made = tmp_path / "qa.jsonl", tmp_path / "corpus.jsonl"
    for file, rows in zip(made, (QUESTIONS, PASSAGES), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-7b-qa", "qwen2.5-1.5b-lora-qa"])
def test_a_shrunk_recipe_trains_three_steps_on_two_processes(tmp_path, load, data, name):
    pytest.importorskip("bm25s")
    if "lora" in name:
        pytest.importorskip("peft")
    tokenizer = load("qwen2.5")
    config = Qwen2Config(**SHAPE, tie_word_embeddings="1.5b" in name)
    init = checkpoint.save(tmp_path / "init", Qwen2ForCausalLM(config).bfloat16(), tokenizer)
    settings = {f"model.{key}": value for key, value in SHAPE.items()} | {
        "init": init,
        "max_updates": 3,
        "batch_size": 4,
        "environment.questions": data[0],
        "environment.corpus": data[1],
        "environment.index": tmp_path / "index",
        "environment.url": "null",
        "rollout.max_action_tokens": 24,
        "rollout.max_info_tokens": 160,
        "rollout.max_turns": 3,
        "rollout.num_slots": 2,
        "algorithm.mini_batch_size": 2,
        "evaluate_every": 2,
        "evaluation_episodes": 2,
        "scale.ranks": 2,
    }
    out = tmp_path / "run"
    command = ["-m", "mem1", "train", str(ROOT / "recipes" / f"{name}.yaml"), "--out", str(out)]
    command += ["--threads", "1", "--device", "cpu", *(f"--{key}={value}" for key, value in settings.items())]
    done = subprocess.run([*LAUNCH, "2", *command], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "2 processes" in done.stdout
    records = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert ["evaluation_reward" in record for record in records] == [False, True, False]
    for record in records:
        assert record["errors"] == {} and record["policy_tokens"] > 0
        assert record["dlogp_mean"] < 0.02, "bf16"
        assert record["actor_grad_norm"] > 0 and record["update_tflop_per_second"] > 0
    settings = json.loads((out / "train.json").read_text())
    assert settings["environment"]["name"] == "retrieval-qa" and settings["rollout"]["top_p"] == 0.95
    assert settings["rollout"]["format"]["turn_hint"].startswith("[HINT]")
    assert checkpoint.load(out).model.config.num_hidden_layers == 2
