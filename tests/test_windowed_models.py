"""Models whose layers have windows, sinks, soft caps or values of another size, against eager attention in
transformers: small ones with random weights, contexts longer than their window of 16.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_families import IDS, MASK, POSITIONS, engine_error, mask_error, slots_errors
from test_integration_transformers import EXPERTS, LAYOUT, SEGMENTS, additive, build, tokens, twin
from test_transformers_generate import CODEC, FOUR_TURNS, PROMPTS, distance, generate, no_prune
from test_transformers_generate import ids as ids_of
from torch import Tensor
from transformers import PreTrainedModel

from mem1.engine.engine import Engine
from mem1.parsing.turn_eviction import TurnEviction
from mem1_core.integrations.transformers import check_model, has_windows
from mem1_core.integrations.transformers_cache import CACHE, SlotCache
from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TrajectoryMask
from mem1_core.testing import assert_accurate, gradients

BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma2": BOTH | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "Gemma3": BOTH | {"query_pre_attn_scalar": 40},  # two RoPE bases, norms of queries and keys
    "Mistral": {"sliding_window": 16},  # every layer
    "GptOss": BOTH | EXPERTS | {"num_local_experts": 1},  # sinks
    "Phi3": {"sliding_window": 16},  # queries, keys and values are one product
    "Olmo3": BOTH,
    "Cohere2": BOTH,  # full layers without positions
    "DeepseekV3": {  # 24 channels of queries and keys, 16 of values
        "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 2,
    },
}  # fmt: skip
every_family = pytest.mark.parametrize("family", FAMILIES)
CACHED = [family for family in FAMILIES if family != "DeepseekV3"]  # which no SlotCache holds


def small(family: str, implementation: str = "mem1") -> PreTrainedModel:
    return build(family, implementation, **FAMILIES[family])


def dense(mask: TrajectoryMask, config: Any, dtype: torch.dtype | None = None) -> Any:
    """bool [B, 1, N, N], of each kind of layers; with a dtype what is added to scores."""

    def of(mask: TrajectoryMask) -> Tensor:
        return mask.dense()[:, None] if dtype is None else additive(mask, dtype)

    if not has_windows(config):
        return of(mask)
    near = of(mask.windowed(16))
    kinds = getattr(config, "layer_types", None)
    return {"full_attention": of(mask), "sliding_attention": near} if kinds else near


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_parity_with_eager(family: str, dtype: torch.dtype) -> None:
    """Logits and the gradient of every parameter, by the rule of two eager errors; carried contexts and
    re-encoded ones, whose prompts stand further away in the stream than in position.
    """
    mask, positions = LAYOUT.mask, LAYOUT.position_ids[None]
    model = small(family).to(dtype)
    check_model(model)

    def run(model: PreTrainedModel, **masks: Any) -> dict[str, Tensor]:
        logits = model(tokens(mask), position_ids=positions, use_cache=False, **masks).logits
        names, parameters = zip(*model.named_parameters(), strict=True)
        return {"logits": logits} | dict(zip(names, gradients(logits, parameters), strict=True))

    got = run(model, mem1_mask=mask)
    eager = run(twin(model, "eager"), attention_mask=dense(mask, model.config, dtype))
    # Not "eager": its softmax is fp32 whatever the model's dtype is.
    double = twin(model, "mem1", torch.float64)
    double.set_experts_implementation("eager")  # grouped products have no fp64
    exact = run(double, attention_mask=dense(mask, model.config))
    for name in exact:
        assert_accurate(got[name], eager[name], exact[name], name=name)
    if has_windows(model.config) and dtype == torch.float32:
        everywhere = twin(model, "eager")(
            tokens(mask), position_ids=positions, use_cache=False, attention_mask=additive(mask, dtype)
        )
        assert (everywhere.logits - got["logits"]).abs().max() > 1e-3, "the window shows"


@every_family
@torch.no_grad()
def test_reencoded_contexts_are_contexts(family: str) -> None:
    """A policy's token is predicted as transformers does, by itself, from the tokens that it sees."""
    layout = TrajectoryLayout.from_segments(SEGMENTS, regime="reencode")
    model, eager = small(family), small(family, "eager")
    ids = tokens(TrajectoryLayout.from_segments(SEGMENTS).mask)[:, layout.token_index]
    got = model(ids, position_ids=layout.position_ids[None], mem1_mask=layout.mask, use_cache=False).logits[0]
    visible, longest = layout.mask.dense()[0], 0
    for row in layout.logit_rows[::3].tolist():
        seen = visible[row].nonzero()[:, 0]
        context = seen[layout.position_ids[seen].argsort()]
        assert torch.equal(layout.position_ids[context], torch.arange(len(context)))
        wanted = eager(ids[:, context], use_cache=False).logits[0, -1]
        torch.testing.assert_close(got[row], wanted, atol=2e-5, rtol=2e-5)
        longest = max(longest, len(context))
    assert longest > 2 * 16


