"""A client of search APIs that speak as Serper does."""

from __future__ import annotations

import asyncio
import random
from types import TracebackType
from typing import NamedTuple

from mem1.checks import InputError, require
from mem1.envs.web.bounded_body import ACCEPT_ENCODING, BodyError, read_body
from mem1.envs.web.page_text import one_line
from mem1.envs.web.search_reply import SearchError, SearchReply, UnreadableReply, read_reply
from mem1.envs.web.web_packages import aiohttp, yarl

_MAX_QUERY_CHARS = 2048
_MAX_REPLY_BYTES = 2_000_000
_MAX_PAUSE_S = 30.0
_QUERY_STATUSES = (400, 413, 414, 422)


class KeyRefused(SearchError):
    """The API does not take the key, or wants more to be paid."""


class QueryRefused(SearchError):
    """The API does not take these words."""


class SearchOutage(SearchError, OSError):
    """The API did not answer, or said that it cannot, each time it was asked."""


class _Attempt(NamedTuple):
    """What came of asking once. failure: why there is no body; status: 0 where nothing came at all."""

    status: int
    body: bytes = b""
    retry_after: str = ""
    failure: str = ""

    @property
    def is_outage(self) -> bool:
        return self.status in (0, 429) or self.status >= 500


class SerperClient:
    """Searches the web by `POST url {"q", "num"}` with a header X-API-KEY.

    The key is in no text that this class makes: neither in its repr nor in errors. timeout: seconds for each
    time that the API is asked. retries: how often it is asked again, after no answer, status 429 or 5xx.
    backoff: seconds before the first of these, twice as many before each further one, or as many as
    `Retry-After` says; 30 at most.

    Connections stay open and belong to the event loop of the first search, until `close`; a client that was
    closed opens new ones. Raises InputError for a key or URL that is none.
    """

    def __init__(
        self,
        api_key: str,
        url: str = "https://google.serper.dev/search",
        *,
        timeout: float = 15.0,
        retries: int = 3,
        backoff: float = 0.5,
    ) -> None:
        if not (isinstance(api_key, str) and api_key and all("!" <= letter <= "~" for letter in api_key)):
            raise InputError(
                "api_key: expected printable ASCII characters without blanks, got others or none"
            )
        require(timeout > 0, "timeout", "seconds > 0", timeout)
        require(retries >= 0, "retries", "a number >= 0", retries)
        require(backoff >= 0, "backoff", "seconds >= 0", backoff)
        self._api_key, self._url = api_key, _api_url(url)
        self._timeout, self._retries, self._backoff = timeout, retries, backoff
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"SerperClient({str(self._url)!r})"

    async def search(self, query: str, num: int = 10) -> SearchReply:
        """What the API finds for `query`, at most `num` results.

        Raises a SearchError: KeyRefused, QueryRefused, SearchOutage (an OSError too), or UnreadableReply.
        """
        attempt = await self._ask(query, num)
        for failures in range(self._retries):
            if not attempt.is_outage:
                break
            await asyncio.sleep(self._pause(attempt.retry_after, failures))
            attempt = await self._ask(query, num)
        return _reply(attempt, num)

    async def close(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def __aenter__(self) -> SerperClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, query: str, num: int) -> _Attempt:
        """Ask once. What aiohttp raises holds the request, and with it the key: it ends here."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept-Encoding": ACCEPT_ENCODING},
                timeout=aiohttp.ClientTimeout(total=self._timeout),
                auto_decompress=False,
            )
        request = self._session.post(
            self._url,
            json={"q": one_line(query, _MAX_QUERY_CHARS), "num": num},
            headers={"X-API-KEY": self._api_key},
            allow_redirects=False,
        )
        try:
            async with request as response:
                readable = response.status in (200, *_QUERY_STATUSES)
                body = await read_body(response, _MAX_REPLY_BYTES) if readable else b""
                return _Attempt(response.status, body, response.headers.get("Retry-After", ""))
        except BodyError as error:
            return _Attempt(response.status, failure=str(error))
        except asyncio.TimeoutError:
            return _Attempt(0, failure=f"no answer within {self._timeout:g} s")
        except aiohttp.ClientError as error:
            return _Attempt(0, failure=f"no answer, {type(error).__name__}")

    def _pause(self, retry_after: str, failures: int) -> float:
        """Seconds to wait after `failures` + 1 failures."""
        wished = retry_after.strip()
        if wished.isascii() and wished.isdecimal() and len(wished) < 9:
            return min(float(wished), _MAX_PAUSE_S)
        # Drawn, so that clients which failed together do not come back together.
        return min(self._backoff * 2.0 ** min(failures, 30) * random.uniform(0.5, 1.0), _MAX_PAUSE_S)


def _api_url(text: str) -> yarl.URL:
    expected = "an http or https URL without credentials"
    try:
        url = yarl.URL(text)
    except ValueError:
        url = yarl.URL()
    if url.raw_user is not None or url.raw_password is not None:
        raise InputError(f"url: expected {expected}, got one with credentials")
    require(url.scheme in ("http", "https") and bool(url.raw_host), "url", expected, text)
    return url


def _reply(attempt: _Attempt, num: int) -> SearchReply:
    status = f"search API: {attempt.failure or f'status {attempt.status}'}"
    if attempt.is_outage:
        raise SearchOutage(status)
    if attempt.status in (401, 402, 403):
        raise KeyRefused(f"{status}, the key was refused")
    if attempt.status == 400 and b"not enough credits" in attempt.body.lower():
        raise KeyRefused(f"{status}, no credits left")
    if attempt.status in _QUERY_STATUSES:
        raise QueryRefused(f"{status}, the query was refused")
    if attempt.status != 200 or attempt.failure:
        raise UnreadableReply(status)
    return read_reply(attempt.body, num)
