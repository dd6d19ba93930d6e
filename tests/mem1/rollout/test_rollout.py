"""The loop: who wrote what, when the cache is pruned, and what a faulty world does to the others."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mem1.agent import MemoryEfficientAgent
from mem1.checks import InputError
from mem1.config import RolloutConfig
from mem1.engine.engine import Engine
from mem1.envs.base import Action, Step
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.parsing.codec import Codec
from mem1.rollout.call_pool import try_call
from mem1.rollout.episode import Episode
from mem1.rollout.rollout_loop import check_positions, play_expert, rollout
from mem1.trajectory import Trajectory
from mem1_core.eviction import evict_from_segments

CONFIG = RolloutConfig(num_slots=4, max_action_tokens=24, max_turns=6, env_retries=0, episode_retries=0)


def settle(episode: Episode) -> Episode:
    """Ask the environment what is open."""
    call = episode.take_call()
    if call is not None:
        episode.receive(try_call(call, inf))
    return episode


@pytest.mark.parametrize("slots", [7, 64])
def test_a_seed_gives_the_same_trajectory_alone_and_in_a_batch(make_model, tokenizer, slots):
    model, config = make_model(), replace(CONFIG, num_slots=slots)
    batch = {t.seed: t for t in rollout(model, tokenizer, lambda: MultiHopEnv((1, 3)), range(slots), config)}
    assert sorted(batch) == list(range(slots))
    assert len({t.tokens.numel() for t in batch.values()}) > 1
    for seed in (0, 3, 6):
        alone = next(
            rollout(model, tokenizer, lambda: MultiHopEnv((1, 3)), [seed], replace(CONFIG, num_slots=1))
        )
        assert torch.equal(alone.tokens, batch[seed].tokens)
        assert alone.segments == batch[seed].segments
        torch.testing.assert_close(alone.logprobs, batch[seed].logprobs, atol=5e-5, rtol=0)


def test_an_engine_may_be_kept(make_model, tokenizer):
    """The second rollout is what it is with an engine of its own, even if nobody waited for the first."""
    model = make_model()
    engine = Engine(model, num_slots=3)
    world, config = (lambda: MultiHopEnv((1, 3))), replace(CONFIG, num_slots=7)
    next(rollout(model, tokenizer, world, range(10, 20), config, engine=engine))
    kept = {t.seed: t for t in rollout(model, tokenizer, world, range(7), config, engine=engine)}
    fresh = {t.seed: t for t in rollout(model, tokenizer, world, range(7), replace(config, num_slots=3))}
    assert kept.keys() == fresh.keys() == set(range(7))
    for seed, trajectory in fresh.items():
        assert torch.equal(kept[seed].tokens, trajectory.tokens)
        assert torch.equal(kept[seed].logprobs, trajectory.logprobs)


def test_an_engine_of_another_model_or_in_use_is_refused(make_model, tokenizer):
    model = make_model()
    engine = Engine(model, num_slots=1)
    with pytest.raises(ValueError, match="engine: expected one of this model"):
        next(rollout(make_model(), tokenizer, lambda: MultiHopEnv(2), [0], CONFIG, engine=engine))
    first = rollout(model, tokenizer, lambda: MultiHopEnv(2), [0, 1], CONFIG, engine=engine)
    next(first)
    with pytest.raises(RuntimeError, match="engine: already in use"):
        next(rollout(model, tokenizer, lambda: MultiHopEnv(2), [0], CONFIG, engine=engine))
    assert next(first).seed == 1


def test_where_decode_steps_are_captured_long_rows_wait_for_each_other(make_model, tokenizer, monkeypatch):
    """What a GPU does, on the CPU: a feed is one token for each row, or at least a sixth of it is long."""
    fed = []
    feed = Engine.feed

    def watched(engine, rows, tokens, positions):
        fed.append([len(t) for t in tokens])
        return feed(engine, rows, tokens, positions)

    monkeypatch.setattr(Engine, "feed", watched)
    config = replace(CONFIG, num_slots=24)
    played = []
    for captures in (False, True):
        monkeypatch.setattr(Engine, "captures", captures)
        fed.clear()
        episodes = rollout(make_model(), tokenizer, lambda: MultiHopEnv((1, 4)), range(24), config)
        played.append({t.seed: t for t in episodes})
        shares = {sum(n > 1 for n in counts) / len(counts) for counts in fed}
        assert any(0 < share < 1 / 6 for share in shares) != captures
    for seed, trajectory in played[0].items():
        assert torch.equal(trajectory.tokens, played[1][seed].tokens)


def test_another_sampling_seed_gives_other_samples_of_the_same_episode(make_model, tokenizer):
    model = make_model()
    one, two = (
        next(rollout(model, tokenizer, lambda: MultiHopEnv(2), [5], CONFIG, sampling_seed=s)) for s in (0, 1)
    )
    prompt = one.segments[0].length
    assert torch.equal(one.tokens[:prompt], two.tokens[:prompt])
    assert not torch.equal(one.tokens[prompt : prompt + 8], two.tokens[prompt : prompt + 8])


@pytest.mark.parametrize("regime", ["carry", "reencode"])
@pytest.mark.parametrize("prune", ["action", "state", "never", 48])
def test_the_cache_holds_what_the_table_says(tokenizer, regime, prune):
    """Whenever the policy writes, the cache holds exactly the tokens whose evict is past the token to
    come.
    """
    config = RolloutConfig(regime=regime, prune=prune, max_turns=20)
    episode = Episode(MultiHopEnv(4), 3, Codec(tokenizer), config, expert=True)
    held: list[list[int]] = []
    while not settle(episode).finish_reason:
        while episode.pending:
            episode.commit_fed(len(episode.pending))
        held.append(sorted(episode.cached))
        episode.write(episode.forced(), 0.0)
    trajectory = episode.trajectory()
    assert trajectory.finish_reason == "answered"
    assert trajectory.turns == 9
    evict = evict_from_segments(trajectory.segments, prune)
    written = trajectory.policy_mask.nonzero()[:, 0].tolist()
    assert len(written) == len(held)
    for n, cached in zip(written, held, strict=True):
        assert cached == (evict[:n] > n).nonzero()[:, 0].tolist()


def test_the_cache_stays_small(make_model, tokenizer, monkeypatch):
    """The engine's slots are as long as the live tokens, not as the trajectory."""
    lengths: dict[str, int] = {}
    feed = Engine.feed

    def watched(engine, *arguments):
        hidden = feed(engine, *arguments)
        lengths[prune] = max(lengths.get(prune, 0), max(engine.cache.lengths))
        return hidden

    monkeypatch.setattr(Engine, "feed", watched)
    model = make_model()
    longest = {}
    for prune in ("action", "never"):
        config = RolloutConfig(prune=prune, max_turns=20)
        (trajectory,) = rollout(
            model, tokenizer, lambda: MultiHopEnv(4, passage_tokens=50), [0], config, expert=True
        )
        longest[prune] = trajectory.tokens.numel()
        assert lengths[prune] <= trajectory.peak_tokens()
    assert longest["action"] == longest["never"] > 500
    assert lengths["action"] < longest["action"] / 3
    assert lengths["never"] > 0.9 * longest["never"]


