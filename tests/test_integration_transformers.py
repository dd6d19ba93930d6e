"""The attention function "mem1" inside transformers: the dense mask's results, in models as they come."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache, Trainer, TrainingArguments

from mem1_core.integrations import transformers as integration
from mem1_core.integrations.transformers_cache import CACHE
from mem1_core.layout import TrajectoryLayout
from mem1_core.mask import TrajectoryMask
from mem1_core.sample_inputs import mem1_segments, random_evict
from mem1_core.segments import Segment, policy_tokens
from mem1_core.testing import assert_accurate, gradients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FAMILIES = ("Qwen2", "Qwen3", "Llama")
VOCABULARY = 96
SEGMENTS = mem1_segments(4, prompt=11, internal_state=7, query=4, info=9)
LAYOUT = TrajectoryLayout.pack(  # of different lengths, none a multiple of a tile
    [
        TrajectoryLayout.from_segments(SEGMENTS),
        TrajectoryLayout.from_segments(SEGMENTS[:7], regime="reencode"),
        TrajectoryLayout.from_segments(SEGMENTS[:9]),
    ]
)

integration.register()


def build(name: str, implementation: str = "mem1", **settings: Any) -> PreTrainedModel:
    """A small model of 2 layers (a family stands for its causal one) with weights that let errors show."""
    model_type = getattr(transformers, name if "For" in name else f"{name}ForCausalLM")
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
        "initializer_range": 0.1, "tie_word_embeddings": False, "pad_token_id": 0,
    }  # fmt: skip
    config = model_type.config_class(**(shape | settings))
    torch.manual_seed(0)
    model = model_type._from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases that are not 0, norms that are not 1
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def twin(model: PreTrainedModel, implementation: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    other = copy.deepcopy(model).to(dtype or model.dtype)
    other.set_attn_implementation(implementation)
    return other


def additive(mask: TrajectoryMask, dtype: torch.dtype) -> Tensor:
    """[B, 1, N, N], what eager attention adds to its scores."""
    visible = mask.dense()[:, None]
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def tokens(mask: TrajectoryMask, rows: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (rows or mask.shape[0], mask.shape[1])
    return torch.randint(1, VOCABULARY, shape, generator=generator).to(mask.device)


def padded(segments: list[list[Segment]]) -> tuple[TrajectoryMask, Tensor]:
    """Trajectories as rows of a batch, padding at the end is seen by itself only: mask, positions [B, N]."""
    masks = [TrajectoryLayout.from_segments(s).mask for s in segments]
    length = max(mask.shape[1] for mask in masks)
    evict = torch.arange(1, length + 1, dtype=torch.int32).repeat(len(masks), 1)
    for row, mask in zip(evict, masks, strict=True):
        row[: mask.shape[1]] = mask.evict_at[0]
    return TrajectoryMask.from_evict(evict), torch.arange(length).expand(len(masks), -1)


# ---------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["packed", "batch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_with_eager(family: str, layout: str, device: str, dtype: torch.dtype) -> None:
    """Logits and the gradient of every parameter, by the rule of two eager errors."""
    if layout == "packed":
        mask, positions = LAYOUT.mask, LAYOUT.position_ids[None]
    else:
        mask, positions = padded([SEGMENTS, SEGMENTS[:9]])
    mask, positions = mask.to(device), positions.to(device)
    model = build(family).to(device, dtype)

    def run(model: PreTrainedModel, **masks: Any) -> dict[str, Tensor]:
        logits = model(tokens(mask), position_ids=positions, use_cache=False, **masks).logits
        names, parameters = zip(*model.named_parameters(), strict=True)
        return {"logits": logits} | dict(zip(names, gradients(logits, parameters), strict=True))

    got = run(model, mem1_mask=mask)
    eager = run(twin(model, "eager"), attention_mask=additive(mask, dtype))
    # Not "eager": its softmax is fp32 whatever the model's dtype is.
    exact = run(twin(model, "sdpa", torch.float64), attention_mask=mask.dense()[:, None])
    for name in exact:
        assert_accurate(got[name], eager[name], exact[name], name=name)


def test_one_mask_for_all_rows() -> None:
    mask = TrajectoryLayout.from_segments(SEGMENTS).mask
    ids = tokens(mask, rows=3)
    model = build("Qwen2")
    together = model(ids, mem1_mask=mask, use_cache=False).logits
    alone = torch.cat([model(row[None], mem1_mask=mask, use_cache=False).logits for row in ids])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_without_the_mask_the_model_is_as_under_sdpa() -> None:
    model = build("Qwen2")
    reference = twin(model, "sdpa")
    ids = tokens(TrajectoryLayout.from_segments(SEGMENTS).mask)
    n = ids.shape[1]
    padding = torch.ones(1, n, dtype=torch.int64)
    padding[:, :6] = 0
    packed = torch.cat([torch.arange(20), torch.arange(n - 20)])[None]
    for settings in ({}, {"attention_mask": padding}, {"position_ids": packed, "use_cache": False}):
        torch.testing.assert_close(model(ids, **settings).logits, reference(ids, **settings).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    torch.testing.assert_close(model.generate(ids, **options), reference.generate(ids, **options))


# --------------------------------------------------------------------------- training, caches, compilation


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # 5.17 has no other
@pytest.mark.parametrize("cache", [{}, {"use_cache": False}], ids=["use_cache_default", "no_cache"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, cache: dict[str, bool]) -> None:
    results = []
    for checkpointing in (False, True):
        model = build("Qwen2").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        positions = LAYOUT.position_ids[None]
        logits = model(tokens(LAYOUT.mask), position_ids=positions, mem1_mask=LAYOUT.mask, **cache).logits
        logits.log_softmax(-1)[..., 17].sum().backward()  # a reentrant checkpoint refuses autograd.grad
        results.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_cache_may_be_filled_but_not_read() -> None:
    """The mask says nothing of keys from before; what a prefill leaves can be pruned and decoded on."""
    model = build("Llama")
    mask = TrajectoryLayout.from_segments(SEGMENTS).mask
    n = mask.shape[1]
    ids = tokens(mask)
    expected = model(ids, mem1_mask=mask, use_cache=False).logits
    for settings in ({}, {CACHE: DynamicCache(config=model.config)}):
        out = model(ids, mem1_mask=mask, **settings)
        torch.testing.assert_close(out.logits, expected, atol=0, rtol=0)
        assert isinstance(out[CACHE], Cache) and out[CACHE].get_seq_length() == n
        with pytest.raises(
            ValueError, match=rf"layer 0\): expected an empty KV cache or none, got {2 * n} keys"
        ):
            model(ids, mem1_mask=mask, **{CACHE: out[CACHE]})
    static = StaticCache(config=model.config, max_cache_len=2 * n)
    with pytest.raises(ValueError, match="expected an empty KV cache or none"):
        model(ids, mem1_mask=mask, **{CACHE: static})


def test_no_square_mask_is_made_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that jump make transformers build an [N, N] mask of packed sequences: not with mem1_mask."""
    from transformers import masking_utils

    def forbidden(**_: object) -> None:
        raise AssertionError("a mask was built")

    assert integration.sdpa_mask is masking_utils.sdpa_mask
    monkeypatch.setattr(integration, "sdpa_mask", forbidden)
    model = build("Qwen2")
    settings = {"position_ids": LAYOUT.position_ids[None], "use_cache": False}
    model(tokens(LAYOUT.mask), mem1_mask=LAYOUT.mask, **settings)
    with pytest.raises(AssertionError, match="a mask was built"):
        model(tokens(LAYOUT.mask), **settings)


