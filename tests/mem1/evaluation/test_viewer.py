"""The viewer's page as a file: what it holds, and what it can never do."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tokenizers import byte_level
from transformers import PreTrainedTokenizerFast
from viewer_rows import HOSTILE, THREE_TURNS, Parsed, Part, make_trajectory, page_data, unpacked

from mem1.checks import InputError
from mem1.evaluation.viewer.page import read_trajectories, write_page
from mem1.metrics import EPISODE
from mem1.trajectory import FinishReason, TokenReward, Trajectory
from mem1_core.segments import Segment, by_policy

SOURCES = {
    path.name: path.read_text()
    for path in files("mem1.evaluation.viewer").iterdir()
    if path.name.endswith((".html", ".css", ".js"))
}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.html"


def test_a_page_holds_all_of_its_trajectories(tokenizer: PreTrainedTokenizerFast, page: Path) -> None:
    first = make_trajectory(tokenizer, score={"exact_match": 1.0}, rewards=[TokenReward(20, 0.5)], task="t-1")
    second = make_trajectory(tokenizer, prune="never", seed=7, rollout_logprobs=None)
    rows = [first.to_dict() | {"agent": "MEM1"}, second.to_dict()]
    assert write_page(rows, page, tokenizer=tokenizer) == 2
    data = page_data(page.read_text())
    ids = np.array(data["vocabulary"]["ids"])
    for record, trajectory in zip(data["trajectories"], (first, second), strict=True):
        places = unpacked(record["tokens"], "<u2")
        assert ids[places].tolist() == trajectory.tokens.tolist()
        assert "".join(data["vocabulary"]["pieces"][place] for place in places).split() == [
            word for part in THREE_TURNS for word in part.text.split()
        ]
        written = trajectory.policy_mask
        assert unpacked(record["logprobs"], "<f4").tolist() == trajectory.logprobs[written].tolist()
        evict = [end for *_, length, end, _ in record["parts"] for _ in range(length)]
        assert evict == trajectory.mask.evict_at[0].tolist()
        runs = [Segment(kind, turn, length) for kind, turn, length, _, _ in record["parts"]]
        assert runs == trajectory.segments
        assert all(policy == by_policy(kind) for kind, *_, policy in record["parts"])
        for name, value in EPISODE.items():
            assert record["metrics"][name] == value(trajectory)
    one, other = data["trajectories"]
    assert (one["name"], one["agent"], one["rewards"], one["metrics"]["exact_match"]) == (
        *("t-1", "MEM1"),
        *([[20, 0.5]], 1.0),
    )
    assert (other["name"], other["agent"], other["rollout_logprobs"]) == ("seed 7", "", None)
    assert (one["settings"]["prune"], other["settings"]["prune"]) == ("action", "never")
    drawn = unpacked(one["rollout_logprobs"], "<f4").tolist()
    assert drawn == (first.logprobs - 1 / 64)[first.policy_mask].tolist()


def test_lines_of_a_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, page: Path) -> None:
    rows = [make_trajectory(tokenizer, seed=seed).to_dict() for seed in range(3)]
    path = tmp_path / "trajectories.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    assert list(read_trajectories(path)) == rows
    tokenizer.save_pretrained(tmp_path / "model")
    write_page(read_trajectories(path), page, tokenizer=tmp_path / "model")
    other = tmp_path / "other.html"
    write_page(rows, other, tokenizer=tokenizer)
    assert page.read_bytes() == other.read_bytes()


def changed(row: dict[str, Any], **entries: Any) -> dict[str, Any]:
    return {name: value for name, value in (row | entries).items() if value is not ...}


BAD_ENTRIES: dict[str, dict[str, Any]] = {
    "no tokens": {"tokens": ...},
    "no rewards": {"rewards": ...},
    "a token too many": {"segments": [["prompt", 0, 10_000]]},
    "segments out of order": {
        "segments": [["info", 1, 1], ["prompt", 0, 1]],
        "tokens": [3, 3],
        "logprobs": [0, 0],
    },
    "segments that are none": {"segments": [3]},
    "tokens that are words": {"tokens": ["ada"]},
    "an id past 64 bits": {"tokens": [2**70], "logprobs": [0], "segments": [["prompt", 0, 1]]},
    "an unknown rule": {"prune": "forget"},
    "an unknown end": {"finish_reason": "tired"},
    "a score of words": {"score": {"reward": "much"}},
    "no score": {"score": []},
    "failures that are none": {"failures": [1]},
    "a reward behind the end": {"rewards": [[10_000, 1.0]]},
    "a reward that is a word": {"rewards": [[0, "x"]]},
    "a model that is a list": {"model": ["x"]},
    "objectives that are no number": {"objectives": float("nan")},
    "no list of invalid turns": {"invalid_turns": None},
    "an id below 0": {"tokens": [-1], "logprobs": [0], "segments": [["prompt", 0, 1]]},
    "an id past 32 bits": {"tokens": [2**62], "logprobs": [0], "segments": [["prompt", 0, 1]]},
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_malformed_rows_are_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, page: Path, case: str
) -> None:
    good = make_trajectory(tokenizer).to_dict()
    bad = changed(good, **BAD_ENTRIES[case])
    path = tmp_path / "trajectories.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(bad)}\n")
    page.write_text("the page of yesterday")
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}:3: expected a trajectory, got "):
        write_page(read_trajectories(path), page, tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"^trajectories\[1\]: expected a trajectory, got "):
        write_page([good, bad], page, tokenizer=tokenizer)
    assert page.read_text() == "the page of yesterday"
    assert sorted(tmp_path.iterdir()) == sorted([path, page])


@pytest.mark.parametrize("line", ["{", "[1]", "null", '{"tokens": [1'])
def test_lines_that_are_no_objects_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trajectories.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(InputError, match=re.escape(f"{path}:2: ")):
        list(read_trajectories(path))


def test_a_tokenizer_has_to_be_there(tmp_path: Path, page: Path) -> None:
    with pytest.raises(InputError, match=r"^tokenizer: expected a folder with a tokenizer.json, got"):
        write_page([], page, tokenizer=tmp_path)
    assert not page.exists()


def hostile_row(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Text of strangers wherever there can be some."""
    parts = (Part("prompt", 0, HOSTILE), Part("query", 1, HOSTILE), Part("info", 1, HOSTILE))
    trajectory = make_trajectory(
        tokenizer,
        parts,
        finish_reason=FinishReason.ENVIRONMENT_ERROR,
        notes={HOSTILE: HOSTILE},
        score={HOSTILE: 1.0},
        **{name: HOSTILE for name in ("error", "model", "task")},
    )
    return trajectory.to_dict() | {"agent": HOSTILE}


