"""`mem1 data`, `mem1 view` and `mem1 retrieve`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from question_rows import HOTPOTQA

from mem1.cli import main
from mem1.train import checkpoint


def test_the_list_has_licence_source_and_checksum(capsys):
    assert main(["data"]) == 0
    said = capsys.readouterr().out
    for words in (
        "hotpotqa",
        "CC BY-SA 4.0",
        "curtis.ml.cmu.edu",
        "musique",
        "webshop",
        "no checksum is published",
    ):
        assert words in said
    assert len(re.findall(r"sha256 [0-9a-f]{64}", said)) >= 10
    assert main(["data", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"name", "licence", "source", "files"} <= rows[0].keys()
    assert all(len(digest["sha256"]) == 64 for row in rows for f in row["files"] for digest in f["digests"])


def test_a_folder_is_checked_and_what_is_broken_is_an_error(capsys, tmp_path):
    row = json.dumps({"question": "who?", "answer": ["ada"]})
    (tmp_path / "NQ-open.dev.jsonl").write_text(f"{row}\n{row}\n")
    assert main(["data", "--check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"nq-open \|.*NQ-open.dev.jsonl \| +differs \| +2 \|", said)
    (tmp_path / "NQ-open.dev.jsonl").write_text(f"{row}\nnonsense\n")
    assert main(["data", "--check", str(tmp_path), "--json"]) == 2
    said = capsys.readouterr()
    assert "NQ-open.dev.jsonl:2: expected a line of JSON" in said.err
    assert json.loads(said.out)["checksum"] == "differs"
    (tmp_path / "empty").mkdir()
    assert main(["data", "--check", str(tmp_path / "empty")]) == 2
    assert "check: expected a folder with a file of a known data set" in capsys.readouterr().err


def test_a_file_is_converted_and_played(capsys, tmp_path):
    pytest.importorskip("bm25s")
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps(HOTPOTQA))
    made = ["data", "--convert", "hotpotqa", "--source", str(tmp_path / "hotpot_dev_distractor_v1.json")]
    assert main([*made, "--out", str(tmp_path / "made")]) == 0
    assert re.search(r"^\d+ questions, \d+ passages are in ", capsys.readouterr().out, re.M)
    qa = [json.loads(line) for line in (tmp_path / "made" / "qa.jsonl").read_text().splitlines()]
    corpus = {
        json.loads(line)["id"] for line in (tmp_path / "made" / "corpus.jsonl").read_text().splitlines()
    }
    assert qa and all({*row["support"]} <= corpus for row in qa)
    arguments = {name: str(tmp_path / "made" / f"{name}.jsonl") for name in ("corpus",)}
    arguments |= {"questions": str(tmp_path / "made" / "qa.jsonl"), "held_out": 1.0}
    played = ["eval", "--agents", "oracle", "--env", "retrieval-qa", "--objectives", "1", "--episodes", "1"]
    played += ["--environment-args", json.dumps(arguments), "--out", str(tmp_path / "eval")]
    assert main(played) == 2
    assert "model: expected one: its tokenizer counts the tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--convert", "hotpotqa"], "source: expected a path beside convert, got None"),
        (["--convert", "webshop", "--source", "x", "--out", "y"], "name: expected one of "),
        (
            ["--convert", "hotpotqa", "--source", "nope.json", "--out", "y"],
            "path: expected a file that can",
        ),
        (["--source", "x"], "source: expected none without convert"),
        (["--check", "nowhere"], "folder: expected a folder, got 'nowhere'"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not [*tmp_path.iterdir()]


def test_trajectories_become_a_page(make_model, tokenizer, capsys, tmp_path, monkeypatch):
    model = str(checkpoint.save(tmp_path / "model", make_model(), tokenizer))
    saved = tmp_path / "played.jsonl"
    few = ["--episodes", "2", "--max-turns", "2", "--expert", "--out", str(saved)]
    assert main(["rollout", "--model", model, *few]) == 0
    assert main(["view", str(saved)]) == 0
    assert f"2 trajectories are in {tmp_path / 'played.html'}" in capsys.readouterr().out
    page = (tmp_path / "played.html").read_text()
    assert "Content-Security-Policy" in page and "<title>played</title>" in page
    saved.write_text(re.sub(r'"model": "[^"]*"', '"model": ""', saved.read_text()))
    assert main(["view", str(saved)]) == 2
    assert (
        "tokenizer: expected --tokenizer FOLDER, as the trajectories name no model" in capsys.readouterr().err
    )
    assert main(["view", str(saved), "--tokenizer", model, "--out", str(tmp_path / "b.html")]) == 0
    assert main(["view", str(saved), "--tokenizer", model, "--out", str(saved)]) == 2
    assert "out: expected another file than the trajectories" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["view", "played.jsonl", "--tokenizer", model, "--out", str(saved)]) == 2, "by another name"
    (tmp_path / "precious.txt").write_text("mine")
    assert main(["view", str(saved), "--tokenizer", model, "--out", str(tmp_path / "precious.txt")]) == 2
    assert "out: expected a new file, or one that ends in .html" in capsys.readouterr().err
    assert (tmp_path / "precious.txt").read_text() == "mine" and saved.read_text().startswith("{")
    saved.write_text(saved.read_text().splitlines()[0] + "\n{}\n")
    assert main(["view", str(saved), "--tokenizer", model]) == 2
    assert "played.jsonl:2: " in capsys.readouterr().err
    for nothing in (str(tmp_path / "nowhere.jsonl"), "/", ""):
        assert main(["view", nothing]) == 2
        assert "trajectories: expected a file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_corpus_is_served_until_a_signal(tmp_path, signum):
    pytest.importorskip("bm25s")
    pytest.importorskip("aiohttp")
    (tmp_path / "corpus.jsonl").write_text(
        json.dumps({"id": "1", "contents": '"Oslo"\nOslo is a capital.'}) + "\n"
    )
    command = [sys.executable, "-u", "-m", "mem1", "retrieve", str(tmp_path / "corpus.jsonl"), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout is not None
    lines = [server.stdout.readline(), server.stdout.readline()]
    assert lines[0] == "1 passages\n" and lines[1].startswith("listening at http://127.0.0.1:")
    body = json.dumps({"queries": ["capital"], "topk": 1, "return_scores": True}).encode()
    url = lines[1].split()[-1]
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert json.load(reply)["result"][0][0]["document"]["id"] == "1"
    server.send_signal(signum)
    assert server.wait(20) == 0
    assert "Traceback" not in server.stderr.read()  # type: ignore[union-attr]


def test_a_corpus_that_is_none_is_one_line(capsys, tmp_path):
    pytest.importorskip("bm25s")
    pytest.importorskip("aiohttp")
    for path, text in ((tmp_path / "nowhere.jsonl", None), (tmp_path / "bad.jsonl", "{}\n")):
        if text is not None:
            path.write_text(text)
        assert main(["retrieve", str(path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("mem1 retrieve: ") and said.count("\n") == 1
    assert not Path(tmp_path / "nowhere.jsonl.index").exists()
