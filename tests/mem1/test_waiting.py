"""How threads wait: said by the commands before torch is loaded, by no import, and never against the user."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from checkout import ROOT

from mem1.waiting import SPIN, wait_briefly

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
(SCRIPT,) = re.findall(r'^mem1 = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

# Says how threads wait when torch is about to be loaded, and ends there.
WATCHED = """
import os, sys

class Watch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()

sys.meta_path.insert(0, Watch)
sys.argv = ["mem1", "--help"]
"""
COMMANDS = {
    "the console script": f"""
from importlib.metadata import EntryPoint
EntryPoint("mem1", "{SCRIPT}", "console_scripts").load()()
""",
    "python -m mem1": "import runpy; runpy.run_module('mem1', run_name='__main__')",
}


def python(code: str, **settings: str) -> list[str]:
    """The lines that a fresh Python prints which finds `settings` about threads that wait, and no others."""
    there = {name: value for name, value in os.environ.items() if name not in NAMES} | settings
    there["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["mem1", "mem1_core", "mem1.agent"])
def test_an_import_changes_nobodys_process(name):
    code = "import json, os; before = dict(os.environ)\n"
    code += f"import {name}; print(json.dumps([before, dict(os.environ)]))"
    before, after = json.loads(python(code)[-1])
    assert [after.get(variable) for variable in NAMES] == [None, None]
    changed = {variable for variable in before | after if before.get(variable) != after.get(variable)}
    assert not [variable for variable in changed if "OMP" in variable or "MKL" in variable]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, f"None {SPIN}"),
        ({"OMP_WAIT_POLICY": "active"}, "active None"),
        ({"GOMP_SPINCOUNT": "7"}, "None 7"),
    ],
)
def test_the_command_says_it_before_torch_is_loaded(command, settings, said):
    assert python(WATCHED + COMMANDS[command], **settings) == [said]


def test_it_is_said_once():
    variables: dict[str, str] = {}
    wait_briefly(variables)
    assert variables == {"GOMP_SPINCOUNT": SPIN}
    wait_briefly(variables)
    assert variables == {"GOMP_SPINCOUNT": SPIN}


def test_the_tests_themselves_wait_so():
    assert any(name in os.environ for name in NAMES)


def test_the_package_has_its_names_all_the_same():
    code = "import mem1, sys; print('torch' in sys.modules, sorted(set(mem1.__all__) - set(dir(mem1))))\n"
    code += "from mem1 import *; print(MemoryEfficientAgent.__module__, mem1.Trajectory.__module__)\n"
    code += "print(hasattr(mem1, 'nothing'))"
    assert python(code) == ["False []", "mem1.agent mem1.trajectory", "False"]