def test_text_stays_data(page: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([HOSTILE])  # the text of a single token
    write_page([hostile_row(tokenizer)], page, tokenizer=tokenizer, title=HOSTILE)
    html = page.read_bytes().decode("ascii")  # no character that ends a line of JavaScript, or is cut in two
    parsed = Parsed(html)
    data, script = parsed.texts("script")
    assert not set("<>&") & set(data)
    assert set(SOURCES) == {"viewer.html", "viewer.css", "records.js", "pictures.js", "turns.js", "viewer.js"}
    assert all(SOURCES[name] in script for name in SOURCES if name.endswith(".js"))
    assert "img" not in {tag for tag, _, _ in parsed.elements}
    assert parsed.texts("title") == parsed.texts("h1") == [HOSTILE]
    (record,) = page_data(html)["trajectories"]
    assert all(record[name] == HOSTILE for name in ("name", "agent", "error"))
    assert HOSTILE in page_data(html)["vocabulary"]["pieces"]


def test_only_its_own_script_and_style_may_run(tokenizer: PreTrainedTokenizerFast, page: Path) -> None:
    write_page([hostile_row(tokenizer)], page, tokenizer=tokenizer)
    parsed = Parsed(page.read_text())

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    (style,), (_, script) = parsed.texts("style"), parsed.texts("script")
    (policy,) = (
        attributes["content"]
        for tag, attributes, _ in parsed.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.split("; ") == [
        "default-src 'none'",
        f"script-src {source(script)}",
        f"style-src {source(style)}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    kinds = [attributes for tag, attributes, _ in parsed.elements if tag == "script"]
    assert kinds == [{"type": "application/json", "id": "data"}, {}]
    tags = [tag for tag, _, _ in parsed.elements]
    assert tags.index("meta") < tags.index("style")
    names = {name for _, attributes, _ in parsed.elements for name in attributes}
    assert not names & {"src", "href", "srcset", "action", "style"}
    assert not [name for name in names if name.startswith("on")]


@pytest.mark.parametrize("name", SOURCES)
def test_sources_name_nothing_outside(name: str) -> None:
    text = SOURCES[name].replace("http://www.w3.org/2000/svg", "")  # a name, never fetched
    outside = r"https?:|//\w+\.|url\(|@import|\bimport\b|\bfetch\b|XMLHttpRequest|WebSocket|sendBeacon|Worker"
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|\bFunction\b"
    assert not re.findall(f"{outside}|{markup}", text)
    assert text.isascii() and text.count("\n") <= 400


def test_what_json_has_no_number_for_is_left_out(tokenizer: PreTrainedTokenizerFast, page: Path) -> None:
    trajectory = make_trajectory(
        tokenizer,
        score={"f1": math.nan, "success": math.inf},
        rewards=[TokenReward(3, math.nan), TokenReward(4, 2.0)],
        notes={"worst": math.nan},
    )
    write_page([trajectory.to_dict()], page, tokenizer=tokenizer)
    (record,) = page_data(page.read_text())["trajectories"]
    assert record["rewards"] == [[3, None], [4, 2.0]]
    assert [record["metrics"][name] for name in ("f1", "success", "reward")] == [None, None, None]
    assert record["notes"] == '{"worst": NaN}'


def test_texts_of_tokens(page: Path) -> None:
    tokenizer = byte_level()
    trajectory = make_trajectory(tokenizer, (Part("prompt", 0, "Rhine \u00fc <|end|>"),))
    special = tokenizer.convert_tokens_to_ids("<|end|>")
    trajectory.tokens[-1], trajectory.tokens[0] = special, 5000  # an id without a token
    write_page([trajectory.to_dict()], page, tokenizer=tokenizer)
    vocabulary = page_data(page.read_text())["vocabulary"]
    pieces = dict(zip(vocabulary["ids"], vocabulary["pieces"], strict=True))
    assert pieces[special] == {"special": "<|end|>"} and pieces[5000] == {"special": "5000"}
    cut = [piece for piece in pieces.values() if isinstance(piece, list)]
    assert sorted(cut) == [[0xBC], [0xC3]]
    assert sum(isinstance(piece, str) for piece in pieces.values()) == len(pieces) - 2 - len(cut)


def test_more_tokens_than_16_bits_can_tell_apart(tokenizer: PreTrainedTokenizerFast, page: Path) -> None:
    tokens = torch.arange(70_000)
    trajectory = Trajectory(tokens, [Segment("prompt", 0, 70_000)], torch.zeros(70_000), "action")
    rows = [make_trajectory(tokenizer).to_dict(), trajectory.to_dict()]
    write_page(rows, page, tokenizer=tokenizer)
    data = page_data(page.read_text())
    narrow, wide = data["trajectories"]
    assert (narrow["wide"], wide["wide"]) == (False, True)
    places = unpacked(wide["tokens"], "<u4")
    assert np.array_equal(np.array(data["vocabulary"]["ids"])[places], tokens.numpy())


def test_a_page_is_small(tokenizer: PreTrainedTokenizerFast, page: Path) -> None:
    """8/3 bytes for a token, 16/3 more for each log-prob of one that the policy wrote."""
    sizes = []
    for prompt, action in ((3_000, 3_000), (6_000, 3_000), (6_000, 6_000)):
        segments = [Segment("prompt", 0, prompt), Segment("query", 1, action)]
        trajectory = Trajectory(
            torch.arange(prompt + action) % 50, segments, -torch.rand(prompt + action), "action"
        )
        write_page([trajectory.to_dict()], page, tokenizer=tokenizer)
        sizes.append(page.stat().st_size)
    environment, policy = (
        (larger - smaller) / 3_000 for smaller, larger in zip(sizes, sizes[1:], strict=False)
    )
    assert environment == pytest.approx(8 / 3, abs=0.02) and policy == pytest.approx(8, abs=0.02)


def test_trajectories_without_tokens(tokenizer: PreTrainedTokenizerFast, page: Path) -> None:
    empty = Trajectory(
        torch.zeros(0, dtype=torch.int64),
        [],
        torch.zeros(0),
        "action",
        finish_reason=FinishReason.ENVIRONMENT_ERROR,
        error="OSError: no server",
    )
    assert write_page([empty.to_dict()], page, tokenizer=tokenizer) == 1
    (record,) = page_data(page.read_text())["trajectories"]
    assert (record["parts"], record["tokens"], record["error"]) == ([], "", "OSError: no server")
    assert write_page([], page, tokenizer=tokenizer) == 0
    assert page_data(page.read_text())["trajectories"] == []
