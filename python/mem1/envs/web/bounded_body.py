"""Reading the body of a response up to a limit, of what comes over the line and of what it unpacks to."""

from __future__ import annotations

import zlib

from mem1.envs.web.web_packages import aiohttp

ACCEPT_ENCODING = "gzip"  # the one compression that is read
_CHUNK = 65536


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
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS) if encoding.endswith("gzip") else None
    body, received = bytearray(), 0
    async for chunk in response.content.iter_chunked(_CHUNK):
        received += len(chunk)
        # One byte more than fits shows that there is more: nothing is ever left inside the unpacker.
        body += _unpacked(unpacker, chunk, limit + 1 - len(body)) if unpacker else chunk
        if max(received, len(body)) > limit:
            raise BodyError(f"too large: more than {limit} bytes")
    if unpacker and received and not unpacker.eof:
        raise BodyError("a compressed body that ends too soon")
    return bytes(body)


def _unpacked(unpacker: zlib._Decompress, chunk: bytes, limit: int) -> bytes:
    """At most `limit` bytes; what comes after the end of the compressed stream is left out."""
    try:
        return unpacker.decompress(chunk, limit)
    except zlib.error:
        raise BodyError("a body that cannot be unpacked") from None
