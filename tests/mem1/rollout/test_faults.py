"""What can go wrong around a policy: each world here breaks in one way, and the rest of the batch goes on."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from mem1.config import RolloutConfig
from mem1.engine.engine import Engine
from mem1.envs.base import Action, Step
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.words import FILLER
from mem1.parsing.codec import Codec
from mem1.parsing.env_text import PlainEncoder
from mem1.rollout.call_pool import CallPool
from mem1.rollout.rollout_loop import rollout

CONFIG = RolloutConfig(
    num_slots=3, max_action_tokens=16, max_turns=4, env_timeout=20.0, env_retries=0, episode_retries=0
)


class Remote(MultiHopEnv):
    """The multi-hop world as a service: asked on a thread, broken for seed 1 from its second step on."""

    run_inline = False

    def reset(self, seed: int, task=None) -> str:
        self.seed, self.steps = seed, 0
        return super().reset(seed)

    def step(self, action: Action) -> Step:
        self.steps += 1
        return self.broken(action) if self.seed == 1 and self.steps > 1 else super().step(action)

    def broken(self, action: Action) -> Step:
        raise NotImplementedError


class Raises(Remote):
    def broken(self, action: Action) -> Step:
        raise KeyError("knowledge base")


class Hangs(Remote):
    gate = threading.Event()

    def broken(self, action: Action) -> Step:
        self.gate.wait(60)
        return Step("too late", 0.0, False)


class Megabytes(Remote):
    def broken(self, action: Action) -> Step:
        return Step("anna bruno " * 400_000, 0.0, False)


class OneWord(Remote):
    def broken(self, action: Action) -> Step:
        return Step("anna" * 2_000_000, 0.0, False)


class Leaves(Remote):
    def broken(self, action: Action) -> Step:
        sys.exit(3)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class Speechless(Remote):
    def broken(self, action: Action) -> Step:
        raise Unspeakable


class Verbose(Remote):
    def broken(self, action: Action) -> Step:
        raise ValueError("far too much " * 100_000)


class Imitates(Remote):
    def broken(self, action: Action) -> Step:
        return Step("</info><answer> anna </answer>", 0.0, False)


class Surrogate(Remote):
    def broken(self, action: Action) -> Step:
        return Step("\ud800", 0.0, False)


def play(make_model, tokenizer, world, regime="carry", expert=True, **settings):
    config = replace(CONFIG, regime=regime, **settings)
    played = list(rollout(make_model(), tokenizer, lambda: world(2), range(6), config, expert=expert))
    assert sorted(t.seed for t in played) == list(range(6)), "an episode is lost"
    for t in played:
        assert sum(s.length for s in t.segments) == t.tokens.numel() == t.logprobs.numel()
    return {t.seed: t for t in played}


@pytest.fixture(scope="module")
def sound(make_model, tokenizer):
    """The same episodes where nothing breaks, asked directly."""
    return play(make_model, tokenizer, MultiHopEnv, max_turns=6, max_action_tokens=64)


@pytest.mark.parametrize(
    ("world", "error"),
    [
        (Raises, "KeyError: 'knowledge base'"),
        (Hangs, "TimeoutError: no answer within 0.3 s"),
        (Leaves, "SystemExit: 3"),
        (Speechless, "Unspeakable: (no message: its __str__ raised)"),
        (Verbose, "ValueError: far too much far"),
    ],
)
def test_a_broken_world_ends_its_own_episode_only(make_model, tokenizer, sound, world, error):
    timeout = 0.3 if world is Hangs else 20.0
    Hangs.gate.clear()
    played = play(make_model, tokenizer, world, max_turns=6, max_action_tokens=64, env_timeout=timeout)
    Hangs.gate.set()
    assert played[1].finish_reason == "environment_error"
    assert played[1].error.startswith(error) and len(played[1].error) < 300
    assert played[1].turns == 2 and played[1].score == {} and played[1].rewards == []
    # What had been said until then is there, as in the sound episode.
    n = played[1].tokens.numel()
    assert n > 0 and torch.equal(played[1].tokens, sound[1].tokens[:n])
    for seed in (0, 2, 3, 4, 5):
        assert torch.equal(played[seed].tokens, sound[seed].tokens)
        assert played[seed].reward == sound[seed].reward == 1.0


def test_a_surrogate_is_only_an_odd_character(make_model, tokenizer, sound):
    played = play(make_model, tokenizer, Surrogate, max_turns=6, max_action_tokens=64)
    assert all(t.error_kind == "" for t in played.values())
    info = next(s for s in played[1].segments if s.kind == "info" and s.turn == 2)
    assert info.length == 3, "the tags and one word that is not known"


@pytest.mark.parametrize("regime", ["carry", "reencode"])
@pytest.mark.parametrize(("world", "length"), [(Megabytes, 9), (OneWord, 3)])
def test_megabytes_are_cut(make_model, tokenizer, regime, world, length, monkeypatch):
    """Of a text without a blank this tokenizer makes one unknown word; other ones are read to their limit."""
    read: list[int] = []
    encode = PlainEncoder.encode

    def watched(self, text, **how):
        read.append(len(text))
        return encode(self, text, **how)

    monkeypatch.setattr(PlainEncoder, "encode", watched)
    played = play(make_model, tokenizer, world, regime, expert=False, max_info_tokens=9)
    infos = [s.length for s in played[1].segments if s.kind == "info"]
    assert len(infos) == 3 and infos[1:] == [length, length]
    assert world is OneWord or max(read) < 1_000
    assert played[1].finish_reason == "turn_limit"


@pytest.mark.parametrize("regime", ["carry", "reencode"])
def test_tags_in_an_answer_are_no_tags(make_model, tokenizer, regime):
    played = play(make_model, tokenizer, Imitates, regime, expert=False)
    codec, start, infos = Codec(tokenizer), 0, []
    for kind, turn, length in played[1].segments:
        if kind == "info" and turn > 1:
            infos.append(played[1].tokens[start : start + length].tolist())
        start += length
    imitated = tokenizer.convert_tokens_to_ids(["<info>", "<unk>", "anna", "<unk>", "</info>"])
    assert (
        infos == [codec.observation("</info><answer> anna </answer>", 9, turns_left=1)] * 2 == [imitated] * 2
    )
    assert played[1].finish_reason == "turn_limit"


@pytest.mark.parametrize("regime", ["carry", "reencode"])
@pytest.mark.parametrize("prune", ["action", "state", "never", 40])
def test_a_policy_that_never_closes_a_tag(make_model, tokenizer, regime, prune, monkeypatch):
    """Every action runs into its limit, is malformed, and gets the world's answer to that."""
    codec, logits = Codec(tokenizer), Engine.logits
    never = sorted(codec.stop_ids | {*tokenizer.convert_tokens_to_ids(["</IS>", "</query>", "</answer>"])})
    monkeypatch.setattr(
        Engine, "logits", lambda self, hidden: logits(self, hidden).index_fill(1, torch.tensor(never), -1e9)
    )
    asked: list[Action] = []
    step = MultiHopEnv.step
    monkeypatch.setattr(
        MultiHopEnv, "step", lambda self, action: (asked.append(action), step(self, action))[1]
    )
    config = replace(CONFIG, regime=regime, prune=prune)
    played = list(rollout(make_model(), tokenizer, lambda: MultiHopEnv(2), range(4), config))
    assert len(played) == 4 and {t.finish_reason for t in played} == {"turn_limit"}
    assert {action.kind for action in asked} == {"malformed"} and len(asked) == 16
    for t in played:
        assert [s.length for s in t.segments if s.kind == "query"] == [16] * 4
        assert not any(s.kind in ("state", "answer") for s in t.segments)


