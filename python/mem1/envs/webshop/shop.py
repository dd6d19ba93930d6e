"""A WebShop folder, read and indexed once, for any number of environments and threads."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mem1.checks import require
from mem1.envs.webshop.catalogue import Product, read_products
from mem1.envs.webshop.goals import Goal, make_goals
from mem1.envs.webshop.product_search import ProductSearch
from mem1.envs.webshop.title_nouns import find_tagger


@dataclass(frozen=True, eq=False)
class Shop:
    """products: by their ids. goals: all of them, in the order of their ids. tagger: the name of the one that
    found the nouns of titles.
    """

    products: Mapping[str, Product]
    goals: tuple[Goal, ...]
    index: ProductSearch
    tagger: str

    def search(self, words: str) -> tuple[Product, ...]:
        """At most 50 products, best first."""
        return tuple(self.products[asin] for asin in self.index.search(words))


_opening = threading.Lock()


def open_shop(folder: str | os.PathLike[str], seed: int = 0) -> Shop:
    """The shop in `folder`, made once for each folder and `seed`, which decides the bounds of prices, and the
    prices of products with a range. Raises InputError for files that are missing or malformed, and for
    packages that are missing.
    """
    require(isinstance(seed, int) and not isinstance(seed, bool), "seed", "a whole number", seed)
    with _opening:
        return _open(Path(folder).resolve(), seed)


@functools.cache
def _open(folder: Path, seed: int) -> Shop:
    tagger = find_tagger()
    products = read_products(folder, seed, tagger)
    index = ProductSearch({asin: product.document for asin, product in products.items()})
    return Shop(products, make_goals(products.values(), seed), index, tagger.name)
