"""Text that the policy did not write, as tokens: what comes from outside is data, whatever it says."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Encoding, Tokenizer
from tokenizers.models import Model, Unigram, WordLevel
from transformers import PreTrainedTokenizerBase

from mem1.parsing.token_text import fast_backend, unknown_id

Part = tuple[str, bool]  # a text, and whether it is trusted
_CHARACTERS_PER_TOKEN = 16  # a first guess at what a limit of tokens is in characters


class PlainEncoder:
    """A copy of the tokenizer that knows no added tokens, so that no text gives the id of one. Those of white
    space alone stay: they are ordinary text. It writes the middle of a stream: no blank of its own in front.

    opening: ids that the tokenizer puts in front of a text. Every method raises ValueError for lone
    surrogates.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = fast_backend(tokenizer)
        added = backend.get_added_tokens_decoder()
        added = {token: word for token, word in added.items() if not _is_blank(word.content)}
        self._added = {word.content: token for token, word in added.items()}
        self._core = _core(tokenizer, frozenset({*added} - {unknown_id(tokenizer)}))
        # Finds the texts of added tokens as the tokenizer does, and nothing else.
        self._splitter = Tokenizer(WordLevel({"": 0}, unk_token=""))
        self._splitter.normalizer = backend.normalizer
        self._splitter.add_tokens([*added.values()])

        def own(text: str, special: bool = False) -> list[int]:
            return [*tokenizer.encode(text, add_special_tokens=special)]

        self._blank_first = own("a") != self.encode("a") and own("a") == self.encode(" a")
        self._blank_always = self._blank_first and own(" a") == self.encode("  a")
        whole, bare = own("a", special=True), own("a")
        starts = [place for place in range(len(whole)) if whole[place : place + len(bare)] == bare]
        self.opening = whole[: starts[0]] if starts else []

    def encode(self, text: str, *, first: bool = False) -> list[int]:
        """The ids of a text; `first` in its stream, it gets the blank that the tokenizer puts there."""
        if first and text and (self._blank_always or (self._blank_first and not text.startswith(" "))):
            text = " " + text
        return self._encoding(text).ids

    def starts(self, text: str) -> list[int]:
        """The character at which each token begins."""
        return [begin for begin, _ in self._encoding(text).offsets]

    def head(self, text: str, limit: int) -> str:
        """The longest head of a text that ends where one of its first `limit` tokens does."""
        tokens, head = head_of(text, limit, self.encode)
        return head if len(tokens) <= limit else head[: self.starts(head)[limit]]

    def encode_parts(self, parts: Sequence[Part], *, first: bool = False) -> list[int]:
        """The ids of texts that follow one another. In a trusted one, the texts of added tokens become their
        ids; all that stands between two of these is encoded as one text, but for a text that begins with a
        combining mark: normalized together, the end of a tag before it would become another character.
        """
        tokens: list[int] = []
        run = ""
        for text, trusted in parts:
            begin = 0
            if text and unicodedata.combining(text[0]):
                tokens, run = tokens + self.encode(run, first=first and not tokens), ""
            for token, start, end in self.added_tokens(text) if trusted else ():
                tokens += [*self.encode(run + text[begin:start], first=first and not tokens), token]
                run, begin = "", end
            run += text[begin:]
        return tokens + self.encode(run, first=first and not tokens)

    def added_tokens(self, text: str) -> Iterator[tuple[int, int, int]]:
        """The id of each added token in a text, and where it begins and ends."""
        found = self._splitter.encode(text, add_special_tokens=False)
        for word, (begin, end) in zip(found.tokens, found.offsets, strict=True):
            if word:
                yield self._added[word], begin, end

    def _encoding(self, text: str) -> Encoding:
        text.encode()  # a lone surrogate, which no tokenizer takes, raises here
        return self._core.encode(text, add_special_tokens=False)


# Of tokenizers in use: a copy of a large vocabulary takes seconds, and every rollout asks for one.
_COPIES: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[frozenset[int], Tokenizer]] = WeakKeyDictionary()


def _core(tokenizer: PreTrainedTokenizerBase, dropped: frozenset[int]) -> Tokenizer:
    """`_without`, made once."""
    known = _COPIES.get(tokenizer)
    if known is None or known[0] != dropped:
        known = _COPIES[tokenizer] = dropped, _without(dropped, fast_backend(tokenizer))
    return known[1]


def _without(dropped: frozenset[int], backend: Tokenizer) -> Tokenizer:
    """A copy in which no text has the ids in `dropped`."""
    blanks = [word for word in backend.get_added_tokens_decoder().values() if _is_blank(word.content)]
    if isinstance(backend.model, Unigram):  # its ids are places in a list: it has its own tokens for blanks
        blanks = []
    steps = Tokenizer(WordLevel({"": 0}, unk_token=""))
    steps.normalizer, steps.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    state = json.loads(steps.to_str())
    for step in ("normalizer", "pre_tokenizer"):
        state[step] = _without_prefix(state[step])
    core = Tokenizer.from_str(json.dumps(state))
    core.model = _model(
        backend, dropped, {word.content: backend.token_to_id(word.content) for word in blanks}
    )
    core.add_tokens(blanks)
    return core


def _without_prefix(step: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no blank in front of a text."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        name = next(name for name in ("normalizers", "pretokenizers") if name in step)
        return {**step, name: [inner for one in step[name] if (inner := _without_prefix(one))]}
    changes = {"prepend_scheme": "never", "add_prefix_space": False}
    return step | {name: value for name, value in changes.items() if name in step}


def _is_blank(word: str) -> bool:
    return not word.replace("▁", " ").strip()


def _model(backend: Tokenizer, dropped: frozenset[int], kept: dict[str, int]) -> Model:
    """The model with the words `dropped` taken out of its own vocabulary, and with the added tokens that are
    `kept` in it: outside of it they would be numbered anew.
    """
    model = backend.model
    if not kept and all(model.id_to_token(token) is None for token in dropped):
        return model
    state = json.loads(backend.to_str())
    state.update(added_tokens=[], post_processor=None)
    core = state["model"]
    vocabulary = core["vocab"]
    if isinstance(model, Unigram):  # a piece with a blank is never met: blanks are another character there
        for token in dropped & {*range(len(vocabulary))}:
            vocabulary[token][0] = f" {token}"
    else:
        gone = {word for word, token in vocabulary.items() if token in dropped}
        core["vocab"] = {word: token for word, token in vocabulary.items() if word not in gone} | kept
        if "merges" in core:
            core["merges"] = [pair for pair in core["merges"] if not gone & {*pair, "".join(pair)}]
    return Tokenizer.from_str(json.dumps(state)).model


def head_of(text: str, limit: int, encode: Callable[[str], list[int]]) -> tuple[list[int], str]:
    """The tokens of `text`, or of a head of it that has more than `limit`, and that head: megabytes are not
    read to their end.
    """
    size = _CHARACTERS_PER_TOKEN * (limit + 1)
    while True:
        head = text[:size]
        tokens = encode(head)
        if size >= len(text) or len(tokens) > limit:
            return tokens, head
        size *= 4
