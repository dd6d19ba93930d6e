"""Where an agent is in the shop, and where its actions lead."""

from __future__ import annotations

from typing import Literal

from mem1.envs.webshop.catalogue import Product
from mem1.envs.webshop.pages import (
    BACK,
    BUY,
    DESCRIPTION,
    FEATURES,
    NEXT,
    PREVIOUS,
    REVIEWS,
    Page,
    item_page,
    results_page,
    start_page,
    sub_page,
)
from mem1.envs.webshop.shop import Shop

Place = Literal["start", "results", "item", "sub page", "bought"]
_SUB_PAGES = {name.lower(): name for name in (DESCRIPTION, FEATURES, REVIEWS)}


def parse_action(text: str) -> tuple[str, str]:
    """Name and value of `name[value]`, lower-cased and trimmed; two empty texts for anything else.

    Reads what `re.match(r"(.+)\\[(.+)\\]", text)` does, whose time grows with the square of the length of a
    hostile text.
    """
    line = text.strip().partition("\n")[0]
    close = line.rfind("]")
    begin = line.rfind("[", 1, max(close - 1, 0))
    if begin < 0:
        return "", ""
    return line[:begin].strip().lower(), line[begin + 1 : close].strip().lower()


class ShopVisit:
    """A walk through the shop: start -> results -> item -> sub page, and back; it ends with a purchase.

    place, page: where the agent is, and what it sees. results, number: of the last search, and which page of
    them. product: whose pages are open. chosen: the values of its options that were clicked, by name.
    """

    place: Place
    page: Page
    results: tuple[Product, ...]
    number: int
    product: Product
    chosen: dict[str, str]

    def __init__(self, shop: Shop, instruction: str) -> None:
        self._shop, self._instruction = shop, instruction
        self._start()

    @property
    def clicks(self) -> list[str]:
        """The values that can be clicked: all that are shown but those whose brackets no action can hold."""
        return [value for value in self.page.clickables if parse_action(f"click[{value}]")[1] == value]

    def act(self, text: str) -> bool:
        """Take an action. False, and nothing has changed, if it cannot be taken here."""
        name, value = parse_action(text)
        if name == "search" and value and self.page.has_search:
            self.results = self._shop.search(value)
            self._show_results(1)
        elif name == "click" and value in self.page.clickables:
            self._click(value)
        else:
            return False
        return True

    def _click(self, value: str) -> None:
        if value == BACK.lower():
            self._start()
        elif self.place == "results":
            if value == NEXT.lower():
                self._show_results(self.number + 1)
            elif value == PREVIOUS.lower():
                self._show_results(self.number - 1)
            else:
                self._show_item(next(product for product in self.results if product.asin.lower() == value))
        elif self.place == "sub page":
            self._show_item(self.product)
        elif value == PREVIOUS.lower():
            self._show_results(self.number)
        elif value == BUY.lower():
            self.place = "bought"
        elif value in _SUB_PAGES:
            self.place = "sub page"
            self.page = sub_page(self._instruction, self.product, _SUB_PAGES[value])
        else:
            # Two options may have a value in common: as in the original, the last one gets it.
            name = [name for name, values in self.product.options.items() if value in values][-1]
            self.chosen[name] = value

    def _start(self) -> None:
        self.place = "start"
        self.page = start_page(self._instruction)
        self.results = ()
        self.number = 1
        self.chosen = {}

    def _show_results(self, number: int) -> None:
        self.place, self.number, self.chosen = "results", number, {}
        self.page = results_page(self._instruction, self.results, number)

    def _show_item(self, product: Product) -> None:
        self.place, self.product = "item", product
        self.page = item_page(self._instruction, product)
