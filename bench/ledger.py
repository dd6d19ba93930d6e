"""What a figure was measured with: the sources, the commit, the versions; and what a run on a GPU has shown.

`python3 bench/ledger.py` prints the hashes of the GPU sources as bench/LOG.md names them. Works without git.
`python3 bench/ledger.py OUT` reads what the stages of `bench/on_gpu.sh` left there, however partial, and
prints the rows of bench/LOG.md's table.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from importlib import metadata
from pathlib import Path

import runs

ROOT = Path(__file__).resolve().parent.parent
GPU_SOURCES = (
    "csrc/attention/*.h", "csrc/kv_cache/*.h", "csrc/ppo_loss/*.h", "csrc/gae/*.h",
    "csrc/*/*.cu", "csrc/*/*.cuh", "mem1_core/triton/*.py",
)  # fmt: skip
# Distributions, not modules; peers among them.
PACKAGES = (
    "triton", "numpy", "flash-attn", "flash-attn-3", "flash-attn-4", "flash-mask-2",
    "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cutlass-dsl",
)  # fmt: skip


TRITON = "attention_tiles.py", "attention_blocks.py", "attention_launch.py"
ATTENTION_TESTS = "attention.py", "attention_options.py", "triton_attention.py"
# Kernel, as LOG.md names it: its sources, and what the names of its tests begin with.
KERNELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "tile plan (CUDA)": (
        ("tile_plan_cuda.cu", "tile_plan.h"),
        ("tile_plan.py", "smoke_gpu.py::test_tile_plan"),
    ),
    "`forward` (Triton)": (
        ("attention_forward.py", *TRITON),
        (*ATTENTION_TESTS, "smoke_gpu.py::test_attention_forward"),
    ),
    "`backward_dq`, `backward_dk_dv` (Triton)": (
        ("attention_backward.py", *TRITON),
        (*ATTENTION_TESTS, "smoke_gpu.py::test_attention_backward"),
    ),
    "`prune_kv_cache_` (CUDA)": (
        ("prune_cuda.cu", "prune_move.cuh", "prune_device.cuh", "prune.h"),
        ("kv_cache", "smoke_gpu.py::test_prune_kv_cache"),
    ),
    "`prune_pages` (CUDA)": (
        ("prune_pages_cuda.cu", "prune_device.cuh", "prune.h"),
        ("paged_kv_cache", "smoke_gpu.py::test_prune_paged"),
    ),
    "logit rows (CUDA)": (
        ("rows_cuda.cu", "rows.h"),
        ("ppo_loss_cuda.py", "smoke_gpu.py::test_linear_logprob", "smoke_gpu.py::test_fused"),
    ),
    "`gae` (CUDA)": (("gae_cuda.cu", "gae.h"), ("gae.py", "smoke_gpu.py::test_gae")),
}


def blob_hash(path: Path) -> str:
    """The first 12 digits of `git hash-object path`."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()[:12]


def sources() -> dict[str, str]:
    """Path in the tree -> hash, of every source that runs on a GPU."""
    paths = sorted(path for pattern in GPU_SOURCES for path in ROOT.glob(pattern))
    return {path.relative_to(ROOT).as_posix(): blob_hash(path) for path in paths}


def versions() -> dict[str, str]:
    """The installed ones of PACKAGES."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the sources, with a + when the tree differs from it; "unknown" outside a git checkout."""
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return "unknown"
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


SEVERITY = ("skipped", "passed", "failed", "died")


def outcomes(out: Path) -> dict[str, str]:
    """Test -> skipped, passed, failed, or "died" for one that took its process along or never ended: the
    worst of all stages, and in each stage that of its last run.
    """
    worst: dict[str, str] = {}
    for path in sorted(out.glob("*/results.jsonl")):
        for test, outcome in _outcomes(path).items():
            worst[test] = max(worst.get(test, outcome), outcome, key=SEVERITY.index)
    return worst


def _outcomes(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            result = json.loads(line)
            test, outcome, text = str(result["test"]), str(result["outcome"]), str(result.get("text", ""))
        except (ValueError, TypeError, KeyError):  # what a process that was killed has begun to write
            continue
        if outcome not in ("begun", *SEVERITY):
            continue
        # A failure has a text; that its process was ended after it says less.
        if outcome == "failed" and "crashed while running" in text:  # pytest-xdist's words
            outcome = "failed" if found.get(test) == "failed" else "died"
        if outcome == "begun" or found.get(test) not in ("failed", "died"):  # in its set-up, say
            found[test] = outcome
    return {test: "died" if outcome == "begun" else outcome for test, outcome in found.items()}


def rows(out: Path) -> Iterator[str]:
    """A line of the first table of bench/LOG.md for each kernel, with what has become of its tests."""
    results, hashes = outcomes(out), {Path(path).name: digest for path, digest in sources().items()}
    chip = re.search(r"^(NVIDIA[^,\n]*),", _text(out / "build" / "log"), re.MULTILINE)
    where = chip[1] if chip else "chip unknown: no build log"
    sanitizer = _text(out / "sanitize" / "status")
    remark = "" if not sanitizer or " status 0 " in sanitizer else f"; {sanitizer.strip()}"
    for kernel, (files, begins) in KERNELS.items():
        names = {test: test.split("/")[-1].removeprefix("test_") for test in results}
        own = {test: results[test] for test, name in names.items() if name.startswith(begins)}
        counts = {name: list(own.values()).count(name) for name in ("passed", "failed", "died")}
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none ran"
        digests = " ".join(f"`{name}` {hashes[name]}" for name in files)
        yield f"| {kernel} | {digests} | {where} | {date.today().isoformat()} | {said}{remark} | |"


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def stages(out: Path) -> Iterator[str]:
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        yield _text(folder / "status").strip() or f"{folder.name}: cut short, no status"


def figures(out: Path) -> Iterator[str]:
    """The time of each bench row, in words that fit the last column."""
    for path in sorted(out.glob("*/bench.json")):
        try:
            tables = runs.tables(path)
        except ValueError as error:
            yield str(error)
            continue
        for table in tables:
            yield table.title
            measured = ((row.name, row.stats["median"]) for row in table.rows if row.stats)
            yield from (f"  {name}: {seconds * 1e3:.3f} ms" for name, seconds in measured)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        folder = Path(sys.argv[1])
        if not folder.is_dir():
            sys.exit(f"OUT: expected the folder of bench/on_gpu.sh, got {folder}")
        for part in (stages, rows, figures):
            for line in part(folder):
                print(line)
        sys.exit()
    for path, digest in sources().items():
        print(digest, path)
    print("commit", commit())
