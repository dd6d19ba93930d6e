"""Tables of an evaluation, for people: ours, and with the columns of the paper's."""

from __future__ import annotations

from collections.abc import Sequence

from mem1.evaluation.results import Result, markdown, table

_COLUMNS = (
    *("agent", "objectives", "episodes", "errors", "reward", "exact_match", "f1", "success", "answered"),
    "answers_miscounted",
    *("turns", "invalid_actions", "peak_tokens", "peak_tokens_without_prompt", "model_tokens"),
    *("dependency_length_without_prompt", "seconds"),
)


def tables(results: Sequence[Result]) -> str:
    """Markdown: every row with its intervals, then the paper's layout."""
    known = {name for row in results for name in row.means}
    columns = [name for name in _COLUMNS if name in known or name in _COLUMNS[:4]]
    paper = shop_table(results) if "success" in known else question_table(results)
    return "\n\n".join(
        [
            "Means over episodes with 95 % bootstrap intervals; lengths in tokens, times in seconds.",
            table(results, columns),
            "As in the paper:",
            paper,
            "",
        ]
    )


def question_table(results: Sequence[Result]) -> str:
    """The columns of the paper's Table 1: EM and F1 summed over objectives, peak in hundreds of tokens,
    seconds, for each number of objectives.
    """
    sizes = sorted({row.objectives for row in results})
    rows = {(row.agent, row.objectives): row for row in results}
    header = ["agent", *(f"{n}: {name}" for n in sizes for name in ("EM", "F1", "peak x10^2", "s"))]
    scale = {"exact_match": 1.0, "f1": 1.0, "peak_tokens": 1e-2, "seconds": 1.0}
    lines = []
    for agent in dict.fromkeys(row.agent for row in results):
        line = [agent]
        for n in sizes:
            row = rows.get((agent, n))
            line += [_number(row, name, factor) for name, factor in scale.items()]
        lines.append(line)
    return markdown(header, lines)


def shop_table(results: Sequence[Result]) -> str:
    """The columns of the paper's Table 2: mean reward in hundredths, peak in thousands of tokens, dependency
    length in millions of pairs, seconds.
    """
    header = ["agent", "reward x100", "success x100", "peak x10^3", "dependency x10^6", "s"]
    scale = {
        **{"reward": 100.0, "success": 100.0, "peak_tokens": 1e-3},
        **{"dependency_length_without_prompt": 1e-6, "seconds": 1.0},
    }
    return markdown(
        header,
        [[row.agent, *(_number(row, name, factor) for name, factor in scale.items())] for row in results],
    )


def _number(row: Result | None, name: str, factor: float) -> str:
    value = float("nan") if row is None else factor * row[name]
    return "-" if value != value else f"{value:.3g}"
