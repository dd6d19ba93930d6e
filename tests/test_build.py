"""The build's options: a wrong one stops the configuration with a message that says what was wanted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

# Beside this interpreter first: the virtual environment need not be activated.
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-DMEM1_CUDA=maybe"], "MEM1_CUDA: wanted AUTO, ON or OFF, got maybe"),
        (["-DMEM1_CUDA=ON", "-DCMAKE_CUDA_COMPILER=NOTFOUND"], "MEM1_CUDA=ON, but no nvcc was found"),
    ],
)
def test_wrong_option_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    assert CMAKE is not None, "the build needs cmake"
    done = subprocess.run([CMAKE, "-S", ROOT, "-B", tmp_path, *options], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
