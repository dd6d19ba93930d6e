"""What the policy asks of its environment in one turn."""

from __future__ import annotations

from typing import NamedTuple


class Action(NamedTuple):
    """One action of the policy.

    kind: of the tag that it stands in ("query", "answer", or a format's own), "malformed" where the policy
    completed no action. text: what stands between the tags, without the blanks around it; of a malformed
    action all that was written in the turn, the state included.
    """

    kind: str
    text: str
