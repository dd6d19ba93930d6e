"""What an episode is measured by: every figure of an evaluation is defined here.

Of answers (`grade`, with SQuAD's and HotpotQA's official definitions):

    exact_match         objectives whose answer equals a golden one, both normalized; the paper sums them up
    f1                  over objectives, the sum of the harmonic means of the precision and recall of words
    answers_miscounted  1 where there are more or fewer answers than objectives ("flagged"), else 0

Of environments, as they report them in `Step.info`: `exact_match`, `f1` and `answers_miscounted` as above;
`success`, 1 for an episode that reached its goal (WebShop: a reward of 1), else 0.

Of trajectories (`EPISODE`), lengths in tokens:

    reward                             the sum of the rewards of all steps
    answered                           1 where the episode ended with an answer
    turns                              actions of the policy, malformed ones included
    invalid_actions                    of these, malformed ones and what the environment called invalid
    tokens                             of the whole episode, each counted once
    model_tokens                       that went through the model: with "reencode", those fed again as well
    peak_tokens                        the most that are live at once: what the KV cache must hold
    peak_tokens_without_prompt         the same, without those of the prompt
    dependency_length                  token pairs: over generated segments, (context + length / 2) * length
    dependency_length_without_prompt   with a context that leaves the prompt out, as the paper counts
    seconds                            wall time from reset to the end, beside the other episodes of a batch

Every mean has a 95 % percentile bootstrap interval over episodes (`Mean`; Efron and Tibshirani 1993, ch. 13).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from mem1.trajectory import FinishReason, Trajectory

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_POLAR = ("yes", "no", "noanswer")  # answers of which HotpotQA's scorer knows no half-right
_RESAMPLES = 2000
_AT_ONCE = 1 << 18  # numbers that are drawn
SEPARATOR = ";"
REWARDS = ("exact_match", "f1")  # of a `Grade`, what an answer can be paid by


def normalize_answer(text: str) -> str:
    """Lower-case, without punctuation (ASCII), articles and extra white space: SQuAD's `normalize_answer`."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golden: Sequence[str]) -> float:
    """1.0 if `answer` is one of the golden ones, all normalized, else 0.0."""
    given = normalize_answer(answer)
    return float(any(given == normalize_answer(right) for right in golden))


def f1(answer: str, golden: Sequence[str], *, polar: bool = True) -> float:
    """The best F1 of words against a golden answer, all normalized.

    polar: "yes", "no" and "noanswer" are right or wrong as a whole, on either side, as in HotpotQA's scorer;
    SQuAD's (v1.1) counts words there too. A side without words gives 0, in both.
    """
    return max(
        (_f1(normalize_answer(answer), normalize_answer(right), polar) for right in golden), default=0.0
    )


def _f1(given: str, right: str, polar: bool) -> float:
    if polar and given != right and (given in _POLAR or right in _POLAR):
        return 0.0
    words, wanted = given.split(), right.split()
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2.0 * common / (len(words) + len(wanted)) if common else 0.0


class Grade(NamedTuple):
    """Of a list of answers, one per objective."""

    exact_matches: tuple[float, ...]
    f1s: tuple[float, ...]
    answers_miscounted: bool  # their number is not that of the objectives

    @property
    def exact_match(self) -> float:
        return sum(self.exact_matches)

    @property
    def f1(self) -> float:
        return sum(self.f1s)

    def info(self) -> dict[str, float]:
        """The entries of `Step.info`."""
        return {
            "exact_match": self.exact_match,
            "f1": self.f1,
            "answers_miscounted": float(self.answers_miscounted),
        }

    def by_objective(self) -> dict[str, list[float]]:
        """More entries, of each objective its own."""
        return {"objectives_em": list(self.exact_matches), "objectives_f1": list(self.f1s)}


# The entries of `Step.info` as long as there is no answer.
UNANSWERED: Mapping[str, float] = MappingProxyType({"exact_match": 0.0, "f1": 0.0, "answers_miscounted": 1.0})


def grade(answer: str, golden: Sequence[Sequence[str]], *, strict: bool = False, polar: bool = True) -> Grade:
    """Grade `a; b; ...` against the golden answers of each objective, in order.

    Answers are compared by position: missing ones are wrong, extra ones ignored, and `answers_miscounted`
    says so. With `strict` a wrong number of answers makes all of them wrong, as in MEM1's released
    evaluation.
    """
    parts = [part.strip() for part in answer.split(SEPARATOR)] if answer.strip() else []
    miscounted = len(parts) != len(golden)
    if strict and miscounted:
        parts = []
    parts = (parts + [""] * len(golden))[: len(golden)]
    pairs = list(zip(parts, golden, strict=True))
    return Grade(
        tuple(exact_match(given, right) if given else 0.0 for given, right in pairs),
        tuple(f1(given, right, polar=polar) for given, right in pairs),
        miscounted,
    )


EPISODE: dict[str, Callable[[Trajectory], float]] = {
    "reward": lambda t: t.reward,
    "answered": lambda t: float(t.finish_reason == FinishReason.ANSWERED),
    "turns": lambda t: float(t.turns),
    "invalid_actions": lambda t: float(t.invalid_actions),
    "tokens": lambda t: float(t.tokens.numel()),
    "model_tokens": lambda t: float(t.model_tokens),
    "peak_tokens": lambda t: float(t.peak_tokens()),
    "peak_tokens_without_prompt": lambda t: float(t.peak_tokens(prompt=False)),
    "dependency_length": lambda t: t.dependency_length(),
    "dependency_length_without_prompt": lambda t: t.dependency_length(prompt=False),
    "seconds": lambda t: t.seconds,
}


FACTS = ("agent", "objectives", "episodes", "errors", "replays")  # of a row, beside its means


class Mean(NamedTuple):
    """The mean of `count` values and its 95 % bootstrap interval; NaN of none. With one value the interval
    has no width: it says nothing.
    """

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Reproducible: the same values in the same order give the same interval."""
        if not values:
            return cls(math.nan, math.nan, math.nan, 0)
        sample = np.asarray(values, dtype=np.float64)
        value = math.fsum(values) / len(values)
        if np.all(sample == sample[0]):
            return cls(value, value, value, len(values))
        generator, size = np.random.Generator(np.random.PCG64(0)), len(values)
        rows = max(1, _AT_ONCE // size)
        parts = [
            sample[generator.integers(size, size=(min(rows, _RESAMPLES - done), size))].mean(axis=1)
            for done in range(0, _RESAMPLES, rows)
        ]
        low, high = np.percentile(np.concatenate(parts), (2.5, 97.5))
        return cls(value, float(low), float(high), len(values))


def measure(trajectory: Trajectory) -> dict[str, float]:
    """Every metric of one episode: of `EPISODE`, and what its environment has reported, under the name
    `environment_...` where ours is the same.
    """
    reported = {
        f"environment_{name}" if name in EPISODE or name in FACTS else name: value
        for name, value in trajectory.score.items()
    }
    return {name: of(trajectory) for name, of in EPISODE.items()} | reported


def means(trajectories: Sequence[Trajectory]) -> dict[str, Mean]:
    """The mean of every metric over the sound ones of `trajectories`: of `EPISODE`, and of what environments
    have reported, over the episodes that have it.
    """
    sound = [t for t in trajectories if not t.error_kind]
    measured = [measure(t) for t in sound]
    names = dict.fromkeys(name for values in ({**dict.fromkeys(EPISODE)}, *measured) for name in values)
    return {name: Mean.of([values[name] for values in measured if name in values]) for name in names}
