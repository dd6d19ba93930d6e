"""One turn of the policy, token by token: where its parts end, decided on the bytes that it wrote."""

from __future__ import annotations

import re
from typing import Literal

from mem1.parsing.action import Action
from mem1.parsing.tags import TagFormat
from mem1.parsing.token_text import TokenText


class TurnReader:
    """Reads the tokens of one turn as they are sampled.

    A part ends with the token that holds the last byte of its end tag, whatever else that token carries: the
    state with its first end tag, the turn with the first end tag of an action, wherever that stands, with a
    token of `stop_ids`, or where a limit is reached. Special tokens have no text, and break a tag.

    num_tokens, state_tokens: of the turn so far, and of its state, 0 where none has ended. kind: of the
    segment behind the state. Once it has `ended` ("stop": by an action's end tag, "eos", "limit"): the
    `action`; its `tag` and that tag's `reply`, None where it is malformed; `tail`: the text behind the end
    tag inside the last token.
    """

    def __init__(
        self,
        format: TagFormat,
        text: TokenText,
        stop_ids: frozenset[int],
        *,
        max_action_tokens: int,
        max_state_tokens: int | None = None,
    ) -> None:
        self.num_tokens = self.state_tokens = 0
        self.ended: Literal["stop", "eos", "limit"] | None = None
        self.kind = format.rest_kind
        self.action = Action("malformed", "")
        self.tag: str | None = None
        self.reply: str | None = None
        self.tail = ""
        self._format, self._piece, self._stop_ids = format, text.piece, stop_ids
        self._max_action_tokens = max_action_tokens
        self._max_state_tokens = None if format.state is None else max_state_tokens
        # Text between special tokens: no tag reaches from one run into another.
        self._runs = [bytearray()]
        names = format.tags[:-1]
        self._end_tag = re.compile(b"</(" + b"|".join(re.escape(name.encode()) for name in names) + b")>")
        self._overlap = max(len(name.encode()) for name in names) + len("</>") - 1

    def read(self, token: int) -> Literal["state", "end"] | None:
        """Takes the next token. "state": it ends the state; "end": it ends the turn, and perhaps the state
        with it (then `state_tokens` is `num_tokens`). Nothing may be read after that.
        """
        self.num_tokens += 1
        stops = token in self._stop_ids
        piece = None if stops else self._piece(token)
        state_ends = False
        if piece is None:
            self._runs.append(bytearray())
        elif b">" in piece:
            state_ends = self._find_tags(piece)
        else:
            self._runs[-1] += piece
        if self.ended is None:
            if stops:
                self._end_without_action("eos")
            elif self.num_tokens == self._max_action_tokens:
                self._end_without_action("limit")
            elif self.num_tokens == self._max_state_tokens and not self.state_tokens:
                self._end_without_action("limit")
        return "end" if self.ended else "state" if state_ends else None

    def _find_tags(self, piece: bytes) -> bool:
        """Appends `piece`, and tells whether the state ends in it."""
        run = self._runs[-1]
        begin = max(0, len(run) - self._overlap)
        run += piece
        window = bytes(run[begin:])
        state_ends = False
        for found in self._end_tag.finditer(window):
            name = found[1].decode()
            if name != self._format.state:
                self.tail = window[found.end() :].decode("utf-8", "replace")
                self._end_with_action(name, begin + found.start())
                break
            if not self.state_tokens:  # the window may hold an end that was seen before
                self.state_tokens, state_ends = self.num_tokens, True
        return state_ends

    def _end_with_action(self, name: str, end: int) -> None:
        """end: where the action's text ends in the last run."""
        open_tag = f"<{name}>".encode()
        runs = [*self._runs[:-1], self._runs[-1][:end]]
        opened = next((place for place in reversed(range(len(runs))) if open_tag in runs[place]), None)
        if opened is None:
            return self._end_without_action("stop")
        text = bytearray().join([runs[opened].rpartition(open_tag)[2], *runs[opened + 1 :]])
        self.ended = "stop"
        action = next(action for action in self._format.actions if action.tag == name)
        self.kind, self.tag, self.reply = action.kind, action.tag, action.reply
        self.action = Action(action.kind, _text(text))

    def _end_without_action(self, how: Literal["stop", "eos", "limit"]) -> None:
        self.ended = how
        self.action = Action("malformed", _text(bytearray().join(self._runs)))


def _text(written: bytearray) -> str:
    return written.decode("utf-8", "replace").strip()
