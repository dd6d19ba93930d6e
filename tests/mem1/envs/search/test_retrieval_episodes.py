"""A search server that fails, seen from a rollout: each episode ends for a named reason of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mem1.checks import InputError
from mem1.config import RolloutConfig
from mem1.envs.qa.questions import Question
from mem1.envs.qa.retrieval_qa import RetrievalQAEnv
from mem1.envs.worlds import open_world
from mem1.rollout.rollout_loop import rollout
from mem1.runtime.event_loop import EVENT_LOOP

pytest.importorskip("aiohttp")

from mem1.envs.search.retrieval_client import RetrievalClient  # noqa: E402

# Words of the toy's tokenizer: others would not come through it.
WORDS = {"sound": "boss", "error": "rival", "nonsense": "coach"}
QUESTIONS = [Question(name, f"ada {word} ?", ("carla",), support=("1",)) for name, word in WORDS.items()]


class Answers(BaseHTTPRequestHandler):
    """Right for one question, wrong for the others."""

    def do_POST(self) -> None:
        (query,) = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        passage = {"document": {"id": "1", "contents": '"ada"\ncarla'}, "score": 1.0}
        body = b"<html>" if "coach" in query else json.dumps({"result": [[passage]]}).encode()
        self.send_response(500 if "rival" in query else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *said: object) -> None:
        """Nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/retrieve"
    server.shutdown()
    server.server_close()


def play(make_model, tokenizer, client: RetrievalClient) -> dict[str, tuple[str, str, float]]:
    config = RolloutConfig(max_turns=6, max_action_tokens=128, env_retries=0, episode_retries=0)
    make = lambda: RetrievalQAEnv(None, client)  # noqa: E731
    played = rollout(make_model(), tokenizer, make, range(3), config, tasks=QUESTIONS, expert=True)
    found = {t.task: (t.error_kind, t.error, t.reward) for t in played}
    EVENT_LOOP.run(client.close())
    return found


def test_errors_and_nonsense_end_their_own_episode(make_model, tokenizer, url):
    found = play(make_model, tokenizer, RetrievalClient(url, timeout=2.0))
    assert found["sound"] == ("", "", 1.0)
    assert found["error"][0] == "RetrievalError" and "expected status 200, got 500" in found["error"][1]
    assert f"(of {url})" in found["error"][1] and "line" not in found["error"][1]
    assert found["nonsense"][0] == "RetrievalError" and "retrieval: expected" in found["nonsense"][1]


def test_nothing_ends_every_episode_in_time(make_model, tokenizer):
    found = play(make_model, tokenizer, RetrievalClient("http://127.0.0.1:9/retrieve", timeout=0.5))
    assert {kind for kind, _, _ in found.values()} == {"ConnectionError"}
    assert all("retrieval" in error and "0.5 s" in error for _, error, _ in found.values())


def test_a_server_that_does_not_answer_is_said_before_any_episode(url, monkeypatch, tmp_path):
    monkeypatch.setattr("mem1.envs.worlds._PROBE_SECONDS", 0.3)
    rows = [
        {"id": f"{n}", "question": "who ?", "golden_answers": ["carla"], "support": ["1"]} for n in range(3)
    ]
    questions = tmp_path / "qa.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"id": "1", "contents": '"ada"\ncarla'}) + "\n")
    arguments = {"questions": str(questions), "held_out": 1.0, "corpus": str(corpus)}
    down = "http://127.0.0.1:9/retrieve"
    expected = f"url: expected a server of the retrieval protocol, got .* answer from {down} within 0.3 s"
    with pytest.raises(InputError, match=expected):
        open_world("retrieval-qa", arguments | {"url": down}, objectives=1)
    # The corpus beside a url is for the oracle: it asks for titles, too.
    world = open_world("retrieval-qa", arguments | {"url": url}, objectives=1)
    environment = world.make()
    environment.reset(0, world.tasks[0])
    environment._asked.add("who ?")
    assert environment.expert_action().action.text == "ada"
