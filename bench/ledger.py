"""What a figure was measured with: the sources, the commit, the versions.

`python3 bench/ledger.py` prints the hashes of the GPU sources as bench/LOG.md names them. Works without git.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

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


if __name__ == "__main__":
    for path, digest in sources().items():
        print(digest, path)
    print("commit", commit())
