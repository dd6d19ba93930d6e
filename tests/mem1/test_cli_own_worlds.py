"""The command line with a model, an environment, a format and a rule of the user's own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from mem1.cli import main
from mem1.train import checkpoint
from mem1.trajectory import Trajectory

WORLD = '''
from dataclasses import replace

from mem1.evaluation.baselines.agents import Agent
from mem1.envs.base import ExpertAction, Step
from mem1.parsing.action import Action

class Guess:
    """One question, any answer is right and ends it."""

    objectives = 1

    def __init__(self, words="north", boss="ada"):
        self.words, self.boss, self.reward = words, boss, 0.0

    def reset(self, seed, task=None):
        return f"who is the boss of {self.words} ?"

    def step(self, action):
        self.reward = float(action.kind == "answer")
        info = {"exact_match": self.reward, "f1": self.reward}
        return Step(f"the boss is {self.boss}", self.reward, self.reward > 0, info=info)

class Taught(Guess):
    def expert_action(self):
        return ExpertAction("", Action("answer", "ada"))

class Forgetful(Agent):
    name = "forgetful"

    def settings(self, config):
        return replace(config, prune="last_turns=1")

def keep_all(segments):
    return [True] * len(segments)

class Small:
    def __call__(self, segments):
        return [True] * len(segments)

    def peak_tokens(self, prompt, action, info, turns):
        return 10

small = Small()

number = 3
'''
SMALL = "--max-turns 2 --max-action-tokens 24 --max-prompt-tokens 64 --max-info-tokens 64".split()


@pytest.fixture
def model(make_model, tokenizer, tmp_path, monkeypatch) -> str:
    """A saved model, with world.py in the current folder."""
    (tmp_path / "own_world.py").write_text(WORLD)
    monkeypatch.chdir(tmp_path)
    return str(checkpoint.save(tmp_path / "model", make_model(), tokenizer))


def test_training_goes_on_with_the_same_options_only(model, capsys):
    """The same model, environment and arguments; where it runs may change."""
    command = ["train", "--model", model, "--out", "run", "--batch-size", "2", *SMALL]
    command += ["--environment", "own_world:Guess", "--environment-args", '{"words": "the south"}']
    assert main([*command, "--max-updates", "1"]) == 0
    assert json.loads(Path("run/train.json").read_text())["environment"] == {
        "name": "own_world:Guess",
        "words": "the south",
    }
    told = re.search(r", ([\d.]+) MB for training, ", capsys.readouterr().out)
    parameters = sum(p.numel() for p in checkpoint.load(model)[0].parameters())
    # Gradients and two moments of actor and critic, in fp32.
    assert told is not None and float(told[1]) > 0.9 * 2 * 3 * 4 * parameters / 1e6
    more = [*command, "--max-updates", "2", "--resume"]
    other = [*more, "--environment-args", '{"words": "the north"}']
    for changed, message in [
        (other, "environment.words the south -> the north"),
        ([*more, "--environment", "own_world:Taught"], "own_world:Guess -> own_world:Taught"),
        ([*more, "--prune", "never"], "rollout.prune action -> never"),
        ([*more, "--format", "chunks"], "rollout.format.state IS -> None"),
    ]:
        assert main(changed) == 2
        assert message in capsys.readouterr().err
    assert main([*more, "--kv-memory", "1e8", "--num-slots", "1"]) == 0
    assert "rollout.kv_memory 0.6 -> 100000000.0" in capsys.readouterr().out
    played = ["rollout", "--model", "run", "--episodes", "1", *SMALL, "--environment", "own_world:Guess"]
    assert main([*played, "--prune", "never", "--regime", "reencode"]) == 0
    said = capsys.readouterr().out
    assert (
        "trained with prune action, now never" in said and "trained with regime carry, now reencode" in said
    )
    assert main(played) == 0 and "trained with" not in capsys.readouterr().out
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [(record["phase"], record["step"]) for record in records] == [("policy", 1), ("policy", 2)]


def test_a_rule_of_ones_own(model, capsys):
    command = ["rollout", "--model", model, "--episodes", "2", "--out", "played.jsonl", *SMALL]
    command += ["--environment", "own_world:Taught", "--expert", "--prune", "own_world:keep_all"]
    assert main(command) == 0
    for line in Path("played.jsonl").read_text().splitlines():
        trajectory = Trajectory.from_dict(json.loads(line))
        assert trajectory.reward == 1.0 and str(trajectory.prune) == "own_world:keep_all"
        assert trajectory.peak_tokens() == len(trajectory.tokens)
    assert "2 episodes" in capsys.readouterr().out


def test_a_number_from_a_module_is_a_window_of_tokens(model):
    command = ["rollout", "--model", model, "--episodes", "1", *SMALL]
    assert main([*command, "--environment", "own_world:Guess", "--prune", "own_world:number"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--environment", "own_world:Guess", "--expert"], "expert: expected an environment with expert"),
        (["--environment", "own_world:Guess", "--hops", "2"], "hops: expected none beside environment"),
        (["--environment", "own_world:Guess", "--environment-args", '{"word": 1}'], "argument 'word'"),
        (["--environment", "own_world:number"], "environment: expected what makes an environment, got 3"),
        (["--prune", "fold"], "prune: expected a format with an action of kind branch and return for 'fold'"),
        (["--prune", "own_world:small"], "prune='own_world:Small': expected peak_tokens of at least"),
        (["--max-state-tokens", "30"], "max_state_tokens: expected at most max_action_tokens=24"),
        (["--kv-memory", "100"], "kv_memory: expected at least"),
        (["--kv-memory", "1.5"], "kv_memory: expected a share of at most 1, or bytes from 2 on, got 1.5"),
        (["--chat", "turns"], "chat: expected 'raw' for a tokenizer without a chat template, got 'turns'"),
        (["--format", "official"], "tokenizer: expected one that can write <think>, got ' <unk>'"),
        (["--max-info-tokens", "1"], "max_info_tokens: expected at least"),
        (["--max-action-tokens", "1"], "max_action_tokens: expected at least"),
    ],
)
def test_what_cannot_be_used_is_one_line(model, capsys, arguments, message):
    assert main(["rollout", "--model", model, "--episodes", "1", *SMALL, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said.splitlines()[-1] and "Traceback" not in said


def test_episodes_that_fail_say_why(model, capsys):
    command = ["rollout", "--model", model, "--episodes", "2", "--out", "played.jsonl", *SMALL]
    command += ["--environment", "own_world:Guess", "--max-prompt-tokens", "5"]
    assert main(command) == 2
    said, blamed = capsys.readouterr()
    assert "got 2 that failed, by environment_error: ValueError: reset: expected a prompt" in blamed
    assert "2 episodes failed, seed " in said
    assert " by environment_error: ValueError: reset: expected a prompt of at least one token and" in said
    assert "at most max_prompt_tokens=5, got more than 5" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--environment", "own_world"],
            "--env: expected MODULE:NAME or one of multihop, updates, delayed",
        ),
        (["--environment", "own_world:Nobody"], "has no attribute 'Nobody'"),
        (["--environment", "no_such_world:Guess"], "No module named 'no_such_world'"),
        (["--environment-args", "[1]"], "argument --environment-args: expected a JSON object, got '[1]'"),
        (["--environment-args", "{"], "argument --environment-args: expected JSON, got '{'"),
        (["--format", "html"], "argument --format: expected one of mem1, official, fold, summary, chunks"),
        (["--format", "twins.json"], "expected none that begins with another, got 'IS' and 'ISS'"),
        (["--format", "empty.json"], "a tag's name without blanks, <, > and /, got ''"),
        (["--format", "odd.json"], "format: expected a table of state, actions, observation"),
        (["--format", "broken.json"], "broken.json: expected YAML, got other text"),
    ],
)
def test_the_parser_refuses(model, capsys, arguments, message):
    Path("twins.json").write_text('{"actions": [{"tag": "ISS", "kind": "query"}]}')
    Path("empty.json").write_text('{"state": ""}')
    Path("broken.json").write_text('{"state": ')
    Path("odd.json").write_text('{"states": "IS"}')
    with pytest.raises(SystemExit) as stop:
        main(["rollout", "--model", model, *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_evaluation_goes_on_with_the_same_code_only(model, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "own_world", raising=False)  # of another test, in another folder
    command = ["eval", "--agents", "mem1", "--model", model, "--episodes", "1", "--out", "eval", *SMALL]
    command += ["--environment", "own_world:Guess", "--prune", "own_world:keep_all"]
    assert main(command) == 0 and main(command) == 0
    Path("own_world.py").write_text(WORLD + "number = 4\n")
    assert main(command) == 2
    assert "out: expected the settings of the run in eval, {'files': " in capsys.readouterr().err


def test_an_agent_of_ones_own(model, capsys):
    command = ["eval", "--agents", "mem1", "own_world:Forgetful", "--model", model, "--episodes", "2", *SMALL]
    assert main([*command, "--out", "eval", "--environment", "own_world:Guess"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\| *forgetful \| ", said) and re.search(r"\| *agent \| *regime", said)
    rows = [json.loads(line) for line in Path("eval/trajectories.jsonl").read_text().splitlines()]
    assert [(row["agent"], row["prune"]) for row in rows] == [("mem1", "action")] * 2 + [
        ("forgetful", "last_turns=1")
    ] * 2
    with pytest.raises(SystemExit):
        main(["eval", "--agents", "own_world:Guess", "--model", model])
    said = capsys.readouterr().err
    assert "--agents: expected an Agent (mem1.evaluation.baselines.agents), got 'own_world:Guess'" in said
    assert said.count("\n") == 1 and said.endswith("(mem1 eval --help has all options)\n")
