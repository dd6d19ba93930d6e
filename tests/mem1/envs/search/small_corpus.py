"""A corpus of passages with a word of their own each, servers in this process and in one of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from mem1.envs.search.retriever import Passage

SERVER = """
import sys
from mem1.envs.search.bm25 import BM25Retriever
from mem1.envs.search.retrieval_server import ServerConfig, run_server

retriever = BM25Retriever.open(sys.argv[1])
run_server(retriever, ServerConfig(port=int(sys.argv[2])), lambda url: print(url, flush=True))
"""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_towns(path: Path, count: int) -> Path:
    """Passage n is about town n, a word that occurs nowhere else."""
    rows = ({"id": f"p{n}", "contents": f'"town{n}"\nA town on a river, number {n}.'} for n in range(count))
    return write_rows(path, rows)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A fresh Python that knows the modules of this one."""
    variables = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_server(corpus: Path, port: int = 0) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, which listens, and its URL."""
    process = python(SERVER, corpus, port)
    assert process.stdout is not None and process.stderr is not None
    url = process.stdout.readline().strip()
    assert url, process.stderr.read()
    return process, url


@asynccontextmanager
async def answering(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """The URL of a server that answers every request with `handler`."""
    application = web.Application()
    application.router.add_route("*", "/retrieve", handler)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/retrieve"
    finally:
        await runner.cleanup()


class Recorded:
    """A retriever whose passages name the query; `fail` is raised for a query of that text."""

    def __init__(self, fail: str = "") -> None:
        self.calls: list[tuple[list[str], int]] = []
        self._fail = fail

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        self.calls.append((list(queries), top_k))
        if self._fail in queries:
            raise ZeroDivisionError("no such luck")
        return [[Passage(f"{n}", f"{query} {n}", 9.0 - n) for n in range(top_k)] for query in queries]
