"""The server of the Search-R1/MEM1 retrieval protocol.

    POST /retrieve  {"queries": ["capital of Norway"], "topk": 1, "return_scores": true}
    200             {"result": [[{"document": {"id": "7", "contents": "\\"Oslo\\"\\nOslo .."}, "score": 9}]]}
                    without return_scores: {"result": [[{"id": "7", "contents": "..."}]]}
    400, 413        the request is wrong, or too large
    500             the retriever has failed
    503             there is too much to do; Retry-After says when to come again, in seconds
    GET /health     {"status": "ok", "pending": 0}

Answers other than 200 are {"error": "..."}, but for 413 and unknown paths. The server asks nobody who they
are: by default it listens on this machine only.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mem1.checks import InputError, require, require_integers, require_numbers
from mem1.envs.search.batching import Batcher, OverloadedError, SearchError
from mem1.envs.search.retriever import Passage, Retriever
from mem1.extras import extra

with extra("retrieval", "retrieval server"):
    from aiohttp import web
    from yarl import URL

RETRY_AFTER = 1  # seconds
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    """Where a retrieval server listens and what it takes on. InputError for a setting out of range."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    top_k: int = 3  # passages of a query for which the request does not say how many
    max_top_k: int = 100
    max_queries: int = 1024  # of one request
    max_batch_size: int = 64  # queries that are searched together
    max_wait_ms: float = 2.0  # for more of them
    max_pending: int = 4096  # queries at a time
    max_body_bytes: int = 16 << 20
    shutdown_timeout: float = 10.0  # seconds for requests under way when the server is stopped

    def __post_init__(self) -> None:
        named = isinstance(self.host, str) and bool(self.host.strip())
        require(named, "host", "a name or an address", self.host)
        require_integers(self, "port", 0, 65535)
        require_integers(self, "top_k max_top_k max_queries max_batch_size max_pending max_body_bytes", 1)
        require_numbers(self, "max_wait_ms shutdown_timeout")
        require(self.top_k <= self.max_top_k, "top_k", f"at most max_top_k, {self.max_top_k}", self.top_k)
        fits = self.max_queries <= self.max_pending
        require(fits, "max_queries", f"at most max_pending, {self.max_pending}", self.max_queries)


def run_server(
    retriever: Retriever, config: ServerConfig | None = None, ready: Callable[[str], None] | None = None
) -> None:
    """`serve` until SIGINT or SIGTERM, on the main thread. A second signal does not wait."""

    async def main() -> None:
        serving = asyncio.ensure_future(serve(retriever, config, ready))
        for signum in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signum, serving.cancel)
        with suppress(asyncio.CancelledError):
            await serving

    asyncio.run(main())


async def serve(
    retriever: Retriever, config: ServerConfig | None = None, ready: Callable[[str], None] | None = None
) -> None:
    """Serve until cancelled; requests under way are then answered first. ready: called with the URL of
    /retrieve once the server listens. InputError for an address that is not to be had.
    """
    config = config or ServerConfig()
    runner = web.AppRunner(
        _application(retriever, config), access_log=None, shutdown_timeout=config.shutdown_timeout
    )
    await runner.setup()
    try:
        await _listen(runner, config)
        if ready is not None:
            url = URL.build(scheme="http", host=config.host, port=runner.addresses[0][1], path="/retrieve")
            ready(str(url))
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, config: ServerConfig) -> None:
    try:
        await web.TCPSite(runner, config.host, config.port).start()
    except OSError as error:
        address = f"{config.host}:{config.port}"
        raise InputError(f"host and port: expected a free address, got {address}: {error}") from None


def _application(retriever: Retriever, config: ServerConfig) -> web.Application:
    batcher = Batcher(retriever, config.max_batch_size, config.max_wait_ms / 1000, config.max_pending)

    async def retrieve(request: web.Request) -> web.Response:
        try:
            body = await request.read()
        except (ConnectionError, web.RequestPayloadError) as error:  # the client is gone, or packs badly
            return _refusal(400, f"body: expected one that can be read, got {type(error).__name__}")
        try:
            queries, top_k, scores = parse_request(body, config)
            results = await batcher.search(queries, top_k) if queries else []
        except InputError as error:
            return _refusal(400, str(error))
        except OverloadedError as error:
            return _refusal(503, str(error), {"Retry-After": str(RETRY_AFTER)})
        except SearchError as error:
            _log.error("a search has failed", exc_info=error)
            return _refusal(500, str(error))
        entry = _scored if scores else _document
        return web.json_response({"result": [[entry(passage) for passage in found] for found in results]})

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "pending": batcher.pending})

    async def batching(application: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield  # until all requests are answered
        task.cancel()

    application = web.Application(client_max_size=config.max_body_bytes)
    application.add_routes([web.post("/retrieve", retrieve), web.get("/health", health)])
    application.cleanup_ctx.append(batching)
    return application


def parse_request(body: bytes, config: ServerConfig) -> tuple[Sequence[str], int, bool]:
    """Queries, how many passages of each, and whether with scores. InputError says what is wrong."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"body: expected JSON, got {body[:80]!r}: {error}") from None
    require(isinstance(asked, dict), "body", "an object", type(asked).__name__)
    queries, top_k, scores = asked.get("queries"), asked.get("topk"), asked.get("return_scores")
    top_k = config.top_k if top_k is None else top_k
    listed = isinstance(queries, list) and all(isinstance(query, str) for query in queries)
    require(listed, "queries", "a list of texts", type(queries).__name__)
    few = len(queries) <= config.max_queries
    require(few, "queries", f"at most {config.max_queries}", len(queries))
    whole = isinstance(top_k, int) and not isinstance(top_k, bool) and 1 <= top_k <= config.max_top_k
    require(
        whole,
        "topk",
        f"an integer from 1 to {config.max_top_k}",
        top_k if isinstance(top_k, int) else type(top_k).__name__,
    )
    flag = scores is None or isinstance(scores, bool)
    require(flag, "return_scores", "true or false", type(scores).__name__)
    return queries, top_k, bool(scores)


def _document(passage: Passage) -> dict[str, Any]:
    return {"id": passage.id, "contents": passage.contents}


def _scored(passage: Passage) -> dict[str, Any]:
    return {"document": _document(passage), "score": passage.score}


def _refusal(status: int, reason: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": reason}, status=status, headers=headers)
