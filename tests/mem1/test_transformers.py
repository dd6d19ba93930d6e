"""The attention function "mem1" inside transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2ForCausalLM

from mem1_core.trajectory import Segment, TrajectoryMask

SEGMENTS = [
    Segment("prompt", 0, 11),
    *(Segment(kind, turn, n) for turn in range(1, 5) for kind, n in (("is", 7), ("query", 4), ("info", 9))),
]
MASK = TrajectoryMask.from_turns(SEGMENTS)
N = MASK.shape[1]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(11, 200, (1, N), generator=torch.Generator().manual_seed(0))


def twin(model: Qwen2ForCausalLM, implementation: str) -> Qwen2ForCausalLM:
    other = type(model)._from_config(model.config, attn_implementation=implementation)
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_the_mask_is_the_dense_mask(make_model, tokens):
    model = make_model()
    logits = model(tokens, mem1_mask=MASK, use_cache=False).logits
    expected = twin(model, "sdpa")(tokens, attention_mask=MASK.dense()[:, None], use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_without_the_mask_the_model_is_as_under_sdpa(make_model, tokens):
    model = make_model()
    reference = twin(model, "sdpa")
    padding = torch.ones(1, N, dtype=torch.int64)
    padding[:, :6] = 0
    packed = torch.cat([torch.arange(20), torch.arange(N - 20)])[None]
    for settings in ({}, {"attention_mask": padding}, {"position_ids": packed, "use_cache": False}):
        torch.testing.assert_close(model(tokens, **settings).logits, reference(tokens, **settings).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    torch.testing.assert_close(model.generate(tokens, **options), reference.generate(tokens, **options))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # 5.17 has no other
def test_gradient_checkpointing_changes_nothing(make_model, tokens):
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        logits = model(tokens, position_ids=torch.arange(N)[None], mem1_mask=MASK, use_cache=False).logits
        logits.log_softmax(-1)[..., 17].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_no_square_mask_is_made_for_training(make_model, tokens, monkeypatch):
    """Positions that jump make transformers build an [N, N] mask of packed sequences: not with mem1_mask."""
    from transformers import masking_utils

    from mem1_core.integrations import transformers as integration

    def forbidden(**_: object) -> None:
        raise AssertionError("a mask was built")

    assert integration.sdpa_mask is masking_utils.sdpa_mask
    monkeypatch.setattr(integration, "sdpa_mask", forbidden)
    positions = torch.cat([torch.arange(20), torch.arange(N - 20)])[None]
    make_model()(tokens, position_ids=positions, mem1_mask=MASK, use_cache=False)


def test_what_cannot_work_is_refused(make_model, tokens):
    sliding = make_model(use_sliding_window=True, sliding_window=16, max_window_layers=1)
    with pytest.raises(ValueError, match="cannot run a layer that uses sliding_window"):
        sliding(tokens, mem1_mask=MASK, use_cache=False)
    with pytest.raises(ValueError, match="either mem1_mask or attention_mask"):
        make_model()(tokens, attention_mask=MASK.dense()[:, None], mem1_mask=MASK, use_cache=False)
    with pytest.raises(ValueError, match="wants attention dropout 0"):
        make_model(attention_dropout=0.1).train()(tokens, mem1_mask=MASK, use_cache=False)
