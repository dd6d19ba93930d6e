"""What a user has downloaded: found by name, compared with what is known, read to the end."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from question_rows import HOTPOTQA, NQ_OPEN, QA, TWO_WIKI, write_rows
from real_data import DATA, needs_data

from mem1.checks import InputError
from mem1.data import check_files
from mem1.data.check_files import Finding, check, sha256_of
from mem1.data.sources import DataFile, DataSet, Digest, data_sets


def there(findings: list[Finding]) -> list[Finding]:
    return [found for found in findings if found.path is not None]


def test_an_empty_folder_misses_all(tmp_path: Path) -> None:
    listed = [(found.name, file.name) for found in data_sets() for file in found.files]
    assert check(tmp_path) == [Finding(dataset, file, None, "missing") for dataset, file in listed]
    with pytest.raises(InputError, match="folder: expected a folder"):
        check(tmp_path / "absent")


def test_files_are_found_compared_and_read(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    changed = write_rows(tmp_path / "a" / "NQ-open.dev.jsonl", NQ_OPEN)
    unlisted = write_rows(tmp_path / "NQ-open.efficientqa.dev.1.1.jsonl", NQ_OPEN)
    broken = tmp_path / "a" / "b" / "hotpot_dev_distractor_v1.json"
    write_rows(broken, [*HOTPOTQA, {"_id": "x", "question": "who?"}])
    archive = tmp_path / "musique_v1.0.zip"
    archive.write_bytes(b"PK")
    assert there(check(tmp_path)) == [
        Finding(
            *("hotpotqa", "hotpot_dev_distractor_v1.json", broken, "differs"),
            error=f"{broken}: row 2: answer: expected a text or a list of texts, got None",
        ),
        Finding("nq-open", "NQ-open.dev.jsonl", changed, "differs", 2),
        Finding("nq-open", "NQ-open.efficientqa.dev.1.1.jsonl", unlisted, "unknown", 2),
        Finding("musique", "musique_v1.0.zip", archive, "differs"),
    ]


def test_names_that_every_set_uses(tmp_path: Path) -> None:
    """Another set's train.json is none of 2Wiki's; what is, or is broken, is reported."""
    write_rows(tmp_path / "train.json", NQ_OPEN)
    assert there(check(tmp_path)) == []
    two_wiki = write_rows(tmp_path / "dev.json", TWO_WIKI)
    own = write_rows(tmp_path / "qa.jsonl", QA)
    assert there(check(tmp_path)) == [
        Finding("2wiki", "dev.json", two_wiki, "unknown", len(TWO_WIKI)),
        Finding("qa", "qa.jsonl", own, "unknown", len(QA)),
    ]
    two_wiki.write_text(two_wiki.read_text()[:-5])
    (broken, _) = there(check(tmp_path))
    assert broken.path == two_wiki and "expected JSON" in broken.error


def test_each_copy_is_checked(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "NQ-open.dev.jsonl", NQ_OPEN)
    paths = [found.path for found in there(check(tmp_path))]
    assert paths == [tmp_path / name / "NQ-open.dev.jsonl" for name in "ab"]


def test_size_and_checksum_of_one_version_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", NQ_OPEN)
    size, sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()

    def verdict(*digests: Digest) -> str:
        listed = DataSet("x", "X", "none", "here", (DataFile("rows.jsonl", "rows", digests),))
        monkeypatch.setattr(check_files, "data_sets", lambda: (listed,))
        (found,) = check(tmp_path)
        assert found.rows == 2
        return found.checksum

    right, other = Digest(size, sha256, "us"), Digest(size, "0" * 64, "us")
    assert verdict(right) == verdict(other, right) == "matches"
    assert verdict(other) == verdict(Digest(size + 1, sha256, "us")) == "differs"
    assert verdict() == "unknown"


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_checksums_of_files_of_every_length(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"ab" * (size // 2) + b"c" * (size % 2))
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@needs_data
def test_the_real_data_is_what_is_listed() -> None:
    found = {name: (rows, checksum) for _, name, path, checksum, rows, _ in check(DATA) if path}
    assert found == {
        "qa.jsonl": (2955, "matches"),
        "corpus.jsonl": (12584, "matches"),
        "items_shuffle_1000.json": (1000, "matches"),
        "items_ins_v2_1000.json": (None, "matches"),
        "human_goals.json": (None, "matches"),
    }