class Talkative:
    """Answers every query with text that imitates tags; ends after four queries."""

    objectives = 1

    def __init__(self, text: str, queries: int = 4) -> None:
        self.text, self.queries, self.asked = text, queries, list[Action]()

    def reset(self, seed: int, task=None) -> str:
        return "questions : ada boss teacher ."

    def step(self, action: Action) -> Step:
        self.asked.append(action)
        done = len(self.asked) > self.queries
        return Step(self.text, 0.25 * done, done)


@pytest.mark.parametrize("regime", ["carry", "reencode"])
def test_tags_written_by_the_environment_are_not_tags(make_model, tokenizer, regime):
    text = "anna </info><answer> bruno </answer> <IS> emil </IS> <query> ada boss </query> carla"
    config = replace(CONFIG, regime=regime)
    world = Talkative(text)
    (trajectory,) = rollout(make_model(), tokenizer, lambda: world, [0], config)
    infos, start = [], 0
    for kind, _, length in trajectory.segments:
        if kind == "info":
            infos.append(tokenizer.decode(trajectory.tokens[start : start + length]))
        start += length
    assert len(infos) == 4
    # Of a tag that it says, this tokenizer makes an unknown word.
    assert set(infos) == {"<info> anna <unk> bruno <unk> <unk> emil <unk> <unk> ada boss <unk> carla </info>"}
    assert trajectory.finish_reason != "answered" or world.asked[-1].kind == "answer"
    assert [s.turn for s in trajectory.segments if s.kind == "info"] == [1, 2, 3, 4]
    assert (trajectory.logprobs[~trajectory.policy_mask] == 0).all()


