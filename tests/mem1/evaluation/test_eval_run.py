"""An evaluation in a folder: its files, its restarts, and `mem1 eval` from outside."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mem1.checks import InputError
from mem1.cli import main
from mem1.envs.toy.tokenizer import build_tokenizer
from mem1.evaluation import eval_run
from mem1.evaluation.eval_run import Cell, EvaluationFolder
from mem1.train import checkpoint
from mem1.trajectory import Trajectory

FEW = ["--objectives", "1", "2", "--episodes", "3", "--max-turns", "3", "--max-action-tokens", "16"]
ALL = ["mem1", "mem1-reencode", "full-context", "truncate=30", "last-observations=1", "running-summary=40"]
ALL += ["external-memory=2", "oracle", "random"]


@pytest.fixture(scope="module")
def model(make_model, tokenizer, tmp_path_factory) -> str:
    return str(checkpoint.save(tmp_path_factory.mktemp("model") / "model", make_model(), tokenizer))


def files(folder: Path) -> dict[str, Any]:
    """What is in a folder of results, without the times of the clock."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            assert path.name == "tokenizer"
        elif path.suffix == ".png":
            assert path.stat().st_size > 5000
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[path.name] = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
        elif path.suffix == ".csv":
            with path.open() as file:
                rows = list(csv.DictReader(file))
            found[path.name] = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
        else:  # the column of seconds is the last one; in the paper's tables one of four
            found[path.name] = re.sub(r"[-\d.e]+( \[[^\]]*\])? \|$", "", path.read_text(), flags=re.M)
    if "tables.md" in found:
        found["tables.md"] = found["tables.md"].partition("As in the paper")[0].replace(" ", "")
    return found


def test_every_agent_gets_a_row_for_each_size(model, tmp_path, capsys):
    command = ["eval", "--model", model, *FEW, "--agents", *ALL, "--out", str(tmp_path / "a")]
    assert main([*command, "--json"]) == 0
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [(row["agent"], row["objectives"]) for row in rows] == [(a, n) for a in ALL for n in (1, 2)]
    assert all(row["episodes"] == 3 and row["errors"] == {} for row in rows)
    for row in rows:
        low, high = row["turns_interval"]
        assert low <= row["turns"] <= high and row["peak_tokens"] > row["peak_tokens_without_prompt"] > 0
    by = {(row["agent"], row["objectives"]): row for row in rows}
    assert by["oracle", 2]["exact_match"] == 2.0 and by["oracle", 2]["reward"] == 1.0
    assert by["random", 2]["exact_match"] == 0.0
    assert by["mem1", 2]["model_tokens"] <= by["mem1-reencode", 2]["model_tokens"]
    assert by["full-context", 2]["peak_tokens"] >= by["truncate=30", 2]["peak_tokens"]
    assert "max_dlogp" in said.err and "truncate=30" in said.err
    played = [json.loads(line) for line in (tmp_path / "a" / "trajectories.jsonl").read_text().splitlines()]
    assert [row["agent"] for row in played] == [a for a in ALL for _ in range(6)]
    prompts = {
        a: [row["tokens"][: row["segments"][0][2]] for row in played if row["agent"] == a] for a in ALL
    }
    assert len({tuple(prompt) for prompt in prompts["mem1"]}) == 6
    assert all(prompts[a] == prompts["mem1"] for a in ALL), "every agent gets the same episodes"
    assert {Trajectory.from_dict(row).regime for row in played if row["agent"] == "mem1-reencode"} == {
        "reencode"
    }
    table = (tmp_path / "a" / "tables.md").read_text()
    assert "2: peak x10^2" in table and table.count("external-memory=2") == 3
    assert not (tmp_path / "a" / "parts").exists()
    # Once more: nothing is played, and the files are the same.
    before = files(tmp_path / "a")
    assert main(command) == 0
    assert files(tmp_path / "a") == before


