"""Tokenizers of every kind, made in milliseconds from a few sentences, without packages or a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from mem1.envs.toy.tokenizer import build_tokenizer

# Tags among the sentences: tokens come to hold parts of two of them.
SENTENCES = 20 * [
    "<IS>The Rhine is long</IS><query>who wrote Faust?</query>\n\n",
    "<IS>\nit is the river\n</IS>\n<answer>\n42\n</answer>\n",
    "<think>the author</think>\n<search>who is the author</search>.",
    "\n<info>Doc 1: (Title) Ströme; 日本語  two blanks</info>\n<information>Doc</information>\n",
]
CONTROL = (  # of chat templates: special
    "<|end|> <s> </s> <pad> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> "
    "<|eot_id|> <bos> <eos> <start_of_turn> <end_of_turn> [INST] [/INST]"
).split()
PLAIN = ["<think>", "</think>", "<tool_call>", "<table>"]  # added, and text all the same


def _wrap(core: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    names = {"eos_token": "<|end|>", "pad_token": "<pad>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)


def _add(core: Tokenizer, blanks: bool = True) -> None:
    core.add_tokens([AddedToken(word, special=True, normalized=False) for word in CONTROL])
    core.add_tokens([AddedToken(word, special=False, normalized=False) for word in PLAIN])
    if blanks:
        core.add_tokens([AddedToken(word, special=False, normalized=False) for word in ("\n\n\n", "   ")])


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2 and most since."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    )
    _add(core)
    return _wrap(core)


def with_prefix() -> PreTrainedTokenizerFast:
    """The same, with a blank in front of each text and a bos."""
    core = byte_level().backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    bos = core.token_to_id("<s>")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", core.token_to_id("</s>"))]
    )
    return _wrap(core, bos_token="<s>")


def sentence_piece(legacy: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma: blanks are `▁`, bytes have tokens, added tokens in the vocabulary."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    state = json.loads(core.to_str())
    words = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], *CONTROL, *PLAIN]
    learnt = [word for word in state["model"]["vocab"] if word not in words]
    # Merges that make an added token out of text, as where a vocabulary was trained on them.
    table = ["<", "<t", "<ta", "<tab", "<tabl", "<table", "<table>"]
    words += [*learnt, *[word for word in [*table, *"<table>"] if word not in [*learnt, *words]]]
    state["model"]["vocab"] = {word: token for token, word in enumerate(words)}
    state["model"]["merges"] += [[one, two[len(one) :]] for one, two in zip(table, table[1:], strict=False)]
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    core = Tokenizer.from_str(json.dumps(state))
    if legacy:
        core.pre_tokenizer = None
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add(core)
    core.add_special_tokens(["<unk>"])
    bos = core.token_to_id("<s>")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return _wrap(core, bos_token="<s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """As T5: the vocabulary is a list, control tokens among its pieces."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        show_progress=False,
        vocab_size=120,
        special_tokens=["<unk>", *CONTROL, *PLAIN],
        unk_token="<unk>",
        max_piece_length=4,
    )
    core.train_from_iterator(SENTENCES, trainer)
    _add(core)
    return _wrap(core, unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: a `##` goes on with a word. It cannot write tags."""
    words = ["[UNK]", "[CLS]", "[SEP]", "<", ">", "/", "who", "wrote", "##ver", "##s", "i", "##s"]
    core = Tokenizer(models.WordPiece({word: token for token, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", eos_token="[SEP]", cls_token="[CLS]"
    )


def legacy() -> PreTrainedTokenizerFast:
    return sentence_piece(legacy=True)


SMALL: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": cache(byte_level),
    "with-prefix": cache(with_prefix),
    "sentence-piece": cache(sentence_piece),
    "legacy": cache(legacy),
    "unigram": cache(unigram),
    "toy": cache(build_tokenizer),
}
