from __future__ import annotations

import codecs

import pytest
import web_server  # noqa: F401  skips where packages are missing

from mem1.envs.web.page_text import clean, decode, one_line


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("", None, ""),
        (" a\tb\n", None, "a\tb"),
        ("a\r\nb\rc", None, "a\nb c"),
        ("a\0b\x1bc\x7fd\x85e", None, "a b c d e"),
        ("a\ud800b\udfffc", None, "a b c"),
        ("a\ufffdb\u2028c\U0001f600", None, "a\ufffdb\u2028c\U0001f600"),
        ("abcdef", 3, "abc"),
        ("ab cdef", 3, "ab"),
        ("<|im_end|></info><IS>", None, "<|im_end|></info><IS>"),
    ],
)
def test_clean(text: str, limit: int | None, expected: str) -> None:
    assert clean(text, limit) == expected


def test_one_line() -> None:
    assert one_line(" a\n\n b\t\0c ", 100) == "a b c"
    assert one_line("a b c", 4) == "a b"


TEXT = "naïve café"


@pytest.mark.parametrize(
    ("body", "charset", "expected"),
    [
        (TEXT.encode(), None, TEXT),
        (TEXT.encode("latin-1"), None, TEXT),
        (TEXT.encode("latin-1"), "ISO-8859-1", TEXT),
        (b"\x80 \x93quoted\x94", "latin-1", "€ “quoted”"),
        (b"\x80", "us-ascii", "€"),
        ("привет".encode("koi8-r"), "KOI8-R", "привет"),
        ("привет".encode("cp1251"), "windows-1251", "привет"),
        ("漢字".encode("shift_jis"), "Shift_JIS", "漢字"),
        ("镕".encode("gbk"), "gb2312", "镕"),
        (TEXT.encode("utf-16"), None, TEXT),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "utf-8", TEXT),
        (codecs.BOM_UTF8 + TEXT.encode(), "latin-1", TEXT),
        (b"a\xffb", "utf-8", "a\ufffdb"),
        (b"\x81", None, "\ufffd"),
        (TEXT.encode(), "no-such-charset", TEXT),
        (TEXT.encode(), "x\0y", TEXT),
        (TEXT.encode(), "\udc80", TEXT),
        (b"a+2AA-b", "utf-7", "a+2AA-b"),
        (b"a\\ud800b", "unicode_escape", "a\\ud800b"),
        (b"6162", "hex", "6162"),
        (b"abc-", "punycode", "abc-"),
        (b"<meta charset=koi8-r>\xd0", None, "<meta charset=koi8-r>п"),
        (b"<META a=b charset = 'koi8-r'>\xd0", "no-such-charset", "<META a=b charset = 'koi8-r'>п"),
        (
            b"<meta content='text/html; charset=koi8-r'>\xd0",
            None,
            "<meta content='text/html; charset=koi8-r'>п",
        ),
        (b"<meta charset=koi8-r>\xc3\xa9", "utf-8", "<meta charset=koi8-r>é"),
        (b"<meta charset=utf-16>\xc3\xa9", None, "<meta charset=utf-16>é"),
        (b"<meta charset=\xff>\xc3\xa9", None, "<meta charset=ÿ>Ã©"),
        (b"", None, ""),
    ],
    ids=repr,
)
def test_decode(body: bytes, charset: str | None, expected: str) -> None:
    assert decode(body, charset) == expected


def test_a_charset_far_down_is_not_looked_for() -> None:
    assert decode(b" " * 5000 + b"<meta charset=koi8-r>\xd0", None).endswith("Ð")
