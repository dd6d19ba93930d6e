"""The slot cache against one forward without a cache, and logits against the trainer's."""

from __future__ import annotations

import re

import pytest
import torch

from mem1.checks import InputError
from mem1.config import RolloutConfig
from mem1.engine.engine import Engine, reserved_tokens
from mem1_core.mask import TrajectoryMask
from mem1_core.ops import linear_logprob


def whole_forward(model, tokens, positions, evict):
    """Hidden states [n, H] of one forward with the mask `evict`."""
    with torch.no_grad():
        return model.get_decoder()(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.tensor([positions]),
            mem1_mask=TrajectoryMask.from_evict(torch.tensor(evict)),
            use_cache=False,
        ).last_hidden_state[0]


@pytest.mark.parametrize("max_num_batched_tokens", [1, 40, 10_000])
def test_ragged_feeding_is_one_forward(make_model, max_num_batched_tokens):
    model, generator = make_model(), torch.Generator().manual_seed(1)
    streams = [torch.randint(11, 200, (n,), generator=generator).tolist() for n in (29, 7, 18)]
    engine = Engine(model, num_slots=4, max_num_batched_tokens=max_num_batched_tokens)
    cursor = {0: 0, 1: 0, 3: 0}
    rows = list(cursor)
    for chunk in ((5, 3, 9), (1, 1, 1), (13, 1, 4), (10, 2, 4)):
        tokens = [streams[i][cursor[r] : cursor[r] + chunk[i]] for i, r in enumerate(rows)]
        positions = [list(range(cursor[r], cursor[r] + chunk[i])) for i, r in enumerate(rows)]
        hidden = engine.feed(rows, tokens, positions)
        for i, row in enumerate(rows):
            cursor[row] += chunk[i]
            n = cursor[row]
            expected = whole_forward(model, streams[i][:n], list(range(n)), [n] * n)[-1]
            torch.testing.assert_close(hidden[i], expected, atol=2e-4, rtol=1e-4)
    assert engine.cache.lengths == [29, 7, 0, 18]


