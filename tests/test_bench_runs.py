"""What a bench run leaves: a file that pytest-benchmark's commands read, with the plugin and without it, also
of a run that was cut short; and the figures of it.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT

BENCH = """
import os
import pytest
from measure import Candidate

@pytest.mark.parametrize("size", [100, 10_000])
def test_sum(bench, size):
    absent = Candidate("absent", None, note="not run: a test")
    candidates = [Candidate(f.__name__, lambda f=f: f(range(size))) for f in (sum, sorted)]
    bench.compare(f"sum of {size}", [*candidates, absent], moved_bytes=8 * size, budget_s=0.05)
    if bench.measuring:
        bench.columns("sum")["numbers"] = size
        bench.fact("one more", 1.5)
        bench.goal("a goal", 1, 2)

def test_ends_the_process(bench):
    if bench.measuring:
        os._exit(9)
"""
QUICK = ["bench/", "-k", "not ends"]
KINDS = "png", "svg"
MEASURE = [*QUICK, "--benchmark"]
NAMES = [
    f"bench/bench_sum.py::test_sum[{size}] {name}"
    for size in (100, 10_000)
    for name in ("sum", "sorted", "copy between two buffers")
]


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": path, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def pytest_(folder: Path, *arguments: str) -> str:
    done = command(folder, "pytest", "-p", "no:cacheprovider", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def benchmarks(path: Path) -> dict[str, Any]:
    return {row["fullname"]: row for row in json.loads(path.read_text())["benchmarks"]}


def small(folder: Path) -> Path:
    """A checkout with one small bench."""
    (folder / "bench").mkdir()
    for name in ("conftest.py", "measure.py", "ledger.py", "runs.py", "figures.py"):
        shutil.copy(ROOT / "bench" / name, folder / "bench")
    (folder / "bench" / "bench_sum.py").write_text(BENCH)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After two runs with the plugin: ours are one.json and two.json, it saved 0001_one."""
    pytest.importorskip("pytest_benchmark")
    folder = small(tmp_path_factory.mktemp("checkout"))
    said = pytest_(folder, *MEASURE, "--benchmark-out=one.json", "--benchmark-save=one")
    assert "Name (time in" not in said, "its table stands beside ours"
    compare = "--benchmark-compare", "--benchmark-json=json"
    said = pytest_(folder, *MEASURE, "--benchmark-out=two.json", *compare)
    (folder / "said").write_text(said)
    return folder


def test_what_the_plugin_saves_is_what_was_measured(checkout: Path) -> None:
    (saved,) = (checkout / ".benchmarks").glob("*/0001_one.json")
    ours, theirs = json.loads((checkout / "one.json").read_text()), json.loads(saved.read_text())
    for row in ours["benchmarks"]:
        assert len(row["stats"].pop("data")) == row["stats"]["rounds"]
    assert ours["benchmarks"] == theirs["benchmarks"]
    assert [row["fullname"] for row in ours["benchmarks"]] == NAMES
    assert ours["mem1_core"] == theirs["mem1_core"]
    assert ours.keys() == theirs.keys()
    assert ours["machine_info"].keys() == theirs["machine_info"].keys()
    assert benchmarks(checkout / "two.json") == benchmarks(checkout / "json")  # with the times of all rounds


def test_a_compared_run_is_shown_beside_the_saved_one(checkout: Path) -> None:
    said = (checkout / "said").read_text()
    assert "benchmark 'sum of 100'" in said and "benchmark 'sum of 10000'" in said
    for name in ("sum", "sorted", "copy between two buffers"):
        assert f"{name} (NOW)" in said and f"{name} (0001_one)" in said


def test_its_command_compares_two_of_our_files(checkout: Path) -> None:
    done = command(checkout, "pytest_benchmark", "compare", "one.json", "two.json", "--columns=median,rounds")
    assert done.returncode == 0, done.stderr
    for name in ("sum", "sorted", "copy between two buffers"):
        for run in ("one", "two"):
            assert done.stdout.count(f"\n{name} ({run})") == 2, done.stdout


def test_a_regression_fails_the_run(checkout: Path) -> None:
    document = json.loads((checkout / "one.json").read_text())
    for row in document["benchmarks"]:
        row["stats"]["median"] = 0.0
    (checkout / "faster.json").write_text(json.dumps(document))
    options = "--benchmark-compare=faster.json", "--benchmark-compare-fail=median:0.0"
    done = command(checkout, "pytest", *MEASURE, "--benchmark-out=three.json", *options)
    assert done.returncode != 0
    assert "Performance has regressed" in done.stdout + done.stderr


