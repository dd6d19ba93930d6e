from __future__ import annotations

import asyncio
import gzip
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from test_url_rules import Names
from web_server import LOOP, Site, saying, serving, web

from mem1.checks import InputError
from mem1.envs.web import url_rules
from mem1.envs.web.page_fetch import Page, PageFetcher
from mem1.envs.web.url_rules import FetchError

ARTICLE = b"<p>The river rises in the north and flows for three hundred miles to the sea.</p>"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving(Site()) as site:
        yield site


@pytest.fixture(scope="module")
def fetcher(site: Site) -> Iterator[PageFetcher]:
    fetcher = PageFetcher(allow=[site.entry], timeout=30.0)
    yield fetcher
    fetcher.close()


def fetch(fetcher: PageFetcher, url: str) -> Page:
    return LOOP.run(fetcher.fetch(url))


def reason(fetcher: PageFetcher, url: str) -> str:
    with pytest.raises(FetchError) as caught:
        fetch(fetcher, url)
    return caught.value.reason


# --- What is read -------------------------------------------------------------------------------------------


def test_a_fetch_that_is_cancelled_takes_its_conversion_along(site: Site) -> None:
    attributes = " ".join(f"a{i}=1" for i in range(40_000)).encode()
    url = site.page("/slow", b"<body>" + ARTICLE + b"<p " + attributes + b">hi</p></body>", kind="text/html")
    quick = site.page("/quick", ARTICLE, kind="text/html")
    fetcher = PageFetcher(allow=[site.entry], timeout=60.0, conversions=1)
    assert "The river rises" in fetch(fetcher, quick).text

    async def cancelled() -> None:
        fetching = asyncio.ensure_future(fetcher.fetch(url))
        while not fetcher._converter._under_way:
            await asyncio.sleep(0.01)
        fetching.cancel()
        await asyncio.wait({fetching})

    LOOP.run(cancelled())
    start = time.monotonic()
    assert "The river rises" in fetch(fetcher, quick).text  # another process, at once
    assert time.monotonic() - start < 8.0
    fetcher.close()


def test_plain_text(fetcher: PageFetcher, site: Site) -> None:
    url = site.page("/plain", b"one\r\n\r\ntwo  three\n")
    assert fetch(fetcher, f"{url}#part") == Page(url, "one\n\ntwo  three")


def test_request(fetcher: PageFetcher, site: Site) -> None:
    fetch(fetcher, site.page("/request", b"text"))
    (request,) = (request for request in site.requests if request.path == "/request")
    assert request.method == "GET"
    assert request.headers["User-Agent"] == "mem1"
    assert request.headers["Accept-Encoding"] == "gzip"
    assert "Cookie" not in request.headers


def test_html_without_what_nobody_sees(fetcher: PageFetcher, site: Site) -> None:
    head = b"<html><head><title>T</title><script>var head = 'script'</script><style>p {}</style></head>"
    body = b"<body>" + ARTICLE * 4 + b"<script>alert('script')</script><!-- remark --></body></html>"
    for kind in ("text/html", "application/xhtml+xml"):
        page = fetch(fetcher, site.page("/html", head + body, kind=kind))
        assert "The river rises in the north" in page.text
        assert not [word for word in ("script", "remark", "<p>", "{}") if word in page.text]


def test_json(fetcher: PageFetcher, site: Site) -> None:
    assert fetch(fetcher, site.page("/json", b'{"a": 1}', kind="application/json")).text == '{"a": 1}'


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        ("text/plain; charset=iso-8859-1", b"gr\xfc\xdfe", "grüße"),
        ("text/plain; charset=utf-8", b"a\xffb\xc3", "a\ufffdb\ufffd"),
        ("text/plain; charset=unheard-of", "grüße".encode(), "grüße"),
        ("text/plain", b"caf\xe9", "café"),
        ("text/plain", b"a\0b\x1b[31mc\x7f", "a b [31mc"),
    ],
)
def test_charsets(fetcher: PageFetcher, site: Site, kind: str, body: bytes, text: str) -> None:
    assert fetch(fetcher, site.page("/charset", body, kind=kind)).text == text


