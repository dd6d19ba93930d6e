"""Who may import whom. The rules are the tables; the code below them reads sources only, it imports nothing
of the project. Each rule is also shown to catch a violation.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
from checkout import ROOT

# --- Python -------------------------------------------------------------------------------------------------


class May(NamedTuple):
    """Modules (space-separated) that a module may import besides the standard library.

    A package stands for its public modules; one whose name starts with an underscore must be named in full.
    """

    load: str  # at import time
    call: str = ""  # also inside functions: what is loaded lazily
    types: str = ""  # also under TYPE_CHECKING


# What rollout, evaluation and train build on.
LOOP = (
    "mem1.checks mem1.config mem1.engine mem1.envs mem1.parsing mem1.rollout mem1.runtime.event_loop "
    "mem1.seeds mem1.trajectory"
)

# Whose own __init__ loads nothing.
ROOMS = [
    f"mem1.{room}"
    for room in "parsing engine rollout envs data train evaluation models runtime commands".split()
]

# The first row whose pattern matches a module's name counts; a module without a row is an error.
PYTHON = {
    "mem1_core": May("mem1_core._library mem1_core.layout mem1_core.mask mem1_core.segments"),
    "mem1_core._C": May(""),
    "mem1_core.versions": May(""),
    "mem1_core._library": May("torch mem1_core._C mem1_core.versions", call="mem1_core.triton"),
    "mem1_core.backend": May("torch"),
    "mem1_core.segments": May("torch"),
    "mem1_core.eviction_policies": May("mem1_core.segments"),
    "mem1_core.eviction": May("torch mem1_core.eviction_policies mem1_core.segments"),
    "mem1_core.tile_plan": May("torch"),
    "mem1_core.mask": May(
        "torch mem1_core._library mem1_core.eviction mem1_core.segments mem1_core.tile_plan"
    ),
    "mem1_core.layout": May(
        "torch mem1_core.eviction mem1_core.eviction_policies mem1_core.mask mem1_core.segments"
    ),
    "mem1_core.plot": May("torch mem1_core.mask mem1_core.segments", call="matplotlib", types="matplotlib"),
    "mem1_core.reference": May("torch mem1_core.mask"),
    "mem1_core.sample_inputs": May("torch mem1_core.segments"),
    "mem1_core.testing": May("torch mem1_core.reference", call="mem1_core.triton"),
    "mem1_core.triton": May("triton mem1_core.versions"),
    "mem1_core.triton.*": May("torch triton mem1_core.triton"),
    "mem1_core.ops": May("mem1_core.ops"),
    "mem1_core._products": May("torch"),
    "mem1_core._head": May("torch mem1_core._products mem1_core.backend"),
    "mem1_core.ops.*": May(
        "torch mem1_core._head mem1_core._library mem1_core.backend mem1_core.ops mem1_core.reference "
        "mem1_core.mask mem1_core.eviction"
    ),
    "mem1_core.integrations": May(""),
    "mem1_core.integrations.scores": May("torch"),
    "mem1_core.integrations.transformers_*": May("torch transformers mem1_core.integrations mem1_core.ops"),
    "mem1_core.integrations.*": May(
        "torch transformers mem1_core.integrations mem1_core.ops mem1_core.mask mem1_core.versions"
    ),
    "mem1": May("", types="mem1.agent mem1.trajectory"),
    "mem1.__main__": May("", call="mem1.cli"),
    "mem1.checks": May(""),
    "mem1.extras": May("mem1.checks"),
    "mem1.seeds": May("numpy"),
    "mem1.io": May("mem1.checks"),
    "mem1.config": May(
        "mem1.checks mem1.parsing.tags mem1.seeds mem1_core.eviction_policies mem1_core.layout"
    ),
    "mem1.config_files": May(
        "yaml jsonargparse mem1.checks mem1.config mem1.envs.worlds mem1.named_objects mem1.parsing.tags"
    ),
    "mem1.named_objects": May("mem1.checks"),
    "mem1.trajectory": May(
        "torch mem1.checks mem1_core.eviction mem1_core.eviction_policies mem1_core.layout mem1_core.mask "
        "mem1_core.segments"
    ),
    "mem1.runtime.progress": May("rich mem1.io"),
    "mem1.runtime.*": May("torch mem1.checks mem1_core"),
    "mem1.parsing.chat_template": May("jinja2 transformers mem1.checks mem1.parsing"),
    "mem1.parsing.turn_eviction": May(
        "torch mem1.parsing mem1_core.eviction mem1_core.eviction_policies mem1_core.segments"
    ),
    "mem1.parsing.*": May("tokenizers transformers mem1.checks mem1.parsing"),
    "mem1.envs.toy.tokenizer": May("tokenizers transformers mem1.envs.toy"),
    "mem1.envs.toy.training": May("mem1.config mem1.envs.toy"),
    "mem1.envs.tasks": May("mem1.checks mem1.extras", call="pyarrow"),
    "mem1.envs.search.*": May(
        "numpy aiohttp yarl bm25s Stemmer sentence_transformers faiss mem1.checks mem1.envs.search "
        "mem1.envs.tasks mem1.extras mem1.io",
    ),
    "mem1.envs.web.*": May(
        "aiohttp yarl trafilatura lxml mem1.checks mem1.envs.base mem1.envs.web mem1.extras mem1.metrics "
        "mem1.parsing"
    ),
    "mem1.envs.webshop.*": May(
        "numpy mem1.checks mem1.envs mem1.extras mem1.parsing", call="bm25s Stemmer rapidfuzz textblob spacy"
    ),
    "mem1.envs.adapters.*": May(
        "mem1.checks mem1.envs mem1.extras mem1.metrics mem1.parsing", call="gymnasium"
    ),
    "mem1.envs.worlds": May("mem1.checks mem1.envs mem1.parsing mem1.runtime.event_loop"),
    "mem1.envs.*": May(
        "mem1.checks mem1.envs mem1.metrics mem1.parsing mem1_core.eviction_policies mem1_core.segments"
    ),
    "mem1.data.*": May("mem1.checks mem1.data mem1.envs mem1.io"),
    "mem1.metrics": May("numpy mem1.trajectory"),
    "mem1.engine.slots": May("torch mem1_core.ops"),
    "mem1.engine.slot_attention": May(
        "torch mem1_core.eviction mem1_core.integrations.scores mem1_core.ops", call="flash_attn"
    ),
    "mem1.engine.engine": May(
        "torch transformers mem1.checks mem1.config mem1.engine mem1_core._head mem1_core.integrations"
    ),
    "mem1.engine.*": May("torch transformers mem1.checks mem1.config mem1.engine mem1_core.integrations"),
    "mem1.models.load": May(
        "torch transformers huggingface_hub safetensors mem1.checks mem1.config mem1.engine mem1.models "
        "mem1.runtime mem1_core.integrations"
    ),
    "mem1.models.adapters": May("torch mem1.config mem1.checks mem1.extras", call="peft"),
    "mem1.models.activations": May("torch transformers mem1_core.integrations.scores"),
    "mem1.models.free_memory": May("torch"),
    "mem1.models.memory_plan": May(
        "torch transformers mem1.checks mem1.engine mem1.models mem1_core.integrations"
    ),
    "mem1.models.*": May("torch transformers mem1.checks mem1.config mem1_core.integrations mem1_core.mask"),
    "mem1.rollout.*": May(
        "torch transformers mem1.models mem1_core.eviction mem1_core.eviction_policies mem1_core.segments "
        + LOOP
    ),
    "mem1.evaluation.plots": May("mem1.evaluation mem1.trajectory mem1_core.plot", call="matplotlib"),
    "mem1.evaluation.results": May("mem1.metrics mem1.trajectory"),
    "mem1.evaluation.tables": May("mem1.evaluation.results"),
    "mem1.evaluation.eval_run": May(
        "transformers mem1.checks mem1.envs.tasks mem1.evaluation mem1.io mem1.runtime mem1.trajectory"
    ),
    "mem1.evaluation.baselines": May(""),
    "mem1.evaluation.baselines.external_memory": May("bm25s mem1.envs"),
    "mem1.evaluation.baselines.agents": May(
        "transformers mem1.checks mem1.config mem1.envs mem1.parsing mem1.seeds mem1_core.eviction_policies",
        call="mem1.evaluation.baselines",
    ),
    "mem1.evaluation.viewer": May(""),
    "mem1.evaluation.viewer.*": May(
        "numpy torch transformers mem1.checks mem1.envs.tasks mem1.evaluation.viewer mem1.io mem1.metrics "
        "mem1.parsing mem1.trajectory mem1_core"
    ),
    "mem1.evaluation.transcripts": May("transformers mem1.parsing mem1.trajectory mem1_core.segments"),
    "mem1.evaluation.*": May(f"torch transformers mem1.evaluation.results mem1.runtime {LOOP}"),
    "mem1.train.*": May(
        "torch transformers safetensors mem1_core mem1.extras mem1.io mem1.models mem1.runtime mem1.train "
        "mem1.evaluation " + LOOP,
        call="wandb trackio",
    ),
    "mem1.agent": May("transformers mem1"),
    "mem1.demo": May("torch transformers mem1"),
    "mem1.commands.*": May("torch transformers mem1 mem1_core"),
    "mem1.cli": May("mem1"),
    **dict.fromkeys(ROOMS, May("")),
}
PACKAGES = {"mem1_core": ROOT / "mem1_core", "mem1": ROOT / "python" / "mem1"}


def python_sources() -> dict[str, Path]:
    """Every module of the two packages by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.pyi")]):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = python_sources()


