"""Trajectories for the viewer's tests, made by hand."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mem1.trajectory import Trajectory
from mem1_core.segments import Segment

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1><!-- &lt;\u2028\u2029"


class Part(NamedTuple):
    """What is written in one part of a turn."""

    kind: str
    turn: int
    text: str


THREE_TURNS = (
    Part("prompt", 0, "answer questions in order : name the boss of ada ?"),
    *(Part("state", 1, "<IS> first ada </IS>"), Part("query", 1, "<query> ada boss </query>")),
    Part("info", 1, "<info> found olga . after that the many </info>"),
    *(Part("state", 2, "<IS> olga again </IS>"), Part("query", 2, "<query> ada boss teacher </query>")),
    Part("info", 2, "<info> nothing </info>"),
    *(Part("state", 3, "<IS> olga </IS>"), Part("answer", 3, "<answer> olga ; max </answer>")),
)


def make_trajectory(
    tokenizer: PreTrainedTokenizerBase, parts: tuple[Part, ...] = THREE_TURNS, **settings: Any
) -> Trajectory:
    """The policy's n-th token of all has log-prob -n / 8, 1 / 64 less when it was drawn."""
    tokens, segments = list[int](), list[Segment]()
    for kind, turn, text in parts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        segments.append(Segment(kind, turn, len(ids)))
        tokens += ids
    logprobs = -torch.arange(len(tokens)) / 8
    return Trajectory(
        **{
            "tokens": torch.tensor(tokens, dtype=torch.int64),
            "segments": segments,
            "logprobs": logprobs,
            "rollout_logprobs": logprobs - 1 / 64,
            "prune": "action",
        }
        | settings
    )


class Parsed(HTMLParser):
    """The elements of a page: [tag, attributes, what stands in it up to the next tag]."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        self._open = True

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            self.elements[-1][2].append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(text) for name, _, text in self.elements if name == tag]


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def page_data(html: str) -> dict[str, Any]:
    """The data of a page, which is strict JSON."""
    return json.loads(Parsed(html).texts("script")[0], parse_constant=_refuse)


def unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)
