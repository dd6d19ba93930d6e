"""Small configs of every causal family that transformers knows, made from the family's own defaults."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

VOCABULARY, POSITIONS = 97, 512  # no other size is one of these


def _fields(*rows: tuple[Any, str]) -> dict[str, Any]:
    return {name: value for value, names in rows for name in names.split()}


# What a field becomes wherever a config class has it: 2 layers, 4 heads over 2, two of four experts.
SIZES = _fields(
    (
        VOCABULARY,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size "
        "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab",
    ),
    (
        64,
        "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width "
        "hidden_size_per_layer_input hidden_size_global input_embedding_size output_embedding_size "
        "ple_embed_dim",
    ),
    (
        96,
        "intermediate_size moe_intermediate_size intermediate_size_mlp dense_intermediate_size n_inner "
        "d_inner dff dim_ff ffn_dim ffn_hidden_size encoder_ffn_dim decoder_ffn_dim expert_ffn_hidden_size "
        "feed_forward_size shared_intermediate_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size ngram_vocab_size_base",
    ),
    (
        2,
        "num_hidden_layers num_layers n_layer n_layers num_blocks encoder_layers decoder_layers "
        "num_encoder_layers num_decoder_layers num_layers_per_stack num_key_value_heads "
        "swa_num_key_value_heads kv_n_heads "
        "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k",
    ),
    (
        4,
        "num_attention_heads num_heads n_head n_heads attention_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "swa_num_attention_heads num_kv_heads num_query_groups linear_num_heads linear_num_key_heads "
        "linear_num_value_heads index_n_heads num_experts num_local_experts n_routed_experts moe_num_experts",
    ),
    (
        16,
        "head_dim dim_head d_head attention_head_size kv_channels swa_head_dim index_head_dim "
        "linear_head_dim linear_key_head_dim linear_value_head_dim qk_nope_head_dim v_head_dim "
        "kv_lora_rank q_lora_rank o_lora_rank mamba_d_head mamba_head_dim mamba_chunk_size chunk_size",
    ),
    (8, "qk_rope_head_dim rotary_dim mamba_n_heads mamba_num_heads mamba_d_state ssm_state_size state_size"),
    (128, "mamba_d_ssm"),  # twice the hidden size, as 8 heads of 16 are
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions"),
    (1, "n_group topk_group num_expert_group"),
    (0, "pad_token_id"),
    (0.1, "initializer_range initializer_range"),  # weights that let errors show
    (True, "is_decoder"),  # of encoders, whose causal model this switch makes
)
# Lengths from which on a layer does more than plain attention: below those of the test, or it would hide. A
# family that has none by default keeps none.
LENGTHS = _fields(
    (
        16,
        "sliding_window sliding_window_size window_size local_attention attention_window_size "
        "attention_chunk_size keep_window_size index_topk log_scaling_n_floor floor_scale",
    ),
    (4, "index_block_size"),
    (2, "index_topk_blocks"),
)


class Special(NamedTuple):
    why: str
    settings: dict[str, Any]


_CONVOLUTION = Special(
    "Released models have convolutions, the default has none.", {"layer_types": ["conv", "full_attention"]}
)
_CODEBOOKS = Special("Tokens of one codebook, as other families have them.", {"num_codebooks": 1})
SPECIAL = {
    "cohere_compass_text": Special(
        "The model looks up frequencies by kind of layer, the default has none. Sections share 8 of them.",
        {
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [3, 3, 2],
                }
            }
        },
    ),
    "dbrx": Special(
        "The default names no rope_theta and no clip_qkv, which its attention reads.",
        {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2}},
    ),
    "dots1": Special("The default has no number of shared experts.", {"n_shared_experts": 1}),
    "gemma3n_text": Special(
        "Layers that share keys need one of their kind before them.",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
        },
    ),
    "gpt_neo": Special("Kinds for two layers.", {"attention_types": [[["global", "local"], 1]]}),
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "longcat_flash": Special(
        "Its layers hold two attentions; head_dim is the part that RoPE turns.",
        {"num_layers": 1, "head_dim": 8, "zero_expert_num": 2},
    ),
    "mamba2": Special("Heads times head dim is twice the hidden size.", {"num_heads": 8, "n_groups": 2}),
    "musicgen": _CODEBOOKS,
    "musicgen_melody": _CODEBOOKS,
    "reformer": Special(
        "The axes' sizes multiply and sum up to lengths and hidden size.",
        {"attn_layers": ("local", "lsh"), "axial_pos_shape": (16, 32), "axial_pos_embds_dim": (32, 32)},
    ),
    "xlm": Special("Bidirectional by default.", {"causal": True}),
    "xmod": Special("Adapters are those of a language.", {"default_language": "en_XX"}),
    "zamba": Special(
        "Its hybrid layers, of which two share weights, come after two others.",
        {"num_hidden_layers": 4, "layers_block_type": ["linear_attention"] * 2 + ["hybrid"] * 2},
    ),
    "zamba2": Special("Kinds for two layers.", {"layers_block_type": ["linear_attention", "hybrid"]}),
    "zaya": Special("It takes no other.", {"num_experts_per_tok": 1}),
}

# Families that do not run by themselves.
_ASSISTANT = "has no keys and values of its own: it reads those of the model that it assists"
NO_MODEL = {
    "gemma3n": "its vision tower wants the package timm (gemma3n_text is the decoder)",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
}


def model_class(family: str) -> type[PreTrainedModel]:
    return getattr(transformers, FAMILIES[family])


def small_config(family: str, resized: dict[int, int] | None = None) -> PreTrainedConfig:
    """The family's default with small sizes; of a composite family whose model is one part, that part's.

    resized: other values in the place of some in `SIZES`.
    """
    own, wanted = CONFIG_MAPPING[family], model_class(family).config_class
    special = SPECIAL[family].settings if family in SPECIAL else {}
    return _small(own if issubclass(own, wanted) else wanted, special, resized or {})


def _small(
    config_class: type[PreTrainedConfig], special: dict[str, Any], resized: dict[int, int]
) -> PreTrainedConfig:
    fields = {name: field.default for name, field in inspect.signature(config_class).parameters.items()}
    settings = {name: resized.get(value, value) for name, value in SIZES.items() if name in fields}
    settings |= {name: value for name, value in LENGTHS.items() if fields.get(name) is not None}
    if "kv_lora_rank" in fields:  # latent attention has as many key heads as query heads
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for name in config_class.sub_configs:
        part = getattr(config_class(), name)
        if part is not None and name not in special:
            settings[name] = _small(type(part), {}, resized)
    return config_class(**(settings | special))


def build(family: str, implementation: str, resized: dict[int, int] | None = None) -> PreTrainedModel:
    """A model with seeded weights that let errors show: biases that are not 0, norms that are not 1."""
    torch.manual_seed(0)
    model = model_class(family)._from_config(
        small_config(family, resized), attn_implementation=implementation
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
