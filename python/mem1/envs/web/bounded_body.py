"""Reading the body of a response up to a limit, of what comes over the line and of what it unpacks to."""

from __future__ import annotations

import zlib

from mem1.envs.web.web_packages import aiohttp

ACCEPT_ENCODING = "gzip"  # the one compression that is read
_CHUNK = 65536
_GZIP = 16 + zlib.MAX_WBITS  # with its header
_MAGIC = b"\x1f\x8b"


class BodyError(Exception):
    """A body that is too large, or cannot be unpacked; its text says which."""


async def read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, unpacked. Reading stops, with a BodyError, once there are more than `limit` bytes of it,
    packed or unpacked. The session must have been made with `auto_decompress=False`: not every version of
    aiohttp limits what a chunk unpacks to.
    """
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "x-gzip"):
        raise BodyError("an unknown compression")
    unpacker = _Gzip() if encoding.endswith("gzip") else None
    body, received = bytearray(), 0
    async for chunk in response.content.iter_chunked(_CHUNK):
        received += len(chunk)
        # One byte more than fits shows that there is more: nothing is ever left inside the unpacker.
        body += unpacker.unpacked(chunk, limit + 1 - len(body)) if unpacker else chunk
        if max(received, len(body)) > limit:
            raise BodyError(f"too large: more than {limit} bytes")
    if unpacker and received and not unpacker.ended:
        raise BodyError("a compressed body that ends too soon")
    return bytes(body)


class _Gzip:
    """A file of gzip, which is one compressed stream or several, one behind the other (RFC 1952, 2.2)."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(_GZIP)
        self.ended = False  # with the end of a stream

    def unpacked(self, chunk: bytes, limit: int) -> bytes:
        """At most `limit` bytes; what comes after the end and is no other stream is left out."""
        found = b""
        while chunk and limit > len(found):
            if self.ended and not chunk.startswith(_MAGIC):
                break
            if self.ended:
                self._stream = zlib.decompressobj(_GZIP)
            try:
                found += self._stream.decompress(chunk, limit - len(found))
            except zlib.error:
                raise BodyError("a body that cannot be unpacked") from None
            self.ended, chunk = self._stream.eof, self._stream.unused_data
        return found
