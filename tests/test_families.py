"""Every causal family of transformers, small: mask, cache and prune parity, or a refusal by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from small_families import FAMILIES, NO_MODEL, VOCABULARY, build
from torch import Tensor
from transformers import PreTrainedModel

from mem1.engine.engine import Engine
from mem1_core.integrations import transformers as integration
from mem1_core.integrations.transformers_cache import SlotCache
from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TrajectoryMask
from mem1_core.sample_inputs import mem1_segments
from mem1_core.segments import by_policy

SEGMENTS = mem1_segments(4, prompt=5, internal_state=4, query=2, info=5)
MASK = TrajectoryLayout.from_segments(SEGMENTS).mask
CAUSAL = TrajectoryLayout.from_segments(SEGMENTS, prune="never").mask
TOKENS = MASK.shape[1]
POSITIONS = torch.arange(TOKENS)[None]
IDS = torch.randint(1, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-5  # of the largest logit; measured: 1e-6 and less, and 4e-3 and more without pruning

WINDOWLESS = {"moshi"}  # names a window and has none

# Of every version that is supported; the others may come and go.
WELL_KNOWN = (
    "arcee cohere dbrx ernie4_5 gemma glm4 glm4_moe gpt2 gpt_neox granite hunyuan_v1_dense llama minimax_m2 "
    "mistral mixtral olmo2 olmoe phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2"
).split()
REFUSAL = re.compile(
    r"(mem1_mask|mem1_cache|position_ids|attn_implementation='mem1') in \w+.*: expected .*, got "
)

integration.register()


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Row(NamedTuple):
    """One line of the table: of each way its error, relative to the largest logit, or why it is refused."""

    family: str
    mask: float | str
    slots: float | str = ""  # SlotCache, before the first prune
    pruned: float | str = ""  # and after it
    engine: float | str = ""

    @property
    def verdict(self) -> str:
        if isinstance(self.mask, str):
            return "no model" if self.family in NO_MODEL else "refused"
        return "passed" if isinstance(self.slots, float) or isinstance(self.engine, float) else "mask only"

    def __str__(self) -> str:
        cells = self[1:]
        errors = [f"{cell:7.0e}" if isinstance(cell, float) else f"{'-':>7}" for cell in cells]
        reasons = dict.fromkeys(cell for cell in cells if isinstance(cell, str) and cell)
        return f"{self.family:25}{self.verdict:10}{' '.join(errors)}  {'; '.join(reasons)}".rstrip()


def examine(family: str) -> Row:
    """All that the table says of a family. An error of a foreign kind, or too large, raises."""
    if family in NO_MODEL:
        return Row(family, NO_MODEL[family])
    eager = build(family, "eager")
    own = eager(IDS, use_cache=False)[0]  # runs, whatever follows
    try:
        model = build(family, "mem1")
    except KeyError:  # it picks its attention from a table of its own
        model = eager
    try:
        integration.check_model(model)
    except ValueError as refusal:
        return Row(family, refused(refusal))
    full = model(IDS, position_ids=POSITIONS, mem1_mask=MASK, use_cache=False)[0]
    unpruned = difference(full, own)
    assert unpruned > 100 * TOLERANCE, f"{family}: expected logits on which pruning shows, got {unpruned:.0e}"
    causal = model(IDS, mem1_mask=CAUSAL, use_cache=False)[0]
    errors = (difference(causal, own), mask_error(model, eager, full))
    mask = checked(f"{family}, mask", max(errors))
    try:
        integration.check_cache(model)
    except ValueError as refusal:
        with suppress(ValueError):  # right, or refused while it runs, and never a foreign error
            slots_errors(model, full)
        return Row(family, mask, refused(refusal))
    return Row(family, mask, *slots_errors(model, full), engine_error(model, full))


def refused(refusal: ValueError) -> str:
    assert REFUSAL.match(str(refusal)), f"expected a refusal that names model and reason, got {refusal!r}"
    return str(refusal)


def checked(what: str, error: float) -> float:
    assert error <= TOLERANCE, f"{what}: expected an error of {TOLERANCE} at most, got {error:.1e}"
    return error


def difference(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def additive(mask: TrajectoryMask, config: Any) -> Tensor | dict[str, Tensor]:
    """[1, 1, N, N], what eager attention adds to its scores; where layers differ, of each kind."""

    def of(mask: TrajectoryMask) -> Tensor:
        visible = mask.dense()[:, None]
        return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)

    config = config.get_text_config(decoder=True)
    if not integration.has_windows(config) or config.model_type in WINDOWLESS:
        return of(mask)
    near = of(mask.windowed(config.sliding_window))
    kinds = getattr(config, "layer_types", None)
    return {"full_attention": of(mask), "sliding_attention": near} if kinds else near


def mask_error(model: PreTrainedModel, eager: PreTrainedModel, full: Tensor) -> float:
    """Against eager attention with the dense mask: alone, and packed after another trajectory."""
    settings = {"position_ids": POSITIONS, "use_cache": False}
    dense = eager(IDS, attention_mask=additive(MASK, model.config), **settings)[0]
    layout = TrajectoryLayout.pack([TrajectoryLayout.from_segments(s) for s in (SEGMENTS[:6], SEGMENTS)])
    first = layout.mask.shape[1] - TOKENS
    packed = model(
        torch.cat([IDS[:, :first], IDS], dim=1),
        position_ids=layout.position_ids[None],
        mem1_mask=layout.mask,
        use_cache=False,
    )[0]
    return max(difference(full, dense), difference(packed[:, first:], dense))


def rollout() -> Iterator[tuple[int, int, Tensor | None]]:
    """The trajectory as it is decoded: tokens [begin, end) are read, after a prune to `keep` if there is one.

    What the policy writes is read token by token, the rest at once.
    """
    evict, held, begin = MASK.evict_at[0], torch.arange(0), 0
    for segment in SEGMENTS:
        for length in [1] * segment.length if by_policy(segment.kind) else [segment.length]:
            keep = evict[held] > begin
            yield begin, begin + length, None if keep.all() else keep
            held = torch.cat([held[keep], torch.arange(begin, begin + length)])
            begin += length


def slots_errors(model: PreTrainedModel, full: Tensor) -> tuple[float | str, float | str]:
    """Decoding over a `SlotCache`, up to the first prune and from it on."""
    try:
        cache = SlotCache(model, 1, TOKENS)
    except ValueError as refusal:
        assert str(refusal).startswith("SlotCache: expected "), refusal
        return str(refusal), str(refusal)
    parts = []
    for begin, end, keep in rollout():
        if keep is not None:
            cache.prune(keep[None])
        kwargs = cache.forward_kwargs(end - begin) if integration.has_windows(model.config) else cache.kwargs
        parts.append(model(IDS[:, begin:end], **kwargs)[0])
    got, first = torch.cat(parts, dim=1), int(MASK.evict_at.min())
    return (
        checked(f"{model.config.model_type}, cache", difference(got[:, :first], full[:, :first])),
        checked(f"{model.config.model_type}, prune", difference(got[:, first:], full[:, first:])),
    )


def engine_error(model: PreTrainedModel, full: Tensor) -> float | str:
    """Decoding by the engine of a rollout, whose own checks name what they refuse."""
    try:
        engine = Engine(model, 1)
    except ValueError as refusal:
        assert str(refusal).startswith("model: expected "), refusal
        return f"Engine: {refusal}"
    errors = []
    for begin, end, keep in rollout():
        if keep is not None:
            engine.cache.prune({0: keep})
        hidden = engine.feed([0], [IDS[0, begin:end].tolist()], [list(range(begin, end))])
        errors.append(difference(engine.logits(hidden)[0], full[0, end - 1]))
    return checked(f"{model.config.model_type}, engine", max(errors))


# ------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "qwen2",
        "qwen3_moe",
        "gpt2",
        "gemma2",
        "gemma3_text",
        "gpt_oss",
        "olmo3",
        "cohere2",
        "ministral",
    ],
)
def test_a_family_that_works(family: str) -> None:
    row = examine(family)
    assert row.verdict == "passed" and all(isinstance(error, float) for error in row[1:]), row


@pytest.mark.parametrize(
    ("family", "verdict", "reason"),
    [
        (
            "doge",
            "refused",
            "mem1_mask in DogeForCausalLM: expected a forward that runs with it, got AttributeE",
        ),
        (
            "falcon",
            "refused",
            "mem1_mask in FalconForCausalLM: expected attention through the AttentionInterface",
        ),
        ("nemotron", "refused", "mem1_mask in NemotronForCausalLM: expected a model that heeds it"),
        ("roberta", "refused", "position_ids in RobertaForCausalLM: expected some that count from 0"),
        (
            "deepseek_v3",
            "passed",
            "SlotCache: expected keys and values of heads, got the latent ones of kv_lora_rank=16",
        ),
        (
            "gemma4_text",
            "mask only",
            "mem1_cache in Gemma4TextConfig: expected layers alike, got some with another head_dim",
        ),
        (
            "diffllama",
            "mask only",
            "mem1_cache in DiffLlamaForCausalLM: expected 2 layers that attend once each",
        ),
        (
            "hrm_text",
            "mask only",
            "mem1_cache in HrmTextForCausalLM: expected 2 layers that attend once each",
        ),
        (
            "jetmoe",
            "mask only",
            "in JetMoeForCausalLM: expected (layer, KV heads, head dim) (0, 2, 16), got (0, 4",
        ),
        (
            "mllama",
            "mask only",
            "MllamaForCausalLM: expected a decoder that runs with it, got TypeError: MllamaFor",
        ),
    ],
)
def test_a_family_that_is_refused(family: str, verdict: str, reason: str) -> None:
    row = examine(family)
    assert row.verdict == verdict and reason in str(row), row


def test_a_foreign_error_is_chained_and_names_what_the_model_did() -> None:
    with pytest.raises(ValueError, match="one that reads its dtype") as refusal:
        integration.check_model(build("doge", "mem1"))
    assert isinstance(refusal.value.__cause__, AttributeError)


def test_checks_pass_dropout_between_layers_and_leave_random_numbers_alone() -> None:
    model = build("qwen2", "mem1")
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp, torch.nn.Dropout(0.5))
    model.train()
    before = torch.get_rng_state()
    integration.check_model(model)
    integration.check_cache(model.eval())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_every_family(record_property: Callable[[str, object], None]) -> None:
    rows, failed = [], {}
    for family in FAMILIES:
        try:
            rows.append(examine(family))
        except Exception as error:  # one family's, for the end of the table
            failed[family] = f"{type(error).__name__}: {error}"
    verdicts = Counter(row.verdict for row in rows)
    reasons = Counter(kind(row.mask) for row in rows if row.verdict == "refused")
    report = [
        f"transformers {transformers.__version__}: {len(FAMILIES)} families, {dict(verdicts)}",
        f"{'family':35}{'mask':>7} {'slots':>7} {'pruned':>7} {'engine':>7}  reason",
        *map(str, rows),
        *(f"{family:25}FAILED    {error}" for family, error in failed.items()),
        "refused:",
        *(f"{count:4} {reason}" for reason, count in reasons.most_common()),
    ]
    record_property("report", "\n".join(report))
    assert not failed
    assert not {*WELL_KNOWN} - {row.family for row in rows if row.verdict == "passed"}
    assert len(rows) == len(FAMILIES) >= 170 and verdicts["passed"] >= 60
    assert {row.family for row in rows if row.verdict == "no model"} <= {*NO_MODEL}


def kind(reason: Any) -> str:
    """A refusal without names, shapes and errors; of layers that are not attention, what they are."""
    wanted, got = reason.split(": ", 1)[1].split(", got ", 1)
    return f"expected full or sliding attention, got {got}" if "layer_types" in wanted else wanted
