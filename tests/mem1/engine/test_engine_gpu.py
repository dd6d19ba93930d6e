"""The engine on a GPU: decode steps from a CUDA graph, and the promise of parity there."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from mem1.config import RolloutConfig
from mem1.engine.cuda_graphs import Graphs
from mem1.engine.engine import Engine
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.rollout.rollout_loop import rollout
from mem1.train.parity import parity

pytestmark = pytest.mark.gpu

FLASH = importlib.util.find_spec("flash_attn") is not None


def test_a_captured_step_is_the_eager_one(make_model, monkeypatch):
    """Ragged slots, with idle ones in between, several sizes of graphs, a growth of the cache that makes them
    anew, and prunes between their replays.
    """
    model = make_model().cuda()
    graphed, eager = Engine(model, num_slots=6), Engine(model, num_slots=6)
    eager._graphs = None
    captured = []
    capture = Graphs._capture
    monkeypatch.setattr(Graphs, "_capture", lambda self, body: (captured.append(1), capture(self, body))[1])
    generator = torch.Generator().manual_seed(0)

    def feed(rows, new):
        tokens = torch.randint(11, 200, (len(rows), new), generator=generator).tolist()
        positions = [list(range(n, n + new)) for n in (eager.cache.lengths[row] for row in rows)]
        first, second = (engine.feed(rows, tokens, positions) for engine in (graphed, eager))
        torch.testing.assert_close(first, second, atol=2e-4, rtol=1e-4)

    feed([0, 2, 5], 200)
    feed([1], 9)
    for step in range(70):
        feed([0, 2, 5] if step % 3 else [0, 1], 1)
        if step == 30:
            feed([3], 600)  # an idle slot outgrows the cache
        if step % 20 == 10:
            keep = torch.arange(eager.cache.lengths[2]) % 7 > 0
            for engine in (graphed, eager):
                engine.cache.prune({2: keep})
        if step == 50:
            for engine in (graphed, eager):
                engine.cache.move(5, 4)
                engine.cache.truncate(5, 100)
    assert len(captured) >= 4
    assert graphed.cache.lengths == eager.cache.lengths


@pytest.mark.parametrize("attention", ["sdpa", "flash"] if FLASH else ["sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("regime", ["carry", "reencode"])
@pytest.mark.parametrize("batch", [1, 64])
def test_parity(make_model, tokenizer, monkeypatch, attention, dtype, regime, batch):
    if attention == "flash" and dtype == torch.float32:
        pytest.skip("flash-attn takes bfloat16 and float16")
    if attention == "sdpa":
        monkeypatch.setattr("mem1.engine.engine.find_flash_attention", lambda kv: None)
    model = make_model(dtype).cuda()
    config = RolloutConfig(num_slots=batch, regime=regime, max_turns=12)
    seeds = range(4 if batch == 1 else 64)
    played = list(rollout(model, tokenizer, lambda: MultiHopEnv((1, 4)), seeds, config, expert=True))
    assert len({t.turns for t in played}) >= 2
    result = parity(model, played, regime)
    if dtype == torch.float32:
        assert result.max_dlogp <= 5e-5, result
    else:
        assert result.mean_dlogp <= 5e-3 and result.kl <= 1e-4, result
