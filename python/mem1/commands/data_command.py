"""`mem1 data`, `mem1 view` and `mem1 retrieve`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

from mem1.checks import InputError, require
from mem1.data.check_files import Finding, check
from mem1.data.convert import convert
from mem1.data.sources import DataSet, data_sets
from mem1.envs.worlds import open_retriever
from mem1.evaluation.eval_run import TOKENIZER
from mem1.evaluation.results import markdown
from mem1.evaluation.viewer.page import read_trajectories, write_page
from mem1.models.load import load_tokenizer
from mem1.runtime.progress import Progress
from mem1.train import checkpoint


def run(options: argparse.Namespace, progress: Progress) -> None:
    """List the data sets, check a folder, or convert a file."""
    both = options.convert is not None and options.check is not None
    require(not both, "check", "none beside convert", options.check)
    if options.convert is not None:
        for name in ("source", "out"):
            require(getattr(options, name) is not None, name, "a path beside convert", None)
        made = convert(options.convert, options.source, options.out, overwrite=options.overwrite)
        for line in () if options.json else made.left_out:
            progress.log(f"left out: {line}")
        if options.json:
            progress.log(json.dumps(made._asdict()))
        else:
            progress.log(f"{made.questions} questions, {made.passages} passages are in {options.out}")
        return
    for name in ("source", "out"):
        require(getattr(options, name) is None, name, "none without convert", str(getattr(options, name)))
    if options.check is not None:
        _report(options, [found for found in check(options.check) if found.path is not None], progress)
    else:
        _list(options, progress)


def _list(options: argparse.Namespace, progress: Progress) -> None:
    if options.json:
        for dataset in data_sets():
            progress.log(json.dumps(_record(dataset)))
        return
    for dataset in data_sets():
        progress.log(f"{dataset.name}: {dataset.title}\n  licence {dataset.licence}\n  from {dataset.source}")
        if dataset.note:
            progress.log(f"  {dataset.note}")
        for file in dataset.files:
            known = [f"{digest.size} bytes, sha256 {digest.sha256}" for digest in file.digests]
            progress.log(f"  {file.name}: {'; or '.join(known) or 'no checksum is published'}")


def _record(dataset: DataSet) -> dict[str, Any]:
    files = [
        {"name": file.name, "content": file.content, "digests": [digest._asdict() for digest in file.digests]}
        for file in dataset.files
    ]
    return {**dataset._asdict(), "files": files}


def _report(options: argparse.Namespace, findings: list[Finding], progress: Progress) -> None:
    if options.json:
        for found in findings:
            progress.log(json.dumps({**found._asdict(), "path": str(found.path)}))
    elif findings:
        lines = [
            [found.dataset, str(found.path), found.checksum, "-" if found.rows is None else f"{found.rows:,}"]
            for found in findings
        ]
        progress.log(markdown(["data set", "file", "checksum", "rows"], lines))
    require(bool(findings), "check", "a folder with a file of a known data set", str(options.check))
    broken = [found for found in findings if found.error]
    if broken:
        raise InputError("; ".join(found.error for found in broken))


def view(options: argparse.Namespace, progress: Progress) -> None:
    """Write the page of a file of trajectories."""
    source: Path = options.trajectories
    require(source.is_file(), "trajectories", "a file", str(source))
    out = options.out or source.with_suffix(".html")
    same = out.exists() and source.exists() and out.samefile(source)
    require(not same, "out", "another file than the trajectories", str(out))
    free = not out.exists() or (out.is_file() and out.suffix == ".html")
    require(free, "out", "a new file, or one that ends in .html", str(out))
    named = options.tokenizer or _model_of(source)
    tokenizer = load_tokenizer(checkpoint.newest(named))
    count = write_page(read_trajectories(source), out, tokenizer=tokenizer, title=source.stem)
    progress.log(f"{count} trajectories are in {out}")


def _model_of(source: Path) -> str:
    """The tokenizer beside the trajectories, or the model that most of them name."""
    beside = source.parent / TOKENIZER
    if (beside / "tokenizer.json").is_file():
        return str(beside)
    names = Counter(row.get("model", "") for row in read_trajectories(source))
    del names[""]  # of scripts
    name = names.most_common(1)[0][0] if names else ""
    require(bool(name), "tokenizer", "--tokenizer FOLDER, as the trajectories name no model", None)
    return str(name)


def retrieve(options: argparse.Namespace, progress: Progress) -> None:
    """Serve until a signal ends it."""
    from mem1.envs.search.retrieval_server import ServerConfig, run_server

    names = {field.name for field in fields(ServerConfig)} & vars(options).keys()
    config = ServerConfig(**{name: getattr(options, name) for name in names})
    index = None if options.index is None else str(options.index)
    retriever = open_retriever(str(options.corpus), index, options.dense)
    progress.log(f"{len(retriever):,} passages")
    run_server(retriever, config, lambda url: progress.log(f"listening at {url}"))