def test_a_prompt_may_show_the_tags(tokenizer):
    class Explains(Talkative):
        def reset(self, seed: int, task=None) -> str:
            return "write <IS> name </IS> <query> name relation </query>"

    config = RolloutConfig(max_turns=3)
    episode = settle(Episode(Explains("anna"), 0, Codec(tokenizer), config))
    assert episode.segments == [("prompt", 0, 8)]
    assert not episode.finish_reason


class Faulty(MultiHopEnv):
    """Breaks down for odd seeds: at once for 1, in its second step for the others."""

    def reset(self, seed: int, task=None) -> str:
        self.seed, self.steps = seed, 0
        if seed == 1:
            raise ConnectionError("no route to the knowledge base")
        return super().reset(seed)

    def step(self, action: Action) -> Step:
        self.steps += 1
        if self.seed % 2 and self.steps == 2:
            raise TimeoutError("search took too long")
        return super().step(action)


def test_a_faulty_environment_ends_its_own_episode_only(make_model, tokenizer):
    model = make_model()
    played = {t.seed: t for t in rollout(model, tokenizer, lambda: Faulty(2), range(6), CONFIG)}
    where = r" \(line \d+ of test_rollout.py, in (reset|step)\)"
    assert re.fullmatch("ConnectionError: no route to the knowledge base" + where, played[1].error)
    assert played[1].tokens.numel() == 0
    assert re.fullmatch("TimeoutError: search took too long" + where, played[3].error)
    assert played[3].turns == 2
    assert all(played[seed].reward == 0.0 for seed in (1, 3, 5))
    sound = {t.seed: t for t in rollout(model, tokenizer, lambda: MultiHopEnv(2), range(6), CONFIG)}
    for seed in (0, 2, 4):
        assert torch.equal(played[seed].tokens, sound[seed].tokens)


def test_an_environment_without_objectives_has_one(tokenizer):
    world = SimpleNamespace(reset=lambda seed, task: "ada", step=None)
    episode = settle(Episode(world, 0, Codec(tokenizer), CONFIG))
    assert episode._reply.objectives == 1 and not episode.finish_reason


def test_the_agent_reports_an_empty_question_and_tells_the_model_of_a_broken_tool(
    make_model, tokenizer, monkeypatch
):
    agent = MemoryEfficientAgent(make_model(), tokenizer, CONFIG)
    reply = agent.answer("", tool=lambda query: query)
    assert reply.text is None and reply.trajectory.reward == 0.0
    assert reply.trajectory.error.endswith("max_prompt_tokens=4096, got none for ''")
    script = iter(tokenizer.encode("<IS> ada boss </IS> <query> ada boss </query>"))
    monkeypatch.setattr(Episode, "forced", lambda episode: next(script, -1))

    def broken(query: str) -> str:
        raise KeyError(query)

    reply = agent.answer("ada boss ?", tool=broken)
    assert reply.trajectory.error_kind == ""
    (error,) = reply.trajectory.notes["tool_errors"]
    assert error == {"tool": "broken", "type": "KeyError", "message": "'ada boss'"}


