"""The search engine: BM25 as Lucene has it, ties in order, hostile queries."""

from __future__ import annotations

import math
import random

import pytest

from mem1.envs.webshop.product_search import ProductSearch, terms


def test_terms() -> None:
    assert terms("The Running shoes, and a pair of them: 8 XL; relational") == [
        *("run", "shoe", "pair", "them", "xl", "relat")
    ]


def score(documents: list[list[str]], place: int, query: list[str]) -> float:
    """BM25, k1 0.9, b 0.4, with Lucene's idf; a word that is asked for twice counts twice."""
    average = sum(map(len, documents)) / len(documents)
    found = 0.0
    for word in query:
        having = sum(word in document for document in documents)
        times = documents[place].count(word)
        idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
        found += idf * times / (times + 0.9 * (1 - 0.4 + 0.4 * len(documents[place]) / average))
    return found


def test_the_order_is_that_of_bm25() -> None:
    draw = random.Random(0)
    words = [f"w{number}" for number in range(30)]
    texts = {str(place): " ".join(draw.choices(words, k=draw.randint(2, 40))) for place in range(40)}
    documents = [terms(text) for text in texts.values()]
    engine = ProductSearch(texts)
    for _ in range(20):
        query = draw.choices(words, k=4)
        found = engine.search(" ".join(query))
        scores = [score(documents, int(asin), terms(" ".join(query))) for asin in found]
        assert scores == pytest.approx(sorted(scores, reverse=True), rel=1e-6)
        assert len(found) == sum(bool({*query} & {*text.split()}) for text in texts.values())


def test_equal_ones_in_their_order_and_fifty_at_most() -> None:
    engine = ProductSearch({str(place): "plain mug" for place in range(60)} | {"x": "reading lamp"})
    assert engine.search("MUGS") == tuple(str(place) for place in range(50))
    assert engine.search("a lamp to read") == ("x",)


@pytest.mark.parametrize("query", ["", "the of", "a b c", "zebra", "!?", "\x00", "\ud800", "é–½"])
def test_nothing_is_found_for_words_that_no_product_has(query: str) -> None:
    assert ProductSearch({"x": "reading lamp"}).search(query) == ()


def test_hostile_queries() -> None:
    engine = ProductSearch({"x": "reading lamp"})
    assert engine.search("lamp \x00 \ud800 [((*+?" + "lamp " * 2_000_000) == ("x",)
    assert engine.search("l" * 10_000_000) == ()
