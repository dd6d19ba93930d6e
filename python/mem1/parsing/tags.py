"""The tags between which a policy writes and an environment answers: a format is data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any, Literal

from mem1.checks import InputError, require

# How a task stands in the stream: as plain text; in one message of the assistant, kept open over all turns;
# with a message per turn.
ChatMode = Literal["raw", "open", "turns"]
RESERVED = ("prompt", "info", "state", "malformed")  # kinds that are no action's
_TURNS_LEFT = "{turns_left}"


def _require_text(name: str, text: object) -> None:
    require(_is_text(text), name, "a text", text)


def _is_text(text: object) -> bool:
    """Without lone surrogates, which no tokenizer takes."""
    return isinstance(text, str) and text.encode(errors="replace").decode() == text


def _require_tag(name: str, tag: object) -> None:
    sound = _is_text(tag) and re.fullmatch(r"[^\s<>/]+", str(tag))
    require(bool(sound), name, "a tag's name without blanks, <, > and /", tag)


@dataclass(frozen=True)
class ActionTag:
    """`<tag> ... </tag>` is an action.

    kind: what environments and segments call it. reply: None where the environment is asked, else what the
    loop itself answers with.
    """

    tag: str
    kind: str
    reply: str | None = None

    def __post_init__(self) -> None:
        _require_tag("tag", self.tag)
        word = isinstance(self.kind, str) and self.kind.isidentifier() and self.kind == self.kind.lower()
        sound = word and self.kind not in RESERVED
        require(sound, "kind", f"a lower-case word, none of {', '.join(RESERVED)}", self.kind)
        if self.reply is not None:
            _require_text("reply", self.reply)
            require(self.kind != "answer", "reply", "None for an answer, which ends the episode", self.reply)


QUERY, ANSWER = ActionTag("query", "query"), ActionTag("answer", "answer")


@dataclass(frozen=True)
class TagFormat:
    """What a turn looks like. Raises InputError for tags of which one cannot be told from another.

    state: tag of the internal state, None for a format without one. actions: each ends the turn.
    observation: tag of what is answered. turn_hint: the first thing in each observation; `{turns_left}`
    stands for that number. last_turn_hint: in its place where one turn is left, if there is one.
    context_request: the last thing in an observation, where the context has passed
    `RolloutConfig.context_limit`.
    """

    state: str | None = "IS"
    actions: tuple[ActionTag, ...] = (QUERY, ANSWER)
    observation: str = "info"
    turn_hint: str = ""
    last_turn_hint: str = ""
    context_request: str = ""

    def __post_init__(self) -> None:
        sound = isinstance(self.actions, (list, tuple)) and len(self.actions) > 0
        sound = sound and all(isinstance(action, ActionTag) for action in self.actions)
        require(sound, "actions", "at least one ActionTag", self.actions)
        object.__setattr__(self, "actions", tuple(self.actions))
        if self.state is not None:
            _require_tag("state", self.state)
        _require_tag("observation", self.observation)
        for one, other in combinations(self.tags, 2):
            if one.startswith(other) or other.startswith(one):
                raise InputError(f"tags: expected none that begins with another, got {one!r} and {other!r}")
        for name in ("turn_hint", "last_turn_hint", "context_request"):
            _require_text(name, getattr(self, name))
        for field in ("turn_hint", "last_turn_hint"):
            for name in re.findall(r"\{[^{}]*\}", getattr(self, field)):
                require(name == _TURNS_LEFT, field, f"no placeholder but {_TURNS_LEFT}", name)

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag, the state's first, the observation's last."""
        written = tuple(action.tag for action in self.actions)
        return (*([] if self.state is None else [self.state]), *written, self.observation)

    @property
    def rest_kind(self) -> str:
        """The kind of a segment that holds no complete action."""
        return next((action.kind for action in self.actions if action.kind != "answer"), "query")

    def action(self, kind: str) -> ActionTag | None:
        """The first action of that kind."""
        return next((action for action in self.actions if action.kind == kind), None)

    def hint(self, turns_left: int) -> str:
        hint = self.last_turn_hint if turns_left == 1 and self.last_turn_hint else self.turn_hint
        return hint.replace(_TURNS_LEFT, str(turns_left))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TagFormat:
        """The inverse of `dataclasses.asdict`, by way of JSON too. Raises InputError for unknown keys."""
        values = _checked(cls, "format", values)
        actions = values.get("actions", ())
        require(isinstance(actions, (list, tuple)), "actions", "a list", actions)
        if "actions" in values:
            values["actions"] = tuple(ActionTag(**_checked(ActionTag, "actions", one)) for one in actions)
        return cls(**values)


def _checked(cls: type[Any], name: str, values: object) -> dict[str, Any]:
    """`values` as keyword arguments of the dataclass `cls`."""
    known = [entry.name for entry in fields(cls)]
    required = [key for key in ("tag", "kind") if key in known]
    sound = isinstance(values, Mapping) and {*required} <= {*values} <= {*known}
    require(sound, name, f"a table of {', '.join(known)}", values)
    return dict(values)  # type: ignore[call-overload]


# The hints of the released code, `replace(format, **HINTS)`: what its models are used to.
HINTS = {
    "turn_hint": "[HINT]You have {turns_left} turns left.[/HINT]",
    "last_turn_hint": "[HINT]You have 1 turn left. You must answer the question in the next turn.[/HINT]",
}
MEM1 = TagFormat()
OFFICIAL = TagFormat("think", (ActionTag("search", "query"), ANSWER), "information")  # the released code's
FOLD = TagFormat(
    actions=(
        QUERY,
        ANSWER,
        ActionTag("branch", "branch", "Work on this part alone, then write what came of it in <return>."),
        ActionTag("return", "return", "Back to the whole."),
    )
)
SUMMARY = TagFormat(
    actions=(QUERY, ANSWER, ActionTag("summary", "summary", "Go on from your summary.")),
    context_request="\nThe context is full: write all that is still needed in <summary>.",
)
CHUNKS = TagFormat(
    None, (ActionTag("memory", "query"), ANSWER)
)  # MemAgent's: a memory asks for the next piece

FORMATS = {"mem1": MEM1, "official": OFFICIAL, "fold": FOLD, "summary": SUMMARY, "chunks": CHUNKS}
