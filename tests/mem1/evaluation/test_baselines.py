"""What each agent changes, and what it then sees."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from mem1.checks import InputError
from mem1.config import RolloutConfig
from mem1.envs.base import Action, ExpertAction, Step
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.evaluation.baselines.agents import AGENTS, parse_agent
from mem1.parsing.tags import CHUNKS, OFFICIAL
from mem1.rollout.rollout_loop import play_expert
from mem1.trajectory import Trajectory

memory = pytest.importorskip("mem1.evaluation.baselines.external_memory")
CONFIG = RolloutConfig(max_turns=40, max_info_tokens=64)


def played(agent: str, tokenizer, make: Any = lambda: MultiHopEnv(4), seed: int = 3) -> Trajectory:
    rules = parse_agent(agent)
    config = rules.settings(CONFIG)
    (trajectory,) = play_expert(tokenizer, rules.environments(make, tokenizer, CONFIG), [seed], config)
    assert trajectory.error_kind == "", trajectory.error
    return trajectory


def test_a_memory_holds_no_more_than_a_policy_sees(tokenizer):
    """Observations of a thousand words, of which it sees 64 tokens, as a note or as found."""

    class Long(MultiHopEnv):
        def step(self, action):
            return super().step(action)._replace(observation="ada " * 1000)

    trajectory = played("external-memory=2", tokenizer, lambda: Long(3))
    lengths = [segment.length for segment in trajectory.segments if segment.kind == "info"]
    assert len(lengths) >= 3 and max(lengths) <= 3 * CONFIG.max_info_tokens
    assert CONFIG.max_info_tokens - 4 <= lengths[0] <= CONFIG.max_info_tokens + 4  # with its tags
    environment = memory.MemoryEnvironment(Long(3), 2, lambda text: text[:8])
    environment.reset(0)
    said = [environment.step(Action("query", "ada boss")).observation for _ in range(4)]
    assert said == ["ada ada ", "ada ada  | ada boss", *["ada ada  | ada boss | ada boss"] * 2]


def test_short_forms():
    for agent in AGENTS:
        assert str(parse_agent(agent.name)).partition("=")[0] == agent.name
    assert str(parse_agent("truncate=7")) == "truncate=7" and parse_agent("truncate=7").tokens == 7
    for wrong in ("truncate=-1", "truncate=x", "mem1 ", "MEM1", "oracle=1", "truncate=1=2"):
        with pytest.raises(InputError, match="agents: expected one of mem1, mem1-reencode, full-context"):
            parse_agent(wrong)


def test_memory_of_each_agent(tokenizer):
    """The same expert's words: what differs is what stays."""
    peaks = {
        name: played(name, tokenizer).peak_tokens(prompt=False)
        for name in (
            "mem1",
            "mem1-reencode",
            "full-context",
            "truncate=60",
            "last-observations=1",
            "running-summary=60",
            "oracle",
        )
    }
    whole = played("full-context", tokenizer)
    assert peaks["full-context"] == whole.tokens.numel() - whole.segments[0].length
    assert peaks["mem1"] == peaks["mem1-reencode"] == peaks["oracle"] < peaks["truncate=60"]
    assert peaks["mem1"] < peaks["running-summary=60"] <= peaks["truncate=60"]
    assert peaks["truncate=60"] < peaks["last-observations=1"] < peaks["full-context"]
    infos = [s.length for s in whole.segments if s.kind == "info"]
    assert peaks["last-observations=1"] == peaks["full-context"] - sum(infos[:-1])


def test_last_observations_keeps_as_many_as_it_is_told(tokenizer):
    for turns in (1, 2, 3):
        t = played(f"last-observations={turns}", tokenizer)
        infos = [(s.turn, s.length) for s in t.segments if s.kind == "info"]
        evict, start = t.mask.evict_at[0], 0
        for segment in t.segments:
            if segment.kind == "info":
                gone = int(evict[start])
                leaves_with = segment.turn + turns  # the end of that turn's action
                end = sum(s.length for s in t.segments if s.turn <= leaves_with and s.kind != "info")
                end += sum(length for turn, length in infos if turn < leaves_with)
                assert gone == min(end, t.tokens.numel())
            start += segment.length