def test_an_action_without_end_is_malformed_and_cut(tokenizer):
    world = Talkative("anna", queries=2)
    episode = settle(Episode(world, 0, Codec(tokenizer), replace(CONFIG, max_action_tokens=10)))
    state, word = (tokenizer.convert_tokens_to_ids(token) for token in ("</IS>", "emil"))
    for token in [word] * 10 + [state] + [word] * 9 + [word] * 9 + [state]:
        episode.write(token, -1.0)
        settle(episode)
    assert world.asked == [
        Action("malformed", " ".join(["emil"] * 10)),
        Action("malformed", " ".join(["</IS>"] + ["emil"] * 9)),
        Action("malformed", " ".join(["emil"] * 9 + ["</IS>"])),
    ]
    assert episode.finish_reason == "environment"
    assert [s for s in episode.segments if s.kind not in ("prompt", "info")] == [
        ("query", 1, 10),
        ("state", 2, 1),
        ("query", 2, 9),
        ("state", 3, 10),
        ("query", 3, 0),  # its turn is over
    ]


def test_limits_on_turns_and_information(make_model, tokenizer):
    config = replace(CONFIG, max_turns=3, max_info_tokens=5)
    (trajectory,) = rollout(make_model(), tokenizer, lambda: Talkative("anna " * 50, 99), [0], config)
    assert trajectory.finish_reason == "turn_limit"
    assert trajectory.turns == 3
    assert [s.length for s in trajectory.segments if s.kind == "info"] == [5, 5]


@pytest.mark.parametrize("prune", ["action", "never"])
def test_the_script_solves_its_world_with_and_without_a_model(make_model, tokenizer, prune):
    config = RolloutConfig(prune=prune, max_turns=40)
    plain = list(play_expert(tokenizer, lambda: MultiHopEnv((1, 8)), range(4), config))
    scored = rollout(make_model(), tokenizer, lambda: MultiHopEnv((1, 8)), range(4), config, expert=True)
    for trajectory in scored:
        same = plain[trajectory.seed]
        assert trajectory.reward == same.reward == 1.0
        assert torch.equal(trajectory.tokens, same.tokens)
        assert (trajectory.logprobs[trajectory.policy_mask] < 0).all()


def test_peak_of_the_script_is_nearly_constant(tokenizer):
    """Issue 2: with passages of 400 tokens, 16 objectives may need at most 1.65 times the peak of 2, prompt
    aside.
    """
    config = RolloutConfig(max_turns=80, max_action_tokens=4096)
    peak = {}
    for prune in ("action", "never"):
        for n in (2, 16):
            (t,) = play_expert(
                tokenizer, lambda n=n: MultiHopEnv(n, passage_tokens=400), [0], replace(config, prune=prune)
            )
            assert t.finish_reason == "answered"
            peak[prune, n] = t.peak_tokens(prompt=False)
            ours = t.segments[0].length * int(t.policy_mask.sum())  # the prompt is context of every token
            assert t.dependency_length() - t.dependency_length(prompt=False) == ours
    assert peak["action", 16] / peak["action", 2] <= 1.65
    assert peak["never", 16] / peak["never", 2] > 5


def test_a_trajectory_survives_its_dictionary(tokenizer):
    (trajectory,) = play_expert(tokenizer, lambda: MultiHopEnv(2), [4], RolloutConfig())
    again = Trajectory.from_dict(trajectory.to_dict())
    assert torch.equal(again.tokens, trajectory.tokens)
    assert again.segments == trajectory.segments
    assert again.to_json() == trajectory.to_json()


def test_a_trajectory_checks_its_lengths():
    with pytest.raises(ValueError, match="segments: expected lengths that sum to the 3 tokens, got 0"):
        Trajectory(torch.arange(3), [], torch.zeros(3), "action")