@every_family
@torch.no_grad()
def test_caches(family: str) -> None:
    """Decoding over a SlotCache and by an engine, with entries that leave, is the forward under the mask."""
    model = build(family, "mem1", **FAMILIES[family] | {"vocab_size": 97})
    eager = twin(model, "eager")
    full = model(IDS, position_ids=POSITIONS, mem1_mask=MASK, use_cache=False)[0]
    assert mask_error(model, eager, full) <= 1e-5
    engine_error(model, full)
    slots = slots_errors(model, full)
    assert (family == "DeepseekV3") == isinstance(slots[0], str), slots


@pytest.mark.parametrize("family", CACHED)
@pytest.mark.parametrize("implementation", ["mem1", "eager"])
def test_prune_generate(family: str, implementation: str) -> None:
    """What is written over a cache that forgets has the log-probs of one forward under the mask."""
    model, prompts = small(family, implementation), [ids_of(n, seed=n) for n in PROMPTS]
    rule = TurnEviction(CODEC, "action")
    torch.manual_seed(0)
    out = generate(model, prompts, FOUR_TURNS, eviction_policy=rule, max_new_tokens=44)
    for row, prompt in enumerate(prompts):
        given, written = out[CACHE].run_lengths[row]
        tokens_of_row = prompt + out.sequences[row, max(PROMPTS) : max(PROMPTS) + written].tolist()
        mask = TrajectoryLayout.from_segments(rule.segments(tokens_of_row, (given, written))).mask
        logits = {given + step: out.logits[step][row] for step in range(written)}
        assert distance(model, tokens_of_row, mask, logits) <= 5e-5
        assert distance(model, tokens_of_row, no_prune(mask), logits) > 1e-3