def test_a_summary_takes_the_place_of_everything():
    agent = parse_agent("running-summary=50")
    config = agent.settings(RolloutConfig(format=CHUNKS))
    assert config.context_limit == 50 and config.prune == "summary"
    assert [action.kind for action in config.format.actions] == ["query", "answer", "summary"]
    assert "<summary>" in config.format.context_request
    again = agent.settings(config)
    assert again == config, "a format that has it already is left as it is"
    held = agent.settings(RolloutConfig(format=OFFICIAL))
    assert str(held.prune) == "compact=50" and held.format == OFFICIAL, "its state is its summary"


def test_notes_have_keywords_links_and_are_found_again():
    notes = memory.Notes()
    for text in (
        "capital of norway: Oslo is the capital of Norway.",
        "mayor of Oslo: the mayor of Oslo is elected every four years.",
        "the and of",
        "bridges of Paris: the Pont Neuf is the oldest bridge of Paris.",
    ):
        notes.add(text)
    assert "norway" in notes.notes[0].keywords and len(notes.notes[0].keywords) <= 5
    assert notes.notes[1].links == (0,), "Oslo is in both"
    assert notes.notes[2].keywords == () and notes.notes[2].links == ()
    assert notes.search("who is the mayor?", 3) == [1]
    assert [note.text[:5] for note in notes.recall("mayor", 3)] == ["mayor", "capit"], "and what it links to"
    assert notes.recall("mayor", 1) == [notes.notes[1]]
    for nothing in ("", "the", "zebra", "\x00", "?" * 1000):
        assert notes.recall(nothing, 3) == []


def test_external_memory_brings_notes_back_and_their_tokens_count(tokenizer):
    plain, agent = played("mem1", tokenizer), played("external-memory=2", tokenizer)
    assert agent.reward == plain.reward == 1.0
    assert agent.tokens.numel() > plain.tokens.numel() and agent.peak_tokens() > plain.peak_tokens()
    text, start = [], 0
    for kind, _, length in agent.segments:
        if kind == "info":
            text.append(tokenizer.decode(agent.tokens[start : start + length]))
        start += length
    assert "|" not in text[0], "there is no note yet"
    found = text[0].removeprefix("<info>").removesuffix("</info>").strip()
    assert any(found in later and "|" in later for later in text[1:])
    assert all(later.count("|") <= 2 for later in text)
    plain_infos = [s.length for s in plain.segments if s.kind == "info"]
    assert len(text) == len(plain_infos) and all(t.startswith("<info> found") for t in text), (
        "news come first"
    )


def test_external_memory_of_a_coroutine():
    class Later(MultiHopEnv):
        async def step(self, action: Action) -> Step:
            return MultiHopEnv.step(self, action)

    async def texts() -> list[str]:
        environment, said = memory.MemoryEnvironment(Later(2), 2, str), []
        environment.reset(0)
        while True:
            step = await environment.step(environment.expert_action().action)
            said.append(step.observation)
            if step.terminated:
                return said

    environment, said, step = memory.MemoryEnvironment(MultiHopEnv(2), 2, str), [], Step("")
    environment.reset(0)
    while not step.terminated:
        step = environment.step(environment.expert_action().action)
        said.append(step.observation)
    assert asyncio.run(texts()) == said


def test_notes_of_one_episode_are_not_the_next_ones():
    environment = memory.MemoryEnvironment(MultiHopEnv(1), 3, str)
    for _ in range(2):
        environment.reset(0)
        step = environment.step(environment.expert_action().action)
        assert "|" not in step.observation


def test_random_actions_follow_from_the_seed(tokenizer):
    class Dice:
        def reset(self, seed: int, task: Any = None) -> str:
            return "ada ?"

        def step(self, action: Action) -> Step:
            return Step("found", terminated=action.kind == "answer")

        def random_action(self, rng: random.Random) -> ExpertAction:
            kind = "answer" if rng.random() < 0.2 else "query"
            return ExpertAction("", Action(kind, rng.choice(("ada", "emil", "carla"))))

    first, again, other = (played("random", tokenizer, Dice, seed) for seed in (1, 1, 2))
    assert first.tokens.tolist() == again.tokens.tolist() != other.tokens.tolist()
    assert played("random", tokenizer, Dice, 4).finish_reason == "answered"
