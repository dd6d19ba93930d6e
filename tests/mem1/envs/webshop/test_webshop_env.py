"""Episodes of WebShop: prompts, rewards, the oracle, agents at random, hostile actions."""

from __future__ import annotations

import importlib.util
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkout import ROOT
from small_shop import LAMP, MUGS, SHOE, TRAIL_SHOE, row, rows, write_shop

from mem1.checks import InputError
from mem1.envs.base import Step
from mem1.envs.webshop.goals import Goal
from mem1.envs.webshop.oracle import Oracle
from mem1.envs.webshop.shop import open_shop
from mem1.envs.webshop.webshop_env import WebShopEnv, default_instruction
from mem1.parsing.action import Action
from mem1.parsing.tags import MEM1, OFFICIAL

NOTHING = {"success": 0.0, "r_type": 0.0, "r_att": 0.0, "r_option": 0.0, "r_price": 0.0}


def goal_of(environment: WebShopEnv, asin: str, *values: str) -> Goal:
    """The goal with this product and these values of options."""
    return next(
        goal
        for goal in environment.tasks
        if goal.product.asin == asin and {*values} <= {value for _, value in goal.options}
    )


def do(environment: WebShopEnv, *texts: str) -> Step:
    """The last step of these actions."""
    return [environment.step(Action("query", text)) for text in texts][-1]


def let_expert(environment: WebShopEnv) -> tuple[Step, list[str]]:
    """The expert's last step, and all of its actions."""
    texts = []
    for _ in range(30):
        texts.append(environment.expert_action().action.text)
        step = environment.step(Action("query", texts[-1]))
        if step.terminated:
            return step, texts
    raise AssertionError(f"no purchase: {texts}")


def test_the_prompt(folder: Path) -> None:
    environment = WebShopEnv(folder, "all")
    prompt = environment.reset(0, goal_of(environment, LAMP))
    page = (
        "WebShop [SEP] Instruction: [SEP] Find me easy clean lamps with style: desk, and price lower than "
        f"{environment.goal.price_bound:.2f} dollars [SEP] Search\nAvailable actions: search[<content>]"
    )
    assert prompt == default_instruction(MEM1) + page
    assert WebShopEnv(folder, "all", instruction="Buy! ").reset(0, environment.goal) == "Buy! " + page


def test_an_episode(folder: Path, environment: WebShopEnv) -> None:
    environment.reset(0, goal_of(environment, SHOE, "navy blue", "7"))
    tagger = open_shop(folder).tagger
    step = do(environment, "search[running shoes]")
    assert step.info == NOTHING | {"invalid_action": False, "tagger": tagger}
    assert (step.reward, step.terminated, step.truncated) == (0.0, False, False)
    step = do(environment, f"click[{SHOE}]", "click[navy blue]", "click[7]", "click[buy now]")
    assert (step.reward, step.terminated, step.truncated) == (1.0, True, False)
    assert step.observation == (
        "Thank you for shopping with us! [SEP] Your score (min 0.0, max 1.0) [SEP] 1.0"
    )
    assert step.info == {**dict.fromkeys(NOTHING, 1.0), "invalid_action": False, "tagger": tagger}
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step(Action("query", "click[buy now]"))


def test_a_reward_by_hand(environment: WebShopEnv) -> None:
    environment.reset(0, goal_of(environment, SHOE, "red", "7"))
    step = do(environment, "search[swift]", f"click[{SHOE}]", "click[8 | 9]", "click[buy now]")
    # Attributes: "rubber sole" is known, "quick dry" in the description. Neither option; the price is kept.
    assert step.reward == pytest.approx((2 + 0 + 1) / 5)
    assert step.info["success"] == 0.0 and step.info["r_option"] == 0.0

    environment.reset(0, goal_of(environment, SHOE, "red", "7"))
    step = do(environment, "search[trail]", f"click[{TRAIL_SHOE}]", "click[buy now]")
    # No attribute, no option, the price is kept; the same query and "shoes" in both titles.
    assert step.reward == pytest.approx(1 / 5)

    environment.reset(0, goal_of(environment, SHOE, "red", "7"))
    step = do(environment, "search[mug]", f"click[{MUGS[0]}]", "click[buy now]")
    assert (step.reward, step.info["r_type"], step.info["r_price"]) == (0.0, 0.0, 1.0)


def test_impossible_and_malformed_actions(environment: WebShopEnv) -> None:
    environment.reset(0, goal_of(environment, LAMP))
    shown = do(environment, "search[lamp]").observation
    for action in (
        Action("query", "click[buy now]"),
        Action("answer", "the lamp"),
        Action("malformed", f"<IS>x</IS> click[{LAMP}]"),
        Action("malformed", ""),
    ):
        step = environment.step(action)
        assert (step.observation, step.reward, step.terminated) == (shown, 0.0, False)
        assert step.info["invalid_action"] is True and step.info["success"] == 0.0
    for kind, text in (("answer", f"click[{LAMP}]"), ("search", "click[desk]"), ("answer", "click[buy now]")):
        step = environment.step(Action(kind, text))
        assert step.info["invalid_action"] is False
    assert step.reward == 1.0 and step.terminated


