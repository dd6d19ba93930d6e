"""Settings as YAML and on the command line: there and back, by type, unknown ones refused by name."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from checkout import ROOT

from mem1.checks import InputError
from mem1.cli import main
from mem1.config import (
    AlgorithmConfig,
    LoraConfig,
    ModelConfig,
    RolloutConfig,
    ScaleConfig,
    TrainConfig,
    WarmStartConfig,
)
from mem1.config_files import made, merged, read, take_dotted, to_yaml, typed
from mem1.parsing.tags import OFFICIAL, TagFormat

FULL = TrainConfig(
    init="some/model",
    batch_size=12,
    group_size=3,
    environment={"name": "updates", "objectives": (1, 4), "noise": 0.5, "deep": {"er": [1, 2]}},
    trackers=("wandb",),
    threads=2,
    model=ModelConfig(vocab_size=9, dtype="bfloat16", tie_word_embeddings=False),
    rollout=RolloutConfig(regime="paper", prune="last_turns=2", format=OFFICIAL, max_state_tokens=9),
    warmstart=WarmStartConfig(learning_rate=1e-6),
    algorithm=AlgorithmConfig(name="grpo", dual_clip=3.0, rollout_is_cap=2.0, whiten=True),
    lora=LoraConfig(rank=2, target_modules=("q_proj", "v_proj")),
    scale=ScaleConfig(ranks=4, replicas=2, tflops=989.0),
)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        FULL,
        replace(
            FULL, rollout=replace(FULL.rollout, format=TagFormat(turn_hint="{turns_left} left"), prune=90)
        ),
    ],
    ids=["default", "full", "own format"],
)
def test_yaml_there_and_back(config):
    text = to_yaml(config)
    assert made(typed(yaml.safe_load(text))) == config
    assert "!!" not in text, "of Python's own types"
    as_json = json.loads(json.dumps(config.to_dict()))  # a run's train.json is a config file as well
    assert made(typed(as_json)) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algoritm": {"lam": 1}}, r"^algoritm: .* none that there is; the nearest is algorithm$"),
        ({"algorithm": {"clip_hihg": 1}}, r"^algorithm.clip_hihg: .*; the nearest is algorithm.clip_high$"),
        ({"actor_lr": 1}, r"^actor_lr: .*; the nearest is algorithm.actor_lr$"),
        (
            {"rollout": {"xyzzy": 1}},
            "^rollout.xyzzy: expected the name of a setting, got none that there is$",
        ),
        ({"rollout": 3}, "^rollout: expected a section of settings, got 3"),
        ({"environment": "updates"}, "^environment: expected a section of settings, got 'updates'"),
        ({"batch_size": "many"}, "^batch_size: expected int, got 'many'"),
        ({"batch_size": 2.5}, "^batch_size: expected int, got 2.5"),
        (
            {"algorithm": {"name": "ppo2"}},
            "^algorithm.name: expected one of ppo, grpo, rloo, .* got 'ppo2'",
        ),
        ({"algorithm": {"gamma": True}}, "^algorithm.gamma: expected float, got True"),
        ({"algorithm": {"group_std": 3}}, "^algorithm.group_std: expected bool, got 3"),
        ({"trackers": "wandb"}, "^trackers: expected "),
        ({"rollout": {"format": "html"}}, "^rollout.format: expected one of mem1, official, .* got html: "),
        ({"rollout": {"format": {"a": 1}}}, "^rollout.format: format: expected a table of state"),
        ({"rollout": {"prune": "no:thing"}}, "^rollout.prune: expected MODULE:NAME, got 'no:thing'"),
        ({7: 1}, "^7: expected the name of a setting"),
        ({"max_updates": None}, "^max_updates: expected int, got None"),
        ({"seed": "010"}, "^seed: expected int, got '010'"),
        ({"algorithm": {"kl_coef": "1:30"}}, "^algorithm.kl_coef: expected float, got '1:30'"),
        ({"algorithm": {"kl_coef": 10**400}}, "^algorithm.kl_coef: expected float, got 1000"),
        ({"environment": None}, "^environment: expected a section of settings, got None"),
        ({"environment": {"name": "nope"}}, "^environment: name: expected MODULE:NAME or one of multihop"),
        ({"environment": {"name": None}}, "^environment: name: expected MODULE:NAME or one of multihop"),
        ({"environment": {1: 2}}, "^environment: expected names of settings, got 1"),
        (
            {"environment": {"objectives": {"a": 1}}},
            "^environment: objectives: expected a number or an interval",
        ),
        (
            {"environment": {"objectives": "2-x"}},
            "^environment: objectives: expected a number or an interval",
        ),
    ],
)
def test_what_is_no_setting_is_refused_by_name(settings, message):
    with pytest.raises(InputError, match=message):
        typed(settings)


def test_values_have_the_types_of_the_settings():
    found = typed({"algorithm": {"actor_lr": "1e-6", "epochs": 2, "lam": 1}, "trackers": ["wandb"]})
    assert found == {"algorithm": {"actor_lr": 1e-6, "epochs": 2, "lam": 1.0}, "trackers": ("wandb",)}
    assert type(found["algorithm"]["lam"]) is float
    assert typed({"threads": None, "rollout": {"prune": "60"}}) == {"threads": None, "rollout": {"prune": 60}}


def test_files_that_are_none(tmp_path):
    for name, text, message in (
        ("list.yaml", "- 1", "list.yaml: expected a mapping of settings, got"),
        ("odd.yaml", "a: [1", "odd.yaml: expected YAML, got other text: while parsing"),
        ("tag.yaml", "a: !!python/object:os.system {}", "tag.yaml: expected YAML, got other text: could not"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            read(tmp_path / name)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("bytes.yaml", "none.yaml", "."):
        with pytest.raises(InputError, match="expected a file of settings, got none"):
            read(tmp_path / name)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read(tmp_path / "empty.yaml") == {}


def test_plain_words_are_what_they_look_like(tmp_path):
    file = tmp_path / "words.yaml"
    file.write_text(
        "a: 010\nb: 1:30\nc: no\nd: on\ne: 1e-6\nf: .5\ng: 12\nh: null\ni:\nj: true\nk: 2020-01-01\nl: 1.\n"
    )
    words = {"a": "010", "b": "1:30", "c": "no", "d": "on", "e": 1e-6, "f": 0.5, "g": 12, "h": None}
    assert read(file) == words | {"i": None, "j": True, "k": "2020-01-01", "l": 1.0}
    file.write_text("algorithm: {lam: 0.5}\nalgorithm.gamma: 0.9\nrollout.format.state: null\n")
    assert read(file) == {"algorithm": {"lam": 0.5, "gamma": 0.9}, "rollout": {"format": {"state": None}}}
    for text in ("seed: 1\nseed: 2\n", "algorithm: {lam: 1}\nalgorithm: {gamma: 1}\n", "a: {b: 1, b: 2}"):
        file.write_text(text)
        with pytest.raises(InputError, match="stands twice"):
            read(file)
    file.write_text("seed: " + "9" * 5000)
    with pytest.raises(InputError, match="expected YAML, got other text"):
        read(file)


def test_objectives_as_the_command_has_them():
    for given, expected in ((2, 2), ("2", 2), ("1-4", (1, 4)), ([1, 4], (1, 4)), (None, None), (0, 0)):
        assert typed({"environment": {"objectives": given}}) == {"environment": {"objectives": expected}}


def test_settings_of_a_command_line():
    line = ["train", "--a.b=1e-3", "x.yaml", "--out", "a.b", "--c.d.e", "[1, 2]", "--init", "m", "--seed=3"]
    assert take_dotted(line) == (
        {"a": {"b": 1e-3}, "c": {"d": {"e": [1, 2]}}, "init": "m"},
        ["train", "x.yaml", "--out", "a.b", "--seed=3"],
    )
    assert take_dotted(["--a.b=c: d: e", "--batch_size=3"]) == ({"a": {"b": "c: d: e"}, "batch_size": 3}, [])
    assert take_dotted(["--a.b"]) == ({}, ["--a.b"]), "for argparse to refuse"
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}}, {"d": {"e": 5}}) == {
        "a": {"b": 4, "c": 2},
        "d": {"e": 5},
    }


@pytest.fixture
def told(capsys):
    def config_of(*arguments: str) -> TrainConfig:
        assert main(["train", *arguments, "--print-config"]) == 0
        return made(typed(yaml.safe_load(capsys.readouterr().out)))

    return config_of


def test_what_counts_more(told, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("batch_size: 8\nalgorithm: {actor_lr: 1e-5, lam: .9}\nenvironment: {hops: 1}\n")
    found = told(str(file), "--actor-lr", "1e-3", "--algorithm.gamma=.5", "--regime", "reencode")
    assert (found.batch_size, found.algorithm.actor_lr, found.algorithm.lam) == (8, 1e-3, 0.9)
    assert found.algorithm.gamma == 0.5 and found.rollout.regime == "reencode"
    assert found.environment == {"hops": 1, "passage_tokens": 0, "objectives": (1, 4)}
    assert told(str(file), "--hops", "3", "--objectives", "2").environment == {
        "hops": 3,
        "passage_tokens": 0,
        "objectives": (2, 2),
    }
    other = told(str(file), "--environment", "updates", "--init", "m", "--environment-args", '{"noise": 0.5}')
    assert other.environment == {"name": "updates", "noise": 0.5, "passage_tokens": 0}, "not hops of another"
    file.write_text(
        "environment: {name: multihop, objectives: 2, passage_tokens: 10}\nrollout: {format: official}\n"
    )
    same = told(str(file), "--environment", "multihop", "--objectives", "3")
    assert same.environment == {"passage_tokens": 10, "hops": 2, "objectives": (3, 3)}
    other = told(str(file), "--environment", "updates", "--environment.objectives=3", "--model", "m")
    assert other.environment == {"name": "updates", "passage_tokens": 0, "objectives": 3}
    part = told(str(file), "--rollout.format.turn_hint={turns_left} left").rollout.format
    assert part == replace(OFFICIAL, turn_hint="{turns_left} left")
    system = told("--rollout.system=hello: world #1").rollout.system
    assert system == "hello: world #1" and told("--rollout.system=null").rollout.system is None
    for arguments, message in (
        (["--environment.objectives=0"], "objectives: expected a number or a rising interval"),
        (["--warmstart.steps=-5", "--model", "m"], "warmstart.steps: expected an integer >= 0"),
        (
            ["--warmstart.steps=5", "--lora.rank=4", "--model", "m"],
            "lora.rank: expected 0 beside warmstart.steps, in which all weights learn, got 4",
        ),
        (["--algorithm.max_grad_norm=0"], "algorithm.max_grad_norm: expected a finite number > 0, got 0"),
        (["--rollout.max_turns=null"], "rollout.max_turns: expected int, got None"),
    ):
        assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
    file.write_text("environment: retrieval-qa\n")
    assert main(["train", str(file), "--model", "m", "--objectives", "1"]) == 2
    assert "environment: expected a section of settings, got 'retrieval-qa'" in capsys.readouterr().err
    assert main(["train", str(file), "--hops", "3", "--environment-args", '{"hops": 2}']) == 2
    assert "hops: expected it here or in environment-args, not both, got 3" in capsys.readouterr().err


def test_an_environment_of_one_s_own(tmp_path, monkeypatch):
    """Also one that has no name to import it by."""
    (tmp_path / "made_world.py").write_text(
        "from functools import partial\n"
        "from mem1.envs.toy.multihop import MultiHopEnv\n"
        "class Own(MultiHopEnv): pass\n"
        "deep = partial(Own, hops=3)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "made_world", raising=False)
    calls = []
    monkeypatch.setattr(
        "mem1.commands.train_command.train", lambda config, out, **rest: calls.append((config, rest))
    )
    (tmp_path / "own.yaml").write_text("init: m\nenvironment: {name: 'made_world:Own', objectives: 1}\n")
    assert main(["train", "own.yaml", "--environment.hops=1"]) == 0
    assert main(["train", "--init", "m", "--environment", "made_world:deep", "--objectives", "1"]) == 0
    (first, rest), (second, other) = calls
    assert first.environment == {"name": "made_world:Own", "hops": 1, "objectives": 1}
    assert second.environment["name"].startswith("made_world:Own(") and second.environment["objectives"] == (
        1,
        1,
    )
    assert [type(each["make_environment"]()).__name__ for each in (rest, other)] == ["Own", "Own"]
    assert (
        other["make_environment"].keywords == {"hops": 3, "objectives": (1, 1)}
        and "hops=3" in second.environment["name"]
    )


def test_settings_are_of_train_and_plan_alone(capsys):
    with pytest.raises(SystemExit):
        main(["rollout", "--model", "x", "--algorithm.lam=1"])
    assert "unrecognized arguments: --algorithm.lam=1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--algorithm.lam"])
    assert "unrecognized arguments: --algorithm.lam" in capsys.readouterr().err


def test_the_small_recipe_is_the_default(told):
    assert told(str(ROOT / "recipes" / "small.yaml")) == told()


def test_a_run_says_its_settings_and_they_make_the_run_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "mem1.commands.train_command.train", lambda config, out, **rest: calls.append((config, out))
    )
    assert main(["train", "--objectives", "2-3", "--hops", "1", "--prune", "state"]) == 0
    record = tmp_path / "train.json"
    record.write_text(json.dumps(calls[0][0].to_dict()))
    assert main(["train", str(record)]) == 0
    assert calls[1][0] == calls[0][0] and calls[1][1] == Path("runs/train")