def test_a_quick_test_saves_nothing(checkout: Path) -> None:
    files = set(checkout.rglob("*.json"))
    pytest_(checkout, *QUICK, "--benchmark-save=quick", "--benchmark-json=quick.json")
    assert set(checkout.rglob("*.json")) == files


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """The command that draws, in this process."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "bench")
    main: Callable[[list[str]], None] = runpy.run_path(str(ROOT / "bench" / "figures.py"))["main"]
    return main


@pytest.mark.parametrize("run", ["one.json", "json", ".benchmarks/*/0001_one.json"])
def test_figures_of_a_run(checkout: Path, tmp_path: Path, draw: Any, run: str) -> None:
    (path,) = checkout.glob(run)
    draw([str(path), "--out", str(tmp_path)])
    drawn = [f"{name}.{kind}" for name in ("01-sum-of-100", "02-sum-of-10000", "roofline") for kind in KINDS]
    assert sorted(file.name for file in tmp_path.iterdir()) == drawn
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in tmp_path.glob("*.png"))
    svg = (tmp_path / "01-sum-of-100.svg").read_text()
    assert "</svg>" in svg and all(f"<!-- {label} -->" in svg for label in ("sum of 100", "sorted", "absent"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("no json", "expected a run in pytest-benchmark's format"),
        ("[1]", "expected a run in pytest-benchmark's format"),
        ('{"benchmarks": [{"group": "a"}]}', "expected a run in pytest-benchmark's format"),
        ('{"benchmarks": []}', "expected rows with times, got none"),
    ],
)
def test_figures_of_no_run_are_refused(tmp_path: Path, draw: Any, text: str | None, said: str) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=said):
        draw([str(path)])
    assert set(tmp_path.iterdir()) <= {path}


def row(name: str, median: float, **columns: Any) -> dict[str, Any]:
    stats = {"median": median, "q1": median, "q3": median}
    return {"name": name, "fullname": name, "group": "a table", "stats": stats, "extra_info": columns}


def test_figures_where_ours_has_no_times(tmp_path: Path, draw: Any) -> None:
    """It stays the first row; the peers are no more ours for it, nor is the copy a peer."""
    absent = {"name": "ours", "note": "RuntimeError: no"}
    table = {"title": "a table", "facts": {}, "first": "ours", "without figures": [absent]}
    rows = [row("peer", 2e-3, **{"of copy": 0.5}), row("copy between two buffers", 1e-3, **{"of copy": 1.0})]
    (tmp_path / "run.json").write_text(json.dumps({"benchmarks": rows, "mem1_core": {"tables": [table]}}))
    tables = runpy.run_path(str(ROOT / "bench" / "figures.py"))["tables"](tmp_path / "run.json")
    assert [r.name for r in tables[0].rows] == ["ours", "peer", "copy between two buffers"]
    draw([str(tmp_path / "run.json")])
    assert (tmp_path / "run-figures" / "roofline.png").exists()
    with pytest.raises(SystemExit, match="--out: expected a folder to write to"):
        draw([str(tmp_path / "run.json"), "--out", str(tmp_path / "run.json")])


def test_times_that_are_no_numbers_are_refused(tmp_path: Path, draw: Any) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"benchmarks": [row("ours", float("nan"))]}))
    with pytest.raises(SystemExit, match="expected a run in pytest-benchmark's format"):
        draw([str(tmp_path / "run.json")])


def test_only_is_everything_and_several_processes_or_no_file_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("xdist")
    folder = small(tmp_path)
    pytest_(folder, *MEASURE, "--benchmark-only", "--benchmark-out=only.json")
    assert list(benchmarks(folder / "only.json")) == NAMES
    for wrong, message in (
        (["-n", "2"], "--benchmark: expected one process, got several"),
        (
            ["--benchmark-out=/proc/x/y.json"],
            "--benchmark-out: expected a file to write, got '/proc/x/y.json'",
        ),
    ):
        done = command(folder, "pytest", "-p", "no:cacheprovider", *MEASURE, *wrong)
        assert done.returncode == 4 and message in done.stderr


def test_without_the_plugin_a_run_that_is_cut_short_keeps_its_rows(tmp_path: Path) -> None:
    folder = small(tmp_path)
    done = command(folder, "pytest", "-p", "no:benchmark", "bench/", "--benchmark")
    assert done.returncode == 9, done.stdout + done.stderr
    (path,) = (folder / "bench" / "results").iterdir()
    rows = benchmarks(path)
    assert list(rows) == NAMES
    assert rows[NAMES[0]]["stats"]["median"] > 0 and rows[NAMES[0]]["extra_info"]["x ours"] == 1
    done = command(folder, "pytest", "-p", "no:benchmark", "bench/", "--benchmark", "--benchmark-save=x")
    assert done.returncode == 4 and "unrecognized arguments: --benchmark-save=x" in done.stderr


def test_statistics_are_those_of_the_plugin() -> None:
    theirs = pytest.importorskip("pytest_benchmark.stats")
    ours = runpy.run_path(str(ROOT / "bench" / "runs.py"))["stats"]
    generator = random.Random(0)
    for rounds in (*range(1, 14), 50):
        seconds = [generator.lognormvariate(0, 1) for _ in range(rounds)]
        expected = theirs.Stats()
        for duration in seconds:
            expected.update(duration)
        assert ours(seconds) == expected.as_dict()
