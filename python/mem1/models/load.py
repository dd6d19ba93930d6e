"""Any Hugging Face decoder that an engine can run, with its tokenizer and a report of what was loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from mem1.checks import InputError, require
from mem1.config import DTYPES
from mem1.engine.policy_checks import check_policy
from mem1.models.memory_plan import size, weights_bytes
from mem1.models.shipped import shipped
from mem1.runtime.device import pick_device
from mem1_core.integrations.transformers import NAME, cache_shape, has_windows, register

_JSON = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # one of them must be there
_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_WANTED = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model", "vocab.txt", "merges.txt")
_UNWANTED = ("*/*", "consolidated*")  # the same weights again, in other formats


@dataclass(frozen=True)
class LoadReport:
    """What was loaded; as a string, the lines that a command prints."""

    name: str  # the folder or id
    architecture: str
    parameters: int
    dtype: str
    device: str
    weights_bytes: int
    attention: str
    context_length: int | None  # positions; None: the config names no limit
    vocabulary: int  # rows of the embedding
    tokens: int  # of the tokenizer
    stops: tuple[tuple[str, int], ...]  # what ends a turn besides its tags: text and id
    layers: int
    kv_heads: int
    head_dim: int
    kv_bytes_per_token: int
    window: str  # " (15 with a window of 512)", or "" where no layer has one

    def __str__(self) -> str:
        context = "any number of" if self.context_length is None else f"{self.context_length:,}"
        stops = " ".join(f"{text} ({token})" for text, token in self.stops) or "no token"
        weights = f"{self.parameters:,} parameters, {size(self.weights_bytes)} of {self.dtype}"
        heads = f"{self.layers} layers{self.window} of {self.kv_heads} KV heads of {self.head_dim}"
        cache = f"{size(self.kv_bytes_per_token)} of KV cache a token"
        known = f"{self.tokens:,} known to the tokenizer"
        return (
            f"{self.name}: {self.architecture}, {weights} on {self.device}\n"
            f"attention {self.attention}, {context} positions, {heads}, {cache}\n"
            f"vocabulary {self.vocabulary:,}, {known}; beside its tags a turn ends with {stops}"
        )


class LoadedModel(NamedTuple):
    model: Any  # causal language model in eval mode
    tokenizer: PreTrainedTokenizerBase
    report: LoadReport


def load(
    path_or_id: str | os.PathLike[str], dtype: str = "auto", device: str = "auto", attention: str = NAME
) -> LoadedModel:
    """Load a causal language model of the Hugging Face format and its tokenizer.

    path_or_id: a folder, that of a training run for its last checkpoint; the name of a model of the package
    (`models.shipped`); or an id, which is looked for in the local cache and on the hub. dtype: of the
    weights, "auto" is what they are saved in; buffers such as rotary frequencies stay as they are. device: as
    in `pick_device`. attention: with any but "mem1" the model is as Hugging Face makes it, for comparisons,
    and not checked; an engine takes "mem1" only.

    Raises InputError if there is no such model, naming a file of it that is missing or damaged, for a
    tokenizer with ids that have no row in the embedding, and for a model that an engine would refuse, with
    its reason. Tokens that lack what others have (a padding token, one for the beginning) are no error: the
    loop needs none of them.
    """
    require(dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", dtype)
    place = pick_device(device)
    path = _folder(path_or_id)
    _check_files(path)
    register()
    model = _model(path, dtype, attention)
    tokenizer = load_tokenizer(path)
    known, rows = 1 + max(tokenizer.get_vocab().values(), default=-1), _rows(model)
    if known > rows:
        expected = f"at most {rows} tokens, the rows of the embedding"
        raise InputError(f"tokenizer: expected {expected}, got {known}")
    model.to(place).eval()
    if attention == NAME:
        check_policy(model)
    return LoadedModel(model, tokenizer, load_report(model, tokenizer, str(path_or_id)))


def load_tokenizer(path_or_id: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer alone, of a folder or an id; of a folder it is all that need be there. InputError if
    there is none.
    """
    path = Path(path_or_id)
    if not (path / "tokenizer.json").is_file():
        path = _folder(path_or_id)
        _check_files(path)
    # AutoTokenizer puts the tokenizer class of the architecture over the one that was saved (for qwen2 a
    # byte-level one); tokenizer.json says all there is to say.
    fast = (path / "tokenizer.json").is_file()
    check_json(path / "tokenizer.json")
    return (PreTrainedTokenizerFast if fast else AutoTokenizer).from_pretrained(path)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a turn of this model, of its generation config and of its tokenizer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, (list, tuple)) else [ends]
    return frozenset(int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None)


