"""The retrieval protocol as a server speaks it."""

from __future__ import annotations

import asyncio
import signal
import socket

import aiohttp
import pytest
from small_corpus import Recorded, start_server, write_towns

from mem1.checks import InputError
from mem1.envs.search.retrieval_server import ServerConfig, serve


def served(work, retriever=None, **settings):
    """What `work(session, url)` gives beside a server in this process."""

    async def main():
        ready = asyncio.get_running_loop().create_future()
        config = ServerConfig(port=0, **settings)
        server = asyncio.create_task(serve(retriever or Recorded(), config, ready.set_result))
        done, _ = await asyncio.wait({ready, server}, return_when=asyncio.FIRST_COMPLETED)
        assert ready in done, server.exception()
        try:
            async with aiohttp.ClientSession() as session:
                return await asyncio.wait_for(work(session, ready.result()), 20)
        finally:
            server.cancel()
            await asyncio.wait({server})
            assert server.cancelled()

    return asyncio.run(main())


def posted(body, retriever=None, **settings):
    """Status and answer; of an answer that is no JSON its text."""

    async def work(session, url):
        data = {"data": body} if isinstance(body, (bytes, str)) else {"json": body}
        async with session.post(url, **data) as response:
            is_json = response.content_type == "application/json"
            return response.status, await (response.json() if is_json else response.text())

    return served(work, retriever, **settings)


def test_with_scores_and_without():
    asked = {"queries": ["oslo", "rome"], "topk": 2}
    documents = [[{"id": f"{n}", "contents": f"{town} {n}"} for n in range(2)] for town in ("oslo", "rome")]
    assert posted(asked) == posted(asked | {"return_scores": False}) == (200, {"result": documents})
    scored = [
        [{"document": document, "score": 9.0 - n} for n, document in enumerate(found)] for found in documents
    ]
    assert posted(asked | {"return_scores": True}) == (200, {"result": scored})


def test_what_a_request_leaves_out():
    retriever = Recorded()
    assert (
        len(posted({"queries": ["a"], "topk": None, "return_scores": None}, retriever)[1]["result"][0]) == 3
    )
    assert len(posted({"queries": ["a"]}, retriever, top_k=5)[1]["result"][0]) == 5
    assert posted({"queries": []}, retriever) == (200, {"result": []})
    assert [top_k for _, top_k in retriever.calls] == [3, 5]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "body: expected JSON"),
        ("{", "body: expected JSON"),
        (b'{"queries": ["\xff"]}', "body: expected JSON"),
        ("[" * 100_000, "body: expected JSON"),
        (["a"], "body: expected an object, got 'list'"),
        ({}, "queries: expected a list of texts, got 'NoneType'"),
        ({"queries": "a"}, "queries: expected a list of texts, got 'str'"),
        ({"queries": ["a", 7]}, "queries: expected a list of texts"),
        ({"queries": ["a"] * 9}, "queries: expected at most 8, got 9"),
        ({"queries": ["a"], "topk": 0}, "topk: expected an integer from 1 to 100, got 0"),
        ({"queries": ["a"], "topk": 101}, "topk: expected an integer from 1 to 100, got 101"),
        ({"queries": ["a"], "topk": True}, "topk: expected an integer from 1 to 100, got True"),
        ({"queries": ["a"], "topk": "3"}, "topk: expected an integer from 1 to 100, got 'str'"),
        ({"queries": ["a"], "topk": 2.0}, "topk: expected an integer from 1 to 100, got 'float'"),
        ({"queries": ["a"], "return_scores": 1}, "return_scores: expected true or false, got 'int'"),
    ],
)
def test_a_wrong_request_is_refused_with_the_reason(body, reason):
    retriever = Recorded()
    status, answer = posted(body, retriever, max_queries=8)
    assert status == 400 and answer["error"].startswith(reason)
    assert retriever.calls == []


