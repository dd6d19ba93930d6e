"""What a search API found, read from Serper's JSON, of which every part may be missing or odd."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from mem1.envs.web.page_text import one_line

_MAX_TITLE_CHARS, _MAX_URL_CHARS, _MAX_TEXT_CHARS = 200, 2048, 1000
_MAX_FACTS = 10
NOTHING_FOUND = "nothing found"


class SearchError(Exception):
    """A search without a reply; its text says why."""


class UnreadableReply(SearchError):
    """The API answered with something that is no reply."""


class WebResult(NamedTuple):
    """A page that was found. All but the title or the snippet may be empty."""

    title: str
    url: str
    snippet: str
    date: str = ""


class SearchReply(NamedTuple):
    """What was found.

    answer: what the search engine itself says to the query, in at most two lines. results: the pages, the
    best first. related: questions that others ask, each as the title of a page with its answer.
    """

    answer: str
    results: tuple[WebResult, ...]
    related: tuple[WebResult, ...]


def read_reply(body: bytes, num: int) -> SearchReply:
    """The reply in the JSON of `body`, with at most `num` results. What is missing, or of another type than
    it should be, is left out. Raises UnreadableReply if it is no JSON object.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UnreadableReply("search API: a reply that is no JSON object")
    facts = (_answer_box(_block(found, "answerBox")), _knowledge_graph(_block(found, "knowledgeGraph")))
    return SearchReply(
        "\n".join(fact for fact in facts if fact),
        _results(found, "organic", "title")[:num],
        _results(found, "peopleAlsoAsk", "question")[:num],
    )


def format_reply(reply: SearchReply) -> str:
    """The text of an observation: the answer, then the results with their numbers, then related questions."""
    lines = [f"Answer: {reply.answer}"] if reply.answer else []
    for number, result in enumerate(reply.results, 1):
        lines += [f"[{number}] {result.title} {f'({result.date})' if result.date else ''}".rstrip()]
        lines += [line for line in (result.url, result.snippet) if line]
    lines += [f"Related: {asked.title} {asked.snippet}".rstrip() for asked in reply.related]
    return "\n".join(lines) or NOTHING_FOUND


def _answer_box(box: dict[str, Any]) -> str:
    return _titled(box, [_text(box, name, _MAX_TEXT_CHARS) for name in ("answer", "snippet")])


def _knowledge_graph(graph: dict[str, Any]) -> str:
    facts = _block(graph, "attributes")
    said = [_text(graph, name, _MAX_TEXT_CHARS) for name in ("type", "description")]
    for name in list(facts)[:_MAX_FACTS]:
        if fact := _text(facts, name, _MAX_TITLE_CHARS):
            said.append(f"{one_line(name, _MAX_TITLE_CHARS)}: {fact}")
    return _titled(graph, said)


def _titled(block: dict[str, Any], said: list[str]) -> str:
    title, text = _text(block, "title", _MAX_TITLE_CHARS), "; ".join(part for part in said if part)
    return f"{title}: {text}" if title and text else text


def _results(found: dict[str, Any], block: str, title: str) -> tuple[WebResult, ...]:
    entries = found.get(block)
    results = (
        WebResult(
            _text(entry, title, _MAX_TITLE_CHARS),
            _url(entry),
            _text(entry, "snippet", _MAX_TEXT_CHARS),
            _text(entry, "date", _MAX_TITLE_CHARS),
        )
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict)
    )
    return tuple(result for result in results if result.title or result.snippet)


def _block(found: dict[str, Any], name: str) -> dict[str, Any]:
    block = found.get(name)
    return block if isinstance(block, dict) else {}


def _text(block: dict[str, Any], name: str, limit: int) -> str:
    value = block.get(name)
    return one_line(value, limit) if isinstance(value, str) else ""


def _url(entry: dict[str, Any]) -> str:
    url = _text(entry, "link", _MAX_URL_CHARS + 1)
    fits = url.startswith(("http://", "https://")) and " " not in url and len(url) <= _MAX_URL_CHARS
    return url if fits else ""
