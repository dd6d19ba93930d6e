"""bench/on_gpu.sh without a GPU: what it lists, and that what goes wrong in one stage leaves the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
TESTS = """
import os, time
import pytest

gpu, smoke = pytest.mark.gpu, pytest.mark.smoke

@gpu
@smoke
def test_gae(): pass

@gpu
@smoke
def test_prune_kv_cache(): assert 1 == 2, "the text of a failure"

@gpu
@smoke
def test_linear_logprob(): os.abort()

@gpu
@smoke
def test_tile_plan(): pass

@gpu
def test_before(): pass

@gpu
def test_hangs(): time.sleep(600)
"""
TOOL = "#!/bin/sh\necho 'NVIDIA Fake, 1.0, 80 GiB'\n"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", str(folder / "bench" / "on_gpu.sh"), *arguments]
    return subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300
    )


def test_without_arguments_it_lists_stages_and_what_is_missing() -> None:
    said = subprocess.run(
        ["bash", "bench/on_gpu.sh"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for stage in ("build", "smoke", "tests", "attention", "loss", "cache", "rollout"):
        assert f"\n{stage} " in said
    assert "missing here:" in said


@pytest.fixture
def faked(tmp_path: Path) -> Path:
    """The script with tests that end in every way, and tools that do nothing."""
    for name in ("on_gpu.sh", "on_gpu_report.py", "ledger.py", "runs.py"):
        (tmp_path / "bench").mkdir(exist_ok=True)
        shutil.copy(ROOT / "bench" / name, tmp_path / "bench" / name)
    script = tmp_path / "bench" / "on_gpu.sh"
    script.write_text(script.read_text().replace("tests     200 330", "tests     200 15"))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_smoke_gpu.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu\n  smoke\n  memory\n")
    (tmp_path / "bin").mkdir()
    for name in ("nvidia-smi", "cmake"):
        (tmp_path / "bin" / name).write_text(TOOL)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


@pytest.mark.slow
def test_a_failure_a_crash_and_a_hang_leave_the_rest(faked: Path) -> None:
    out = faked / "out"
    assert run(faked, "smoke", str(out)).returncode != 0
    assert run(faked, "tests", str(out)).returncode != 0
    assert run(faked, "nothing", str(out)).returncode == 2
    results = (out / "smoke" / "results.jsonl").read_text()
    assert "the text of a failure" in results
    assert "status" in (out / "tests" / "status").read_text()
    ledger = [sys.executable, str(faked / "bench" / "ledger.py"), str(out)]
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import ledger, pathlib; "
        "print(sorted(ledger.outcomes(pathlib.Path(sys.argv[2])).items()))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, str(faked / "bench"), str(out)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for test, outcome in {
        "test_gae": "passed",
        "test_prune_kv_cache": "failed",
        "test_linear_logprob": "died",
        "test_tile_plan": "passed",
        "test_before": "passed",
    }.items():
        assert f"{test}', '{outcome}'" in told, told
    assert "test_hangs', 'passed'" not in told
    assert ledger
