"""Fetching a page of the open web as text, with limits on everything, and from public addresses only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mem1.checks import require
from mem1.envs.web.bounded_body import ACCEPT_ENCODING, BodyError, read_body
from mem1.envs.web.html_text import HtmlConverter
from mem1.envs.web.page_text import clean, decode, one_line
from mem1.envs.web.url_rules import CheckedResolver, FetchError, UrlRules
from mem1.envs.web.web_packages import aiohttp, yarl

_HTML = ("text/html", "application/xhtml+xml")
_PLAIN = ("text/plain", "application/json")
_REDIRECTS = (301, 302, 303, 307, 308)
_UNKNOWN = "application/octet-stream"
_MAX_KIND_CHARS = 80
_CONVERSION_SECONDS = 10.0  # for a page: a large one takes one or two, and others wait


class Page(NamedTuple):
    """A page: where it was found, after redirects, and its text."""

    url: str
    text: str


class _Document(NamedTuple):
    """A page as it came."""

    url: str
    content_type: str
    charset: str | None
    body: bytes


class PageFetcher:
    """Fetches pages. Holds no connections, and may be used from any event loop. The processes that convert
    HTML end with it, or with `close`.

    allow: "host:port" entries that may be fetched although they are not public, local servers for instance.
    ports: those of all others. timeout: seconds for all of a fetch: name, redirects, body, conversion, and
    that ten at most. max_bytes: of a body, packed or not. max_chars: of the text, which is cut there.
    conversions: how many run side by side. resolver: who is asked for the addresses of names, the system by
    default. Raises InputError for settings that are none.
    """

    def __init__(
        self,
        *,
        allow: Iterable[str] = (),
        ports: Iterable[int] = (80, 443),
        timeout: float = 20.0,
        max_bytes: int = 2_000_000,
        max_chars: int = 20_000,
        max_redirects: int = 5,
        conversions: int = 2,
        user_agent: str = "mem1",
        resolver: aiohttp.abc.AbstractResolver | None = None,
    ) -> None:
        require(timeout > 0, "timeout", "seconds > 0", timeout)
        require(max_bytes > 0, "max_bytes", "a number > 0", max_bytes)
        require(max_chars > 0, "max_chars", "a number > 0", max_chars)
        require(max_redirects >= 0, "max_redirects", "a number >= 0", max_redirects)
        require(conversions > 0, "conversions", "a number > 0", conversions)
        self.timeout, self.max_bytes, self.max_chars = timeout, max_bytes, max_chars
        self.max_redirects, self.user_agent = max_redirects, user_agent
        self._rules, self._resolver = UrlRules(allow, ports), resolver
        self._converter = HtmlConverter(min(timeout, _CONVERSION_SECONDS))
        self._threads = ThreadPoolExecutor(conversions, "mem1 html")  # each waits for a process

    async def fetch(self, url: str) -> Page:
        """The page at `url`. Raises FetchError for one that cannot be had, InputError if trafilatura cannot
        be loaded.
        """
        try:
            return await asyncio.wait_for(self._fetch(self._rules.parse(url)), self.timeout)
        except asyncio.TimeoutError:
            raise FetchError(f"time limit: {self.timeout:g} s") from None

    def close(self) -> None:
        """End the processes that convert HTML."""
        self._converter.close()

    async def _fetch(self, url: yarl.URL) -> Page:
        try:
            document = await self._download(url)
        except BodyError as error:
            raise FetchError(str(error)) from None
        except aiohttp.ClientConnectionError:
            raise FetchError("connection failed") from None
        except aiohttp.ClientError:
            raise FetchError("not an answer of a web server") from None
        loop, over = asyncio.get_running_loop(), threading.Event()
        try:
            text = await loop.run_in_executor(self._threads, self._text, document, over)
        finally:
            over.set()  # if the time was over, or the fetch cancelled, so is the conversion
        if text is None:
            raise FetchError("HTML that cannot be converted")
        if not text:
            raise FetchError("no text")
        return Page(document.url, text)

    async def _download(self, url: yarl.URL) -> _Document:
        async with self._session() as session:
            for _ in range(self.max_redirects + 1):
                async with session.get(url, allow_redirects=False) as response:
                    location = response.headers.get("Location")
                    if response.status in _REDIRECTS and location is not None:
                        url = self._rules.parse(location, url)
                        continue
                    if not 200 <= response.status < 300:
                        raise FetchError(f"status {response.status}")
                    # What is no type, aiohttp calls text/plain before 3.14.
                    named = "/" in response.headers.get("Content-Type", "/")
                    kind = response.content_type if named else _UNKNOWN
                    if kind not in _HTML + _PLAIN:
                        raise FetchError(f"not text: {one_line(kind, _MAX_KIND_CHARS)}")
                    body = await read_body(response, self.max_bytes)
                    return _Document(str(url), kind, response.charset, body)
        raise FetchError(f"more than {self.max_redirects} redirects")

    def _session(self) -> aiohttp.ClientSession:
        """A session for one fetch: no cookies, no proxies, nothing of the fetches before it."""
        resolver = CheckedResolver(self._rules, self._resolver)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": self.user_agent, "Accept-Encoding": ACCEPT_ENCODING},
            timeout=aiohttp.ClientTimeout(total=None),  # `fetch` has one for everything
            auto_decompress=False,
        )

    def _text(self, document: _Document, over: threading.Event) -> str | None:
        text: str | None = clean(decode(document.body, document.charset))
        if text and document.content_type in _HTML:
            text = self._converter.text(text, over)
        return text and clean(text, self.max_chars)
