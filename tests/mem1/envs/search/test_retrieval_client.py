"""The retrieval protocol as a client speaks it: both shapes, and every way in which a server can fail."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from aiohttp import web
from small_corpus import Recorded, answering

from mem1.checks import InputError
from mem1.envs.search.retrieval_client import RetrievalClient, RetrievalError
from mem1.envs.search.retrieval_server import ServerConfig, serve
from mem1.envs.search.retriever import MAX_QUERY_CHARS, Passage
from mem1.runtime.event_loop import EVENT_LOOP

BARE = {"id": "7", "contents": '"Oslo"\nA town.'}
GOOD = {"document": BARE, "score": 1.5}


def searched(handler, queries=("a",), top_k=3, **settings):
    """What a client finds on a server that answers with `handler`."""

    async def main():
        async with answering(handler) as url:
            client = RetrievalClient(url, **settings)
            try:
                return await client.search(queries, top_k)
            finally:
                await client.close()

    return asyncio.run(main())


def always(status=200, body=b"", headers=None):
    async def handler(request):
        return web.Response(status=status, body=body, headers=headers)

    return handler


def result(*found):
    return json.dumps({"result": list(found)}).encode()


def test_both_shapes_are_read():
    body = result([GOOD, {"document": {"id": 8, "contents": "x", "url": "y"}, "score": 1}], [BARE], [])
    assert searched(always(body=body), "abc") == [
        [Passage("7", BARE["contents"], 1.5), Passage("8", "x", 1.0)],
        [Passage("7", BARE["contents"], 0.0)],
        [],
    ]


def test_it_asks_as_the_protocol_says():
    asked = []

    async def handler(request):
        asked.append((request.method, request.content_type, await request.json()))
        return web.json_response({"result": [[], []]})

    queries = ["Röntgen \ud800 </info>\0", "x" * 10_000_000]
    assert searched(handler, queries, 5) == [[], []]
    expected = {"queries": [queries[0], "x" * MAX_QUERY_CHARS], "topk": 5, "return_scores": True}
    assert asked == [("POST", "application/json", expected)]
    assert searched(handler, []) == [] and len(asked) == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "JSON, got ''"),
        (b"<html>busy</html>", "JSON, got '<html>"),
        (b"\xff\xfe{", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[]", 'an object with a list "result", got []'),
        (b'{"result": {"0": []}}', 'an object with a list "result"'),
        (b'{"error": "x"}', "an object with a list \"result\", got {'error': 'x'}"),
        (result(), "results of 1 queries, got 0"),
        (result([], []), "results of 1 queries, got 2"),
        (result("x"), "a list of passages, got 'x'"),
        (result([BARE] * 4), "at most 3 passages of a query, got 4"),
        (result(["x"]), "a passage, got 'x'"),
        (result([None]), "a passage, got None"),
        (result([{"document": "x"}]), "a document, got 'x'"),
        (result([{"id": "7"}]), "contents that are a text, got None"),
        (result([{"document": {"contents": ["x"]}}]), "contents that are a text, got ['x']"),
        (result([BARE | {"id": None}]), "an id, got None"),
        (result([BARE | {"id": [1]}]), "an id, got [1]"),
        (result([GOOD | {"score": "1"}]), "a finite score, got '1'"),
        (result([GOOD | {"score": None}]), "a finite score, got None"),
        (result([GOOD | {"score": True}]), "a finite score, got True"),
        (result([GOOD | {"score": float("nan")}]), "a finite score, got nan"),
        (result([GOOD | {"score": float("-inf")}]), "a finite score, got -inf"),
        (result([GOOD | {"score": 10**400}]), "a finite score, got 1000"),
    ],
)
def test_nonsense_is_named(body, expected):
    with pytest.raises(RetrievalError) as caught:
        searched(always(body=body))
    assert str(caught.value).startswith(f"retrieval: expected {expected}")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("status", [301, 400, 404, 413, 500])
def test_a_refusal_is_named_and_not_repeated(status):
    count = 0

    async def handler(request):
        nonlocal count
        count += 1
        return web.Response(status=status, text='{"error": "why"}', headers={"Location": "/elsewhere"})

    with pytest.raises(RetrievalError, match=f"retrieval: expected status 200, got {status}, .*why"):
        searched(handler)
    assert count == 1


@pytest.mark.parametrize("declared", [True, False], ids=["length", "chunks"])
def test_a_large_answer_is_not_read(declared):
    sent = 0

    async def handler(request):
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Length": str(1 << 30)} if declared else {})
        await response.prepare(request)
        for _ in range(10_000):
            await response.write(b"x" * 100_000)
            sent += 100_000
        return response

    with pytest.raises(RetrievalError, match="expected at most 1000000 bytes, got more"):
        searched(handler, max_response_bytes=1_000_000)
    assert sent < 50_000_000


def test_compression_is_not_asked_for_and_not_unpacked():
    async def handler(request):
        assert request.headers["Accept-Encoding"] == "identity"
        response = web.Response(body=result([GOOD]))
        response.enable_compression(web.ContentCoding.gzip)
        return response

    with pytest.raises(RetrievalError, match="expected JSON, got"):
        searched(handler)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_server_that_is_not_available_is_asked_again(status):
    times = []

    async def handler(request):
        times.append(time.monotonic())
        if len(times) < 3:
            return web.Response(status=status, headers={"Retry-After": "0"})
        return web.Response(body=result([GOOD]))

    assert searched(handler) == [[Passage("7", BARE["contents"], 1.5)]]
    assert len(times) == 3 and times[1] - times[0] >= 0.025 and times[2] - times[1] >= 0.05


def test_it_waits_as_long_as_the_server_says():
    times = []

    async def handler(request):
        times.append(time.monotonic())
        if len(times) == 1:
            return web.Response(status=503, headers={"Retry-After": "1"})
        return web.Response(body=result([GOOD]))

    searched(handler)
    assert times[1] - times[0] >= 1.0


@pytest.mark.parametrize("after", ["3600", "-1", "soon", "9" * 400])
def test_once_its_time_is_over_the_last_reason_is_named(after):
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"within 0\.3 s, got none: status 503, 'busy'"):
        searched(always(503, b"busy", {"Retry-After": after}), timeout=0.3)
    assert time.monotonic() - began < 2.0


def spoken(answer: bytes | None, **settings):
    """The client of a server that says `answer` on each connection, whatever it is asked, and hangs up; that
    says nothing and stays, for None."""

    async def main():
        connections = 0

        async def talk(reader, writer):
            nonlocal connections
            connections += 1
            await reader.readuntil(b"\r\n\r\n")
            if answer is None:
                await reader.read()
            else:
                writer.write(answer)
            writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        client = RetrievalClient(
            f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/retrieve", **settings
        )
        try:
            await client.search(["a"], 3)
        finally:
            await client.close()
            server.close()
            assert connections >= settings.get("connections", 1)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "Disconnected"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "Disconnected|Payload"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{", "Payload"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n900\r\n{", "Payload"),
        (None, "nothing for 0.1 s"),
    ],
    ids=["no answer", "half a head", "half a body", "half a chunk", "silence"],
)
def test_a_connection_that_breaks_is_a_connection_error(answer, reason):
    with pytest.raises(ConnectionError, match=f"within 0.5 s, got none: .*({reason})"):
        spoken(answer, timeout=0.5, attempt_timeout=0.1)


def test_what_is_not_http_is_named():
    with pytest.raises(RetrievalError, match="retrieval: expected an answer in HTTP, got"):
        spoken(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")


def test_nobody_there_is_a_connection_error():
    with pytest.raises(ConnectionError, match="within 0.2 s, got none: .*Cannot connect"):
        asyncio.run(RetrievalClient("http://127.0.0.1:9/retrieve", timeout=0.2).search(["a"], 1))


def test_secrets_of_a_url_are_not_told():
    client = RetrievalClient("http://me:secret@127.0.0.1:9/retrieve?key=secret", timeout=0.2)
    with pytest.raises(ConnectionError, match="answer from http://127.0.0.1:9/retrieve within") as error:
        asyncio.run(client.search(["a"], 1))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"url": "localhost:8000"}, "url: expected http://... or https://..."),
        ({"url": "http://"}, "url: expected http://... or https://..., got 'http://'"),
        ({"url": "http://[::1"}, "url: expected http"),
        ({"url": 5}, "url: expected http"),
        ({"timeout": 0}, "timeout: expected seconds > 0"),
        ({"attempt_timeout": -1}, "attempt_timeout: expected seconds > 0"),
        ({"max_response_bytes": 0}, "max_response_bytes: expected a number > 0"),
    ],
)
def test_arguments_out_of_range_are_named(settings, expected):
    with pytest.raises(InputError, match=expected):
        RetrievalClient(**({"url": "http://x/retrieve"} | settings))
    with pytest.raises(InputError, match="top_k: expected a number >= 1"):
        asyncio.run(RetrievalClient("http://x/retrieve").search(["a"], 0))


def test_one_client_on_the_loops_of_several_threads():
    async def main():
        ready = asyncio.get_running_loop().create_future()
        server = asyncio.create_task(serve(Recorded(), ServerConfig(port=0), ready.set_result))
        client = RetrievalClient(await ready)

        def elsewhere():
            try:
                return EVENT_LOOP.run(client.search(["there"], 1))
            finally:
                EVENT_LOOP.run(client.close())

        here, there = await asyncio.gather(client.search(["here"], 1), asyncio.to_thread(elsewhere))
        await client.close()
        again = await client.search(["again"], 1)
        await client.close()
        server.cancel()
        return [found[0][0].contents for found in (here, there, again)]

    assert asyncio.run(main()) == ["here 0", "there 0", "again 0"]