def test_invalid_html(fetcher: PageFetcher, site: Site) -> None:
    body = b"<html><body>\xff\xfe\0" + ARTICLE * 4 + b"\xed\xa0\x80&#xD800;&#0;&#129; end \0</body>"
    text = fetch(fetcher, site.page("/invalid", body, kind="text/html; charset=utf-8")).text
    assert "The river rises" in text
    assert not set(text) & {"\0", "\x81"}
    text.encode()  # no half of a surrogate pair


def test_text_is_cut(site: Site) -> None:
    url = site.page("/long", b"word " * 1000)
    assert fetch(PageFetcher(allow=[site.entry], max_chars=7), url).text == "word wo"


def test_gzip(fetcher: PageFetcher, site: Site) -> None:
    url = site.page("/gzip", gzip.compress(b"packed " * 100, mtime=0) + b"rest", Content_Encoding="gzip")
    assert fetch(fetcher, url).text == ("packed " * 100).strip()


def test_gzip_of_several_streams(site: Site) -> None:
    streams = b"".join(gzip.compress(text, mtime=0) for text in (b"one ", b"", b"two " * 40_000, b"three"))
    url = site.page("/streams", streams, Content_Encoding="gzip")
    fetcher = PageFetcher(allow=[site.entry], max_bytes=160_009, max_chars=200_000)
    assert fetch(fetcher, url).text == "one " + "two " * 40_000 + "three"
    url = site.page("/one too many", streams + gzip.compress(b"!", mtime=0), Content_Encoding="gzip")
    assert reason(fetcher, url) == "too large: more than 160009 bytes"
    cut = site.page("/cut", streams[:-3], Content_Encoding="gzip")
    assert reason(fetcher, cut) == "a compressed body that ends too soon"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects(fetcher: PageFetcher, site: Site, status: int) -> None:
    end = site.page("/folder/end", b"the end")
    site.redirect("/folder/next", "end#part", status)
    start = site.redirect("/start", "/folder/next", status)
    assert fetch(fetcher, start) == Page(end, "the end")


def test_no_cookies(fetcher: PageFetcher, site: Site) -> None:
    site.page("/cookie/end", b"the end")
    fetch(fetcher, site.page("/cookie", status=302, Location="/cookie/end", Set_Cookie="a=b; Path=/"))
    assert site.requests[-1].path == "/cookie/end" and not site.requests[-1].cookies


# --- What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["image/png", "application/pdf", "text/css", "application/octet-stream", "x"]
)
def test_content_types(fetcher: PageFetcher, site: Site, kind: str) -> None:
    named = kind if "/" in kind else "application/octet-stream"
    assert reason(fetcher, site.page("/kind", b"x", kind=kind)) == f"not text: {named}"


@pytest.mark.parametrize("status", [302, 400, 401, 404, 410, 429, 500, 503])
def test_statuses(fetcher: PageFetcher, site: Site, status: int) -> None:
    assert reason(fetcher, site.page("/status", b"text", status=status)) == f"status {status}"


@pytest.mark.parametrize("body", [b"", b" \n ", b"\0\0", b"<html><head><title>T</title></head><body></body>"])
def test_empty(fetcher: PageFetcher, site: Site, body: bytes) -> None:
    assert reason(fetcher, site.page("/empty", body, kind="text/html")) == "no text"


