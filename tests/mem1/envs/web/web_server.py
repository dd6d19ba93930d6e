"""Local servers for tests of the open web: one that speaks HTTP, one that says what it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest

from mem1.runtime.event_loop import EventLoop

pytest.importorskip("aiohttp")
pytest.importorskip("trafilatura")

from aiohttp import web  # noqa: E402

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LOOP = EventLoop()  # of servers and clients: tests themselves are no coroutines


class Site:
    """A server on `host`; `pages` has the handler of each path, `requests` what was asked for."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host, self.port = host, port
        self.pages: dict[str, Handler] = {}
        self.requests: list[web.Request] = []

    @property
    def entry(self) -> str:
        """Of an allow-list."""
        return f"{self.host}:{self.port}"

    def url(self, path: str) -> str:
        return f"http://{self.entry}{path}"

    def page(
        self, path: str, body: bytes = b"", *, status: int = 200, kind: str = "text/plain", **headers: str
    ) -> str:
        """Let `path` answer with these; returns its URL."""
        named = {"Content-Type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}

        async def answer(request: web.Request) -> web.Response:
            return web.Response(body=body, status=status, headers=named)

        self.pages[path] = answer
        return self.url(path)

    def redirect(self, path: str, to: str, status: int = 302) -> str:
        return self.page(path, status=status, Location=to)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        await request.read()  # it stays with the request
        return await self.pages[request.path](request)


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Have `site` served."""

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", site._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, site.host, site.port).start()
        site.port = runner.addresses[0][1]
        return runner

    runner = LOOP.run(start())
    yield site
    LOOP.run(runner.cleanup())


@contextmanager
def saying(*said: bytes, pause: float = 0.0) -> Iterator[str]:
    """A server that answers whatever is asked with the bytes `said`, with pauses between them, and hangs up;
    yields its "host:port".
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            for part in said:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
        except ConnectionError:  # the client has seen enough
            pass
        writer.close()

    server = LOOP.run(asyncio.start_server(answer, "127.0.0.1", 0))
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def stop() -> None:
        server.close()

    LOOP.run(stop())
