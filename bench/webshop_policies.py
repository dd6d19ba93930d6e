"""What three fixed policies earn in WebShop: python bench/webshop_policies.py DATA/webshop

Plays every goal with each of them and prints a table in Markdown, and how often a search for the instruction
finds the goal's product. All but the seconds follows from the data, the seed and the tagger.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mem1.envs.webshop.catalogue import Product
from mem1.envs.webshop.oracle import searchable
from mem1.envs.webshop.shop import Shop, open_shop
from mem1.envs.webshop.webshop_env import WebShopEnv
from mem1.parsing.action import Action

Policy = Callable[[WebShopEnv, Product], Iterator[str]]


def oracle(environment: WebShopEnv, first: Product) -> Iterator[str]:
    """What the environment's expert does."""
    while True:
        yield environment.expert_action().action.text


def first_result(environment: WebShopEnv, first: Product) -> Iterator[str]:
    """Search for the instruction and buy the first result, without options."""
    yield from _open_first(environment, first)
    yield "click[buy now]"


def first_result_with_options(environment: WebShopEnv, first: Product) -> Iterator[str]:
    """The same with options: of each name the longest value whose words all occur in the instruction."""
    yield from _open_first(environment, first)
    said = _words(environment.goal.instruction)
    for values in first.options.values():
        named = [value for value in values if _words(value) <= said]
        if named:
            yield f"click[{max(named, key=lambda value: len(_words(value)))}]"
    yield "click[buy now]"


def _open_first(environment: WebShopEnv, first: Product) -> Iterator[str]:
    yield f"search[{searchable(environment.goal.instruction)}]"
    yield f"click[{first.asin}]"


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


POLICIES: dict[str, Policy] = {
    "oracle": oracle,
    "first result, no options": first_result,
    "first result, options named in the instruction": first_result_with_options,
}


class Played(NamedTuple):
    """Means over all goals; the seconds are those of all together."""

    reward: float
    success: float
    turns: float
    invalid_actions: float
    seconds: float


def play(environment: WebShopEnv, policy: Policy, firsts: list[Product]) -> Played:
    """Every goal once. firsts: the first result of a search for each instruction."""
    rewards, turns, invalid = [], 0, 0
    began = time.perf_counter()
    for goal, first in zip(environment.tasks, firsts, strict=True):
        environment.reset(0, goal)
        for text in policy(environment, first):
            step = environment.step(Action("query", text))
            turns, invalid = turns + 1, invalid + step.info["invalid_action"]
            if step.terminated:
                rewards.append(step.reward)
                break
    successes = sum(reward == 1.0 for reward in rewards)
    means = (total / len(firsts) for total in (sum(rewards), successes, turns, invalid))
    return Played(*means, time.perf_counter() - began)


def found(shop: Shop, asked: list[tuple[str, Product]]) -> str:
    """Shares of queries whose product is among the first 10 and the first 50 results."""
    results = [(product.asin, shop.index.search(query)) for query, product in asked]
    shares = [sum(asin in asins[:most] for asin, asins in results) / len(results) for most in (10, 50)]
    return f"{len(results)} searches, product in the first 10 / 50: {shares[0]:.1%} / {shares[1]:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Play all goals of WebShop with three fixed policies.")
    parser.add_argument("folder", help="with items_shuffle_1000.json and items_ins_v2_1000.json")
    parser.add_argument("--seed", type=int, default=0, help="of prices and their bounds (0)")
    options = parser.parse_args()

    shop = open_shop(options.folder, options.seed)
    asked = [(product.instruction, product) for product in shop.products.values() if product.instruction]
    goals = [(searchable(goal.instruction), goal.product) for goal in shop.goals]
    print(f"{len(shop.products)} products, {len(goals)} goals, seed {options.seed}, {shop.tagger}\n")
    print(f"- instructions: {found(shop, asked)}")
    print(f"- with options and price: {found(shop, goals)}\n")

    environment = WebShopEnv(options.folder, "all", seed=options.seed)
    firsts = [shop.search(query)[0] for query, _ in goals]
    print(f"| policy | {' | '.join(Played._fields)} |\n|---|{'---|' * len(Played._fields)}")
    for name, policy in POLICIES.items():
        figures = (f"{figure:.4g}" for figure in play(environment, policy, firsts))
        print(f"| {name} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
