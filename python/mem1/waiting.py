"""How the project's own commands, tests and benches wait for their threads. Imports nothing: libgomp reads
these settings when torch loads it.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# A thread without work turns round this often before it sleeps. As libgomp comes it does so for milliseconds,
# and beside another busy process takes the time of the very thread that it waits for; one that sleeps at once
# is slow to wake for the many short pieces of a small model.
SPIN = "2000"


def wait_briefly(variables: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP threads wait with a short spin, in this process and those it starts, unless the user has
    said how they shall.

    It changes something only before torch is loaded. For programs, never for an import.
    """
    if "OMP_WAIT_POLICY" not in variables:
        variables.setdefault("GOMP_SPINCOUNT", SPIN)
