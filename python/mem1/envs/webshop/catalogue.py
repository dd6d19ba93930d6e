"""The products of a WebShop folder, read and cleaned as the original does.

    items_shuffle_1000.json   a list of products: what the shop shows and searches
    items_ins_v2_1000.json    by product id: its attributes, and an instruction for some

Images, ratings and the number of the page are not read.
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mem1.checks import InputError
from mem1.envs.tasks import read_rows
from mem1.envs.webshop.title_nouns import TitleTagger

PRODUCTS, INSTRUCTIONS = "items_shuffle_1000.json", "items_ins_v2_1000.json"
_NO_PRICE = 100.0
_LONGEST_ID = 10


@dataclass(frozen=True, eq=False)
class Product:
    """A product: what its pages show, and what the reward compares.

    asin: its id. options: the values of each option by its name. price: in dollars; of a product with a range
    a draw from it. price_tag: what pages say. nouns: of the title. attributes: what is known of the product,
    shown nowhere. instruction: asks for a product with `instruction_attributes`; None where nobody asks.
    """

    asin: str
    title: str
    description: str
    bullet_points: tuple[str, ...]
    query: str
    categories: frozenset[str]
    options: Mapping[str, tuple[str, ...]]
    price: float
    price_tag: str
    nouns: tuple[str, ...]
    attributes: tuple[str, ...]
    instruction: str | None
    instruction_attributes: tuple[str, ...]

    @property
    def document(self) -> str:
        """What the search engine indexes."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options.items())
        return " ".join([self.title, self.description, *self.bullet_points[:1], options]).lower()


def read_products(folder: Path, seed: int, tagger: TitleTagger) -> dict[str, Product]:
    """The products by their ids, in the order of the file. A price drawn from a range follows from `seed` and
    the id.

    Ids that are repeated, "nan" or longer than 10 characters are left out, as in the original. Raises
    InputError for a file that cannot be read, and for a malformed row, by file and row.
    """
    table = _read_table(folder / INSTRUCTIONS)
    products: dict[str, Product] = {}
    for where, values in read_rows(folder / PRODUCTS):
        row = _Row(where, values)
        asin = row.text("asin")
        if asin == "nan" or len(asin) > _LONGEST_ID or asin in products:
            continue
        notes = _Row(f"{folder / INSTRUCTIONS}: {asin}", table.get(asin, {}))
        products[asin] = _product(row, notes, seed, tagger)
    if not products:
        raise InputError(f"{folder / PRODUCTS}: expected at least one product, got none")
    return products


class _Row(NamedTuple):
    """A row, and where it stands. Its methods raise InputError for what is malformed."""

    where: str
    values: Any

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.malformed(key, "a text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; nothing is an empty one."""
        values = self.literal(key) or ()
        if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) for value in values):
            raise self.malformed(key, "a list of texts")
        return tuple(values)

    def literal(self, key: str) -> Any:
        """The value, or what it is the text of: some copies of the data hold tables as Python literals."""
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            return value or None
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise self.malformed(key, "a Python literal") from None

    def malformed(self, key: str, expected: str) -> InputError:
        return InputError(f"{self.where}: {key}: expected {expected}, got {self.values.get(key)!r:.200}")


def _product(row: _Row, notes: _Row, seed: int, tagger: TitleTagger) -> Product:
    asin, title = row.text("asin"), row.text("name")
    bullets = row.values.get("small_description")
    prices = _prices(row)
    instruction = None if notes.values.get("instruction") is None else notes.text("instruction")
    wanted = () if instruction is None else notes.texts("instruction_attributes")
    if instruction is not None and not wanted:
        raise notes.malformed("instruction_attributes", "at least one")
    return Product(
        asin=asin,
        title=title,
        description=row.text("full_description"),
        bullet_points=(bullets,) if isinstance(bullets, str) else row.texts("small_description"),
        query=row.text("query").lower().strip(),
        categories=frozenset(part.strip() for part in row.text("product_category").split("›")),
        options=_options(row),
        price=random.Random(f"{seed} {asin} price").uniform(prices[0], prices[-1]),
        price_tag=" to ".join(f"${price}" for price in prices),
        nouns=tagger.nouns(title),
        attributes=notes.texts("attributes"),
        instruction=instruction,
        instruction_attributes=wanted,
    )


def _prices(row: _Row) -> list[float]:
    """One price, or the least and the greatest."""
    pricing = row.values.get("pricing")
    if not pricing:
        return [_NO_PRICE]
    try:
        prices = [float(re.sub(r"[^\d.]", "", price)) for price in pricing.split("$")[1:3]]
    except (AttributeError, ValueError):
        prices = []
    if not prices:
        raise row.malformed("pricing", "'$x', '$x - $y' or nothing")
    return prices


def _options(row: _Row) -> dict[str, tuple[str, ...]]:
    """Names and values as pages show them: lower-cased, a slash with blanks around it."""
    options = row.literal("customization_options") or {}
    try:
        return {
            name.lower(): tuple(choice["value"].strip().replace("/", " | ").lower() for choice in choices)
            for name, choices in options.items()
            if choices is not None
        }
    except (AttributeError, KeyError, TypeError):
        raise row.malformed(
            "customization_options", "an object with lists of objects with a text 'value'"
        ) from None


def read_json(file: Path) -> Any:
    """What is in a file. Raises InputError for one that cannot be read, and for one that is not JSON."""
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"path: expected a file that can be read, got {str(file)!r}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: expected JSON, got {error}") from None


def _read_table(file: Path) -> dict[str, Any]:
    """An object of objects."""
    table = read_json(file)
    if not isinstance(table, dict):
        raise InputError(f"{file}: expected an object by product ids, got {type(table).__name__}")
    for asin, values in table.items():
        if not isinstance(values, dict):
            raise InputError(f"{file}: {asin}: expected an object, got {values!r:.200}")
    return table
