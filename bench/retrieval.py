"""Retrieval on real questions, as Markdown tables: recall, speed in this process, and a server with many
clients that is killed and started again in the middle.

    python bench/retrieval.py DATA/qa [--dense MODEL] [--clients 64] [--searches 20]

DATA/qa has corpus.jsonl and qa.jsonl. Recall is the share of a question's supporting passages among the
first 3 and 10, the mean over the questions of a data set (of NQ the first 500). A latency is what a client
waits for one query, retries included; clients, server and the rest of the machine share its CPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mem1.envs.search.bm25 import BM25Retriever
from mem1.envs.search.retrieval_client import RetrievalClient, RetrievalError
from mem1.envs.search.retriever import Passage

# Of bm25s with a stemmer and its own settings (k1 1.5, b 0.75), top 3 and 10.
ANCHORS = {"nq": (0.866, 0.908), "hotpotqa": (0.662, 0.860), "musique": (0.427, 0.557)}
QUESTIONS = 500
TOP = (3, 10)

SERVER = """
import sys
from mem1.envs.search.bm25 import BM25Retriever
from mem1.envs.search.retrieval_server import ServerConfig, run_server

retriever = BM25Retriever.open(sys.argv[1], sys.argv[2])
run_server(retriever, ServerConfig(port=int(sys.argv[3])), lambda url: print(url, flush=True))
"""


class Served(NamedTuple):
    """What the clients of a server have seen."""

    seconds: float
    latencies: list[float]  # of those that were answered
    lost: int
    wrong: int
    down: float  # seconds between the kill and the moment from which the new server listens


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print(f"\n### {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def recall(questions: Sequence[dict[str, Any]], found: Sequence[Sequence[Passage]], top_k: int) -> float:
    shares = [
        len({str(name) for name in row["support"]} & {passage.id for passage in passages[:top_k]})
        / len(row["support"])
        for row, passages in zip(questions, found, strict=True)
    ]
    return statistics.fmean(shares)


def measure_recall(name: str, retriever: Any, data: dict[str, list[dict[str, Any]]]) -> None:
    rows, asked, began = [], 0, time.perf_counter()
    for dataset, questions in data.items():
        found = retriever.search([row["question"] for row in questions], max(TOP))
        asked += len(questions)
        shares = [f"{recall(questions, found, top_k):.3f}" for top_k in TOP]
        rows.append((dataset, len(questions), *shares, *(f"{share:.3f}" for share in ANCHORS[dataset])))
    seconds = time.perf_counter() - began
    header = ("data set", "questions", *(f"recall@{k}" for k in TOP), *(f"anchor@{k}" for k in TOP))
    table(f"{name}: {asked / seconds:,.0f} questions/s in this process", header, rows)


def start_server(corpus: Path, index: Path, port: int) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-c", SERVER, str(corpus), str(index), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    if not url:
        raise SystemExit("the server has not started")
    return process, url


async def measure_server(
    corpus: Path,
    index: Path,
    questions: Sequence[str],
    right: Sequence[Sequence[Passage]],
    clients: int,
    kill: bool,
) -> Served:
    """`clients` at once; they share the questions, each of which must get what `right` has for it."""
    process, url = start_server(corpus, index, 0)
    latencies: list[float] = []
    lost, wrong, down = 0, 0, 0.0

    async def client(first: int) -> None:
        nonlocal lost, wrong
        retrieval = RetrievalClient(url, timeout=60.0)
        try:
            for n in range(first, len(questions), clients):
                began = time.perf_counter()
                try:
                    (found,) = await retrieval.search([questions[n]], TOP[0])
                except (RetrievalError, ConnectionError):
                    lost += 1
                    continue
                latencies.append(time.perf_counter() - began)
                wrong += found != right[n]
        finally:
            await retrieval.close()

    async def restart() -> None:
        nonlocal process, down
        while len(latencies) < len(questions) // 2:
            await asyncio.sleep(0.001)
        process.kill()
        began = time.perf_counter()
        process.wait()
        port = urlsplit(url).port or 0
        process, _ = await asyncio.to_thread(start_server, corpus, index, port)
        down = time.perf_counter() - began

    try:
        began = time.perf_counter()
        await asyncio.gather(*(client(first) for first in range(clients)), *([restart()] if kill else []))
        return Served(time.perf_counter() - began, latencies, lost, wrong, down)
    finally:
        process.terminate()
        process.wait()


def measure_servers(
    corpus: Path, index: Path, questions: Sequence[str], right: Sequence[Sequence[Passage]], clients: int
) -> None:
    rows = []
    for name, kill in (("as it is", False), ("killed (SIGKILL) and started again", True)):
        served = asyncio.run(measure_server(corpus, index, questions, right, clients, kill))
        ordered = sorted(served.latencies)
        shares = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95, 0.99)]
        speed = f"{len(ordered) / served.seconds:,.0f}"
        rows.append(
            (name, len(questions), served.lost, served.wrong, f"{served.down:.2f}", speed)
            + tuple(f"{1000 * share:.0f}" for share in shares)
        )
    header = ("server", "queries", "lost", "wrong", "down, s", "queries/s", "p50, ms", "p95, ms", "p99, ms")
    table(f"A server of its own process, {clients} clients", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="the folder with corpus.jsonl and qa.jsonl")
    parser.add_argument("--dense", metavar="MODEL", help="measure dense retrieval too, with this model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--searches", type=int, default=20, help="of each client")
    options = parser.parse_args()
    corpus = options.data / "corpus.jsonl"
    with (options.data / "qa.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    data = {name: [row for row in rows if row["dataset"] == name][:QUESTIONS] for name in ANCHORS}
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder)
        times = []
        for _ in range(2):
            began = time.perf_counter()
            bm25 = BM25Retriever.open(corpus, index)
            times.append(f"{time.perf_counter() - began:.2f}")
        print(f"{len(bm25):,} passages, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}")
        print(f"BM25 index made in {times[0]} s, opened in {times[1]} s")
        measure_recall("BM25 (k1 0.9, b 0.4)", bm25, data)
        measure_recall("BM25 (k1 1.5, b 0.75)", BM25Retriever.open(corpus, index, k1=1.5, b=0.75), data)
        asked = [row["question"] for row in rows]
        questions = (asked * (1 + options.clients * options.searches // len(asked)))[
            : options.clients * options.searches
        ]
        measure_servers(corpus, index, questions, bm25.search(questions, TOP[0]), options.clients)
        if options.dense:
            from mem1.envs.search.dense import DenseRetriever

            began = time.perf_counter()
            dense = DenseRetriever.open(corpus, options.dense, index)
            print(f"\nDense index made in {time.perf_counter() - began:.0f} s")
            measure_recall(f"Dense ({options.dense})", dense, data)


if __name__ == "__main__":
    main()
