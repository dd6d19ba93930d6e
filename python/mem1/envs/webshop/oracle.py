"""An agent that knows the goal's product: search, find it, choose its options, buy."""

from __future__ import annotations

from mem1.envs.webshop.goals import Goal
from mem1.envs.webshop.pages import BACK, BUTTONS, BUY, NEXT, PREVIOUS, PRODUCTS_PER_PAGE
from mem1.envs.webshop.shop import Shop
from mem1.envs.webshop.shop_visit import ShopVisit


class Oracle:
    """Of the instruction and the title, it searches for the one that places the goal's product first.

    reachable: whether one of them has it among its results. Where none has, the first result is bought.
    """

    def __init__(self, shop: Shop, goal: Goal) -> None:
        self._goal = goal
        results = {
            query: shop.index.search(query)
            for query in (searchable(goal.instruction), searchable(goal.product.title))
        }
        self._query = min(results, key=lambda query: _place(goal.product.asin, results[query]))
        self.reachable = goal.product.asin in results[self._query]

    def action(self, visit: ShopVisit) -> str:
        """What to do next, wherever in the shop."""
        if visit.place == "start":
            return f"search[{self._query}]"
        if visit.place == "results":
            return f"click[{self._way(visit)}]"
        right = visit.product.asin == self._goal.product.asin or not self.reachable
        return f"click[{self._choice(visit) if right and visit.place == 'item' else PREVIOUS}]"

    def _way(self, visit: ShopVisit) -> str:
        """From results to the product."""
        asins = [product.asin for product in visit.results]
        wanted = [self._goal.product.asin] if self.reachable else asins[:1]
        if not wanted or wanted[0] not in asins:
            return BACK
        number = asins.index(wanted[0]) // PRODUCTS_PER_PAGE + 1
        if number != visit.number:
            return NEXT if number > visit.number else PREVIOUS
        return wanted[0]

    def _choice(self, visit: ShopVisit) -> str:
        """The first option that is wanted, not chosen yet and can be clicked; else the purchase."""
        possible = {*visit.clicks} - BUTTONS - {*visit.chosen.values()}
        return next((value for _, value in self._goal.options if value in possible), BUY)


def searchable(text: str) -> str:
    """`text` as the words of a search: on one line, and without brackets."""
    return " ".join(text.replace("[", " ").replace("]", " ").split())


def _place(asin: str, results: tuple[str, ...]) -> int:
    return results.index(asin) if asin in results else len(results)
