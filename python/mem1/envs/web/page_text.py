"""From bytes to text that an episode can hold."""

from __future__ import annotations

import codecs
import re

# Control characters but tab and newline; halves of surrogate pairs, which no tokenizer takes.
_UNWANTED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_META = re.compile(rb"<meta[^>]{0,200}?charset\s{0,9}=[\s\"']{0,9}([\w.:-]{1,40})", re.IGNORECASE)
_META_BYTES = 4096  # where a page may name its charset
_DEFAULT = "cp1252"  # of pages that name none and are not UTF-8
# The charsets of the web by Python's names. Python knows more, and takes quadratic time for some of them.
_CHARSETS = frozenset(
    "utf-8 utf-16 utf-16-le utf-16-be big5 gb18030 shift_jis cp932 euc_jp iso2022_jp euc_kr cp949 koi8-r "
    "koi8-u cp866 cp874 mac-roman tis-620".split()
    + [f"cp{page}" for page in range(1250, 1259)]
    + [f"iso8859-{part}" for part in range(2, 17)]
)
_MEANT = {"ascii": "cp1252", "iso8859-1": "cp1252", "gb2312": "gb18030", "gbk": "gb18030"}  # by those names


def clean(text: str, limit: int | None = None) -> str:
    """The first `limit` characters of `text`, with blanks for control characters and lone surrogates."""
    return _UNWANTED.sub(" ", text.replace("\r\n", "\n"))[:limit].strip()


def one_line(text: str, limit: int) -> str:
    """As `clean`, with single blanks between words."""
    return " ".join(clean(text).split())[:limit].strip()


def decode(body: bytes, charset: str | None) -> str:
    """The text of a page, by its byte order mark, the `charset` of its header, the one that it names itself,
    or UTF-8, else as Windows-1252. Bytes without a character become U+FFFD.
    """
    for mark, marked in _MARKS:
        if body.startswith(mark):
            return body[len(mark) :].decode(marked, "replace")
    if named := _codec(charset) or _named_inside(body):
        return body.decode(named, "replace")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        return body.decode(_DEFAULT, "replace")


def _named_inside(body: bytes) -> str | None:
    named = _META.search(body[:_META_BYTES])
    codec = _codec(named[1].decode("ascii", "replace")) if named else None
    return "utf-8" if codec and codec.startswith("utf-16") else codec  # in UTF-16 it could not be read here


def _codec(name: str | None) -> str | None:
    try:
        found = codecs.lookup(name or "").name
    except (LookupError, ValueError):
        return None
    meant = _MEANT.get(found, found)
    return meant if meant in _CHARSETS else None
