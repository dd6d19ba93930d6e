"""Linear layers by block products are torch's, to rounding, and are used where they should be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mem1.engine import cpu_products
from mem1.engine.cpu_products import BlockProducts, has_large_layers
from mem1.engine.engine import Engine


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Rows of each product by blocks."""
    rows: list[int] = []
    linear = cpu_products._linear
    monkeypatch.setattr(
        cpu_products, "_linear", lambda x, *rest: (rows.append(x[..., 0].numel()), linear(x, *rest))[1]
    )
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3,), (1, 8), (2, 3, 5), (32,), (40,)])
@pytest.mark.parametrize("bias", [False, True])
def test_they_are_torchs(dtype, shape, bias, calls, monkeypatch):
    monkeypatch.setattr(torch.ops.mem1_core, "_linear_in_bfloat16", lambda: False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 512, generator=generator).to(dtype)
    weight = torch.randn(520, 512, generator=generator).to(dtype)
    b = torch.randn(520, generator=generator).to(dtype) if bias else None
    with torch.inference_mode(), BlockProducts():
        got = F.linear(x, weight, b)
        apart = F.linear(x.transpose(0, -2) if x.dim() > 2 else x, weight, b)  # other strides
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    error, torchs = ((y.double() - exact).abs().max() for y in (got, F.linear(x, weight, b)))
    assert got.dtype == dtype and got.shape == (*shape, 520)
    assert error <= 2 * torchs + 1e-6 * exact.abs().max()
    if x.dim() > 2:
        apart = apart.transpose(0, -2)
    torch.testing.assert_close(apart, got)
    rows = got[..., 0].numel()
    taken = rows in (cpu_products._FLOAT32_ROWS if dtype == torch.float32 else cpu_products._BFLOAT16_ROWS)
    assert calls == [rows] * 2 * taken


def test_what_they_leave_to_torch(calls):
    x, weight = torch.randn(8, 512), torch.randn(520, 512)
    with torch.inference_mode(), BlockProducts():
        F.linear(x[:1], weight)  # few rows
        F.linear(x.double(), weight.double())
        F.linear(x[:, :64], weight[:64, :64].contiguous())  # a small layer
        F.linear(torch.randn(8, 520), weight.T)  # a weight that is not contiguous
        assert calls == []
        F.linear(x, weight)
    F.linear(x, weight)
    assert calls == [8]


def test_an_engine_uses_them_for_large_layers_alone(make_model, calls):
    small, large = make_model(), make_model(hidden_size=512, intermediate_size=520, num_hidden_layers=1)
    assert not has_large_layers(small.get_decoder()) and has_large_layers(large.get_decoder())
    assert not has_large_layers(nn.Embedding(1000, 512))
    for model in (small, large):
        engine = Engine(model, 4)
        tokens, places = [[11, 12], [13], [14, 15]], [[0, 1], [0], [0, 1]]
        hidden = engine.feed([0, 1, 2], tokens, places)
        for row in range(3):
            ids = torch.tensor(tokens[row])[None]
            alone = model.get_decoder()(input_ids=ids).last_hidden_state[0, -1]
            torch.testing.assert_close(hidden[row], alone, atol=1e-4, rtol=1e-4)
    assert set(calls) == {5}, "5 tokens in one forward of the large one, none of the small one's"
