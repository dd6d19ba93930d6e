"""A small decoder with random weights, and the critic of any decoder; attention by `mem1_core`."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from mem1.checks import InputError, require
from mem1.config import ModelConfig
from mem1_core.integrations.transformers import NAME, register
from mem1_core.mask import TrajectoryMask

# Of a loaded model that can be another one than its settings say.
_SHAPE = (
    *("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "max_position_embeddings", "tie_word_embeddings"),
)


def build_model(tokenizer: PreTrainedTokenizerBase, config: ModelConfig, seed: int = 0) -> Qwen2ForCausalLM:
    """A decoder of the Qwen2 architecture over the tokenizer's vocabulary, weights drawn from `seed`.

    An ordinary Hugging Face model but for its attention, "mem1": pass a `TrajectoryMask` as `mem1_mask`.
    """
    known = len(tokenizer)
    rows = known if config.vocab_size is None else config.vocab_size
    require(rows >= known, "vocab_size", f"at least {known}, the tokens of the tokenizer", rows)
    settings = architecture(config, rows, tokenizer.pad_token_id, tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(settings)
        _look_back(model, config.look_back)
    return to_dtype(model, torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype))


@torch.no_grad()
def _look_back(model: Qwen2ForCausalLM, score: float) -> None:
    """Let the heads of the first layer begin with what looking up is made of: every other one looks at the
    token before, the others at the one before that.

    With a bias b of the keys, and that of a query b turned back by as many positions as it shall look back
    (RoPE, Su et al. 2021), the biases alone give that token `score`, and less to any other.
    """
    layer, config = model.model.layers[0].self_attn, model.config
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, layer.head_dim
    keys = torch.randn(groups, width)
    keys *= (score * width**0.5) ** 0.5 / keys.norm(dim=-1, keepdim=True)
    queries = keys.repeat_interleave(heads // groups, 0)
    back = torch.tensor([[1.0], [2.0]]).repeat(-(-heads // 2), 1)[:heads]
    angles = -back * model.model.rotary_emb.inv_freq
    first, second = queries.chunk(2, -1)
    turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    layer.k_proj.bias.copy_(keys.flatten())
    layer.q_proj.bias.copy_(torch.cat(turned, -1).flatten())


def architecture(
    config: ModelConfig, vocab_size: int, pad_token_id: int | None = None, eos_token_id: int | None = None
) -> Qwen2Config:
    """As transformers has it, with attention "mem1"."""
    register()
    settings = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        pad_token_id=pad_token_id,
        bos_token_id=None,
        eos_token_id=eos_token_id,
    )
    settings._attn_implementation = NAME
    return settings


def check_shape(model: PreTrainedModel, config: ModelConfig) -> None:
    """InputError where a loaded model is another one than `config` says; one that is left as it was says
    nothing.
    """
    if replace(config, dtype="auto") == ModelConfig():
        return
    found = model.config.get_text_config(decoder=True)
    for name in _SHAPE:
        wanted, got = getattr(config, name), getattr(found, name, None)
        same = wanted == got or (name == "vocab_size" and wanted is None)
        require(same, f"model.{name}", f"{got!r}, as the model of init has it", wanted)


def to_dtype(model: _Model, dtype: torch.dtype) -> _Model:
    """`model` with weights of `dtype`, in place. Its buffers stay as they are, as in `from_pretrained`: with
    frequencies rounded to bf16, far positions would be other ones.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


_Model = TypeVar("_Model", bound=nn.Module)


class Critic(nn.Module):
    """A decoder's trunk with one output per token: the value of the state in which it was just read."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = _value_head(width)

    def forward(self, input_ids: Tensor, position_ids: Tensor, mem1_mask: TrajectoryMask) -> Tensor:
        """input_ids and position_ids int64 [B, N]; returns values [B, N] in the dtype of the weights."""
        hidden = self.trunk(
            input_ids=input_ids, position_ids=position_ids, mem1_mask=mem1_mask, use_cache=False
        ).last_hidden_state
        # A copy: what hooks a sharded module has on its output, they lose on a view.
        return self.head(hidden).squeeze(-1).clone()


def _value_head(width: int) -> nn.Linear:
    head = nn.Linear(width, 1)
    # Zero, so that a new critic says 0 everywhere and the first advantages are the returns themselves.
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def build_value_head(actor: PreTrainedModel) -> nn.Linear:
    """What makes a value of the hidden state of a token, for a critic that shares the trunk of the actor."""
    weight = cast(Any, actor.get_output_embeddings()).weight
    return to_dtype(_value_head(weight.shape[1]).to(weight.device), weight.dtype)


def build_critic(actor: PreTrainedModel) -> Critic:
    """A critic that starts from a copy of the actor's trunk, on the same device and in the same dtype.

    actor: any decoder whose logits are hidden states times the weight of its output layer. All of the critic
    learns, also what is frozen in the actor.
    """
    weight = cast(Any, actor.get_output_embeddings()).weight
    trunk = copy.deepcopy(cast(nn.Module, actor.get_decoder()))
    # What the output layer reads is what the trunk returns: configs name that width in many ways.
    critic = Critic(trunk, weight.shape[1]).to(weight.device)
    return to_dtype(critic, weight.dtype).requires_grad_(True)


def dropouts(model: nn.Module) -> list[str]:
    """The modules of `model` that would drop something in training, as "embed_dropout: 0.1"."""
    found = [(name, module.p) for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    return [f"{name}: {p:g}" for name, p in found if p > 0]


def without_dropout(model: nn.Module) -> None:
    """`model.eval()`, but for layers that recompute their activations, which transformers does in training
    mode only.

    PPO compares the log-probs of the rollout with those of the update: with dropout in one of them they would
    differ before anything is learned.
    """
    model.eval()
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            # Arguments of functions and of loops over layers, which only training mode governs.
            for what, p in vars(module).items():
                if "drop" in what and isinstance(p, float) and p > 0:
                    expected = "no dropout beside gradient checkpointing"
                    raise InputError(f"model: expected {expected}, got {what}={p} in {name or 'the model'}")
            module.training = True
