"""A word-level tokenizer in the Hugging Face format: one token per word, one per tag, vocabulary built in.

Equivalent to `text.lower().split()` plus a table, for text whose punctuation stands apart.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mem1.envs.toy import words

TAGS = ("<IS>", "</IS>", "<query>", "</query>", "<answer>", "</answer>", "<info>", "</info>")
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def vocabulary() -> tuple[str, ...]:
    """Every token, in the order of the ids: specials, tags, punctuation, words."""
    plain = words.PUNCTUATION + words.MESSAGE + words.RELATIONS + words.NUMBERS + words.NAMES + words.FILLER
    return (PAD, EOS, UNK, *TAGS, *plain)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the small models: lower-cases, splits at blanks and punctuation, maps other words to
    `<unk>`.

    A tag is one id wherever it stands in a text, glued to other text or not. `save_pretrained` and
    `from_pretrained` work as for any Hugging Face tokenizer.
    """
    ids = {token: index for index, token in enumerate(vocabulary())}
    core = Tokenizer(models.WordLevel(vocab=ids, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.;:,?|]"), behavior="isolated")]
    )
    # Not "special": decoding must keep the tags. Not "normalized": `<IS>` has to match before lower-casing.
    core.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )
