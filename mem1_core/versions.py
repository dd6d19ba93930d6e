"""The versions of other packages that this one works with, in one place: setup.py makes its requirements of
them, `make ends` tests with the oldest and with the newest there are, and an untested one warns on import.
"""

from __future__ import annotations

import re
import warnings
from types import ModuleType

# The oldest supported and the newest tested, which has as many parts as say what may break: "2" is every 2.x.
# A newer one is let in. constraints.txt has the exact versions that the tests run with.
TESTED = {
    "torch": ("2.11", "2.13"),
    "triton": ("3.6", "3.9"),
    "numpy": ("2.1", "2"),
    "transformers": ("5.17", "5.24"),
    "tokenizers": ("0.23.1", "0.23"),
    "safetensors": ("0.8", "0"),
    "rich": ("13", "15"),
    "matplotlib": ("3.9.2", "3"),
}


def _numbers(release: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", release.partition("+")[0])]


def warn_if_untested(package: ModuleType) -> None:
    """Warns if the version of `package` lies outside of `TESTED`. A module calls it where it is loaded, so
    that there is one warning, and only for what is in use.
    """
    name, installed = package.__name__, package.__version__
    oldest, newest = TESTED[name]
    numbers, end = _numbers(installed), _numbers(newest)
    if numbers < _numbers(oldest) or numbers[: len(end)] > end:
        warnings.warn(
            f"{name}: expected {oldest} to {newest}, the versions tested, got {installed}", stacklevel=2
        )
