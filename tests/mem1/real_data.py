"""Where the real data lies that some tests want: the folder `MEM1_DATA`, or ../shared/data beside the
checkout.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from checkout import ROOT

DATA = Path(os.environ.get("MEM1_DATA", ROOT.parent / "shared" / "data"))

needs_data = pytest.mark.skipif(
    not (DATA / "README.md").is_file(), reason=f"no real data at {DATA}; MEM1_DATA names another folder"
)
