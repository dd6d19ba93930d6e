"""README, docs/ and CONTRIBUTING keep their word: their Python runs, the tree and the op table are complete,
commands and linked files exist.

The functions that read them take a text, so that they are tested on a small README below as well.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from checkout import ROOT, tracked_files

from mem1.cli import main
from mem1.config_files import setting_types
from mem1_core import ops, reference

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "docs").glob("*.md")}
DOCUMENTS |= {"README.md": README, "CONTRIBUTING.md": CONTRIBUTING}
EVERYTHING = "\n".join(DOCUMENTS.values())
OPS = {  # the ops of the design; each has a row in the README's table and a reference, whatever its backends
    "trajectory_attention",
    "prune_kv_cache_",
    "prune_paged_kv_cache_",
    "linear_logprob",
    "fused_linear_ppo_loss",
    "gae",
}


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of the opening fence
    no_run: bool  # has the comment <!-- no-run --> just before it


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text."""
    fence = re.compile(r"^(<!-- no-run -->\n+)?^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for match in fence.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        yield Block(match[2], match[3], line, match[1] is not None)


def python_blocks(text: str) -> list[Block]:
    return [block for block in blocks(text) if block.language == "python"]


def run(block: Block, name: str = "README.md") -> None:
    """In a namespace of its own; a traceback points at the line of the document."""
    code = compile("\n" * block.line + block.code, name, "exec")
    exec(code, {"__name__": "readme"})


def tree(text: str) -> list[str]:
    """Paths of the block that draws the tree: the one with a line for `csrc/`.

    A line has one or more names, then two spaces and what they are; deeper indentation, or box-drawing
    characters, put it into the folder above. A name may be a pattern such as `*_cpu.cpp`.
    """
    drawn = [block for block in blocks(text) if re.search(r"^\W*csrc/(\s|$)", block.code, re.MULTILINE)]
    assert len(drawn) == 1, f"expected one block with the tree, got {len(drawn)}"
    paths: list[str] = []
    folders: list[tuple[int, str]] = []  # (indentation, path) of the folders that a line is in
    for line in drawn[0].code.splitlines():
        line = re.sub("[│├└─]", " ", line).rstrip()
        indentation = len(line) - len(line.lstrip())
        folders = [folder for folder in folders if folder[0] < indentation]
        parent = folders[-1][1] if folders else ""
        names = re.split(r"\s{2,}|\s#", line.strip())[0].split()
        paths += [parent + name for name in names]
        if names and names[-1].endswith("/"):
            folders.append((indentation, parent + names[-1]))
    return paths


def table_names(text: str) -> set[str]:
    """The names in backticks in the first column of the tables whose first heading is `op`."""
    names: set[str] = set()
    for table in re.findall(r"^\| *op *\|.*\n\|[-: |]+\n((?:\|.*\n?)+)", text, re.MULTILINE | re.IGNORECASE):
        names.update(name for row in table.splitlines() for name in re.findall(r"`(\w+)", row.split("|")[1]))
    return names


def commands(text: str, program: str) -> list[tuple[str, list[str]]]:
    """(first word, options) of every call of `program` in inline code and in shell blocks."""
    shell = [block.code for block in blocks(text) if block.language in {"", "bash", "sh", "console"}]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [*"\n".join(shell).splitlines(), *re.findall(r"`([^`\n]+)`", prose)]
    found = []
    for line in lines:
        call = re.match(rf"\s*(?:\$ )?(?:\S*/)?{program} ([a-z]\w*)([^#]*)", line)
        if call:
            found.append((call[1], re.findall(r"(?<!\S)--[\w.-]+", call[2])))
    return found


# --- the documents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block"),
    [
        pytest.param(name, block, id=f"{name}:{block.line}")
        for name, text in sorted(DOCUMENTS.items())
        for block in python_blocks(text)
    ],
)
def test_python_block_runs(name: str, block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.no_run:
        assert "cuda" in block.code, "no-run is for blocks that need a GPU"
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run(block, name)


def test_has_examples() -> None:
    assert len(python_blocks(README)) >= 2


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_linked_files_exist(name: str) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", DOCUMENTS[name])
    assert links or name != "README.md"
    assert not [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]


def test_tree_names_what_there_is() -> None:
    paths = tree(CONTRIBUTING)
    missing = [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]
    assert not missing, f"in CONTRIBUTING's tree, but not there: {missing}"
    repeated = sorted({path for path in paths if paths.count(path) > 1})
    assert not repeated


def test_tree_is_complete_at_the_top() -> None:
    there = {path.split("/")[0] for path in tracked_files()}
    drawn = {path.split("/")[0] for path in tree(CONTRIBUTING)}
    assert not there - drawn, "top-level files and folders that CONTRIBUTING's tree leaves out"


def test_table_has_every_op() -> None:
    names = table_names(README)
    assert not (OPS | set(ops.__all__)) - names, "ops without a row in the README's table"


def test_every_op_has_a_reference() -> None:
    assert not [name for name in OPS | set(ops.__all__) if not callable(getattr(reference, name, None))]


@pytest.mark.parametrize("name", sorted({name for name, _ in commands(EVERYTHING, "mem1")}))
def test_command_exists(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0, capsys.readouterr().err
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    if name in ("train", "plan"):
        known |= {f"--{setting}" for setting in setting_types()} | {"--help"}
    used = {option for word, options in commands(EVERYTHING, "mem1") if word == name for option in options}
    assert not used - known, f"options of `mem1 {name}` that it does not have"


def test_make_targets_exist() -> None:
    used = {target for target, _ in commands(EVERYTHING, "make")}
    assert used >= {"demo", "test"}
    assert not used - set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


# --- the functions that read it -----------------------------------------------------------------------------

SMALL = textwrap.dedent(
    """
    # Small

    Say `mem1 train --seed 1` or `make test`; mem1 bakes nothing.

    ```python
    answer = 42
    ```

    <!-- no-run -->

    ```python
    assert answer
    ```

    ```bash
    make demo          # mem1 sings
    .venv/bin/mem1 eval model --episodes 2   # --loud
    ```

    | op | cpu |
    |---|:-:|
    | `gae(reward, ...)`, `whiten` | yes, `really` |
    | `prune_kv_cache_` | no |

    | regime | parity |
    |---|---|
    | `carry` | exact |

    ```
    setup.py LICENSE     two files
    csrc/
      include/mem1/mem1.h   the public header
      attention/    one op
        *_cpu.cpp
      torch/        binding
    tests/
    ├── c_api/      a C consumer
    │   └── main.c  # compiled
    └── conftest.py
    ```
    """
)


def test_reads_blocks() -> None:
    first, second = python_blocks(SMALL)
    assert (first.line, first.no_run, second.line, second.no_run) == (6, False, 12, True)
    run(first)
    with pytest.raises(NameError) as error:  # a namespace per block
        run(second)
    assert (error.traceback[-1].lineno + 1, str(error.traceback[-1].path)[-9:]) == (13, "README.md")


def test_reads_the_tree() -> None:
    assert tree(SMALL) == [
        "setup.py",
        "LICENSE",
        "csrc/",
        "csrc/include/mem1/mem1.h",
        "csrc/attention/",
        "csrc/attention/*_cpu.cpp",
        "csrc/torch/",
        "tests/",
        "tests/c_api/",
        "tests/c_api/main.c",
        "tests/conftest.py",
    ]


def test_reads_tables_and_commands() -> None:
    assert table_names(SMALL) == {"gae", "whiten", "prune_kv_cache_"}
    assert commands(SMALL, "mem1") == [("eval", ["--episodes"]), ("train", ["--seed"])]
    assert commands(SMALL, "make") == [("demo", []), ("test", [])]
