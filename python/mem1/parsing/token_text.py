"""The bytes of each token: the only thing that tags are matched in.

Ids say nothing: one vocabulary has two for `>`, another none for `</`, and a tag may begin and end inside of
tokens that carry other text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError, require

_Piece = Callable[[str], bytes]


class TokenText:
    """The bytes of each id of a tokenizer, looked up when first asked.

    Raises InputError for a tokenizer that is not a fast one, or whose decoder is of none of these kinds:
    bytes (`ByteLevel`), SentencePiece's (`Metaspace`, `Replace`, `ByteFallback`), words (`WordPiece`, none).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = fast_backend(tokenizer)
        self._added = self._backend.get_added_tokens_decoder()
        self._unknown = unknown_id(tokenizer)
        self._piece = _reader(self._backend.decoder)
        self._known: dict[int, bytes | None] = {}

    def piece(self, token: int) -> bytes | None:
        """The bytes of a token, None of a special one and of an id without a token: models have more rows
        than tokenizers have ids.
        """
        try:
            return self._known[token]
        except KeyError:
            found = self._known[token] = self._look_up(token)
            return found

    def bytes(self, token: int) -> bytes:
        """The same with nothing for what has no text."""
        return self.piece(token) or b""

    def is_special(self, token: int) -> bool:
        """Whether it has no text. An unknown token that stands for words has."""
        return self.piece(token) is None

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of all, U+FFFD for what is not UTF-8."""
        return b"".join([self.piece(token) or b"" for token in tokens]).decode("utf-8", "replace")

    def _look_up(self, token: int) -> bytes | None:
        word = self._backend.id_to_token(token)
        added = self._added.get(token)
        if word is None or (added is not None and added.special and token != self._unknown):
            return None
        return word.encode() if added is not None and self._piece is _byte_level else self._piece(word)


def fast_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """What `tokenizers` has of it. Raises InputError for a tokenizer written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    require(
        isinstance(backend, Tokenizer), "tokenizer", "a fast one of transformers", type(tokenizer).__name__
    )
    return backend


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of every text that the vocabulary lacks; None where all text has tokens, whatever is called
    unknown there.
    """
    backend = fast_backend(tokenizer)
    if getattr(backend.model, "byte_fallback", False):
        return None
    if isinstance(backend.model, Unigram):  # does not tell
        return tokenizer.unk_token_id
    found = backend.token_to_id(backend.model.unk_token or "")
    return None if found == tokenizer.eos_token_id else found  # GPT-2 calls its end of text that


def _reader(decoder: Any) -> _Piece:
    """From a word of the vocabulary to its bytes."""
    steps = [] if decoder is None else _flat(json.loads(decoder.__getstate__()))
    kinds = {step["type"] for step in steps}
    if decoder is None:
        return lambda word: f" {word}".encode()
    if "ByteLevel" in kinds:
        return _byte_level
    if "WordPiece" in kinds:
        prefix = next(step["prefix"] for step in steps if step["type"] == "WordPiece")
        return lambda word: (word[len(prefix) :] if word.startswith(prefix) else f" {word}").encode()
    replaced = [_replacement(step) for step in steps if step["type"] in ("Replace", "Metaspace")]
    if not replaced or None in replaced:
        raise InputError(f"tokenizer: expected a decoder of bytes, blanks or words, got {decoder!r}")
    fallback = "ByteFallback" in kinds

    def sentence_piece(word: str) -> bytes:
        if fallback and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", word):
            return bytes([int(word[3:5], 16)])
        for old, new in replaced:
            word = word.replace(old, new)
        return word.encode()

    return sentence_piece


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    return (
        [inner for one in step["decoders"] for inner in _flat(one)] if step["type"] == "Sequence" else [step]
    )


def _replacement(step: dict[str, Any]) -> tuple[str, str] | None:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    old = step["pattern"].get("String")
    return None if old is None else (old, step["content"])


def _byte_characters() -> dict[str, int]:
    """GPT-2's names of the bytes: those that print are their own, the others follow from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    names = {chr(byte): byte for byte in own}
    others = [byte for byte in range(256) if byte not in own]
    return names | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()


def _byte_level(word: str) -> bytes:
    try:
        return bytes([_BYTES[character] for character in word])
    except KeyError:  # no byte-level word, as it stands
        return word.encode()
