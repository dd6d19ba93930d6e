"""The command line: what it makes of its arguments, whose errors it tells in one line, how it ends."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mem1.checks import InputError
from mem1.cli import RUNS, main
from mem1.commands import demo_command
from mem1.commands.options import build_parser
from mem1.commands.world_options import rollout_config
from mem1.config import AlgorithmConfig, ModelConfig, RolloutConfig, TrainConfig, WarmStartConfig
from mem1.demo import Agents
from mem1.models.shipped import MADE_BY
from mem1.parsing.tags import MEM1
from mem1.runtime.device import whereabouts
from mem1.runtime.interrupts import Interrupted
from mem1.seeds import LARGEST, derive_seed
from mem1.train import checkpoint
from mem1.trajectory import Trajectory


@pytest.fixture
def model(make_model, tokenizer, tmp_path) -> str:
    return str(checkpoint.save(tmp_path / "model", make_model(), tokenizer))


@pytest.fixture
def trained(monkeypatch) -> list[tuple[TrainConfig, Path, dict[str, Any]]]:
    """What `mem1 train` calls `train` with; nothing is trained."""
    calls: list[tuple[TrainConfig, Path, dict[str, Any]]] = []
    monkeypatch.setattr(
        "mem1.commands.train_command.train", lambda config, out, **rest: calls.append((config, out, rest))
    )
    return calls


def test_every_command_has_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert {*RUNS} <= set(capsys.readouterr().out.replace(",", " ").split())
    for command in RUNS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = capsys.readouterr().out
        assert "-seconds" not in said and "(default: None)" not in said
        assert ("--seed" in said) == (command in ("train", "eval", "rollout", "demo"))
        assert ("--device" in said) == (command in ("train", "eval", "rollout"))


def test_the_settings_of_a_training_run(trained, tmp_path):
    out = tmp_path / "run"
    given = ["--objectives", "2-6", "--hops", "1", "--passage-tokens", "600", "--regime", "reencode"]
    given += [
        "--prune",
        "state",
        "--max-updates",
        "7",
        "--batch-size",
        "5",
        "--save-every",
        "3",
        "--keep",
        "4",
    ]
    given += ["--seed", str(LARGEST - 1), "--device", "cpu", "--dtype", "bfloat16", "--threads", "1"]
    given += ["--warmstart-steps", "9", "--actor-lr", "1e-5", "--critic-lr", "1e-4", "--kl-coef", "0"]
    assert main(["train", "--out", str(out), *given]) == 0
    ((config, where, rest),) = trained
    assert config == TrainConfig(
        max_updates=7,
        batch_size=5,
        environment={"objectives": (2, 6), "hops": 1, "passage_tokens": 600},
        save_every=3,
        keep=4,
        device="cpu",
        threads=1,
        seed=LARGEST - 1,
        model=ModelConfig(dtype="bfloat16"),
        rollout=RolloutConfig(regime="reencode", prune="state", max_info_tokens=664),
        warmstart=WarmStartConfig(steps=9),
        algorithm=AlgorithmConfig(actor_lr=1e-5, critic_lr=1e-4, kl_coef=0.0),
    )
    assert where == out and not out.exists()
    given = {name: rest.pop(name) for name in ("make_environment", "tokenizer", "draw_example", "progress")}
    assert given["make_environment"]().passage_tokens == 600 and given["draw_example"].prune == "state"
    assert rest == {"resume": False, "overwrite": False}
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert main(["train", "--out", str(out), "--overwrite", "--model", "there"]) == 0
    assert [(r["resume"], r["overwrite"], c.init) for c, _, r in trained[1:]] == [
        (True, False, None),
        (False, True, "there"),
    ]


def test_the_defaults_are_those_of_the_config(trained):
    assert main(["train"]) == 0
    ((config, out, _),) = trained
    environment = {"objectives": (1, 4), "hops": 2, "passage_tokens": 0}
    rollout = RolloutConfig(max_info_tokens=64)
    assert config == TrainConfig(environment=environment, rollout=rollout) and out == Path("runs/train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--actor-lr", "nan"], "actor_lr: expected a finite number > 0 and <= 1, got nan"),
        (["--kl-coef", "-1"], "kl_coef: expected a finite number >= 0, got -1.0"),
        (["--max-updates", "-1"], "updates: expected an integer >= 0, got -1"),
        (["--temperature", "0"], "temperature: expected a finite number >= 0.0001, got 0.0"),
        (["--greedy"], "greedy: expected False in training"),
        (
            ["--prune", "0"],
            "prune: expected 'action', a number of tokens >= 1, a function, or one of last_turns=N",
        ),
        (["--prune", "-5"], "fold, summary, got '-5'"),
        (["--prune", "0.5"], "fold, summary, got '0.5'"),
        (["--prune", "sometimes"], "fold, summary, got 'sometimes'"),
        (
            ["--objectives", "3-2"],
            "objectives: expected a number or a rising interval within 1..32, got (3, 2)",
        ),
    ],
)
def test_a_setting_out_of_range_is_one_line(capsys, tmp_path, trained, arguments, message):
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("mem1 train: ") and message in said.err and said.err.count("\n") == 1
    assert not out.exists() and not trained and said.out == ""


@pytest.mark.parametrize("command", ["eval", "rollout"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objectives", "33"], "objectives: expected a number or a rising interval within 1..32"),
        (["--passage-tokens", "-1"], "passage_tokens: expected a number >= 0"),
        (["--hops", "9"], "hops: expected a number or a rising interval within 1..4"),
        (["--device", "cuda:99"], "device: expected one of auto, cpu"),
    ],
)
def test_a_world_or_a_device_that_cannot_be_is_one_line(capsys, model, tmp_path, command, arguments, message):
    where = ["--out", str(tmp_path / "results")] if command == "eval" else []
    assert main([command, "--model", model, *where, *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--objectives", "3-"], ["--objectives", "two"], ["--seed", "-1"], ["--seed", str(LARGEST)]]
    + [["--threads", "4097"], ["--threads", "0"], ["--threads", "\u0663"]],  # a 3, but not in ASCII
)
def test_the_parser_refuses(capsys, arguments):
    for command in ("train", "demo")[: 2 if arguments[0] == "--threads" else 1]:
        with pytest.raises(SystemExit) as stop:
            main([command, *arguments])
        assert stop.value.code == 2
    assert f"argument {arguments[0]}: expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        ("truncate=0", "tokens: expected an integer >= 1, got 0"),
        ("truncate=", "agents: expected one of mem1, mem1-reencode, full-context, truncate[=N]"),
        ("mem1=3", "agents: expected one of mem1, mem1-reencode"),
        ("", "agents: expected one of mem1, mem1-reencode"),
    ],
)
def test_an_agent_that_is_none_is_refused(capsys, agent, message):
    with pytest.raises(SystemExit):
        main(["eval", "--model", "somewhere", "--agents", agent])
    assert f"argument --agents: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "rollout"])
def test_a_model_that_is_none_is_one_line(capsys, tmp_path, command):
    assert main([command, "--model", str(tmp_path / "nothing")]) == 2
    assert "expected a model folder with a config.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "demo", "rollout"])
def test_an_out_that_cannot_be_written_fails_before_any_work(capsys, tmp_path, model, trained, command):
    (tmp_path / "file").write_text("old")
    out = tmp_path / "file" / "folder" / "t.jsonl"
    assert main([command, *["--model", model] * (command == "rollout"), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"mem1 {command}: out: expected a folder that can be written to, got ")
    assert said.err.count("\n") == 1 and said.out == "" and not trained
    assert (tmp_path / "file").read_text() == "old"


def test_the_demo_says_at_once_that_matplotlib_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 2
    assert "pip install 'mem1_core[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), OSError("disk"), ImportError("torn"), RuntimeError("x")]
)
def test_what_is_no_error_of_the_user_keeps_its_traceback(monkeypatch, error):
    def breaks(*arguments, **settings):
        raise error

    monkeypatch.setattr("mem1.commands.train_command.train", breaks)
    with pytest.raises(type(error), match=str(error)):
        main(["train"])


class Stopped(KeyboardInterrupt):
    def __init__(self, text: str, signum: int) -> None:
        super().__init__(text)
        self.signum = signum


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "mem1 train: interrupted\n"),
        (Stopped("saved update 3", signal.SIGTERM), 143, "mem1 train: saved update 3\n"),
        (Stopped("", signal.SIGINT), 130, "mem1 train: interrupted\n"),
        (InputError("init: expected None"), 2, "mem1 train: init: expected None\n"),
    ],
)
def test_the_exit_status_says_how_it_ended(capsys, monkeypatch, error, status, line):
    def stops(*arguments, **settings):
        raise error

    monkeypatch.setattr("mem1.commands.train_command.train", stops)
    assert main(["train"]) == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("command", ["eval", "rollout"])
def test_the_first_line_says_where_it_runs(capsys, model, tmp_path, command):
    few = ["--out", str(tmp_path / "eval")] if command == "eval" else []
    few += [
        "--episodes",
        "1",
        "--max-turns",
        "1",
        "--max-action-tokens",
        "4",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    threads = torch.get_num_threads()
    try:
        assert main([command, "--model", model, *few, "--objectives", "1"]) == 0
        expected = whereabouts(checkpoint.load(model).model)
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.splitlines()[0] == expected
    assert ", 1 thread; float32" in expected


def test_rollout_prints_transcripts_or_saves_trajectories(capsys, model, tmp_path):
    assert main(["rollout", "--model", model, "--episodes", "1", "--max-turns", "40", "--expert"]) == 0
    said = capsys.readouterr().out
    assert "answered, reward 1.000" in said
    assert re.search(r"^  1  memory  (\d+) of \1 tokens: prompt$", said, re.M)
    assert re.search(r"^  3  memory  \d+ of \d+ tokens: prompt, turn 2$", said, re.M)
    saved = tmp_path / "new" / "t.jsonl"
    few = ["--episodes", "3", "--max-turns", "2", "--prune", "40"]
    assert main(["rollout", "--model", model, *few, "--out", str(saved)]) == 0
    played = [Trajectory.from_dict(json.loads(line)) for line in saved.read_text().splitlines()]
    assert sorted(t.seed for t in played) == [0, 1, 2]
    assert {t.prune for t in played} == {40}
    out = capsys.readouterr().out
    assert "3 episodes, " in out and f"trajectories are in {saved}" in out


def test_turns_without_a_valid_action_are_called_so(capsys, model):
    command = ["rollout", "--model", model, "--episodes", "1", "--max-turns", "2", "--max-action-tokens", "8"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert re.search(r"^  1 invalid  ", said, re.M) and re.search(r"^  1    info  ", said, re.M)


def test_a_rollout_replaces_no_file_and_keeps_what_was_played(capsys, model, tmp_path, monkeypatch):
    saved = tmp_path / "t.jsonl"
    command = ["rollout", "--model", model, "--episodes", "3", "--max-turns", "2", "--out", str(saved)]
    command += ["--num-slots", "1"]
    written = Trajectory.to_json

    def interrupted(trajectory):
        if trajectory.seed == 2:
            raise Interrupted(signal.SIGINT)
        return written(trajectory)

    with monkeypatch.context() as patch:
        patch.setattr(Trajectory, "to_json", interrupted)
        assert main(command) == 130
    said = capsys.readouterr()
    assert f"2 trajectories are in {saved}" in said.out
    assert said.err == "mem1 rollout: interrupted by SIGINT\n"
    kept = saved.read_text()
    assert [json.loads(line)["seed"] for line in kept.splitlines()] == [0, 1]
    assert main(command) == 2
    assert "out: expected a new file, or --overwrite, got" in capsys.readouterr().err
    assert saved.read_text() == kept
    assert main([*command, "--overwrite"]) == 0
    assert len(saved.read_text().splitlines()) == 3 and {*tmp_path.iterdir()} == {saved, Path(model)}


def test_a_rollout_of_which_nothing_is_left_has_failed(capsys, model, tmp_path, monkeypatch):
    def down(self, seed, task=None):
        raise KeyError("x")

    monkeypatch.setattr("mem1.envs.worlds.MultiHopEnv.reset", down)
    saved = tmp_path / "t.jsonl"
    assert main(["rollout", "--model", model, "--episodes", "2", "--out", str(saved)]) == 2
    told = capsys.readouterr()
    assert "rollout: expected an episode that can be played, got 2 that failed, by environment" in told.err
    assert "KeyError: 'x' (line " in told.out and " of test_cli.py, in down)" in told.out
    assert len(saved.read_text().splitlines()) == 2


def test_rollout_replays_an_episode_of_a_training_run(capsys, model, tmp_path):
    saved = tmp_path / "t.jsonl"
    few = ["--episodes", "1", "--max-turns", "1", "--max-action-tokens", "4", "--overwrite"]
    few += ["--out", str(saved)]
    for seed in (derive_seed(5, "training", 3, 1), LARGEST - 1):
        assert main(["rollout", "--model", model, *few, "--seed", str(seed)]) == 0
        assert [json.loads(line)["seed"] for line in saved.read_text().splitlines()] == [seed]
    assert main(["rollout", "--model", model, "--seed", str(LARGEST - 3), "--episodes", "4"]) == 2
    assert "seed: expected one whose last episode is below 2**53" in capsys.readouterr().err


def test_trajectories_are_written_whole_or_not_at_all(capsys, model, tmp_path, monkeypatch):
    saved = tmp_path / "t.jsonl"
    saved.write_text("old")

    def breaks(*arguments, **settings):
        raise OSError("disk")
        yield

    monkeypatch.setattr("mem1.commands.rollout_command.rollout", breaks)
    with pytest.raises(OSError, match="disk"):
        main(["rollout", "--model", model, "--overwrite", "--out", str(saved)])
    assert saved.read_text() == "old"
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "t.jsonl"}
    assert main(["rollout", "--model", model, "--out", str(tmp_path)]) == 2
    assert "out: expected the name of a regular file" in capsys.readouterr().err


def limits(*arguments: str) -> RolloutConfig:
    runs = dict.fromkeys(RUNS, lambda options, progress: None)
    options = build_parser(runs).parse_args(["rollout", "--model", "somewhere", *arguments])
    return rollout_config(options, (options.objectives or (2, 2))[1])


def test_limits_of_a_stream_of_facts():
    """As many turns as twice the reader's, and a piece of noise as its mean has it, thrice."""
    usual = limits("--env", "updates")
    many = limits("--env", "updates", "--environment-args", '{"updates": 8, "facts_per_turn": 1}')
    assert usual.max_turns == 40 and many.max_turns >= 2 * (2 * 9 + 1)
    assert limits("--env", "updates", "--objectives", "16").max_turns >= 2 * (16 * 4 // 2 + 1)
    noisy = limits("--env", "updates", "--environment-args", '{"noise": [0.1, 0.9], "facts_per_turn": 16}')
    assert usual.max_info_tokens == 512 and noisy.max_info_tokens >= 3 * 16 * 10 * 4


def test_limits_follow_the_world_unless_given():
    default = limits()
    assert (default.max_info_tokens, default.max_turns) == (64, 40)
    large = limits("--objectives", "16", "--hops", "4", "--passage-tokens", "600")
    assert large.max_info_tokens >= 600 and large.max_turns > 16 * 4 + 1
    assert (
        limits("--turn-hint").format.hint(2) == "[HINT]You have 2 turns left.[/HINT]"
        and default.format == MEM1
    )
    given = limits("--passage-tokens", "600", "--max-info-tokens", "5", "--max-turns", "3")
    assert (given.max_info_tokens, given.max_turns) == (5, 3)


@pytest.mark.parametrize(
    "world", [["--hops", "2", "--passage-tokens", "400"], ["--hops", "4"], ["--prune", "never"]]
)
def test_the_largest_worlds_fit_a_new_model(world):
    assert limits("--objectives", "16", *world).positions() <= ModelConfig().max_position_embeddings


def test_the_demo_can_train_its_models_first(tmp_path, monkeypatch):
    called: list[Any] = []
    for name in ("train_stages", "demo"):
        monkeypatch.setattr(demo_command, name, lambda *given, **named: called.append((given, named)))
    assert main(["demo", "--train", "--out", str(tmp_path)]) == 0
    ((stages, _), how), ((out, agents), _) = called
    assert [stage.out for stage in stages] == [tmp_path / "runs" / name for name in demo_command.STAGES]
    assert how.pop("goes_on") == "the same command goes on from it"
    assert how == {"resume": True, "overwrite": False}
    (tmp_path / "results.json").write_text("{}")
    assert main(["demo", "--train", "--out", str(tmp_path)]) == 2, "nobody's, as there are no runs beside it"
    (tmp_path / "runs").mkdir()  # an earlier one's is replaced, as it goes on
    assert main(["demo", "--train", "--out", str(tmp_path)]) == 0
    assert called[-1][1]["overwrite"] and called[-2][1]["overwrite"] is False
    assert out == tmp_path and agents == Agents(*(tmp_path / "runs" / run for run in MADE_BY.values()))


@pytest.mark.slow
def test_the_quick_demo(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"done. In {tmp_path}:" in out
    told = out.split(f"done. In {tmp_path}:")[1].split("\n")
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {line.split()[0] for line in told if line} | {"train", "tokenizer"}
    assert (tmp_path / "tables.md").read_text().split("\n\n")[0] in out
    report = json.loads((tmp_path / "results.json").read_text())
    exact = [row for row in report["parity"] if row["regime"] != "paper" and row["dtype"] == "float32"]
    assert len(exact) == 2
    assert all(row["max_dlogp"] <= 5e-5 for row in exact)
    played = [json.loads(line) for line in (tmp_path / "trajectories.jsonl").read_text().splitlines()]
    assert [line["agent"] for line in played] == ["MEM1"] * 8 + ["full context"] * 8
    rows = report["evaluation"]
    assert [(row["agent"], row["objectives"]) for row in rows] == [
        (agent, n) for agent in ("MEM1", "full context") for n in (1, 2)
    ]
    assert all(row["errors"] == {} for row in rows)
    assert all(row["reward"] >= 0.8 for row in rows if row["agent"] == "MEM1"), "it has learned"
    assert re.search(r"^  2  memory  \d+ of \d+ tokens: prompt, turn 1$", out, re.M)
    steps = [json.loads(line) for line in (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [(step["phase"], step["step"]) for step in steps] == [("policy", 1), ("policy", 2)]
    assert main(["view", str(tmp_path / "trajectories.jsonl"), "--tokenizer", "mem1-tiny"]) == 0
    capsys.readouterr()
    (tmp_path / "train").rename(tmp_path / "other")
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 2, "what is there stays"
    said = capsys.readouterr().err
    assert "out: expected a folder without results, or --overwrite, which replaces these" in said
    assert "tables.md" in said and "resume" not in said