def test_other_settings_are_refused_and_nothing_is_lost(model, tmp_path, capsys):
    out, command = tmp_path / "a", ["eval", "--agents", "oracle", "--objectives", "1", "--out"]
    assert main([*command, str(out), "--episodes", "2"]) == 0
    before = files(out)
    for name in ("trajectories.jsonl", "results.csv"):  # of another program, under our names
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / name).write_text("mine")
    assert main([*command, str(tmp_path / "c"), "--overwrite"]) == 2
    assert "out: expected a new or empty folder" in capsys.readouterr().err
    assert (tmp_path / "c" / "results.csv").read_text() == "mine"
    assert main([*command, str(out), "--episodes", "3"]) == 2
    assert "out: expected the settings of the run in" in capsys.readouterr().err
    assert files(out) == before
    assert main([*command, str(out), "--episodes", "3", "--overwrite"]) == 0
    assert len(files(out)["trajectories.jsonl"]) == 3
    (out / "notes.txt").write_text("mine")  # beside a run's own files others are left alone
    for more in ([], ["--overwrite"]):
        assert main([*command, str(out), "--episodes", "3", *more]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("mine")
    for more in ([], ["--overwrite"]):
        assert main([*command, str(tmp_path / "b"), *more]) == 2
        assert "out: expected a new or empty folder, or one of `mem1 eval`" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model: expected a folder or a Hugging Face id for a policy, got None"),
        (["--agents", "random", "--env", "web-qa"], "expected arguments of web_qa: missing"),
        (["--agents", "oracle", "oracle"], "agents: expected each once, got 'oracle oracle'"),
        (
            ["--agents", "oracle", "--env", "webshop"],
            "expected arguments of webshop: missing",
        ),
        (["--agents", "oracle", "--tasks", "rows.jsonl"], "tasks: expected none beside multihop"),
        (["--agents", "oracle", "--objectives", "33"], "objectives: expected a number or a rising interval"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(tmp_path, capsys, arguments, message):
    assert main(["eval", "--out", str(tmp_path / "a"), *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not (tmp_path / "a").exists()


def test_a_world_that_is_down_is_shown(model, tmp_path, capsys, monkeypatch):
    def down(self, seed, task=None):
        raise ConnectionError("no answer")

    monkeypatch.setattr("mem1.envs.worlds.MultiHopEnv.reset", down)
    few = ["--objectives", "1", "--episodes", "2", "--out", str(tmp_path / "a")]
    assert main(["eval", "--model", model, *few]) == 2
    said = capsys.readouterr().err
    assert (
        "mem1, 1 objective: expected an episode that can be played, got 2 that failed, by environment_e"
        in said
    )
    # Nothing is kept of that: once it is up again, the same command plays everything.
    monkeypatch.undo()
    assert main(["eval", "--model", model, *few, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["errors"] for row in rows] == [{}, {}]


def test_what_names_no_file_is_no_path(tmp_path, capsys):
    command = ["eval", "--agents", "oracle", "--objectives", "1", "--episodes", "1"]
    for n, text in enumerate(("x" * 300, "**bold**", "a\0b")):
        arguments = ["--environment-args", json.dumps({"colour": text}), "--out", str(tmp_path / str(n))]
        assert main([*command, *arguments]) == 2
        assert "expected arguments of MultiHopEnv" in capsys.readouterr().err


def test_one_that_cannot_be_played_at_the_end_holds_nobody_up(tmp_path):
    def play(places: range, advance: Any) -> list[Trajectory]:
        played = [handmade(seed) for seed in places]
        broken = replace(played[-1], finish_reason="environment_error", error="OSError: x")
        return [*played[:-1], broken] if places.stop == 33 else played

    with closing(EvaluationFolder(tmp_path / "a", {})) as folder:
        (row,) = folder.run([Cell("agent", 1, play)], 33)
    assert row.episodes == 33 and row.errors == {"OSError": 1}


def test_other_weights_under_the_same_name_are_other_settings(make_model, tokenizer, tmp_path, capsys):
    few = ["--objectives", "1", "--episodes", "1", "--max-turns", "2", "--max-action-tokens", "8"]
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        checkpoint.save(tmp_path / "model", make_model(seed=seed), tokenizer)
        command = ["eval", "--model", str(tmp_path / "model"), *few, "--agents", "mem1"]
        assert main([*command, "--out", str(tmp_path / "a")]) == 2 * seed
    assert "weights" in capsys.readouterr().err


def test_objectives_are_those_of_the_episodes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("two_questions.py").write_text(
        "from mem1.envs.toy.multihop import MultiHopEnv\n\n\ndef make():\n    return MultiHopEnv(2)\n"
    )
    out = ["--out", str(tmp_path / "a"), "--episodes", "2", "--json"]
    made = ["--env", "two_questions:make", "--agents", "oracle"]
    assert main(["eval", *made, *out]) == 2
    assert "model: expected one: its tokenizer counts" in capsys.readouterr().err
    build_tokenizer().save_pretrained("words")
    assert main(["eval", *made, *out, "--model", "words"]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["objectives"] == 2 and row["exact_match"] == 2.0
    # `mem1 view` finds the tokenizer, though no model has played.
    assert main(["view", str(tmp_path / "a" / "trajectories.jsonl")]) == 0


def test_agents_are_added_to_a_finished_evaluation(tmp_path, capsys):
    """As if they had been asked for at once; who was there stays first."""

    def played(name: str) -> dict[str, Any]:
        return {file: rows for file, rows in files(tmp_path / name).items() if file != "tables.md"}

    command = ["eval", "--objectives", "1", "2", "--episodes", "3", "--agents"]
    assert main([*command, "oracle", "--out", str(tmp_path / "a")]) == 0
    before = played("a")["trajectories.jsonl"]
    assert main([*command, "oracle", "random", "--out", str(tmp_path / "a")]) == 0
    assert main([*command, "oracle", "random", "--out", str(tmp_path / "b")]) == 0
    assert played("a") == played("b") and played("a")["trajectories.jsonl"][:6] == before
    for other in (["random"], ["random", "oracle"], ["oracle"]):
        assert main([*command, *other, "--out", str(tmp_path / "a")]) == 2
        assert "out: expected the settings of the run in" in capsys.readouterr().err
    assert played("a") == played("b")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda lines: lines[:-1],
            "jsonl: expected 2 trajectories of one, .*, two, .*, or overwrite, got .3 of one, two",
        ),
        (
            lambda lines: [*lines[:-1], '{"a": 1}'],
            "trajectories.jsonl:4: expected a trajectory, or",
        ),
        (lambda lines: [*lines[:-1], "nonsense"], "trajectories.jsonl:4: expected a line of JSON"),
    ],
)
def test_trajectories_that_were_damaged_are_named(tmp_path, damage, message):
    cells = [
        Cell(name, n, lambda places, advance: [handmade(s) for s in places])
        for n, name in ((1, "one"), (2, "two"))
    ]
    with closing(EvaluationFolder(tmp_path / "a", {})) as folder:
        folder.run(cells, 2)
        file = tmp_path / "a" / "trajectories.jsonl"
        file.write_text("".join(line + "\n" for line in damage(file.read_text().splitlines())))
    with closing(EvaluationFolder(tmp_path / "a", {})) as folder, pytest.raises(InputError, match=message):
        folder.run(cells, 2)


def test_a_folder_in_use_is_left_alone(tmp_path):
    with closing(EvaluationFolder(tmp_path / "a", {})) as first:
        first.run([Cell("agent", 1, lambda places, advance: [handmade(n) for n in places])], 2)
        second = EvaluationFolder(tmp_path / "a", {})
        with pytest.raises(InputError, match="out: expected a folder that no other process uses"):
            second.run([Cell("agent", 1, lambda places, advance: [])], 2)
    (tmp_path / "a" / "settings.json").write_text("[]")
    with pytest.raises(InputError, match="out: expected an object in settings.json, or overwrite"):
        EvaluationFolder(tmp_path / "a", {})


def test_a_row_that_the_model_has_no_positions_for_is_refused(make_model, tokenizer, tmp_path, capsys):
    small = checkpoint.save(tmp_path / "small", make_model(max_position_embeddings=16384), tokenizer)
    sizes = ["--objectives", "1", "16", "--out", str(tmp_path / "a")]
    assert main(["eval", "--model", str(small), *sizes]) == 2
    said = capsys.readouterr()
    assert "max_position_embeddings: expected at least" in said.err and "objective 1/" not in said.out


def killed(command: list[str], after: float) -> bool:
    """Whether the command was killed, `after` seconds from its first part."""
    out = Path(command[command.index("--out") + 1])
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not out.exists():
        time.sleep(0.02)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    assert process.returncode == 0
    return False


@pytest.mark.slow
def test_a_killed_evaluation_gives_the_files_of_one_that_was_not(model, tmp_path):
    """Killed again and again, a little later each time, until it comes to its end."""
    command = [sys.executable, "-m", "mem1", "eval", "--model", model, "--agents", "mem1", "oracle"]
    command += ["--objectives", "1", "3", "--episodes", "70", "--max-turns", "4", "--max-action-tokens", "16"]
    assert subprocess.run([*command, "--out", str(tmp_path / "whole")], capture_output=True).returncode == 0
    kills, pause = 0, 0.4
    while killed([*command, "--out", str(tmp_path / "broken")], pause):
        kills, pause = kills + 1, 2 * pause
    assert kills >= 2
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")["trajectories.jsonl"]) == 4 * 70


def test_a_part_is_whole_or_not_there(tmp_path):
    """An exception in the middle of a part loses that part alone."""
    played: list[int] = []

    def play(places: range, advance: Any) -> list[Trajectory]:
        played.extend(places)
        if len(played) == 96 and broken:
            raise OSError("disk")
        return [handmade(seed) for seed in places]

    broken, cell = True, Cell("agent", 1, play)
    with pytest.raises(OSError, match="disk"):
        with closing(EvaluationFolder(tmp_path / "a", {"x": 1})) as folder:
            folder.run([cell], 130)
    (tmp_path / "a" / ".trajectories.jsonl.123.new").write_text("left by a kill")
    broken = False
    with closing(EvaluationFolder(tmp_path / "a", {"x": 1})) as folder:
        (row,) = folder.run([cell], 130)
    assert not [*(tmp_path / "a").glob(".*")]
    assert played == [*range(96), *range(64, 130)] and row.episodes == 130
    seeds = [
        json.loads(line)["seed"] for line in (tmp_path / "a" / "trajectories.jsonl").read_text().splitlines()
    ]
    assert seeds == [*range(130)]
    with pytest.raises(InputError, match="out: expected the settings of the run"):
        EvaluationFolder(tmp_path / "a", {"x": 2})


class Killed(BaseException):
    """A kill: nobody catches it."""


def test_a_kill_at_any_file_operation_loses_nothing(tmp_path, monkeypatch):
    def play(places: range, advance: Any) -> list[Trajectory]:
        return [handmade(seed) for seed in places]

    def evaluated(out: Path, dies_at: int | None = None, overwrite: bool = False) -> int:
        """How many file operations it took, or had taken."""
        count = 0

        def counting(function: Any) -> Any:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == dies_at:
                    raise Killed
                return function(*arguments, **options)

            return counted

        with monkeypatch.context() as patch:
            for name in ("replace", "mkdir", "unlink"):
                patch.setattr(Path, name, counting(getattr(Path, name)))
            patch.setattr(shutil, "rmtree", counting(shutil.rmtree))
            cells = [Cell("one", 1, play), Cell("two", 2, play)]
            with closing(EvaluationFolder(out, {"x": 1}, overwrite=overwrite)) as folder:
                folder.run(cells, 3)
        return count

    monkeypatch.setattr(eval_run, "plot_results", lambda rows, path: path.write_bytes(b"drawn" * 2000))
    monkeypatch.setattr(eval_run, "_PART", 2)
    operations = evaluated(tmp_path / "whole")
    for overwrite in (False, True):
        for dies_at in range(1, operations + 1 + 10 * overwrite):
            out = tmp_path / f"{overwrite}-{dies_at}"
            if overwrite:
                evaluated(out)
            with contextlib.suppress(Killed):
                evaluated(out, dies_at, overwrite)
            evaluated(out)
            assert files(out) == files(tmp_path / "whole")
            assert not [*out.glob(".*")]


def handmade(seed: int) -> Trajectory:
    import torch

    from mem1_core.segments import Segment

    segments = [Segment("prompt", 0, 2), Segment("answer", 1, 1)]
    return Trajectory(torch.zeros(3, dtype=torch.int64), segments, torch.zeros(3), "action", seed=seed)
