from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import web_server  # noqa: F401  skips where packages are missing

from mem1.checks import InputError
from mem1.envs.web import html_text
from mem1.envs.web.html_text import HtmlConverter
from mem1.envs.web.html_worker import html_text as text_of

ARTICLE = "<p>The river rises in the north and flows for three hundred miles to the sea.</p>"


def test_the_main_part() -> None:
    menu = "<nav><ul><li><a href='/a'>Home</a><li><a href='/b'>Contact</a></ul></nav>"
    text = text_of(f"<html><body>{menu}<article>{ARTICLE * 8}</article></body></html>")
    assert "The river rises" in text
    assert "Contact" not in text


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<body><ul><li>one<li>two</ul><script>var x</script> three</body>", "one two three"),
        ("<body>a<style>p{}</style><noscript>b</noscript><!-- c --><svg><text>d</text></svg>e</body>", "a e"),
        ("<title>only a title</title>", ""),
        ("", ""),
        ("<p>a<!-- b -->&#xD800;c", "a\ufffdc"),
    ],
)
def test_all_text_where_no_main_part_is_found(
    monkeypatch: pytest.MonkeyPatch, html: str, expected: str
) -> None:
    monkeypatch.setattr("trafilatura.extract", lambda *_, **__: None)
    assert text_of(html) == expected


def test_a_parser_that_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(*_: object, **__: object) -> None:
        raise AttributeError("text")

    monkeypatch.setattr("trafilatura.extract", give_up)
    assert text_of("<p>Hello</p>") == "Hello"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in place of html_worker.py: it crashes on "crash" and, in the middle of a line, on "half";
    sleeps on "sleep"; else says who it is.
    """
    path = tmp_path / "program.py"
    path.write_text(
        "import json, os, sys, time\n"
        "print(json.dumps('ready'), flush=True)\n"
        "for line in sys.stdin:\n"
        "    html = json.loads(line)\n"
        "    html == 'crash' and os.abort()\n"
        "    html == 'half' and (print('\"a', end='', flush=True), os.abort())\n"
        "    html == 'sleep' and time.sleep(60)\n"
        "    print(json.dumps(f'{os.getpid()} {html}'), flush=True)\n"
    )
    monkeypatch.setattr(html_text, "_PROGRAM", path)
    return path


def test_a_process_is_kept(program: Path) -> None:
    converter = HtmlConverter(10.0)
    first, second = converter.text("a\n\u2028é\ud800"), converter.text("b")
    assert first and second
    assert first.partition(" ")[2] == "a\n\u2028é\ud800"
    assert first.partition(" ")[0] == second.partition(" ")[0]
    converter.close()
    third = converter.text("c")
    assert third and third.partition(" ")[0] != first.partition(" ")[0]
    converter.close()


@pytest.mark.parametrize("page", ["crash", "half", "sleep"])
def test_a_page_that_takes_its_process_down(program: Path, page: str) -> None:
    converter = HtmlConverter(1.0)
    start = time.monotonic()
    assert converter.text(page) is None
    assert time.monotonic() - start < 10.0
    text = converter.text("a")
    assert text and text.endswith(" a")
    converter.close()


def test_a_page_that_nobody_waits_for(program: Path) -> None:
    """Its process ends at once, and so it does with `close`."""
    converter = HtmlConverter(60.0)

    def given_up(give_up: Callable[[], None], over: threading.Event) -> None:
        found: list[str | None] = []
        thread = threading.Thread(target=lambda: found.append(converter.text("sleep", over)))
        thread.start()
        while not converter._under_way:
            time.sleep(0.01)
        start = time.monotonic()
        give_up()
        thread.join()
        assert found == [None] and time.monotonic() - start < 5.0
        assert not converter._idle and not converter._under_way

    over = threading.Event()
    given_up(over.set, over)
    given_up(converter.close, threading.Event())
    assert converter.text("a")
    converter.close()


def test_pages_side_by_side(program: Path) -> None:
    """Each gets its own text."""
    converter = HtmlConverter(10.0)
    found: dict[str, str | None] = {}

    def convert(page: str) -> None:
        found[page] = converter.text(page)

    threads = [threading.Thread(target=convert, args=(f"page {i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [text and text.partition(" ")[2] for _, text in sorted(found.items())] == sorted(found)
    converter.close()


def test_processes_end_with_the_converter(program: Path) -> None:
    converter = HtmlConverter(10.0)
    assert converter.text("a")
    (worker,) = converter._idle
    del converter
    assert worker._process.poll() is not None


def test_packages_that_cannot_be_loaded(program: Path) -> None:
    program.write_text("import no_such_package")
    with pytest.raises(InputError, match=r"trafilatura.*pip install 'mem1_core\[web\]'"):
        HtmlConverter(10.0).text("a")


def test_a_tag_with_thousands_of_attributes() -> None:
    """The real program is killed where trafilatura takes quadratic time, and nothing else waits for it."""
    attributes = " ".join(f"a{i}=1" for i in range(40_000))
    converter = HtmlConverter(30.0)
    assert converter.text(f"<p>{ARTICLE}</p>") is not None  # loaded
    converter._timeout = 0.5
    start = time.monotonic()
    assert converter.text(f"<html><body>{ARTICLE}<p {attributes}>hi</p></body></html>") is None
    assert time.monotonic() - start < 10.0
    converter.close()