class Import(NamedTuple):
    name: str
    when: Literal["load", "call", "types"]
    line: int


def imports(module: str, source: str, is_package: bool = False) -> Iterator[Import]:
    """Every import in `source`, as the dotted name of the module it loads."""

    def visit(node: ast.AST, when: Literal["load", "call", "types"]) -> Iterator[Import]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            when = "call"
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            when = "types"
        elif isinstance(node, ast.Import):
            yield from (Import(alias.name, when, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                anchor = parts[: len(parts) - node.level + is_package]
                base = ".".join([*anchor, *base.split(".")] if base else anchor)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield Import(whole if whole in MODULES else base, when, node.lineno)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, when)

    yield from visit(ast.parse(source), "load")


def covers(allowed: str, name: str) -> bool:
    return any(
        name == entry or (name.startswith(f"{entry}.") and not name[len(entry) + 1 :].startswith("_"))
        for entry in allowed.split()
    )


def python_violations(module: str, source: str, is_package: bool = False) -> list[str]:
    row = next((row for pattern, row in PYTHON.items() if fnmatch(module, pattern)), None)
    if row is None:
        return [f"{module}: has no row in the table of tests/test_layering.py"]
    allowed = {
        "load": row.load,
        "call": f"{row.load} {row.call}",
        "types": f"{row.load} {row.call} {row.types}",
    }
    return [
        f"{module}:{line}: may not import {name} ({when})"
        for name, when, line in imports(module, source, is_package)
        if name.split(".")[0] not in sys.stdlib_module_names and not covers(allowed[when], name)
    ]


def test_python_layers() -> None:
    assert set(MODULES) >= {"mem1_core", "mem1_core._C", "mem1_core.ops.attention", "mem1.cli"}
    found = []
    for module, path in MODULES.items():
        found += python_violations(module, path.read_text(), path.stem == "__init__")
    assert not found, "\n".join(found)


def test_python_table_has_no_dead_row() -> None:
    dead = [pattern for pattern in PYTHON if not any(fnmatch(module, pattern) for module in MODULES)]
    assert not dead


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("mem1_core.reference", "import torch.nn\nfrom mem1_core.mask import TrajectoryMask", ""),
        ("mem1_core.reference", "from mem1_core.ops import trajectory_attention", "mem1_core.ops"),
        ("mem1_core.reference", "from mem1_core import TrajectoryMask", "mem1_core"),
        ("mem1_core.reference", "from . import ops", "mem1_core.ops"),
        ("mem1_core.ops.attention", "from mem1_core import _C", "mem1_core._C"),
        ("mem1_core.ops.attention", "from .._library import ops", ""),
        ("mem1_core.ops.attention", "import transformers", "transformers"),
        ("mem1_core.ops.attention", "def f():\n    from mem1 import Trajectory", "mem1"),
        ("mem1_core.layout", "if TYPE_CHECKING:\n    from mem1.trajectory import T", "mem1.trajectory"),
        ("mem1_core.mask", "def f():\n    from mem1_core.layout import L", "mem1_core.layout"),
        ("mem1_core.mask", "def f():\n    import matplotlib", "matplotlib"),
        ("mem1_core.eviction", "from mem1_core.mask import M", "mem1_core.mask"),
        ("mem1_core.plot", "if TYPE_CHECKING:\n    from matplotlib.axes import Axes", ""),
        ("mem1_core.plot", "import matplotlib.pyplot as plt", "matplotlib.pyplot"),
        ("mem1_core.plot", "def f():\n    import matplotlib.pyplot as plt", ""),
        ("mem1.demo", "def f():\n    import matplotlib", "matplotlib"),
        ("mem1.demo", "from mem1_core import _library", "mem1_core._library"),
        ("mem1.commands.eval_command", "from mem1_core.layout import TrajectoryLayout", ""),
        ("mem1_core.unheard_of", "", "has no row"),
        ("mem1.unheard_of", "", "has no row"),
        ("mem1.engine", "from mem1.train import learner", "mem1.train.learner"),
        ("mem1.rollout.episode", "from mem1.train import learner", "mem1.train.learner"),
    ],
)
def test_python_rule_catches(module: str, source: str, caught: str) -> None:
    found = python_violations(module, source)
    assert len(found) == bool(caught)
    assert all(re.search(rf"{re.escape(caught)}( \(|\b)", message) for message in found), found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that lead from one to the next and back to the first; none where there is no circle."""
    clear: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in clear:
            return []
        for following in sorted(graph[name]):
            if found := walk(following, [*path, name]):
                return found
        clear.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_no_import_runs_in_a_circle() -> None:
    """Those inside functions and under TYPE_CHECKING among them."""
    graph = {
        module: {name for name, _, _ in imports(module, path.read_text(), path.stem == "__init__")}
        & MODULES.keys()
        for module, path in MODULES.items()
    }
    assert "mem1_core.layout" in graph and "mem1_core.mask" in graph["mem1_core.layout"]
    assert circle(graph) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


# --- C++ ----------------------------------------------------------------------------------------------------

CSRC = ROOT / "csrc"
FRAMEWORKS = {"torch", "ATen", "c10", "pybind11", "Python.h"}  # csrc/torch/ is our own name in the same place
CPP = {  # folder in csrc: the folders and frameworks it may include
    "include": {"mem1"},
    "common": {"mem1", "common"},
    "torch": {"mem1", "common", "torch"} | FRAMEWORKS,
}
C_HEADERS = {"stddef.h", "stdint.h"}  # all that the public header may ask for
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def cpp_sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})


def cpp_violations(path: str, source: str) -> list[str]:
    """`path` is relative to csrc. A folder without a row is an op: mem1.h, common/ and itself."""
    folder = path.split("/")[0]
    allowed = CPP.get(folder, {"mem1", "common", folder})
    ours = {entry.name for entry in CSRC.iterdir() if entry.is_dir()} | {"mem1"}
    found = []
    for bracket, header in INCLUDE.findall(source):
        first = header.split("/")[0]
        system = bracket == "<" and first not in ours | FRAMEWORKS
        if not (header in C_HEADERS or folder != "include" if system else first in allowed):
            found.append(f"csrc/{path}: may not include {header}")
    return found


def test_cpp_layers() -> None:
    sources = cpp_sources()
    assert {path.relative_to(CSRC).parts[0] for path in sources} >= {
        "include",
        "common",
        "attention",
        "torch",
    }
    found = []
    for path in sources:
        found += cpp_violations(path.relative_to(CSRC).as_posix(), path.read_text())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "line", "fine"),
    [
        ("attention/a.cpp", '#include "attention/b.h"', True),
        ("attention/a.cpp", '#include "common/check.h"', True),
        ("attention/a.cu", "#include <cuda_runtime.h>", True),
        ("attention/a.cpp", '#include "gae/gae.h"', False),
        ("attention/a.cpp", '#include "b.h"', False),
        ("attention/a.cpp", '#include "../common/check.h"', False),
        ("attention/a.cpp", "#include <ATen/Functions.h>", False),
        ("attention/a.cpp", '# include "torch/ops.h"', False),
        ("attention/a.cpp", "#include <Python.h>", False),
        ("common/a.h", '#include "mem1/mem1.h"', True),
        ("common/a.h", "#include <attention/tile_plan.h>", False),
        ("common/a.h", "#include <c10/util/BFloat16.h>", False),
        ("torch/a.cpp", "#include <torch/library.h>", True),
        ("torch/a.cpp", '#include "attention/tile_plan.h"', False),
        ("include/mem1/mem1.h", "#include <stdint.h>", True),
        ("include/mem1/mem1.h", "#include <vector>", False),
        ("include/mem1/mem1.h", '#include "common/check.h"', False),
    ],
)
def test_cpp_rule_catches(path: str, line: str, fine: bool) -> None:
    assert len(cpp_violations(path, f"// a comment\n{line}\n#include <new.h>\n")) == (
        path[:7] == "include"
    ) + (not fine)


def cmake_text() -> str:
    return re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())


def listed_sources(cmake: str) -> list[str]:
    return sorted(re.findall(r"csrc/[\w/.-]+\.(?:cpp|cu)\b", cmake))


def installed_sources(cmake: str) -> list[str]:
    return [
        path for call in re.findall(r"\binstall\(([^)]*)\)", cmake) for path in re.findall(r"csrc\S*", call)
    ]


def test_cmake_lists_every_source_once_and_installs_the_public_headers_only() -> None:
    sources = [path.relative_to(ROOT).as_posix() for path in cpp_sources() if path.suffix in {".cpp", ".cu"}]
    assert listed_sources(cmake_text()) == sorted(sources)
    assert installed_sources(cmake_text()) == ["csrc/include/"]


def test_cmake_rule_catches() -> None:
    cmake = (
        "add_library(a csrc/b.cpp csrc/a/a.cu csrc/b.cpp)\ninstall(FILES csrc/common/check.h DESTINATION x)"
    )
    assert listed_sources(cmake) == ["csrc/a/a.cu", "csrc/b.cpp", "csrc/b.cpp"]
    assert installed_sources(cmake) == ["csrc/common/check.h"]
