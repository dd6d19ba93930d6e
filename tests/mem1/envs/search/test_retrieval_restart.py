"""A server that is killed in the middle of the work of 64 clients, and started again: nothing is lost."""

from __future__ import annotations

import asyncio
import signal
from urllib.parse import urlsplit

from small_corpus import start_server, write_towns

from mem1.envs.search.retrieval_client import RetrievalClient

CLIENTS, SEARCHES = 64, 12


def test_nothing_is_lost(tmp_path):
    corpus = write_towns(tmp_path / "corpus.jsonl", CLIENTS * SEARCHES)
    process, url = start_server(corpus)
    port = urlsplit(url).port
    processes = [process]
    answers: list[tuple[int, list[str]]] = []
    answered_when_killed = []

    async def client(number: int) -> None:
        retrieval = RetrievalClient(url)
        try:
            for town in range(number * SEARCHES, (number + 1) * SEARCHES):
                (passages,) = await retrieval.search([f"the river of town{town}"], 1)
                answers.append((town, [passage.id for passage in passages]))
        finally:
            await retrieval.close()

    async def main() -> None:
        clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
        while len(answers) < CLIENTS * SEARCHES // 4:
            await asyncio.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(process.wait)
        answered_when_killed.append(len(answers))
        processes.append((await asyncio.to_thread(start_server, corpus, port))[0])
        await asyncio.gather(*clients)

    try:
        asyncio.run(asyncio.wait_for(main(), 60))
    finally:
        for started in processes:
            started.kill()
            started.communicate()
    assert 0 < answered_when_killed[0] < CLIENTS * SEARCHES / 2
    assert sorted(answers) == [(town, [f"p{town}"]) for town in range(CLIENTS * SEARCHES)]
