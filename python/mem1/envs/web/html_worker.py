"""The program of a process that turns HTML into text: `html_text.py` starts it.

A line of standard input is a page, as a JSON string; each is answered with a line, its text as a JSON string.
A first line, "ready", comes before all that. It ends with its input.

It is run as a file, and imports nothing of the project.
"""

from __future__ import annotations

import json
import sys

import lxml.etree
import lxml.html
import trafilatura

# What trafilatura and lxml raise on pages that they cannot cope with.
_PARSER_ERRORS = (LookupError, ValueError, TypeError, AttributeError, RecursionError, lxml.etree.LxmlError)
_UNSEEN = ("head", "iframe", "noscript", "script", "style", "svg", "template")
_SEEN = f"//text()[not({' or '.join(f'ancestor::{tag}' for tag in _UNSEEN)})]"


def html_text(html: str) -> str:
    """The text of a page: its main part where trafilatura finds one, else all that a reader would see."""
    try:
        found = trafilatura.extract(html, include_comments=False)
    except _PARSER_ERRORS:
        found = None
    return found or _all_text(html)


def _all_text(html: str) -> str:
    parser = lxml.html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    try:
        tree = lxml.html.document_fromstring(html.encode(), parser=parser)
    except _PARSER_ERRORS:
        return ""
    return " ".join(" ".join(tree.xpath(_SEEN)).split())


def main() -> None:
    """Answer the lines of standard input."""
    answers, sys.stdout = sys.stdout, sys.stderr  # no word of a library gets in between the answers
    answer = "ready"
    while True:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        line = sys.stdin.readline()
        if not line:
            return
        answer = html_text(json.loads(line))


if __name__ == "__main__":
    main()
