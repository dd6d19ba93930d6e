"""Between text and tokens: what the loop reads from an environment and what it asks of it."""

from __future__ import annotations

import reprlib

from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError
from mem1.parsing.action import Action, ActionKind
from mem1.parsing.tags import TAGS

_CHARACTERS_PER_TOKEN = 16  # a first guess at what a limit of tokens is in characters


class Codec:
    """The tokenizer and the ids of the tags. Each tag must be one token; raises InputError naming one that is
    not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: dict[str, int] = {}
        for tag in TAGS:
            ids = tokenizer.encode(tag, add_special_tokens=False)
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise InputError(
                    f"tokenizer: expected one token for the tag {tag}, got ids {ids}; "
                    "add it to the vocabulary"
                )
            self.ids[tag] = ids[0]
        self.stops = {self.ids["</query>"], self.ids["</answer>"], tokenizer.eos_token_id}
        # What steers a model comes from the loop alone. The unknown token stands for a word, though.
        special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        self._dropped = special | set(self.ids.values())

    def prompt(self, text: str, limit: int) -> list[int]:
        """The tokens of a prompt, or its first ones where there are more than `limit`."""
        return self._encode(text, limit, dropped=set(), add_special_tokens=True)

    def info(self, text: str, limit: int) -> list[int]:
        """`<info> text </info>` with at most `limit` tokens of text. Tags and special tokens inside the text
        are left out of it.
        """
        body = self._encode(text, limit, dropped=self._dropped, add_special_tokens=False)
        return [self.ids["<info>"], *body[:limit], self.ids["</info>"]]

    def _encode(self, text: str, limit: int, *, dropped: set[int], add_special_tokens: bool) -> list[int]:
        """The tokens of `text`, or at least `limit + 1` of them: megabytes are not read to their end."""
        size = _CHARACTERS_PER_TOKEN * (limit + 1)
        while True:
            tokens = self.tokenizer.encode(text[:size], add_special_tokens=add_special_tokens)
            kept = [token for token in tokens if token not in dropped]
            # The cut may have split a word, but not one of the first `limit` tokens.
            if size >= len(text) or len(kept) > limit:
                return kept
            size *= 4

    def expert(self, state: str, action: Action) -> list[int]:
        """The tokens of an expert's action. Raises ValueError unless it is a query or an answer."""
        kind, text = action
        if kind not in ("query", "answer"):
            raise ValueError(f"expert_action: expected a query or an answer, got {reprlib.repr(kind)}")
        written = f"<IS> {state} </IS> <{kind}> {text} </{kind}>"
        return self.tokenizer.encode(written, add_special_tokens=False)

    def kind(self, tokens: list[int]) -> ActionKind:
        """What an action asks of the environment; `tokens` are the action's without its `state` segment."""
        kinds: tuple[ActionKind, ...] = ("query", "answer")
        for kind in kinds:
            if tokens and tokens[-1] == self.ids[f"</{kind}>"] and self.ids[f"<{kind}>"] in tokens:
                return kind
        return "malformed"

    def action(self, tokens: list[int]) -> Action:
        """The same with its text."""
        kind = self.kind(tokens)
        if kind == "malformed":
            return Action(kind, self._text(tokens))
        start = len(tokens) - tokens[::-1].index(self.ids[f"<{kind}>"])
        return Action(kind, self._text(tokens[start:-1]))

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens)).strip()
