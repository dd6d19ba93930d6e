"""What is to be bought: a goal for each way to choose the options of each product with an instruction."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from mem1.checks import require
from mem1.envs.webshop.catalogue import Product, read_json

Split = Literal["train", "test", "all"]
SPLITS: tuple[Split, ...] = get_args(Split)
_TEST_GOALS = 500
_SHUFFLE_SEED = 233
_BOUNDS = [10.0 * tens for tens in range(1, 100)]
_NO_BOUND = 1_000_000.0
_Options = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Goal:
    """A row of the task set.

    id: its place among all, once shuffled. instruction: what the agent is told. product: the one that the
    instruction was made from. attributes, options (pairs of a name and a value) and price_bound (in dollars):
    what it asks for.
    """

    id: int
    instruction: str
    product: Product = field(repr=False)
    attributes: tuple[str, ...]
    options: _Options
    price_bound: float


def make_goals(products: Iterable[Product], seed: int) -> tuple[Goal, ...]:
    """All goals, in the original's order: shuffled with seed 233. `seed`, with the product's id, decides the
    bounds of prices alone.
    """
    asked: list[tuple[Product, _Options, float]] = []
    for product in products:
        if product.instruction is not None:
            bound = _price_bound(product, seed)
            asked += [(product, options, bound) for options in _combinations(product)]
    random.Random(_SHUFFLE_SEED).shuffle(asked)
    return tuple(_goal(place, *one) for place, one in enumerate(asked))


def split_goals(goals: tuple[Goal, ...], split: Split) -> tuple[Goal, ...]:
    """MEM1's split: the first 500 for tests, all others to train on. InputError for another name, and for a
    split without a goal.
    """
    require(split in SPLITS, "split", f"one of {', '.join(SPLITS)}", split)
    parts = {"train": goals[_TEST_GOALS:], "test": goals[:_TEST_GOALS], "all": goals}
    require(len(parts[split]) > 0, "split", f"one with goals, of {len(goals)} in all", split)
    return parts[split]


def read_instructions(path: str | os.PathLike[str]) -> list[str]:
    """The instructions that people wrote (`human_goals.json`): texts alone, for the full catalogue, so no
    reward is defined for them. Raises InputError for a file that is no list of texts.
    """
    file = Path(path)
    texts = read_json(file)
    require(isinstance(texts, list), str(file), "a list of texts", type(texts).__name__)
    for number, text in enumerate(texts, 1):
        require(isinstance(text, str), f"{file}: row {number}", "a text", text)
    return list(texts)


def _combinations(product: Product) -> Iterator[_Options]:
    names = sorted(product.options)
    for values in itertools.product(*(product.options[name] for name in names)):
        yield tuple(zip(names, values, strict=True))


def _price_bound(product: Product, seed: int) -> float:
    """The larger of two that are drawn of the four smallest multiples of ten above the price, up to 990."""
    above = [bound for bound in _BOUNDS if bound > product.price][:4]
    if len(above) < 2:
        return _NO_BOUND
    return max(random.Random(f"{seed} {product.asin} bound").sample(above, 2))


def _goal(place: int, product: Product, options: _Options, bound: float) -> Goal:
    wanted = ", and ".join(f"{name}: {value}" for name, value in options)
    choice = f" with {wanted}" if wanted else ""
    limit = "" if bound == _NO_BOUND else f", and price lower than {bound:.2f} dollars"
    return Goal(
        id=place,
        instruction=f"{product.instruction}{choice}{limit}",
        product=product,
        attributes=product.instruction_attributes,
        options=options,
        price_bound=bound,
    )
