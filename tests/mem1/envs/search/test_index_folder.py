"""Indexes on disk: one for each corpus and settings, whole whatever happens while it is made."""

from __future__ import annotations

import itertools
import re
import signal
import threading
from pathlib import Path

import pytest
from small_corpus import python, write_towns

from mem1.checks import InputError
from mem1.envs.search.index_folder import SETTINGS, open_index


class Builds:
    """A `build` that counts how often it is called."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, folder: Path, contents) -> None:
        self.count += 1
        (folder / "contents").write_text("\n".join(contents))


def indexes(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != ".lock"]


def test_an_index_is_made_once_for_a_corpus_and_settings(tmp_path):
    path = write_towns(tmp_path / "corpus.jsonl", 3)
    build, folder = Builds(), tmp_path / "corpus.jsonl.index"
    first, index = open_index(path, None, {"k1": 0.9}, build)
    again, same = open_index(path, None, {"k1": 0.9}, build)
    assert (build.count, same, indexes(folder)) == (1, index, [index])
    assert [first[place] for place in range(3)] == [again[place] for place in range(3)]
    assert (index / "contents").read_text().startswith('"town0"\nA town')
    assert '"k1": 0.9' in (index / SETTINGS).read_text()
    _, other = open_index(path, None, {"k1": 1.5}, build)
    assert build.count == 2 and other != index
    path.rename(tmp_path / "moved.jsonl")  # what counts is what the corpus says
    _, same = open_index(tmp_path / "moved.jsonl", folder, {"k1": 0.9}, build)
    assert (build.count, same) == (2, index)


def test_a_corpus_that_has_changed_is_indexed_again(tmp_path):
    path, build = write_towns(tmp_path / "corpus.jsonl", 3), Builds()
    before = path.stat()
    _, index = open_index(path, tmp_path / "index", {}, build)
    path.write_text(path.read_text().replace("town2", "tarn2"))
    assert path.stat().st_size == before.st_size
    corpus, other = open_index(path, tmp_path / "index", {}, build)
    assert build.count == 2 and other != index
    assert corpus[2][1].startswith('"tarn2"')


def test_of_many_at_once_one_makes_the_index_and_the_others_wait(tmp_path):
    path, build = write_towns(tmp_path / "corpus.jsonl", 3), Builds()
    begin, found = threading.Barrier(8), []

    def work() -> None:
        begin.wait()
        found.append(open_index(path, tmp_path / "index", {}, build)[1])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.count == 1
    assert len(found) == 8 and indexes(tmp_path / "index") == [found[0]]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    path = write_towns(tmp_path / "corpus.jsonl", 3)
    with path.open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(InputError, match=re.escape(f"{path}:4: expected a line of JSON")):
        open_index(path, tmp_path / "index", {}, Builds())
    assert indexes(tmp_path / "index") == []


KILLED = """
import sys, time
from mem1.envs.search.index_folder import open_index

def build(folder, contents):
    (folder / "half").write_text("half an index")
    print("building", flush=True)
    time.sleep(60)

open_index(sys.argv[1], sys.argv[2], {}, build)
"""


def test_what_a_killed_process_has_left_is_in_nobodys_way(tmp_path):
    path, folder = write_towns(tmp_path / "corpus.jsonl", 3), tmp_path / "index"
    with python(KILLED, path, folder) as process:
        assert process.stdout.readline() == "building\n"
        waiting = threading.Thread(target=open_index, args=(path, folder, {}, Builds()))
        waiting.start()  # for the lock
        waiting.join(0.1)
        assert waiting.is_alive()
        process.send_signal(signal.SIGKILL)
    waiting.join(10)
    (index,) = indexes(folder)
    assert not (index / "half").exists() and (index / "contents").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    path = write_towns(tmp_path / "corpus.jsonl", 3)
    (tmp_path / "corpus.jsonl.index").write_text("in the way")
    with pytest.raises(
        InputError, match="index_folder: expected a folder that can be written, got '.*index'"
    ):
        open_index(path, None, {}, Builds())


def test_a_damaged_index_is_named(tmp_path):
    path = write_towns(tmp_path / "corpus.jsonl", 3)
    _, index = open_index(path, tmp_path / "index", {}, Builds())
    for damage in (b"", b"nonsense"):
        (index / "offsets.npy").write_bytes(damage)
        with pytest.raises(
            InputError, match=rf"index_folder: expected a whole index, got '{index}'.*delete it"
        ):
            open_index(path, tmp_path / "index", {}, Builds())


def test_texts_are_not_all_read_before_the_first_is_used(tmp_path):
    path = write_towns(tmp_path / "corpus.jsonl", 3)
    with path.open("a") as file:
        file.write("nonsense\n")

    class Enough(Exception):
        pass

    def build(folder: Path, contents) -> None:
        assert len(list(itertools.islice(contents, 3))) == 3
        raise Enough

    with pytest.raises(Enough):
        open_index(path, tmp_path / "index", {}, build)
