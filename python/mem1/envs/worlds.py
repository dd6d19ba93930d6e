"""The environments of the package by name, as the command line has them, with the tasks to play in them.

Questions and goals to train on and to evaluate on are told apart here, the same way for every command.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from mem1.checks import InputError, has_type, require
from mem1.envs.base import Environment
from mem1.envs.tasks import read_rows, split, task_id
from mem1.envs.toy.delayed import DelayedRewardEnv
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.updates import UpdatesEnv
from mem1.parsing.tags import MEM1, TagFormat
from mem1.runtime.event_loop import EVENT_LOOP

Side = Literal["train", "test"]
Objectives = int | tuple[int, int] | None  # of an episode; a range; whatever the environment's own default is
DEFAULT = "multihop"
_PROBE_SECONDS = 10.0  # for the first answer of a server


class World(NamedTuple):
    """make: an environment for an episode. tasks: the rows that it may be reset with, None where all follows
    from the seed. clients: what its environments share, each with a method `close`.
    """

    make: Callable[[], Environment]
    tasks: Sequence[Any] | None = None
    clients: Sequence[Any] = ()


class _Given(NamedTuple):
    """What a world is opened for, beside its own arguments."""

    objectives: Objectives
    side: Side
    tags: TagFormat
    episodes: int


def open_world(
    environment: str | Callable[..., Environment],
    arguments: Mapping[str, Any],
    *,
    objectives: Objectives = None,
    side: Side = "test",
    tags: TagFormat = MEM1,
    tasks: str | None = None,
    episodes: int = 0,
) -> World:
    """The world of a name in `WORLDS`, or of what makes an environment, with its keyword arguments.

    side: the rows to train on, or those that are held out. tags: what prompts tell the policy to write.
    tasks: a file of rows (`read_rows`) for an environment of your own, all of which are played, whatever the
    side. episodes: how many tasks there shall be at least, where they are composed. InputError, before any
    episode, for what cannot be made of these.
    """
    require(side in get_args(Side), "side", "train or test", side)
    given = _Given(objectives, side, tags, episodes)
    if callable(environment):
        own = _with_objectives(given, arguments)
        _check_arguments(environment, own)
        return World(partial(environment, **own), None if tasks is None else _rows(tasks))
    require(isinstance(environment, str), "environment", "what makes an environment", environment)
    require(environment in WORLDS, "environment", f"one of {', '.join(WORLDS)}", environment)
    require(tasks is None, "tasks", f"none beside {environment}, which has its own", tasks)
    opener = WORLDS[environment]
    _check_types(partial(opener, given), arguments)
    return opener(given, **arguments)


def _with_objectives(given: _Given, arguments: Mapping[str, Any]) -> dict[str, Any]:
    if given.objectives is None:
        return dict(arguments)
    require("objectives" not in arguments, "environment-args", "no objectives beside --objectives", arguments)
    return {**arguments, "objectives": given.objectives}


def _check_arguments(make: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    try:
        inspect.signature(make).bind(**arguments)
    except ValueError:  # of some builtins Python knows no signature
        pass
    except TypeError as error:
        named = make.func if isinstance(make, partial) else make
        name = getattr(named, "__qualname__", repr(named)).strip("_")
        raise InputError(f"environment-args: expected arguments of {name}: {error}") from None


def _check_types(make: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """As `_check_arguments`, and that each is of the type that is written there."""
    _check_arguments(make, arguments)
    while isinstance(make, partial):
        make = make.func
    hints = get_type_hints(make.__init__ if isinstance(make, type) else make)
    for name, value in arguments.items():
        if name in hints:
            expected = inspect.signature(make).parameters[name].annotation
            require(has_type(value, hints[name]), f"environment-args: {name}", expected, value)


def _rows(path: str) -> list[dict[str, Any]]:
    rows, places = list[dict[str, Any]](), dict[str, str]()
    for where, row in read_rows(path):
        try:
            name = task_id(row)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if name in places:
            raise InputError(f"{where}: id: expected one of its own, got {name!r}, as at {places[name]}")
        places[name] = where
        rows.append(row)
    require(len(rows) > 0, "tasks", "a file with rows", path)
    return rows


def _toy(make: Callable[..., Environment], given: _Given, **arguments: Any) -> World:
    arguments = _with_objectives(given, arguments)
    _check_types(make, arguments)
    make(**arguments)  # which costs nothing, and refuses what is out of its range
    return World(partial(make, **arguments))


def _retrieval_qa(
    given: _Given,
    questions: str,
    corpus: str | None = None,
    url: str | None = None,
    *,
    dense: str | None = None,
    index: str | None = None,
    datasets: Sequence[str] = (),
    held_out: float = 0.2,
    **arguments: Any,
) -> World:
    """questions: a file of any known format. corpus: a JSONL file that is searched here, by BM25 or the
    vectors of the model `dense`, with its `index` beside it. url: of a server that searches instead; the
    oracle then has the titles of `corpus`, if that is given. held_out: the share of questions that is not for
    training.
    """
    from mem1.envs.qa.retrieval_qa import RetrievalQAEnv

    for name in ("tags", "title_of", "tasks", "retriever"):  # which are given here
        require(name not in arguments, "environment-args", "arguments that are not made of others", name)
    _check_types(partial(RetrievalQAEnv, None, None), arguments)
    title_of: Callable[[str], str | None] | None = None if corpus is None else partial(_title, corpus)
    require(corpus is not None or url is not None, "environment-args", "a corpus or a url", (corpus, url))
    local = url is None or (dense is None and index is None)
    require(local, "environment-args", "no dense and no index beside url", (dense, index))
    retriever: Any
    if url is not None:
        retriever = _client(url)
    else:
        retriever = open_retriever(str(_path("corpus", corpus)), index, dense)
    tasks = _composed(given, questions, datasets, held_out)
    make = partial(RetrievalQAEnv, None, retriever, tags=given.tags, title_of=title_of, **arguments)
    make()  # which refuses what is out of its range
    return World(make, tasks, [retriever] if url is not None else [])


def _client(url: str) -> Any:
    """Of a server that has answered."""
    from mem1.envs.search.retrieval_client import RetrievalClient, RetrievalError

    async def asked() -> None:
        client = RetrievalClient(url, timeout=_PROBE_SECONDS)
        try:
            await client.search(["a question"], 1)
        finally:
            await client.close()

    try:
        EVENT_LOOP.run(asked())
    except (ConnectionError, RetrievalError) as error:
        raise InputError(f"url: expected a server of the retrieval protocol, got {error}") from None
    return RetrievalClient(url)


@cache  # one index in memory, however many worlds search it
def open_retriever(corpus: str, index: str | None = None, dense: str | None = None) -> Any:
    """What searches a JSONL corpus in this process, by BM25 or by the vectors of a model."""
    if dense is not None:
        from mem1.envs.search.dense import DenseRetriever

        return DenseRetriever.open(corpus, dense, index)
    from mem1.envs.search.bm25 import BM25Retriever

    return BM25Retriever.open(corpus, index)


def _web_qa(
    given: _Given,
    questions: str,
    key_file: str,
    *,
    url: str = "https://google.serper.dev/search",
    allow: Sequence[str] = (),
    datasets: Sequence[str] = (),
    held_out: float = 0.2,
    **arguments: Any,
) -> World:
    """key_file: a file with the key of the search API. allow: hosts with ports that pages may be read from
    though they are local.
    """
    from mem1.envs.web.page_fetch import PageFetcher
    from mem1.envs.web.serper import SerperClient
    from mem1.envs.web.web_qa import WebQAEnv

    try:
        key = _path("key_file", key_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"key_file: expected a file with a key, got {key_file!r}: {error}") from None
    _check_types(partial(WebQAEnv, None, None), arguments)
    clients = SerperClient(key, url), PageFetcher(allow=allow)
    tasks = _composed(given, questions, datasets, held_out)
    make = partial(WebQAEnv, *clients, **({"tags": given.tags} | arguments))
    make()  # which refuses what is out of its range
    return World(make, tasks, clients)


def _webshop(given: _Given, folder: str, **arguments: Any) -> World:
    """folder: with the files of the 1,000 products. The first 500 goals are held out, as in the paper."""
    from mem1.envs.webshop.webshop_env import WebShopEnv

    require(given.objectives in (None, 1, (1, 1)), "objectives", "1 in webshop", given.objectives)
    _check_types(partial(WebShopEnv, folder, given.side), arguments)
    make = partial(WebShopEnv, folder, given.side, **({"tags": given.tags} | arguments))
    return World(make, make().tasks)


WORLDS: dict[str, Callable[..., World]] = {
    "multihop": partial(_toy, MultiHopEnv),
    "updates": partial(_toy, UpdatesEnv),
    "delayed": partial(_toy, DelayedRewardEnv),
    "retrieval-qa": _retrieval_qa,
    "web-qa": _web_qa,
    "webshop": _webshop,
}
TOYS = ("multihop", "updates", "delayed")
COMPOSED = (*TOYS, "retrieval-qa", "web-qa")  # of any number of objectives


def _title(corpus: str, passage: str) -> str | None:
    return _titles(corpus).get(passage)


@cache
def _titles(corpus: str) -> dict[str, str]:
    """Of all passages, by their ids: what an expert may know, and no policy."""
    from mem1.envs.search.corpus import Corpus

    rows = Corpus(_path("corpus", corpus)).rows()
    return {row.id: row.contents.partition("\n")[0].strip('"') for row in rows}


def _path(name: str, path: object) -> Path:
    require(isinstance(path, str) and Path(path).is_file(), name, "a file", path)
    return Path(str(path))


def _composed(given: _Given, questions: str, datasets: Sequence[str], held_out: float) -> list[Any]:
    """Tasks out of the questions of one side."""
    from mem1.envs.qa.compose import compose
    from mem1.envs.qa.question_files import read_questions
    from mem1.envs.qa.questions import each_question

    train, test = split(each_question(read_questions(_path("questions", questions))), 0, held_out)
    rows = train if given.side == "train" else test
    sizes = given.objectives or 2
    low, high = (sizes, sizes) if isinstance(sizes, int) else sizes
    # As many of each size: what the largest gets when each question is asked once, or what is played.
    known = [row for row in rows if not datasets or row.dataset in datasets]
    count = max(len(known) // high, -(-given.episodes // (high - low + 1)), 1)
    return [task for n in range(low, high + 1) for task in compose(rows, n, 0, count, datasets=datasets)]