def load_report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> LoadReport:
    """The report of a model that is already there."""
    config: Any = model.config.get_text_config(decoder=True)
    layers, kv_heads, head_dim = cache_shape(model.config)
    weight = next(model.parameters())
    return LoadReport(
        name=name,
        architecture=type(model).__name__,
        parameters=model.num_parameters(),
        dtype=str(weight.dtype).removeprefix("torch."),
        device=str(weight.device),
        weights_bytes=weights_bytes(model),
        attention=str(config._attn_implementation),
        context_length=getattr(config, "max_position_embeddings", None),
        vocabulary=_rows(model),
        tokens=len(tokenizer),
        stops=tuple((tokenizer.decode([token]), token) for token in sorted(stop_ids(model, tokenizer))),
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        kv_bytes_per_token=2 * layers * kv_heads * head_dim * weight.element_size(),
        window=_window(config),
    )


def _window(config: Any) -> str:
    if not has_windows(config):
        return ""
    listed = (getattr(config, "layer_types", None) or []).count("sliding_attention")
    some = f"{listed} " if listed else ""
    return f" ({some}with a window of {config.sliding_window:,})"


@contextmanager
def without_bars() -> Iterator[None]:
    """Without those that transformers draws for every file."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def check_json(path: Path) -> None:
    """InputError for a file that is there and is none."""
    if path.is_file():
        try:
            json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"model: expected a readable {path.name}, got {str(path)!r}: {error}") from error


def _model(path: Path, dtype: str, attention: str) -> Any:
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    settings = {"attn_implementation": attention, "dtype": wanted, "output_loading_info": True}
    try:
        with without_bars():
            model, found = AutoModelForCausalLM.from_pretrained(path, **settings)
    except SafetensorError as error:
        raise InputError(
            f"model: expected a readable model.safetensors in {str(path)!r}, got {error}"
        ) from error
    except KeyError as error:  # from a table of its own, as some models have one
        kind = " ".join(json.loads((path / "config.json").read_text()).get("architectures") or ["one"])
        expected = f"one that takes attention {attention!r} through transformers' AttentionInterface"
        raise InputError(f"model: expected {expected}, got {kind}, whose own table has no {error}") from error
    # No weights at all, of another shape, or of an architecture that is not known.
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise InputError(f"model: expected a whole model in {str(path)!r}, got {reason}") from error
    missing = sorted(found["missing_keys"])
    if missing:  # transformers draws them at random
        raise InputError(
            f"model: expected all weights in {str(path)!r}, got none for {', '.join(missing[:3])}"
        )
    return model


def _rows(model: PreTrainedModel) -> int:
    return len(model.get_input_embeddings().weight)


def _folder(path_or_id: str | os.PathLike[str]) -> Path:
    """Where the files are."""
    path = Path(path_or_id)
    for folder in (path, path / "last"):
        if (folder / "config.json").is_file():
            return folder
    if (own := shipped(str(path_or_id))) is not None:
        return own
    if path.exists() or not _ID.fullmatch(str(path_or_id)):
        raise InputError(f"model: expected a model folder with a config.json, got {str(path)!r}")
    try:
        found = snapshot_download(str(path_or_id), allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        expected = "a model folder with a config.json or the id of a model in the local cache or on the hub"
        got = f"{str(path_or_id)!r}, which is no folder here"
        raise InputError(f"model: expected {expected}, got {got}: {reason}") from error
    return Path(found)


def _check_files(path: Path) -> None:
    """InputError for what from_pretrained would say at length or not at all."""
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise InputError(f"model: expected a tokenizer.json in {str(path)!r}, got none")
    for name in (*_JSON, _INDEX):
        check_json(path / name)
    if (path / _INDEX).is_file():
        shards = set(json.loads((path / _INDEX).read_text()).get("weight_map", {}).values())
        missing = sorted(shard for shard in shards if not (path / shard).is_file())
        if missing:
            raise InputError(f"model: expected {missing[0]} in {str(path)!r}, got none")