@torch.no_grad()
def test_a_window_counts_positions_in_a_cache() -> None:
    """Also where entries have left, or stand closer than they did: transformers' masks count places."""
    model = small("Mistral", "sdpa")
    ids = tokens(TrajectoryLayout.from_segments(SEGMENTS).mask)
    caches = SlotCache(model, 2, 64), SlotCache(model, 2, 64)
    for cache, positions in zip(caches, ("keep", "compact"), strict=True):
        model(ids[:, :24].expand(2, -1), **cache.kwargs)
        keep = torch.ones(2, 24, dtype=torch.bool)
        keep[:, 4:12] = False
        keep[1, 20] = False
        cache.prune(keep, positions)
    kept, compact = (cache.forward_kwargs([2, 1])["attention_mask"][:, 0] for cache in caches)
    places = torch.cat([torch.arange(4), torch.arange(12, 26)])  # of the first row's entries and tokens
    for t in (0, 1):
        assert torch.equal(kept[0, t], (places <= 24 + t) & (24 + t - places < 16))
        assert torch.equal(compact[0, t], (torch.arange(18) <= 16 + t) & (16 + t - torch.arange(18) < 16))
    assert kept[1, 0, :16].sum() == 12 and compact[1, 0, :16].sum() == 16
    alone = SlotCache(model, 1, 64)
    model(ids[:, :24], **alone.kwargs)
    alone.prune(torch.arange(24)[None] % 5 > 0)
    with pytest.raises(ValueError, match="as a window counts positions and entries have left"):
        model(ids[:, 24:25], **alone.kwargs)
    model(ids[:, 24:25], **alone.forward_kwargs(1))


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        (family, implementation)
        for family, implementation in itertools.product(CACHED, ("sdpa", "eager", "mem1"))
        if implementation != "sdpa" or family not in ("Gemma2", "GptOss")  # whose caps and sinks it drops
    ],
)
@torch.no_grad()
def test_a_text_shorter_than_the_window_is_pruned_like_any_other(family: str, implementation: str) -> None:
    model, exact = small(family, implementation), small(family)
    ids = tokens(TrajectoryLayout.from_segments(SEGMENTS).mask)[:, :14]
    evict = torch.full((14,), 14)
    evict[[2, 3]], evict[5] = 8, 10
    want = exact(ids, mem1_mask=TrajectoryMask.from_evict(evict), use_cache=False).logits
    for announced in (False, True):
        cache, parts = SlotCache(model, 1, 32), []
        for begin, end, keep in ((0, 8, None), (8, 10, [0, 1, 4, 5, 6, 7]), (10, 14, [0, 1, 2, 4, 5, 6, 7])):
            if keep is not None:
                cache.prune(torch.zeros(1, cache.used).bool().index_fill(1, torch.tensor(keep), True))
            kwargs = cache.forward_kwargs(end - begin) if announced else cache.kwargs
            parts.append(model(ids[:, begin:end], **kwargs).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=2e-5, rtol=2e-5)


def test_compact_positions_are_for_layers_that_are_alike() -> None:
    for family in ("Gemma3", "Olmo3", "Cohere2"):
        cache = SlotCache(small(family), 1, 32)
        with pytest.raises(ValueError, match="by fixed ones, in all layers alike, got None"):
            cache.prune(torch.ones(1, 0).bool(), "compact")
    settings = {"no_rope_layers": [1, 0], "num_key_value_heads": 2}
    with pytest.raises(ValueError, match="in all layers alike, got None"):
        SlotCache(build("SmolLM3", **settings), 1, 32).prune(torch.ones(1, 0).bool(), "compact")


@torch.no_grad()
def test_kinds_of_layers_that_a_model_does_not_look_at() -> None:
    """Mistral's configuration takes them, and its layers have the window all the same."""
    model = small("Mistral", "sdpa")
    plain = SlotCache(model, 2, 64)
    model.config.layer_types = ["full_attention"] * 2
    lying, ids = (
        SlotCache(model, 2, 64),
        tokens(TrajectoryLayout.from_segments(SEGMENTS).mask, rows=2)[:, :30],
    )
    got = [model(ids, **cache.forward_kwargs([30, 25])).logits[0] for cache in (plain, lying)]
    assert torch.equal(*got)
    engine = Engine(twin(model, "mem1"), 1)
    hidden = engine.feed([0], [ids[0].tolist()], [list(range(30))])
    torch.testing.assert_close(engine.logits(hidden)[0], got[0][-1], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_soft_caps_and_sinks_without_a_mask_are_those_of_eager() -> None:
    for family in ("Gemma2", "GptOss"):
        model, ids = small(family), tokens(TrajectoryLayout.from_segments(SEGMENTS).mask, rows=2)
        eager = twin(model, "eager")
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, atol=2e-5, rtol=2e-5)
        padding = torch.ones_like(ids)
        padding[1, :9] = 0
        got, wanted = (m(ids, attention_mask=padding).logits for m in (model, eager))
        torch.testing.assert_close(got[1, 9:], wanted[1, 9:], atol=2e-5, rtol=2e-5)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **options), eager.generate(ids, **options))
