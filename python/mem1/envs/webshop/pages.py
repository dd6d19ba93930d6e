"""What the shop shows: the visible texts of a page, and what can be done on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mem1.envs.webshop.catalogue import Product

PRODUCTS_PER_PAGE = 10
BACK, PREVIOUS, NEXT, BUY = "Back to Search", "< Prev", "Next >", "Buy Now"
DESCRIPTION, FEATURES, REVIEWS = "Description", "Features", "Reviews"
BUTTONS = frozenset(button.lower() for button in (BACK, PREVIOUS, NEXT, DESCRIPTION, FEATURES, REVIEWS, BUY))
_SEPARATOR = " [SEP] "


class Page(NamedTuple):
    """texts: the visible ones, from top to bottom. clickables: what `click[...]` takes, lower-cased, each
    once. has_search: whether `search[...]` is possible.
    """

    texts: tuple[str, ...]
    clickables: tuple[str, ...]
    has_search: bool = False

    @property
    def actions(self) -> tuple[str, ...]:
        """What can be done: the words of a search are up to the agent."""
        search = ("search[<content>]",) if self.has_search else ()
        return (*search, *(f"click[{value}]" for value in self.clickables))

    @property
    def observation(self) -> str:
        """The original's text observation, and below it the actions as MEM1 lists them."""
        texts = _SEPARATOR.join(text.strip() for text in self.texts if text.strip())
        return f"{texts}\nAvailable actions: {', '.join(self.actions)}"


def start_page(instruction: str) -> Page:
    """Where a search is made."""
    return Page(("WebShop", "Instruction:", instruction, "Search"), (), has_search=True)


def results_page(instruction: str, results: tuple[Product, ...], number: int) -> Page:
    """The ten results of page `number`, from 1; those behind the last one are empty, as in the original."""
    shown = results[(number - 1) * PRODUCTS_PER_PAGE : number * PRODUCTS_PER_PAGE]
    buttons = (PREVIOUS, NEXT) if number > 1 else (NEXT,)
    texts = [f"Page {number} (Total results: {len(results)})", *buttons]
    for product in shown:
        texts += [product.asin, product.title, product.price_tag]
    return _inner_page(instruction, texts, [*buttons, *(product.asin for product in shown)])


def item_page(instruction: str, product: Product) -> Page:
    """A product with its options; as in the original's text, those that were chosen look like the others."""
    texts = [PREVIOUS]
    for name, values in product.options.items():
        texts += [name, *values]
    buttons = (DESCRIPTION, FEATURES, REVIEWS, BUY)
    texts += [product.title, f"Price: {product.price_tag}", "Rating: N.A.", *buttons]
    choices = (value for values in product.options.values() for value in values)
    return _inner_page(instruction, texts, [PREVIOUS, *buttons, *choices])


def sub_page(instruction: str, product: Product, name: str) -> Page:
    """The page `name` of a product: "Description", "Features" or "Reviews", of which the data has none."""
    texts = {DESCRIPTION: (product.description,), FEATURES: product.bullet_points, REVIEWS: ()}
    return _inner_page(instruction, [PREVIOUS, *texts[name]], [PREVIOUS])


def bought_text(reward: float) -> str:
    """What is said after the purchase."""
    return _SEPARATOR.join(["Thank you for shopping with us!", "Your score (min 0.0, max 1.0)", str(reward)])


def _inner_page(instruction: str, texts: Iterable[str], clickables: Iterable[str]) -> Page:
    clicks = dict.fromkeys(value.lower() for value in (BACK, *clickables))
    return Page(("Instruction:", instruction, BACK, *texts), tuple(clicks))