def test_steps_before_a_reset(environment: WebShopEnv) -> None:
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step(Action("query", "search[lamp]"))


# ------------------------------------------------------------------------------------------- tasks and seeds


def test_tasks(environment: WebShopEnv) -> None:
    assert len(environment.tasks) == 4 + 1 + 6  # shoes 2 x 2, a lamp, chairs 2 x 3
    for task in (environment.tasks[2], 2, "2", {"id": 2, "split": "test"}):
        environment.reset(0, task)
        assert environment.goal is environment.tasks[2]


@pytest.mark.parametrize(
    "task", [11, -1, "two", "", {"name": "x"}, {"id": None}, True, 1.0, "９", "1" * 10_000]
)
def test_tasks_that_are_none(environment: WebShopEnv, task: object) -> None:
    with pytest.raises(InputError, match="task: expected"):
        environment.reset(0, task)


def test_the_goal_follows_from_the_seed(folder: Path, environment: WebShopEnv) -> None:
    def drawn() -> list[int]:
        for seed in range(200):
            environment.reset(seed)
            yield environment.goal.id

    drawn_ids = [*drawn()]
    assert drawn_ids == [*drawn()]
    assert {*drawn_ids} == {*range(11)}


def test_the_split_decides_what_is_drawn(tmp_path: Path) -> None:
    products = rows()
    products[0]["customization_options"] = {
        name: [{"value": f"{name} {number}"} for number in range(25)] for name in ("A", "B")
    }
    write_shop(tmp_path, products)
    for split, size, inside in (("test", 500, range(500)), ("train", 132, range(500, 632))):
        environment = WebShopEnv(tmp_path, split)  # type: ignore[arg-type]
        assert len(environment.tasks) == size
        for seed in range(50):
            environment.reset(seed)
            assert environment.goal.id in inside
        environment.reset(0, 631 if split == "test" else 0)  # a task that is given may be of the other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "dev"}, "split: expected one of train, test, all, got 'dev'"),
        ({"split": "train"}, "split: expected one with goals, of 11 in all"),
        ({"seed": "x"}, "seed: expected a whole number, got 'x'"),
    ],
)
def test_arguments_that_cannot_be_used(folder: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        WebShopEnv(folder, **settings)  # type: ignore[arg-type]


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="path: expected a file that can be read, got .*items_ins_v2_1000.json"
    ):
        WebShopEnv(tmp_path)


# ------------------------------------------------------------------------------------- the oracle, and others


def test_the_oracle_is_short(environment: WebShopEnv) -> None:
    environment.reset(0, goal_of(environment, SHOE, "red", "7"))
    assert environment.expert_action().state == f"wanted: {SHOE}; chosen: nothing"
    step, texts = let_expert(environment)
    assert step.reward == 1.0
    assert texts == [
        f"search[{environment.goal.instruction}]",
        *(f"click[{value}]" for value in (SHOE, "red", "7", "Buy Now")),
    ]


def test_the_oracle_earns_all_there_is(environment: WebShopEnv) -> None:
    for goal in environment.tasks:
        environment.reset(0, goal)
        step, _ = let_expert(environment)
        # Two values cannot be chosen; of 1 + 2 + 1, three match without them.
        lost = {"a[1]", "buy now"} & {*dict(goal.options).values()}
        assert step.reward == (0.75 if lost else 1.0), goal


def test_the_oracle_turns_pages_and_prefers_the_query_that_places_the_product_first(tmp_path: Path) -> None:
    described = {
        MUGS[30]: {
            "attributes": ["plain mug"],
            "instruction": "Find me plain mugs",
            "instruction_attributes": ["plain mug"],
        }
    }
    products = [row(asin, "Plain Mug") for asin in MUGS]
    environment = WebShopEnv(write_shop(tmp_path, products, described), "all")
    environment.reset(0, 0)
    step, texts = let_expert(environment)
    assert step.reward == 1.0
    assert texts[1:] == ["click[Next >]"] * 3 + [f"click[{MUGS[30]}]", "click[Buy Now]"]

    products[30]["name"] = "Plain [Zebra] Mug"
    environment = WebShopEnv(write_shop(tmp_path / "zebra", products, described), "all")
    environment.reset(0, 0)
    step, texts = let_expert(environment)
    assert texts == ["search[Plain Zebra Mug]", f"click[{MUGS[30]}]", "click[Buy Now]"]


def test_the_oracle_buys_the_first_result_where_the_product_is_not_found(tmp_path: Path) -> None:
    described = {
        MUGS[-1]: {"instruction": "Find me mugs", "instruction_attributes": ["new"], "attributes": ["new"]}
    }
    products = [row(asin, "Plain Mug") for asin in MUGS]
    folder = write_shop(tmp_path, products, described)
    environment = WebShopEnv(folder, "all")
    environment.reset(0, 0)
    assert not Oracle(open_shop(folder), environment.goal).reachable
    step, texts = let_expert(environment)
    assert texts[1:] == [f"click[{MUGS[0]}]", "click[Buy Now]"]
    assert step.reward == 1.0  # "new" is said of all of them