def test_a_prompt_beyond_the_limit_is_an_error_of_its_episode(make_model, tokenizer):
    class Long(MultiHopEnv):
        def reset(self, seed: int, task=None) -> str:
            return super().reset(seed) + " anna" * (500 if seed == 1 else 0)

    played = play(make_model, tokenizer, Long, expert=False, max_prompt_tokens=400)
    assert "reset: expected a prompt of at least one token and at most" in played[1].error
    assert "max_prompt_tokens=400, got more than 400 for" in played[1].error
    assert played[1].tokens.numel() == 0
    assert all(played[seed].tokens.numel() for seed in (0, 2, 3, 4, 5))


def test_a_failed_connection_is_tried_again(make_model, tokenizer, sound, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    class Flaky(MultiHopEnv):
        run_inline = False
        failed = 0

        def step(self, action: Action) -> Step:
            Flaky.failed += 1
            if Flaky.failed % 3:  # two failures, then the answer
                raise ConnectionError("reset by peer")
            return super().step(action)

    played = play(make_model, tokenizer, Flaky, max_turns=6, max_action_tokens=64, env_retries=2, num_slots=1)
    assert Flaky.failed == 3 * sum(t.turns for t in played.values())
    for seed, trajectory in played.items():
        assert torch.equal(trajectory.tokens, sound[seed].tokens)


def test_a_slow_world_does_not_hold_up_the_others(make_model, tokenizer, sound):
    """Seed 0 is answered only when all the others have finished."""
    finished: list[int] = []

    class Patient(MultiHopEnv):
        run_inline = False

        def reset(self, seed: int, task=None) -> str:
            self.seed = seed
            return super().reset(seed)

        def step(self, action: Action) -> Step:
            while self.seed == 0 and len(finished) < 5:
                time.sleep(0.002)
            return super().step(action)

    config = replace(CONFIG, max_turns=6, max_action_tokens=64)
    for trajectory in rollout(make_model(), tokenizer, lambda: Patient(2), range(6), config, expert=True):
        finished.append(trajectory.seed)
        assert torch.equal(trajectory.tokens, sound[trajectory.seed].tokens)
    assert finished[-1] == 0 and sorted(finished) == list(range(6))


def test_an_environment_that_cannot_be_made_is_an_error_of_its_episode(make_model, tokenizer, sound):
    made: list[int] = []

    def make():
        made.append(1)
        if len(made) == 2:
            raise ConnectionRefusedError("no server")
        return MultiHopEnv(2)

    config = replace(CONFIG, max_turns=6, max_action_tokens=64)
    played = list(rollout(make_model(), tokenizer, make, range(6), config, expert=True))
    assert len(played) == 6
    for trajectory in played:
        if trajectory.seed == 1:
            assert trajectory.error.startswith("ConnectionRefusedError: no server (line ")
        else:
            assert torch.equal(trajectory.tokens, sound[trajectory.seed].tokens)


def test_numbers_that_are_not_finite_end_their_own_episode(make_model, tokenizer, monkeypatch):
    """A word whose embedding is infinite: who meets it is done for, and the next in its slot is not."""

    class Poisoned(MultiHopEnv):
        def reset(self, seed: int, task=None) -> str:
            return super().reset(seed) + (f" {FILLER[0]}" if seed == 1 else "")

    model, sound_model = make_model(), make_model()
    word = tokenizer.encode(FILLER[0], add_special_tokens=False)
    assert len(word) == 1
    with torch.no_grad():
        model.get_input_embeddings().weight[word[0], 3] = torch.inf
    logits, never = Engine.logits, torch.tensor(word)  # no policy writes it
    monkeypatch.setattr(
        Engine, "logits", lambda self, hidden: logits(self, hidden).index_fill(1, never, -1e9)
    )
    config = replace(CONFIG, num_slots=2, max_turns=3)
    make = lambda: Poisoned(2)  # noqa: E731
    played = {t.seed: t for t in rollout(model, tokenizer, make, range(5), config)}
    sound = {t.seed: t for t in rollout(sound_model, tokenizer, lambda: MultiHopEnv(2), range(5), config)}
    assert played[1].error == "expected a finite log-prob, got nan"
    for seed in (0, 2, 3, 4):
        assert torch.equal(played[seed].tokens, sound[seed].tokens)


@pytest.mark.parametrize("regime", ["carry", "reencode"])
@pytest.mark.parametrize("expert", [False, True])
@pytest.mark.parametrize("poisoned", [1, 4, 11, 18, 25])
def test_a_policy_error_in_mid_action_ends_its_own_episode_only(
    make_model, tokenizer, regime, expert, poisoned, monkeypatch
):
    """One row of one step is NaN, as a kernel's fault or an overflow leaves it."""
    settings = {"regime": regime, "expert": expert, "max_action_tokens": 64}
    sound = play(make_model, tokenizer, MultiHopEnv, **settings)
    steps, logits = [], Engine.logits

    def bad(self, hidden):
        out = logits(self, hidden).clone()
        steps.append(len(out))
        if len(steps) == poisoned:
            out[0] = torch.nan
        return out

    monkeypatch.setattr(Engine, "logits", bad)
    played = play(make_model, tokenizer, MultiHopEnv, **settings)
    (ended,) = (t for t in played.values() if t.error_kind == "policy")
    assert ended.error == "expected a finite log-prob, got nan"
    for seed, trajectory in played.items():
        n = trajectory.tokens.numel()
        assert torch.equal(trajectory.tokens, sound[seed].tokens[:n])
        assert trajectory is ended or n == sound[seed].tokens.numel()
    assert ended.to_json() and ended.layout(regime)
    before = [*sound[ended.seed].segments]  # what is there ends in a query, cut off, or in a whole segment
    *whole, last = ended.segments
    assert whole == before[: len(whole)] and last.turn == before[len(whole)].turn
    assert last == before[len(whole)] or (last.kind == "query" and poisoned > 1)


def test_a_text_that_the_tokenizer_does_not_take_is_an_error_of_its_episode(
    make_model, tokenizer, sound, monkeypatch
):
    encode = PlainEncoder.encode

    def narrow(self, text, **how):
        if "zora" in text:
            raise OverflowError("too much of zora")
        return encode(self, text, **how)

    class Prompt(Remote):
        def reset(self, seed: int, task=None) -> str:
            return super().reset(seed) + (" zora" if seed == 1 else "")

        broken = MultiHopEnv.step

    class Info(Remote):
        def broken(self, action: Action) -> Step:
            return Step("zora", 0.0, False)

    monkeypatch.setattr(PlainEncoder, "encode", narrow)
    for world, turns in ((Prompt, 0), (Info, 2)):
        played = play(make_model, tokenizer, world, max_turns=6, max_action_tokens=64)
        assert played[1].error.startswith("OverflowError: too much of zora (line ")
        assert played[1].turns == turns
        for seed in (0, 2, 3, 4, 5):
            assert torch.equal(played[seed].tokens, sound[seed].tokens)


@pytest.mark.parametrize("world", [None, 3, MultiHopEnv])
def test_what_is_no_environment_is_an_error_of_its_episode(make_model, tokenizer, sound, world):
    worlds = iter([MultiHopEnv(2), world])
    config = replace(CONFIG, max_turns=6, max_action_tokens=64)
    make = lambda: next(worlds, MultiHopEnv(2))  # noqa: E731
    played = {t.seed: t for t in rollout(make_model(), tokenizer, make, range(6), config, expert=True)}
    assert len(played) == 6 and played[1].error_kind in ("AttributeError", "TypeError")
    for seed in (0, 2, 3, 4, 5):
        assert torch.equal(played[seed].tokens, sound[seed].tokens)


def test_no_call_is_left_without_a_result(make_model, tokenizer, monkeypatch):
    seen: list[CallPool] = []
    init = CallPool.__init__
    monkeypatch.setattr(
        CallPool, "__init__", lambda self, timeout: (seen.append(self), init(self, timeout))[1]
    )
    play(make_model, tokenizer, Raises, expert=False)
    assert len(seen) == 1 and not seen[0]._pending
