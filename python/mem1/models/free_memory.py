"""How much memory a device has left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on `device`."""
    if device.type == "cuda":
        # What torch has been given and does not use is free to us, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return free_host_memory()


def resident_bytes(proc: Path = Path("/proc")) -> int:
    """Memory of this process on the host, 0 where no Linux tells it."""
    pages = _text(proc / "self" / "statm").split()[1:2]
    return int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def free_host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """What the machine has left, or less where a control group has a limit; both as Linux tells them.

    Elsewhere the memory of the machine.
    """
    available = _fields(proc / "meminfo").get("MemAvailable:")
    if available is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min([available * 1024, *_left_in_groups(proc, cgroups)]))


def _left_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Of each control group that this process is in, version 2 and 1: its limit minus what it uses."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            limit, use = "memory.max", "memory.current"
        elif controllers == "memory":
            limit, use = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # A container sees its own group as the root, under whichever name the host has for it.
        parts = Path(name).parts[1:]
        for depth in range(len(parts) + 1):
            group = cgroups.joinpath(controllers, *parts[:depth])
            limited, used = _text(group / limit).strip(), _text(group / use).strip()
            if limited.isdigit() and used.isdigit():
                # Pages of files that nobody has touched lately go when memory is wanted.
                pages = _fields(group / "memory.stat").get("inactive_file", 0)
                yield int(limited) - int(used) + pages


def _fields(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a file."""
    words = (line.split() for line in _text(path).splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
