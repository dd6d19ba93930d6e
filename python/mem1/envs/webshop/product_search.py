"""The shop's search engine: BM25 over the products, with the settings that the original's Lucene has."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from mem1.extras import extra

MOST_RESULTS = 50
_LONGEST_QUERY = 4096  # characters; the longest of all 6,910 instructions has 275
_K1, _B = 0.9, 0.4
_WORD = re.compile(r"\b\w\w+\b")
_STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these "
    "they this to was will with".split()
)


class ProductSearch:
    """An index over `documents`, texts by product ids. It may be used by many threads at once.

    Raises InputError without bm25s and PyStemmer.
    """

    def __init__(self, documents: Mapping[str, str]) -> None:
        with extra("webshop", "webshop"):
            import bm25s
        self._asins = tuple(documents)
        self._index = bm25s.BM25(method="lucene", k1=_K1, b=_B)
        self._index.index([terms(text) for text in documents.values()], show_progress=False)

    def search(self, words: str) -> tuple[str, ...]:
        """At most 50 ids, best first: only of products with one of the words; of equal ones in the order in
        which they were given. What a query has behind 4,096 characters is not read.
        """
        asked = terms(words[:_LONGEST_QUERY])
        if not asked:
            return ()
        scores = self._index.get_scores(asked)
        best = np.argsort(-scores, kind="stable")[:MOST_RESULTS]
        return tuple(self._asins[place] for place in best if scores[place] > 0)


def terms(text: str) -> list[str]:
    """The stems (Porter's) of the words of two characters or more that are no stop words."""
    with extra("webshop", "webshop"):
        import Stemmer
    readable = text.lower().encode(errors="replace").decode()  # the stemmer takes no lone surrogates
    words = [word for word in _WORD.findall(readable) if word not in _STOP_WORDS]
    return Stemmer.Stemmer("porter").stemWords(words)  # one each: a stemmer belongs to one thread
