"""Which URLs may be fetched: those of public addresses, whatever a URL, a redirect or a name server says.

A URL is looked at twice. `UrlRules.parse` reads what is written: scheme, port, credentials, and a host that
is an address. `CheckedResolver` reads what the name servers say, and the connection is made from its answer:
what was checked is what is connected to, and nobody is asked again in between.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable

from mem1.checks import require
from mem1.envs.web.web_packages import aiohttp, yarl

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_UNICAST = ipaddress.IPv6Network("2000::/3")  # all of IPv6 that is given out
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_SPECIAL = (  # global by their number, to some versions of Python, and still no hosts of the web
    ipaddress.IPv4Network("100.64.0.0/10"),  # carrier-grade NAT
    ipaddress.IPv4Network("168.63.129.16/32"),  # a cloud's metadata
    ipaddress.IPv4Network("192.0.0.0/24"),
    ipaddress.IPv4Network("192.88.99.0/24"),  # relays of 6to4
    ipaddress.IPv6Network("3fff::/20"),  # of documents (RFC 9637)
)
_NAME = re.compile(r"[a-z0-9_.-]{1,253}")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_MAX_URL_CHARS = 2048


class FetchError(Exception):
    """A page that cannot be had; `reason` says why, in words for the policy."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_public(address: str) -> bool:
    """Whether an address, as numbers, is one of the public web. An IPv4 address inside an IPv6 one (mapped,
    6to4, NAT64) counts. What is no address is not public.
    """
    try:
        return _is_public(ipaddress.ip_address(address))
    except ValueError:
        return False


def _is_public(address: _Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
        if address not in _UNICAST:
            return False
    special = address.is_multicast or address.is_reserved or any(address in net for net in _SPECIAL)
    return address.is_global and not special


class UrlRules:
    """What may be fetched.

    allow: "host:port" entries that are let through, whatever their address; the host as in the URL. ports: of
    all other URLs. Raises InputError for entries that are none.
    """

    def __init__(self, allow: Iterable[str] = (), ports: Iterable[int] = (80, 443)) -> None:
        require(not isinstance(allow, str), "allow", "host:port entries", allow)
        self._allow = frozenset(_entry(entry) for entry in allow)
        self._ports = frozenset(ports)

    def parse(self, text: str, base: yarl.URL | None = None) -> yarl.URL:
        """The URL in `text`, as it stands in the page `base`. FetchError if there is none, or none that may
        be fetched, as far as can be told without asking for its host.
        """
        if len(text) > _MAX_URL_CHARS:
            raise FetchError(f"not a URL: more than {_MAX_URL_CHARS} characters")
        try:
            url = yarl.URL(text).with_fragment(None)
            url = base.join(url) if base else url
            self._check(url)
        except (ValueError, IndexError):  # the latter comes from texts such as "http://[x]y@"
            raise FetchError("not a URL") from None
        return url

    def _check(self, url: yarl.URL) -> None:
        host = url.raw_host or ""
        if url.scheme not in ("http", "https"):
            raise FetchError("refused: neither http nor https")
        if url.raw_user is not None or url.raw_password is not None:
            raise FetchError("refused: credentials in the URL")
        if self.allows(host, url.port):
            return
        if url.port not in self._ports:
            raise FetchError(f"refused: port {url.port}")
        # What aiohttp takes for an address it does not resolve: all of that, and more, is settled here. Other
        # spellings of an IPv4 address (127.1, 0x7f000001, 017700000001) end in a number too, and are refused.
        if ":" in host or _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
            if not is_public(host):
                raise FetchError("refused: private address")
        elif not _NAME.fullmatch(host) or not host.strip("."):
            raise FetchError("refused: not a host name")

    def allows(self, host: str, port: int | None) -> bool:
        """Whether an entry of the allow-list lets this through."""
        return (host, port) in self._allow


def _entry(text: str) -> tuple[str, int]:
    """Host and port of an entry of the allow-list."""
    expected = 'entries like "127.0.0.1:8080"'
    try:
        url = yarl.URL(f"http://{text}")
    except ValueError:
        url = yarl.URL()
    require(bool(url.raw_host and url.explicit_port and url.raw_path == "/"), "allow", expected, text)
    return str(url.raw_host), int(url.port or 0)


class CheckedResolver(aiohttp.abc.AbstractResolver):
    """Resolves names as `inner` does, and lets no name through that has an address which is not public."""

    def __init__(self, rules: UrlRules, inner: aiohttp.abc.AbstractResolver | None = None) -> None:
        self._rules, self._inner = rules, inner or aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[aiohttp.abc.ResolveResult]:
        """The addresses of a name. FetchError where one is not public, or there is none."""
        try:
            found = await self._inner.resolve(host, port, family)
        except (OSError, UnicodeError):
            raise FetchError("no such host") from None
        if not found:
            raise FetchError("no such host")
        if not self._rules.allows(host, port) and not all(is_public(each["host"]) for each in found):
            raise FetchError("refused: private address")
        return found

    async def close(self) -> None:
        """Nothing is held; an `inner` that was given is its owner's to close."""
