"""Searches of concurrent requests: which are made together, what becomes of errors, how many may wait."""

from __future__ import annotations

import asyncio
import threading

import pytest
from small_corpus import Recorded

from mem1.envs.search.batching import Batcher, OverloadedError, SearchError
from mem1.envs.search.retriever import Passage


def texts(found):
    return [[passage.contents for passage in passages] for passages in found]


def run(work, retriever, max_batch_size=8, max_wait=0.001, max_pending=100):
    """What `work(batcher)` gives while the batcher runs."""

    async def main():
        batcher = Batcher(retriever, max_batch_size, max_wait, max_pending)
        running = asyncio.create_task(batcher.run())
        try:
            return await asyncio.wait_for(work(batcher), 20)
        finally:
            running.cancel()

    return asyncio.run(main())


def test_requests_at_the_same_time_are_searched_together_and_each_gets_its_own():
    async def work(batcher):
        asked = (["a"], 2), (["b", "c"], 1), (["d"], 3)
        return await asyncio.gather(*(batcher.search(*request) for request in asked))

    retriever = Recorded()
    first, second, third = run(work, retriever)
    assert retriever.calls == [(["a", "b", "c", "d"], 3)]
    assert texts(first) == [["a 0", "a 1"]]
    assert texts(second) == [["b 0"], ["c 0"]]
    assert texts(third) == [["d 0", "d 1", "d 2"]]


def test_a_batch_has_no_more_queries_than_allowed_and_a_large_request_is_one():
    async def work(batcher):
        asked = [[f"{n}a", f"{n}b", f"{n}c"] for n in range(3)] + [[f"{n}" for n in range(9)], ["last"]]
        return await asyncio.gather(*(batcher.search(queries, 1) for queries in asked))

    retriever = Recorded()
    found = run(work, retriever)
    assert [len(queries) for queries, _ in retriever.calls] == [6, 3, 9, 1]
    assert [len(results) for results in found] == [3, 3, 3, 9, 1]


def test_what_comes_during_a_search_is_searched_after_it():
    class Slow(Recorded):
        def __init__(self):
            super().__init__()
            self.go = threading.Event()

        def search(self, queries, top_k):
            assert self.go.wait(10)
            return super().search(queries, top_k)

    async def work(batcher):
        searches = [asyncio.create_task(batcher.search(["first"], 1))]
        await asyncio.sleep(0.05)  # the search is on its thread
        searches += [asyncio.create_task(batcher.search([f"{n}"], 1)) for n in range(4)]
        await asyncio.sleep(0)
        assert batcher.pending == 5
        retriever.go.set()
        await asyncio.gather(*searches)
        assert batcher.pending == 0

    retriever = Slow()
    run(work, retriever)
    assert [queries for queries, _ in retriever.calls] == [["first"], ["0", "1", "2", "3"]]


def test_more_than_may_wait_are_refused_at_once_and_the_others_served():
    async def work(batcher):
        searches = [asyncio.create_task(batcher.search(["x", "y"], 1)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="expected at most 5 queries at a time"):
            await batcher.search(["a", "b"], 1)
        searches.append(asyncio.create_task(batcher.search(["z"], 1)))
        found = await asyncio.gather(*searches)
        return found, await batcher.search(["a", "b"], 1)

    found, later = run(work, Recorded(), max_pending=5)
    assert [texts(results) for results in found] == [[["x 0"], ["y 0"]], [["x 0"], ["y 0"]], [["z 0"]]]
    assert texts(later) == [["a 0"], ["b 0"]]


def test_a_query_that_fails_fails_alone_and_the_next_are_served():
    async def work(batcher):
        asked = [["fine"], ["bad"], ["fine too"]]
        found = await asyncio.gather(
            *(batcher.search(queries, 1) for queries in asked), return_exceptions=True
        )
        return found, await batcher.search(["later"], 1)

    (first, error, third), later = run(work, Recorded(fail="bad"))
    assert [texts(found) for found in (first, third, later)] == [
        [["fine 0"]],
        [["fine too 0"]],
        [["later 0"]],
    ]
    assert isinstance(error, SearchError) and str(error) == "ZeroDivisionError: no such luck"
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_a_request_whose_client_has_gone_disturbs_nobody():
    async def work(batcher):
        gone = asyncio.create_task(batcher.search(["gone"], 1))
        stays = asyncio.create_task(batcher.search(["stays"], 1))
        await asyncio.sleep(0)
        gone.cancel()
        found = await stays
        assert gone.cancelled() and batcher.pending == 0
        return found

    assert texts(run(work, Recorded())) == [["stays 0"]]


NONSENSE = {
    "no list": None,
    "no lists": [None],
    "no passages": [[None]],
    "tuples": [[("a", "b", 1.0)]],
    "a number for a text": [[Passage("a", 1, 1.0)]],
    "a score that is none": [[Passage("a", "b", float("nan"))]],
}


@pytest.mark.parametrize("case", NONSENSE)
def test_a_retriever_that_gives_nonsense_fails_its_search_alone(case):
    class Nonsense(Recorded):
        def search(self, queries, top_k):
            return NONSENSE[case] if queries == ["bad"] else super().search(queries, top_k)

    async def work(batcher):
        with pytest.raises(SearchError, match="RuntimeError: expected a list of "):
            await batcher.search(["bad"], 1)
        return await batcher.search(["later"], 1)

    assert texts(run(work, Nonsense())) == [["later 0"]]


def test_a_search_that_is_cancelled_fails_alone():
    class Cancelled(Recorded):
        async def search(self, queries, top_k):
            if queries == ["bad"]:
                raise asyncio.CancelledError
            return super().search(queries, top_k)

    async def work(batcher):
        with pytest.raises(SearchError, match="CancelledError"):
            await batcher.search(["bad"], 1)
        return await batcher.search(["later"], 1)

    assert texts(run(work, Cancelled())) == [["later 0"]]


def test_a_retriever_may_be_a_coroutine_and_must_answer_every_query():
    class Awaited(Recorded):
        async def search(self, queries, top_k):
            await asyncio.sleep(0)
            return super().search(queries, top_k)[: len(queries) - ("short" in queries)]

    async def work(batcher):
        found = await batcher.search(["a", "b"], 1)
        with pytest.raises(SearchError, match="RuntimeError: expected a list of results of 2 queries, got"):
            await batcher.search(["a", "short"], 1)
        return found

    assert texts(run(work, Awaited())) == [["a 0"], ["b 0"]]
