"""What the scripted oracle and a random agent answer in retrieval QA: python bench/oracle_qa.py DATA/qa

Plays qa.jsonl over BM25 of corpus.jsonl, without a model, and prints a table in Markdown: for each number of
objectives, how many questions had a supporting passage shown, and the exact match of those and of all, with
95 % bootstrap intervals. All but the seconds follows from the data.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from mem1.envs.base import ExpertAction, Step
from mem1.envs.qa.compose import compose
from mem1.envs.qa.question_files import read_questions
from mem1.envs.qa.questions import QuestionTask, each_question
from mem1.envs.qa.retrieval_qa import RetrievalQAEnv
from mem1.envs.search.bm25 import BM25Retriever
from mem1.envs.tasks import read_rows
from mem1.metrics import Mean

Agent = Callable[[RetrievalQAEnv, random.Random], ExpertAction]
AGENTS: dict[str, Agent] = {
    "oracle": lambda environment, rng: environment.expert_action(),
    "random": lambda environment, rng: environment.random_action(rng),
}
OBJECTIVES = (1, 2, 4, 8, 16)
COLUMNS = (
    "agent | asks for titles | data | objectives | episodes | turns | found | EM where found | EM | seconds"
)


class Played(NamedTuple):
    """turns: of each episode. found, matches: of each of their questions, 0 or 1."""

    turns: list[float]
    found: list[float]
    matches: list[float]


def play(environment: RetrievalQAEnv, tasks: Iterable[QuestionTask], agent: Agent) -> Played:
    played = Played([], [], [])
    for seed, task in enumerate(tasks):
        rng, turns, step = random.Random(seed), 0, Step("")
        environment.reset(seed, task)
        while not step.terminated:
            step = environment.step(agent(environment, rng).action)
            turns += 1
        played.turns.append(turns)
        played.found.extend(step.info["objectives_gold_found"])
        played.matches.extend(step.info["objectives_em"])
    return played


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="with qa.jsonl and corpus.jsonl")
    parser.add_argument("--episodes", type=int, help="of each row; default: each question once")
    parser.add_argument("--top-k", type=int, default=3, help="passages a query")
    options = parser.parse_args(arguments)
    questions = each_question(read_questions(options.folder / "qa.jsonl"))
    corpus = options.folder / "corpus.jsonl"
    titles = {str(row["id"]): str(row.get("title", "")) for _, row in read_rows(corpus)}
    rows = [("oracle", 1, [data], False) for data in dict.fromkeys(q.dataset for q in questions)]
    rows += [("oracle", objectives, [], title) for title in (False, True) for objectives in OBJECTIVES]
    rows += [("random", objectives, [], False) for objectives in OBJECTIVES]
    print(f"| {COLUMNS} |\n|{'---|' * len(COLUMNS.split('|'))}")
    with tempfile.TemporaryDirectory() as index:
        retriever = BM25Retriever.open(corpus, index)
        for name, objectives, datasets, title in rows:
            environment = RetrievalQAEnv(
                None, retriever, options.top_k, title_of=titles.get if title else None
            )
            tasks = compose(questions, objectives, 0, options.episodes, datasets=datasets)
            start = time.perf_counter()
            played = play(environment, tasks, AGENTS[name])
            seconds = time.perf_counter() - start
            data = ", ".join(datasets) or "all"
            known = [match for match, found in zip(played.matches, played.found, strict=True) if found]
            cells = [name, "yes" if title else "no", data, objectives, len(tasks), mean(played.turns)]
            cells += [mean(played.found), mean(known), mean(played.matches), f"{seconds:.1f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def mean(values: list[float]) -> str:
    value, low, high, _ = Mean.of(values)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