@pytest.mark.parametrize("seed", range(8))
def test_the_oracle_finds_its_way_from_anywhere(environment: WebShopEnv, seed: int) -> None:
    rng = random.Random(seed)
    environment.reset(seed, goal_of(environment, SHOE, "navy blue", "7"))
    for _ in range(12):
        action = environment.random_action(rng).action
        if action.text != "click[buy now]":
            environment.step(action)
    step, _ = let_expert(environment)
    assert step.reward == 1.0


def test_random_actions_are_possible_and_go_everywhere(environment: WebShopEnv) -> None:
    rng = random.Random(0)
    met, bought = set(), 0
    for seed in range(60):
        environment.reset(seed)
        for _ in range(40):
            step = environment.step(environment.random_action(rng).action)
            assert step.info["invalid_action"] is False
            met.add(environment._visit.place)
            if step.terminated:
                bought += 1
                break
    assert met == {"start", "results", "item", "sub page", "bought"} and bought > 10


def test_the_same_seed_is_the_same_episode_on_any_thread(folder: Path) -> None:
    def play(seed: int) -> list[Step]:
        environment, rng, steps = WebShopEnv(folder, "all"), random.Random(seed), []
        environment.reset(seed)
        while not steps or not (steps[-1].terminated or len(steps) == 30):
            steps.append(environment.step(environment.random_action(rng).action))
        return steps

    with ThreadPoolExecutor(8) as pool:
        together = [*pool.map(play, range(40))]
    assert together == [play(seed) for seed in range(40)]


def test_threads_that_open_a_shop_get_the_same_one(tmp_path: Path) -> None:
    write_shop(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        shops = [*pool.map(lambda _: open_shop(tmp_path), range(8))]
    assert all(shop is shops[0] for shop in shops)


# ---------------------------------------------------------------------------------------------------- hostile

LONG = 10_000_000
HOSTILE = {
    "NUL": "search[\x00shoes\x00]",
    "a lone surrogate": "search[\ud800 shoes \udfff]",
    "special characters of patterns": r"search[(.*)+?{9}\1^$|]",
    "nested brackets": "search[click[search[shoes]]]",
    "tags": "search[</info><answer>click[buy now]</answer>]",
    "other scripts": "search[鞋 обувь 👟 ｓｈｏｅｓ İ]",
    "other digits and blanks": "click[\u2003７\u00a0]",
    "a long search": f"search[{'shoes ' * (LONG // 6)}]",
    "a long word": f"search[{'s' * LONG}]",
    "a long name": f"{'s' * LONG}[shoes]",
    "open brackets": "[" * LONG,
    "closed brackets": "]" * LONG,
    "open, then closed": "[" * (LONG // 2) + "]" * (LONG // 2),
    "pairs": "a[" * (LONG // 2),
    "lines": "a[b\n" * (LONG // 4),
    "blanks": " " * LONG,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("before", [(), ("search[swift]",), ("search[swift]", f"click[{SHOE}]")], ids=len)
def test_hostile_actions(environment: WebShopEnv, text: str, before: tuple[str, ...]) -> None:
    environment.reset(0, goal_of(environment, SHOE, "red", "7"))
    shown = do(environment, *before).observation if before else environment._visit.page.observation
    step = environment.step(Action("query", text))
    assert (step.reward, step.terminated) == (0.0, False)
    assert len(step.observation) < 2000
    if step.info["invalid_action"]:
        assert step.observation == shown
    else:
        assert not before and text.startswith("search[")
    let_expert(environment)


# --------------------------------------------------------------------------------------------- fixed policies


def test_fixed_policies(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "bench" / "webshop_policies.py"
    spec = importlib.util.spec_from_file_location("webshop_policies", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", [path.name, str(folder)])
    script.main()
    table = [line.split("|")[1:-2] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    figures = {name.strip(): [float(cell) for cell in cells] for name, *cells in table[2:]}
    # Reward, success, turns and invalid actions of the goals for shoes (4), the lamp (1) and chairs (6), of
    # which two have the seat "black", two "buy now" and two "a[1]": these four miss an option of four things.
    expected = {
        "oracle": [4 * 1 + 1 + 2 * 1 + 4 * 0.75, 4 + 1 + 2, 4 * 5 + 4 + 5 + 4 + 4 * 4, 0],
        "first result, no options": [4 * 3 / 5 + 2 / 3 + 6 * 2 / 4, 0, 11 * 3, 0],
        "first result, options named in the instruction": [
            *(4 * 1 + 1 + 2 * 1 + 4 * 0.75, 4 + 1 + 2, 4 * 5 + 4 + 2 * 5 + 2 * 4 + 2 * 5, 2)
        ],
    }
    assert figures == {
        name: pytest.approx([total / 11 for total in totals], abs=1e-3) for name, totals in expected.items()
    }


def test_the_prompt_names_the_tags_of_its_format(folder: Path) -> None:
    prompt = WebShopEnv(folder, "all", tags=OFFICIAL).reset(0)
    assert "<search>click[value]</search>" in prompt and "<think>" in prompt and "<query>" not in prompt
