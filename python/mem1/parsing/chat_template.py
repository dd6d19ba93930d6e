"""What a chat template writes around a task and around observations, found by rendering it with marks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple, get_args

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError, require
from mem1.parsing.env_text import Part
from mem1.parsing.tags import ChatMode, TagFormat

ROLES = ("user", "tool")  # of observations

_Messages = list[dict[str, str]]
_Strip = Callable[[str], str]
_STRIPS: tuple[_Strip, ...] = (str, str.strip, str.lstrip, str.rstrip)  # what templates do to contents
_TASK = " \n<IS>{\"task\": 'Who & why?'}</IS> \n"
_CHECKED_TURNS = 3


class Chat(NamedTuple):
    """The texts around what others write: `head`, the task as `strip` leaves it, `tail`; then per turn
    `lead`, what the policy writes, `before`, the observation in its tags, `after`.
    """

    head: tuple[Part, ...] = ()
    tail: str = ""
    strip: _Strip = str
    lead: str = ""  # blanks that the template has before what the policy writes: the policy's own
    before: str = "\n"
    after: str = "\n"


def load_chat(
    tokenizer: PreTrainedTokenizerBase, format: TagFormat, mode: ChatMode, system: str | None, role: str
) -> Chat:
    """The chat of a mode: "raw" (none), "open" (one message of the assistant over all turns), "turns" (a
    message per turn, observations as those of `role`). Raises InputError for a template that cannot do it.
    """
    require(mode in get_args(ChatMode), "chat", f"one of {', '.join(get_args(ChatMode))}", mode)
    require(role in ROLES, "observation_role", f"one of {', '.join(ROLES)}", role)
    require(system is None or isinstance(system, str), "system", "a text or None", system)
    if mode == "raw":
        require(system is None, "system", "None with chat='raw'", system)
        return Chat()
    if not tokenizer.chat_template:
        raise InputError(f"chat: expected 'raw' for a tokenizer without a chat template, got {mode!r}")
    render = partial(_render, tokenizer)
    chat = _opening(render, system)
    return chat if mode == "open" else _with_turns(render, chat, format, system, role)


def _opening(render: Callable[[_Messages], str], system: str | None) -> Chat:
    """Up to where the first turn begins."""
    marks = [None if system is None else _mark(0), _mark(1)]
    *head, tail = _split(render(_messages(*marks)), [mark for mark in marks if mark])
    texts = [_TASK] if system is None else [system, _TASK]
    whole = render(_messages(system, _TASK))
    for strips in product(_STRIPS, repeat=len(texts)):
        contents = [strip(text) for strip, text in zip(strips, texts, strict=True)]
        if whole == _fill([*head, tail], contents):
            parts = [(head[0], True), *([] if system is None else [(contents[0], False), (head[1], True)])]
            return Chat(tuple(parts), tail, strips[-1])
    raise _fault("writes messages as they are", f"one that changes them: {whole!r}", "'raw'")


def _with_turns(
    render: Callable[[_Messages], str], chat: Chat, format: TagFormat, system: str | None, role: str
) -> Chat:
    """What stands between turns, checked with up to three of them."""
    expected = "renders more turns as it renders fewer, with the new ones behind them"
    other = "'open' or 'raw'"
    marks = [_mark(place) for place in range(3)]
    lead, before, after = _split(render(_messages(system, marks[0], [(marks[1], marks[2])], role)), marks)[1:]
    if not lead.startswith(chat.tail) or lead[len(chat.tail) :].strip():
        raise _fault(expected, f"{lead!r} where {chat.tail!r} stood before an answer", other)
    chat = chat._replace(lead=lead[len(chat.tail) :], before=before, after=after)
    turns = [_turn(format, number) for number in range(_CHECKED_TURNS)]
    written = "".join(text for text, _ in chat.head) + chat.strip(_TASK) + chat.tail
    for number, (action, observation) in enumerate(turns, 1):
        written += chat.lead + action + before + observation + after
        whole = render(_messages(system, _TASK, turns[:number], role))
        if whole != written:
            place = next((i for i, (a, b) in enumerate(zip(whole, written, strict=False)) if a != b), 0)
            found = f"with {number} turns {whole[place : place + 40]!r}, not {written[place : place + 40]!r}"
            raise _fault(expected, found, other)
    return chat


def _turn(format: TagFormat, number: int) -> tuple[str, str]:
    """What a policy and its environment might write."""
    tag, observation = format.actions[0].tag, format.observation
    state = "" if format.state is None else f"<{format.state}>so far {number}</{format.state}>\n"
    return f"{state}<{tag}>who {number}?</{tag}>", f"<{observation}>Doc {number}: text</{observation}>"


def _messages(
    system: str | None, task: str | None, turns: Sequence[tuple[str, str]] = (), role: str = "user"
) -> _Messages:
    opening = [("user", task)] if system is None else [("system", system), ("user", task)]
    spoken = [said for action, observation in turns for said in (("assistant", action), (role, observation))]
    return [{"role": role, "content": content or ""} for role, content in [*opening, *spoken]]


def _mark(place: int) -> str:
    return f"\ue000{place}\ue001"


def _split(text: str, marks: Sequence[str]) -> list[str]:
    """What stands around the marks, each of which has to be there once, in order."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise _fault("writes each message once, in order", "one that does not", "'raw'")
        pieces.append(before)
    return [*pieces, text]


def _fill(pieces: Sequence[str], contents: Sequence[str]) -> str:
    return "".join(piece + content for piece, content in zip(pieces, [*contents, ""], strict=True))


def _render(tokenizer: PreTrainedTokenizerBase, messages: _Messages) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    # A template is a program: whatever it raises.
    except (TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        other = "'raw'" if messages[0]["role"] != "system" else "'raw', or no system message"
        raise _fault(f"takes the roles {roles}", f"{type(error).__name__}: {error}", other) from error


def _fault(expected: str, got: str, other: str) -> InputError:
    return InputError(f"chat: expected a chat template that {expected}, got {got}; use chat={other}")
