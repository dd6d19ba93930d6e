"""WebShop's own 1,000 products, where they are at hand."""

from __future__ import annotations

import random

import pytest
from real_data import DATA, needs_data

from mem1.envs.base import Step
from mem1.envs.webshop.goals import read_instructions, split_goals
from mem1.envs.webshop.oracle import Oracle, searchable
from mem1.envs.webshop.purchase_reward import purchase_reward
from mem1.envs.webshop.shop import Shop, open_shop
from mem1.envs.webshop.webshop_env import WebShopEnv

pytestmark = needs_data
FOLDER = DATA / "webshop"


@pytest.fixture(scope="module")
def shop() -> Shop:
    return open_shop(FOLDER)


def test_products_and_goals(shop: Shop) -> None:
    assert len(shop.products) == 1000
    assert sum(product.instruction is not None for product in shop.products.values()) == 415
    assert len(shop.goals) == 6910
    assert len(split_goals(shop.goals, "test")) == 500
    # The original's shuffle: the same goals come first whatever prices were drawn.
    first = shop.goals[0]
    assert first.product.asin == "B0743JKHBV"
    assert first.instruction == (
        "Find me double sided, machine washable decorative pillows with printing technology "
        'with size: 28" x 28", and price lower than 40.00 dollars'
    )
    assert [shop.goals[place].product.asin for place in (1, 499)] == ["B09QCP4579", "B01HQTWL6S"]


def test_the_draws_of_a_seed(shop: Shop) -> None:
    other = open_shop(FOLDER, 1)
    assert [goal.options for goal in other.goals] == [goal.options for goal in shop.goals]
    changed = sum(a.price_bound != b.price_bound for a, b in zip(shop.goals, other.goals, strict=True))
    assert changed > 2000
    assert sum(goal.price_bound for goal in shop.goals) == 15_459_590.0  # on every machine
    for goal in shop.goals:
        assert goal.product.price < goal.price_bound


def test_searching_for_the_instruction_finds_the_product(shop: Shop) -> None:
    asked = [product for product in shop.products.values() if product.instruction]
    places = [shop.search(product.instruction or "") for product in asked]
    first = [product in found[:10] for product, found in zip(asked, places, strict=True)]
    any_page = [product in found for product, found in zip(asked, places, strict=True)]
    assert (sum(first), sum(any_page)) == (321, 386)  # 77.3 and 93.0 % of 415; Lucene's index: 76.4 and 93.5
    goals = shop.goals[::20]
    assert sum(goal.product in shop.search(searchable(goal.instruction)) for goal in goals) >= 0.98 * len(
        goals
    )


def test_every_goal_can_be_fulfilled(shop: Shop) -> None:
    for goal in shop.goals:
        assert purchase_reward(goal, goal.product, dict(goal.options).values()).reward == 1.0, goal


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_oracle_earns_1(shop: Shop, split: str) -> None:
    environment = WebShopEnv(FOLDER, split)  # type: ignore[arg-type]
    turns = []
    for seed in range(30):
        environment.reset(seed)
        assert Oracle(shop, environment.goal).reachable
        steps: list[Step] = []
        while not steps or not (steps[-1].terminated or len(steps) == 12):
            steps.append(environment.step(environment.expert_action().action))
        assert steps[-1].reward == 1.0 and steps[-1].info["success"] == 1.0
        turns.append(len(steps))
    assert sum(turns) / len(turns) < 6


def test_agents_at_random_see_no_invalid_action() -> None:
    environment, rng = WebShopEnv(FOLDER), random.Random(0)
    for seed in range(20):
        environment.reset(seed)
        for _ in range(15):
            step = environment.step(environment.random_action(rng).action)
            assert not step.info["invalid_action"] and 0.0 <= step.reward <= 1.0
            if step.terminated:
                break


def test_instructions_of_people() -> None:
    texts = read_instructions(FOLDER / "human_goals.json")
    assert len(texts) == 12_087
    assert texts[0] == "i need a long clip-in hair extension which is natural looking"
