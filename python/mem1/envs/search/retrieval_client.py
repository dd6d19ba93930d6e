"""A retriever that asks a server of the Search-R1/MEM1 retrieval protocol (`retrieval_server`)."""

from __future__ import annotations

import asyncio
import json
import random
import reprlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from mem1.checks import require
from mem1.envs.search.retriever import MAX_QUERY_CHARS, Passage
from mem1.extras import extra

with extra("retrieval", "retrieval client"):
    import aiohttp
    import yarl

# A proxy in front of a server that is down, or a server with too much to do.
_UNAVAILABLE = (429, 502, 503, 504)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds


class RetrievalError(RuntimeError):
    """The server's answer cannot be used: "retrieval: expected ..., got ..."."""


class _Unavailable(Exception):
    """There was no answer; perhaps there is one later. pause: the seconds that the server asks for."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class RetrievalClient:
    """A `Retriever` whose `search` is a coroutine function. May be used on several event loops, and by any
    number of tasks at once.

    url: of the server, with its path, which is /retrieve as a rule. timeout: seconds for a search; as long as
    they last, it is tried again after errors of the connection and while the server is not available (429,
    502, 503, 504; it waits for as long as a Retry-After says): a search changes nothing. attempt_timeout:
    seconds for one try. max_response_bytes: of an answer.
    """

    retryable: tuple[type[Exception], ...] = ()  # for who asks: it has been tried again already

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        attempt_timeout: float = 10.0,
        max_response_bytes: int = 16 << 20,
    ) -> None:
        require(_is_url(url), "url", "http://... or https://...", url)
        require(timeout > 0, "timeout", "seconds > 0", timeout)
        require(attempt_timeout > 0, "attempt_timeout", "seconds > 0", attempt_timeout)
        require(max_response_bytes > 0, "max_response_bytes", "a number > 0", max_response_bytes)
        self.url, self._timeout, self._attempt_timeout = url, timeout, attempt_timeout
        self._max_response_bytes = max_response_bytes
        self._sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, aiohttp.ClientSession] = (
            WeakKeyDictionary()
        )

    async def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """See `Retriever`. Raises RetrievalError for an answer that is wrong or refuses the search, and
        ConnectionError if there is none in time.
        """
        require(top_k >= 1, "top_k", "a number >= 1", top_k)
        if not queries:
            return []
        texts = [query[:MAX_QUERY_CHARS] for query in queries]
        request = json.dumps({"queries": texts, "topk": top_k, "return_scores": True}).encode()
        deadline, pause = time.monotonic() + self._timeout, _FIRST_PAUSE
        while True:
            try:
                answer = await self._attempt(request, deadline - time.monotonic())
                return parse_results(answer, len(texts), top_k)
            except RetrievalError as error:
                raise RetrievalError(f"{error} (of {_without_secrets(self.url)})") from error.__cause__
            except _Unavailable as failure:
                # Of many clients each comes back at a moment of its own.
                wait = max(failure.pause, pause * random.uniform(0.5, 1.0))
                if time.monotonic() + wait >= deadline:
                    raise ConnectionError(
                        f"retrieval: expected an answer from {_without_secrets(self.url)} "
                        f"within {self._timeout:g} s, got none: {failure}"
                    ) from failure.__cause__
            await asyncio.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def close(self) -> None:
        """Close the connections that were opened on the running event loop. To be called on each loop on
        which there was a search; a search after it opens others.
        """
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.close()

    def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            # Whoever limits how many searches there are at a time, it is not this. What is compressed could
            # be small here and large in memory.
            self._sessions[loop] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
                auto_decompress=False,
            )
        return self._sessions[loop]

    async def _attempt(self, request: bytes, seconds: float) -> bytes:
        """The body of an answer with status 200."""
        timeout = aiohttp.ClientTimeout(total=min(seconds, self._attempt_timeout))
        try:
            async with self._session().post(
                self.url, data=request, timeout=timeout, allow_redirects=False
            ) as response:
                body = await self._read(response)
        except asyncio.TimeoutError as error:
            raise _Unavailable(f"nothing for {timeout.total:.3g} s") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise _Unavailable(f"{type(error).__name__}: {error}") from error
        except aiohttp.ClientError as error:
            raise RetrievalError(f"retrieval: expected an answer in HTTP, got {error}") from error
        if response.status in _UNAVAILABLE:
            pause = _seconds(response.headers.get("Retry-After", ""))
            raise _Unavailable(f"status {response.status}, {_shown(body)}", pause)
        if response.status != 200:
            raise RetrievalError(f"retrieval: expected status 200, got {response.status}, {_shown(body)}")
        return body

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > self._max_response_bytes:
                raise RetrievalError(
                    f"retrieval: expected at most {self._max_response_bytes} bytes, got more"
                )
        return bytes(body)


def parse_results(body: bytes, count: int, top_k: int) -> list[list[Passage]]:
    """The passages of `count` queries, at most `top_k` each, with scores or bare. RetrievalError for anything
    else.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise RetrievalError(f"retrieval: expected JSON, got {_shown(body)}") from None
    results: Any = answer.get("result") if isinstance(answer, dict) else None
    _expect(isinstance(results, list), 'an object with a list "result"', answer)
    _expect(len(results) == count, f"results of {count} queries", len(results))
    for found in results:
        _expect(isinstance(found, list), "a list of passages", found)
        _expect(len(found) <= top_k, f"at most {top_k} passages of a query", len(found))
    return [[_passage(entry) for entry in found] for found in results]


def _passage(entry: Any) -> Passage:
    _expect(isinstance(entry, Mapping), "a passage", entry)
    document = entry.get("document", entry)
    _expect(isinstance(document, Mapping), "a document", document)
    name, contents, score = document.get("id", ""), document.get("contents"), entry.get("score", 0.0)
    _expect(isinstance(name, (str, int)) and not isinstance(name, bool), "an id", name)
    _expect(isinstance(contents, str), "contents that are a text", contents)
    number = isinstance(score, (int, float)) and not isinstance(score, bool)
    # Compared: an integer beyond float64 cannot be converted.
    _expect(number and abs(score) <= sys.float_info.max, "a finite score", score)
    return Passage(str(name), contents, float(score))


def _expect(condition: bool, expected: str, value: Any) -> None:
    if not condition:
        raise RetrievalError(f"retrieval: expected {expected}, got {reprlib.repr(value)}")


def _is_url(text: object) -> bool:
    try:
        parsed = yarl.URL(text if isinstance(text, str) else "")
    except ValueError:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


def _without_secrets(url: str) -> str:
    """Without user, password and query."""
    return str(yarl.URL(url).with_user(None).with_query(None))


def _seconds(retry_after: str) -> float:
    """Of a Retry-After header in seconds; 0 for anything else."""
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0


def _shown(body: bytes) -> str:
    """The begin of a body for a message."""
    return repr(body[:200].decode(errors="replace"))
