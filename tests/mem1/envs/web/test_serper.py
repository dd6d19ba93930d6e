from __future__ import annotations

import asyncio
import gzip
import json
import logging
import time
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from test_search_reply import FOUND, REPLY
from web_server import LOOP, Site, saying, serving, web

from mem1.checks import InputError
from mem1.envs.web.search_reply import SearchError, SearchReply, UnreadableReply
from mem1.envs.web.serper import KeyRefused, QueryRefused, SearchOutage, SerperClient

KEY = "k3y-that-is-secret"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving(Site()) as site:
        yield site


@pytest.fixture(autouse=True)
def fresh(site: Site) -> None:
    site.requests.clear()


def search(url: str, query: str = "tower", num: int = 10, **settings: Any) -> SearchReply:
    async def ask() -> SearchReply:
        async with SerperClient(KEY, url, **({"backoff": 0.0} | settings)) as client:
            return await client.search(query, num)

    return LOOP.run(ask())


def error(url: str, kind: type[SearchError], **settings: Any) -> str:
    """The text of the error, which is of exactly this kind, and in whose trace the key does not occur."""
    with pytest.raises(SearchError) as caught:
        search(url, **settings)
    assert type(caught.value) is kind
    chain: BaseException | None = caught.value
    while chain:
        assert KEY not in f"{chain!r} {chain} {chain.args}"
        chain = chain.__context__
    assert KEY not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


def answers(site: Site, *replies: tuple[int, bytes]) -> str:
    """Let /search answer with each in turn, the last for ever."""
    left = list(replies)

    async def answer(request: web.Request) -> web.Response:
        status, body = left.pop(0) if len(left) > 1 else left[0]
        headers = {"Retry-After": body.decode()} if status in (429, 503) else {}
        return web.Response(status=status, body=body, headers=headers)

    site.pages["/search"] = answer
    return site.url("/search")


GOOD = (200, json.dumps(REPLY).encode())


def test_search(site: Site) -> None:
    assert search(answers(site, GOOD), "  height of\nthe\0tower ", 7) == FOUND
    (request,) = site.requests
    assert request.method == "POST"
    assert LOOP.run(request.json()) == {"q": "height of the tower", "num": 7}
    assert request.headers["X-API-KEY"] == KEY
    assert request.headers["Content-Type"] == "application/json"


def test_packed_reply(site: Site) -> None:
    url = site.page("/packed", gzip.compress(GOOD[1]), Content_Encoding="gzip")
    assert search(url) == FOUND


def test_long_query_is_cut(site: Site) -> None:
    search(answers(site, GOOD), "word " * 10_000)
    assert len(LOOP.run(site.requests[0].json())["q"]) == 2048


def test_at_most_as_many_results_as_asked_for(site: Site) -> None:
    assert len(search(answers(site, GOOD), num=1).results) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_asks_again(site: Site, status: int) -> None:
    backoff = 30.0 if status in (429, 503) else 0.0  # these say when to come back: at once
    assert search(answers(site, (status, b"0"), (status, b"0"), GOOD), backoff=backoff) == FOUND
    assert len(site.requests) == 3


def test_asks_no_more_often_than_told(site: Site) -> None:
    assert error(answers(site, (503, b"0")), SearchOutage, retries=2) == "search API: status 503"
    assert len(site.requests) == 3
    site.requests.clear()
    assert error(answers(site, (500, b"")), SearchOutage, retries=0) == "search API: status 500"
    assert len(site.requests) == 1
    assert issubclass(SearchOutage, OSError)  # which a rollout takes as worth asking again


