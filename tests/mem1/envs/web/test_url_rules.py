from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from web_server import LOOP

from mem1.checks import InputError
from mem1.envs.web.url_rules import CheckedResolver, FetchError, UrlRules, is_public
from mem1.envs.web.web_packages import aiohttp, yarl

PRIVATE = {
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "nothing": ["0.0.0.0", "0.1.2.3", "::"],
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fd00:ec2::254"],
    "link-local": ["169.254.1.1", "169.254.169.254", "fe80::1", "fe80::1%eth0"],
    "site-local": ["fec0::1"],
    "carrier-grade NAT": ["100.64.0.1", "100.127.255.255", "100.100.100.200"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"],
    "reserved": ["240.0.0.1", "255.255.255.255", "192.0.0.8", "4000::1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "benchmarking": ["198.18.0.1", "2001:2::1"],
    "metadata": ["168.63.129.16"],
    "relays": ["192.88.99.1"],
    "IPv4-mapped": ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"],
    "IPv4-compatible": ["::127.0.0.1", "::8.8.8.8"],
    "6to4": ["2002:7f00:1::", "2002:a00:1::1", "2002:a9fe:a9fe::"],
    "NAT64": ["64:ff9b::127.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::8.8.8.8"],
    "Teredo": ["2001:0:4136:e378:8000:63bf:3fff:fdd2"],
    "no address": ["", "localhost", "1.2.3", "127.1", "0x7f.0.0.1", "01.02.03.04", "1.1.1.1 "],
}
PUBLIC = ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700:4700::1111", "2a00:1450::1"]
PUBLIC += ["::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"]


@pytest.mark.parametrize("kind", PRIVATE)
def test_private_addresses(kind: str) -> None:
    assert [address for address in PRIVATE[kind] if is_public(address)] == []


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def test_every_private_network_within_ipv6_is_found_out() -> None:
    """What is not public in IPv4 is not by way of IPv6 either."""
    for text in (address for kind in PRIVATE for address in PRIVATE[kind]):
        try:
            number = int(ipaddress.IPv4Address(text))
        except ValueError:
            continue
        for inside in ((0xFFFF << 32) | number, (0x2002 << 112) | (number << 80), (0x64FF9B << 96) | number):
            assert not is_public(str(ipaddress.IPv6Address(inside))), text


def reason(url: str, **settings: Any) -> str:
    rules = UrlRules(**settings)
    with pytest.raises(FetchError) as caught:
        rules.parse(url)
    assert str(caught.value) == caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://127.0.0.1./",
        "http://2130706433/",
        "http://017700000001/",
        "http://0177.0.0.1/",
        "http://0x7f000001/",
        "http://0x7F.0.0.1/",
        "http://127.1/",
        "http://127.0.0.0x1/",
        "http://1.1.1.0x/",
        "http://0/",
        "http://①②⑦.⓪.⓪.①/",
        "http://127。0。0。1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[fe80::1%25eth0]/",
        "https://10.0.0.1/",
    ],
)
def test_addresses_in_urls(url: str) -> None:
    assert reason(url) == "refused: private address"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ftp://example.com/", "refused: neither http nor https"),
        ("file:///etc/passwd", "refused: neither http nor https"),
        ("gopher://example.com/", "refused: neither http nor https"),
        ("javascript:alert(1)", "refused: neither http nor https"),
        ("example.com", "refused: neither http nor https"),
        ("", "refused: neither http nor https"),
        ("http://me@example.com/", "refused: credentials in the URL"),
        ("http://me:secret@example.com/", "refused: credentials in the URL"),
        ("http://1.1.1.1&@127.0.0.1/", "refused: credentials in the URL"),
        ("http://example.com:22/", "refused: port 22"),
        ("http://example.com:0/", "refused: port 0"),
        ("http://example.com:8080/", "refused: port 8080"),
        ("http:///path", "refused: not a host name"),
        ("http://../", "refused: not a host name"),
        ("http://exa mple.com/", "refused: not a host name"),
        ("http://exam\0ple.com/", "refused: not a host name"),
        ("http://%31%32%37.0.0.x/", "refused: not a host name"),
        ("http://" + "a" * 300 + "/", "refused: not a host name"),
        ("http://[::1", "not a URL"),
        ("http://[x]y@", "not a URL"),
        ("http://example.com:99999/", "not a URL"),
        ("http://example.com:http/", "not a URL"),
        ("http://example.com/" + "a" * 2048, "not a URL: more than 2048 characters"),
    ],
)
def test_refused_urls(url: str, expected: str) -> None:
    assert reason(url) == expected


@pytest.mark.parametrize(
    "url",
    ["http://example.com", "HTTPS://Example.COM:443/a?b=c#d", "http://1.1.1.1/", "http://[2606:4700::1]/"],
)
def test_let_through(url: str) -> None:
    UrlRules().parse(url)


