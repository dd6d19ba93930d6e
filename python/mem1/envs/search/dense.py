"""Dense retrieval in this process: embeddings of sentence-transformers, searched exactly by faiss."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mem1.checks import InputError, require
from mem1.envs.search.corpus import Corpus
from mem1.envs.search.index_folder import damaged, open_index
from mem1.envs.search.retriever import MAX_QUERY_CHARS, Passage
from mem1.extras import extra

with extra("dense", "DenseRetriever"):
    import faiss
    from sentence_transformers import SentenceTransformer

_INDEX = "passages.faiss"
_CHUNK = 4096  # passages of which texts are in memory at a time


class DenseRetriever:
    """The passages of a corpus whose embeddings are nearest to that of a query, by cosine. Made by `open`.

    A blank query has no results. Results of equal scores are in the order of the corpus; a score may differ
    in its last digits with the queries that are embedded together. May be used by several threads.
    """

    def __init__(self, corpus: Corpus, model: Any, index: Any, query_prompt: str, batch_size: int) -> None:
        self._corpus, self._model, self._index = corpus, model, index
        self._query_prompt, self._batch_size = query_prompt, batch_size
        self._lock = threading.Lock()  # a tokenizer is not for several threads

    @classmethod
    def open(
        cls,
        corpus_path: str | os.PathLike[str],
        model: str | os.PathLike[str],
        index_folder: str | os.PathLike[str] | None = None,
        *,
        query_prompt: str = "",
        passage_prompt: str = "",
        batch_size: int = 64,
        device: str | None = None,
    ) -> DenseRetriever:
        """Search a JSONL file (`mem1.envs.search.corpus`) with a model of sentence-transformers: a folder or
        a name. The index is made once, as `BM25Retriever.open` makes its own; its embeddings, 4 bytes for
        each channel and passage, stay on disk once it is made and are in memory while it is.

        query_prompt, passage_prompt: what a model wants before texts, as "query: " and "passage: ". device:
        where it computes, by default a GPU if there is one. Raises InputError as `BM25Retriever.open`, and
        for a model that cannot be loaded.
        """
        require(batch_size >= 1, "batch_size", "a number >= 1", batch_size)
        encoder = _load_model(model, device)
        settings = {
            "method": "dense 1",
            "model": _weights_digest(encoder),
            "architecture": repr(encoder),
            "passage_prompt": passage_prompt,
        }

        def build(folder: Path, contents: Iterator[str]) -> None:
            index = faiss.IndexFlatIP(len(_embed(encoder, [""], "", 1)[0]))
            while chunk := list(itertools.islice(contents, _CHUNK)):
                index.add(_embed(encoder, chunk, passage_prompt, batch_size))
            faiss.write_index(index, str(folder / _INDEX))

        corpus, folder = open_index(corpus_path, index_folder, settings, build)
        try:
            index = faiss.read_index(str(folder / _INDEX), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise damaged(folder, error) from None
        return cls(corpus, encoder, index, query_prompt, batch_size)

    def __len__(self) -> int:
        """How many passages the corpus has."""
        return len(self._corpus)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """See `Retriever`."""
        require(top_k >= 1, "top_k", "a number >= 1", top_k)
        texts = [query[:MAX_QUERY_CHARS] for query in queries]
        asked = [place for place, text in enumerate(texts) if text.strip()]
        results: list[list[Passage]] = [[] for _ in texts]
        if asked:
            with self._lock:
                vectors = _embed(
                    self._model, [texts[place] for place in asked], self._query_prompt, self._batch_size
                )
            scores, places = self._index.search(vectors, min(top_k, len(self._corpus)))
            for place, found in zip(asked, zip(scores, places, strict=True), strict=True):
                results[place] = self._passages(*found)
        return results

    def _passages(self, scores: np.ndarray, places: np.ndarray) -> list[Passage]:
        order = np.lexsort((places, -scores))
        return [Passage(*self._corpus[int(places[n])], float(scores[n])) for n in order]


def _load_model(model: str | os.PathLike[str], device: str | None) -> Any:
    try:
        return SentenceTransformer(str(model), device=device).eval()
    except (OSError, ValueError) as error:
        raise InputError(
            f"model: expected a model of sentence-transformers, got {str(model)!r}: {error}"
        ) from error


def _embed(model: Any, texts: list[str], prompt: str, batch_size: int) -> np.ndarray:
    """[len(texts), channels], float32, each of length 1."""
    # The tokenizer knows nothing but UTF-8, of which half a surrogate pair is none.
    clean = [text.encode(errors="replace").decode() for text in texts]
    vectors = model.encode(
        clean, prompt=prompt, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
    )
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _weights_digest(model: Any) -> str:
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()
