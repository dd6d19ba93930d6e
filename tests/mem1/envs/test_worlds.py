"""Environments by name: what a command line can make of one, and what it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mem1.checks import InputError
from mem1.config import RolloutConfig
from mem1.envs.base import Step
from mem1.envs.toy.tokenizer import build_tokenizer
from mem1.envs.worlds import TOYS, WORLDS, open_world
from mem1.parsing.tags import OFFICIAL
from mem1.rollout.rollout_loop import play_expert


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("objectives", [1, 3, (1, 4)])
def test_every_toy_can_be_solved_by_its_expert(name, objectives):
    world = open_world(name, {}, objectives=objectives)
    assert world.tasks is None and not world.clients
    config = RolloutConfig(max_turns=400, max_action_tokens=512, max_info_tokens=128)
    for played in play_expert(build_tokenizer(), world.make, range(3), config):
        assert played.error_kind == "" and played.score["exact_match"] == played.objectives


@pytest.fixture
def data(tmp_path) -> dict[str, str]:
    pytest.importorskip("bm25s")
    rows = [
        {
            "id": f"q{n}",
            "dataset": "even" if n % 2 == 0 else "odd",
            "question": f"what is the colour of house number {n}",
            "golden_answers": [f"colour{n}"],
            "support": [str(n)],
        }
        for n in range(60)
    ]
    passages = [
        {"id": str(n), "contents": f'"House {n}"\nHouse number {n} has the colour{n}.'} for n in range(60)
    ]
    for name, some in (("qa", rows), ("corpus", passages)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return {"questions": str(tmp_path / "qa.jsonl"), "corpus": str(tmp_path / "corpus.jsonl")}


def asked(world) -> set[str]:
    return {question.id for task in world.tasks for question in task.questions}


def test_questions_are_trained_on_or_held_out(data):
    sides = [open_world("retrieval-qa", data, objectives=1, side=side) for side in ("train", "test")]
    train, test = map(asked, sides)
    assert len(train | test) == 60 and not train & test and 4 <= len(test) <= 25
    assert asked(open_world("retrieval-qa", data | {"held_out": 1.0}, objectives=1)) == train | test
    several = open_world("retrieval-qa", data | {"held_out": 1.0, "datasets": ["odd"]}, objectives=(2, 3))
    assert {len(task.questions) for task in several.tasks} == {2, 3}
    assert all(int(name[1:]) % 2 for name in asked(several))


def test_prompts_name_the_tags_of_the_format_and_the_oracle_finds(data):
    world = open_world("retrieval-qa", data | {"held_out": 1.0}, objectives=4, tags=OFFICIAL)
    environment = world.make()
    prompt = environment.reset(0, world.tasks[0])
    assert "<search>" in prompt and "<think>" in prompt and "<query>" not in prompt
    step = Step("")
    while not step.terminated:
        step = environment.step(environment.expert_action().action)
    assert step.reward == 1.0 and step.info["gold_found"] == 4


def test_rows_of_ones_own(tmp_path):
    class Own:
        def __init__(self, words="x", objectives=None):
            self.words = words

    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n{"id": 2}\n')
    world = open_world(Own, {"words": "y"}, tasks=str(tmp_path / "rows.jsonl"))
    assert world.make().words == "y" and world.tasks == [{"id": 1}, {"id": 2}]
    for text, message in (
        ('{"id": 1}\n{"id": 1}\n', r"rows.jsonl:2: id: expected one of its own, got '1', as at .*:1"),
        ('{"id": 1}\n{"name": 1}\n', "rows.jsonl:2: task: expected a row with an id"),
        ("", "tasks: expected a file with rows"),
    ):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(InputError, match=message):
            open_world(Own, {}, tasks=str(tmp_path / "rows.jsonl"))
    with pytest.raises(InputError, match="environment-args: expected no objectives beside --objectives"):
        open_world(Own, {"objectives": 2}, objectives=2)


def test_there_are_as_many_tasks_as_are_played_and_as_many_of_each_size(data):
    world = open_world("retrieval-qa", data | {"held_out": 1.0}, objectives=16, episodes=50)
    assert len(world.tasks) == 50 and len({task.id for task in world.tasks}) == 50
    sizes = [len(task.questions) for task in open_world("retrieval-qa", data, objectives=(1, 4)).tasks]
    assert {sizes.count(n) for n in (1, 2, 3, 4)} == {len(sizes) // 4}


def test_ranges_come_as_lists_from_json():
    world = open_world("delayed", {"delay": [2, 3], "hops": [1, 2]}, objectives=2)
    assert world.make().reset(0)
    assert open_world("updates", {"noise": [0.1, 0.4], "updates": [1, 2]}).make().reset(0)


@pytest.mark.parametrize(
    ("name", "arguments", "how", "message"),
    [
        ("multihop", {"hops": 9}, {}, "hops: expected a number or a rising interval within 1..4"),
        ("multihop", {"colour": 1}, {}, "environment-args: expected arguments of MultiHopEnv: .*'colour'"),
        ("retrieval-qa", {}, {}, "environment-args: expected arguments of retrieval_qa: missing a required"),
        ("retrieval-qa", {"questions": "q"}, {}, "environment-args: expected a corpus or a url"),
        ("retrieval-qa", {"questions": "q", "nope": 1}, {}, "expected arguments of RetrievalQAEnv: .*'nope'"),
        ("retrieval-qa", {"questions": "q", "tags": 1}, {}, "expected arguments that are not made of others"),
        ("retrieval-qa", {"questions": "q", "corpus": 5}, {}, "args: corpus: expected str | None, got 5"),
        ("retrieval-qa", {"questions": "q", "url": "http://x", "index": 5}, {}, "index: expected str | None"),
        (
            "retrieval-qa",
            {"questions": "q", "url": "http://x", "index": "y"},
            {},
            "no dense and no index beside",
        ),
        ("retrieval-qa", {"questions": "q", "url": "http://x:z"}, {}, "url: expected http"),
        ("retrieval-qa", {"questions": "q", "datasets": 5}, {}, "datasets: expected Sequence.str., got 5"),
        ("retrieval-qa", {"questions": "q", "strict": "no"}, {}, "strict: expected bool, got 'no'"),
        (
            "web-qa",
            {"questions": "q", "key_file": __file__, "num_results": "3"},
            {},
            "num_results: expected int",
        ),
        ("webshop", {"folder": 3}, {}, "folder: expected str, got 3"),
        ("updates", {"noise": "much"}, {}, "noise: expected float | tuple.float, float., got 'much'"),
        ("retrieval-qa", {"questions": "q", "corpus": "nope"}, {}, "corpus: expected a file, got 'nope'"),
        ("retrieval-qa", {"questions": "q", "url": "ftp://x"}, {}, "url: expected http"),
        ("web-qa", {"questions": "q", "key_file": "nope"}, {}, "key_file: expected a file, got 'nope'"),
        ("webshop", {"folder": "nope"}, {"objectives": 2}, "objectives: expected 1 in webshop, got 2"),
        ("webshop", {"folder": "nope"}, {}, "path: expected a file that can be read, got"),
        ("webshop", {"folder": "x"}, {"tasks": "rows.jsonl"}, "tasks: expected none beside webshop"),
        ("nowhere", {}, {}, "environment: expected one of multihop, updates, delayed, retrieval-qa"),
        ("multihop", {}, {"side": "dev"}, "side: expected train or test, got 'dev'"),
    ],
)
def test_what_cannot_be_made_is_said(name, arguments, how, message):
    needed = {"retrieval-qa": ["bm25s", "aiohttp"], "web-qa": ["trafilatura"], "webshop": ["bm25s"]}
    for package in needed.get(name, []):
        pytest.importorskip(package)
    with pytest.raises(InputError, match=message):
        open_world(name, arguments, **how)


def test_the_documentation_has_every_world():
    text = (Path(__file__).parents[3] / "docs" / "environments.md").read_text()
    assert all(f"| `{name}` |" in text for name in WORLDS)
