"""Passages as an observation."""

from __future__ import annotations

from mem1.envs.search.retriever import NOTHING_FOUND, Passage, format_passages


def test_passages_are_shown_in_the_form_of_search_r1():
    passages = [
        Passage("7", '"Oslo"\nOslo is the capital\nof Norway.', 2.0),
        Passage("8", "without a title", 1.0),
        Passage("9", "", 0.5),
    ]
    assert format_passages(passages) == (
        'Doc 1(Title: "Oslo") Oslo is the capital\nof Norway.\nDoc 2: without a title\nDoc 3: '
    )


def test_no_passages_are_named():
    assert format_passages([]) == NOTHING_FOUND
