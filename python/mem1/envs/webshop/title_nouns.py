"""The nouns of a product's title: what kind of thing it is, as far as the reward can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mem1.extras import extra

_SPACY_MODEL = "en_core_web_sm"


class TitleTagger(NamedTuple):
    """name: of the tagger, for the record. nouns: from a title to its nouns and proper nouns, lower-cased, in
    order, repeated ones included.
    """

    name: str
    nouns: Callable[[str], tuple[str, ...]]


def find_tagger() -> TitleTagger:
    """spaCy's `en_core_web_sm`, which the original uses, where it is installed; else TextBlob's
    PatternTagger, whose lexicon comes with the package. They disagree on some titles, and so may rewards.
    Raises InputError without either.
    """
    return _spacy_tagger() or _textblob_tagger()


def _spacy_tagger() -> TitleTagger | None:
    try:
        import spacy
    except ImportError:
        return None
    if not spacy.util.is_package(_SPACY_MODEL):
        return None
    read = spacy.load(_SPACY_MODEL, disable=["parser", "ner", "lemmatizer"])

    def nouns(title: str) -> tuple[str, ...]:
        return tuple(word.text.lower() for word in read(title) if word.pos_ in ("NOUN", "PROPN"))

    return TitleTagger(f"spacy {_SPACY_MODEL}", nouns)


def _textblob_tagger() -> TitleTagger:
    with extra("webshop", "webshop"):
        from textblob.en.taggers import PatternTagger
    tag = PatternTagger().tag

    def nouns(title: str) -> tuple[str, ...]:
        return tuple(word.lower() for word, part in tag(title) if part.startswith("NN"))

    return TitleTagger("textblob PatternTagger", nouns)
