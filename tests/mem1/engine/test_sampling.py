"""The sampler: distributions, log-probs, and that a row follows from its own logits alone."""

from __future__ import annotations

import pytest
import torch

from mem1.config import RolloutConfig
from mem1.engine import sampling
from mem1.engine.sampling import rows_at_once, sample, temporary_bytes

FREE = -torch.ones(1, dtype=torch.int64)


def test_the_logprob_is_that_of_the_full_distribution():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    config = RolloutConfig(temperature=0.7, top_p=0.5, top_k=10)
    tokens, logprobs, _ = sample(logits, torch.rand(64), FREE.expand(64), config)
    expected = (logits / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected)


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    n = 20_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    tokens, _, _ = sample(logits.expand(n, 4), uniform, FREE.expand(n), RolloutConfig())
    share = torch.bincount(tokens, minlength=4) / n
    torch.testing.assert_close(share, logits[0].softmax(-1), atol=0.01, rtol=0)
    assert share[2] == 0


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_top_k_and_top_p_cut_the_tail(uniform):
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    number = torch.tensor([uniform])
    assert sample(logits, number, FREE, RolloutConfig(top_k=1))[0].item() == 0
    assert sample(logits, number, FREE, RolloutConfig(top_k=2))[0].item() <= 1
    assert sample(logits, number, FREE, RolloutConfig(top_p=0.39))[0].item() == 0
    assert sample(logits, number, FREE, RolloutConfig(top_p=1e-46))[0].item() == 0
    assert sample(logits, number, FREE, RolloutConfig(top_p=0.69))[0].item() <= 1
    assert sample(logits, number, FREE, RolloutConfig(greedy=True))[0].item() == 0


def test_forced_tokens_are_taken():
    tokens, logprobs, _ = sample(torch.zeros(2, 8), torch.rand(2), torch.tensor([5, -1]), RolloutConfig())
    assert tokens[0] == 5
    torch.testing.assert_close(logprobs, torch.full((2,), 8.0).log().neg())


@pytest.mark.parametrize("settings", [{"top_k": 4}, {"top_p": 0.7}, {"top_k": 8, "top_p": 0.5}])
def test_the_rollout_logprob_is_that_of_what_is_left(settings):
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    config = RolloutConfig(temperature=0.7, **settings)
    tokens, logprobs, drawn = sample(logits, torch.rand(64), FREE.expand(64), config)
    for row in range(64):
        probs, order = (logits[row] / 0.7).double().softmax(0).sort(descending=True)
        probs = probs[: config.top_k or 50]
        probs = probs[(probs.cumsum(0) - probs) < config.top_p * probs.sum()]
        place = order.tolist().index(int(tokens[row]))
        torch.testing.assert_close(drawn[row], (probs / probs.sum())[place].log().float())
    forced = sample(logits, torch.rand(64), torch.full((64,), 7), config)
    assert torch.equal(forced.rollout_logprobs, forced.logprobs)


def test_nothing_cut_has_one_logprob_and_a_greedy_choice_is_certain():
    logits, uniform = torch.randn(4, 50), torch.rand(4)
    assert sample(logits, uniform, FREE.expand(4), RolloutConfig()).rollout_logprobs is None
    greedy = sample(logits, uniform, torch.tensor([-1, -1, 3, -1]), RolloutConfig(greedy=True, top_k=2))
    assert greedy.rollout_logprobs.tolist() == [0.0, 0.0, greedy.logprobs[2].item(), 0.0]


CONFIGS = [
    RolloutConfig(temperature=0.7),
    RolloutConfig(greedy=True),
    RolloutConfig(top_p=0.9),
    RolloutConfig(top_p=0.999, top_k=40),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "greedy", "top_p", "top_k"])
@pytest.mark.parametrize("vocabulary", [1, 200, 5003])
def test_a_row_is_the_same_bit_for_bit_whoever_shares_its_batch(config, vocabulary, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(37, vocabulary, generator=generator)
    logits[::2] /= 100  # whose nucleus is wide
    uniform = torch.rand(37, dtype=torch.float64, generator=generator)
    forced = torch.where(torch.arange(37) % 5 > 0, -1, 0)
    whole = sample(logits, uniform, forced, config)
    for rows in (1, 2, 5, 16):
        monkeypatch.setattr(sampling, "rows_at_once", lambda *_, rows=rows: rows)
        for mine, theirs in zip(sample(logits, uniform, forced, config), whole, strict=True):
            assert mine is theirs is None or torch.equal(mine, theirs)


def test_a_nucleus_is_that_of_a_full_sort(monkeypatch):
    logits = 2 * torch.randn(9, 3000, generator=torch.Generator().manual_seed(0))
    uniform, free = torch.rand(9, dtype=torch.float64), FREE.expand(9)
    for top_p in (0.1, 0.5, 0.9, 0.99999):
        config = RolloutConfig(top_p=top_p)
        monkeypatch.setattr(sampling, "_LIKELIEST", 3000)
        whole = sample(logits, uniform, free, config)
        for likeliest in (1, 64, 1024):
            monkeypatch.setattr(sampling, "_LIKELIEST", likeliest)
            assert all(map(torch.equal, sample(logits, uniform, free, config), whole))


def test_the_largest_number_leads_to_a_token_that_has_a_weight():
    logits = torch.tensor([[0.3, 0.1, -torch.inf, -torch.inf]])
    for number in (1 - 2**-53, 1.0):  # the latter is what float32 makes of the former
        assert sample(logits, torch.tensor([number], dtype=torch.float64), FREE, RolloutConfig())[0] == 1


def test_numbers_that_are_not_finite_show_in_the_logprob():
    logits = torch.zeros(3, 8)
    logits[0, 3], logits[1, 3] = torch.nan, torch.inf
    for config in CONFIGS:
        logprobs = sample(logits, torch.rand(3), FREE.expand(3), config).logprobs
        assert logprobs.isfinite().tolist() == [False, False, True]


def test_temporaries_are_bounded():
    for device in ("cpu", "cuda"):
        assert temporary_bytes(10_000, 151_936, torch.device(device)) <= 32 * 2**20
        assert rows_at_once(10**8, torch.device(device)) == 1
