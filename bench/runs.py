"""The file of a run, in the format of pytest-benchmark, so that `pytest-benchmark compare` reads it, and what
else reads that format. It is written without that package, again after each table.

A row with figures is a benchmark: its group is the title of its table, its stats are those of the rounds, in
seconds per call, and the other columns are its `extra_info`. What the format has no place for stands under
"mem1_core": versions, hashes of the sources, goals, and of each table its title, its facts and the rows
without figures.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FORMAT = "5.3.1"  # of the pytest-benchmark whose format it is
OWN = "mem1_core"
COPY = "copy between two buffers"  # the row that is the ceiling of what moves data


class Run:
    """What is measured, and its file."""

    def __init__(
        self, path: Path, machine: Mapping[str, Any], commit: Mapping[str, Any], **facts: Any
    ) -> None:
        self.path = path
        self.goals: list[dict[str, Any]] = []
        self.tables: list[dict[str, Any]] = []
        self.benchmarks: dict[str, dict[str, Any]] = {}  # by full name
        self.own = {**facts, "goals": self.goals, "tables": self.tables}
        self._head = {"machine_info": machine, "commit_info": commit}
        self._time = datetime.now(timezone.utc).isoformat()

    def add_table(self, title: str, facts: dict[str, Any], first: str) -> dict[str, Any]:
        """first: the name of our row."""
        self.tables.append({"title": title, "facts": facts, "first": first, "without figures": []})
        return self.tables[-1]

    def add(self, entry: dict[str, Any]) -> None:
        if entry["fullname"] in self.benchmarks:
            raise ValueError(f"rows of a run: expected names of their own, got {entry['fullname']!r} twice")
        self.benchmarks[entry["fullname"]] = entry

    def save(self) -> None:
        """Whole or not at all: a run that is cut short leaves what it had."""
        end = {"datetime": self._time, "version": FORMAT, OWN: self.own}
        document = self._head | {"benchmarks": list(self.benchmarks.values())} | end
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(self.path)


def full_name(test: str, name: str) -> str:
    """Two runs are compared by it: it has nothing in it that was measured."""
    return f"{test} {name}"


def entry(
    test: str,
    table: str,
    name: str,
    seconds: Sequence[float],
    *,
    calls: int = 1,
    params: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A benchmark of the format. seconds: per call, of each round; calls: how many were timed as one."""
    plain = {key: x if isinstance(x, (int, float)) else str(x) for key, x in (params or {}).items()}
    return {
        "group": table,
        "name": name,
        "fullname": full_name(test, name),
        "params": plain | {"candidate": name},
        "param": name,
        "extra_info": dict(columns or {}),
        "options": dict(options or {}),
        "stats": stats(seconds) | {"data": list(seconds), "iterations": calls},
    }


def hand_over(entry: Mapping[str, Any], session: Any) -> None:
    """To the session of pytest-benchmark, which then saves and compares it as one of its own."""
    from pytest_benchmark.stats import Metadata

    described = SimpleNamespace(**entry, cprofile_stats=None, has_error=False)
    benchmark = Metadata(described, iterations=entry["stats"]["iterations"], options=entry["options"])
    for seconds in entry["stats"]["data"]:
        benchmark.stats.update(seconds)
    session.benchmarks.append(benchmark)


def stats(seconds: Sequence[float]) -> dict[str, Any]:
    """As pytest-benchmark defines them, its quartiles and outliers too."""
    data, count = sorted(seconds), len(seconds)
    mean, total = statistics.mean(data), sum(seconds)
    deviation = statistics.stdev(data) if count > 1 else 0
    q1, q3 = _lower_quartile(data), _lower_quartile(data[::-1])
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    beyond_deviation = sum(not mean - deviation <= s <= mean + deviation for s in data)
    beyond_quartiles = sum(not low <= s <= high for s in data)
    return {
        "min": data[0],
        "max": data[-1],
        "mean": mean,
        "stddev": deviation,
        "rounds": count,
        "median": statistics.median(data),
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": beyond_quartiles,
        "stddev_outliers": beyond_deviation,
        "outliers": f"{beyond_deviation};{beyond_quartiles}",
        "ld15iqr": next(s for s in data if s >= low),
        "hd15iqr": next(s for s in reversed(data) if s <= high),
        "ops": count / total if total else 0,
        "total": total,
    }


def _lower_quartile(data: Sequence[float]) -> float:
    """Of sorted data; of data in falling order the upper one."""
    if len(data) == 1:
        return data[0]
    if len(data) % 2 == 0:
        return statistics.median(data[: len(data) // 2])
    quarter, rest = divmod(len(data), 4)
    if rest == 1:
        return 0.25 * data[quarter - 1] + 0.75 * data[quarter]
    return 0.75 * data[quarter] + 0.25 * data[quarter + 1]


def machine_info(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the format that the standard library knows, and our facts."""
    return {
        "node": platform.node(),
        "processor": platform.processor(),
        "machine": platform.machine(),
        "python_implementation": platform.python_implementation(),
        "python_version": platform.python_version(),
        "release": platform.release(),
        "system": platform.system(),
        OWN: dict(facts),
    }


def commit_info(commit: str, root: Path) -> dict[str, Any]:
    """commit: as `ledger.commit` says it."""
    name = commit.removesuffix("+")
    info: dict[str, Any] = {"id": name, "dirty": commit != name, "project": OWN}
    if name == "unknown":
        return info
    git = ["git", "-C", str(root)]
    show = [*git, "show", "-s", "--format=%cI %aI"]
    info["time"], info["author_time"] = subprocess.check_output(show, text=True).split()
    branch = [*git, "rev-parse", "--abbrev-ref", "HEAD"]
    info["branch"] = subprocess.check_output(branch, text=True).strip()
    return info


# ---------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Row:
    name: str
    stats: Mapping[str, Any] | None  # seconds; None: `columns["note"]` says why
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    title: str
    rows: list[Row] = field(default_factory=list)  # ours first, others without figures last
    facts: dict[str, Any] = field(default_factory=dict)


def tables(path: str | os.PathLike[str]) -> list[Table]:
    """The tables of a run, from our file or one that pytest-benchmark saved. ValueError: it is neither."""
    try:
        document = json.loads(Path(path).read_text())
        own = document.get(OWN, {}).get("tables", [])
        found = {table["title"]: Table(table["title"], facts=table["facts"]) for table in own}
        for row in document["benchmarks"]:
            title = row["group"] or row["fullname"]
            table = found.setdefault(title, Table(title))
            if not all(math.isfinite(row["stats"][key]) for key in ("median", "q1", "q3")):
                raise ValueError(f"{row['name']}: times that are not finite")
            table.rows.append(Row(row["name"], row["stats"], row["extra_info"]))
        for table in own:
            rows = found[table["title"]].rows
            rows += [Row(row["name"], None, {"note": ""} | row) for row in table["without figures"]]
            rows.sort(key=lambda row: row.name != table["first"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a run in pytest-benchmark's format, got a file without it ({error!r})"
        ) from error
    return list(found.values())
