"""The WebShop environment: search, read, choose options, buy; the reward comes with the purchase.

    <query> search[red running shoe] </query>   <info> Instruction: [SEP] ... [SEP] B09ABCDEFG ... </info>
    <query> click[b09abcdefg] </query>          <info> Instruction: [SEP] ... [SEP] Buy Now ... </info>
    <query> click[red] </query>                 <info> the same page </info>
    <query> click[buy now] </query>

Pages, goals and rewards are the original's, without its web server, Java and random draws that nobody seeds.
"""

from __future__ import annotations

import os
import random
import re
from typing import Any

from mem1.checks import InputError, require
from mem1.envs.base import ExpertAction, Step, require_running
from mem1.envs.tasks import task_id
from mem1.envs.webshop.goals import Goal, Split, split_goals
from mem1.envs.webshop.oracle import Oracle, searchable
from mem1.envs.webshop.pages import bought_text
from mem1.envs.webshop.purchase_reward import PurchaseReward, purchase_reward
from mem1.envs.webshop.shop import open_shop
from mem1.envs.webshop.shop_visit import ShopVisit
from mem1.parsing.action import Action
from mem1.parsing.tags import MEM1, TagFormat


def default_instruction(tags: TagFormat) -> str:
    """How to shop, with the tags of a format."""
    action = tags.action("query")
    require(action is not None, "tags", "an action of kind 'query'", ", ".join(tags.tags))
    query = getattr(action, "tag", "")
    state = tags.state
    notes = "" if state is None else f"all that is worth remembering between <{state}> and </{state}>, then "
    return (
        f"Buy the product that the instruction asks for, in an online shop. In each turn write {notes}one "
        f"action: <{query}>search[words]</{query}> on the start page, <{query}>click[value]</{query}> with a "
        "value of the available actions on every other one. Choose the options that are asked for on the "
        "page of the product, then click[buy now], which ends the task.\n"
    )


class WebShopEnv:
    """Goals of the WebShop data in `folder`: `items_shuffle_1000.json`, `items_ins_v2_1000.json`.

    split: "train", "test" or "all", which goals are drawn from where `reset` gets none. seed: for the bounds
    of prices, and prices of products with a range (see `open_shop`). instruction: what the prompt begins
    with, by default `default_instruction(tags)`. There is no limit of turns: that is the agent's. Raises
    InputError for an argument that cannot be used.

    An action is `search[...]` or `click[...]`, in a tag of any kind. One that is impossible changes nothing.
    The `info` of each step has `success` and the parts of the reward (`PurchaseReward`), all 0 until the
    purchase, `invalid_action`, and the `tagger` that the reward depends on.
    """

    run_inline = True  # a search takes less than a millisecond

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: Split = "train",
        *,
        seed: int = 0,
        instruction: str | None = None,
        tags: TagFormat = MEM1,
    ) -> None:
        self._shop = open_shop(folder, seed)
        self.tasks = split_goals(self._shop.goals, split)
        self._prompt = default_instruction(tags) if instruction is None else instruction
        self._running = False

    def reset(self, seed: int, task: Any = None) -> str:
        """Start an episode. task: a Goal, its id, or a row with that id; None for one of `tasks`, drawn by
        `seed`. Raises InputError for another.
        """
        self.goal = self._goal(seed, task)
        self._visit = ShopVisit(self._shop, self.goal.instruction)
        self._oracle: Oracle | None = None
        self._running = True
        return self._prompt + self._visit.page.observation

    def step(self, action: Action) -> Step:
        """Take one action; the purchase ends the episode. Raises RuntimeError if there is none running."""
        require_running(self._running)
        taken = action.kind != "malformed" and self._visit.act(action.text)
        if self._visit.place != "bought":
            return Step(self._visit.page.observation, info=self._info(PurchaseReward(), taken))
        self._running = False
        result = purchase_reward(self.goal, self._visit.product, self._visit.chosen.values())
        info = self._info(result, taken)
        return Step(bought_text(result.reward), result.reward, terminated=True, info=info)

    def expert_action(self) -> ExpertAction:
        """What `Oracle` does now."""
        self._oracle = self._oracle or Oracle(self._shop, self.goal)
        chosen = ", ".join(f"{name}: {value}" for name, value in self._visit.chosen.items())
        state = f"wanted: {self.goal.product.asin}; chosen: {chosen or 'nothing'}"
        return ExpertAction(state, Action("query", self._oracle.action(self._visit)))

    def random_action(self, rng: random.Random) -> ExpertAction:
        """One of the available actions, a search with up to three words of the instruction."""
        words = searchable(self.goal.instruction).split()
        found = rng.sample(words, min(3, len(words)))
        clicks = self._visit.clicks
        text = f"click[{rng.choice(clicks)}]" if clicks else f"search[{' '.join(found)}]"
        return ExpertAction("", Action("query", text))

    def _goal(self, seed: int, task: Any) -> Goal:
        if isinstance(task, Goal):
            return task
        goals = self._shop.goals
        if task is None:
            return self.tasks[random.Random(seed).randrange(len(self.tasks))]
        name = task_id({"id": task} if isinstance(task, (str, int)) else task)
        if not re.fullmatch(r"[0-9]{1,9}", name) or int(name) >= len(goals):
            raise InputError(
                f"task: expected a Goal or the id of one, 0 to {len(goals) - 1}, got {name!r:.200}"
            )
        return goals[int(name)]

    def _info(self, result: PurchaseReward, taken: bool) -> dict[str, Any]:
        parts = result._asdict()
        success = float(parts.pop("reward") == 1.0)
        return {"success": success, **parts, "invalid_action": not taken, "tagger": self._shop.tagger}
