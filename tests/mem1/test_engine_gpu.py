"""The engine on a GPU: decode steps from a CUDA graph, and the promise of parity there."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from mem1 import slots
from mem1.config import RolloutConfig
from mem1.engine import CapturedStep, Engine
from mem1.envs.multihop import MultiHopEnv
from mem1.evaluate import parity
from mem1.rollout import rollout

pytestmark = pytest.mark.gpu

FLASH = importlib.util.find_spec("flash_attn") is not None


def test_a_captured_step_is_the_eager_one(make_model, monkeypatch):
    """Ragged slots, with idle ones in between, over a growth of the cache and several sizes of graphs."""
    model = make_model().cuda()
    engines = Engine(model, slots=6), Engine(model, slots=6)
    captured = []
    init = CapturedStep.__init__
    monkeypatch.setattr(
        CapturedStep, "__init__", lambda self, body: (captured.append(1), init(self, body))[1]
    )
    generator = torch.Generator().manual_seed(0)
    for rows, new in [([0, 2, 5], 200), ([1], 9)]:
        tokens = torch.randint(11, 200, (len(rows), new), generator=generator).tolist()
        for engine in engines:
            engine.feed(rows, tokens, [list(range(new))] * len(rows))
    for step in range(70):
        rows = [0, 2, 5] if step % 3 else [0, 1]
        tokens = torch.randint(11, 200, (len(rows), 1), generator=generator).tolist()
        positions = [[int(engines[0].cache.lengths[row])] for row in rows]
        graph = engines[0].feed(rows, tokens, positions)
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_decode", Engine._prefill)
            eager = engines[1].feed(rows, tokens, positions)
        torch.testing.assert_close(graph, eager, atol=2e-4, rtol=1e-4)
    assert len(captured) >= 3
    assert torch.equal(engines[0].cache.lengths, engines[1].cache.lengths)


@pytest.mark.parametrize("attention", ["sdpa", "flash"] if FLASH else ["sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("regime", ["carry", "reencode"])
@pytest.mark.parametrize("batch", [1, 64])
def test_parity(make_model, tokenizer, monkeypatch, attention, dtype, regime, batch):
    if attention == "flash" and dtype == torch.float32:
        pytest.skip("flash-attn takes bfloat16 and float16")
    if attention == "sdpa":
        monkeypatch.setattr(slots, "use_flash_attention", lambda kv: False)
    model = make_model(dtype).cuda()
    config = RolloutConfig(slots=batch, regime=regime, max_turns=12)
    seeds = range(4 if batch == 1 else 64)
    played = list(rollout(model, tokenizer, lambda: MultiHopEnv((1, 4)), seeds, config, scripted=True))
    assert len({t.turns for t in played}) >= 2
    result = parity(model, played, regime)
    if dtype == torch.float32:
        assert result.max_dlogp <= 5e-5, result
    else:
        assert result.mean_dlogp <= 5e-3 and result.kl <= 1e-4, result
