"""Every rule of forgetting through the whole loop: what is sampled under it is what a trainer recomputes,
memory is what the formula says, and the training stream is shorter than one row per turn.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from parity_gates import assert_parity
from scripted import ScriptedEnv
from small_tokenizers import SMALL
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mem1.checks import InputError
from mem1.config import RolloutConfig, TrainConfig
from mem1.engine.engine import Engine
from mem1.engine.slots import Slots
from mem1.evaluation.plots import plot_trajectory
from mem1.parsing.tags import FOLD, MEM1, SUMMARY, TagFormat
from mem1.parsing.token_text import TokenText
from mem1.rollout.rollout_loop import make_engine, play_expert, rollout
from mem1.train.parity import parity
from mem1.trajectory import Trajectory
from mem1_core.eviction import eviction_table
from mem1_core.eviction_policies import EvictionPolicy, HideObservations, Recorded, policy_name
from mem1_core.integrations.transformers import register
from mem1_core.segments import Segment, by_policy

CONFIG = RolloutConfig(num_slots=32, max_turns=9, max_action_tokens=256, max_info_tokens=256)


def forget_reasoning(segments: Sequence[Segment]) -> list[bool]:
    """A user's own: what was reasoned leaves once the environment has answered."""
    answered = max((s.turn for s in segments if s.kind == "info"), default=0)
    return [s.kind != "state" or s.turn > answered for s in segments]


RULES: list[tuple[EvictionPolicy, TagFormat]] = [
    *[(prune, MEM1) for prune in ("action", "state", "never", 60, "last_turns=2", HideObservations(2))],
    *[("fold", FOLD), ("summary", SUMMARY), (forget_reasoning, MEM1)],
]
every_rule = pytest.mark.parametrize(("prune", "format"), RULES, ids=[policy_name(p) for p, _ in RULES])


@pytest.fixture(scope="module")
def tokenizer():
    return SMALL["byte-level"]()


def model_of(tokenizer, dtype=torch.float32) -> Qwen2ForCausalLM:
    register()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 7,  # more rows than the tokenizer has ids
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        attn_implementation="mem1",
    )
    return Qwen2ForCausalLM(config).to(dtype).eval()


def windowed_model(tokenizer) -> Gemma2ForCausalLM:
    """Windows of 24 in two layers of three, soft caps of scores and of logits."""
    register()
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer) + 7,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=24,
        max_position_embeddings=65536,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
        initializer_range=0.1,
        attn_implementation="mem1",
    )
    return Gemma2ForCausalLM(config).eval()


def play(
    tokenizer, config: RolloutConfig, dtype=torch.float32, seeds=range(32), model=None, **how
) -> list[Trajectory]:
    make = lambda: ScriptedEnv(config.format, words=6)  # noqa: E731
    return list(rollout(model or model_of(tokenizer, dtype), tokenizer, make, seeds, config, **how))


def check(tokenizer, played: list[Trajectory], dtype: torch.dtype) -> None:
    measured = assert_parity(model_of(tokenizer, dtype), played)
    assert measured.turns >= 4 and measured.trajectories == len(played)


