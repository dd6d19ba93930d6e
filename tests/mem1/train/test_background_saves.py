"""Checkpoints that are written while the run goes on: the same ones, and no fault of theirs is lost."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest
import torch

from mem1.config import AlgorithmConfig, ModelConfig, RolloutConfig, ScaleConfig, TrainConfig, WarmStartConfig
from mem1.envs.toy.training import toy_training
from mem1.runtime.progress import Progress
from mem1.train import checkpoint, train_loop
from mem1.train.host_copies import host_copies

CONFIG = TrainConfig(
    max_updates=4,
    batch_size=4,
    save_every=1,
    keep=9,
    environment={"objectives": 1},
    model=ModelConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1),
    rollout=RolloutConfig(num_slots=4, max_turns=3, max_action_tokens=12, synchronous=True),
    warmstart=WarmStartConfig(steps=4, batch_tokens=128, save_every=2),
    algorithm=AlgorithmConfig(mini_batch_size=2, actor_lr=1e-2, critic_only_updates=0),
)
BACKGROUND = replace(CONFIG, scale=ScaleConfig(background_saves=True))


def run(config, out, **how):
    quiet = Progress(log=lambda line: None)
    return train_loop.train(config, out, **(toy_training(config) | {"progress": quiet} | how))


def test_what_is_saved_is_what_was_there_then(tmp_path, monkeypatch):
    run(CONFIG, tmp_path / "plain")
    write, threads = checkpoint.write, set()

    def slow(*given, **settings):
        threads.add(threading.current_thread())
        time.sleep(0.4)  # the next update has begun
        write(*given, **settings)

    monkeypatch.setattr(checkpoint, "write", slow)
    run(BACKGROUND, tmp_path / "background")
    assert threading.main_thread() not in threads and len(threads) == 1
    names = [path.name for path in checkpoint.numbered(tmp_path / "plain")]
    assert names == [path.name for path in checkpoint.numbered(tmp_path / "background")] and len(names) == 6
    for name in names:
        one, other = (
            checkpoint.load(tmp_path / run / "checkpoints" / name) for run in ("plain", "background")
        )
        pairs = [
            (one.model.state_dict(), other.model.state_dict()),
            (one.trainer.tensors(), other.trainer.tensors()),
        ]
        for tensors, same in pairs:
            assert tensors.keys() == same.keys() and all(torch.equal(tensors[n], same[n]) for n in tensors)
        values = [each.trainer.values for each in (one, other)]
        assert values[0].pop("settings")["scale"] != values[1].pop("settings")["scale"]
        assert values[0] == values[1]
    monkeypatch.undo()
    more = replace(BACKGROUND, max_updates=5)
    run(more, tmp_path / "background", resume=True)
    run(replace(CONFIG, max_updates=5), tmp_path / "plain", resume=True)
    last = [
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1])
        for run in ("plain", "background")
    ]
    assert last[0]["step"] == 5 and last[0]["policy_loss"] == last[1]["policy_loss"]


@pytest.mark.parametrize("fails", [3, 6], ids=["one of many", "the last"])
def test_a_fault_ends_the_run(tmp_path, monkeypatch, fails):
    write, calls = checkpoint.write, []

    def failing(*given, **settings):
        calls.append(1)
        if len(calls) == fails:
            raise OSError(28, "No space left on device")
        write(*given, **settings)

    monkeypatch.setattr(checkpoint, "write", failing)
    with pytest.raises(OSError, match="No space left"):
        run(BACKGROUND, tmp_path)
    monkeypatch.undo()
    done = run(BACKGROUND, tmp_path, resume=True)
    assert done.model is not None and len(checkpoint.numbered(tmp_path)) >= 2


def test_copies_are_nobody_else_s_and_shared_ones_stay_shared():
    base = torch.arange(6.0)
    given = {"a": base, "b": base, "first": base[:3], "second": base[3:], "empty": torch.empty(0)}
    copies = host_copies(given)
    base.zero_()
    assert copies["a"] is copies["b"] and copies["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copies["first"].tolist() == [0, 1, 2] and copies["second"].tolist() == [3, 4, 5]
    assert copies["empty"].shape == (0,)
