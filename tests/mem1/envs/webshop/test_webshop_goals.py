"""Goals: one for each combination of options, a bound above the price, the original's shuffle, the split."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from small_shop import product

from mem1.checks import InputError
from mem1.envs.webshop.goals import make_goals, read_instructions, split_goals

ASKED = {"instruction": "Find me shoes", "instruction_attributes": ("rubber sole",)}


def test_a_goal_for_each_combination_of_options_by_sorted_names() -> None:
    shoe = product(options={"size": ("7", "8"), "color": ("red", "blue")}, **ASKED)
    goals = make_goals([product(asin="B000000002"), shoe], seed=0)
    assert [goal.id for goal in goals] == [0, 1, 2, 3]
    combinations = itertools.product(("red", "blue"), ("7", "8"))
    assert {goal.options for goal in goals} == {(("color", c), ("size", s)) for c, s in combinations}
    for goal in goals:
        assert goal.product is shoe and goal.attributes == ("rubber sole",)
        (_, colour), (_, size) = goal.options
        assert goal.instruction == (
            f"Find me shoes with color: {colour}, and size: {size}, "
            f"and price lower than {goal.price_bound:.2f} dollars"
        )


def test_without_options() -> None:
    (goal,) = make_goals([product(price=5.0, **ASKED)], seed=0)
    assert goal.options == ()
    assert goal.instruction == f"Find me shoes, and price lower than {goal.price_bound:.2f} dollars"


@pytest.mark.parametrize(
    ("price", "bounds"),
    [
        (35.0, {50.0, 60.0, 70.0}),  # of 40, 50, 60, 70; the larger of two is never the least
        (40.0, {60.0, 70.0, 80.0}),  # a multiple of ten is not above itself
        (965.0, {980.0, 990.0}),  # of 970, 980, 990
        (970.0, {990.0}),  # of 980 and 990
    ],
)
def test_the_bound_is_the_larger_of_two_of_the_next_four_tens(price: float, bounds: set[float]) -> None:
    drawn = [make_goals([product(price=price, **ASKED)], seed)[0].price_bound for seed in range(60)]
    assert {*drawn} == bounds
    assert drawn == [make_goals([product(price=price, **ASKED)], seed)[0].price_bound for seed in range(60)]


def test_the_larger_of_two_is_the_largest_of_four_in_half_of_the_draws() -> None:
    drawn = [make_goals([product(price=35.0, **ASKED)], seed)[0].price_bound for seed in range(600)]
    # Of the six pairs, one has its larger at 50, two at 60, three at 70: 100, 200, 300, give or take four
    # standard deviations.
    assert abs(drawn.count(50.0) - 100) < 37
    assert abs(drawn.count(70.0) - 300) < 49


@pytest.mark.parametrize("price", [980.0, 1000.0])
def test_no_bound_where_fewer_than_two_are_left(price: float) -> None:
    (goal,) = make_goals([product(price=price, **ASKED)], seed=0)
    assert goal.instruction == "Find me shoes"
    assert goal.price_bound == 1_000_000.0


def test_one_bound_for_all_goals_of_a_product() -> None:
    shoe = product(options={"size": tuple("123456789")}, **ASKED)
    assert len({goal.price_bound for goal in make_goals([shoe], seed=5)}) == 1


def test_the_order_is_the_originals_shuffle_whatever_the_seed() -> None:
    sizes = tuple(str(size) for size in range(600))
    shoe = product(options={"size": sizes}, **ASKED)
    expected = [*sizes]
    random.Random(233).shuffle(expected)
    assert expected[:3] == ["32", "282", "215"]  # the same on every machine
    for seed in (0, 1):
        assert [goal.options[0][1] for goal in make_goals([shoe], seed)] == expected


def test_the_first_500_are_for_tests_and_the_rest_to_train_on() -> None:
    goals = make_goals([product(options={"size": tuple(map(str, range(600)))}, **ASKED)], seed=0)
    assert [goal.id for goal in split_goals(goals, "test")] == [*range(500)]
    assert [goal.id for goal in split_goals(goals, "train")] == [*range(500, 600)]
    assert split_goals(goals, "all") == goals


def test_splits_that_are_none() -> None:
    goals = make_goals([product(**ASKED)], seed=0)
    with pytest.raises(InputError, match="split: expected one of train, test, all, got 'dev'"):
        split_goals(goals, "dev")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="split: expected one with goals, of 1 in all, got 'train'"):
        split_goals(goals, "train")


def test_instructions_of_people(tmp_path: Path) -> None:
    (tmp_path / "human_goals.json").write_text('["i want a mug", "i need a lamp"]')
    assert read_instructions(tmp_path / "human_goals.json") == ["i want a mug", "i need a lamp"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "path: expected a file that can be read"),
        ("[", "expected JSON"),
        ("{}", "expected a list of texts, got 'dict'"),
        ('["a", 1]', "row 2: expected a text, got 1"),
    ],
)
def test_instructions_that_are_none(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "human_goals.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_instructions(path)
