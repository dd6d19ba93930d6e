"""bench/on_gpu.sh without a GPU: what it lists, and that what goes wrong in one stage, or in one test, leaves
the others."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import ledger  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(module) is None for module in ("xdist", "pytest_timeout")),
        reason="needs pytest-xdist and pytest-timeout",
    ),
]
STAGES = ("build", "smoke", "sanitize", "tests", "cache", "attention", "loss", "memory", "rollout")
# What tells a test file that has tests for a GPU: marks of its own, or devices that another file marks.
GPU_MARKS = ("mark.gpu", "kv_cache_cases", "from test_attention import BACKENDS")
# Ends of every kind: a failure, a process that dies, a context that is lost, a hang.
TESTS = """
import os, time
import pytest, torch

pytestmark = pytest.mark.gpu
smoke, memory = pytest.mark.smoke, pytest.mark.memory

def lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@smoke
def test_gae(): pass

@smoke
def test_prune_kv_cache(): assert 1 == 2, "the text of a failure"

@smoke
def test_linear_logprob(): os.abort()

@smoke
def test_tile_plan():
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lost
    lost()

@smoke
@pytest.mark.parametrize("n", range(12))
def test_after(n): assert torch.cuda.synchronize is not lost

def test_hangs(): time.sleep(600)

@pytest.mark.parametrize("n", range(4))
def test_beside(n): pass

@memory
def test_takes_all(): os.abort()

@memory
def test_takes_all_again(): pass
"""
BENCH = """
import json, time

def test_gpu_rows(request):
    with open(request.config.getoption("--benchmark-out"), "w") as file:
        json.dump({"benchmarks": []}, file)
    time.sleep(600)
"""
BENCH_OPTIONS = """
def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true")
    parser.addoption("--benchmark-out")

