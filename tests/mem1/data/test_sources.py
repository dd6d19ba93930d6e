"""The list of data sets: whole, consistent, and with nothing in it that is no checksum."""

from __future__ import annotations

import re

import pytest

from mem1.data.sources import data_set, data_sets
from mem1.envs.qa.question_files import FORMATS


def test_every_format_has_a_data_set() -> None:
    assert {found.format for found in data_sets()} == {*FORMATS, ""}
    assert {found.name for found in data_sets()} >= {"hotpotqa", "webshop", "wiki-18"}


@pytest.mark.parametrize("name", [found.name for found in data_sets()])
def test_entries_are_whole(name: str) -> None:
    found = data_set(name)
    assert found is not None and found.name == name
    assert found.title and found.licence and found.source and found.files
    assert bool(found.format) == any(file.content == "questions" for file in found.files)
    for file in found.files:
        for digest in file.digests:
            assert digest.size > 0 and re.fullmatch(r"[0-9a-f]{64}", digest.sha256) and digest.known_from


def test_names_and_checksums_occur_once() -> None:
    assert data_set("squad") is None
    names = [found.name for found in data_sets()]
    files = [file for found in data_sets() for file in found.files]
    digests = [digest.sha256 for file in files for digest in file.digests]
    assert len(names) == len({*names})
    assert len(files) == len({file.name for file in files})
    assert len(digests) == len({*digests})