def test_private_addresses_are_closed(site: Site) -> None:
    before = len(site.requests)
    url = site.page("/closed", b"secret")
    assert reason(PageFetcher(), url) == f"refused: port {site.port}"
    assert reason(PageFetcher(ports=[site.port]), url) == "refused: private address"
    name = f"http://localhost:{site.port}/closed"
    assert reason(PageFetcher(ports=[site.port]), name) == "refused: private address"
    assert len(site.requests) == before


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("http://127.0.0.1/", "refused: private address"),
        ("http://127.0.0.1:1/", "refused: port 1"),
        ("http://169.254.169.254/latest/meta-data/", "refused: private address"),
        ("//[::ffff:10.0.0.1]/", "refused: private address"),
        ("http://2130706433/", "refused: private address"),
        ("http://localhost/", "refused: private address"),
        ("http://user:pass@1.1.1.1/", "refused: credentials in the URL"),
        ("file:///etc/passwd", "refused: neither http nor https"),
        ("http://[::1", "not a URL"),
        ("http://1.1.1.1:http/", "not a URL"),
    ],
)
def test_redirects_are_checked(fetcher: PageFetcher, site: Site, location: str, expected: str) -> None:
    site.redirect("/second", location)
    assert reason(fetcher, site.redirect("/first", "/second")) == expected


def test_redirect_to_another_local_server(fetcher: PageFetcher, site: Site) -> None:
    with serving(Site()) as other:
        secret = other.page("/secret", b"secret")
        assert reason(fetcher, site.redirect("/other", secret)) == f"refused: port {other.port}"
        assert other.requests == []


def test_too_many_redirects(site: Site) -> None:
    url = site.redirect("/loop", "/loop")
    before = len(site.requests)
    assert reason(PageFetcher(allow=[site.entry], max_redirects=3), url) == "more than 3 redirects"
    assert len(site.requests) - before == 4
    assert reason(PageFetcher(allow=[site.entry], max_redirects=0), url) == "more than 0 redirects"


