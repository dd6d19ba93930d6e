"""What the policy asks of its environment in one turn."""

from __future__ import annotations

from typing import Literal, NamedTuple

ActionKind = Literal["query", "answer", "malformed"]


class Action(NamedTuple):
    """One action of the policy.

    `kind` is "malformed" when the policy wrote neither a complete query nor a complete answer; `text` is what
    stands between the tags (for a malformed action: all that was written), without the `<IS>` part.
    """

    kind: ActionKind
    text: str