def test_compiles_without_a_graph_break() -> None:
    model = build("Llama", num_hidden_layers=1).train()
    settings = {"position_ids": LAYOUT.position_ids[None], "mem1_mask": LAYOUT.mask, "use_cache": False}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        logits = run(tokens(LAYOUT.mask), **settings).logits
        results.append((logits, *gradients(logits, list(model.parameters()))))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------- what is refused

# fmt: off
FULL = {"layer_types": ["full_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 2, "num_experts_per_tok": 1,
          "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
          "linear_num_value_heads": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
JAMBA = MAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1}
BIDIRECTIONAL = FULL | {"attn_logit_softcapping": None, "use_bidirectional_attention": True}
REFUSED = [  # family, settings, which layer says, what
    ("Qwen2", {"attention_dropout": 0.1}, "Qwen2Attention 0", "expected attention dropout 0, got 0.1"),
    ("Phimoe", EXPERTS | {"sliding_window": 16}, "PhimoeAttention 0", "the window of its masks, 16, got sli"),
    ("Gemma2", BIDIRECTIONAL, "Gemma2Attention 0", "expected causal self-attention, got is_causal=False"),
    ("Llama", {"is_causal": False}, "LlamaAttention 0", "expected causal self-attention, got is_causal="),
    ("Llama4", {}, "Llama4TextAttention 0", "Llama4TextConfig.layer_types, got chunked_attention"),
    ("Qwen3Next", LINEAR, "Qwen3NextAttention 1", "Qwen3NextConfig.layer_types, got linear_attention"),
    ("Jamba", JAMBA, "JambaAttention 1", "JambaConfig.layer_types, got linear_attention"),
    ("FalconH1", MAMBA, "FalconH1Attention 0", "FalconH1Config.layer_types, got hybrid"),
    ("BertForMaskedLM", {}, "BertSelfAttention 0", "expected causal self-attention, got is_causal=False"),
    ("BartForConditionalGeneration", {}, "BartAttention 0", "expected a decoder-only model, got is_encoder"),
]
# fmt: on


@pytest.mark.parametrize(("family", "settings", "layer", "reason"), REFUSED, ids=[row[0] for row in REFUSED])
def test_more_than_plain_attention_is_refused(
    family: str, settings: dict[str, Any], layer: str, reason: str
) -> None:
    model = build(family, **settings).train()
    mask = TrajectoryLayout.from_segments(SEGMENTS).mask
    name, index = layer.split()
    with pytest.raises(ValueError, match=rf"in {name} \(layer {index}\): .*{re.escape(reason)}"):
        model(tokens(mask), mem1_mask=mask)
    with pytest.raises(ValueError, match=re.escape(reason)):
        integration.check_model(model)


def test_a_mask_of_another_kind_is_refused() -> None:
    model = build("Qwen2")
    mask = TrajectoryLayout.from_segments(SEGMENTS).mask
    ids = tokens(mask)
    for beside in (mask.dense()[:, None], torch.ones_like(ids)):
        message = f"expected no attention_mask beside it, got one of shape {list(beside.shape)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            model(ids, attention_mask=beside, mem1_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match=r"mask: expected evict_at of shape \[1 or 1, 90\], got \[1, 91\]"):
        model(ids[:, :-1], mem1_mask=mask, use_cache=False)
    with pytest.raises(TypeError, match="mask: expected a TrajectoryMask, got Tensor"):
        model(ids, mem1_mask=mask.dense(), use_cache=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", [*FAMILIES, "Mixtral"])
def test_check_model_passes_what_obeys_the_mask(family: str, device: str) -> None:
    model = build(family, **(EXPERTS if family == "Mixtral" else {})).to(device, torch.bfloat16).train()
    integration.check_model(model)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


class Shifted(torch.nn.Module):
    """A short convolution: each token sees the one before it, whatever the mask says."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]


def test_check_model_wants_a_model() -> None:
    for wrong in ("gpt2", torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="model: expected a model of transformers, got (str|Linear)"):
            integration.check_model(wrong)


def test_check_model_finds_what_drops_the_mask() -> None:
    with pytest.raises(ValueError, match="Qwen2ForCausalLM: expected attn_implementation='mem1', got 'sdpa'"):
        integration.check_model(build("Qwen2", "sdpa"))
    for family in ("StableLm", "Rwkv"):  # both take `mem1_mask` and never look at it
        model = build(family, head_dim=16)
        mask = TrajectoryMask.from_evict(random_evict(9))
        dropped = model(tokens(mask), mem1_mask=mask).logits
        torch.testing.assert_close(dropped, model(tokens(mask)).logits, atol=0, rtol=0)
        with pytest.raises(ValueError, match=f"in {family}ForCausalLM: expected attention through the Att"):
            integration.check_model(model)
    mixed = build("Qwen2")
    mixed.model.layers[1].mlp = Shifted()
    with pytest.raises(ValueError, match="expected a model that heeds it, got one that ignores it"):
        integration.check_model(mixed)


# --------------------------------------------------------------------- an example: trainers of Hugging Face


def pack(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A data collator: the trajectories of a batch in one stream, as the arguments of a model under "mem1".

    An example has `input_ids`, the tokens, and `segments`, the fields of their `Segment`s. What is seen
    (`mem1_mask`) and what is trained (`labels`, -100 for what the environment wrote) are two things: a token
    of the environment is seen while it lives, and never predicted.
    """
    layout = TrajectoryLayout.pack(
        [TrajectoryLayout.from_segments(Segment(**s) for s in e["segments"]) for e in examples]
    )
    tokens = torch.cat([torch.as_tensor(e["input_ids"]) for e in examples])
    labels = torch.full_like(layout.token_index, -100)
    labels[layout.logit_rows + 1] = tokens[layout.targets]  # the model shifts them back
    return {
        "input_ids": tokens[layout.token_index][None],
        "labels": labels[None],
        "position_ids": layout.position_ids[None],
        "mem1_mask": layout.mask,
    }


def rollouts() -> list[dict[str, Any]]:
    return [
        {
            "input_ids": tokens(TrajectoryLayout.from_segments(s).mask)[0].tolist(),
            "segments": [x._asdict() for x in s],
        }
        for s in (SEGMENTS, SEGMENTS[:7])
    ]


class FirstGradient(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.gradients = {name: p.grad.clone().cpu() for name, p in model.named_parameters()}


def check_trainer(make: Any, model: PreTrainedModel) -> None:
    """Three steps on one batch: the first gradient is that of eager code, and the loss goes down."""
    batch = pack(rollouts())
    eager = twin(model, "eager").train()
    logits = eager(
        batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=additive(batch["mem1_mask"], torch.float32),
        use_cache=False,
    ).logits
    written = torch.cat([policy_tokens(SEGMENTS), policy_tokens(SEGMENTS[:7])])
    assert torch.equal(written, batch["labels"][0] != -100) and 0 < written.sum() < written.numel()
    picked = logits[0, :-1].log_softmax(-1).gather(1, batch["input_ids"][0, 1:, None])[:, 0]
    expected = -(picked * written[1:]).sum() / written.sum()
    expected.backward()

    first = FirstGradient()
    trainer = make(model, first)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(expected.item(), abs=1e-3)
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(first.gradients[name], parameter.grad, atol=1e-5, rtol=1e-3)


ARGUMENTS = {
    "remove_unused_columns": False,  # keeps `segments` for the collator
    "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant",
    "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": [],
    "disable_tqdm": True, "dataloader_pin_memory": False, "bf16": False,
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_trainer_trains_packed_trajectories(device: str, tmp_path: Any) -> None:
    def make(model: PreTrainedModel, callback: transformers.TrainerCallback) -> Trainer:
        arguments = TrainingArguments(output_dir=tmp_path, use_cpu=device == "cpu", **ARGUMENTS)
        return Trainer(model, arguments, pack, train_dataset=rollouts(), callbacks=[callback])

    check_trainer(make, build("Qwen2"))


@pytest.mark.parametrize("device", DEVICES)
def test_trl_trains_packed_trajectories(device: str, tmp_path: Any) -> None:
    trl = pytest.importorskip("trl")
    import datasets  # which trl requires

    from mem1.envs.toy.tokenizer import build_tokenizer  # SFTTrainer wants one, and has no use for it here

    def make(model: PreTrainedModel, callback: transformers.TrainerCallback) -> Trainer:
        kept = {"dataset_kwargs": {"skip_prepare_dataset": True}}
        arguments = trl.SFTConfig(output_dir=tmp_path, use_cpu=device == "cpu", **kept, **ARGUMENTS)
        return trl.SFTTrainer(
            model,
            arguments,
            pack,
            train_dataset=datasets.Dataset.from_list(rollouts()),
            processing_class=build_tokenizer(),
            callbacks=[callback],
        )

    check_trainer(make, build("Qwen2"))