@every_rule
@pytest.mark.parametrize("regime", ["carry", "reencode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_sampled_is_what_is_recomputed(tokenizer, prune, format, regime, dtype):
    """32 ragged episodes of 5 to 8 turns, awkward texts in actions and observations."""
    config = replace(CONFIG, prune=prune, format=format, regime=regime)
    played = play(tokenizer, config, dtype, expert=True)
    assert {t.finish_reason for t in played} == {"answered"}
    assert len({t.tokens.numel() for t in played}) > 16
    check(tokenizer, played, dtype)
    if prune != "never":
        assert any((t.mask.evict_at < t.tokens.numel()).any() for t in played)


@every_rule
@pytest.mark.parametrize("regime", ["carry", "reencode"])
def test_windows_count_positions_under_every_rule(tokenizer, prune, format, regime):
    """Entries leave, positions do not move: what a window holds is the same in rollout and training."""
    model, config = windowed_model(tokenizer), replace(CONFIG, prune=prune, format=format, regime=regime)
    played = play(tokenizer, config, seeds=range(8), model=model, expert=True)
    assert {t.finish_reason for t in played} == {"answered"}
    assert min(t.peak_tokens() for t in played) > 2 * 24
    measured = parity(model, played, regime)
    assert measured.max_dlogp <= 5e-5, measured


@pytest.mark.parametrize("regime", ["carry", "reencode"])
@pytest.mark.parametrize("prune", ["action", "state", "hide_observations=1", forget_reasoning])
def test_what_a_policy_without_sense_writes(tokenizer, regime, prune):
    """Sampled at temperature 1: actions end at their limit, and no turn is what it should be."""
    config = replace(CONFIG, prune=prune, regime=regime, max_action_tokens=24, max_state_tokens=20)
    played = play(tokenizer, config)
    assert sum(t.turns == 9 for t in played) >= 5
    assert {t.finish_reason for t in played} <= {"turn_limit", "end_of_turn", "answered"}
    check(tokenizer, played, torch.float32)


@every_rule
def test_memory_is_bounded_by_the_formula_and_by_what_the_engine_reserved(
    tokenizer, prune, format, monkeypatch
):
    longest: list[int] = []
    read: list[int] = []
    feed = Engine.feed

    def watched(engine, rows, tokens, positions):
        hidden = feed(engine, rows, tokens, positions)
        longest.append(max(engine.cache.lengths))
        read.append(sum(map(len, tokens)))
        return hidden

    monkeypatch.setattr(Engine, "feed", watched)
    for regime in ("carry", "reencode"):
        config = replace(CONFIG, prune=prune, format=format, regime=regime, max_prompt_tokens=200)
        longest.clear()
        read.clear()
        played = play(tokenizer, config, seeds=range(12), expert=True)
        # What stood before the first token that left is not read again. (The last one that is left may be.)
        streams = sum(t.layout(regime).mask.shape[1] + t.turns for t in played)
        assert sum(read) <= streams
        peak = max(t.peak_tokens() for t in played)
        assert max(longest) <= peak <= config.peak_tokens()
        # An episode's last token is not fed; encoding again holds no token beside what it drives out.
        assert peak - max(longest) <= 1 or regime == "reencode"
    engine = make_engine(model_of(tokenizer), config, 4)
    assert engine.capacity == config.peak_tokens()


@every_rule
def test_a_stream_is_shorter_than_a_row_for_each_turn(tokenizer, prune, format):
    config = replace(CONFIG, prune=prune, format=format)
    rows = blocks = copies = 0
    for t in play_expert(tokenizer, lambda: ScriptedEnv(format), range(16), config):
        live, table = t.mask.visible_counts()[0], eviction_table(t.segments, prune)
        end, row = 0, 0
        for segment in t.segments:
            end += segment.length
            if by_policy(segment.kind) and segment.length:
                row = int(live[end - 1])  # context and what was written in it
                if segment.kind != "state" or end in table.lifetimes:
                    rows += row
        blocks += t.layout("reencode").mask.shape[1]
        copies += t.layout("carry").mask.shape[1]
    assert copies <= blocks < rows
    if prune in ("never", "fold", "summary"):
        assert rows > 2 * blocks


@every_rule
def test_a_file_keeps_what_was_forgotten(tokenizer, prune, format, tmp_path):
    config = replace(CONFIG, prune=prune, format=format)
    for t in play_expert(tokenizer, lambda: ScriptedEnv(format), range(3), config):
        again = Trajectory.from_dict(t.to_dict())
        assert again.to_json() == t.to_json() and torch.equal(again.mask.evict_at, t.mask.evict_at)
        assert isinstance(again.prune, Recorded) == (prune is forget_reasoning)
        table = eviction_table(again.segments, again.prune)
        assert str(table.recorded()) == policy_name(prune)
    pytest.importorskip("matplotlib")
    plot_trajectory(again, tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 10_000
    assert TrainConfig(rollout=config).to_dict()["rollout"]["prune"] in (prune, policy_name(prune))


def test_a_rule_that_brings_tokens_back_ends_the_run_with_their_names(tokenizer):
    def brings_back(segments: Sequence[Segment]) -> list[bool]:
        return [s.kind != "info" or len(segments) % 2 == 1 for s in segments]

    with pytest.raises(InputError, match=r"brings back token \d+ \(info of turn \d\) at token \d+"):
        play(tokenizer, replace(CONFIG, prune=brings_back), seeds=[0], expert=True)
    with pytest.raises(InputError, match="prune: expected 'action', a number of tokens"):
        replace(CONFIG, prune="sometimes")
    with pytest.raises(InputError, match="context_limit: expected None for a format without context_request"):
        replace(CONFIG, context_limit=5)
    assert replace(CONFIG, prune=np.int64(60)).prune == 60

    class WithALock:
        lock = threading.Lock()

        def __call__(self, segments):
            return [True] * len(segments)

    config = TrainConfig(rollout=replace(CONFIG, prune=WithALock()))
    assert config.to_dict()["rollout"]["prune"].endswith("WithALock")
    with pytest.raises(InputError, match="prune: expected a rule for all trajectories, got Recorded"):
        replace(CONFIG, prune=Recorded((None, 3)))


def test_the_loop_answers_notes_itself_and_asks_for_a_summary_when_the_context_is_full(tokenizer):
    class Asked(ScriptedEnv):
        def step(self, action):
            asked.append(action.kind)
            return super().step(action)

    asked: list[str] = []
    config = replace(CONFIG, prune="fold", format=FOLD)
    (t,) = play_expert(tokenizer, lambda: Asked(FOLD, (7, 7)), [0], config)
    kinds = [s.kind for s in t.segments if by_policy(s.kind) and s.kind != "state"]
    assert kinds == ["query", "branch", "query", "return", "query", "query", "branch", "answer"]
    assert asked == [kind for kind in kinds if kind in ("query", "answer")]

    class Talks(ScriptedEnv):
        def step(self, action):
            return super().step(action)._replace(observation="the river " * 200)

    config = replace(CONFIG, prune="summary", format=SUMMARY, context_limit=150, max_info_tokens=120)
    request = SUMMARY.context_request.strip()
    (t,) = play_expert(tokenizer, lambda: Talks(SUMMARY, (9, 9)), [1], config)
    assert max(s.length for s in t.segments if s.kind == "info") == 120, "texts are cut, the request is not"
    start, told, text = 0, 0, TokenText(tokenizer)
    for segment in t.segments:
        end = start + segment.length
        if segment.kind == "info":
            over = int((t.mask.evict_at[0, :start] > start).sum()) > 150
            assert (request in text.decode(t.tokens[start:end].tolist())) == over
            told += over
        start = end
    assert 0 < told < t.turns


def test_an_end_of_turn_ends_the_episode(tokenizer):
    model = model_of(tokenizer)
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = [eos, tokenizer.eos_token_id]
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
        head.bias[[eos, tokenizer.eos_token_id]] = 4.0
    make = lambda: ScriptedEnv(MEM1)  # noqa: E731
    played = list(rollout(model, tokenizer, make, range(12), replace(CONFIG, max_action_tokens=60)))
    ended = [t for t in played if t.finish_reason == "end_of_turn"]
    assert len(ended) > 8 and {int(t.tokens[-1]) for t in ended} == {eos, tokenizer.eos_token_id}
    assert all(t.reward == t.turns and t.error_kind == "" for t in ended), "it is graded as it stands"


def test_the_prompt_of_a_group_is_read_once(tokenizer, monkeypatch):
    """And what is sampled is what each would have sampled alone."""
    read: list[int] = []
    feed = Engine.feed

    def watched(engine, rows, tokens, positions):
        read.append(sum(map(len, tokens)))
        return feed(engine, rows, tokens, positions)

    monkeypatch.setattr(Engine, "feed", watched)
    config = replace(CONFIG, max_turns=1, max_action_tokens=10, max_num_batched_tokens=16)
    for regime in ("carry", "reencode"):
        config = replace(config, regime=regime)
        read.clear()
        played = play(tokenizer, config, seeds=[3, 4], group_size=6)
        prompts = {t.seed: t.segments[0].length for t in played}
        assert len(played) == 12 and min(prompts.values()) > 16
        written = sum(int(t.policy_mask.sum()) for t in played)
        assert sum(read) <= sum(prompts.values()) + 12 + written, "a prompt each, and its last token for all"
        assert len({(t.seed, t.sampling_seed) for t in played}) == 12
        assert len({tuple(t.tokens.tolist()) for t in played}) == 12, "other samples"
        assert_close_alone(tokenizer, config, played[:4])


def assert_close_alone(tokenizer, config, played):
    for t in played:
        (alone,) = play(tokenizer, config, seeds=[t.seed], sampling_seed=t.sampling_seed)
        assert torch.equal(alone.tokens, t.tokens)
        torch.testing.assert_close(alone.logprobs, t.logprobs, atol=5e-5, rtol=0)


def test_an_engine_that_is_too_small_is_refused_before_anything_runs(tokenizer):
    model = model_of(tokenizer)
    small = make_engine(model, replace(CONFIG, max_action_tokens=8), 4)
    with pytest.raises(ValueError, match=r"engine: expected a capacity of at least \d+, .* got \d+"):
        rollout(model, tokenizer, ScriptedEnv, [0], CONFIG, engine=small)
    for wrong in (0, "2", None, 1.5):
        with pytest.raises(InputError, match="group_size: expected an integer >= 1"):
            rollout(model, tokenizer, ScriptedEnv, [0], CONFIG, group_size=wrong)


def test_nothing_of_an_episode_stays_in_the_engine(tokenizer, monkeypatch):
    """Numbers that are not finite among it, though the last token's are never sampled from; nor in the slot
    of a longer one into which a shorter one moves.
    """
    model = model_of(tokenizer)
    config = replace(CONFIG, max_num_batched_tokens=24)  # who reads first ends first
    engine = make_engine(model, config, 3)
    feed, begun = Engine.feed, []

    def watched(engine, rows, tokens, positions):
        begun.extend(bool(engine.cache.kv[:, :, row].any()) for row in rows if not engine.cache.lengths[row])
        return feed(engine, rows, tokens, positions)

    move = Slots.move

    def watched_move(cache, source, target):
        move(cache, source, target)
        begun.append(bool(cache.kv[:, :, target, cache.lengths[source] :].any()))

    monkeypatch.setattr(Engine, "feed", watched)
    monkeypatch.setattr(Slots, "move", watched_move)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.encode(">", add_special_tokens=False)] = torch.nan
    played = list(
        rollout(model, tokenizer, lambda: ScriptedEnv(MEM1), range(5), config, engine=engine, expert=True)
    )
    assert len(played) == 5 and not engine.cache.kv.any()
    assert len(begun) > 5 and not any(begun)


def test_long_texts_are_read_in_chunks_while_others_write(tokenizer, monkeypatch):
    steps: list[list[int]] = []
    feed = Engine.feed

    def watched(engine, rows, tokens, positions):
        steps.append([len(t) for t in tokens])
        return feed(engine, rows, tokens, positions)

    config = replace(CONFIG, max_num_batched_tokens=24)
    whole = {t.seed: t for t in play(tokenizer, CONFIG, seeds=range(8), expert=True)}
    monkeypatch.setattr(Engine, "feed", watched)
    for t in play(tokenizer, config, seeds=range(8), expert=True):
        assert torch.equal(t.tokens, whole[t.seed].tokens)
        torch.testing.assert_close(t.logprobs, whole[t.seed].logprobs, atol=5e-5, rtol=0)
    assert max(sum(n for n in step if n > 1) for step in steps) <= 24
    assert sum(1 in step and max(step) > 1 for step in steps) > 10, "writing goes on beside reading"
