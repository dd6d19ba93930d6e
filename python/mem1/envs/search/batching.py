"""Searches of concurrent requests, several at a time."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from mem1.envs.search.retriever import Passage, Retriever, check_results

Results = list[list[Passage]]


class OverloadedError(RuntimeError):
    """There are too many searches already; later there may be fewer."""


class SearchError(RuntimeError):
    """The retriever has failed; its exception is the cause."""


class _Request(NamedTuple):
    queries: Sequence[str]
    top_k: int
    answer: asyncio.Future[Results]


class Batcher:
    """Requests that come while a search is running, and for `max_wait` seconds after the first of them, are
    searched together, up to `max_batch_size` queries at a time (a request with more is searched alone). The
    retriever works on another thread, on one batch at a time.

    Belongs to the event loop on which it is used; works while `run` does.
    """

    def __init__(self, retriever: Retriever, max_batch_size: int, max_wait: float, max_pending: int) -> None:
        self._retriever = retriever
        self._max_batch_size, self._max_wait, self._max_pending = max_batch_size, max_wait, max_pending
        self._waiting: deque[_Request] = deque()
        self._arrived = asyncio.Event()
        self._pending = 0

    @property
    def pending(self) -> int:
        """Queries that wait or are being searched."""
        return self._pending

    async def search(self, queries: Sequence[str], top_k: int) -> Results:
        """What the retriever finds. Raises OverloadedError, at once, if more than `max_pending` queries would
        be pending, and SearchError if the retriever fails.
        """
        if self._pending + len(queries) > self._max_pending:
            raise OverloadedError(f"expected at most {self._max_pending} queries at a time, got more")
        request = _Request(queries, top_k, asyncio.get_running_loop().create_future())
        self._pending += len(queries)
        self._waiting.append(request)
        self._arrived.set()
        try:
            return await request.answer
        finally:
            self._pending -= len(queries)

    async def run(self) -> None:
        """Search, until it is cancelled."""
        while True:
            await self._arrived.wait()
            if sum(len(request.queries) for request in self._waiting) < self._max_batch_size:
                await asyncio.sleep(self._max_wait)
            await self._answer(self._next_batch())

    def _next_batch(self) -> list[_Request]:
        batch = [self._waiting.popleft()]
        size = len(batch[0].queries)
        while self._waiting and size + len(self._waiting[0].queries) <= self._max_batch_size:
            batch.append(self._waiting.popleft())
            size += len(batch[-1].queries)
        if not self._waiting:
            self._arrived.clear()
        return batch

    async def _answer(self, batch: list[_Request]) -> None:
        queries = [query for request in batch for query in request.queries]
        # The best few are the first of the best many, so that one search serves all.
        search = asyncio.ensure_future(self._search(queries, max(request.top_k for request in batch)))
        await asyncio.wait({search})
        if error := _error(search):
            if len(batch) > 1:  # whose fault it is shows when each is searched alone
                for request in batch:
                    await self._answer([request])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(_failed(error))
            return
        results = iter(search.result())
        for request in batch:
            mine = [next(results)[: request.top_k] for _ in request.queries]
            if not request.answer.done():  # its client may be gone
                request.answer.set_result(mine)

    async def _search(self, queries: list[str], top_k: int) -> Results:
        found = await asyncio.to_thread(self._retriever.search, queries, top_k)
        results = await found if inspect.isawaitable(found) else found
        check_results(results, len(queries))
        return results


def _error(search: asyncio.Future[Results]) -> BaseException | None:
    return asyncio.CancelledError("cancelled") if search.cancelled() else search.exception()


def _failed(error: BaseException) -> SearchError:
    failure = SearchError(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
