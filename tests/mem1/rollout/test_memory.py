"""Constant memory, measured: the resident size of a process that rolls out, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
CHILD = Path(__file__).parent / "rollout_memory.py"


def sizes(prune: str, turns: int) -> list[int]:
    """Bytes after each action."""
    command = [sys.executable, str(CHILD), prune, str(turns)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["finish_reason"] == "turn_limit"
    assert told["tokens"] > 240 * (turns - 1)
    assert len(told["sizes"]) == turns
    return told["sizes"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc, as Linux has it")
def test_resident_size_is_flat_after_the_second_turn_and_grows_with_the_full_context():
    pruned = sizes("action", 40)  # 38 turns of 248 tokens, 4 KiB each: 36 MiB if they were kept
    assert max(pruned[2:]) - pruned[1] < 6 * MIB, [(size - pruned[1]) / MIB for size in pruned]
    full = sizes("never", 24)
    assert full[-1] - full[1] > 16 * MIB, [(size - full[1]) / MIB for size in full]