@pytest.mark.parametrize(
    ("status", "body", "kind", "expected"),
    [
        (401, b"", KeyRefused, "status 401, the key was refused"),
        (403, b'{"message": "Unauthorized."}', KeyRefused, "status 403, the key was refused"),
        (400, b'{"message": "Not enough credits"}', KeyRefused, "status 400, no credits left"),
        (400, b'{"message": "no credit"}', QueryRefused, "status 400, the query was refused"),
        (422, KEY.encode(), QueryRefused, "status 422, the query was refused"),
        (404, KEY.encode(), UnreadableReply, "status 404"),
        (204, b"", UnreadableReply, "status 204"),
        (200, KEY.encode(), UnreadableReply, "a reply that is no JSON object"),
        (200, b"[" * 2_000_001, UnreadableReply, "too large: more than 2000000 bytes"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else None,
)
def test_errors(site: Site, status: int, body: bytes, kind: type[SearchError], expected: str) -> None:
    assert error(answers(site, (status, body)), kind) == f"search API: {expected}"
    assert len(site.requests) == 1  # not worth asking again


def test_the_key_goes_nowhere_else(site: Site) -> None:
    with serving(Site()) as other:
        url = site.redirect("/moved", other.page("/search", GOOD[1]), 307)
        assert error(url, UnreadableReply) == "search API: status 307"
        assert other.requests == []


def test_gzip_bomb(site: Site) -> None:
    url = site.page("/bomb", gzip.compress(b"[" * 20_000_000, 1), Content_Encoding="gzip")
    assert error(url, UnreadableReply) == "search API: too large: more than 2000000 bytes"


def test_a_slow_server(site: Site) -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    site.pages["/slow"] = slow
    found = error(site.url("/slow"), SearchOutage, timeout=0.2, retries=1)
    assert found == "search API: no answer within 0.2 s"
    assert len(site.requests) == 2


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\0\xff garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nX: " + KEY.encode() * 9999,
    ],
    ids=lambda said: repr(said[:40]),
)
def test_a_server_that_speaks_no_http(said: bytes) -> None:
    with saying(said) as entry:
        assert error(f"http://{entry}/", SearchOutage, retries=1).startswith("search API: no answer, ")


def test_nobody_there() -> None:
    with saying() as entry:
        pass
    assert error(f"http://{entry}/", SearchOutage).startswith("search API: no answer, Client")


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("0", 0, 0),
        (" 7 ", 7, 7),
        ("3600", 30, 30),
        ("9" * 5000, 2, 4),
        ("-1", 2, 4),
        ("nan", 2, 4),
        ("٩", 2, 4),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 2, 4),
        ("", 2, 4),
    ],
    ids=lambda value: str(value)[:10].encode("unicode_escape").decode(),
)
def test_pauses(header: str, low: float, high: float) -> None:
    """As the server wishes, else doubled each time; at most 30 s."""
    client = SerperClient(KEY, backoff=1.0)
    assert low <= client._pause(header, 2) <= high
    assert client._pause("", 20) == client._pause("", 5000) == 30


def test_pauses_are_kept(site: Site) -> None:
    start = time.monotonic()
    search(answers(site, (500, b""), GOOD), backoff=0.4)
    assert time.monotonic() - start >= 0.2


def test_connections_are_kept_until_closed(site: Site) -> None:
    url = answers(site, GOOD)

    async def ask() -> list[object]:
        client = SerperClient(KEY, url)
        await client.close()  # nothing to close
        await asyncio.gather(client.search("a"), client.search("b"))
        first = client._session
        await client.search("c")
        assert first is client._session
        await client.close()
        await client.search("d")
        second = client._session
        await client.close()
        await client.close()
        return [first, second]

    first, second = LOOP.run(ask())
    assert first is not second
    assert first.closed and second.closed  # type: ignore[attr-defined]
    assert len(site.requests) == 4


def test_the_key_is_not_shown(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    client = SerperClient(KEY, "http://localhost/search")
    assert repr(client) == str(client) == "SerperClient('http://localhost/search')"
    with caplog.at_level(logging.DEBUG):
        search(answers(site, (500, b""), GOOD))
    assert KEY not in caplog.text


@pytest.mark.parametrize("key", ["", " ", "a b", "ab\n", "a\r\nX: 1", "schlüssel", "a\0", None, 7], ids=repr)
def test_keys_that_are_none(key: Any) -> None:
    with pytest.raises(InputError) as caught:
        SerperClient(key)
    assert (
        str(caught.value) == "api_key: expected printable ASCII characters without blanks, got others or none"
    )


@pytest.mark.parametrize(
    "url", ["", "google.serper.dev", "ftp://a.example/", "http://", "http://[::1", "/search"]
)
def test_wrong_urls(url: str) -> None:
    with pytest.raises(InputError, match="url: expected an http or https URL"):
        SerperClient(KEY, url)


def test_credentials_in_the_url() -> None:
    with pytest.raises(InputError, match="url: expected .* without credentials, got one with") as caught:
        SerperClient(KEY, "https://me:hidden@a.example/")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"timeout": 0}, {"retries": -1}, {"backoff": -1}], ids=str)
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(settings))}: expected"):
        SerperClient(KEY, **settings)
