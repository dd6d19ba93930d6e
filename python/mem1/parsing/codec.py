"""Between text and tokens: all that a rollout needs of a tokenizer, a format of tags and a chat template."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError
from mem1.parsing.action import Action
from mem1.parsing.boundaries import TurnReader
from mem1.parsing.chat_template import load_chat
from mem1.parsing.env_text import PlainEncoder, head_of
from mem1.parsing.tags import MEM1, ChatMode, TagFormat
from mem1.parsing.token_text import TokenText

_MANY_TURNS = 9999  # as many digits as a hint is reckoned with


class Codec:
    """A tokenizer, a format, and how the two meet a model's chat template.

    chat: "raw" (a plain text), "open" (one message of the assistant, kept open over all turns), "turns" (a
    message per turn; observations have `observation_role`). stop_ids: end a turn, beside `eos_token_id` and,
    with "turns", the template's own end of a message. Raises InputError for a tokenizer that is not a fast
    one, that cannot write one of the tags, or whose template cannot be used so.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        format: TagFormat = MEM1,
        *,
        chat: ChatMode = "raw",
        system: str | None = None,
        observation_role: str = "user",
        stop_ids: Iterable[int] = (),
    ) -> None:
        self.tokenizer, self.format, self.text = tokenizer, format, TokenText(tokenizer)
        self._plain = PlainEncoder(tokenizer)
        self._raw = chat == "raw"
        self._chat = load_chat(tokenizer, format, chat, system, observation_role)
        stops = {*stop_ids, tokenizer.eos_token_id} - {None}
        # Where the template begins with the end of the assistant's message, the policy may write that itself.
        before = self._chat.before
        first = next(self._plain.added_tokens(before), None)
        if first is not None and not before[: first[1]].strip():
            stops.add(first[0])
        self.stop_ids = frozenset(stops)
        for tag in format.tags:
            for written in (f"<{tag}>", f"</{tag}>"):
                got = self.decode(self._plain.encode_parts([(written, True)]))
                if written not in got:
                    raise InputError(f"tokenizer: expected one that can write {written}, got {got!r}")

    def prompt(self, text: str, limit: int) -> list[int]:
        """The tokens of a task, or at least `limit + 1` of them."""
        chat = self._chat
        opening = self._plain.opening if self._raw else []

        def encode(head: str) -> list[int]:
            parts = [*chat.head, (head, False), (chat.tail, True)]
            return self._plain.encode_parts(parts, first=True)

        return [*opening, *head_of(chat.strip(text), limit, encode)[0]]

    def observation(self, text: str, limit: int, *, turns_left: int, context_full: bool = False) -> list[int]:
        """What the environment writes after an action, at most `limit` tokens: tag, hint, text, the format's
        request if the context is full, tag, and what the chat template has around them. The text is cut at
        the end of a character.

        Raises InputError if `limit` is too small for an empty text.
        """
        tag = self.format.observation
        opened = f"{self._chat.before}<{tag}>{self.format.hint(turns_left)}"
        request = self.format.context_request if context_full else ""
        closed = f"{request}</{tag}>{self._chat.after}"

        def encode(head: str) -> list[int]:
            return self._plain.encode_parts([(opened, True), (head, False), (closed, True)])

        tokens, head = head_of(text, limit, encode)
        if len(tokens) <= limit:
            return tokens
        room = limit - len(encode(""))
        if room < 0:
            raise InputError(f"limit: expected at least {limit - room}, which the tags take, got {limit}")
        starts = [*self._plain.starts(head), len(head)]
        count = min(room, len(starts) - 1)
        while count > 0:
            tokens = encode(head[: starts[count]])
            if len(tokens) <= limit:
                return tokens
            count -= len(tokens) - limit  # the cut has made other tokens of what stands before it
        return encode("")

    def observation_overhead(self) -> int:
        """Tokens of an observation without any text, but with hint and request."""
        hints = (self.observation("", 2**31, turns_left=n, context_full=True) for n in (1, _MANY_TURNS))
        return max(map(len, hints))

    def check_limits(
        self, max_info_tokens: int, max_action_tokens: int, max_state_tokens: int | None = None
    ) -> None:
        """Raises InputError for a limit that the tags alone exceed."""
        limits = {"max_info_tokens": (max_info_tokens, self.observation_overhead())}
        state = 0 if self.format.state is None else self._pair(self.format.state)
        actions = [self._pair(action.tag) for action in self.format.actions]
        limits["max_action_tokens"] = (max_action_tokens, state + min(actions))
        if state and max_state_tokens is not None:
            limits["max_state_tokens"] = (max_state_tokens, state)
            if max_state_tokens > max_action_tokens:
                expected = f"at most max_action_tokens={max_action_tokens}, which holds the state too"
                raise InputError(f"max_state_tokens: expected {expected}, got {max_state_tokens}")
        for name, (limit, least) in limits.items():
            if limit < least:
                raise InputError(f"{name}: expected at least {least}, which the tags take, got {limit}")

    def _pair(self, tag: str) -> int:
        return len(self._plain.encode_parts([(f"<{tag}></{tag}>", True)]))

    def expert(self, state: str, action: Action) -> list[int]:
        """The tokens of an expert's turn. Raises ValueError for a kind of action, or a state, that the format
        does not have.
        """
        kind, text = action
        found = self.format.action(kind)
        if found is None:
            kinds = ", ".join(action.kind for action in self.format.actions)
            raise ValueError(f"expert_action: expected one of {kinds}, got {reprlib.repr(kind)}")
        parts = [(f"<{found.tag}>", True), (text, False), (f"</{found.tag}>", True)]
        name = self.format.state
        if name is not None:
            parts = [(f"<{name}>", True), (state, False), (f"</{name}>\n", True), *parts]
        elif state:
            raise ValueError(f"expert_action: expected no state, got {reprlib.repr(state)}")
        return self._plain.encode_parts([(self._chat.lead, True), *parts])

    def turn(self, max_action_tokens: int, max_state_tokens: int | None = None) -> TurnReader:
        """The reader of the policy's next turn."""
        return TurnReader(
            self.format,
            self.text,
            self.stop_ids,
            max_action_tokens=max_action_tokens,
            max_state_tokens=max_state_tokens,
        )

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; special ones have none."""
        return self.text.decode(tokens)