def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
"""
# What the tool chain would do, and what it says.
TOOLS = {
    "cmake": "echo cmake $*; touch mem1_core/_C.fake.so",
    "nvcc": "",
    "nvidia-smi": 'case $1 in *compute_cap*) echo 9.0;; *) echo "NVIDIA Fake, 1.0, 80 GiB";; esac',
    "compute-sanitizer": 'while [ "$1" != python3 ]; do shift; done; "$@"',
}
PACKAGE = "def cuda_architectures(): return '90a'"


def on_gpu(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(
        ["bash", str(folder / "bench" / "on_gpu.sh"), *arguments],
        env=environment | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def faked(tmp_path: Path) -> Path:
    """A checkout with the real script, and with a tool chain, a package, tests and a bench that are none."""
    for name in ("bench", "tests", "bin", "mem1_core/lib", "mem1_core/include"):
        (tmp_path / name).mkdir(parents=True)
    script = (ROOT / "bench" / "on_gpu.sh").read_text()
    for real, short in (("--timeout 90", "--timeout 5"), (" 40  80", " 40   8"), ("-n 14", "-n 2")):
        assert script.count(real) == 1
        script = script.replace(real, short)
    files = {
        "bench/on_gpu.sh": script,
        "bench/on_gpu_report.py": (ROOT / "bench" / "on_gpu_report.py").read_text(),
        "bench/ledger.py": (ROOT / "bench" / "ledger.py").read_text(),
        "bench/runs.py": (ROOT / "bench" / "runs.py").read_text(),
        "bench/bench_kv_cache.py": BENCH,
        "bench/conftest.py": BENCH_OPTIONS,
        "tests/test_smoke_gpu.py": TESTS,
        "tests/triton_report.py": "import sys; sys.exit(3)",
        "pytest.ini": "[pytest]\nmarkers =\n  gpu\n  smoke\n  memory\n",
        "mem1_core/__init__.py": PACKAGE,
    }
    files |= {f"bin/{name}": f"#!/bin/sh\n{command}\n" for name, command in TOOLS.items()}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for tool in (tmp_path / "bin").iterdir():
        tool.chmod(0o755)
    return tmp_path


def test_without_arguments_it_lists_stages_and_what_is_missing() -> None:
    said = subprocess.run(["bash", "bench/on_gpu.sh"], cwd=ROOT, capture_output=True, text=True, check=True)
    for stage in STAGES:
        assert f"\n{stage} " in said.stdout
    assert "missing here:\n  " in said.stdout
    assert on_gpu(ROOT, "smoke").returncode == on_gpu(ROOT, "smoke", "").returncode == 1, "no folder named"


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    said = on_gpu(ROOT, "tset", str(tmp_path / "out"))
    assert said.returncode == 2
    assert "stage: expected one of build smoke sanitize tests" in said.stderr and "got tset" in said.stderr
    assert not (tmp_path / "out").exists()


def test_a_build_is_for_this_chip_or_fails(faked: Path) -> None:
    out = str(faked / "out")
    said = on_gpu(faked, "build", out)
    assert said.returncode == 0, said.stdout
    assert "-DMEM1_CUDA=ON" in said.stdout and "-DMEM1_CUDA_ARCHITECTURES=90a-real" in said.stdout
    assert "built for 90a" in said.stdout
    assert "tests/triton_report.py: status 3" in said.stdout, "a report that fails is no reason to stop"
    assert (faked / "out" / "build" / "built.tgz").stat().st_size > 0
    (faked / "mem1_core" / "__init__.py").write_text(PACKAGE.replace("90a", ""))
    said = on_gpu(faked, "build", out)
    assert said.returncode != 0 and "built for '', expected '90a'" in said.stdout


def test_what_goes_wrong_leaves_the_rest(faked: Path) -> None:
    """A failing test, one that dies, a lost context, a hang and a stage at its limit."""
    out = faked / "out"
    status = {stage: on_gpu(faked, stage, str(out)).returncode for stage in STAGES if stage != "rollout"}
    assert status["sanitize"] != 0 and status["smoke"] != 0 and status["memory"] != 0
    assert status["tests"] == 1 and status["attention"] != 0, "a hang; there is no such bench here"
    assert status["cache"] == 124, "at its limit"

    found = {test.split("::")[1]: outcome for test, outcome in ledger.outcomes(out).items()}
    assert [found.pop(f"test_after[{n}]") for n in range(12)] == ["passed"] * 12, (
        "in processes that are sound"
    )
    assert [found.pop(f"test_beside[{n}]") for n in range(4)] == ["passed"] * 4
    assert found == {
        "test_gae": "passed",
        "test_prune_kv_cache": "failed",
        "test_linear_logprob": "died",
        "test_tile_plan": "failed",
        "test_hangs": "died",
        "test_takes_all": "died",
        "test_takes_all_again": "passed",
    }
    assert "the text of a failure" in (out / "smoke" / "results.jsonl").read_text()
    assert json.loads((out / "cache" / "bench.json").read_text()) == {"benchmarks": []}
    for stage in status:
        assert (out / stage / "status").read_text().startswith(f"{stage}: status {status[stage]} after")
        assert (out / stage / "log").stat().st_size > 0

    said = subprocess.run(
        [sys.executable, "bench/ledger.py", str(out)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "cache: status 124 after" in said
    entries = {line.split(" | ")[0]: line.split(" | ")[2:] for line in said.splitlines() if line[:1] == "|"}
    for kernel, tests in {
        "| `gae` (CUDA)": "1 passed",
        "| `prune_kv_cache_` (CUDA)": "1 failed",
        "| logit rows (CUDA)": "1 died",
        "| `forward` (Triton)": "none ran",
    }.items():
        assert entries[kernel][0] == "NVIDIA Fake" and entries[kernel][2].startswith(
            f"{tests}; sanitize: status 134 "
        )


def test_the_ledger_knows_every_gpu_source_and_tests_of_each_kernel() -> None:
    in_kernels = {name for files, _ in ledger.KERNELS.values() for name in files}
    assert in_kernels == {Path(path).name for path in ledger.sources()} - {"__init__.py"}
    texts = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    for _, begins in ledger.KERNELS.values():
        for file, _, test in (begin.partition("::") for begin in begins):
            found = [text for name, text in texts.items() if name.startswith(f"test_{file}")]
            assert any(marked in text for text in found for marked in GPU_MARKS), file
            assert any(f"def {test}" in text for text in found), (file, test)


def results(folder: Path, stage: str, *lines: str) -> None:
    (folder / stage).mkdir(parents=True)
    (folder / stage / "results.jsonl").write_text("\n".join(lines))


def line(outcome: str, text: str = "", test: str = "tests/test_gae.py::test_gae") -> str:
    return json.dumps({"test": test, "outcome": outcome, "text": text})


@pytest.mark.parametrize(
    ("lines", "outcome"),
    [
        (("begun", "passed"), "passed"),
        (("begun",), "died"),
        (("begun", "passed", "failed"), "failed"),  # in its tear-down
        (("begun", "failed", "begun", "passed"), "passed"),  # mended, and run again
        (("begun", "passed", "begun"), "died"),
    ],
)
def test_the_ledger_takes_the_last_run_of_a_stage(
    tmp_path: Path, lines: tuple[str, ...], outcome: str
) -> None:
    results(tmp_path, "smoke", *map(line, lines))
    assert list(ledger.outcomes(tmp_path).values()) == [outcome]


def test_the_ledger_takes_the_worst_of_all_stages(tmp_path: Path) -> None:
    results(tmp_path, "sanitize", line("begun"))
    results(tmp_path, "smoke", line("begun"), line("passed"))
    results(tmp_path, "tests", line("begun"), "12", "{", "null", '{"test": "x"}', line("skipped")[:-5])
    (tmp_path / "attention").mkdir()
    (tmp_path / "attention" / "bench.json").write_text("no run")
    (tmp_path / "sanitize" / "status").write_text("sanitize: status 9 after 3 s")
    command = [sys.executable, str(ROOT / "bench" / "ledger.py"), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (row,) = (row for row in said.splitlines() if row.startswith("| `gae`"))
    assert "| 1 died; sanitize: status 9 after 3 s |" in row
    assert "attention: cut short, no status" in said and "bench.json: expected a run" in said
    missing = subprocess.run([*command[:2], str(tmp_path / "nothing")], capture_output=True, text=True)
    assert missing.returncode == 1 and "OUT: expected the folder of bench/on_gpu.sh, got " in missing.stderr


def test_paths_are_those_of_the_caller(faked: Path) -> None:
    path = os.pathsep.join([str(faked / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    for folder, script, out in (("bench", "on_gpu.sh", "../one"), ("tests", "../bench/on_gpu.sh", "../two")):
        command = ["bash", script, "build", out]
        environment = os.environ | {"PATH": path}
        subprocess.run(command, cwd=faked / folder, env=environment, check=True, capture_output=True)
    assert all((faked / out / "build" / "built.tgz").exists() for out in ("one", "two"))


def test_only_results_are_replaced(faked: Path) -> None:
    (faked / "build").mkdir()
    (faked / "build" / "mine").write_text("kept")
    (faked / "build" / "status").write_text("of an earlier run")
    assert on_gpu(faked, "build", str(faked)).returncode == 0
    assert (faked / "build" / "mine").read_text() == "kept"
    assert (faked / "build" / "status").read_text().startswith("build: status 0")


def test_a_deadline_is_kept(faked: Path) -> None:
    out, soon = faked / "out", str(int(time.time()) + 15)
    assert on_gpu(faked, "cache", str(out), soon).returncode == 124
    assert re.search(r"limit [345]\)", (out / "cache" / "status").read_text())
    said = on_gpu(faked, "tests", str(out), soon)
    assert said.returncode == 124 and "tests: not run: the deadline is near" in said.stdout


def test_an_interrupt_ends_the_stage(faked: Path) -> None:
    path = os.pathsep.join([str(faked / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", str(faked / "bench" / "on_gpu.sh"), "cache", str(faked / "out")]
    stage = subprocess.Popen(command, env=os.environ | {"PATH": path}, stdout=subprocess.DEVNULL)
    while not (faked / "out" / "cache" / "bench.json").exists():
        time.sleep(0.1)
    stage.terminate()
    assert stage.wait(timeout=30) == 130
    assert "stopped after" in (faked / "out" / "cache" / "status").read_text()
    left = subprocess.run(["pgrep", "-f", str(faked / "out")], capture_output=True, text=True).stdout
    assert left == ""
