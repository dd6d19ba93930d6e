"""One HTML file that shows trajectories, opened from disk without a network.

    write_page(read_trajectories("trajectories.jsonl"), "trajectories.html", tokenizer=tokenizer)

Whatever a policy or an environment wrote is data there: it stands in a block of JSON, becomes text and never
markup, and a policy of content security lets no script run but the page's own and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mem1.checks import require
from mem1.envs.tasks import read_rows
from mem1.evaluation.viewer.page_data import Vocabulary, checked, record
from mem1.io import atomic_write

_SCRIPTS = ("records.js", "pictures.js", "turns.js", "viewer.js")  # in this order
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


def read_trajectories(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of a trajectories.jsonl, in order.

    Raises InputError for a file that cannot be read, and for a line that is no trajectory, by file and line.
    """
    for where, row in read_rows(path):
        checked(where, row)
        yield row


def write_page(
    trajectories: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str],
    title: str = "Trajectories",
) -> int:
    """Write the page to `path`, which is whole or not there; returns how many trajectories it shows.

    trajectories: as `Trajectory.to_dict()` gives them; they are written one by one, in the order in which
    they come. An entry "agent" says who played. tokenizer: that of the policy, or the folder that holds its
    tokenizer.json.

    Raises InputError for a row that is no trajectory, by its number, and for a tokenizer or path that cannot
    be used.
    """
    vocabulary, count = Vocabulary(_tokenizer(tokenizer)), 0
    head, tail = _frame(title)
    with atomic_write(Path(path)) as file:
        file.write(f'{head}{{"trajectories":[')
        for row in trajectories:
            line = _json(record(row, checked(f"trajectories[{count}]", row), vocabulary))
            file.write(("," if count else "") + "\n" + line)
            count += 1
        file.write(f'\n],"vocabulary":{_json(vocabulary.to_dict())}}}{tail}')
    return count


def _tokenizer(tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    folder = Path(tokenizer)
    require((folder / "tokenizer.json").is_file(), "tokenizer", "a folder with a tokenizer.json", str(folder))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _json(value: dict[str, Any]) -> str:
    """`value` in ASCII, without a character that could end the element it stands in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _frame(title: str) -> tuple[str, str]:
    """What stands before the data, and behind."""
    room = files("mem1.evaluation.viewer")
    style, page = ((room / name).read_text(encoding="utf-8") for name in ("viewer.css", "viewer.html"))
    script = "\n".join((room / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    named = html.escape(title).encode("ascii", "xmlcharrefreplace").decode()
    head, tail = page.split("$data")
    return (
        Template(head).substitute(policy=policy, title=named, style=style),
        Template(tail).substitute(script=script),
    )


def _hash(text: str) -> str:
    """What a policy of content security calls an inline script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
