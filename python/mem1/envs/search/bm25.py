"""BM25 in this process: Lucene's formula over an index that lies on disk.

Words are runs of letters and digits, without case, accents and (by Porter's stemmer) endings. Lucene's 33
English stop words do not count; nor, in a query with other words, does what questions are made of. Short
passages and short queries want a small k1 and b: Anserini's 0.9 and 0.4.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mem1.checks import require
from mem1.envs.search.corpus import Corpus
from mem1.envs.search.index_folder import damaged, open_index
from mem1.envs.search.retriever import MAX_QUERY_CHARS, Passage
from mem1.extras import extra

with extra("retrieval", "BM25Retriever"):
    import bm25s
    import Stemmer

STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these "
    "they this to was will with".split()
)
QUESTION_WORDS = frozenset("did do does how what when where which who whom whose".split())
_STEMMER = "porter"
_WORD = re.compile(r"\w+")


def split_words(text: str) -> list[str]:
    """The words of a text that are no stop words, lower-case and without accents, in their order."""
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text.encode(errors="replace").decode())  # no lone surrogates
    text = text.lower()
    if not text.isascii():
        text = "".join(character for character in text if not unicodedata.combining(character))
    return [word for word in _WORD.findall(text) if word not in STOP_WORDS]


class BM25Retriever:
    """The passages of a corpus that share the rarest words with a query. Made by `open`.

    A passage that shares no word is no result, so there may be fewer than were asked for, or none. Of equal
    scores the passage that comes first in the corpus is the better one. May be used by several threads.
    """

    def __init__(self, corpus: Corpus, model: Any) -> None:
        self._corpus, self._model = corpus, model

    @classmethod
    def open(
        cls,
        corpus_path: str | os.PathLike[str],
        index_folder: str | os.PathLike[str] | None = None,
        *,
        k1: float = 0.9,
        b: float = 0.4,
    ) -> BM25Retriever:
        """Search a JSONL file (`mem1.envs.search.corpus`). Its index is made once, in `index_folder`, by
        default `corpus_path` with ".index" at its end; index and texts stay on disk, the words of all
        passages are in memory. While it is made, each word of each passage takes some 70 bytes of memory.

        Raises InputError for a corpus with faults (by file and line), one without words, and an
        `index_folder` that cannot be written.
        """
        require(0 <= k1 < math.inf, "k1", "a number >= 0", k1)
        require(0 <= b <= 1, "b", "a number from 0 to 1", b)
        settings = {
            "method": "bm25 1",  # to be counted up when `split_words` changes
            "k1": float(k1),
            "b": float(b),
            "bm25s": bm25s.__version__,
            "stemmer": [_STEMMER, Stemmer.version()],
            "stop_words": sorted(STOP_WORDS),
        }

        def build(folder: Path, contents: Iterator[str]) -> None:
            model = bm25s.BM25(method="lucene", k1=k1, b=b)
            model.index(_tokenized(contents), create_empty_token=False, show_progress=False)
            model.save(folder, show_progress=False)

        corpus, index = open_index(corpus_path, index_folder, settings, build)
        return cls(corpus, _load(index))

    def __len__(self) -> int:
        """How many passages the corpus has."""
        return len(self._corpus)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """See `Retriever`."""
        require(top_k >= 1, "top_k", "a number >= 1", top_k)
        stemmer = Stemmer.Stemmer(_STEMMER)  # one is not for several threads
        return [self._best(_query_words(query, stemmer), top_k) for query in queries]

    def _best(self, words: list[str], top_k: int) -> list[Passage]:
        scores = self._model.get_scores_from_ids(self._model.get_tokens_ids(words))
        places = np.flatnonzero(scores > 0.0)
        found = scores[places]
        if len(found) > top_k:  # sorting all of them would take most of the time
            best = found >= np.partition(found, -top_k)[-top_k]
            places, found = places[best], found[best]
        order = np.argsort(-found, kind="stable")[:top_k]
        return [Passage(*self._corpus[int(places[n])], float(found[n])) for n in order]


def _query_words(query: str, stemmer: Any) -> list[str]:
    words = split_words(query[:MAX_QUERY_CHARS])
    telling = [word for word in words if word not in QUESTION_WORDS]
    return list(stemmer.stemWords(telling or words))


def _tokenized(contents: Iterator[str]) -> Any:
    """All passages as ids of words, 4 bytes each."""
    stemmer = Stemmer.Stemmer(_STEMMER)
    ids: list[array[int]] = []
    vocabulary: dict[str, int] = {}
    for text in contents:
        words = stemmer.stemWords(split_words(text))
        ids.append(array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in words]))
    require(len(vocabulary) > 0, "corpus_path", "passages with words that are no stop words", "none")
    return bm25s.tokenization.Tokenized(ids=ids, vocab=vocabulary)


def _load(index: Path) -> Any:
    try:
        model = bm25s.BM25.load(index, mmap=True)
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise damaged(index, error) from None
    if len(model.vocab_dict) != len(model.scores["indptr"]) - 1:
        raise damaged(index, ValueError(f"{len(model.vocab_dict)} words"))
    for name in ("data", "indices", "indptr"):
        # Plain views: slices of numpy's own class for arrays on disk take several times as long.
        model.scores[name] = np.asarray(model.scores[name])
    return model
