"""Rules of forgetting: functions from the segments written so far to which of them may still be seen.

Those of the package are frozen dataclasses; `str` gives the short form that command lines and files have.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias, cast

from mem1_core.segments import Segment, by_policy, is_action

EvictionFunction: TypeAlias = Callable[[Sequence[Segment]], Sequence[bool]]
# Asked at the end of every segment. It gets all segments so far, the one just completed last, and returns a
# flag for each: True while it may be seen by the tokens that follow. What it hid once stays hidden, and the
# prompt is never hidden. A turn of the policy ends with an action (of no tokens, if it wrote a state and no
# more).
EvictionPolicy: TypeAlias = str | int | EvictionFunction  # the first two: short forms, see `resolve_policy`


@dataclass(frozen=True)
class _Rule:
    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ()  # of actions, without which the rule does nothing

    def __str__(self) -> str:
        return "=".join([self.name, *(str(getattr(self, field.name)) for field in fields(self))])

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field.name}: expected an integer >= 1, got {value!r}")

    def __call__(self, segments: Sequence[Segment]) -> Sequence[bool]:
        raise NotImplementedError

    def peak_tokens(self, prompt: int, action: int, info: int, turns: int) -> int:
        """The most tokens that can be live at once, with at most so many in the prompt, in an action (its
        state included) and in an info, and so many turns; the last action has no info.
        """
        return prompt + turns * action + (turns - 1) * info


@dataclass(frozen=True)
class LastTurns(_Rule):
    """When an action is complete only the last `turns` turns stay, its own among them.

    `LastTurns(1)` is MEM1's own rule, in short "action": the next action sees this one and its info.
    """

    name = "last_turns"
    turns: int

    def __str__(self) -> str:
        return "action" if self.turns == 1 else super().__str__()

    def __call__(self, segments: Sequence[Segment]) -> Sequence[bool]:
        first = max((s.turn for s in segments if is_action(s.kind)), default=0) - self.turns + 1
        return [s.kind == "prompt" or s.turn >= first for s in segments]

    def peak_tokens(self, prompt: int, action: int, info: int, turns: int) -> int:
        # Before it leaves, the oldest turn is beside the action that drives it out.
        return prompt + min(self.turns + 1, turns) * action + min(self.turns, turns - 1) * info


@dataclass(frozen=True)
class AtState(_Rule):
    """The turns before leave at the end of the state; without a state, when the action is complete."""

    name = "state"

    def __call__(self, segments: Sequence[Segment]) -> Sequence[bool]:
        first = max((s.turn for s in segments if by_policy(s.kind)), default=0)
        return [s.kind == "prompt" or s.turn >= first for s in segments]

    def peak_tokens(self, prompt: int, action: int, info: int, turns: int) -> int:
        return LastTurns(1).peak_tokens(prompt, action, info, turns)


@dataclass(frozen=True)
class Never(_Rule):
    """Nothing leaves: the full-context agent."""

    name = "never"

    def __call__(self, segments: Sequence[Segment]) -> Sequence[bool]:
        return [True] * len(segments)


@dataclass(frozen=True)
class Truncate(_Rule):
    """The truncating agent forgets by age alone: when an action is complete the oldest turns leave, until
    those that stay, its own up to this action among them, have at most `tokens` tokens. Its own stays.
    """

    name = "truncate"
    tokens: int

    def __call__(self, segments: Sequence[Segment]) -> Sequence[bool]:
        end = max((n for n, s in enumerate(segments) if is_action(s.kind)), default=-1) + 1
        sizes: dict[int, int] = {}
        for segment in segments[:end]:
            sizes[segment.turn] = sizes.get(segment.turn, 0) + segment.length
        first = segments[end - 1].turn if end else 0
        total = sizes.get(first, 0)
        while first > 1 and (total := total + sizes.get(first - 1, 0)) <= self.tokens:
            first -= 1
        return [s.kind == "prompt" or s.turn >= first for s in segments]

    def peak_tokens(self, prompt: int, action: int, info: int, turns: int) -> int:
        kept = prompt + max(self.tokens, action) + info + action
        return min(kept, super().peak_tokens(prompt, action, info, turns))


@dataclass(frozen=True)
class Compact(_Rule):
    """Everything stays until an action is complete with which more than `tokens` tokens of turns are live;
    then all turns before its own leave. What is still needed has to stand in its state.
    """

    name = "compact"
    tokens: int

    def __call__(self, segments: Sequence[Segment]) -> Sequence[bool]:
        first, sizes = 1, dict[int, int]()
        for segment in segments:
            if segment.kind != "prompt":
                sizes[segment.turn] = sizes.get(segment.turn, 0) + segment.length
            if is_action(segment.kind) and sum(sizes.values()) > self.tokens:
                first = segment.turn
                sizes = {first: sizes[first]}
        return [s.kind == "prompt" or s.turn >= first for s in segments]

    def peak_tokens(self, prompt: int, action: int, info: int, turns: int) -> int:
        return Truncate(self.tokens).peak_tokens(prompt, action, info, turns)


@dataclass(frozen=True)
class HideObservations(_Rule):
    """When an action is complete the infos leave that are older than the last `turns` turns; what the policy
    wrote stays.
    """

    name = "hide_observations"
    turns: int

    def __call__(self, segments: Sequence[Segment]) -> Sequence[bool]:
        first = max((s.turn for s in segments if is_action(s.kind)), default=0) - self.turns + 1
        return [s.kind != "info" or s.turn >= first for s in segments]

    def peak_tokens(self, prompt: int, action: int, info: int, turns: int) -> int:
        return prompt + turns * action + min(self.turns, turns - 1) * info


@dataclass(frozen=True)
class Fold(_Rule):
    """When a "return" is complete, all that was written since the last open "branch" leaves, but for the
    return itself (FoldAgent). A return without a branch changes nothing.
    """

    name = "fold"
    kinds = ("branch", "return")

    def __call__(self, segments: Sequence[Segment]) -> Sequence[bool]:
        stays, open_branches = [True] * len(segments), list[int]()
        for n, segment in enumerate(segments):
            if segment.kind == "branch":
                open_branches.append(n)
            elif segment.kind == "return" and open_branches:
                begin = open_branches.pop() + 1
                stays[begin:n] = [False] * (n - begin)
        return stays


@dataclass(frozen=True)
class Summary(_Rule):
    """When a "summary" is complete it replaces all that was written before it, but for the prompt."""

    name = "summary"
    kinds = ("summary",)

    def __call__(self, segments: Sequence[Segment]) -> Sequence[bool]:
        last = max((n for n, s in enumerate(segments) if s.kind == "summary"), default=0)
        return [s.kind == "prompt" or n >= last for n, s in enumerate(segments)]


@dataclass(frozen=True)
class Recorded:
    """What a rule has decided in one trajectory: of each segment that it was shown the index of the first
    token that does not see it any more, None where all do.
    """

    lifetimes: tuple[int | None, ...]
    rule: str = "recorded"  # its name

    def __str__(self) -> str:
        return self.rule

    def __call__(self, segments: Sequence[Segment]) -> Sequence[bool]:
        now = sum(segment.length for segment in segments)
        return [end is None or now < end for end in self.lifetimes[: len(segments)]]


RULES: tuple[type[_Rule], ...] = (
    LastTurns,
    AtState,
    Never,
    Truncate,
    Compact,
    HideObservations,
    Fold,
    Summary,
)


def resolve_policy(prune: EvictionPolicy) -> EvictionFunction:
    """The function that `prune` stands for: itself, or that of a short form, a number of tokens for
    `Truncate`, "action" for `LastTurns(1)`, or what `str` gives of a rule. ValueError for anything else.
    """
    if callable(prune) and not isinstance(prune, type):
        return prune
    if isinstance(prune, int) and not isinstance(prune, bool) and prune >= 1:
        return Truncate(prune)
    if isinstance(prune, str):
        if prune == "action":
            return LastTurns(1)
        name, equals, value = prune.partition("=")
        for rule in RULES:
            if rule.name == name and bool(equals) == bool(fields(rule)):
                if not equals:
                    return rule()
                if value.isascii() and value.isdecimal() and int(value):
                    return cast(Any, rule)(int(value))
    forms = ", ".join(rule.name + "=N" * len(fields(rule)) for rule in RULES)
    raise ValueError(
        f"prune: expected 'action', a number of tokens >= 1, a function, or one of {forms}, got {prune!r}"
    )


def short_form(prune: EvictionPolicy) -> str | int | None:
    """What `resolve_policy` makes the same rule of; None for a function of one's own."""
    return prune if isinstance(prune, (str, int)) else str(prune) if type(prune) in RULES else None


def rule_name(prune: EvictionPolicy) -> str | int:
    """The short form as it was given, else `policy_name`: what files and messages say."""
    return short_form(prune) or policy_name(prune)


def policy_name(prune: EvictionPolicy) -> str:
    """Of a rule: the full short form, or "module:name" of a function of one's own."""
    policy: Any = resolve_policy(prune)
    return str(policy) if type(policy) in (*RULES, Recorded) else qualified_name(policy)


def qualified_name(value: Any) -> str:
    """`module:name` of a function or a class, that of the class of any other object; of a partial with its
    arguments.
    """
    if isinstance(value, functools.partial):
        arguments = [*map(repr, value.args), *(f"{k}={v!r}" for k, v in value.keywords.items())]
        called = f"{qualified_name(value.func)}({', '.join(arguments)})"
        return re.sub(r" at 0x[0-9a-fA-F]+", "", called)  # the same in every process
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"
