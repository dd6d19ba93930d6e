"""Rules for files of every language: what a library leaves alone, names, lengths."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from checkout import ROOT, tracked_files

LIBRARY = ("mem1_core", "python", "csrc")
CODE = {".py", ".pyi", ".h", ".c", ".cpp", ".cu", ".cuh"}
MAX_LINES = 450
BANS = {  # what: (pattern, folders)
    "environment variables": (r"\b(environb?|(secure_)?getenv|get_env|putenv|setenv)\b", LIBRARY),
    "catching everything": (r"\bexcept\s*(:|\(?(Base)?Exception\b)|catch\s*\(\s*\.\.\.", LIBRARY),
    "printing from a library": (r"\bprint\(|\bprintf\(|std::c(out|err)\b", ("mem1_core", "csrc")),
    "ending the process from a library": (r"\bsys\.exit\(|\b(exit|abort)\(", ("mem1_core", "csrc")),
    "notes to self": (r"\b(TODO|FIXME|XXX|HACK)\b", (*LIBRARY, "bench")),
}

# One place each. A world is foreign code: whatever it raises ends its episode and is recorded. What
# the user has told libgomp about threads that wait is read, never written.
ALLOWED = {
    "catching everything": ("python/mem1/rollout/call_pool.py",),
    "environment variables": ("python/mem1/runtime/waiting.py",),
}


def code(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in CODE]


def banned_lines(pattern: str, text: str) -> list[int]:
    return [number for number, line in enumerate(text.splitlines(), 1) if re.search(pattern, line)]


@pytest.mark.parametrize("ban", BANS)
def test_banned(ban: str) -> None:
    pattern, folders = BANS[ban]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in code(*folders)
        for number in banned_lines(pattern, path.read_text())
    ]
    allowed = ALLOWED.get(ban, ())
    assert [place.partition(":")[0] for place in found] == list(allowed), f"{ban}: {', '.join(found)}"


@pytest.mark.parametrize(
    ("ban", "caught", "fine"),
    [
        ("environment variables", "os.environ['A']", "an environment"),
        ("environment variables", "getenv(name)", "target_environment"),
        ("catching everything", "except Exception as e:", "except ValueError:"),
        ("catching everything", "except:", "except (ValueError, OSError) as error:"),
        ("catching everything", "} catch (...) {", "} catch (const E& e) {"),
        ("printing from a library", "    print(x)", "blueprint(x)"),
        ("printing from a library", "printf(x)", "snprintf(x)"),
        ("ending the process from a library", "exit(1);", "atexit(f);"),
        ("notes to self", "# TODO: later", "# to do so"),
    ],
)
def test_ban_catches(ban: str, caught: str, fine: str) -> None:
    pattern, _ = BANS[ban]
    assert banned_lines(pattern, f"{fine}\n{caught}\n") == [2]


def test_no_two_files_share_a_name() -> None:
    """A name says which file is meant; tools want some of theirs in several folders."""
    tools = {"__init__.py", "conftest.py", "py.typed", "CMakeLists.txt"}
    tools |= {"config.json", "generation_config.json", "model.safetensors"}
    tools |= {"tokenizer.json", "tokenizer_config.json"}
    names = Counter(Path(path).name for path in tracked_files())
    assert names["__init__.py"] > 1
    assert {name for name, count in names.items() if count > 1} <= tools


def test_files_are_short() -> None:
    files = code("csrc", "mem1_core", "python", "tests", "bench")
    lengths = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in files}
    assert lengths["tests/test_house_rules.py"] > 50
    assert not {path: lines for path, lines in lengths.items() if lines > MAX_LINES}