def test_a_large_body_is_refused():
    status, answer = posted({"queries": ["a" * 2000]}, max_body_bytes=1000)
    assert status == 413 and "1000" in answer
    assert posted({"queries": ["a" * 900]}, max_body_bytes=1000)[0] == 200


def test_clients_that_hang_up_or_pack_badly_disturb_nobody(caplog):
    async def work(session, url):
        port = int(url.rpartition(":")[2].partition("/")[0])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()
        await asyncio.sleep(0.1)
        assert not [record for record in caplog.records if record.exc_info]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n"
        writer.write(head + b"Connection: close\r\n\r\nnone")
        said = await reader.read()
        assert said.startswith(b"HTTP/1.1 400") and b"body: expected one that can be read, got " in said
        writer.close()
        async with session.post(url, json={"queries": ["good"]}) as response:
            assert response.status == 200

    served(work)


def test_paths_and_methods():
    async def work(session, url):
        base = url.removesuffix("/retrieve")
        async with session.get(f"{base}/health") as response:
            assert (response.status, await response.json()) == (200, {"status": "ok", "pending": 0})
        async with session.get(url) as response:
            assert response.status == 405
        async with session.post(f"{base}/other") as response:
            assert response.status == 404

    served(work)


def test_a_retriever_that_fails_is_named_and_the_server_goes_on():
    async def work(session, url):
        async with session.post(url, json={"queries": ["bad"]}) as response:
            assert response.status == 500
            assert await response.json() == {"error": "ZeroDivisionError: no such luck"}
        async with session.post(url, json={"queries": ["good"]}) as response:
            assert response.status == 200

    served(work, Recorded(fail="bad"))


def test_too_much_to_do_is_refused_and_the_rest_served():
    async def work(session, url):
        async def ask(n):
            async with session.post(url, json={"queries": [f"{n}"], "topk": 1}) as response:
                return response.status, response.headers.get("Retry-After"), await response.json()

        return await asyncio.gather(*(ask(n) for n in range(12)))

    answers = served(work, max_pending=4, max_queries=4, max_wait_ms=200)
    refused = [answer for answer in answers if answer[0] == 503]
    assert len(refused) == 8
    assert all(after == "1" and "at most 4 queries" in answer["error"] for _, after, answer in refused)
    assert all(status in (200, 503) for status, _, _ in answers)


def test_requests_under_way_are_answered_when_the_server_is_stopped(tmp_path):
    process, url = start_server(write_towns(tmp_path / "corpus.jsonl", 5))
    with process:

        async def main():
            async with aiohttp.ClientSession() as session:

                async def ask(n):
                    async with session.post(url, json={"queries": [f"town{n}"] * 1000}) as response:
                        return response.status, len((await response.json())["result"])

                asks = [asyncio.create_task(ask(n)) for n in range(4)]
                health = url.replace("retrieve", "health")
                while True:
                    async with session.get(health) as response:
                        if (await response.json())["pending"]:
                            break
                process.send_signal(signal.SIGTERM)
                return await asyncio.gather(*asks)

        assert asyncio.run(main()) == [(200, 1000)] * 4
        assert process.wait(10) == 0
        assert process.stderr.read() == ""


def test_an_address_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"expected a free address, got 127.0.0.1:{port}"):
            asyncio.run(serve(Recorded(), ServerConfig(port=port)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"host": ""}, "host: expected a name or an address, got ''"),
        ({"port": 65536}, "port: expected an integer from 0 to 65535"),
        ({"max_batch_size": 0}, "max_batch_size: expected an integer >= 1"),
        ({"max_wait_ms": -1}, "max_wait_ms: expected a finite number >= 0"),
        ({"top_k": 101}, "top_k: expected at most max_top_k, 100, got 101"),
        ({"max_queries": 5000}, "max_queries: expected at most max_pending, 4096, got 5000"),
    ],
)
def test_settings_out_of_range_are_named(settings, expected):
    with pytest.raises(InputError, match=expected):
        ServerConfig(**settings)
    assert ServerConfig().host == "127.0.0.1"