def test_pruning_is_masking_by_evict(make_model):
    """Entries removed between two steps and the lifetimes of one forward are the same function."""
    model = make_model()
    tokens = torch.randint(11, 200, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    engine = Engine(model, num_slots=2)
    engine.feed([1], [tokens[:12]], [list(range(12))])
    keep = torch.tensor([j % 3 != 1 for j in range(12)])
    engine.cache.prune({1: keep})
    assert engine.cache.lengths == [0, 8]
    hidden = engine.feed([1], [tokens[12:]], [list(range(12, 20))])[0]
    evict = [20 if k else 12 for k in keep.tolist()] + [20] * 8
    torch.testing.assert_close(
        hidden, whole_forward(model, tokens, list(range(20)), evict)[-1], atol=2e-4, rtol=1e-4
    )


def test_move_and_truncate(make_model):
    model = make_model()
    tokens = torch.randint(11, 200, (9,), generator=torch.Generator().manual_seed(3)).tolist()
    engine = Engine(model, num_slots=3)
    engine.feed([0, 2], [tokens[:4], tokens[:8]], [list(range(4)), list(range(8))])
    engine.cache.move(2, 0)
    engine.cache.truncate(0, 6)
    assert engine.cache.lengths == [6, 0, 8]
    hidden = engine.feed([0], [tokens[6:]], [[6, 7, 8]])[0]
    torch.testing.assert_close(
        hidden, whole_forward(model, tokens, list(range(9)), [9] * 9)[-1], atol=2e-4, rtol=1e-4
    )


def test_prune_names_a_wrong_shape(make_model):
    engine = Engine(make_model(), num_slots=1)
    engine.feed([0], [[11, 12, 13]], [[0, 1, 2]])
    with pytest.raises(ValueError, match=r"keep: expected shape \[3\], the length of slot 0, got \[4\]"):
        engine.cache.prune({0: torch.ones(4, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_implementation": "sdpa"}, "expected attn_implementation='mem1', got 'sdpa'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "expected frequencies that stay as they are, got rope_type='dynamic'",
        ),
        ({"logits_scaling": 8.0}, "expected logits that are hidden states times the output weight, got"),
        ({"final_logit_softcapping": 0.01}, "expected logits that are hidden states times the output weight"),
    ],
)
def test_models_that_the_trainer_would_not_agree_with_are_refused(make_model, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Engine(make_model(**settings), num_slots=1)


def test_dropout_in_training_mode_is_refused(make_model):
    model = make_model()
    model.get_decoder().layers[0].mlp = torch.nn.Sequential(
        model.get_decoder().layers[0].mlp, torch.nn.Dropout(0.1)
    )
    Engine(model.eval(), num_slots=1)
    with pytest.raises(ValueError, match=r"expected model.eval\(\), as it has dropout"):
        Engine(model.train(), num_slots=1)


def watched_forwards(monkeypatch) -> list[int]:
    """The number of tokens of each forward to come."""
    sizes: list[int] = []
    forward = Engine._forward

    def watched(engine, tokens, *rest):
        sizes.append(tokens.numel())
        return forward(engine, tokens, *rest)

    monkeypatch.setattr(Engine, "_forward", watched)
    return sizes


def test_long_rows_are_read_in_pieces(make_model, monkeypatch):
    model = make_model()
    streams = torch.randint(11, 200, (2, 50), generator=torch.Generator().manual_seed(5)).tolist()
    streams[1] = streams[1][:20]
    places = [list(range(len(stream))) for stream in streams]
    whole = Engine(model, num_slots=2).feed([0, 1], streams, places)
    sizes = watched_forwards(monkeypatch)
    monkeypatch.setattr("mem1.engine.engine._PIECE", 16)
    engine = Engine(model, num_slots=2)
    torch.testing.assert_close(engine.feed([0, 1], streams, places), whole, atol=2e-4, rtol=1e-4)
    assert sizes == [2, 16, 20, 32] and engine.cache.lengths == [50, 20]


def test_only_the_rows_that_are_fed_are_computed(make_model, monkeypatch):
    """On the CPU a row that waits costs nothing."""
    engine = Engine(make_model(), num_slots=8)
    engine.feed([0, 5, 7], [[11, 12]] * 3, [[0, 1]] * 3)
    sizes = watched_forwards(monkeypatch)
    engine.feed([0, 7], [[13], [14]], [[2], [2]])
    assert sizes == [2] and engine.cache.lengths == [3, 0, 0, 0, 0, 2, 0, 3]


def test_a_session_sees_the_weights_as_they_are_and_leaves_nothing(make_model):
    model = make_model(torch.bfloat16)
    engine = Engine(model, num_slots=2)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    with engine.session():
        assert torch.equal(engine.head.weight, model.get_output_embeddings().weight)
        engine.feed([1], [[11, 12]], [[0, 1]])
        with pytest.raises(RuntimeError, match="engine: already in use"), engine.session():
            pass
        assert engine.cache.lengths == [0, 2]
    assert engine.cache.lengths == [0, 0] and not engine.cache.kv.any()
    with engine.session():
        pass


def test_what_lies_behind_a_length_is_not_read(make_model):
    model, tokens = make_model(), [11, 12, 13, 14]
    engine = Engine(model, num_slots=1)
    engine.feed([0], [tokens[:2]], [[0, 1]])
    with torch.inference_mode():
        engine.cache.kv[:, :, :, 2:4] = torch.nan
    for n in (2, 3):
        hidden = engine.feed([0], [tokens[n : n + 1]], [[n]])[0]
    expected = whole_forward(model, tokens, list(range(4)), [4] * 4)[-1]
    torch.testing.assert_close(hidden, expected, atol=2e-4, rtol=1e-4)
    engine.cache.clear(0)
    assert engine.cache.kv.isfinite().all() and engine.cache.lengths == [0]


def test_a_model_that_cannot_be_used_is_the_users_error(make_model):
    with pytest.raises(InputError, match="expected attn_implementation='mem1', got 'sdpa'"):
        Engine(make_model(attn_implementation="sdpa"), num_slots=1)
    with pytest.raises(InputError, match="expected logits that are hidden states times"):
        Engine(make_model(logits_scaling=8.0), num_slots=1)


def test_an_engine_has_a_slot(make_model):
    with pytest.raises(InputError, match="num_slots: expected an integer >= 1, got 0"):
        Engine(make_model(), 0)


def test_a_capacity_is_kept_and_a_feed_beyond_it_changes_nothing(make_model):
    model, tokens = make_model(), list(range(11, 31))
    engine, growing = Engine(model, 2, capacity=20), Engine(model, 2)
    address = engine.cache.kv.data_ptr()
    for feed in (engine.feed, growing.feed):
        feed([0, 1], [tokens[:18], tokens[:3]], [list(range(18)), [0, 1, 2]])
    before = engine.cache.kv.clone()
    with pytest.raises(
        ValueError, match="tokens: expected at most 20, the capacity of the engine, in slot 0, "
    ):
        engine.feed([1, 0], [[11], [11, 12, 13]], [[3], [18, 19, 20]])
    assert engine.cache.lengths == [18, 3] and torch.equal(engine.cache.kv, before)
    rest = [[0], [tokens[18:]], [[18, 19]]]
    assert torch.equal(engine.feed(*rest), growing.feed(*rest))
    assert engine.cache.kv.data_ptr() == address and engine.cache.capacity == 20


def test_a_capacity_is_checked(make_model):
    with pytest.raises(InputError, match="capacity: expected an integer >= 1 or None, got 0"):
        Engine(make_model(), 1, capacity=0)


def test_on_a_gpu_every_slot_has_a_place_past_its_end():
    assert [reserved_tokens(n, torch.device("cuda")) for n in (1, 255, 256)] == [256, 256, 512]
    assert reserved_tokens(255, torch.device("cpu")) == 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_trainers_and_the_weight_is_no_copy(make_model, dtype):
    model = make_model(dtype)
    engine = Engine(model, 1)
    weight = model.get_output_embeddings().weight
    assert engine.head.weight.data_ptr() == weight.data_ptr()
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = engine.logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ weight.float().T, atol=1e-5, rtol=1e-5)
    numbers, free = torch.rand(5, dtype=torch.float64), torch.full((5,), -1)
    tokens, logprobs, _ = engine.sample(hidden, numbers, free, RolloutConfig(temperature=0.8))
    expected, _ = linear_logprob(hidden, weight.detach(), tokens, 0.8)
    torch.testing.assert_close(logprobs, expected, atol=2e-6, rtol=1e-6)


def test_logits_exist_for_some_rows_at_a_time(make_model, monkeypatch):
    """And what is sampled does not depend on how many."""
    engine = Engine(make_model(), 1)
    hidden = torch.randn(23, 64, generator=torch.Generator().manual_seed(0))
    numbers, forced = torch.rand(23, dtype=torch.float64), torch.arange(23) % 4 - 1
    config = RolloutConfig(top_p=0.9)
    whole = engine.sample(hidden, numbers, forced, config)
    sizes = []
    logits = Engine.logits
    monkeypatch.setattr(Engine, "logits", lambda self, h: (sizes.append(len(h)), logits(self, h))[1])
    monkeypatch.setattr("mem1.engine.engine.LOGITS_BYTES", 5 * 4 * len(engine.head.weight))
    assert all(map(torch.equal, engine.sample(hidden, numbers, forced, config), whole))
    assert sizes == [5, 5, 5, 5, 3]
