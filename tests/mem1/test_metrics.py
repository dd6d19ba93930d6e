"""Answers are scored as by the official scorers of SQuAD v1.1 and HotpotQA; every right value is worked out
by hand from their definitions. Means have intervals that hold what they promise.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from mem1.metrics import Mean, exact_match, f1, grade, means, measure, normalize_answer
from mem1.trajectory import TokenReward, Trajectory
from mem1_core.segments import Segment

# What both scorers make of a text: lower-case, punctuation out, articles out, white space to single blanks.
NORMALIZED = {
    "The  Cat sat.": "cat sat",
    "A.  an\tTHE cat!\n": "cat",
    "U.S.A.": "usa",
    "rock-n-roll": "rocknroll",  # punctuation leaves no blank behind
    "the-cat": "thecat",  # and goes before articles do
    "a-team": "ateam",
    "theory of an anthem": "theory of anthem",
    "the": "",
    "?!": "",
    "": "",
    "new\u00a0york": "new york",
    "CAFÉ": "café",
    "cafe\u0301": "cafe\u0301",  # no other form of Unicode
    "1990–95 “x”": "1990–95 “x”",  # only ASCII punctuation goes
    "$5,000": "5000",
    "a_b": "ab",
}


@pytest.mark.parametrize("text", NORMALIZED)
def test_normalize_answer(text: str) -> None:
    assert normalize_answer(text) == NORMALIZED[text]


# answer, golden answer: exact match of both scorers, F1 of SQuAD's, F1 of HotpotQA's
SCORED = [
    ("the Cat", "cat", 1, 1, 1),
    ("U.S.A.", "USA", 1, 1, 1),
    ("Barack Hussein Obama", "Obama", 0, 1 / 2, 1 / 2),  # precision 1/3, recall 1
    ("Obama", "Barack Hussein Obama", 0, 1 / 2, 1 / 2),
    ("new new york", "New York", 0, 4 / 5, 4 / 5),  # a word counts as often as it stands on both sides
    ("new new york", "new new jersey", 0, 2 / 3, 2 / 3),
    ("york new", "new york", 0, 1, 1),  # F1 knows no order
    ("rock n roll", "rock-n-roll", 0, 0, 0),
    ("café", "cafe", 0, 0, 0),
    ("é", "e\u0301", 0, 0, 0),
    ("“cat”", "cat", 0, 0, 0),
    ("1990–1995", "1990-1995", 0, 0, 0),
    ("in the year 1901", "1901", 0, 1 / 2, 1 / 2),
    ("yes", "Yes.", 1, 1, 1),
    ("yes", "no", 0, 0, 0),
    ("yes it is", "yes", 0, 1 / 2, 0),
    ("yes", "yes it is", 0, 1 / 2, 0),
    ("no one", "no", 0, 2 / 3, 0),
    ("no one", "no man", 0, 1 / 2, 1 / 2),  # neither is "no" as a whole
    ("noanswer", "noanswer given", 0, 2 / 3, 0),
    ("", "cat", 0, 0, 0),
    ("cat", "", 0, 0, 0),
    ("the", "an", 1, 0, 0),  # equal, and without a word
    ("", "the", 1, 0, 0),
]


@pytest.mark.parametrize(("answer", "golden", "match", "squad", "hotpotqa"), SCORED)
def test_scores_are_the_official_ones(
    answer: str, golden: str, match: float, squad: float, hotpotqa: float
) -> None:
    assert exact_match(answer, [golden]) == match
    assert f1(answer, [golden], polar=False) == pytest.approx(squad)
    assert f1(answer, [golden]) == pytest.approx(hotpotqa)


def test_the_best_golden_answer_counts() -> None:
    golden = ["Barack Obama", "Barack Hussein Obama", "no"]
    assert exact_match("the barack obama", golden) == 1.0
    assert exact_match("Obama", golden) == 0.0
    assert f1("Obama", golden) == pytest.approx(2 / 3)
    assert f1("no idea", golden, polar=False) == pytest.approx(2 / 3)
    assert f1("no idea", golden) == 0.0
    assert (exact_match("x", []), f1("x", [])) == (0.0, 0.0)


GOLDEN = [["Oslo"], ["1969", "in 1969"], ["yes"]]


@pytest.mark.parametrize(
    ("answer", "matches", "f1s", "missing"),
    [
        ("Oslo; 1969; yes", (1, 1, 1), (1, 1, 1), False),
        (" the oslo ;In 1969;yes.", (1, 1, 1), (1, 1, 1), False),
        ("1969; Oslo; yes", (0, 0, 1), (0, 0, 1), False),  # by position
        ("Oslo city; year 1969; yes it is", (0, 0, 0), (2 / 3, 2 / 3, 0), False),
        ("Oslo; ; yes", (1, 0, 1), (1, 0, 1), False),
        (";;", (0, 0, 0), (0, 0, 0), False),
        ("Oslo; 1969", (1, 1, 0), (1, 1, 0), True),
        ("Oslo", (1, 0, 0), (1, 0, 0), True),
        ("Oslo, 1969, yes", (0, 0, 0), (1 / 2, 0, 0), True),
        ("Oslo; 1969; yes; more", (1, 1, 1), (1, 1, 1), True),
        ("Oslo; 1969; yes;", (1, 1, 1), (1, 1, 1), True),
        ("", (0, 0, 0), (0, 0, 0), True),
        ("  \n", (0, 0, 0), (0, 0, 0), True),
    ],
)
def test_several_answers(
    answer: str, matches: tuple[float, ...], f1s: tuple[float, ...], missing: bool
) -> None:
    found = grade(answer, GOLDEN)
    assert found.exact_matches == matches
    assert found.f1s == pytest.approx(f1s)
    assert found.answers_miscounted is missing
    assert found.info() == {
        "exact_match": sum(matches),
        "f1": pytest.approx(sum(f1s)),
        "answers_miscounted": float(missing),
    }
    strict = grade(answer, GOLDEN, strict=True)
    assert strict == (found._replace(exact_matches=(0, 0, 0), f1s=(0, 0, 0)) if missing else found)


def test_one_answer() -> None:
    assert grade("Oslo", [["Oslo"]], strict=True) == ((1.0,), (1.0,), False)
    assert grade("Oslo; Oslo", [["Oslo"]]) == ((1.0,), (1.0,), True)
    assert grade("", [["the"]]) == ((0.0,), (0.0,), True)  # what is missing hits nothing
    assert grade("yes it is", [["yes"]]).f1 == 0.0
    assert grade("yes it is", [["yes"]], polar=False).f1 == pytest.approx(1 / 2)


def test_a_mean_of_none_is_not_a_number() -> None:
    value, low, high, count = Mean.of([])
    assert count == 0 and math.isnan(value) and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("count", [1, 7])
def test_equal_values_have_an_interval_without_width(count: int) -> None:
    assert Mean.of([0.1] * count) == Mean(pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1), count)


def test_an_interval_is_reproducible() -> None:
    rng = random.Random(0)
    values = [rng.random() for _ in range(50)]
    mean = Mean.of(values)
    assert mean == Mean.of(list(values))
    assert mean.count == 50 and mean.value == pytest.approx(sum(values) / 50)
    assert 0.0 < mean.low < mean.value < mean.high < 1.0


def test_an_interval_scales_with_its_values() -> None:
    values = [float(n % 5) for n in range(40)]
    plain, scaled = Mean.of(values), Mean.of([10 * value - 3 for value in values])
    assert scaled[:3] == pytest.approx([10 * end - 3 for end in plain[:3]])


def test_the_width_is_that_of_the_normal_approximation() -> None:
    for count in (100, 400):
        mean = Mean.of([float(n % 2) for n in range(count)])
        assert mean.value == 0.5
        assert mean.high - mean.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(count), rel=0.1)


def test_ninety_five_of_a_hundred_intervals_hold_the_mean() -> None:
    rng = random.Random(1)
    hits = 0
    for _ in range(400):
        mean = Mean.of([rng.expovariate(1.0) for _ in range(60)])
        hits += mean.low <= 1.0 <= mean.high
    # Of a skewed distribution a percentile interval of 60 values holds it in about 93 of 100 cases.
    assert 0.90 <= hits / 400 <= 0.97


def test_names_of_an_environment_do_not_hide_ours() -> None:
    segments = [Segment("prompt", 0, 2), Segment("answer", 1, 1)]
    score = {"reward": 99.0, "objectives": 7.0, "success": 1.0}
    played = Trajectory(torch.zeros(3, dtype=torch.int64), segments, torch.zeros(3), "action", score=score)
    measured = measure(replace(played, rewards=[TokenReward(2, 0.5)]))
    assert measured["reward"] == 0.5 and measured["environment_reward"] == 99.0
    assert measured["environment_objectives"] == 7.0 and measured["success"] == 1.0
    assert "objectives" not in measured and means([played])["environment_reward"].value == 99.0