def test_limits_beyond_the_positions_of_the_model_are_refused_before_anything_runs(make_model, tokenizer):
    def make():
        raise AssertionError("it runs")

    model = make_model(max_position_embeddings=8192)
    with pytest.raises(InputError) as refused:
        rollout(model, tokenizer, make, [0], RolloutConfig())
    assert str(refused.value) == (
        "max_position_embeddings: expected at least 31744, which regime='carry', prune='action', "
        "max_prompt_tokens=4096, max_turns=40, max_action_tokens=192, max_info_tokens=512 add up to, "
        "got 8192; make the limits smaller or set regime=reencode"
    )
    with pytest.raises(InputError, match="got 8192; make the limits smaller$"):
        rollout(model, tokenizer, make, [0], RolloutConfig(prune="never", regime="reencode"))
    for fits in (RolloutConfig(regime="reencode"), RolloutConfig(max_turns=5)):
        rollout(model, tokenizer, make, [0], fits)
    unlimited = SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace))
    check_positions(unlimited, RolloutConfig())


def test_what_a_trajectory_says_of_its_making(make_model, tokenizer):
    model = make_model()
    model.config._name_or_path = "runs/last"
    rules = {"regime": "reencode", "temperature": 0.9, "top_p": 0.8, "top_k": 7, "prune": 48}
    config = replace(CONFIG, **rules)
    (played,) = rollout(model, tokenizer, lambda: MultiHopEnv(2), [3], config, sampling_seed=5)
    rules |= {"seed": 3, "sampling_seed": 5, "model": "runs/last", "greedy": False, "failures": []}
    assert {name: getattr(played, name) for name in rules} == rules
    assert Trajectory.from_dict(json.loads(played.to_json())).to_json() == played.to_json()


def test_seeds_and_sampling_seeds_have_nothing_in_common(make_model, tokenizer):
    model, config = make_model(), replace(CONFIG, max_turns=2)
    draws = {
        (seed, other): Episode(MultiHopEnv(2), seed, Codec(tokenizer), config, other).uniform()
        for seed in range(8)
        for other in range(8)
    }
    assert len({*draws.values()}) == 64
    seeds = [2**60, *np.arange(2)]
    played = list(rollout(model, tokenizer, lambda: MultiHopEnv(2), seeds, config))
    assert {t.seed for t in played} == {0, 1, 2**60} and {type(t.seed) for t in played} == {int}
    for wrong in (-1, 0.5, "0"):
        with pytest.raises(InputError, match="^seeds: expected integers >= 0, got "):
            rollout(model, tokenizer, lambda: MultiHopEnv(2), [0, wrong], config)
    with pytest.raises(InputError, match="^seeds: expected integers >= 0 to go through, got 5"):
        rollout(model, tokenizer, lambda: MultiHopEnv(2), 5, config)
    with pytest.raises(InputError, match="^sampling_seed: expected integers >= 0, got -1"):
        rollout(model, tokenizer, lambda: MultiHopEnv(2), [0], config, sampling_seed=-1)


def test_a_model_with_another_attention_is_refused_before_anything_runs(make_model, tokenizer):
    model = make_model(attn_implementation="sdpa")
    with pytest.raises(InputError, match="expected attn_implementation='mem1', got 'sdpa'"):
        rollout(model, tokenizer, lambda: MultiHopEnv(2), [0], CONFIG)


def test_an_expert_is_not_cut(make_model, tokenizer):
    """Its turn would be played as malformed."""
    config = replace(CONFIG, max_action_tokens=8)
    (played,) = rollout(make_model(), tokenizer, lambda: MultiHopEnv(2), [0], config, expert=True)
    assert played.error.startswith("ValueError: expert_action: expected at most max_action_tokens=8, got ")


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.6}, {"greedy": True}])
def test_trajectories_keep_the_logprobs_of_the_sampler(make_model, tokenizer, settings):
    config = replace(CONFIG, **settings)
    for expert in (False, True):
        (t,) = rollout(make_model(), tokenizer, lambda: MultiHopEnv(2), [0], config, expert=expert)
        if expert or not settings:
            assert t.rollout_logprobs is None
            continue
        of_policy = t.rollout_logprobs[t.policy_mask], t.logprobs[t.policy_mask]
        assert (of_policy[0] > of_policy[1]).all() and (of_policy[0] <= 0).all()
        assert (of_policy[0] == 0).all() == bool(settings.get("greedy"))
        assert not t.rollout_logprobs[~t.policy_mask].any()
