"""Records reach every tracker, and a run outlives each."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mem1.checks import InputError
from mem1.config import TrainConfig
from mem1.train.trackers import Trackers

RECORD = {
    **{"phase": "policy", "step": 3, "reward": 0.5, "kl": math.nan, "errors": {"KeyError": 2}, "turns": 4},
    **{"dlogp_turns": [0.25, 0.125], "best": True, "note": "words", "dropped_turns": None},
}
NUMBERS = {
    **{"policy/step": 3.0, "policy/reward": 0.5, "policy/errors/KeyError": 2.0, "policy/turns": 4.0},
    **{"policy/dlogp_turns/1": 0.25, "policy/dlogp_turns/2": 0.125},
}


def test_tensorboard_gets_every_finite_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # a resumed run writes into the same folder
        trackers = Trackers(["tensorboard"], tmp_path, {})
        trackers.log(RECORD)
        trackers.log(RECORD | {"phase": "warmstart", "step": 7, "reward": 1.0})
        trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = events.Tags()["scalars"]
    assert {name for name in names if name.startswith("policy/")} == NUMBERS.keys()
    found = {name: events.Scalars(name)[-1] for name in NUMBERS}
    assert {name: event.value for name, event in found.items()} == NUMBERS
    assert {event.step for event in found.values()} == {3}
    assert [event.step for event in events.Scalars("warmstart/reward")][-1] == 7


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What the packages wandb and trackio are asked for."""
    calls: list[tuple[Any, ...]] = []

    def module(name: str) -> Any:
        def init(**settings: Any) -> Any:
            calls.append((name, "init", settings))
            return fake

        fake = SimpleNamespace(
            init=init,
            log=lambda numbers: calls.append((name, "log", numbers)),
            finish=lambda: calls.append((name, "finish")),
        )
        return fake

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, module(name))
    yield calls


def test_the_others_get_the_same_and_a_resumed_run_goes_on(fakes: list[Any], tmp_path: Path) -> None:
    for _ in range(2):
        trackers = Trackers(["wandb", "trackio"], tmp_path / "run 1", {"seed": 5})
        trackers.log(RECORD)
        trackers.close()
    kinds = [(name, what) for name, what, *_ in fakes]
    once = [(name, what) for what in ("init", "log", "finish") for name in ("wandb", "trackio")]
    assert kinds == once * 2
    assert [numbers for _, what, *numbers in fakes if what == "log"] == [[NUMBERS]] * 4
    begun = [settings for _, what, *settings in fakes if what == "init"]
    assert begun[:2] == begun[2:]
    (wandb,), (trackio,) = begun[:2]
    assert wandb["id"] == trackio["name"] and wandb["id"].endswith("-run-1") and wandb["name"] == "run 1"
    assert wandb["resume"] == trackio["resume"] == "allow" and wandb["config"] == {"seed": 5}


def test_a_tracker_that_fails_is_a_warning(fakes: list[Any], tmp_path: Path) -> None:
    sys.modules["trackio"].log = lambda numbers: 1 / 0  # type: ignore[attr-defined]
    trackers = Trackers(["trackio", "wandb"], tmp_path, {})
    with pytest.warns(RuntimeWarning, match="division by zero"):
        trackers.log(RECORD)
    assert ("wandb", "log", NUMBERS) in fakes


def test_what_is_missing_or_unknown_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match=r"trackers: expected the package trackio.*mem1_core\[trackio\]"):
        Trackers(["trackio"], tmp_path, {})
    with pytest.raises(InputError, match="trackers: expected some of tensorboard, wandb, trackio, got"):
        TrainConfig(trackers=("mlflow",))
    settings = json.loads(json.dumps(TrainConfig(trackers=("wandb",)).to_dict()))
    assert settings["trackers"] == ["wandb"]