URLS = st.text("hHtTpP:/\\@[]?#%.:0189xaf①。 \t\n\0\ud800é-_~&=;,'\"<>{}|^`", max_size=20)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(start=st.sampled_from(["http://", "https://", "http:/", "//", ""]), rest=URLS, relative=st.booleans())
def test_any_text(start: str, rest: str, relative: bool) -> None:
    """Is a URL of a public host, or refused by name."""
    try:
        url = UrlRules().parse(start + rest, yarl.URL("http://example.com/a/b") if relative else None)
    except FetchError as error:
        assert error.reason
    else:
        assert url.scheme in ("http", "https") and url.port in (80, 443)
        assert url.raw_host and url.user is None
        str(url).encode()


def test_allow_list_opens_one_host_and_port() -> None:
    rules = UrlRules(allow=["127.0.0.1:8080", "Local.test:81", "[::1]:80"])
    for url in (
        "http://127.0.0.1:8080/",
        "https://127.0.0.1:8080/x",
        "http://local.TEST:81/",
        "http://[::1]/",
    ):
        rules.parse(url)
    allow = ["127.0.0.1:8080"]
    assert reason("http://127.0.0.1/", allow=allow) == "refused: private address"
    assert reason("http://127.0.0.1:8081/", allow=allow) == "refused: port 8081"
    assert reason("http://127.0.0.2:8080/", allow=allow) == "refused: port 8080"
    assert reason("http://me@127.0.0.1:8080/", allow=allow) == "refused: credentials in the URL"
    assert reason("ftp://127.0.0.1:8080/", allow=allow) == "refused: neither http nor https"


def test_other_ports() -> None:
    UrlRules(ports=[8080]).parse("http://example.com:8080/")
    assert reason("http://example.com/", ports=[8080]) == "refused: port 80"
    assert reason("http://127.0.0.1:8080/", ports=[8080]) == "refused: private address"


@pytest.mark.parametrize(
    "entry", ["", "localhost", "localhost:", "localhost:80/x", "a:b", "http://a:80", "::1"]
)
def test_wrong_entries(entry: str) -> None:
    with pytest.raises(InputError, match="allow: expected"):
        UrlRules(allow=[entry])


def test_entries_are_a_list() -> None:
    with pytest.raises(InputError, match="allow: expected"):
        UrlRules(allow="localhost:80")


class Names(aiohttp.abc.AbstractResolver):
    """Answers with each of its lists of addresses in turn, the last for ever."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.asked = list(answers), 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[aiohttp.abc.ResolveResult]:
        found = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        return [
            aiohttp.abc.ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in found
        ]

    async def close(self) -> None:
        raise AssertionError("a resolver that was given is its owner's to close")


async def resolved(names: aiohttp.abc.AbstractResolver, **settings: Any) -> list[str]:
    resolver = CheckedResolver(UrlRules(**settings), names)
    found = await resolver.resolve("site.test", 80)
    await resolver.close()
    return [each["host"] for each in found]


def test_names_of_public_addresses() -> None:
    assert LOOP.run(resolved(Names(["1.1.1.1", "2606:4700::1"]))) == ["1.1.1.1", "2606:4700::1"]


@pytest.mark.parametrize("found", [["127.0.0.1"], ["1.1.1.1", "10.0.0.1"], ["::ffff:10.0.0.1"]], ids=str)
def test_names_of_private_addresses(found: list[str]) -> None:
    with pytest.raises(FetchError, match="^refused: private address$"):
        LOOP.run(resolved(Names(found)))
    assert LOOP.run(resolved(Names(found), allow=["site.test:80"])) == found
    with pytest.raises(FetchError, match="private"):
        LOOP.run(resolved(Names(found), allow=["site.test:81", "other.test:80"]))


class NoNames(Names):
    """A name server that knows nothing, and says so in one of several ways."""

    def __init__(self, error: Exception) -> None:
        super().__init__([])
        self.error = error

    async def resolve(self, *_: Any, **__: Any) -> list[aiohttp.abc.ResolveResult]:
        raise self.error


@pytest.mark.parametrize(
    "names",
    [Names([]), NoNames(OSError("no such name")), NoNames(UnicodeError("label too long"))],
    ids=["empty", "OSError", "UnicodeError"],
)
def test_names_of_no_address(names: Names) -> None:
    with pytest.raises(FetchError, match="^no such host$"):
        LOOP.run(resolved(names))


def test_the_system_resolves_by_default() -> None:
    async def ask() -> list[str]:
        resolver = CheckedResolver(UrlRules(allow=["localhost:80"]))
        return [each["host"] for each in await resolver.resolve("localhost", 80, socket.AF_INET)]

    assert "127.0.0.1" in LOOP.run(ask())
