"""The folder of a run, killed at every moment of a save."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from mem1.checks import InputError
from mem1.train import checkpoint
from mem1.train.checkpoint import Place, numbered
from mem1.train.run_folder import RunFolder

SETTINGS = {"seed": 0, "max_updates": 9, "rollout": {"num_slots": 4, "regime": "carry"}, "init": None}


class Killed(BaseException):
    """The process is gone: no `finally` of the code under test may count on running."""


@pytest.fixture
def model(make_model):
    return make_model(hidden_size=16, intermediate_size=16, num_hidden_layers=1)


SHARD = "trainer/shard-00001-model-00001-of-00001.safetensors"
FILES = ["model.safetensors", "config.json", "tokenizer.json", "trainer.json", SHARD]


def begun(path: Path, keep: int = 2) -> RunFolder:
    run = RunFolder(path, keep)
    run.begin(SETTINGS, overwrite=False)
    return run


def save(run: RunFolder, step: int, model, tokenizer, score: float | None = None) -> None:
    run.save(Place(1, step), model, tokenizer, {"step": step}, {"x": torch.ones(100)}, score=score)


def names(run: RunFolder) -> list[str]:
    return [path.name for path in numbered(run.path)]


def test_the_newest_and_the_best_stay(model, tokenizer, tmp_path):
    run = begun(tmp_path / "run")
    run.save(Place(0, 500), model, tokenizer, {})
    for step, score in ((1, 0.1), (2, 0.7), (3, 0.3), (4, 0.2), (5, None)):
        save(run, step, model, tokenizer, score)
    assert names(run) == ["policy-000005", "policy-000004", "policy-000002"]
    assert os.readlink(run.path / "last") == "checkpoints/policy-000005"
    assert os.readlink(run.path / "best") == "checkpoints/policy-000002"
    assert checkpoint.score_of(run.path / "best") == 0.7 and checkpoint.score_of(run.path / "last") is None
    assert checkpoint.load(run.path / "best").trainer["step"] == 2
    assert (
        checkpoint.load(run.path).trainer["step"] == checkpoint.load(run.path / "last").trainer["step"] == 5
    )
    save(run, 6, model, tokenizer, 0.7)  # as good and newer
    assert names(run) == ["policy-000006", "policy-000005"]
    assert sorted(path.name for path in run.path.iterdir()) == [
        *("best", "checkpoints", "last", "metrics.jsonl", "train.json")
    ]


def test_places_follow_one_another():
    assert Place(0, 900) < Place(0, 1000) < Place(1, 0) < Place(1, 9) < Place(1, 10**7)
    for place in (Place(0, 900), Place(1, 0), Place(1, 10**7)):
        assert Place.of(str(place)) == place
    assert Place.of("policy-1.new") is None and Place.of(".policy-000001.77.new") is None


@pytest.mark.parametrize("phase", ["save", "remove"])
def test_a_run_killed_anywhere_in_a_save_goes_on(model, tokenizer, tmp_path, monkeypatch, phase):
    """Every file operation of a save is the last one, once: what is left can be loaded, nothing is lost."""
    operations = [(Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "symlink_to"), (os, "fsync")]
    operations += [(torch, "save"), (shutil, "rmtree")]
    last, kills = 3 if phase == "remove" else 1, 0
    for count in range(200):
        path = tmp_path / f"run{count}"
        run = begun(path, keep=1)
        for step in range(last):
            save(run, step, model, tokenizer, score=float(step))
        calls = 0
        with monkeypatch.context() as patch:

            def guard(call, *arguments, most=count, **settings):
                nonlocal calls
                calls += 1
                if calls > most:
                    raise Killed
                return call(*arguments, **settings)

            for owner, name in operations:
                original = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, call=original, **s: guard(call, *a, **s))
            try:
                save(run, last, model, tokenizer, score=-1.0)
            except Killed:
                kills += 1
        run.close()
        again = RunFolder(path, keep=1)
        loaded, _, told = again.resume(SETTINGS)
        assert loaded.trainer["step"] in (last - 1, last) and len(told) == 1
        assert loaded.trainer["step"] == checkpoint.load(path / "last").trainer["step"]
        assert not list(path.rglob(".*")), "leftovers are cleaned"
        step = loaded.trainer["step"] + 1
        save(again, step, model, tokenizer, score=-2.0)
        again.close()
        assert checkpoint.load(path).trainer["step"] == step
        assert checkpoint.load(path / "best").trainer["step"] == last - 1
        if calls <= count:
            break
    assert kills > 10 and calls <= count, "no save came to its end"


def test_without_its_links_a_run_is_found(model, tokenizer, tmp_path):
    run = begun(tmp_path / "run")
    save(run, 1, model, tokenizer)
    (run.path / "last").unlink()
    assert checkpoint.load(run.path).trainer["step"] == 1
    run.resume(SETTINGS)
    assert checkpoint.load(run.path / "last").trainer["step"] == 1


def test_a_run_is_not_overwritten_without_being_told(model, tokenizer, tmp_path):
    run = begun(tmp_path / "run")
    save(run, 1, model, tokenizer, score=1.0)
    run.metrics.write_text('{"phase": "policy", "step": 1}\n')
    with pytest.raises(
        InputError, match="out: expected a folder without a run, got .*policy-000001 and metrics"
    ):
        RunFolder(run.path).begin(SETTINGS, overwrite=False)
    run.close()
    assert run.metrics.read_text() and names(run) == ["policy-000001"]
    (run.path / "mine.txt").write_text("kept")
    RunFolder(run.path).begin(SETTINGS, overwrite=True)
    assert names(run) == [] and run.metrics.read_text() == ""
    assert (run.path / "mine.txt").read_text() == "kept"
    assert not (run.path / "best").is_symlink() and not (run.path / "last").exists()


def test_every_difference_is_listed_and_those_that_matter_refused(model, tokenizer, tmp_path):
    run = begun(tmp_path / "run")
    save(run, 1, model, tokenizer)
    other = {"seed": 1, "max_updates": 12, "rollout": {"num_slots": 8, "regime": "reencode"}}
    with pytest.raises(InputError) as error:
        run.resume(other)
    assert str(error.value) == (
        "resume: expected the settings of the run, got rollout.regime carry -> reencode, seed 0 -> 1 "
        "(max_updates 9 -> 12, rollout.num_slots 4 -> 8 may change)"
    )
    assert json.loads((run.path / "train.json").read_text()) == SETTINGS
    free = {"seed": 0, "max_updates": 12, "rollout": {"num_slots": 8, "regime": "carry"}}
    _, _, told = run.resume(free)
    assert told == [
        "resumed with other settings: max_updates 9 -> 12, rollout.num_slots 4 -> 8",
        "goes on from policy-000001",
    ]
    assert json.loads((run.path / "train.json").read_text()) == free | {"init": None}


def test_records_of_steps_to_come_are_dropped(model, tokenizer, tmp_path):
    run = begun(tmp_path / "run")
    lines = [
        *(
            '{"phase": "warmstart", "step": 900}',
            '{"phase": "policy", "step": 1}',
            '{"phase": "policy", "step": 2}',
        ),
        *('{"phase": "policy", "step": 3}', '{"phase": "policy", "st'),
    ]
    run.metrics.write_text("\n".join(lines))
    save(run, 2, model, tokenizer)
    run.resume(SETTINGS)
    assert run.metrics.read_text().splitlines() == lines[:3]


def test_what_is_no_run_is_named(tmp_path, model, tokenizer):
    with pytest.raises(InputError, match="resume: expected the folder of a run, got "):
        RunFolder(tmp_path / "nothing").resume(SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="out: expected a folder, got the file "):
        RunFolder(tmp_path / "file")
    with pytest.raises(InputError, match="out: expected a folder that can be written, got "):
        RunFolder(Path("/proc/nothing/run")).begin(SETTINGS, overwrite=False)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut", "gone", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(model, tokenizer, tmp_path, name, how):
    run = begun(tmp_path / "run")
    for step in (1, 2):
        save(run, step, model, tokenizer)
    damaged = run.path / "checkpoints" / "policy-000002"
    if how == "cut":
        (damaged / name).write_bytes((damaged / name).read_bytes()[:100])
    elif how == "flipped":  # in its head, where something notices
        data = bytearray((damaged / name).read_bytes())
        data[:200] = bytes(255 - byte for byte in data[:200])
        (damaged / name).write_bytes(data)
    else:
        (damaged / name).unlink()
    loaded, _, told = run.resume(SETTINGS)
    assert loaded.trainer["step"] == 1 and names(run) == ["policy-000001"]
    assert len(told) == 2
    assert re.match(
        "policy-000002 is damaged and now policy-000002.damaged: (path|model): expected ", told[0]
    )
    assert os.readlink(run.path / "last") == "checkpoints/policy-000001"
    save(run, 2, model, tokenizer)
    (run.path / "checkpoints" / "policy-000001" / name).unlink()
    (run.path / "checkpoints" / "policy-000002" / name).unlink()
    with pytest.raises(
        InputError, match="resume: expected a checkpoint that is whole, got none: (path|model): expected"
    ):
        run.resume(SETTINGS)
    assert names(run) == ["policy-000002", "policy-000001"], "nothing is renamed or begun anew"


def test_the_best_is_that_of_what_is_there(model, tokenizer, tmp_path):
    run = begun(tmp_path / "run", keep=9)
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.1)):
        save(run, step, model, tokenizer, score)
    assert os.readlink(run.path / "best") == "checkpoints/policy-000002"
    (run.path / "checkpoints" / "policy-000002" / "trainer.json").unlink()
    (run.path / "checkpoints" / "policy-000003" / "trainer.json").unlink()
    for _ in range(2):  # a second time, what is set aside makes room
        run.resume(SETTINGS)
        assert os.readlink(run.path / "best") == os.readlink(run.path / "last") == "checkpoints/policy-000001"
        save(run, 2, model, tokenizer)
        (run.path / "checkpoints" / "policy-000002" / "trainer.json").unlink()
    run.begin(SETTINGS, overwrite=True)
    assert list((run.path / "checkpoints").iterdir()) == []


def test_only_its_own_leftovers_are_removed(model, tokenizer, tmp_path):
    run = begun(tmp_path / "run")
    save(run, 1, model, tokenizer)
    mine = [".zshrc.new", ".trajectories.jsonl.999.new", "checkpoints/.notes.7.new"]
    others = [".metrics.jsonl.999.new", "checkpoints/.policy-000009.999.new"]
    for name in mine + others:
        (run.path / name).mkdir() if "policy" in name else (run.path / name).touch()
    run.resume(SETTINGS)
    assert all((run.path / name).exists() for name in mine)
    assert not any((run.path / name).exists() for name in others)


def test_an_old_checkpoint_that_cannot_go_yet_stops_nothing(model, tokenizer, tmp_path, monkeypatch):
    """As on a network file system, while someone reads it."""
    run = begun(tmp_path / "run", keep=1)
    save(run, 1, model, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *a, **s: (_ for _ in ()).throw(OSError(39, "Directory not empty")))
        save(run, 2, model, tokenizer)
    assert names(run) == ["policy-000002"]
    run.resume(SETTINGS)
    assert not list(run.path.rglob(".*"))


def test_a_file_system_without_links_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "symlink_to", lambda *a: (_ for _ in ()).throw(OSError(1, "not permitted")))
    with pytest.raises(InputError, match="out: expected a folder that can have symbolic links, got "):
        begun(tmp_path / "run")


def test_a_run_without_a_checkpoint_yet_begins_anew(tmp_path):
    run = begun(tmp_path / "run")
    assert run.resume(SETTINGS) == (None, None, [])
    with pytest.raises(InputError, match="resume: expected the settings of the run, got seed 0 -> 1"):
        run.resume(SETTINGS | {"seed": 1})


def test_what_stands_for_no_number_of_steps_is_that_number(tmp_path):
    """A file that says nothing of the warm start goes on with a run that has noted its steps."""
    run = RunFolder(tmp_path / "run")
    for init, steps in ((None, 2000), ("some/model", 0)):
        settings = SETTINGS | {"init": init, "warmstart": {"steps": steps}}
        run.begin(settings, overwrite=True)
        assert run.resume(settings | {"warmstart": {"steps": None}}).notes == []
        with pytest.raises(InputError, match=f"warmstart.steps {steps} -> 7"):
            run.resume(settings | {"warmstart": {"steps": 7}})


def test_lines_that_are_no_records_are_left_out_and_told(model, tokenizer, tmp_path):
    run = begun(tmp_path / "run")
    save(run, 2, model, tokenizer)
    good = '{"phase": "policy", "step": 1}\n'
    run.metrics.write_bytes(
        b'{"phase": "p\n\0\0\0\n[1]\n{"phase": "sleep", "step": 1}\n' + good.encode() + b'{"ph'
    )
    _, _, told = run.resume(SETTINGS)
    assert told == ["goes on from policy-000002", "metrics.jsonl: left out 4 lines that are no records"]
    assert run.metrics.read_text() == good


def test_two_processes_do_not_share_a_run(model, tokenizer, tmp_path):
    run = begun(tmp_path / "run")
    save(run, 1, model, tokenizer)
    for other in (
        lambda: RunFolder(run.path).resume(SETTINGS),
        lambda: RunFolder(run.path).begin(SETTINGS, overwrite=True),
    ):
        with pytest.raises(InputError, match="out: expected a run that nobody else works on"):
            other()
    run.close()
    second = RunFolder(run.path)
    assert second.resume(SETTINGS).checkpoint.trainer["step"] == 1
    second.close()


def test_overwriting_leaves_the_folder_of_checkpoints_where_it_is(model, tokenizer, tmp_path):
    """It may be a link to a larger disk."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    run = begun(tmp_path / "run")
    save(run, 1, model, tokenizer)
    run.begin(SETTINGS, overwrite=True)
    assert list((tmp_path / "scratch").iterdir()) == []
    with pytest.raises(TypeError):  # what cannot be written is found before anything is deleted
        save(run, 1, model, tokenizer)
        run.begin(SETTINGS | {"seed": object()}, overwrite=True)
    assert names(run) == ["policy-000001"]


def test_weights_that_are_not_finite_are_never_saved(model, tokenizer, tmp_path):
    run = begun(tmp_path / "run")
    save(run, 1, model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="expected finite weights to save, got others in lm_head.weight"):
        save(run, 2, model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 0.0
    with pytest.raises(RuntimeError, match="got others in critic.head"):
        run.save(Place(1, 2), model, tokenizer, {}, {"critic.head": torch.tensor([1.0, torch.inf])})
    assert names(run) == ["policy-000001"] and not list(run.path.rglob(".*"))