def test_a_name_that_changes_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was checked is the one that is connected to; another connection is checked anew."""
    monkeypatch.setattr(url_rules, "is_public", lambda address: address == "127.0.0.2")
    with serving(Site("127.0.0.2")) as public, serving(Site("127.0.0.1", public.port)) as private:
        private.page("/", b"secret")
        names = Names(["127.0.0.2"], ["127.0.0.1"])
        fetcher = PageFetcher(ports=[public.port], resolver=names)
        public.page("/", b"public")
        assert fetch(fetcher, f"http://site.test:{public.port}/").text == "public"
        assert names.asked == 1
        assert reason(fetcher, f"http://site.test:{public.port}/") == "refused: private address"

        names = Names(["127.0.0.2"], ["127.0.0.1"])
        fetcher = PageFetcher(ports=[public.port], resolver=names)
        public.page("/", status=302, Location=f"http://site.test:{public.port}/", Connection="close")
        assert reason(fetcher, f"http://site.test:{public.port}/") == "refused: private address"
        assert names.asked == 2
        assert public.requests[-1].host == f"site.test:{public.port}"
        assert private.requests == []


# --- Limits -------------------------------------------------------------------------------------------------


def test_too_large(site: Site) -> None:
    fetcher = PageFetcher(allow=[site.entry], max_bytes=1000)
    assert len(fetch(fetcher, site.page("/fits", b"a" * 1000)).text) == 1000
    assert reason(fetcher, site.page("/large", b"a" * 1001)) == "too large: more than 1000 bytes"


def test_ten_megabytes(fetcher: PageFetcher, site: Site) -> None:
    url = site.page("/10MB", b"<p>" + b"a" * 10_000_000, kind="text/html")
    assert reason(fetcher, url) == "too large: more than 2000000 bytes"


def test_endless_body(fetcher: PageFetcher, site: Site) -> None:
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        while True:
            await response.write(b"a" * 100_000)
            sent += 100_000

    site.pages["/endless"] = endless
    assert reason(fetcher, site.url("/endless")) == "too large: more than 2000000 bytes"
    assert sent < 20_000_000  # what the sockets hold, at most


def test_gzip_bomb(site: Site) -> None:
    """It is never unpacked by more than the limit."""
    bomb = gzip.compress(bytes(40_000_000), 1)
    assert len(bomb) < 200_000
    url = site.page("/bomb", bomb, Content_Encoding="gzip")
    tracemalloc.start()
    assert (
        reason(PageFetcher(allow=[site.entry], max_bytes=300_000), url) == "too large: more than 300000 bytes"
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3_000_000


def test_gzip_that_unpacks_to_nothing(site: Site) -> None:
    url = site.page("/members", gzip.compress(b"", mtime=0) * 1000, Content_Encoding="gzip")
    assert (
        reason(PageFetcher(allow=[site.entry], max_bytes=10_000), url) == "too large: more than 10000 bytes"
    )


@pytest.mark.parametrize(
    ("encoding", "body", "expected"),
    [
        ("gzip", b"no gzip at all", "a body that cannot be unpacked"),
        ("gzip", gzip.compress(b"a" * 1000, mtime=0)[:-9], "a compressed body that ends too soon"),
        ("br", b"x", "an unknown compression"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"a", mtime=0), mtime=0), "an unknown compression"),
    ],
)
def test_broken_compression(
    fetcher: PageFetcher, site: Site, encoding: str, body: bytes, expected: str
) -> None:
    assert reason(fetcher, site.page("/broken", body, Content_Encoding=encoding)) == expected


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"


@pytest.mark.parametrize(
    "said",
    [
        [b"HTTP/1.1 200 OK\r\n", *[b"X: 1\r\n"] * 100],
        [HEAD + b"Content-Length: 100\r\n\r\n", *[b"a"] * 100],
        [b"HTTP/1.1 100 Continue\r\n\r\n"] * 100,
        [b""] * 100,
    ],
    ids=["head", "body", "continue", "nothing"],
)
def test_slow_servers(said: list[bytes]) -> None:
    with saying(*said, pause=0.05) as entry:
        start = time.monotonic()
        assert reason(PageFetcher(allow=[entry], timeout=0.3), f"http://{entry}/") == "time limit: 0.3 s"
        assert time.monotonic() - start < 3.0


def test_time_limit_counts_redirects(site: Site) -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.1)
        return web.Response(status=302, headers={"Location": "/slow"})

    site.pages["/slow"] = slow
    fetcher = PageFetcher(allow=[site.entry], timeout=0.3, max_redirects=100)
    assert reason(fetcher, site.url("/slow")) == "time limit: 0.3 s"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"", "connection failed"),
        (b"garbage\r\n\r\n", "not an answer of a web server"),
        (b"\0\xff\r\n\r\n", "not an answer of a web server"),
        (b"HTTP/1.1 999999 What\r\n\r\n", "not an answer of a web server"),
        (HEAD + b"Content-Length: -1\r\n\r\n", "not an answer of a web server"),
        (HEAD + b"X: " + b"a" * 100_000 + b"\r\n\r\n", "not an answer of a web server"),
        (HEAD + b"Content-Length: 10\r\n\r\nshort", "not an answer of a web server"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "not an answer of a web server"),
        (  # the latter from a parser that lets it pass
            b"HTTP/1.1 200 OK\r\nContent-Type: \xff\0\r\n\r\n",
            "not an answer of a web server, or not text: application/octet-stream",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Type: \xff\r\n\r\n", "not text: application/octet-stream"),
        (b"HTTP/1.1 200 OK\r\n\r\ntext", "not text: application/octet-stream"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://\xff\xfe/\r\n\r\n", "not a URL"),
    ],
    ids=repr,
)
def test_servers_that_speak_no_http(said: bytes, expected: str) -> None:
    with saying(said) as entry:
        assert reason(PageFetcher(allow=[entry]), f"http://{entry}/") in expected.split(", or ")


def test_nobody_there(fetcher: PageFetcher) -> None:
    with saying() as entry:
        pass
    assert reason(PageFetcher(allow=[entry]), f"http://{entry}/") == "connection failed"


def test_tls_with_a_server_that_has_none(site: Site) -> None:
    assert reason(PageFetcher(allow=[site.entry]), f"https://{site.entry}/") == "connection failed"


@pytest.mark.parametrize(
    "settings",
    [{"timeout": 0}, {"max_bytes": 0}, {"max_chars": 0}, {"max_redirects": -1}, {"conversions": 0}],
    ids=str,
)
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(settings))}: expected"):
        PageFetcher(**settings)
